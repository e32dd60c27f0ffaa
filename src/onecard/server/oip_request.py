"""Reading an inference request: the bytes of an HTTP body to arrays and requested outputs, or a 400 that says why.

Sources: "Inference Request JSON Object" of the specification; Triton's extensions for binary tensor data (with its raw
binary requests), classification, schedule policy and shared memory.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from onecard.server.oip_contract import InferContract
from onecard.server.oip_data import from_bytes, from_json
from onecard.server.oip_types import (
    BFLOAT16,
    Array,
    Buffer,
    DeviceInput,
    Form,
    InferRequest,
    ProtocolError,
    Region,
    RegionAccess,
    RequestedOutput,
    Shape,
    quote,
)

Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_MOST_DIMENSIONS = 64  # as NumPy


class _Place(msgspec.Struct, gc=False):
    """Parameters of a tensor in shared memory."""

    shared_memory_region: str | None = None
    shared_memory_byte_size: Size = 0
    shared_memory_offset: Size = 0

    def region(self) -> Region | None:
        if self.shared_memory_region is None:
            return None
        return Region(self.shared_memory_region, self.shared_memory_byte_size, self.shared_memory_offset)


class _InputParameters(_Place, gc=False):
    binary_data_size: Size | None = None


class _OutputParameters(_Place, gc=False):
    binary_data: bool | None = None
    classification: Size = 0


class _Input(msgspec.Struct, gc=False):
    name: str
    shape: Annotated[list[Size], Meta(max_length=_MOST_DIMENSIONS)]
    datatype: str
    parameters: _InputParameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct, gc=False):
    name: str
    parameters: _OutputParameters | None = None


class _Parameters(msgspec.Struct, gc=False):
    priority: Size = 0
    timeout: Size = 0
    binary_data_output: bool = False
    sequence_id: int | str = 0


class _Head(msgspec.Struct, gc=False):
    inputs: list[_Input]
    id: str | None = None
    parameters: _Parameters | None = None
    outputs: list[_Output] | None = None


_HEAD = msgspec.json.Decoder(_Head)
_NO_PARAMETERS = _Parameters()
_NO_OUTPUT_PARAMETERS = _OutputParameters()


def parse_infer(
    body: Buffer, json_length: int | None, contract: InferContract, regions: RegionAccess | None = None
) -> InferRequest:
    """Read the body of an inference request.

    Parameters of the request that are not known here are ignored, as the specification allows.

    Args:
        body: the whole HTTP body. The inputs may be views of it, so it must not change while they are in use.
        json_length: the header ``Inference-Header-Content-Length``: bytes of JSON before the binary data; None if it
            was not sent; 0 for a body that is nothing but the data of a model's only input.
        contract: of the model.
        regions: access to registered shared memory; None where the server has none.

    Returns:
        The request; each input fits the model's spec in name, dtype, shape and size.

    Raises:
        ProtocolError: anything that does not fit; the message names the field.
    """
    whole = memoryview(body).cast("B")
    if json_length == 0:
        return _raw_request(whole, contract)
    head = _head(whole, json_length, contract)
    parameters = head.parameters or _NO_PARAMETERS
    if parameters.sequence_id not in (0, ""):
        raise ProtocolError("'sequence_id' is given, but no model here keeps a state between requests.")
    id = head.id or ""
    if len(id) > contract.limits.max_id_chars:
        raise ProtocolError(f"'id' has {len(id)} characters, at most {contract.limits.max_id_chars} are taken.")
    outputs = _outputs(head.outputs, parameters.binary_data_output, contract, regions)
    reader = _Reader(whole, json_length, regions)
    inputs, dtypes = _inputs(head.inputs, contract, reader)
    asked = (inputs, dtypes, outputs, parameters.priority, parameters.timeout)
    return InferRequest(id, *asked, tuple(reader.on_device), reader.copied)


def binary_lead(json_length: int, alignment_bytes: int = 64) -> int:
    """How far into an aligned buffer to receive a body, so that its first binary tensor is aligned and never copied.

    Args:
        json_length: the header ``Inference-Header-Content-Length``.
        alignment_bytes: wanted of the first tensor's address.
    """
    return -json_length % alignment_bytes


def engine_inputs(request: InferRequest) -> dict[str, Any]:
    """The inputs as the engine takes them: NumPy arrays, but bfloat16 as CPU tensors.

    A tensor lies on the array's memory where that can be written; where not, on a copy, since torch warns of it.
    """
    inputs: dict[str, Any] = dict(request.inputs)
    for name, dtype in request.dtypes.items():
        if dtype == BFLOAT16.dtype:
            import torch

            carrier = request.inputs[name]
            carrier = carrier if carrier.flags.writeable else carrier.copy()
            inputs[name] = torch.from_numpy(carrier).view(torch.bfloat16)
    return inputs


class _Reader:
    """Hands out the inputs' data from where each one lies, and notices bytes that belong to none.

    Attributes:
        on_device: inputs that were left where they lie.
        copied: by name, where others were read in the host's shared memory.
    """

    def __init__(self, body: memoryview, json_length: int | None, regions: RegionAccess | None) -> None:
        self._body = body
        self._next = len(body) if json_length is None else json_length
        self._has_binary = json_length is not None
        self._regions = regions
        self.on_device: list[DeviceInput] = []
        self.copied: dict[str, Region] = {}

    def read(self, item: _Input, form: Form, shape: Shape, elements: int) -> Array | None:
        """An input's array; None for one on a device."""
        place = item.parameters
        region = place.region() if place is not None else None
        size = place.binary_data_size if place is not None else None
        raw = memoryview(item.data)
        if (region is not None) + (size is not None) + (len(raw) > 0) != 1:
            raise ProtocolError(
                f"input '{item.name}' must have its data in just one of 'data', the parameter 'binary_data_size' and "
                "the parameter 'shared_memory_region'."
            )
        if region is not None:
            return self._from_region(region, form, shape, elements)
        if size is not None:
            return from_bytes(self._take(item.name, size), form, shape, elements)
        return from_json(item.data, form, shape, elements)

    def check_all_read(self) -> None:
        if left := len(self._body) - self._next:
            raise ProtocolError(f"the body has {left} bytes behind the last input's binary data.")

    def _take(self, name: str, size: int) -> memoryview:
        if not self._has_binary:
            raise ProtocolError(
                f"input '{name}' has a 'binary_data_size', "
                "but the request has no header Inference-Header-Content-Length."
            )
        left = len(self._body) - self._next
        if size > left:
            raise ProtocolError(
                f"input '{name}' has a 'binary_data_size' of {size}, but {left} bytes of data are left."
            )
        start = self._next
        self._next += size
        return self._body[start : self._next]

    def _from_region(self, region: Region, form: Form, shape: Shape, elements: int) -> Array | None:
        access = _access(region, self._regions, f"input '{form.tensor.name}'")
        expected = elements * form.datatype.numpy.itemsize
        if region.byte_size != expected:
            raise ProtocolError(
                f"input '{form.tensor.name}' has a 'shared_memory_byte_size' of {region.byte_size}, "
                f"expected {expected} ({form.datatype.name} of shape {list(shape)})."
            )
        if access.locate(region) == "host":
            self.copied[form.tensor.name] = region
            return from_bytes(access.read(region), form, shape, elements)
        self.on_device.append(DeviceInput(form.tensor.name, form.datatype.dtype, shape, region))
        return None


