"""Compression from the command line: bad rows, nothing to compress, targets out of reach, and the whole way round."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from onecard.bundle.evidence_file import read_evidence
from onecard.cli import main
from tests.conftest import INPUT

COMMAND = [sys.executable, "-c", "from onecard.cli import main; main()"]


def onecard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["onecard", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


def pictures(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 3, 16, 16)).astype("float32")


BAD_ROWS = {
    "shape": (pictures(4)[:, :, :8], "dimension 2 must be 16"),
    "dtype": (pictures(4).astype("int64"), "expected image: float32"),
    "empty": (pictures(0), "the data is empty"),
    "nan": (np.where(pictures(4) > 2, np.nan, pictures(4)).astype("float32"), "NaN or infinity"),
    "constant": (np.zeros((4, 3, 16, 16), "float32"), "which gives no range"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_calibration_rows_are_refused_before_any_work(
    case: str,
    model_file: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    array, hint = BAD_ROWS[case]
    np.savez(tmp_path / "rows.npz", image=array)
    out = tmp_path / "small.onecard"
    given = [f"{model_file}:small", "--input", INPUT, "--calibration", str(tmp_path / "rows.npz"), "-o", str(out)]
    code, text = onecard(monkeypatch, capsys, "optimize", *given)
    assert code == 4, text
    assert hint in text.replace("\n", " ")
    assert "Traceback" not in text
    assert not out.exists()


@pytest.mark.timeout(200)
def test_a_model_with_nothing_to_quantise_is_a_row(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("from torch import nn\ndef make():\n    return nn.Softmax(dim=1)\n")
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).normal(size=(8, 5)).astype("float32"))
    given = [f"{tmp_path / 'plain.py'}:make", "--input", "x: float32[B,5], B=1..4"]
    given += ["--calibration", str(tmp_path / "rows.npz"), "-o", str(tmp_path / "plain.onecard")]
    for recipe in ("onnxruntime.cpu+int8", "openvino+int8", "inductor+int8@bucket", "eager+fp8"):
        given += ["--recipe", recipe]
    done = subprocess.run([*COMMAND, "optimize", *given], capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    rows = {c.id: c.verdict for c in read_evidence(tmp_path / "plain.onecard").candidates}
    compressed = {name: verdict for name, verdict in rows.items() if name != "eager"}
    assert len(compressed) == 4
    assert {v.reason for v in compressed.values()} == {"unsupported"}, compressed
    assert all("layer" in v.detail or "quantise" in v.detail for v in compressed.values()), compressed


def test_a_static_scheme_without_rows_says_what_to_pass(cache: Path, tmp_path: Path, model_file: Path) -> None:
    given = [f"{model_file}:small", "--input", INPUT, "--recipe", "onnxruntime.cpu+int8", "-o", str(tmp_path / "b")]
    done = subprocess.run([*COMMAND, "optimize", *given], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    verdict = next(c.verdict for c in read_evidence(tmp_path / "b").candidates if c.id != "eager")
    assert verdict.reason == "unsupported"
    assert "--calibration" in verdict.cure


def test_a_target_out_of_reach_names_the_closest(
    model_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pruned.pt2"
    given = [f"{model_file}:small", "--input", INPUT, "--target", "flops=0.0001", "-o", str(out)]
    code, text = onecard(monkeypatch, capsys, "prune", *given)
    assert code == 2, text
    assert "--accept-closest" in text and "flops=0." in text
    assert "Traceback" not in text
    assert not out.exists()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows that the classes can be told apart by."""
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    label = np.arange(96) % 10
    np.savez(path, image=pictures(96) + label[:, None, None, None].astype("float32") * 0.2, label=label)
    return path


@pytest.mark.timeout(280)
def test_prune_train_and_search_with_all_of_it(rows: Path, cache: Path, tmp_path: Path, model_file: Path) -> None:
    """The whole way round, as the documentation has it."""
    model = [f"{model_file}:small", "--input", INPUT]
    judge = ["--data", str(rows), "--metric", "accuracy"]

    def run(*words: str) -> str:
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout

    train = ["--train", str(rows), *judge, "--epochs", "1"]
    pruned = run("prune", *model, *train, "--target", "flops=0.8", "-o", str(tmp_path / "p.pt2"))
    trained = run("qat", *model, *train, "-o", str(tmp_path / "q.pt2"))
    assert "post-training" in trained
    for printed, option in ((pruned, "--pruned"), (trained, "--qat")):  # a command that works as it stands
        assert option in printed and f"--input '{INPUT}'" in printed
    recipes = ("eager+pruned", "onnxruntime.cpu+qat", "onnxruntime.cpu+pruned+int8")
    chosen = [word for recipe in recipes for word in ("--recipe", recipe)]
    programs = ["--pruned", str(tmp_path / "p.pt2"), "--qat", str(tmp_path / "q.pt2"), "--max-drop", "1"]
    run("optimize", *model, *judge, *programs, *chosen, "-o", str(tmp_path / "small.onecard"))
    evidence = read_evidence(tmp_path / "small.onecard")
    found = {c.id: c for c in evidence.candidates}
    assert {found[r].verdict.reason for r in recipes} <= {"ok", "slower"}, {r: found[r].verdict for r in recipes}
    assert [c.scheme for c in found["onnxruntime.cpu+pruned+int8"].compression] == ["pruned", "int8"]
    cost = json.loads((tmp_path / "p.json").read_text())
    assert cost["after"]["params"] < cost["before"]["params"]
    assert found["onnxruntime.cpu+pruned+int8"].metric is not None


def test_ctrl_c_in_training_is_one_message_and_the_next_run_goes_on(
    rows: Path, cache: Path, tmp_path: Path, model_file: Path
) -> None:
    out = tmp_path / "q.pt2"
    words = ["qat", f"{model_file}:small", "--input", INPUT, "--train", str(rows), "--epochs", "400", "--batch", "4"]
    # A shell in the background ignores SIGINT, and so would its children.
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
               "from onecard.cli import main; main()", *words, "-o", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    checkpoints = cache / "training"
    end = time.monotonic() + 200
    while not list(checkpoints.rglob("*.safetensors")):  # written after each epoch, of which there are 400
        assert process.poll() is None and time.monotonic() < end, "the training did not get to its first checkpoint"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert errors.count("error:") == 1 and "again" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    assert list(checkpoints.rglob("*.safetensors"))
