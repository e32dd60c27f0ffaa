"""The sizes at which every variant must agree with the original."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from onecard.inputs import is_mask
from onecard.spec import Bucket, Spec, bucket_label


class Case(msgspec.Struct, frozen=True):
    """One trial: a size, the seed of its inputs, and whether rows are masked to different lengths."""

    bucket: Bucket
    seed: int
    ragged: bool = False

    @property
    def name(self) -> str:
        return bucket_label(self.bucket) + ("-ragged" if self.ragged else "")


def make_cases(spec: Spec, buckets: Sequence[Bucket]) -> list[Case]:
    """Every bucket, both ends of every range, an odd batch, odd lengths, and ragged rows.

    Args:
        spec: the symbols and their ranges.
        buckets: the sizes that will be timed.

    Returns:
        Cases with distinct sizes (and one ragged one where the model takes a mask), smallest first.
    """
    batch = spec.batch_symbol
    odd = {
        name: _odd_inside(rng.low, rng.high, 3 if name == batch else (rng.low + rng.high) // 3)
        for name, rng in spec.symbols.items()
    }
    sizes: list[Bucket] = [*buckets, spec.smallest(), odd]
    for name, rng in spec.symbols.items():
        if name != batch:  # shortest and longest sequence, each in an odd batch
            sizes += [{**odd, name: rng.low}, {**odd, name: rng.high}]
    if not buckets:
        sizes.append(spec.largest())
    elif batch is not None:  # the largest batch that will be served, never a larger one for the test alone
        sizes.append({**spec.largest(), batch: max(b[batch] for b in buckets)})
    distinct = {bucket_label(size): size for size in sizes}
    cases = [Case(size, seed) for seed, size in enumerate(distinct.values())]
    if any(is_mask(tensor) for tensor in spec.inputs) and spec.symbols:
        cases.append(Case(odd, len(cases), ragged=True))
    return sorted(cases, key=lambda c: (sum(c.bucket.values()), c.ragged))


def _odd_inside(low: int, high: int, wish: int) -> int:
    wish = max(low, min(high, wish))
    if wish % 2 == 0:
        wish = wish - 1 if wish - 1 >= low else min(wish + 1, high)
    return wish
