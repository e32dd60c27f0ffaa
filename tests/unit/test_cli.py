"""What a user on their first day gets wrong: one clear message each, the documented exit code, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onecard.cli import main
from tests.conftest import INPUT


def _onecard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["onecard", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


MISTAKES = {
    "missing file": (["nowhere.py:small"], 3, "nowhere.py"),
    "misspelt callable": (["{zoo}:smal"], 3, "small"),
    "factory raises": (["{zoo}:raises"], 3, "no such luck"),
    "factory gives no module": (["{zoo}:number"], 3, "int"),
    "no such kind": (["resnet50"], 3, "torchvision:"),
    "no input given": (["{zoo}:small"], 2, "--input"),
    "input grammar": (["{zoo}:small", "--input", "image float32"], 2, "write it like"),
    "unknown dtype": (["{zoo}:small", "--input", "image: float33[B,3,16,16], B=1..4"], 2, "float32"),
    "symbol without range": (["{zoo}:small", "--input", "image: float32[B,3,16,16]"], 2, "no range"),
    "shape does not fit": (["{zoo}:small", "--input", "image: float32[B,4,16,16], B=1..4"], 2, "--input"),
    "unknown recipe": (["{zoo}:small", "--input", INPUT, "--recipe", "warp-drive"], 2, "torchscript.trace"),
    "unknown objective": (["{zoo}:small", "--input", INPUT, "--objective", "beauty"], 2, "latency"),
    "unknown device": (["{zoo}:small", "--input", INPUT, "--device", "abacus"], 2, "cpu"),
    "batch out of range": (["{zoo}:small", "--input", INPUT, "--batch", "99"], 2, "B=1..4"),
    "bad duration": (["{zoo}:small", "--input", INPUT, "--time-limit", "soon"], 2, "10m"),
    "bad size": (["{zoo}:small", "--input", INPUT, "--max-memory", "lots"], 2, "2GiB"),
    "metric without data": (["{zoo}:small", "--input", INPUT, "--metric", "accuracy"], 2, "--data"),
    "drop without metric": (["{zoo}:small", "--input", INPUT, "--max-drop", "0.1"], 2, "--metric"),
    "negative drop": (["{zoo}:small", "--input", INPUT, "--metric", "f1", "--max-drop", "-0.1"], 2, "0 or more"),
    "drop of NaN": (["{zoo}:small", "--input", INPUT, "--metric", "f1", "--max-drop", "nan"], 2, "0 or more"),
    "data that exits": (["{zoo}:small", "--input", INPUT, "--data", "{zoo}:leaves"], 3, "own code called sys.exit(0)"),
    "factory that exits": (["{zoo}:leaves"], 3, "called sys.exit(0) (at "),
    "missing data": (["{zoo}:small", "--input", INPUT, "--data", "nothing.npz"], 4, "nothing.npz"),
    "missing weights": (["{zoo}:small", "--input", INPUT, "--weights", "no.safetensors"], 3, "no.safetensors"),
    "unknown option": (["{zoo}:small", "--frobnicate"], 2, "--frobnicate"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(
    mistake: str,
    model_file: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, code, hint = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    model_file.write_text(model_file.read_text() + "\n\ndef leaves():\n    raise SystemExit(0)\n")
    before = sorted(os.listdir(tmp_path))
    filled = [a.replace("{zoo}", str(model_file)) for a in arguments]
    got, text = _onecard(monkeypatch, capsys, "optimize", *filled)
    assert got == code, text
    assert hint in text
    assert "Traceback" not in text
    assert sorted(set(os.listdir(tmp_path)) - {"__pycache__"}) == before


def test_an_output_that_is_no_bundle_is_left_alone(
    model_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    code, text = _onecard(
        monkeypatch, capsys, "optimize", f"{model_file}:small", "--input", INPUT, "-o", str(tmp_path / "precious")
    )
    assert code == 9 and "no onecard bundle" in text
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user without rights")
def test_a_read_only_output_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    from onecard.errors import StorageError

    locked = tmp_path / "locked"
    locked.mkdir(mode=0o755)
    pid = os.fork()
    if pid == 0:  # a child that gives up its rights
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            from onecard.bundle.write import check_writable

            check_writable(locked / "m.onecard")
        except StorageError as error:
            code = 0 if "cannot be written" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.listdir(locked) == []


@pytest.mark.timeout(200)
def test_a_full_disk_leaves_nothing_half_written(model_file: Path, cache: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk: both end as an OSError from write()."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from onecard.cli import main\n"
        f"sys.argv = ['onecard', 'optimize', {f'{model_file}:small'!r}, '--input', {INPUT!r},"
        f" '--recipe', 'eager', '-o', {str(tmp_path / 'small.onecard')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 9, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\nerror:") == 1
    assert not (tmp_path / "small.onecard").exists()
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made by the command line itself."""
    from tests.conftest import MODEL_FILE

    folder = tmp_path_factory.mktemp("cli")
    (folder / "zoo.py").write_text(MODEL_FILE)
    environment = {**os.environ, "ONECARD_CACHE": str(folder / "cache")}
    recipe = ["--recipe", "onnxruntime.cpu", "--device", "cpu", "-o", str(folder / "small.onecard")]
    command = [sys.executable, "-c", "from onecard.cli import main; main()", "optimize", f"{folder / 'zoo.py'}:small"]
    done = subprocess.run(
        [*command, "--input", INPUT, *recipe], env=environment, capture_output=True, text=True, check=True, timeout=200
    )
    assert "onnxruntime.cpu" in done.stdout and "report.html" in done.stdout
    return folder / "small.onecard"


