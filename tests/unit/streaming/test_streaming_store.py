"""Weights in memory and in files: aligned, exact, of any layout, and never more than there is room for."""

from __future__ import annotations

import mmap

import pytest
import torch
from safetensors import safe_open
from torch import nn

from onecard.errors import BundleError, ModelError
from onecard.models.flat import FlatModule, positional
from onecard.spec import parse_spec
from onecard.streaming.capture import capture
from onecard.streaming.split import Split, Weight, dense_stride, split_program
from onecard.streaming.store import (
    ModuleSource,
    PartFiles,
    host_buffer,
    lay_out,
    require_main_memory,
    views,
    write_parts,
)
from tests.unit.streaming.stacks import LENGTH, decoder, tied_cnn

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]


def split(module: nn.Module, spec: str) -> Split:
    parsed = parse_spec([spec])
    flat = FlatModule(module, positional((parsed.inputs[0].name,))).eval()
    return split_program(capture(flat, parsed, "cpu").program, 10_000)


def test_weights_of_every_dtype_lie_aligned_in_one_buffer():
    tensors = {str(dtype): torch.arange(30).reshape(5, 6).to(dtype) for dtype in DTYPES}
    tensors["empty"], tensors["scalar"] = torch.empty(0, 3), torch.tensor(7.0)
    tensors["turned"] = torch.randn(4, 3).t()
    weights = {name: Weight(name, tuple(t.shape), dense_stride(t), t.dtype) for name, t in tensors.items()}
    layout = lay_out(weights, weights)
    buffer = host_buffer(layout.nbytes)
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    for name, view in views(buffer, layout, weights).items():
        assert layout.offsets[name] % 256 == 0
        view.copy_(tensors[name])
    for name, view in views(buffer, layout, weights).items():
        assert torch.equal(view.to(torch.complex128), tensors[name].to(torch.complex128))
        assert view.stride() == tensors[name].stride() and view.dtype == tensors[name].dtype
    assert buffer.numel() == layout.nbytes < sum(t.nbytes for t in tensors.values()) + 256 * len(tensors)


def test_what_is_not_dense_becomes_contiguous():
    assert dense_stride(torch.zeros(1).expand(3, 4)) == (4, 1)
    assert dense_stride(torch.zeros(6, 8)[::2]) == (8, 1)
    assert dense_stride(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)) == (60, 1, 15, 3)
    assert dense_stride(torch.zeros(3, 1, 2)) == (2, 2, 1)


@pytest.mark.parametrize("kind", ["decoder", "cnn"])
def test_part_files_give_back_what_was_written(kind, tmp_path):
    module = decoder() if kind == "decoder" else tied_cnn()
    cut = split(module, f"ids: int64[2,{LENGTH}]" if kind == "decoder" else "image: float32[2,3,8,8]")
    write_parts(tmp_path / "parts", cut, ModuleSource(module, None, consume=False))
    written = {path.stem for path in (tmp_path / "parts").iterdir()}
    assert written <= {"shared", *(part.name for part in cut.parts)} and "shared" in written
    files = PartFiles(tmp_path / "parts")
    originals = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name, weight in cut.weights.items():
        assert torch.equal(files.take(weight), originals[name])
        assert files.take(weight).stride() == weight.stride


def test_a_part_file_holds_just_its_parts_weights(tmp_path):
    cut = split(decoder(), f"ids: int64[2,{LENGTH}]")
    write_parts(tmp_path, cut, ModuleSource(decoder(), None, consume=False))
    part = cut.parts[2]
    with safe_open(tmp_path / f"{part.name}.safetensors", framework="pt") as file:
        assert set(file.keys()) <= set(part.weights)


def test_files_of_another_model_are_refused(tmp_path):
    cut = split(decoder(), f"ids: int64[2,{LENGTH}]")
    write_parts(tmp_path, cut, ModuleSource(decoder(), None, consume=False))
    files = PartFiles(tmp_path)
    name = cut.parts[2].weights[0]
    weight = cut.weights[name]
    with pytest.raises(BundleError, match="does not fit"):
        files.take(Weight(name, (*weight.shape, 2), (*weight.stride, 1), weight.dtype))
    with pytest.raises(BundleError, match="lack the weight 'other'"):
        files.take(Weight("other", (1,), (1,), torch.float32))


def test_consuming_needs_no_second_copy():
    cut = split(decoder(), f"ids: int64[2,{LENGTH}]")
    weights = list(cut.weights.values())
    total, largest = sum(w.nbytes for w in weights), max(w.nbytes for w in weights)
    assert ModuleSource(decoder(), None, consume=False).new_bytes(weights) == total + largest
    assert ModuleSource(decoder(), None, consume=True).new_bytes(weights) == largest


def test_a_need_beyond_main_memory_is_refused_before_it_is_taken():
    require_main_memory(1 << 20)
    with pytest.raises(ModelError, match=r"needs 1048576\.00 GiB more of main memory.*is free.*consume=True"):
        require_main_memory(1 << 50)
