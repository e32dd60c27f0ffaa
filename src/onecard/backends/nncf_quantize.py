"""INT8 and INT4 of an OpenVINO model by NNCF: what is quantised, how it is calibrated, which layers are kept.

NNCF (https://github.com/openvinotoolkit/nncf) puts the scales into the model; OpenVINO turns them into 8-bit kernels
when it compiles. It works in silence here: no telemetry, no progress bars, no logging of its own.
"""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onecard.backends.openvino_layers import LayerNode, has_attention, layer_nodes, name_layers
from onecard.backends.signal_stack import kept_signal_stack
from onecard.calibration.bench import NO_ROWS_CURE, Bench, Run
from onecard.calibration.sensitivity import quantisable_layers, rank_layers
from onecard.calibration.settle import settle
from onecard.errors import MissingDependencyError, Unsupported
from onecard.host import cpu_flags
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line

SCHEMES = frozenset({"int8", "int8_dynamic", "int8_weights", "int4_weights"})
"""The transforms that NNCF does for OpenVINO."""

MINMAX, PERCENTILE, BIAS = "minmax", "percentile", "bias"
ROUND, SCALE = "round", "scale"

_ROWS = 128  # each trial runs them two or three times, and there may be ten trials within the candidate's time
_PERCENTILE_ROWS = 64  # quantiles are averaged over the rows, and cost a sort of every activation
_BIAS_LAYERS = 300  # the full correction runs a part of the model again for every layer
_PATIENCE_S = 60.0  # a model whose first method took longer is not tried with the others, which take longer still
_EXACT_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
"""Instruction sets that sum 8-bit products in 32 bits; the older ones of x86 saturate at 16."""
_GROUPS = (128, 64, 32)

Feed = Callable[[dict[str, Tensor]], dict[str, Any]]
"""Rows by the spec's names to arrays by the names of the model's inputs."""


@dataclass(frozen=True)
class Subject:
    """What is quantised.

    Args:
        model: an ``openvino.Model`` in fp32; it stays as it is.
        module: what it was converted from, for the layers' names and their sensitivity.
        feed: see :data:`Feed`.
        run: compiles a quantised model just as it will be loaded.
    """

    model: Any
    module: FlatModule
    feed: Feed
    run: Callable[[Any], Run]


def quantize(scheme: str, subject: Subject, bench: Bench) -> Any:
    """Quantise a model with the calibration method and the kept layers that the judge passes.

    ``int8`` tries three methods. ``minmax``: each activation's range over all rows. ``percentile``: the mean over the
    rows of its 1e-4 and 1 - 1e-4 quantiles. ``bias``, for convolutions: as ``minmax``, and each layer's bias is
    corrected by the error measured behind it (Nagel et al. 2019, "Data-Free Quantization", section 4.2) with all
    layers before it quantised. Activations are asymmetric, weights symmetric with a scale for each output channel.
    A model with attention is quantised as a transformer: its sums and norms stay in fp32, and outliers of activations
    move into the weights (SmoothQuant, Xiao et al. 2022).

    ``int8_weights`` and ``int8_dynamic`` round the weights alone, with a scale and zero point for each output channel.
    ``int4_weights`` has a scale for each group of 128 (64, 32) input channels, and 8 bits for embeddings,
    convolutions, the last layer and those that it keeps; by ``round`` or, given rows, by ``scale`` (scales fitted to
    the answers on them).

    Args:
        scheme: one of :data:`SCHEMES`.
        subject: the model.
        bench: rows, judge and record.

    Returns:
        A new ``openvino.Model``.

    Raises:
        Unsupported: there is nothing to quantise, there are no rows where some are needed, or NNCF fails.
        MissingDependencyError: NNCF is not installed.
    """
    nodes = layer_nodes(subject.model)
    names = name_layers(nodes, subject.module)
    rows = _rows(scheme, subject.feed, bench)
    made: dict[tuple[str, tuple[str, ...]], Any] = {}
    took_s: list[float] = []

    def make(method: str, kept: tuple[str, ...]) -> Any:
        if (method, kept) not in made:
            if not kept and took_s and took_s[0] > _PATIENCE_S:
                raise Unsupported(f"{method} was not tried, since the first method alone took {took_s[0]:.0f} s")
            scope = sorted({node for layer in kept for node in names[layer]})
            dataset = _Rows(rows, f"{scheme} {method}", bench.progress)
            started = time.perf_counter()
            made[method, kept] = _quantize(scheme, method, subject.model, scope, dataset)
            took_s.append(time.perf_counter() - started)
        return made[method, kept]

    ranked = [layer for layer in quantisable_layers(subject.module) if layer in names]
    found = settle(
        scheme,
        tuple(names),
        _methods(scheme, nodes, bool(rows)),
        lambda method, kept: subject.run(make(method, kept)),
        bench,
        (lambda: rank_layers(subject.module, bench, ranked)) if ranked else None,
    )
    return make(found.method, found.kept)