def test_run_inspect_and_report(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("in.npz", image=np.zeros((3, 3, 16, 16), np.float32))
    code, text = _onecard(monkeypatch, capsys, "run", str(bundle), "in.npz", "-o", "out.safetensors")
    assert code == 0 and "output: float32[3, 10]" in text
    from safetensors.numpy import load_file

    assert load_file("out.safetensors")["output"].shape == (3, 10)
    code, text = _onecard(monkeypatch, capsys, "inspect", str(bundle))
    assert code == 0 and "image: float32[B,3,16,16]" in text and "eager" in text
    code, text = _onecard(monkeypatch, capsys, "report", str(bundle))
    assert code == 0 and Path("small-report.html").stat().st_size > 10_000 and "small-report.html" in text


def test_run_with_wrong_arrays(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("name.npz", picture=np.zeros((1, 3, 16, 16), np.float32))
    np.savez("dtype.npz", image=np.zeros((1, 3, 16, 16)))
    np.savez("shape.npz", image=np.zeros((9, 3, 16, 16), np.float32))
    np.save("array.npy", np.zeros((1, 3, 16, 16), np.float32))
    Path("array.npy").rename("array.npz")
    Path("text.npz").write_text("no arrays here")
    np.savez("object.npz", image=np.array([{"a": 1}], dtype=object))
    for name, code, hint in (
        ("name.npz", 2, "no input 'picture'"),
        ("dtype.npz", 2, "is float64, expected image: float32"),
        ("shape.npz", 2, "B=9 is outside the range B=1..4"),
        ("object.npz", 4, "cannot be read"),
        ("array.npz", 4, "it is no .npz file"),
        ("text.npz", 4, "it is no .npz file"),
        ("absent.npz", 4, "no file absent.npz"),
    ):
        got, text = _onecard(monkeypatch, capsys, "run", str(bundle), name, "-o", "out.npz")
        assert got == code, (name, text)
        assert hint in text, (name, text)
        assert "Traceback" not in text
    assert not Path("out.npz").exists()


def test_what_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["report"]):
        code, text = _onecard(monkeypatch, capsys, *command, str(tmp_path))
        assert code == 6 and "no onecard bundle" in text


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _onecard(monkeypatch, capsys, "doctor", "--device", "cpu")
    assert code in (0, 1) and "torch" in text


CHATTY = """
import os

import torch
from torch import nn

print("imported")
os.system("echo native")


class Chatty(nn.Module):
    def forward(self, image):
        print("called")
        return image + 1
"""


def test_what_a_model_prints_is_kept_out_of_json(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text(CHATTY)
    command = [sys.executable, "-c", "from onecard.cli import main; main()", "plan", f"{tmp_path / 'chatty.py'}:Chatty"]
    options = ["--input", "image: float32[B,3], B=1..2", "--device", "cpu", "--no-measure", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == "model"
    assert all(said in done.stderr for said in ("imported", "native", "called"))


@pytest.mark.parametrize(
    ("command", "option"),
    [("optimize", "--data"), ("optimize", "--metric"), ("qat", "--train"), ("prune", "--train"), ("mlperf", "--data")],
)
def test_help_names_the_files_that_a_function_may_stand_in(command: str, option: str) -> None:
    from typer.main import get_command

    from onecard.cli import app

    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    help_text = next(p.help for p in parameters if option in p.opts)
    assert "file.py:callable" in help_text
