"""TorchInductor, compiled ahead: what ``torch.compile`` generates, saved so that loading compiles nothing.

PyTorch's own compile cache holds pickles and does not serve where inductor freezing is on. So the artifact is
the wrapper code that inductor generated (``graph.py``), the constants that freezing folded and laid out
(safetensors), and the compiled kernels (``kernels/``: cubins and shared objects, under the content hashes by
which inductor and Triton look them up). Loading executes the wrapper beside those kernels: no Dynamo, no
guards, no compiler. The answers' post-processing that AOTAutograd would add (views of inputs, mutations) is
not needed for inference graphs; the gate would tell.

Weights that oneDNN packs into an opaque layout on a CPU are saved as they were before, with the packing
operator and its arguments, and packed again when loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, fx

from onecard.backends.base import Runner, Target, Tensors
from onecard.backends.enlarge import enlarge_last
from onecard.backends.export import export_program, quiet_export
from onecard.backends.layout import lay_out_products
from onecard.backends.order import order_for_memory
from onecard.backends.packing import Constant, Packings, load_constant
from onecard.backends.pointwise import respell_pointwise
from onecard.backends.tensors import TensorStore
from onecard.errors import Unsupported
from onecard.evidence import Verdict
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.quiet import muted
from onecard.transforms.precision import precision_scope

_CODE, _PLAN, _KERNELS = "graph.py", "graph.json", "kernels"
_TRITON_FILES = {".cubin", ".json", ".best_config", ".so"}
_ALIGNMENT = 16  # bytes; what the generated kernels assume of their inputs
_env_lock = threading.Lock()


class _Plan(msgspec.Struct, frozen=True):
    """How to call the generated code: its arguments are input names, or [input, axis] for a size."""

    arguments: tuple[str | tuple[str, int], ...]
    outputs: tuple[str, ...]
    constants: tuple[Constant, ...]


class InductorBackend:
    """The graph compiled by TorchInductor with frozen weights."""

    def available(self, target: Target) -> Verdict | None:
        if target.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return Verdict(
                "unavailable", "TorchInductor needs a C++ compiler on a CPU", "Install g++ (apt install g++)."
            )
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        """See the module's docstring for what is written."""
        program = export_program(module, inputs, target)
        caches = tempfile.TemporaryDirectory(prefix="onecard-inductor-")
        with quiet_export(), caches as cache, _kernel_cache(Path(cache)):
            graph = _compile(program, target)
            store = TensorStore(target.shared, {})
            constants = graph.save_constants(store)
            store.save()
            plan = _Plan(graph.arguments(target), tuple(t.name for t in target.spec.outputs), constants)
            (folder / _PLAN).write_bytes(msgspec.json.encode(plan))
            (folder / _CODE).write_text(graph.code)
            # Triton kernels choose their launch configuration at the first call; that ships too.
            _CompiledGraph(graph.call, plan)(inputs)
            _copy_triton_cache(Path(cache), folder / _KERNELS)
            _copy_cpp_kernels(graph.code, folder / _KERNELS)

    def load(self, folder: Path, target: Target) -> Runner:
        plan = msgspec.json.decode((folder / _PLAN).read_bytes(), type=_Plan)
        store = TensorStore(target.shared, target.memo)
        constants = {c.name: load_constant(c, store, target.device, target.memo) for c in plan.constants}
        with tempfile.TemporaryDirectory(prefix="onecard-inductor-") as cache:
            _copy_triton_cache(folder / _KERNELS, Path(cache))
            with _kernel_cache(Path(cache)):
                call = _execute(folder / _CODE, folder / _KERNELS, constants)
                runner = _CompiledGraph(call, plan)
                _first_call(runner, target)
        return runner


class _CompiledGraph:
    """The generated code behind named tensors."""

    def __init__(self, call: Callable[[list[Any]], Sequence[Tensor]], plan: _Plan) -> None:
        self._call: Callable[[list[Any]], Sequence[Tensor]] | None = call
        self._plan = plan

    def __call__(self, inputs: Tensors) -> Tensors:
        if self._call is None:
            raise RuntimeError("this runner is closed")
        aligned = {k: t if t.data_ptr() % _ALIGNMENT == 0 else t.clone() for k, t in inputs.items()}
        arguments = [aligned[a] if isinstance(a, str) else aligned[a[0]].shape[a[1]] for a in self._plan.arguments]
        return dict(zip(self._plan.outputs, self._call(arguments), strict=True))

    def close(self) -> None:
        self._call = None


