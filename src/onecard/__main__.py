"""``python -m onecard``."""

from onecard.cli import main

if __name__ == "__main__":
    main()
