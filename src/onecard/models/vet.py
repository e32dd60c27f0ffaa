"""Reading a ``.pt2`` archive without trusting it: only known members, no pickles, no text that could become code.

``torch.export.load`` unpickles sample inputs, custom objects and any tensor marked ``use_pickle``, opens compiled
libraries, evaluates symbolic expressions with ``sympy.sympify`` (which is ``eval``), resolves operators by walking
attributes from ``torch`` (``torch.os`` is one) and writes node names into Python source that it executes. So the
archive is never given to it as it came: what is known to be harmless is copied into a new one, and that is loaded.
"""

from __future__ import annotations

import ast
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onecard.errors import BundleError, OnecardError

MODEL = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
WEIGHTS_CONFIG = "data/weights/model_weights_config.json"
CONSTANTS_CONFIG = "data/constants/model_constants_config.json"
DEFAULT_CAP_BYTES = 64 << 30
_TEXT_CAP_BYTES = 512 << 20
_MEMBERS_CAP = 200_000

_HEADER = ("archive_format", "archive_version", "byteorder", ".data/version")
_IGNORED = (".data/serialization_id",)
_PAYLOAD = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}")
_CHUNK_BYTES = 1 << 20

_IDENTIFIER = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
_PLAIN = re.compile(r"[\w.:@+\-/ ]*", re.ASCII)
_STACK = re.compile(r"[\w.,;:@+\-/ \[\]()<>]*", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.[A-Za-z]\w*\.[A-Za-z_]\w*(\.[A-Za-z]\w*)?"
    r"|_operator\.(lt|le|gt|ge|eq|ne|add|sub|mul|pow|mod|neg|pos|and_|or_|truediv|floordiv|lshift|rshift|getitem)"
    r"|math\.(trunc|ceil|floor|sqrt)|torch\.(sym_\w+|_sym_\w+)",
    re.ASCII,
)
# Operators that reach outside of tensors: files, other processes, compiled code, Python itself.
_UNSAFE_OPERATOR = re.compile(
    r"torch\.ops\.(?!(aten|prims|higher_order|quantized|quantized_decomposed|torchao|torchvision)\.)"
    r"|torch\.ops\.higher_order\.(?!(cond|while_loop|scan|map|map_impl|associative_scan|out_dtype|flex_attention"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast|invoke_subgraph|auto_functionalized|auto_functionalized_v2)$)"
    r"|torch\.ops\.\w+\.(from_file|save|load|warn|_*print|\w*inductor\w*)(\.|$)"
    r"|torch\.ops\.\w+\.(?!__(and|or|xor|lshift|rshift)__(\.|$))\w*__"
)
_EXPRESSION_NAME = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Equality|Unequality|StrictLessThan|StrictGreaterThan|LessThan|"
    "GreaterThan|FloorDiv|ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|"
    "PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|"
    "RoundToInt|RoundDecimal|ToFloat|Identity|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Piecewise|ExprCondPair|"
    r"true|false|floor|ceiling|sqrt|OpaqueUnaryFn_sqrt|int_oo|oo|(s|u|zuf|zf|f)\d+",
    re.ASCII,
)
_EXPRESSION_NODES = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.UnaryOp,
    ast.USub,
    ast.Not,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.FloorDiv,
    ast.Mod,
    ast.Pow,
    ast.Compare,
    ast.cmpop,
    ast.BoolOp,
    ast.boolop,
)
_EXPRESSION_TEXT = re.compile(r"(s|u|zuf|zf|f)\d+|[+\-]?\d+(\.\d*)?(e[+\-]?\d{1,3})?", re.ASCII)
_EXPRESSION_CAP = 10_000
_POWER_CAP = 64
_TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")

Reject = Callable[[str], OnecardError]


def rejector(path: Path, error: type[OnecardError] = BundleError) -> Reject:
    """How to say no to a file: an error of the given class that names it.

    Args:
        path: the archive.
        error: ``BundleError`` for a file out of a bundle, ``ModelError`` for a user's own.
    """
    cure = (
        "Export it again with torch.export.save and use plain tensors only."
        if error is not BundleError
        else ("Do not use it: get the bundle again from where it was made.")
    )
    return lambda reason: error(f"the exported program {path.name} is refused: {reason}.", cure)


