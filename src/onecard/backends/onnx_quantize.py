"""INT8 and INT4 by ONNX Runtime's own quantisers: calibrate, settle on a method and on layers to keep, write the graph.

Sources: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html and, for weights alone, the
contributed operator ``com.microsoft.MatMulNBits``. Import this only where onnx and onnxruntime are installed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard import host
from onecard.backends.base import Target
from onecard.backends.onnx_graph import (
    EXTERNAL_DATA_BYTES,
    eight_bit_region,
    fix_sizes,
    pool_spatial_means,
    read_floats,
    thin,
    weighted_nodes,
)
from onecard.backends.onnx_qat import complete
from onecard.calibration.bench import NO_ROWS_CURE, Bench, Run
from onecard.calibration.sensitivity import quantisable_layers, rank_layers
from onecard.calibration.settle import settle
from onecard.errors import Unsupported, UsageError
from onecard.evidence import LayerError
from onecard.models.flat import FlatModule

if TYPE_CHECKING:
    import onnx

SCHEMES = frozenset({"int8", "int8_dynamic", "int8_weights", "int4_weights"})
QAT = "qat"
FILE = "model.onnx"

_METHODS = {
    "minmax": "MinMax",
    "entropy": "Entropy",
    "percentile": "Percentile",
}
"""Our names to those of ``onnxruntime.quantization.CalibrationMethod``."""

_CALIBRATION_OPTIONS: dict[str, dict[str, Any]] = {
    "minmax": {},
    # By default as many bins as levels are counted, which leaves entropy nothing to choose.
    "entropy": {"num_bins": 512, "num_quantized_bins": 128, "symmetric": False},
    "percentile": {"num_bins": 2048, "percentile": 99.99, "symmetric": False},
}
_BATCH = 8  # rows at a time: a histogram needs every activation of a batch at once
_HISTOGRAM_ROWS = 64
_BLOCKS = {"int8_weights": (8, 128), "int4_weights": (4, 32)}  # bits, weights that share a scale
_INT8_ACCUMULATION = 4  # MatMulNBits: the activations are quantised too, by block, which is the fast kernel
_WIDE_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}

Load = Callable[[Path], Run]
"""Load an artifact folder, just as what ships is loaded."""


@dataclass(frozen=True)
class _Work:
    """One float graph under compression.

    Args:
        scheme: one of :data:`SCHEMES`.
        path: the prepared float graph.
        layer_of: a node's name to its layer's.
        layers: a layer's name to its nodes'.
        bench: rows, judge and progress.
        external: whether weights need a file of their own.
        ranges: of the activations by calibration method, once they are known.
    """

    scheme: str
    path: Path
    layer_of: Callable[[str], str]
    layers: dict[str, tuple[str, ...]]
    bench: Bench
    external: bool
    ranges: dict[str, Any] = field(default_factory=dict)


def quantize(source: Path, module: FlatModule, folder: Path, target: Target, load: Load) -> None:
    """Write the quantised form of a float graph as ``model.onnx``.

    The first artifact of a variant settles on the method and on the layers to keep; those of its other
    buckets are the same graph with other sizes.

    Args:
        source: the float graph, in a folder that does not ship, with the moving sizes of the spec.
        module: what it was exported from; its layers are ranked if some have to be kept.
        folder: of the artifact.
        target: its recipe holds one of :data:`SCHEMES`, its bench rows and judge.
        load: loads a trial.

    Raises:
        Unsupported: there is nothing to quantise, there are no rows to calibrate on, or no method works.
        UsageError: the target has no bench.
    """
    scheme = next(t for t in target.recipe.transforms if t in SCHEMES or t == QAT)
    bench = target.bench
    if bench is None:
        raise UsageError(f"'{scheme}' is applied when an artifact is built, and cannot be applied again.")
    if scheme == "int8" and not bench.calibration:
        raise Unsupported("int8 with static scales needs representative inputs, and none were given", NO_ROWS_CURE)
    done: Path | None = bench.memo.get(("onnxruntime", scheme))
    if done is None:
        settled = _trained if scheme == QAT else _settled
        done = bench.memo["onnxruntime", scheme] = settled(scheme, source, module, bench, load)
    _ship(done, folder, target)


def _settled(scheme: str, source: Path, module: FlatModule, bench: Bench, load: Load) -> Path:
    """Settle, and write the outcome beside the source."""
    with _quiet():
        work = _prepared(scheme, source, module, bench)
    trials, final = source.parent / f"{scheme}_trial", source.parent / scheme

    def make(method: str, kept: tuple[str, ...]) -> Run:
        _write(work, method, kept, trials)
        return load(trials)

    def rank() -> Sequence[LayerError]:
        names = [name for name in quantisable_layers(module) if name in work.layers]
        return rank_layers(module, bench, names) if names else ()

    methods = tuple(_METHODS) if scheme == "int8" else ("",)
    named = _is_exported(module)
    found = settle(scheme, tuple(work.layers), methods, make, bench, rank if named else None)
    _write(work, found.method, found.kept, final)
    shutil.rmtree(trials, ignore_errors=True)
    return final


def _trained(scheme: str, source: Path, module: FlatModule, bench: Bench, load: Load) -> Path:
    """A graph that training has quantised already, made whole for the 8-bit kernels."""
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    folder = source.parent / scheme
    folder.mkdir()
    work = _Work(scheme, source, _own_name, {}, bench, _bytes_of(source) > EXTERNAL_DATA_BYTES)

    def measure(operators: set[str]) -> dict[str, tuple[float, float]]:
        spans = {name: found.range_value for name, found in _calibrate(work, "minmax", operators).items()}
        return {name: (float(low.min()), float(high.max())) for name, (low, high) in spans.items()}

    with _quiet():
        model = load_model_with_shape_infer(source)
        complete(model, measure if bench.calibration else None)
        thin(model)
        _save(model, folder / FILE, work.external)
    return folder


def _prepared(scheme: str, source: Path, module: FlatModule, bench: Bench) -> _Work:
    """Fold what can be folded, and find the layers."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    path = source.with_name(f"{scheme}_{source.name}")
    external = _bytes_of(source) > EXTERNAL_DATA_BYTES
    # The fusion of product and bias would hide products from the quantisers of products.
    off = () if scheme == "int8" else ("MatMulAddFusion",)
    try:
        _fold(source, path, off)
        model = load_model_with_shape_infer(path)
    except Exception as error:  # folding is a courtesy
        logging.getLogger(__name__).debug("the graph is quantised as it is: %s", error)
        model = load_model_with_shape_infer(source)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"/{node.op_type}_unnamed_{index}"
    if scheme == "int8":
        pool_spatial_means(model)
    else:
        wrapped = ONNXModel(model)
        wrapped.replace_gemm_with_matmul()
        model = wrapped.model
    _save(model, path, external)

    layer_of = _module_of if _is_exported(module) else _own_name
    operators = ("Conv", "Gemm", "MatMul") if scheme == "int8" else ("MatMul",)
    return _Work(scheme, path, layer_of, weighted_nodes(model, operators, layer_of), bench, external)


