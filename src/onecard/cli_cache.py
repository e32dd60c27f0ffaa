"""The command ``onecard cache``: what the cache folder holds, and removing what is not needed any more."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onecard.errors import StorageError, UsageError
from onecard.units import parse_duration, parse_size

if TYPE_CHECKING:
    from onecard.cache.contents import Entry, Kind
    from onecard.cache.prune import Pruned

_PIPE_WIDTH = 120
_DIGITS = 8  # of a key, to tell entries apart


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="cache")(cache_command)


def cache_command(
    prune: Annotated[str | None, typer.Option(help="Remove what was not used for so long: 12h, 30d, 8w.")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Remove the least recently used until no more than so much is left: 20GiB.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    json: Annotated[bool, typer.Option("--json", help="What is there, or what was removed, as JSON.")] = False,
) -> None:
    """Show what earlier searches and trainings left in the cache folder, and remove it; what is in use stays."""
    from onecard.cache.contents import by_kind, read_contents, summarise
    from onecard.cache.prune import Wish
    from onecard.cache.prune import prune as remove
    from onecard.evidence import to_json
    from onecard.host import cache_folder

    removes = prune is not None or keep is not None or clear
    if dry_run and not removes:
        raise UsageError("--dry-run shows what would be removed:", "add --prune 30d, --keep 20GiB or --clear.")
    if clear and (prune is not None or keep is not None):
        raise UsageError("--clear removes everything, whatever its age or size:", "leave out --prune and --keep.")
    unused_s = _age(prune) if prune is not None else None
    wish = Wish(unused_s, parse_size(keep) if keep is not None else None, clear)
    root = cache_folder()
    entries = read_contents(root)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if not removes:
        if json:
            rows = {"total": summarise("total", entries), "kinds": by_kind(entries), "entries": entries}
            sys.stdout.write(to_json({"folder": str(root.absolute()), **rows}).decode() + "\n")
        else:
            print_contents(root, entries, out)
        return
    done = remove(root, entries, wish, dry_run=dry_run)
    if json:
        sys.stdout.write(to_json(done).decode() + "\n")
    else:
        print_pruned(done, out)
    _check_all_went(done)


def print_contents(root: Path, entries: list[Entry], out: Console) -> None:
    """The folder, a row for each kind, and their total."""
    from onecard.cache.contents import by_kind, summarise

    if not entries:
        out.print(f"Nothing is kept in {escape(str(root.absolute()))}", soft_wrap=True)
        return
    out.print(escape(str(root.absolute())), soft_wrap=True)
    table = _table("kind", "count", "in use", "size", "oldest use", "newest use")
    for row in by_kind(entries):
        table.add_row(row.kind, *_cells(row))
    table.add_section()
    table.add_row("total", *_cells(summarise("total", entries)))
    out.print(table)


def print_pruned(done: Pruned, out: Console) -> None:
    """What went or would go, what is in use, and what that makes."""
    from onecard.report.format import bytes_

    if done.removed:
        table = _table("would go" if done.dry_run else "removed", "size", "last use", "what")
        for entry in done.removed:
            table.add_row(entry.kind, bytes_(entry.bytes), _minute(entry.last_used), _what(entry))
        out.print(table)
    for entry in done.in_use:
        out.print(
            f"[yellow]in use, so it stays:[/] {entry.kind} {_what(entry)} ({bytes_(entry.bytes)})", soft_wrap=True
        )
    count = len(done.removed)
    if not count:
        out.print(f"Nothing to remove; {bytes_(done.left_bytes)} in {escape(done.folder)}", soft_wrap=True)
        return
    entries = "1 entry" if count == 1 else f"{count} entries"
    went = "would go and free" if done.dry_run else "removed,"
    rest = "would be left" if done.dry_run else "left"
    freed, left = bytes_(done.freed_bytes), bytes_(done.left_bytes)
    freed = freed if done.dry_run else f"{freed} freed"
    out.print(f"{entries} {went} {freed}; {left} {rest} in {escape(done.folder)}", soft_wrap=True)


def _check_all_went(done: Pruned) -> None:
    """Tell of the first thing that could not be removed.

    Raises:
        StorageError: there is one.
    """
    if not done.failed:
        return
    first, more = done.failed[0], len(done.failed) - 1
    others = f" (and {more} more)" if more else ""
    raise StorageError(
        f"{first.path} cannot be removed: {first.why}{others}.",
        "What another user's onecard made, in a container say, that user can remove.",
    )


def _age(text: str) -> float:
    """Seconds of an age, for which a bare number, as seconds, would be a mishap.

    Raises:
        UsageError: not an age.
    """
    try:
        if text.strip()[-1:].isalpha():
            return parse_duration(text)
    except UsageError:
        pass
    raise UsageError(f"'{text}' is not an age such as 12h, 30d or 8w.")


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for position, head in enumerate(heads):
        number = head in ("count", "in use", "size")
        table.add_column(head, justify="right" if number else "left", no_wrap=position < len(heads) - 1)
    return table


def _cells(row: Kind) -> tuple[str, ...]:
    from onecard.report.format import bytes_

    return str(row.count), str(row.in_use), bytes_(row.bytes), _minute(row.oldest), _minute(row.newest)


def _minute(time: datetime | None) -> str:
    """A time as the user's clock shows it."""
    from onecard.report.format import NONE

    return f"{time.astimezone():%Y-%m-%d %H:%M}" if time is not None else NONE


def _what(entry: Entry) -> str:
    """The model that was searched, and enough of the key to tell two apart."""
    from onecard.report.format import clean

    key = Path(entry.path).name
    if entry.kind == "search":
        key = key[:_DIGITS]
    return escape(clean(f"{entry.name} ({key})" if entry.name else key))
