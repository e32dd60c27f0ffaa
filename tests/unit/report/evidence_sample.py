"""A search's outcome as it could be: two buckets, every verdict, and names that mean harm."""

from __future__ import annotations

import random

import msgspec

from onecard.environment import Card, Environment
from onecard.evidence import (
    Candidate,
    CardState,
    Compression,
    Evidence,
    LayerError,
    Measurement,
    Metric,
    OutputError,
    Rank,
    Reason,
    Timing,
    Trial,
    Verdict,
)
from onecard.recipe import ORIGINAL, Recipe
from onecard.spec import parse_spec

B1, B8 = {"B": 1}, {"B": 8}
EVIL = "<script>alert('x')</script>"
MIB = 2**20
INDUCTOR_BF16 = Recipe("inductor", transforms=("bf16",))

# recipe, (ms at B1, ms at B8), peak MiB, size MiB, relative error, build seconds
TIMED: list[tuple[Recipe, tuple[float, float], int, float, float, float]] = [
    (ORIGINAL, (25.4, 171.0), 612, 97.8, 0.0, 0.2),
    (Recipe("eager", transforms=("fold_bn",)), (21.9, 158.0), 604, 97.5, 2.1e-7, 0.6),
    (Recipe("eager", transforms=("fold_bn", "channels_last")), (16.3, 121.0), 618, 97.5, 3.4e-7, 0.7),
    (Recipe("torchscript", "trace", ("fold_bn",)), (14.8, 113.0), 590, 98.9, 2.2e-7, 4.1),
    (Recipe("inductor"), (9.71, 78.0), 655, 99.4, 4.8e-7, 41.3),
    (INDUCTOR_BF16, (4.10, 30.9), 422, 51.2, 3.1e-3, 44.0),
    (Recipe("inductor", transforms=("bf16", "channels_last")), (4.02, 27.6), 430, 51.2, 3.2e-3, 47.5),
    (Recipe("onnxruntime", "", ("fold_bn",)), (7.35, 57.1), 371, 97.6, 6.0e-7, 7.9),
    (Recipe("openvino", "", ("fold_bn",), static=True), (6.92, 52.0), 398, 98.1, 5.5e-7, 12.2),
]


