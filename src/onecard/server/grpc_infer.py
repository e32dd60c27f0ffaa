"""Inference requests and answers between gRPC's messages and arrays, or an error that names the field.

Sources: ``inference_grpc.md`` of the KServe specification ("Tensor Data", "Raw Tensor Contents"); Triton's extensions
for classification, schedule policy and shared memory, whose parameters are named as in its REST face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onecard.errors import DeadlineError
from onecard.server.grpc_contents import from_contents
from onecard.server.oip_contract import InferContract
from onecard.server.oip_data import from_bytes
from onecard.server.oip_types import (
    Array,
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

_MOST_DIMENSIONS = 64  # as NumPy
_REGION = "shared_memory_region"
_MOST_INTEGER = (1 << 63) - 1


class RawInput(NamedTuple):
    """An input whose data comes as raw contents.

    Args:
        form: asked for.
        shape: as sent.
        elements: of that shape.
    """

    form: Form
    shape: Shape
    elements: int


class Plan(NamedTuple):
    """What all requests with the same head have in common, if their inputs come as raw contents.

    Args:
        inputs: in the order of the contents.
        dtypes: onecard's dtype of each input.
        outputs: those to send.
        priority: as in ``InferRequest``.
        timeout_us: likewise.
    """

    inputs: tuple[RawInput, ...]
    dtypes: dict[str, str]
    outputs: tuple[RequestedOutput, ...]
    priority: int
    timeout_us: int

    def request(self, request_id: str, raw: Sequence[memoryview], remaining_s: float | None) -> InferRequest:
        """Read one of them; see :func:`parse_infer`."""
        inputs, dtypes, outputs, priority, timeout_us = self
        timeout_us = _timeout(timeout_us, remaining_s)
        if len(raw) != len(inputs):
            raise ProtocolError(f"the request has {len(raw)} 'raw_input_contents', expected {len(inputs)}.")
        arrays = {
            form.tensor.name: from_bytes(data, form, shape, elements)
            for data, (form, shape, elements) in zip(raw, inputs, strict=True)
        }
        return InferRequest(request_id, arrays, dtypes, outputs, priority, timeout_us)


def plan_infer(message: Any, contract: InferContract) -> Plan | None:
    """Check what is in a request beside its raw contents.

    Args:
        message: a ``ModelInferRequest`` without them.
        contract: of the model.

    Returns:
        The plan; None if an input or output is in shared memory, or an input in typed contents.

    Raises:
        ProtocolError: anything that does not fit; the message names the field.
    """
    for each in (*message.inputs, *message.outputs):
        if _REGION in each.parameters:
            return None
    if any(item.HasField("contents") for item in message.inputs):
        return None
    priority, timeout_us = _schedule(message)
    outputs = _outputs(message.outputs, contract, None) if message.outputs else contract.all_outputs(True)
    sent = _sent(message.inputs, contract)
    counts = contract.measure(sent)
    inputs = tuple(RawInput(form, shape, elements) for (form, shape), elements in zip(sent, counts, strict=True))
    dtypes = {form.tensor.name: form.datatype.dtype for form, _ in sent}
    return Plan(inputs, dtypes, outputs, priority, timeout_us)


def parse_infer(
    message: Any,
    request_id: str,
    raw: Sequence[memoryview],
    contract: InferContract,
    regions: RegionAccess | None = None,
    remaining_s: float | None = None,
) -> InferRequest:
    """Check a request against its model. Parameters that are not known here are ignored, as the specification allows.

    Args:
        message: a ``ModelInferRequest`` without its id and its raw contents.
        request_id: that.
        raw: those; the inputs are views of them where their alignment allows.
        contract: of the model.
        regions: access to registered shared memory; None where the server has none.
        remaining_s: what is left of the RPC's deadline, which counts if it is shorter than the request's timeout; None
            without one.

    Raises:
        ProtocolError: anything that does not fit; the message names the field.
        DeadlineError: nothing is left.
    """
    priority, timeout_us = _schedule(message)
    outputs = _outputs(message.outputs, contract, regions) if message.outputs else contract.all_outputs(True)
    sent = _sent(message.inputs, contract)
    counts = contract.measure(sent)
    reader = _Reader(raw, regions)
    arrays: dict[str, Array] = {}
    for item, (form, shape), elements in zip(message.inputs, sent, counts, strict=True):
        array = reader.read(item, form, shape, elements)
        if array is not None:
            arrays[form.tensor.name] = array
    reader.check_all_read()
    dtypes = {form.tensor.name: form.datatype.dtype for form, _ in sent if form.tensor.name in arrays}
    timeout_us = _timeout(timeout_us, remaining_s)
    return InferRequest(request_id, arrays, dtypes, outputs, priority, timeout_us, tuple(reader.on_device))


def check_id(request_id: str, contract: InferContract) -> None:
    """Refuse an id that is too long to be sent back.

    Raises:
        ProtocolError: it is.
    """
    if len(request_id) > contract.limits.max_id_chars:
        raise ProtocolError(f"'id' has {len(request_id)} characters, at most {contract.limits.max_id_chars} are taken.")


def _timeout(asked_us: int, remaining_s: float | None) -> int:
    """The shorter of the request's own timeout and what is left of its RPC's deadline; 0 if there is neither."""
    if remaining_s is None:
        return asked_us
    remaining_us = int(remaining_s * 1e6)
    if remaining_us <= 0:
        raise DeadlineError("the RPC's deadline passed before its request was there.")
    return min(asked_us or remaining_us, remaining_us)


def _schedule(message: Any) -> tuple[int, int]:
    """The request's priority and timeout."""
    if not message.parameters:
        return 0, 0
    parameters = _parameters(message.parameters, "the request")
    if parameters.values.get("sequence_id") not in (None, 0, ""):
        raise ProtocolError("'sequence_id' is given, but no model here keeps a state between requests.")
    return parameters.size("priority"), parameters.size("timeout")


