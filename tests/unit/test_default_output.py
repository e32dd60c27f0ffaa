"""Where a bundle goes that nobody gave a folder: never into the place of another model's."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from onecard.api import _leave_others, make_bundle, prepare
from onecard.bundle.manifest import MANIFEST, SOURCE
from onecard.cli import main
from onecard.errors import UsageError
from onecard.models.model import Origin
from onecard.models.source import read_source, save_source

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
INPUT = "x: float32[B,4], B=1..2"


@pytest.fixture
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of one stem, and nothing made of them yet."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, layer in (("m.pt", nn.ReLU()), ("m.ts", nn.Tanh())):
        torch.jit.trace(layer, torch.ones(1, 4)).save(name)
    return tmp_path / "work"


def _optimise(reference: str, output: Path | None = None) -> Path:
    model, options = prepare(reference, device="cpu", inputs=INPUT, options={"recipes": "eager", "batches": (1,)})
    return make_bundle(model, options, output=output)[0]


def _left_by(reference: str, origin: Origin | None = None) -> Path:
    """As much of a bundle as is looked at; with an origin, one that says that it has that."""
    model, _ = prepare(reference, device="cpu", inputs=INPUT)
    out = Path("m.onecard")
    save_source(model, out / SOURCE)
    (out / MANIFEST).write_text("{}")
    if origin is not None:
        changed = msgspec.structs.replace(read_source(out / SOURCE), origin=origin)
        (out / SOURCE / "source.json").write_bytes(msgspec.json.encode(changed))
    return out


@pytest.mark.timeout(300)
def test_the_same_model_again_replaces_its_bundle_and_another_one_does_not(folder: Path) -> None:
    out = _optimise("m.pt")
    assert out == folder / "m.onecard"
    (out / "mine.txt").write_text("only as long as this bundle lies here")
    with pytest.raises(UsageError, match=r"m\.onecard is the bundle of another model: of 'm\.pt' \(torchscript\)"):
        _optimise("m.ts")
    assert (out / "mine.txt").exists()
    assert _optimise(str(folder / "m.pt")) == out  # by another path
    assert not (out / "mine.txt").exists()
    assert _optimise("m.ts", out) == out  # as the user wishes
    assert read_source(out / SOURCE).origin.reference == "m.ts"


def test_it_is_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _left_by("m.pt")
    monkeypatch.setattr(sys, "argv", ["onecard", "optimize", "m.ts", "--input", INPUT])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "of 'm.pt' (torchscript), and this is 'm.ts' (torchscript)" in said
    assert "Name a folder with -o" in said
    assert not (folder.parent / "cache" / "searches").exists()


@pytest.mark.parametrize("other", [Origin("onnx", "m.onnx"), Origin("timm", "m"), Origin("exported", "m.pt")])
def test_models_of_one_name_are_told_apart_by_kind_and_reference(folder: Path, other: Origin) -> None:
    _left_by("m.pt", other)
    with pytest.raises(UsageError, match=f"of '{other.reference}' .{other.kind}., and this is 'm.pt'"):
        _optimise("m.pt")


def test_what_a_bundle_says_of_itself_cannot_steer_the_terminal(folder: Path) -> None:
    _left_by("m.pt", Origin("factory", "\x1b[2J" + "x" * 10_000))
    with pytest.raises(UsageError) as caught:
        _optimise("m.pt")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_bundle_that_cannot_be_read_is_in_nobodys_way(folder: Path) -> None:
    out = _left_by("m.ts")
    model, _ = prepare("m.pt", device="cpu", inputs=INPUT)
    with pytest.raises(UsageError):
        _leave_others(out, model)
    (out / SOURCE / "source.json").write_text("{")
    _leave_others(out, model)
