"""The raw forms of inputs as people write them: ``image=uint8 NHWC mean=0.485,0.456,0.406 std=0.229,0.224,0.225``.

    FORM     [MODEL:]INPUT=DTYPE                          the same numbers in a narrower dtype
             [MODEL:]INPUT=uint8 LAYOUT [CONSTANT ...]    pictures, for a float input [B,C,H,W]
    LAYOUT   NHWC | NCHW
    CONSTANT scale=V | mean=V[,V...] | std=V[,V...]       V: 0.485, 1/255, -1e-3

The model is given ``(x * scale - mean) / std`` of a picture's bytes, by channel; scale is 1/255 where it is not said,
mean 0 and std 1. Words are separated by spaces, and so are forms: each begins at its ``INPUT=DTYPE``. Reading them
imports no torch, since a server's front does it as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from onecard.errors import SpecError
from onecard.spec import DTYPES

if TYPE_CHECKING:
    from onecard.runtime.ingest import Ingest

EXAMPLE = "Write it like 'image=uint8 NHWC mean=0.485,0.456,0.406 std=0.229,0.224,0.225 scale=1/255' or 'ids=int32'."
LAYOUTS = ("NHWC", "NCHW")
PICTURE_DTYPE = "uint8"
_CONSTANTS = ("scale", "mean", "std")
_DEFAULTS = {"scale": (Fraction(1, 255),), "mean": (Fraction(0),), "std": (Fraction(1),)}
_HEAD = re.compile(r"((?P<model>[A-Za-z0-9][A-Za-z0-9._\-]*):)?(?P<input>[A-Za-z_][\w.\-]*)=(?P<dtype>[A-Za-z]\w*)")
_NUMBER = re.compile(r"-?\d{1,12}(\.\d{1,20})?(e-?\d{1,2})?")  # short: tuning files hold such texts, too
_MOST_QUOTED = 200


@dataclass(frozen=True)
class RawForm:
    """What may be sent for one input, as it was written; whether the model can be given it, :meth:`ingest` knows.

    Args:
        text: without the model's name, its words one space apart.
        model: which it is for; empty for every one.
        input: its name.
        dtype: of what is sent.
        layout: of pictures; empty for numbers that are taken as they are.
        constants: ``scale``, ``mean`` and ``std``, where they were given.
    """

    text: str
    model: str
    input: str
    dtype: str
    layout: str
    constants: dict[str, tuple[Fraction, ...]]

    def ingest(self) -> Ingest:
        """What the engine takes; it checks it against the model."""
        from onecard.runtime.ingest import Cast, Picture

        if not self.layout:
            return Cast(self.input, self.dtype)
        (scale,), mean, std = ((_DEFAULTS | self.constants)[name] for name in _CONSTANTS)
        # Picture knows no scale, but (x - mean) / std of the bytes.
        mean_bytes, std_bytes = (tuple(float(value / scale) for value in values) for values in (mean, std))
        return Picture(self.input, mean_bytes, std_bytes, self.layout)


def read_forms(texts: Iterable[str]) -> tuple[RawForm, ...]:
    """Read raw forms, one or several in each text.

    Raises:
        SpecError: a text does not follow the grammar; the message says which part.
    """
    groups: list[list[str]] = []
    for word in " ".join(texts).split():
        if _begins(word):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise _wrong(word, f"'{word[:_MOST_QUOTED]}' names no input and dtype")
    return tuple(_read(words) for words in groups)


def make_ingests(texts: Iterable[str], model: str = "") -> tuple[Ingest, ...]:
    """The raw forms that are for a model, as an engine takes them.

    Args:
        texts: see :func:`read_forms`.
        model: its name; forms for another one are left out.

    Raises:
        SpecError: a text does not follow the grammar.
    """
    return tuple(form.ingest() for form in read_forms(texts) if form.model in ("", model))


def _begins(word: str) -> bool:
    """Whether a form begins with a word; an input may be called ``mean``, too."""
    head = _HEAD.fullmatch(word)
    return head is not None and (head["input"] not in _CONSTANTS or head["dtype"] in DTYPES)


def _read(words: Sequence[str]) -> RawForm:
    head = _HEAD.fullmatch(words[0])
    assert head is not None
    whole, dtype = " ".join(words), head["dtype"]
    if dtype not in DTYPES:
        raise SpecError(f"unknown dtype '{dtype}' in '{whole[:_MOST_QUOTED]}': expected one of {', '.join(DTYPES)}.")
    layouts = [word for word in words[1:] if word in LAYOUTS]
    constants: dict[str, tuple[Fraction, ...]] = {}
    for word in (word for word in words[1:] if word not in LAYOUTS):
        name, equals, values = word.partition("=")
        if not equals or name not in _CONSTANTS:
            raise _wrong(whole, f"'{word}' is neither {', '.join(LAYOUTS)} nor scale=, mean= or std=")
        if name in constants:
            raise _wrong(whole, f"{name} is given twice")
        constants[name] = tuple(_number(value, whole) for value in values.split(","))
    if len(layouts) > 1:
        raise _wrong(whole, "two layouts are given")
    _check(whole, dtype, layouts, constants)
    text = " ".join([f"{head['input']}={dtype}", *words[1:]])
    return RawForm(text, head["model"] or "", head["input"], dtype, "".join(layouts), constants)


def _check(whole: str, dtype: str, layouts: Sequence[str], constants: dict[str, tuple[Fraction, ...]]) -> None:
    """Refuse words that do not go together."""
    if layouts and dtype != PICTURE_DTYPE:
        raise _wrong(whole, f"pictures ({layouts[0]}) are {PICTURE_DTYPE}, not {dtype}")
    if constants and not layouts:
        raise _wrong(whole, f"{next(iter(constants))} is for pictures: NHWC or NCHW is missing")
    if len(constants.get("scale", (1,))) != 1:
        raise _wrong(whole, "scale is one number")
    if 0 in (*constants.get("scale", ()), *constants.get("std", ())):
        raise _wrong(whole, "scale and std cannot be 0")
    if "scale" not in constants and any(abs(value) > 1 for value in constants.get("mean", ())):
        raise SpecError(
            f"the mean in '{whole[:_MOST_QUOTED]}' is not one of numbers from 0 to 1, which scale=1/255 makes.",
            "Add scale=1 if mean and std are in units of the bytes, else scale=1/255.",
        )


def _number(text: str, whole: str) -> Fraction:
    above, slash, below = text.partition("/")
    if not _NUMBER.fullmatch(above) or (slash and (not _NUMBER.fullmatch(below) or not Fraction(below))):
        raise _wrong(whole, f"'{text}' is no number")
    return Fraction(above) / Fraction(below) if slash else Fraction(above)


def _wrong(whole: str, what: str) -> SpecError:
    return SpecError(f"cannot read the raw form '{whole[:_MOST_QUOTED]}': {what[:_MOST_QUOTED]}.", EXAMPLE)