def _write(work: _Work, method: str, kept: tuple[str, ...], folder: Path) -> None:
    """Quantise with a method, all layers but those kept, into a folder made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    nodes = [node for layer, names in work.layers.items() if layer not in kept for node in names]
    with _quiet():
        if work.scheme == "int8":
            model = _static(work, method, nodes)
        elif work.scheme == "int8_dynamic":
            model = _dynamic(work, nodes, folder)
        else:
            model = _weights(work, nodes)
        thin(model)
        _save(model, folder / FILE, work.external)


def _static(work: _Work, method: str, roots: list[str]) -> onnx.ModelProto:
    """QDQ: u8 activations with a zero point, s8 weights with a scale for each output channel."""
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    model = load_model_with_shape_infer(work.path)
    if method not in work.ranges:
        widest = set(eight_bit_region(model, {name for names in work.layers.values() for name in names}))
        operators = {node.op_type for node in model.graph.node if node.name in widest}
        work.ranges[method] = _calibrate(work, method, operators)
    region = eight_bit_region(model, set(roots))
    quantizer = QDQQuantizer(
        model,
        True,
        _narrow_weights(),
        QuantType.QInt8,
        QuantType.QUInt8,
        copy.deepcopy(work.ranges[method]),  # it adjusts them
        region,
        [],
        sorted({node.op_type for node in model.graph.node}),
        {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )
    quantizer.quantize_model()
    read_floats(quantizer.model.model, set(region))
    return quantizer.model.model


def _calibrate(work: _Work, method: str, operators: Collection[str]) -> Any:
    """The range over the calibration rows of all that these operators read and give, a batch at a time."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    augmented = work.path.with_name(f"calibrate_{method}.onnx")
    calibrator = create_calibrator(
        work.path,
        sorted(operators),
        augmented_model_path=str(augmented),
        calibrate_method=CalibrationMethod[_METHODS[method]],
        use_external_data_format=work.external,
        extra_options=_CALIBRATION_OPTIONS[method],
    )
    bench, done = work.bench, 0
    limit = bench.rows if method == "minmax" else min(bench.rows, _HISTOGRAM_ROWS)
    names = [value.name for value in calibrator.infer_session.get_inputs()]
    for batch in bench.batches(max(_BATCH, bench.smallest_batch)):
        bench.progress(f"calibrating {work.scheme} {method}: {done} of {limit} rows")
        values = [batch[t.name].cpu().numpy() for t in bench.spec.inputs]
        calibrator.collect_data(_OneBatch(dict(zip(names, values, strict=True))))
        done += len(values[0])
        if done >= limit:
            break
    bench.progress(f"finding {method} scales")
    return calibrator.compute_data()


