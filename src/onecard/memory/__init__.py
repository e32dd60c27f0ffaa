"""How much memory a model needs, predicted and measured, and what would make it fit. No serving in it."""