def clean_copy(path: Path, target: Path, reject: Reject, cap_bytes: int, *, drop_samples: bool) -> None:
    """Write the harmless part of a ``.pt2`` archive as a new archive.

    Args:
        path: the archive to read.
        target: the archive to write; stored without compression, with fixed dates, so that equal
            programs give equal files.
        reject: makes the error.
        cap_bytes: most bytes that all members may have together when unpacked.
        drop_samples: True drops sample inputs, False refuses an archive that has any.

    Raises:
        OnecardError: what ``reject`` makes, for anything that is not known to be harmless.
    """
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as clean:
            members = _members(archive, reject, cap_bytes)
            if not drop_samples and SAMPLE_INPUTS in members and members[SAMPLE_INPUTS].file_size:
                raise reject("it holds sample inputs, which are a pickle")
            payloads = _payload_sizes(members)
            for name in (*_HEADER, *sorted(payloads)):
                if name in members:
                    _copy(archive, members[name], clean, name)
            for name, directory in ((WEIGHTS_CONFIG, "data/weights/"), (CONSTANTS_CONFIG, "data/constants/")):
                config = _read_json(archive, members, name, reject)
                _vet_config(config, directory, payloads, reject)
                _write(clean, name, json.dumps(config).encode())
            model = _read_json(archive, members, MODEL, reject)
            _write(clean, MODEL, json.dumps(_vet_model(model, reject)).encode())
            # torch.export.load reads this member always, and takes an empty one for "no sample inputs".
            _write(clean, SAMPLE_INPUTS, b"")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise reject(f"it cannot be read ({type(error).__name__}: {error})") from error
    except FileNotFoundError as error:
        raise reject("there is no such file") from error


def _members(archive: zipfile.ZipFile, reject: Reject, cap_bytes: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MEMBERS_CAP:
        raise reject(f"it has {len(infos)} members, more than {_MEMBERS_CAP}")
    total = sum(info.file_size for info in infos)
    if total > cap_bytes:
        raise reject(f"it unpacks to {total} bytes, more than {cap_bytes}")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        known = name in (*_HEADER, *_IGNORED, MODEL, SAMPLE_INPUTS, WEIGHTS_CONFIG, CONSTANTS_CONFIG)
        if not known and not _PAYLOAD.fullmatch(name):
            raise reject(f"it has an unexpected member {info.filename[:200]!r}")
        if name in members:
            raise reject(f"it has the member {name!r} twice")
        members[name] = info
    return members


def _payload_sizes(members: dict[str, zipfile.ZipInfo]) -> dict[str, int]:
    return {name: info.file_size for name, info in members.items() if _PAYLOAD.fullmatch(name)}


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, clean: zipfile.ZipFile, name: str) -> None:
    entry = zipfile.ZipInfo(f"model/{name}")
    with archive.open(info) as source, clean.open(entry, "w", force_zip64=info.file_size > zipfile.ZIP64_LIMIT) as out:
        while chunk := source.read(_CHUNK_BYTES):
            out.write(chunk)


def _write(clean: zipfile.ZipFile, name: str, data: bytes) -> None:
    clean.writestr(zipfile.ZipInfo(f"model/{name}"), data)


def _read_json(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, reject: Reject) -> Any:
    if name not in members:
        raise reject(f"it lacks the member {name!r}")
    if members[name].file_size > _TEXT_CAP_BYTES:
        raise reject(f"its member {name!r} has more than {_TEXT_CAP_BYTES} bytes")
    return json.loads(archive.read(members[name]))


def _vet_config(config: Any, directory: str, payloads: dict[str, int], reject: Reject) -> None:
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise reject(f"the list of tensors in {directory} is malformed")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise reject(f"the tensor {name!r} is a pickle")
        member = f"{directory}{entry.get('path_name')}"
        if not _PAYLOAD.fullmatch(member) or member not in payloads:
            raise reject(f"the tensor {name!r} has no data")
        sizes = _walk_sizes(entry.get("tensor_meta"))
        # An empty record is taken for zeros of any size, which would be memory for nothing.
        if payloads[member] == 0 and math.prod(sizes) != 0:
            raise reject(f"the tensor {name!r} of shape {sizes} has no bytes")
        _vet_text(entry, reject)


