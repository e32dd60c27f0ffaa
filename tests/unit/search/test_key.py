"""The key of a search: the same for the same model anywhere, another one for whatever changes its answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from onecard.environment import detect
from onecard.models.load import load_model
from onecard.search.job import Job
from onecard.search.key import job_key

FILES = {
    "model.py": """
import torch
from torch import nn
import neighbour
from neighbour import Base


class Net(Base):
    KINDS = {"a", "b", "c"}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.scale = neighbour.SCALE
        self.names = {"x", "yy", "zzz"}
        self.act = nn.LeakyReLU(neighbour.SLOPE)
        self.register_buffer("shift", torch.full((3,), neighbour.SHIFT), persistent=False)


def net():
    return Net()
""",
    "neighbour.py": """
from torch import nn
from deeper import twice

SCALE, SHIFT, SLOPE = 1.0, 0.0, 0.01


class Base(nn.Module):
    def forward(self, x):
        return twice(self.act(self.layer(x))) * self.scale + self.shift
""",
    "deeper.py": "def twice(x):\n    return x * 2.0\n",
    "metric.py": "def good(outputs, labels):\n    return 1.0\n",
}
KEY = """
import os, sys
sys.path.append(os.getcwd())
from onecard.environment import detect
from onecard.models.load import load_model
from onecard.search.job import Job
from onecard.search.key import job_key
model = load_model("model.py:net", inputs=["x: float32[B,4], B=1..8"])
print(job_key(model, Job("net", model.spec, ({"B": 1},), "cpu", detect("cpu"), {}, metric="metric.py:good"), ""))
"""


def project(folder: Path) -> Path:
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def key_in(folder: Path, seed: str = "0") -> str:
    """What a process of its own finds, in which sets have another order."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KEY],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return done.stdout.strip()


def test_two_processes_and_two_copies_of_a_project_have_one_key_until_a_file_is_changed(tmp_path: Path):
    first, second = project(tmp_path / "first"), project(tmp_path / "second")
    key = key_in(first)
    assert key_in(second, seed="1") == key
    found = {key}
    for name, old, new in (
        ("deeper.py", "2.0", "3.0"),
        ("neighbour.py", "* self.scale", "- self.scale"),
        ("metric.py", "1.0", "0.0"),
    ):
        shutil.copytree(first, tmp_path / name)
        (tmp_path / name / name).write_text(FILES[name].replace(old, new))
        found.add(key_in(tmp_path / name))
    assert len(found) == 4


class Live(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 3)
        self.act = nn.LeakyReLU(0.1)
        self.factor = 1.0
        self.settings = {"offset": [0.0, 1.0]}
        self.extra = torch.zeros(3)
        self.parts = [nn.Linear(3, 3)]
        self.then = torch.relu
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, x):
        y = self.parts[0](self.act(self.layer(x))) * self.factor + self.shift + self.extra
        return self.then(y) + self.settings["offset"][0]


def live_key(module: nn.Module) -> str:
    model = load_model(module, inputs=["x: float32[B,4], B=1..8"])
    return job_key(model, Job("live", model.spec, ({"B": 1},), "cpu", detect("cpu"), {}), "")


def attribute(name: str, value: object):
    return lambda module: setattr(module, name, value)


CHANGES = {
    "nothing": lambda m: None,
    "a number": attribute("factor", 5.0),
    "a number within": lambda m: m.settings["offset"].append(2.0),
    "a submodule's number": lambda m: setattr(m.act, "negative_slope", 0.9),
    "a buffer that is not saved": lambda m: m.shift.fill_(1.0),
    "a tensor that is no buffer": lambda m: m.extra.fill_(1.0),
    "a module in a list": lambda m: nn.init.zeros_(m.parts[0].weight),
    "a function": attribute("then", torch.sigmoid),
    "the user's function": attribute("then", lambda y: y * 2),
    "the same with another number": attribute("then", lambda y: y * 3),
    "forward of the instance": lambda m: setattr(m, "forward", m.layer.forward),
    "a hook": lambda m: m.act.register_forward_hook(lambda module, args, output: output + 1),
    "a weight": lambda m: nn.init.zeros_(m.layer.weight),
}


def test_whatever_changes_a_live_modules_answers_changes_the_key():
    found = {}
    for name, change in CHANGES.items():
        change(module := Live())
        found[name] = live_key(module)
    assert len(set(found.values())) == len(CHANGES)
    assert live_key(Live()) == found["nothing"]


PROMPT = """
from torch import nn
FACTOR = {factor}
def helper(x):
    return (lambda y: y * {inner})(x) * FACTOR
class Net(nn.Module):
    def forward(self, x):
        return helper(x)
"""


def test_functions_that_stand_in_no_file_are_told_by_their_code():
    keys = []
    for factor, inner in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (1.0, 1.0)):
        names = {"__name__": "__prompt__"}
        exec(PROMPT.format(factor=factor, inner=inner), names)
        keys.append(live_key(names["Net"]()))
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


def test_a_method_that_was_replaced_on_an_installed_class(monkeypatch: pytest.MonkeyPatch):
    net = nn.Sequential(nn.Identity())
    before = live_key(net)
    monkeypatch.setattr(nn.Identity, "forward", lambda self, x: x + 1)
    assert live_key(net) != before


def test_programs_and_files_have_keys_too(tmp_path: Path):
    spec = ["x: float32[B,4], B=1..8"]
    for slope in (0.1, 0.2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the format
            torch.jit.script(nn.Sequential(nn.LeakyReLU(slope))).save(str(tmp_path / f"{slope}.pt"))
        shape = {0: torch.export.Dim("B", min=1, max=8)}
        program = torch.export.export(
            nn.Sequential(nn.LeakyReLU(slope)), (torch.ones(2, 4),), dynamic_shapes={"input": shape}
        )
        torch.export.save(program, tmp_path / f"{slope}.pt2")

    def key(name: str, inputs: list[str]) -> str:
        (tmp_path / "m").mkdir(exist_ok=True)
        path = shutil.copyfile(tmp_path / name, tmp_path / "m" / f"net{Path(name).suffix}")
        model = load_model(str(path), inputs=inputs)
        return job_key(model, Job("net", model.spec, ({"B": 1},), "cpu", detect("cpu"), {}), "")

    names = [("0.1.pt", spec), ("0.2.pt", spec), ("0.1.pt2", []), ("0.2.pt2", [])]
    found = [key(*name) for name in names]
    assert len(set(found)) == 4
    assert [key(*name) for name in names] == found


def test_an_onnx_files_weights_beside_it(tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    shape = ["B", 512]
    value = torch.ones(512).numpy()
    weight = numpy_helper.from_array(value, "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    path = tmp_path / "net.onnx"
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, path, save_as_external_data=True, location="net.data", size_threshold=0)

    def key() -> str:
        model = load_model(str(path))
        return job_key(model, Job("net", model.spec, ({"B": 1},), "cpu", detect("cpu"), {}), "")

    before = key()
    assert key() == before
    data = bytearray((tmp_path / "net.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "net.data").write_bytes(data)
    assert key() != before
