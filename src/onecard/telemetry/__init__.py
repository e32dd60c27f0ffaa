"""What is watched while models are served: the card's sensors, and what the server tells of itself."""
