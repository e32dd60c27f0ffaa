"""The cache folder: who uses what of it (``use``), what is there (``contents``), and removing it again (``prune``)."""