class _OneBatch:
    """The reader that a calibrator asks: one batch, then no more."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._left: dict[str, Any] | None = values

    def get_next(self) -> dict[str, Any] | None:
        values, self._left = self._left, None
        return values


def _dynamic(work: _Work, nodes: list[str], folder: Path) -> onnx.ModelProto:
    """Products of activations quantised as they come, with s8 weights that have a scale for each column."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    place = folder / "dynamic"  # apart, as its external data must not ship
    place.mkdir()
    quantize_dynamic(
        work.path,
        place / FILE,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=_narrow_weights(),
        weight_type=QuantType.QInt8,
        nodes_to_quantize=nodes,
        use_external_data_format=work.external,
    )
    model = onnx.load(str(place / FILE))
    shutil.rmtree(place)
    return model


def _weights(work: _Work, nodes: list[str]) -> onnx.ModelProto:
    """Weights alone, in blocks that share a scale."""
    import onnxruntime
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    except ImportError as error:
        raise Unsupported(
            f"onnxruntime {onnxruntime.__version__} cannot quantise weights alone", "pip install -U onnxruntime onnx-ir"
        ) from error
    model = load_model_with_shape_infer(work.path)
    bits, block = _BLOCKS[work.scheme]
    config = DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=False, accuracy_level=_INT8_ACCUMULATION, bits=bits
    )
    others = [node.name for node in model.graph.node if node.name not in set(nodes)]
    quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
    quantizer.process()
    return quantizer.model.model


def _ship(done: Path, folder: Path, target: Target) -> None:
    """Copy the settled graph into an artifact, with the bucket's sizes where it has one."""
    import onnx

    for path in done.iterdir():
        shutil.copyfile(path, folder / path.name)
    if target.bucket:
        model = onnx.load(str(folder / FILE), load_external_data=False)
        fix_sizes(model, target.spec, target.bucket)
        onnx.save_model(model, str(folder / FILE))


def _module_of(node: str) -> str:
    return node.partition("/")[0]


def _own_name(node: str) -> str:
    return node


def _is_exported(module: FlatModule) -> bool:
    """False for a model that came as an ONNX file: its layers are its nodes."""
    return not hasattr(module.inner, "session")


def _fold(source: Path, path: Path, off: Sequence[str]) -> None:
    """ONNX Runtime's basic rewrites, all in standard operators: constants, batch norms, identities."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    if _bytes_of(source) > EXTERNAL_DATA_BYTES:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
    onnxruntime.InferenceSession(
        str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(off)
    )


def _save(model: onnx.ModelProto, path: Path, external: bool) -> None:
    import onnx

    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx appends to what is there
    onnx.save_model(model, str(path), save_as_external_data=external, location=data.name if external else None)


def _bytes_of(path: Path) -> int:
    """The size of a graph with its weights, wherever they are kept."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    places = {entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"}
    return sum(file.stat().st_size for file in (path, *(path.parent / place for place in places)))


def _narrow_weights() -> bool:
    """Whether 8-bit products are summed in 16 bits here, as x86 does before VNNI: weights then get 7 bits."""
    flags = set(host.cpu_flags())
    return "avx2" in flags and flags.isdisjoint(_WIDE_PRODUCTS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the quantisers print and log off the terminal; they log through the root logger."""
    root = logging.getLogger()
    level, silent = root.level, logging.NullHandler()
    root.addHandler(silent)  # without any, the first message would set one up for good
    root.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            yield
        finally:
            root.setLevel(level)
            root.removeHandler(silent)
