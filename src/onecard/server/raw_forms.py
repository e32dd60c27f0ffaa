"""Which model a raw form of ``--ingest`` is for, checked before any model is opened; imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from onecard.errors import UsageError
from onecard.runtime.ingest_text import read_forms


def check_forms(texts: Iterable[str], models: Collection[str] | None) -> None:
    """Refuse raw forms that cannot be read, or that no model will ever take.

    Args:
        texts: see :func:`onecard.runtime.ingest_text.read_forms`.
        models: names that may stand before a form; None where models of any name may be loaded.

    Raises:
        UsageError: one that is wrong; what its model says to it is known when that is opened.
    """
    for form in read_forms(texts):
        if form.model and models is not None and form.model not in models:
            raise UsageError(
                f"there is no model '{form.model}' for the raw form '{form.text}': "
                + (f"expected {', '.join(models)}." if models else "this place is one model's own."),
                "" if models else "Leave the name out.",
            )