def timing(bucket: dict[str, int], median: float, seed: int, count: int = 120, **kwargs: object) -> Timing:
    """Log-normal samples with a few stragglers, the way a real machine gives them."""
    rng = random.Random(seed)
    samples = [median * rng.lognormvariate(0, 0.025) * (1.5 if rng.random() < 0.02 else 1) for _ in range(count)]
    samples[count // 2 :: 7] = [median] * len(samples[count // 2 :: 7])
    state = {"temperature_c": 61.0, "power_w": 402.5, "sm_clock_mhz": 1980.0, "memory_clock_mhz": 3201.0}
    rows = bucket.get("B", 1)
    values = {
        "period_ms": tuple(s * 0.97 for s in samples[:20]),
        "rows": rows,
        "first_call_ms": median * 30,
        "before": CardState(**state, utilisation=0.0),
        "after": CardState(**{**state, "temperature_c": 66.0}, utilisation=0.98),
    }
    return Timing(bucket, tuple(samples), **{**values, **kwargs})  # type: ignore[arg-type]


def output_errors(error: float) -> tuple[OutputError, ...]:
    return (
        OutputError("logits", error, 1 - error / 2, error * 9, 1.0 if error < 0.01 else 0.71, "B=8, longest"),
        OutputError("features", error * 0.4, 1 - error / 5, error * 3, None, "B=1"),
    )


def timed(seed: int) -> Candidate:
    recipe, (one, eight), peak, size, error, build = TIMED[seed]
    measurement = Measurement(
        (timing(B1, one, seed), timing(B8, eight, seed + 100)),
        build_s=build,
        load_s=build / 9,
        peak_device_bytes=peak * MIB,
        peak_process_bytes=3 * peak * MIB,
        size_bytes=int(size * MIB),
    )
    metric = Metric("top-1", 0.751 - (0.004 if error > 1e-3 else 0), 0.751, 2000)
    return Candidate(
        recipe,
        Verdict("ok"),
        measurement,
        output_errors(error),
        metric,
        seconds=build + 9,
        command=f"onecard try resnet50 --recipe {recipe.id}",
        log="built\nloaded\n",
    )


def failed(recipe: Recipe, reason: Reason, detail: str, cure: str = "", log: str = "") -> Candidate:
    return Candidate(
        recipe,
        Verdict(reason, detail, cure),
        seconds=600.0 if reason == "timeout" else 3.0,
        command=f"try {recipe.id}",
        log=log,
    )


def failures() -> list[Candidate]:
    wrong = Candidate(
        Recipe("onnxruntime", transforms=("fold_bn", "int8")),
        Verdict("wrong", "output 'logits' differs by 18 % (allowed: 2 %).", "Calibrate with more data."),
        Measurement((timing(B1, 2.2, 50), timing(B8, 16.0, 51)), 21.0, 0.4, 180 * MIB, 700 * MIB, 25 * MIB),
        output_errors(0.18),
        Metric("top-1", 0.42, 0.751, 2000),
        ("calibrated with 20 samples only",),
    )
    slower = Candidate(
        Recipe("aoti"),
        Verdict("slower", "slower than the original at every bucket."),
        Measurement((timing(B1, 31.0, 52), timing(B8, 190.0, 53)), 66.0, 0.2, 640 * MIB, 900 * MIB, 99 * MIB),
        output_errors(4e-7),
    )
    return [
        wrong,
        slower,
        failed(
            Recipe("aoti", transforms=("bf16",)),
            "crashed",
            "the process ended with signal 11 (segmentation fault).",
            "Report it with the log; the other candidates are not touched.",
            f"loading\n\x1b[31mFatal\x1b[0m {EVIL}\nSegmentation fault\n",
        ),
        failed(
            Recipe("inductor", "max-autotune"),
            "timeout",
            "still building after 600 s.",
            "Give it longer with --candidate-time-limit 1800.",
        ),
        failed(Recipe("cudagraph", static=True), "out_of_memory", "19 GiB asked, 16 GiB there.", "Use a smaller B."),
        failed(Recipe("tensorrt"), "unavailable", "torch_tensorrt is missing.", "pip install 'onecard[tensorrt]'"),
        failed(
            Recipe("tensorrt", transforms=("fp16",)),
            "unavailable",
            "torch_tensorrt is missing.",
            "pip install 'onecard[tensorrt]'",
        ),
        failed(Recipe("torchscript", "script"), "unsupported", "the model uses **kwargs."),
        failed(Recipe("eager", transforms=(EVIL,)), "skipped", f"{EVIL} & <img src=http://evil.example/x>"),
    ]


def environment() -> Environment:
    return Environment(
        device="cuda:0",
        card=Card("NVIDIA H200", "9.0", 150_754_820_096, "580.65.06"),
        cpu="AMD EPYC 9654 <b>",
        cpu_flags=("avx2", "avx512f", "avx512_vnni"),
        cores=16,
        threads=16,
        memory_bytes=128 * 2**30,
        versions={"python": "3.11.7", "torch": "2.11.0+cu130", "triton": "3.7.0", "onnxruntime": "1.23.0"},
    )


def sample() -> Evidence:
    """18 candidates on a GPU, ``inductor+bf16`` chosen, with a play-off between five of them."""
    candidates = [timed(seed) for seed in range(len(TIMED))]
    entrants = [0, 4, 5, 6, 7, 8]
    playoff = {
        candidates[i].id: (timing(B1, TIMED[i][1][0], i + 200), timing(B8, TIMED[i][1][1], i + 300)) for i in entrants
    }
    best8 = candidates[6].id
    return Evidence(
        model=f"torchvision:resnet50 {EVIL}",
        spec=parse_spec(["image: float32[B,3,224,224], B=1..8"]),
        buckets=(B1, B8),
        objective="latency",
        device="cuda:0",
        environment=environment(),
        candidates=(*candidates, *failures()),
        chosen=INDUCTOR_BF16.id,
        ranks=(
            Rank(B1, (INDUCTOR_BF16.id, best8, ORIGINAL.id), 25.4 / 4.1, 0.031),
            Rank(B8, (best8, INDUCTOR_BF16.id, ORIGINAL.id), 171.0 / 27.6, 0.018),
        ),
        pareto=(INDUCTOR_BF16.id, best8, candidates[7].id, ORIGINAL.id),
        playoff=playoff,
        reference_error=2.5e-7,
        notes=("TF32 was off.", f"note {EVIL}"),
        command="onecard optimize torchvision:resnet50 --input 'image: float32[B,3,224,224], B=1..8'",
        started="2026-03-04T05:06:07+00:00",
        seconds=761.0,
        params=25_557_032,
    )


SIGNS = str.maketrans({"\u00d7": "x", "\u2212": "-", "\u2013": "-"})
"""The signs that a page sets, as a keyboard has them."""
KEPT = ("layer4.2.conv3", "fc")
LAYERS = (*KEPT, "conv1", *(f"layer{n}.0.conv2" for n in range(1, 13)))
INT8 = Compression(
    "int8",
    53,
    "percentile",
    KEPT,
    (
        Trial("minmax", (), 0.094, 0.702),
        Trial("percentile", (), 0.051, 0.729),
        Trial("mse", (), 1e300),
        Trial("percentile", KEPT[:1], 0.034, 0.741),
        Trial("percentile", KEPT, 0.013, 0.749, True),
    ),
    tuple(LayerError(name, 0.031 / (i + 1) ** 1.2) for i, name in enumerate(LAYERS)),
    512,
    ("a trial failed: RuntimeError: mse wants a histogram",),
)
FP8 = Compression("fp8", 49, trials=(Trial("", (), 0.009, 0.7505, True),))
LOST = Compression(
    "int8", 53, "minmax", KEPT, (Trial("minmax", (), 0.3, 0.4), Trial("minmax", KEPT, 0.2, 0.6)), rows=64
)
CHOSEN = Recipe("inductor", "", ("fold_bn", "channels_last", "int8"), static=True)


def measured(
    recipe: Recipe, ms: tuple[float, float], memory: tuple[int, int], error: float, metric: float
) -> Candidate:
    """A candidate that passed; memory is peak and size in MiB."""
    at = zip((B1, B8), ms, strict=True)
    timings = tuple(timing(bucket, one, 400 + i) for i, (bucket, one) in enumerate(at))
    found = Measurement(timings, 30.0, 0.5, memory[0] * MIB, 3 * memory[0] * MIB, memory[1] * MIB)
    return Candidate(recipe, Verdict("ok"), found, output_errors(error), Metric("top-1", metric, 0.751, 2000))


def compressed_sample() -> Evidence:
    """The same search with data: INT8 is chosen after four steps, one of them a loss, and one INT8 fell."""
    steps = [
        measured(Recipe("inductor", static=True), (9.9, 79.0), (640, 99), 4.8e-7, 0.751),
        measured(Recipe("inductor", "", ("fold_bn",), static=True), (8.8, 70.0), (630, 99), 4.9e-7, 0.751),
        measured(
            Recipe("inductor", "", ("fold_bn", "channels_last"), static=True), (9.4, 61.0), (650, 99), 5e-7, 0.751
        ),
        msgspec.structs.replace(measured(CHOSEN, (3.1, 20.2), (240, 27), 0.013, 0.749), compression=(INT8,)),
        msgspec.structs.replace(
            measured(Recipe("inductor", "", ("bf16", "fp8")), (3.6, 24.0), (260, 30), 0.009, 0.7505), compression=(FP8,)
        ),
    ]
    base = sample()
    candidates = [
        msgspec.structs.replace(c, compression=(LOST,)) if c.recipe.compressions else c
        for c in (*base.candidates, *steps)
    ]
    candidates[-2:] = steps[-2:]
    return msgspec.structs.replace(
        base,
        candidates=tuple(candidates),
        chosen=CHOSEN.id,
        ranks=tuple(Rank(b, (CHOSEN.id, ORIGINAL.id), g, 0.02) for b, g in ((B1, 25.4 / 3.1), (B8, 171.0 / 20.2))),
        pareto=(CHOSEN.id, ORIGINAL.id),
        playoff={},
    )