class _Captured:
    """What inductor made of one graph, caught on its way from the compiler."""

    def __init__(self, graph: fx.GraphModule, compiled: Any, call: Any, packings: Packings) -> None:
        self.code: str = compiled.source_code
        self.call = call
        self._placeholders = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        self._packings = packings
        scope = getattr(self.call, "__func__", self.call).__globals__
        self.constants: dict[str, Tensor] = {k: v for k, v in scope.items() if isinstance(v, Tensor)}
        missing = set(compiled.frozen_param_names or ()) - set(self.constants)
        if missing:
            raise Unsupported(f"TorchInductor keeps {len(missing)} weights where they cannot be read")

    def arguments(self, target: Target) -> tuple[str | tuple[str, int], ...]:
        """Which input, or which size of which input, each argument of the generated code is."""
        names = [t.name for t in target.spec.inputs]
        tensors = [p for p in self._placeholders if isinstance(p, Tensor)]
        if len(tensors) != len(names):
            raise Unsupported(
                f"the compiled graph takes {len(tensors)} tensors where the model has {len(names)} inputs"
            )
        sizes = {
            str(size.node.expr): (name, axis)
            for name, tensor in zip(names, tensors, strict=True)
            for axis, size in enumerate(cast(tuple[Any, ...], tensor.shape))
            if hasattr(size, "node")
        }
        order = iter(names)
        return tuple(next(order) if isinstance(p, Tensor) else sizes[str(p.node.expr)] for p in self._placeholders)

    def save_constants(self, store: TensorStore) -> tuple[Constant, ...]:
        return tuple(self._packings.save(name, tensor, store) for name, tensor in self.constants.items())


def _compile(program: torch.export.ExportedProgram, target: Target) -> _Captured:
    """Compile an exported program and catch inductor's own result.

    The hooks are on functions that have stood in inductor since 2.6; where one is gone, the row says so.
    """
    from torch._inductor import compile_fx, config, standalone_compile

    graphs: list[tuple[fx.GraphModule, Any, Any]] = []
    packings = Packings()
    generate = compile_fx.fx_codegen_and_compile

    def catch(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        compiled: Any = generate(gm, *args, **kwargs)
        # The callable as it is now: later it is wrapped to realign inputs, which hides its module.
        graphs.append((gm, compiled, compiled.current_callable))
        return compiled

    gm = respell_pointwise(enlarge_last(lay_out_products(program.module())))
    example = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    options = {
        "freezing": True,
        "fx_graph_cache": False,
        "triton.cudagraphs": False,
        "graph_partition": False,
        "post_grad_custom_post_pass": order_for_memory,
    }
    with (
        config.patch(options),
        precision_scope(target.recipe.precision),
        _replaced(compile_fx, "fx_codegen_and_compile", catch),
        packings.noted(),
        # It warns that its own (unwanted) cache artifact cannot be saved.
        muted("torch._inductor.standalone_compile", warned=False),
    ):
        try:
            standalone_compile(gm, example, dynamic_shapes="from_graph", options={})
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(f"TorchInductor cannot compile this model: {first_line(error)}") from error
    if len(graphs) != 1:
        raise Unsupported(f"TorchInductor made {len(graphs)} graphs of this model, expected one")
    return _Captured(*graphs[0], packings)


def _execute(code: Path, kernels: Path, constants: dict[str, Tensor]) -> Callable[[list[Any]], Sequence[Tensor]]:
    """Run the generated module beside its compiled kernels and give it its constants."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def load_kernel(self: Any, argtypes: Sequence[str], source: str) -> Any:
        digest = _digest(source)
        library = CppPythonBindingsCodeCache._load_library_inner(str(kernels / f"{digest}.so"), digest)
        return getattr(library, CppPythonBindingsCodeCache.entry_function)

    module = types.ModuleType(f"onecard_graph_{code.parent.name}")
    module.__file__ = str(code)
    with config.patch({"compile_threads": 1}), _replaced(AsyncCompile, "cpp_pybinding", load_kernel):
        exec(compile(code.read_text(), str(code), "exec"), module.__dict__)
    module.__dict__.update(constants)
    call: Callable[[list[Any]], Sequence[Tensor]] = module.__dict__["call"]
    return call


def _copy_cpp_kernels(code: str, folder: Path) -> None:
    """Copy the shared object of every C++ kernel, under the digest of its source.

    Inductor finds them by a hash over the compiler too; a machine that only runs the model needs none.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    folder.mkdir(exist_ok=True)
    load = Cache._load_library_inner

    def copy_kernel(self: Any, argtypes: Sequence[str], source: str) -> Any:
        def note(path: str, key: str) -> Any:
            shutil.copyfile(path, folder / f"{_digest(source)}.so")
            return load(path, key)

        Cache.cache.clear()  # so that the library's path is asked for again
        with _replaced(Cache, "_load_library_inner", note):
            return Cache.load_pybinding(argtypes, source)

    with _replaced(AsyncCompile, "cpp_pybinding", copy_kernel):
        exec(compile(code, _CODE, "exec"), {"__name__": "onecard_graph"})


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def _first_call(runner: _CompiledGraph, target: Target) -> None:
    """Call once while the kernel cache is in place: Triton loads its launchers at the first call."""
    from onecard.inputs import make_inputs

    bucket = target.bucket if target.bucket is not None else target.spec.smallest()
    inputs = make_inputs(target.spec, bucket)
    with torch.inference_mode():
        runner({name: tensor.to(target.device) for name, tensor in inputs.items()})


def _copy_triton_cache(source: Path, destination: Path) -> None:
    """Copy Triton's compiled kernels and tuning results; inductor's own caches hold pickles and stay behind."""
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        wanted = parts[0] == "triton" or path.suffix == ".best_config"
        if wanted and path.suffix in _TRITON_FILES:
            target = destination.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


@contextlib.contextmanager
def _kernel_cache(folder: Path) -> Iterator[None]:
    """Point inductor's and Triton's caches at a folder; one thread at a time, for it is process-wide."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    with _env_lock:
        before = {name: os.environ.get(name) for name in names}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
