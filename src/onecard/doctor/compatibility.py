"""The table of what goes with what, ``data/compatibility.json``, with the addresses its rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import msgspec

from onecard.doctor.versions import numbers, satisfies


class Source(msgspec.Struct, frozen=True):
    """Where rows come from.

    Args:
        url: of the document itself.
        verified: how the rows were read: ``page`` (the document), ``metadata`` (the package's own), or ``quoted``
            (other people's copies of the document, which agree with each other; the page itself was not at hand).
    """

    url: str
    verified: str


class DriverNeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The oldest Linux driver that starts a CUDA release at all, and the oldest that does all of it."""

    minimum: str
    full: str
    source: str


class TorchRelease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one minor release of torch is published for.

    Args:
        python: its oldest and its newest Python, the newest maybe still as an experiment.
        cuda: the CUDA releases that it is built with.
        cpp: the C++ standard of what it generates and includes, 17 or 20.
        source: a key of the table's sources.
    """

    python: tuple[str, str]
    cuda: tuple[str, ...]
    cpp: int
    source: str


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Versions of a package, and the versions of others that they go with.

    Args:
        package: as :attr:`onecard.doctor.facts.Software.packages` names it.
        versions: the range of its versions that the row is about.
        needs: other package to the range that it must lie in, if it is installed.
        source: a key of the table's sources.
    """

    package: str
    versions: str
    needs: dict[str, str]
    source: str


class Compatibility(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole table."""

    sources: dict[str, Source]
    linux_drivers: dict[str, DriverNeed]
    torch: dict[str, TorchRelease]
    torch_builds: dict[str, dict[str, tuple[str, ...]]]
    torch_builds_source: str
    pairs: tuple[Pair, ...]

    def url(self, source: str) -> str:
        return self.sources[source].url

    def release(self, version: str) -> TorchRelease | None:
        """The row of a torch version, or None for one that the table does not know."""
        return self.torch.get(".".join(map(str, numbers(version)[:2])))


class Mismatch(msgspec.Struct, frozen=True):
    """Two installed packages that do not go together: ``package`` needs ``other`` in the range ``bounds``."""

    package: str
    version: str
    other: str
    other_version: str
    bounds: str
    url: str


@cache
def compatibility() -> Compatibility:
    """The table that comes with onecard."""
    return msgspec.json.decode((files("onecard") / "data/compatibility.json").read_bytes(), type=Compatibility)


def mismatches(found: Mapping[str, str], table: Compatibility) -> list[Mismatch]:
    """Every pair of installed packages that breaks a row of the table.

    Args:
        found: package to version.
        table: the rows.
    """
    return [
        Mismatch(row.package, found[row.package], other, found[other], bounds, table.url(row.source))
        for row in table.pairs
        if row.package in found and satisfies(found[row.package], row.versions)
        for other, bounds in row.needs.items()
        if other in found and not satisfies(found[other], bounds)
    ]
