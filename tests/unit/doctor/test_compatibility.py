"""The table of what goes with what: its rows can be read, name their sources, and hold for what is installed here."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from onecard.doctor.check_software import EXTRAS, TORCH_MINIMUM
from onecard.doctor.compatibility import compatibility, mismatches
from onecard.doctor.gather import PACKAGES
from onecard.doctor.versions import numbers, satisfies

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_every_row_names_a_source_that_is_listed() -> None:
    table = compatibility()
    used = {row.source for row in (*table.linux_drivers.values(), *table.torch.values(), *table.pairs)}
    used |= {table.torch_builds_source, "cuda-minor-versions"}
    assert used == set(table.sources)
    assert all(source.url.startswith("https://") for source in table.sources.values())
    assert {source.verified for source in table.sources.values()} <= {"page", "metadata", "quoted"}


def test_every_row_is_about_packages_that_are_looked_at() -> None:
    known = {*PACKAGES, "torch", "cuda", "cudnn"}
    for row in compatibility().pairs:
        assert {row.package, *row.needs} <= known
        satisfies("1.0", row.versions)
        for bounds in row.needs.values():
            satisfies("1.0", bounds)


def test_rows_of_one_package_do_not_overlap() -> None:
    pairs = compatibility().pairs
    for row in pairs:
        oldest = row.versions.partition(",")[0].removeprefix(">=")
        fits = [other for other in pairs if other.package == row.package and satisfies(oldest, other.versions)]
        assert fits == [row]


def test_drivers_rise_with_cuda() -> None:
    needs = list(compatibility().linux_drivers.values())
    assert all(numbers(need.minimum) <= numbers(need.full) for need in needs)
    assert [numbers(need.full) for need in needs] == sorted(numbers(need.full) for need in needs)


def test_every_cuda_that_torch_is_built_with_has_its_driver_and_its_cards() -> None:
    table = compatibility()
    for release in table.torch.values():
        assert set(release.cuda) <= set(table.linux_drivers)
    assert all(set(builds) <= set(table.linux_drivers) for builds in table.torch_builds.values())
    assert ".".join(map(str, TORCH_MINIMUM)) in table.torch


def plain(bound: str) -> str:
    """A bound without the zeros at its end: ``<2.5.0`` is ``<2.5``."""
    text = bound.strip()
    while text.endswith(".0"):
        text = text.removesuffix(".0")
    return text


@pytest.mark.parametrize("package", ["torchvision", "torch-tensorrt", "executorch", "openvino", "nncf", "torch"])
def test_rows_hold_for_what_is_installed_here(package: str) -> None:
    """The package's own requirements say the same as the row about it."""
    try:
        own = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed here")
    version = importlib.metadata.version(package)
    name = next(name for name in (package, package.replace("-", "_")) if name in {*PACKAGES, "torch"})
    rows = [row for row in compatibility().pairs if row.package == name and satisfies(version, row.versions)]
    if not rows:
        pytest.skip(f"the table has no row about {package} {version}")
    for other, bounds in rows[0].needs.items():
        lines = [line for line in own if line.startswith(other) and "extra ==" not in line]
        if package == "torch" and not lines:
            pytest.skip("this torch asks for no Triton: it is a build for the CPU")
        asked = [set(map(plain, line.removeprefix(other).partition(";")[0].split(","))) for line in lines]
        assert any(set(map(plain, bounds.split(","))) <= line for line in asked), (lines, bounds)


def test_every_extra_of_the_project_is_looked_at() -> None:
    extras = PROJECT.read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert [extra for extra in EXTRAS if f"\n{extra} = [" not in extras] == []
    assert all(package in PACKAGES for packages in EXTRAS.values() for package in packages)


def test_mismatches() -> None:
    found = {"torch": "2.13.0+cu130", "triton": "3.7.1", "torchao": "0.16.0", "executorch": "1.4.1"}
    broken = mismatches(found, compatibility())
    assert [(pair.package, pair.other, pair.other_version) for pair in broken] == [
        ("torchao", "torch", "2.13.0+cu130"),
        ("executorch", "torchao", "0.16.0"),
    ]
    assert mismatches({}, compatibility()) == []
    assert mismatches({"torchao": "0.16.0"}, compatibility()) == []


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.14.0a0+git123", ">=2.14,<2.15", True),
        ("2.9", ">=2.10", False),
        ("2.11", ">=2.11.0", True),
        ("2.11.0", "==2.11", True),
        ("580.65", ">=580.65.06", False),
        ("3.10", "<3.9", False),
        ("13.0", ">=12,<13", False),
        ("1.0", "", True),
    ],
)
def test_ranges(version: str, bounds: str, fits: bool) -> None:
    assert satisfies(version, bounds) is fits


def test_a_range_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="write it like"):
        satisfies("1.0", "~=1.0")
