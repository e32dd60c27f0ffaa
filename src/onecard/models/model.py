"""A model ready for the search: the original behind the flat convention, its spec, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from onecard.models.flat import FlatModule
from onecard.spec import Spec


class Origin(msgspec.Struct, frozen=True):
    """How to build the original again.

    Args:
        kind: a key of :data:`onecard.models.load.LOADERS`: ``factory``, ``torchvision``, ``timm``, ``hf``,
            ``torchscript``, ``exported``, ``onnx`` or ``live``.
        reference: what stands behind the kind: ``package.module:callable``, a model name, a class name, a file.
        module_sha256: for a factory out of a file, the digest of that file.
    """

    kind: str
    reference: str
    module_sha256: str = ""

    @property
    def is_rebuildable(self) -> bool:
        """True where code that is installed can build the module, so that weights are all that must ship."""
        return self.kind in ("factory", "torchvision", "timm", "hf")


@dataclass(frozen=True)
class Model:
    """The original in fp32 and evaluation mode, on the CPU.

    Args:
        name: what the user sees.
        flat: the module; ``flat.plan`` says how to call the original.
        spec: inputs, outputs, symbols.
        origin: how to build it again.
        files: files that rebuilding needs, by the name they get in a source folder (a config, a factory's file).
        extra: the live object for kinds that are no nn.Module (an ONNX file has its path in ``files``).
    """

    name: str
    flat: FlatModule
    spec: Spec
    origin: Origin
    files: dict[str, Path] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