def _access(region: Region, regions: RegionAccess | None, where: str) -> RegionAccess:
    if regions is None:
        raise ProtocolError(f"{where} is in shared memory {quote(region.name)}, which is not enabled on this server.")
    return regions


def _head(whole: memoryview, json_length: int | None, contract: InferContract) -> _Head:
    length = len(whole) if json_length is None else json_length
    if not 0 <= length <= len(whole):
        raise ProtocolError(f"Inference-Header-Content-Length is {length}, but the body has {len(whole)} bytes.")
    if length > contract.limits.max_json_bytes:
        raise ProtocolError(
            f"the JSON has {length} bytes, at most {contract.limits.max_json_bytes} are taken.",
            "Send large tensors as binary data.",
        )
    text = whole[:length]
    try:
        return _HEAD.decode(text)
    except RecursionError:
        raise ProtocolError("the JSON is nested too deep.") from None
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the request does not follow the protocol: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        names = [name for name in ("NaN", "Infinity") if name.encode() in bytes(text)]
        cure = f"JSON has no {' and no '.join(names)}: send such numbers as binary data." if names else ""
        raise ProtocolError(f"the JSON cannot be read: {error}.", cure) from None


def _inputs(items: list[_Input], contract: InferContract, reader: _Reader) -> tuple[dict[str, Array], dict[str, str]]:
    sent: list[tuple[Form, Shape]] = []
    dtypes: dict[str, str] = {}
    for item in items:
        if item.name in dtypes:
            raise ProtocolError(f"input '{item.name}' is given twice.")
        form = contract.form(item.name, item.datatype)
        dtypes[item.name] = form.datatype.dtype
        sent.append((form, tuple(item.shape)))
    counts = contract.measure(tuple(sent))
    arrays: dict[str, Array] = {}
    for item, (form, shape), elements in zip(items, sent, counts, strict=True):
        array = reader.read(item, form, shape, elements)
        if array is None:
            del dtypes[item.name]
        else:
            arrays[item.name] = array
    reader.check_all_read()
    return arrays, dtypes


