"""Pictures from bytes to floats in one pass: ``(x - mean[c]) / std[c]``, any layout in, any layout out.

The kernel reads every byte once and writes every float once; the reference says in torch what it must give, bit for
bit, and answers for it on a CPU and where Triton is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of PyTorch come without it
    triton = None

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LONE_THREAD_BYTES = 1 << 20  # up to so many of pictures on a CPU other threads cost more than they save
_PIXELS = 1024  # of one picture, for one program: 3 KiB read and 6 or 12 KiB written with three channels


def normalize(raw: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """Write normalised pictures; on a GPU the work is put on the current stream.

    Args:
        raw: uint8 [B, C, H, W] of any strides, so that bytes in NHWC order are passed as ``permute(0, 3, 1, 2)``.
        mean: C values, in units of the bytes: 0 to 255.
        std: C values in the same units, none of them 0.
        out: float32, float16 or bfloat16 [B, C, H, W] of any strides, on the same device, no memory shared with
            ``raw``; contiguous, channels_last or a part of something larger.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    _check(raw, mean, std, out)
    if triton is not None and raw.is_cuda:
        launch(raw, mean, std, out)
    elif raw.device.type == "cpu" and out.dtype == torch.float32 and raw.nbytes <= _LONE_THREAD_BYTES:
        _normalize_alone(raw, mean, std, out)
    else:
        normalize_reference(raw, mean, std, out)


def normalize_reference(raw: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """What :func:`normalize` must give, in plain torch."""
    shape = (1, raw.shape[1], 1, 1)
    work = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    work.copy_(raw)
    work.sub_(_constants(tuple(mean), out.device).view(shape))
    work.mul_(_inverses(tuple(std), out.device).view(shape))
    if work is not out:
        out.copy_(work)


def _normalize_alone(raw: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """On the calling thread, a plane at a time: PyTorch's threads would get in the way of those that run the model."""
    means, inverses = (
        make(tuple(values), out.device).numpy() for make, values in ((_constants, mean), (_inverses, std))
    )
    for source, target in zip(raw.numpy(), out.numpy(), strict=True):
        for channel, plane in enumerate(target):
            np.copyto(plane, source[channel])
            np.subtract(plane, means[channel], out=plane)
            np.multiply(plane, inverses[channel], out=plane)


def launch(raw: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """Put the Triton kernel on the current stream; the arguments are those of :func:`normalize`, checked."""
    batch, channels, height, width = raw.shape
    if not raw.numel():
        return
    blocks = -(-height * width // _PIXELS)
    _kernel[(batch * blocks,)](
        raw,
        out,
        _constants(tuple(mean), raw.device),
        _inverses(tuple(std), raw.device),
        height * width,
        width,
        blocks,
        *raw.stride(),
        *out.stride(),
        CHANNELS=channels,
        PIXELS=_PIXELS,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917 - the interface of a kernel is flat
        raw,
        out,
        mean,
        inverse_std,
        pixels,
        width,
        blocks,
        raw_b,
        raw_c,
        raw_h,
        raw_w,
        out_b,
        out_c,
        out_h,
        out_w,
        CHANNELS: tl.constexpr,
        PIXELS: tl.constexpr,
    ):
        program = tl.program_id(0)
        picture = (program // blocks).to(tl.int64)  # a batch may be larger than 2 GiB
        pixel = (program % blocks) * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        row = (pixel // width).to(tl.int64)
        column = (pixel % width).to(tl.int64)
        source = raw + picture * raw_b + row * raw_h + column * raw_w
        target = out + picture * out_b + row * out_h + column * out_w
        for c in tl.static_range(CHANNELS):
            value = tl.load(source + c * raw_c, mask=inside, other=0).to(tl.float32)
            value = (value - tl.load(mean + c)) * tl.load(inverse_std + c)
            tl.store(target + c * out_c, value.to(out.dtype.element_ty), mask=inside)


def _check(raw: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    if raw.dtype != torch.uint8 or out.dtype not in FLOATS:
        raise ValueError(f"normalize takes uint8 and gives float32, float16 or bfloat16, not {raw.dtype}, {out.dtype}")
    if raw.dim() != 4 or raw.shape != out.shape:  # noqa: PLR2004 - [B, C, H, W]
        raise ValueError(f"raw {list(raw.shape)} and out {list(out.shape)} must be one shape [B, C, H, W]")
    channels = raw.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"{channels} channels want as many means and deviations, not {len(mean)} and {len(std)}")
    if raw.device != out.device:
        raise ValueError(f"raw is on {raw.device}, out on {out.device}")


@functools.lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def _inverses(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``1 / std``, divided in double precision and rounded once, the same for the kernel and the reference."""
    return _constants(tuple(1.0 / value for value in values), device)
