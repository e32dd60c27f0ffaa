"""What requests to one model must satisfy: names, datatypes, shapes and outputs, prepared once and asked often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from onecard.errors import SpecError
from onecard.server.oip_types import DATATYPES, Datatype, Form, OipLimits, ProtocolError, RequestedOutput, Shape, quote
from onecard.spec import Spec, TensorSpec

_MOST_SHAPES = 4096  # remembered; a client that sends ever new shapes must not fill the memory


class InferContract:
    """One model as its requests see it.

    Args:
        spec: the model's inputs, outputs and symbols.
        limits: of the parser.
        also: further forms of inputs that the engine takes, named as the inputs are: a picture's bytes, say.
        labels: names of the classes, by output, for the classification extension.

    Raises:
        SpecError: a dtype that the protocol has no word for, or a further form of no input.
    """

    def __init__(
        self,
        spec: Spec,
        limits: OipLimits | None = None,
        also: Sequence[TensorSpec] = (),
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.spec = spec
        self.also = tuple(also)
        self.limits = limits or OipLimits()
        self.labels = dict(labels or {})
        self.batched = spec.batch_symbol is not None
        self.forms: dict[str, dict[str, Form]] = {}
        for tensor in (*spec.inputs, *also):
            form = Form(tensor, _datatype(tensor))
            self.forms.setdefault(tensor.name, {})[form.datatype.name] = form
        self.outputs = {tensor.name: Form(tensor, _datatype(tensor)) for tensor in spec.outputs}
        if strange := set(self.forms) - {tensor.name for tensor in spec.inputs}:
            raise SpecError(f"further forms are given of {sorted(strange)}, which the model does not take.")
        self._in_binary = tuple(RequestedOutput(name, True) for name in self.outputs)
        self._in_json = tuple(RequestedOutput(name, False) for name in self.outputs)
        self._seen: dict[tuple[tuple[Form, Shape], ...], tuple[int, ...]] = {}

    def form(self, name: str, datatype: str) -> Form:
        """The form in which a client sends an input.

        Raises:
            ProtocolError: an input that the model does not have, or not in this datatype.
        """
        forms = self.forms.get(name)
        if forms is None:
            raise ProtocolError(f"unknown input {quote(name)}: the model takes {sorted(self.forms)}.")
        form = forms.get(datatype)
        if form is None:
            reason = "; the model takes no strings" if datatype == "BYTES" else ""
            expected = next(iter(forms)) if len(forms) == 1 else _both(forms)
            raise ProtocolError(f"input '{name}' has datatype {quote(datatype)}, expected {expected}{reason}.")
        return form

    def measure(self, sent: tuple[tuple[Form, Shape], ...]) -> tuple[int, ...]:
        """Check the shapes of all inputs together.

        Args:
            sent: each input's form and shape, in the client's order.

        Returns:
            The number of elements of each.

        Raises:
            ProtocolError: an input is missing, of the wrong rank or size, or out of range.
        """
        found = self._seen.get(sent)
        if found is not None:
            return found
        shapes = {form.tensor.name: shape for form, shape in sent}
        if missing := [name for name in self.forms if name not in shapes]:
            raise ProtocolError(f"the inputs {missing} are missing.")
        try:
            msgspec.structs.replace(self.spec, inputs=tuple(form.tensor for form, _ in sent)).bind(shapes)
        except SpecError as error:
            raise ProtocolError(error.message, self._other_forms(sent)) from None
        if len(self._seen) >= _MOST_SHAPES:
            self._seen.clear()
        return self._seen.setdefault(sent, tuple(math.prod(shape) for _, shape in sent))

    def _other_forms(self, sent: tuple[tuple[Form, Shape], ...]) -> str:
        """All forms of those inputs that have several."""
        found = [(form.tensor.name, self.forms[form.tensor.name]) for form, _ in sent]
        taken = ", ".join(f"'{name}' as {_both(forms)}" for name, forms in found if len(forms) > 1)
        return f"The model takes {taken}." if taken else ""

    def check_output(self, wanted: RequestedOutput) -> None:
        """Refuse an output that could not be sent as it is wanted, before the model is run for nothing.

        Raises:
            ProtocolError: no such output, or 16-bit floats in JSON, or classes of truth values.
        """
        form = self.outputs.get(wanted.name)
        if form is None:
            raise ProtocolError(f"unknown output {quote(wanted.name)}: the model gives {sorted(self.outputs)}.")
        if wanted.classes:
            if wanted.region is not None:
                raise ProtocolError(f"output '{wanted.name}': classes cannot be written to shared memory.")
            if form.datatype.name == "BOOL":
                raise ProtocolError(f"output '{wanted.name}' is BOOL, of which there is no classification.")
        elif not (wanted.binary or wanted.region is not None or form.datatype.in_json):
            raise ProtocolError(
                f"output '{wanted.name}' is {form.datatype.name}, which cannot be sent as JSON.",
                "Ask for binary data: 'binary_data' of the output, or 'binary_data_output' of the request.",
            )

    def all_outputs(self, binary: bool) -> tuple[RequestedOutput, ...]:
        """What a client gets that names no outputs.

        Raises:
            ProtocolError: 16-bit floats in JSON.
        """
        if binary:
            return self._in_binary
        for wanted in self._in_json:
            self.check_output(wanted)
        return self._in_json


def _both(forms: Mapping[str, Form]) -> str:
    """Forms of an input in words: ``FP32[B,3,224,224] or UINT8[B,224,224,3]``."""
    return " or ".join(f"{name}[{','.join(map(str, form.tensor.shape))}]" for name, form in forms.items())


def _datatype(tensor: TensorSpec) -> Datatype:
    try:
        return DATATYPES[tensor.dtype]
    except KeyError:
        raise SpecError(f"the protocol has no datatype for '{tensor}': expected {', '.join(DATATYPES)}.") from None
