"""What a server says of its model, as a spec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onecard.bench.samples import ANY_SIZE, ROWS
from onecard.errors import UsageError
from onecard.spec import Dim, Range, Spec, TensorSpec

_DTYPES = {
    **{"BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64"},
    **{"INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64"},
    **{"FP16": "float16", "BF16": "bfloat16", "FP32": "float32", "FP64": "float64"},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""The datatypes of the Open Inference Protocol; those of a server of another make are among them, except strings."""


def datatype_name(dtype: str) -> str:
    """The protocol's name of a dtype."""
    return _NAMES[dtype]


def protocol_spec(tensors: Iterable[tuple[str, str, Sequence[int | str]]]) -> Spec:
    """The spec of a model's inputs.

    Args:
        tensors: name, datatype and shape of each, as metadata has them: -1 is any size.

    Returns:
        With a symbol for each dimension of any size: ``rows`` for the first of every input, if all have one there,
        else ``INPUT:AXIS``.

    Raises:
        UsageError: there are no inputs, or one whose data are no numbers.
    """
    given = [(name, datatype, [int(size) for size in shape]) for name, datatype, shape in tensors]
    if not given:
        raise UsageError("the server does not say what its model takes.", "Only models with inputs can be asked.")
    batched = all(shape and shape[0] < 0 for _, _, shape in given)
    symbols: dict[str, Range] = {ROWS: Range(1, ANY_SIZE)} if batched else {}
    inputs = []
    for name, datatype, shape in given:
        if datatype not in _DTYPES:
            raise UsageError(f"input '{name}' is {datatype}: only numbers and truth values can be made up.")
        dims: list[Dim] = []
        for axis, size in enumerate(shape):
            symbol = ROWS if batched and axis == 0 else f"{name}:{axis}"
            dims.append(size if size >= 0 else symbol)
            if size < 0:
                symbols.setdefault(symbol, Range(1, ANY_SIZE))
        inputs.append(TensorSpec(name, _DTYPES[datatype], tuple(dims)))
    return Spec(tuple(inputs), (), symbols)
