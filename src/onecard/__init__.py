"""onecard: the fastest verified way to run a PyTorch model on one card."""

__version__ = "0.1.0"