class _Parameters:
    """The parameters of one thing by name; only those that are looked at have to be right."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def size(self, name: str) -> int:
        """A whole number, 0 or more; 0 if it is not given."""
        value = self.values.get(name, 0)
        if type(value) is not int or not 0 <= value <= _MOST_INTEGER:
            raise ProtocolError(f"the parameter '{name}' of {self.where} must be a whole number, 0 or more.")
        return value

    def region(self) -> Region | None:
        name = self.values.get(_REGION)
        if name is None:
            return None
        if not isinstance(name, str):
            raise ProtocolError(f"the parameter 'shared_memory_region' of {self.where} must be a string.")
        return Region(name, self.size("shared_memory_byte_size"), self.size("shared_memory_offset"))


def _parameters(given: Any, where: str) -> _Parameters:
    values: dict[str, Any] = {}
    for name, value in given.items():
        kind = value.WhichOneof("parameter_choice")
        values[name] = None if kind is None else getattr(value, kind)
    return _Parameters(values, where)


class _Reader:
    """Hands out the inputs' data from where each one lies, and notices contents that belong to none.

    Attributes:
        on_device: inputs that were left where they lie.
    """

    def __init__(self, raw: Sequence[memoryview], regions: RegionAccess | None) -> None:
        self._raw = raw
        self._next = 0
        self._regions = regions
        self.on_device: list[DeviceInput] = []

    def read(self, item: Any, form: Form, shape: Shape, elements: int) -> Array | None:
        """An input's array; None for one on a device."""
        name = form.tensor.name
        region = _parameters(item.parameters, f"input '{name}'").region() if item.parameters else None
        if item.HasField("contents"):
            if region is not None or self._raw:
                raise ProtocolError(
                    f"input '{name}' has 'contents' beside "
                    f"{'a shared-memory region' if region is not None else 'raw_input_contents of the request'}: "
                    "its data must be in one place."
                )
            return from_contents(item.contents, form, shape, elements)
        if region is not None:
            return self._from_region(region, form, shape, elements)
        if not self._raw and not elements:
            return from_contents(item.contents, form, shape, elements)
        if self._next == len(self._raw):
            raise ProtocolError(f"input '{name}' has no data: neither 'contents' nor one of 'raw_input_contents'.")
        self._next += 1
        return from_bytes(self._raw[self._next - 1], form, shape, elements)

    def check_all_read(self) -> None:
        if self._next != len(self._raw):
            raise ProtocolError(
                f"the request has {len(self._raw)} 'raw_input_contents', but {self._next} inputs that need one."
            )

    def _from_region(self, region: Region, form: Form, shape: Shape, elements: int) -> Array | None:
        name = form.tensor.name
        access = _access(region, self._regions, f"input '{name}'")
        expected = elements * form.datatype.numpy.itemsize
        if region.byte_size != expected:
            raise ProtocolError(
                f"input '{name}' has a 'shared_memory_byte_size' of {region.byte_size}, "
                f"expected {expected} ({form.datatype.name} of shape {list(shape)})."
            )
        if access.locate(region) == "host":
            return from_bytes(access.read(region), form, shape, elements)
        self.on_device.append(DeviceInput(name, form.datatype.dtype, shape, region))
        return None


def _sent(items: Any, contract: InferContract) -> tuple[tuple[Form, Shape], ...]:
    """Each input's form and shape."""
    sent: dict[str, tuple[Form, Shape]] = {}
    for item in items:
        name = item.name
        if name in sent:
            raise ProtocolError(f"input {quote(name)} is given twice.")
        form = contract.form(name, item.datatype)
        shape = tuple(item.shape)
        if len(shape) > _MOST_DIMENSIONS or (shape and min(shape) < 0):
            raise ProtocolError(
                f"input '{name}' has a shape with a negative size, or of more than {_MOST_DIMENSIONS} dimensions."
            )
        sent[name] = (form, shape)
    return tuple(sent.values())


def _outputs(items: Any, contract: InferContract, regions: RegionAccess | None) -> tuple[RequestedOutput, ...]:
    found: dict[str, RequestedOutput] = {}
    for item in items:
        name = item.name
        if name in found:
            raise ProtocolError(f"output {quote(name)} is requested twice.")
        wanted = RequestedOutput(name, True)
        if item.parameters:
            parameters = _parameters(item.parameters, f"output {quote(name)}")
            wanted = RequestedOutput(name, True, parameters.size("classification"), parameters.region())
        contract.check_output(wanted)
        if wanted.region is not None:
            _access(wanted.region, regions, f"output '{name}'").locate(wanted.region)
        found[name] = wanted
    return tuple(found.values())


def _access(region: Region, regions: RegionAccess | None, where: str) -> RegionAccess:
    if regions is None:
        raise ProtocolError(f"{where} is in shared memory {quote(region.name)}, which is not enabled on this server.")
    return regions
