"""Load on a server or a bundle: what it answers, how soon, and how much of it there may be."""
