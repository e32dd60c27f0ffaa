"""A ``.pt2`` file never runs code: real attacks on every way torch would execute what is in one."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from onecard.errors import BundleError, ModelError
from onecard.models.exported import flat_program, load_exported, save_exported, vet_exported

CONSTANTS = "data/constants/model_constants_config.json"
WEIGHTS = "data/weights/model_weights_config.json"


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=8)
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    return torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=({0: batch},), strict=False)


@pytest.fixture
def saved(program: torch.export.ExportedProgram, tmp_path: Path) -> Path:
    save_exported(program, tmp_path / "good.pt2")
    return tmp_path / "good.pt2"


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an archive whose members (without the root folder) were changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    bad = path.with_name("bad.pt2")
    with zipfile.ZipFile(bad, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"root/{name}", data)
    return bad


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def evil_torch(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(((Evil(path),), {}), buffer)
    return buffer.getvalue()


def test_round_trip_is_exact_and_holds_no_pickle(program: torch.export.ExportedProgram, saved: Path) -> None:
    vet_exported(saved)
    with zipfile.ZipFile(saved) as archive:
        for info in archive.infolist():
            data = archive.read(info)
            assert not data.startswith((b"PK", b"\x80")), info.filename
            assert b"stack_trace" not in data and b"site-packages" not in data, info.filename
    module = flat_program(load_exported(saved)).eval()
    x = torch.randn(5, 3)
    assert torch.equal(module(x)[0], program.module()(x))
    save_exported(program, saved.with_name("again.pt2"))
    assert saved.read_bytes() == saved.with_name("again.pt2").read_bytes()


def test_the_attack_works_on_torch_itself(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    bad = rewrite(saved, lambda m: m.update({"data/sample_inputs/model.pt": evil_torch(ran)}))
    try:
        torch.export.load(bad)
    except Exception as error:  # it runs the pickle and then finds that the content does not fit
        assert ran.exists(), error
    assert ran.exists()


def sample_inputs_attack(members: dict[str, bytes], ran: Path) -> None:
    members["data/sample_inputs/model.pt"] = evil_torch(ran)


def weight_attack(members: dict[str, bytes], ran: Path) -> None:
    config = json.loads(members[WEIGHTS])
    next(iter(config["config"].values()))["use_pickle"] = True
    members[WEIGHTS] = json.dumps(config).encode()
    members["data/weights/weight_0"] = evil_torch(ran)


def opaque_attack(members: dict[str, bytes], ran: Path) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    members[CONSTANTS] = json.dumps({"config": {"x": entry}}).encode()
    members["data/constants/opaque_obj_0"] = pickle.dumps(Evil(ran))


def legacy_attack(members: dict[str, bytes], ran: Path) -> None:
    members["data/weights/model.pt"] = evil_torch(ran)


def library_attack(members: dict[str, bytes], ran: Path) -> None:
    members["data/aotinductor/model/evil.so"] = b"\x7fELF"


def in_model(change: Callable[[dict, Path], None]) -> Callable[[dict[str, bytes], Path], None]:
    def attack(members: dict[str, bytes], ran: Path) -> None:
        model = json.loads(members["models/model.json"])
        change(model, ran)
        members["models/model.json"] = json.dumps(model).encode()

    return attack


def expression_attack(model: dict, ran: Path) -> None:
    code = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    for meta in model["graph_module"]["graph"]["tensor_values"].values():
        meta["sizes"][0] = {"as_expr": {"expr_str": code, "hint": None}}


def attribute_attack(model: dict, ran: Path) -> None:
    model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


def file_attack(model: dict, ran: Path) -> None:
    model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def name_attack(model: dict, ran: Path) -> None:
    model["graph_module"]["graph"]["nodes"][0]["name"] = f"x = open({str(ran)!r}, 'w')"


def tree_attack(model: dict, ran: Path) -> None:
    context = json.dumps({"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []})
    tree = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
    model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(tree)


ATTACKS = {
    "sample inputs": sample_inputs_attack,
    "pickled weight": weight_attack,
    "pickled constant": opaque_attack,
    "legacy weights": legacy_attack,
    "compiled library": library_attack,
    "expression": in_model(expression_attack),
    "attribute": in_model(attribute_attack),
    "file": in_model(file_attack),
    "node name": in_model(name_attack),
    "container": in_model(tree_attack),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_is_refused_and_does_not_run(attack, saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    bad = rewrite(saved, lambda members: attack(members, ran))
    for refuse in (lambda: vet_exported(bad), lambda: load_exported(bad)):
        with pytest.raises(BundleError, match="refused"):
            refuse()
    assert not ran.exists()


def test_guards_are_dropped(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    guard = in_model(lambda model, path: model.update(guards_code=[f"open({str(path)!r}, 'w') is not None"]))
    bad = rewrite(saved, lambda members: guard(members, ran))
    flat_program(load_exported(bad))(torch.randn(2, 3))
    assert not ran.exists()


def test_a_users_own_file_may_have_sample_inputs(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    bad = rewrite(saved, lambda members: sample_inputs_attack(members, ran))
    flat_program(load_exported(bad, error=ModelError, drop_samples=True))(torch.randn(2, 3))
    assert not ran.exists()


def test_damaged_and_oversized_archives(saved: Path) -> None:
    with pytest.raises(BundleError, match="more than 100"):
        load_exported(saved, cap_bytes=100)
    saved.with_name("short.pt2").write_bytes(saved.read_bytes()[:-30])
    with pytest.raises(ModelError, match="cannot be read"):
        load_exported(saved.with_name("short.pt2"), error=ModelError)
    bad = rewrite(saved, lambda members: members.pop("models/model.json"))
    with pytest.raises(BundleError, match="lacks the member"):
        load_exported(bad)
    empty = rewrite(saved, lambda members: members.update({"data/weights/weight_0": b""}))
    with pytest.raises(BundleError, match="no bytes"):
        load_exported(empty)
    with pytest.raises(BundleError, match="no such file"):
        load_exported(saved.with_name("none.pt2"))


def test_a_quantised_program_is_loaded_where_nothing_has_imported_quantisation(tmp_path: Path):
    import torch.ao.quantization.fx._decomposed

    class Rounded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ops = torch.ops.quantized_decomposed
            codes = ops.quantize_per_tensor(x, 0.5, 0, -128, 127, torch.int8)
            return ops.dequantize_per_tensor(codes, 0.5, 0, -128, 127, torch.int8)

    path = tmp_path / "rounded.pt2"
    save_exported(torch.export.export(Rounded(), (torch.randn(3),)), path)
    code = (
        "import sys, pathlib, torch\n"
        "from onecard.models.exported import flat_program, load_exported\n"
        f"program = flat_program(load_exported(pathlib.Path({str(path)!r})))\n"
        "print(program(torch.tensor([0.6, 0.9, -3.1]))[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[0.5, 1.0, -3.0]", done.stderr
