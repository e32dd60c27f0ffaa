"""The clock: raw samples of latency, throughput and memory, and the card's own state beside them."""
