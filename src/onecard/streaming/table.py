"""A split as a small table for the terminal: the parts, their layers and bytes, and where they are."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from onecard.streaming.residency import Residency, text
from onecard.streaming.split import Split


def parts_table(split: Split, residency: Residency | None = None) -> Table:
    """One row for each part.

    Args:
        split: the parts.
        residency: adds where each part's weights are, and a last row with what a pass copies.
    """
    columns = ["part", "first layer", "last layer", "weights"]
    table = Table(*columns, *(["place"] if residency else []), title="Parts, in the order in which they run")
    streamed = set(residency.streamed) if residency else set()
    for index, part in enumerate(split.parts):
        nbytes = sum(split.weights[name].nbytes for name in part.weights)
        row = [part.name, escape(part.first), escape(part.last), text(nbytes)]
        table.add_row(*row, *([("copied" if index in streamed else "stays")] if residency else []))
    if residency:
        table.caption = (
            f"{text(residency.kept_bytes)} stay, {text(residency.pass_bytes)} are copied in a pass through "
            f"{residency.slots} slots of {text(residency.slot_bytes)}; {text(residency.budget.activation_bytes)} are "
            f"left for activations"
        )
    return table