@dataclass(frozen=True)
class _Rows(Sequence[Any]):
    """Calibration rows that tell how far NNCF has come with them."""

    rows: Sequence[Any]
    what: str
    progress: Callable[[str], None]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.progress(f"{self.what}: calibrating {index + 1}/{len(self.rows)}")
        return self.rows[index]


def _rows(scheme: str, feed: Feed, bench: Bench) -> list[dict[str, Any]]:
    if scheme not in ("int8", "int4_weights") or (scheme == "int4_weights" and not bench.rows):
        return []
    batches = bench.batches(bench.smallest_batch)
    rows = [feed(batch) for batch in itertools.islice(batches, _ROWS)]
    if not rows:
        raise Unsupported(f"the calibration rows do not fill one batch of {bench.smallest_batch}", NO_ROWS_CURE)
    return rows


def _methods(scheme: str, nodes: list[LayerNode], has_rows: bool) -> tuple[str, ...]:
    if scheme == "int8":
        convolutions = any(node.is_convolution for node in nodes)
        return (MINMAX, PERCENTILE, BIAS) if convolutions and len(nodes) <= _BIAS_LAYERS else (MINMAX, PERCENTILE)
    if scheme == "int4_weights":
        return (ROUND, SCALE) if has_rows else (ROUND,)
    return ("",)


def _quantize(scheme: str, method: str, model: Any, scope: list[str], rows: _Rows) -> Any:
    try:
        with _quiet_nncf() as nncf, kept_signal_stack():
            if scheme == "int8":
                quantized = _int8(nncf, method, model, scope, rows)
            elif scheme == "int4_weights":
                quantized = _int4_weights(nncf, method, model, scope, rows)
            else:
                quantized = _int8_weights(nncf, model.clone(), scope)
    except MissingDependencyError:
        raise
    except Exception as error:  # NNCF's errors and OpenVINO's have no base of their own
        raise Unsupported(f"NNCF cannot quantise this model: {first_line(error)}") from error
    types = {op.get_element_type().get_type_name() for op in quantized.get_ops() if op.get_type_name() == "Constant"}
    if types.isdisjoint({"i4", "u4"} if scheme == "int4_weights" else {"i8", "u8"}):
        raise Unsupported(f"NNCF left every weight of this model as it was under {scheme}")
    return quantized


def _int8(nncf: Any, method: str, model: Any, scope: list[str], rows: _Rows) -> Any:
    ranges = importlib.import_module("nncf.quantization.range_estimator").RangeEstimatorParametersSet
    nodes = layer_nodes(model)
    convolutions = sum(node.is_convolution for node in nodes)
    is_transformer = has_attention(model) and convolutions < len(nodes) - convolutions
    # Half the range of the first layer, NNCF's guard against saturation, costs accuracy for nothing where sums are
    # exact. On another machine the bundle's own golden data decides.
    exact = not _EXACT_INT8.isdisjoint(cpu_flags())
    return nncf.quantize(
        model,
        nncf.Dataset(rows),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        subset_size=min(len(rows), _PERCENTILE_ROWS) if method == PERCENTILE else len(rows),
        fast_bias_correction=method != BIAS,
        ignored_scope=nncf.IgnoredScope(names=scope),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.DISABLE if exact else None,
            activations_range_estimator_params=ranges.MEAN_QUANTILE if method == PERCENTILE else ranges.MINMAX,
        ),
    )


def _int8_weights(nncf: Any, model: Any, scope: list[str]) -> Any:
    """Works on the model itself."""
    mode = nncf.CompressWeightsMode.INT8_ASYM
    return nncf.compress_weights(model, mode=mode, ignored_scope=nncf.IgnoredScope(names=scope))


def _int4_weights(nncf: Any, method: str, model: Any, scope: list[str], rows: _Rows) -> Any:
    fans = [node.fan_in for node in layer_nodes(model) if not node.is_convolution and node.name not in scope]
    fitted = {"dataset": nncf.Dataset(rows), "scale_estimation": True, "subset_size": len(rows)}
    compressed = nncf.compress_weights(
        model.clone(),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=next((size for size in _GROUPS if all(fan % size == 0 for fan in fans)), -1),
        ignored_scope=nncf.IgnoredScope(names=scope),
        **(fitted if method == SCALE else {}),
    )
    return _int8_weights(nncf, compressed, []) if scope else compressed


@contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """NNCF, without what it prints and logs, and without the logger class that it gives to the whole process."""
    logger_class = logging.getLoggerClass()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            nncf = importlib.import_module("nncf")
        except ImportError as error:
            raise MissingDependencyError(
                "INT8 by OpenVINO needs NNCF.", "Install it: pip install 'onecard[openvino]'."
            ) from error
        finally:
            logging.setLoggerClass(logger_class)
        logger = logging.getLogger("nncf")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield nncf
        finally:
            logger.setLevel(level)
