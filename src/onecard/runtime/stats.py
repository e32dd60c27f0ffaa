"""What the engine tells of every batch, through one callback."""

from __future__ import annotations

from typing import NamedTuple

from onecard.spec import Bucket


class BatchStats(NamedTuple):
    """One batch that was run. All times are in seconds, host clock unless said.

    Args:
        variant: the recipe that ran it.
        size: what it was run at.
        requests: how many callers had rows in it.
        rows: of the batch, without padding.
        padding: share of the elements that were run for nothing, from 0 to 1.
        queue_s: how long each request's rows waited before the batch was formed, in the batch's order.
        gather_s: collecting the rows in the staging slot.
        copy_in_s: host to device (CUDA events; 0 on a CPU).
        compute_s: the model alone (CUDA events on a GPU).
        copy_out_s: device to host (CUDA events; 0 on a CPU).
        total_s: from forming the batch to its answers being the callers'.
        queued: requests left waiting when the batch was formed.
        in_flight: batches under way, this one included.
        error: what went wrong, or empty: ``out of memory``, or the error's first line.
    """

    variant: str
    size: Bucket
    requests: int
    rows: int
    padding: float
    queue_s: tuple[float, ...]
    gather_s: float
    copy_in_s: float
    compute_s: float
    copy_out_s: float
    total_s: float
    queued: int
    in_flight: int
    error: str = ""
