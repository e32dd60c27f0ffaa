"""The bundle: its format, writing it, opening it, and running one of its variants."""
