"""Serving a bundle over a network: the protocols, the connections, and the processes behind them."""
