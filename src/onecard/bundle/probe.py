"""``python -m onecard.bundle.probe BUNDLE RECIPE DEVICE``: prove one variant in a process that may crash."""

from __future__ import annotations

import sys
from pathlib import Path

from onecard.bundle.open import prove_variant

if __name__ == "__main__":
    prove_variant(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