def _outputs(
    items: list[_Output] | None, binary: bool, contract: InferContract, regions: RegionAccess | None
) -> tuple[RequestedOutput, ...]:
    if not items:
        return contract.all_outputs(binary)
    found: dict[str, RequestedOutput] = {}
    for item in items:
        if item.name in found:
            raise ProtocolError(f"output {quote(item.name)} is requested twice.")
        given = item.parameters or _NO_OUTPUT_PARAMETERS
        wanted = RequestedOutput(
            item.name,
            binary if given.binary_data is None else given.binary_data,
            given.classification,
            given.region(),
        )
        contract.check_output(wanted)
        if wanted.region is not None:
            _access(wanted.region, regions, f"output '{item.name}'").locate(wanted.region)
        found[item.name] = wanted
    return tuple(found.values())


def _raw_request(whole: memoryview, contract: InferContract) -> InferRequest:
    """A body without JSON ("Raw Binary Request"): the only input's bytes, its one free dimension found from them.

    Where more than the batch is free, the batch is 1. The outputs are sent as binary data.
    """
    forms = [form for forms in contract.forms.values() for form in forms.values()]
    if len(forms) != 1:
        raise ProtocolError("a body without JSON needs a model with one input in one datatype.")
    (form,) = forms
    tensor, batch = form.tensor, contract.spec.batch_symbol
    free = {dim for dim in tensor.shape if isinstance(dim, str)}
    known = {batch: 1} if batch is not None and len(free) > 1 else {}
    free -= set(known)
    if len(free) > 1 or any(tensor.shape.count(symbol) > 1 for symbol in free):
        raise ProtocolError(f"a body without JSON leaves more than one dimension of {tensor} unknown.")
    unit = form.datatype.numpy.itemsize
    for dim in tensor.shape:
        unit *= dim if isinstance(dim, int) else known.get(dim, 1)
    size, rest = divmod(len(whole), unit)
    if rest:
        raise ProtocolError(f"the body has {len(whole)} bytes, expected a multiple of {unit} for {tensor}.")
    shape = tuple(dim if isinstance(dim, int) else known.get(dim, size) for dim in tensor.shape)
    (elements,) = contract.measure(((form, shape),))
    array = from_bytes(whole, form, shape, elements)
    name = tensor.name
    return InferRequest("", {name: array}, {name: form.datatype.dtype}, contract.all_outputs(True))
