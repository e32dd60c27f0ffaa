"""Casts and copies, moved before what makes their tensor larger.

A segmentation network ends by enlarging its answer, and in half precision the answer is then cast to fp32 and laid
out anew: compiled as written, that may be the whole picture in half precision beside the one in fp32 (168 MiB for
DeepLabV3 at a batch of 16, whose peak of memory is elsewhere). Cast and laid out while it is small, the picture is
written once, and no less exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_NEAREST = {_ATEN.upsample_nearest1d.vec, _ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest3d.vec}
_ENLARGING = _NEAREST | {
    _ATEN.upsample_linear1d.vec,
    _ATEN.upsample_bilinear2d.vec,
    _ATEN.upsample_bicubic2d.vec,
    _ATEN.upsample_trilinear3d.vec,
}
_MOVABLE = {_ATEN.to.dtype, _ATEN._to_copy.default, _ATEN.contiguous.default, _ATEN.clone.default}


def enlarge_last(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Let casts to a wider dtype and changes of layout happen before an interpolation that enlarges.

    Args:
        graph_module: of ``torch.export``, not decomposed yet; changed in place.

    Returns:
        The same module.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in _ENLARGING and _grows(node):
            _move_before(graph, node)
    graph_module.recompile()
    return graph_module


def _move_before(graph: fx.Graph, enlarging: Any) -> None:
    """Take the casts and copies that follow an interpolation, one after the other, to its input."""
    while True:
        for user in [u for u in enlarging.users if u.target is _ATEN._assert_tensor_metadata.default]:
            graph.erase_node(user)  # it says what the tensor was where the model was traced
        if len(enlarging.users) != 1:
            return
        (mover,) = enlarging.users
        if mover.target not in _MOVABLE or mover.args[0] is not enlarging or not _is_as_exact(enlarging, mover):
            return
        small = enlarging.args[0]
        value = mover.target(small.meta["val"], *mover.args[1:], **mover.kwargs)
        enlarged = enlarging.target(value, *enlarging.args[1:], **enlarging.kwargs)
        if not all(map(_is_equal, enlarged.stride(), mover.meta["val"].stride())):
            return  # a picture of one pixel is contiguous as it is, and so tells nothing of the layout
        with graph.inserting_before(enlarging):
            moved = graph.call_function(mover.target, (small, *mover.args[1:]), dict(mover.kwargs))
        moved.meta["val"] = value
        enlarging.update_arg(0, moved)
        enlarging.meta["val"] = enlarged
        mover.replace_all_uses_with(enlarging)
        graph.erase_node(mover)


def _is_as_exact(enlarging: Any, mover: Any) -> bool:
    """Whether the interpolation loses nothing by being done in the dtype that the cast gives, on the same device.

    Between whole numbers it rounds and saturates, and its cast answer is another than that of the cast numbers.
    """
    before, after = enlarging.meta["val"], mover.meta["val"]
    if not before.is_floating_point() and enlarging.target not in _NEAREST:
        return False
    wider = torch.promote_types(before.dtype, after.dtype) == after.dtype
    return bool(after.is_floating_point() and wider and before.device == after.device)


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two numbers, or symbols, are the same for sure."""
    return bool(torch.fx.experimental.symbolic_shapes.statically_known_true(a == b))


def _grows(node: fx.Node) -> bool:
    values: list[Any] = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in (node.args[0], node)]
    small, large = values
    if not isinstance(small, Tensor) or not isinstance(large, Tensor):
        return False
    return bool(torch.fx.experimental.symbolic_shapes.guard_or_false(large.numel() >= small.numel()))
