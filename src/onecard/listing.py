"""A small listing for the terminal: what a bundle holds."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onecard.bundle.manifest import Manifest
from onecard.report.format import bytes_, duration_ms
from onecard.spec import bucket_label


def print_manifest(manifest: Manifest, console: Console) -> None:
    """Name, inputs, outputs, which variant serves which bucket, and what each was measured at."""
    made_on = manifest.environment.card.name if manifest.environment.card else manifest.environment.cpu
    total = sum(entry.size for entry in manifest.files.values())
    console.print(f"[bold]{escape(manifest.name)}[/]  {len(manifest.files)} files, {bytes_(total)}", soft_wrap=True)
    console.print(f"made on {escape(made_on)}, torch {manifest.environment.versions.get('torch', '?')}", soft_wrap=True)
    for tensor in manifest.spec.inputs:
        console.print(f"  in   {escape(str(tensor))}", soft_wrap=True)
    for tensor in manifest.spec.outputs:
        console.print(f"  out  {escape(str(tensor))}", soft_wrap=True)
    for name, rng in manifest.spec.symbols.items():
        console.print(f"       {name} = {rng}")
    table = Table("variant", "serves", *(bucket_label(b) for b in manifest.buckets or ({},)), "peak memory", "size")
    for entry in manifest.variants:
        serves = [bucket_label(r.bucket) for r in manifest.ranks if r.variants and r.variants[0] == entry.recipe.id]
        timings = [entry.measurement.timing(b) for b in manifest.buckets or ({},)]
        table.add_row(
            entry.recipe.id,
            ", ".join(serves) or "fallback",
            *(duration_ms(t.median_ms) if t else "" for t in timings),
            bytes_(entry.measurement.peak_bytes),
            bytes_(entry.measurement.size_bytes),
        )
    console.print(table)