def _walk_sizes(meta: Any) -> list[int]:
    sizes = meta.get("sizes") if isinstance(meta, dict) else None
    if not isinstance(sizes, list) or not all(isinstance(s, dict) and type(s.get("as_int")) is int for s in sizes):
        raise ValueError("a tensor without a concrete shape")
    return [size["as_int"] for size in sizes]


def _vet_model(model: Any, reject: Reject) -> Any:
    if not isinstance(model, dict):
        raise reject("its program is no JSON object")
    # Guards are Python source; the spec's ranges take their place.
    model["guards_code"] = []
    _drop_metadata(model)
    _vet_text(model, reject)
    return model


def _drop_metadata(value: Any) -> None:
    """Keep of each node's metadata only the module it came from: stack traces quote the author's files."""
    if isinstance(value, dict):
        metadata = value.get("metadata")
        if isinstance(metadata, dict):
            stack = metadata.get("nn_module_stack")
            keep = isinstance(stack, str) and _STACK.fullmatch(stack)
            value["metadata"] = {"nn_module_stack": stack} if keep else {}
        for item in value.values():
            _drop_metadata(item)
    elif isinstance(value, list):
        for item in value:
            _drop_metadata(item)


def _vet_text(value: Any, reject: Reject) -> None:
    """Refuse any text, at any depth, that could be more than a name where it stands."""
    for key, text in _texts(value, ""):
        if key in ("target", "as_operator"):
            harmless = bool(_OPERATOR.fullmatch(text)) and not _UNSAFE_OPERATOR.match(text)
        elif key == "expr_str":
            harmless = _is_expression(text)
        elif key in ("in_spec", "out_spec"):
            harmless = text == "" or _is_tree(json.loads(text))
        elif key in ("name", "as_name", "forward_arg_names"):
            harmless = bool(_IDENTIFIER.fullmatch(text))
        elif key in ("as_string", "as_strings"):
            harmless = True  # constants of operators, never parsed
        elif key == "nn_module_stack":
            harmless = bool(_STACK.fullmatch(text))
        else:
            harmless = key not in ("as_custom_obj", "class_fqn") and bool(_PLAIN.fullmatch(text))
        if not harmless:
            raise reject(f"its {key or 'text'} {text[:120]!r} is not allowed")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "key", name
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)


def _is_expression(text: str) -> bool:
    """True for arithmetic over symbols and known functions: no attribute, subscript, unknown name or free text."""
    if len(text) > _EXPRESSION_CAP:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, MemoryError):
        return False
    return all(map(_is_expression_node, ast.walk(tree)))


def _is_expression_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return bool(_EXPRESSION_NAME.fullmatch(node.id))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Constant):
        # Functions of sympy read text arguments as expressions in turn, so these may only be names or numbers.
        return isinstance(node.value, int | float) or (
            isinstance(node.value, str) and bool(_EXPRESSION_TEXT.fullmatch(node.value))
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return (
            isinstance(node.right, ast.Constant) and isinstance(node.right.value, int) and node.right.value < _POWER_CAP
        )
    return isinstance(node, _EXPRESSION_NODES)


def _is_tree(spec: Any) -> bool:
    if isinstance(spec, list) and len(spec) == 2 and spec[0] == 1:  # noqa: PLR2004 - [protocol, tree]
        return _is_tree(spec[1])
    if not isinstance(spec, dict) or set(spec) != {"type", "context", "children_spec"}:
        return False
    kind, context, children = spec["type"], spec["context"], spec["children_spec"]
    known = kind in _TREE_TYPES or (isinstance(kind, str) and bool(re.fullmatch(r"transformers\.[\w.]+", kind)))
    return known and _is_context(context) and isinstance(children, list) and all(map(_is_tree, children))


def _is_context(context: Any) -> bool:
    if isinstance(context, str):
        context = json.loads(context)
    names = [context] if context is None or isinstance(context, str) else context
    return isinstance(names, list) and all(n is None or (isinstance(n, str) and _PLAIN.fullmatch(n)) for n in names)
