"""The grammar of specs, binding shapes to sizes, and the buckets that follow."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.errors import SpecError
from onecard.spec import (
    DTYPES,
    Range,
    Spec,
    TensorSpec,
    bucket_label,
    default_buckets,
    parse_spec,
    parse_tensor,
    smallest_fit,
    spec_of_outputs,
)

IMAGE = "image: float32[B,3,224,224], B=1..64"
TEXT = ["input_ids: int64[B,S] in 0..30521, B=1..8, S=1..384", "attention_mask: int64[B,S]"]


def with_outputs(spec: Spec, *outputs: TensorSpec) -> Spec:
    return msgspec.structs.replace(spec, outputs=outputs)


def image_spec() -> Spec:
    return with_outputs(parse_spec([IMAGE]), TensorSpec("output", "float32", ("B", 1000)))


def text_spec() -> Spec:
    return with_outputs(parse_spec(TEXT), TensorSpec("last", "float32", ("B", "S", 32)))


def test_grammar():
    spec = parse_spec([IMAGE])
    assert spec.inputs == (TensorSpec("image", "float32", ("B", 3, 224, 224)),)
    assert spec.symbols == {"B": Range(1, 64)}
    assert str(spec) == IMAGE


def test_ranges_may_stand_behind_any_input():
    spec = parse_spec(["mask: int64[B,S]", "ids: int64[B,S] in 0..99, S=2..32, B=1..8"])
    assert spec.symbols == {"S": Range(2, 32), "B": Range(1, 8)}
    assert [t.values for t in spec.inputs] == [None, Range(0, 99)]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("x: float32[]", ()),
        ("x: float32[7]", (7,)),
        ("  x :float32 [ 2 , 3 ] ", (2, 3)),
        ("x.y-z: float32[2]", (2,)),
    ],
)
def test_spelling_is_free(text, shape):
    assert parse_tensor(text)[0].shape == shape


@pytest.mark.parametrize(
    ("alias", "dtype"), [("float", "float32"), ("half", "float16"), ("double", "float64"), ("long", "int64")]
)
def test_dtype_aliases(alias, dtype):
    assert parse_tensor(f"x: {alias}[1]")[0].dtype == dtype


def test_one_size_is_a_range():
    assert parse_tensor("x: float32[B], B=4")[1] == {"B": Range(4, 4)}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no input is given.*write it like"),
        (["image float32[1]"], "cannot read the input 'image float32.*write it like"),
        (["1x: float32[1]"], "cannot read the input"),
        (["x: floaty[1]"], "unknown dtype 'floaty'.*expected one of float64, float32"),
        (["x: float32[0]"], "'0' in .* neither a positive size nor a symbol.*write it like"),
        (["x: float32[-1]"], "'-1' in .* neither a positive size nor a symbol"),
        (["x: float32[²]"], "'²' in .* neither a positive size nor a symbol"),
        (["x: float32[B]"], "symbol B has no range.*', B=1..8'"),
        (["x: float32[2], B=1..4"], "range B=1..4 belongs to no dimension"),
        (["x: float32[B], B=4..1"], "must satisfy 1 <= low <= high"),
        (["x: float32[B], B=0..1"], "must satisfy 1 <= low <= high"),
        (["x: float32[B], B=1.5"], "cannot read the range 'B=1.5'.*write it like"),
        (["x: float32[B] please, B=1..2"], "cannot read the range 'please'"),
        (["x: int64[2] in 9..3"], "values 'in 9..3'.*low <= high"),
        (["x: float32[B], B=1..2, B=1..3"], "B has two ranges"),
        (["x: float32[B], B=1..2", "y: float32[B], B=1..3"], "B has two ranges, 1..2 and 1..3"),
        (["x: float32[2]", "x: float32[3]"], "'x' is given twice"),
    ],
)
def test_errors_name_the_part_and_the_cure(texts, message):
    with pytest.raises(SpecError, match=message):
        parse_spec(texts)


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
SYMBOLS = st.sampled_from(["B", "S", "T_1", "height"])


def ranges(low: int) -> st.SearchStrategy[Range]:
    pair = st.tuples(st.integers(low, 10**6), st.integers(0, 10**6))
    return pair.map(lambda p: Range(p[0], p[0] + p[1]))


TENSORS = st.builds(
    TensorSpec,
    NAMES,
    st.sampled_from(DTYPES),
    st.lists(st.one_of(st.integers(1, 10**6), SYMBOLS), max_size=5).map(tuple),
    st.one_of(st.none(), ranges(0)),
)


@given(st.lists(TENSORS, min_size=1, max_size=4, unique_by=lambda t: t.name), st.data())
def test_what_is_printed_can_be_read_again(tensors, data):
    used = dict.fromkeys(d for t in tensors for d in t.shape if isinstance(d, str))
    spec = Spec(tuple(tensors), (), {name: data.draw(ranges(1)) for name in used})
    texts = [str(t) for t in tensors]
    texts[-1] = ", ".join([texts[-1], *(f"{name}={rng}" for name, rng in spec.symbols.items())])
    assert parse_spec(texts) == spec
    assert ", ".join(texts) == str(spec)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        parse_spec([text])
    except SpecError as error:
        assert error.message


def test_spec_survives_json():
    spec = text_spec()
    assert msgspec.json.decode(msgspec.json.encode(spec), type=Spec) == spec


def test_bind_finds_the_sizes():
    assert text_spec().bind({"input_ids": (2, 9), "attention_mask": (2, 9)}) == {"B": 2, "S": 9}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"input_ids": (2, 9)}, r"takes inputs \['attention_mask', 'input_ids'\].*Pass exactly: input_ids: int64"),
        ({"input_ids": (2, 9), "attention_mask": (2, 9), "x": ()}, "takes inputs"),
        ({"input_ids": (9,), "attention_mask": (2, 9)}, r"'input_ids' has 1 dimensions \[9\], expected input_ids"),
        ({"input_ids": (2, 9), "attention_mask": (2, 8)}, "'attention_mask' has size 8 in dimension 1, expected 9"),
        ({"input_ids": (9, 9), "attention_mask": (9, 9)}, "B=9 is outside the range B=1..8.*wider range in --input"),
        ({"input_ids": (0, 9), "attention_mask": (0, 9)}, "B=0 is outside the range"),
    ],
)
def test_bind_refuses(shapes, message):
    with pytest.raises(SpecError, match=message):
        text_spec().bind(shapes)


def test_bind_checks_fixed_sizes():
    with pytest.raises(SpecError, match="size 4 in dimension 1, expected 3"):
        image_spec().bind({"image": (1, 4, 224, 224)})


def test_batch_symbol_must_lead_every_input_and_output():
    assert parse_spec([IMAGE]).batch_symbol == "B"
    assert image_spec().batch_symbol == "B"
    assert with_outputs(parse_spec([IMAGE]), TensorSpec("mean", "float32", ())).batch_symbol is None
    assert with_outputs(parse_spec([IMAGE]), TensorSpec("y", "float32", (4, "B"))).batch_symbol is None
    assert parse_spec(["x: float32[1,2]"]).batch_symbol is None


def test_default_buckets():
    assert [b["B"] for b in default_buckets(image_spec())] == [1, 8, 64]
    assert default_buckets(text_spec()) == [{"B": b, "S": s} for b in (1, 8) for s in (96, 384)]
    assert default_buckets(parse_spec(["x: float32[B], B=16..32"])) == [{"B": 16}, {"B": 32}]
    assert default_buckets(parse_spec(["x: float32[3]"])) == [{}]
    assert [b["B"] for b in default_buckets(image_spec(), [4, 2, 4])] == [2, 4]


@given(ranges(1), ranges(1))
def test_default_buckets_stay_in_range_and_reach_the_largest(batch, length):
    spec = Spec((TensorSpec("x", "float32", ("B", "S")),), (), {"B": batch, "S": length})
    buckets = default_buckets(spec)
    assert all(b["B"] in batch and b["S"] in length for b in buckets)
    assert spec.largest() in buckets
    assert len({bucket_label(b) for b in buckets}) == len(buckets)


def test_batches_out_of_range_or_without_a_symbol():
    with pytest.raises(SpecError, match=r"batch 65 is outside B=1\.\.64.*Widen the range"):
        default_buckets(image_spec(), [65])
    with pytest.raises(SpecError, match="--batch needs a symbol as the first dimension"):
        default_buckets(parse_spec(["x: float32[3]"]), [1])


def test_smallest_fit():
    buckets = [{"B": 8, "S": 384}, {"B": 8, "S": 96}, {"B": 1, "S": 384}]
    assert smallest_fit(buckets, {"B": 1, "S": 10}) == {"B": 1, "S": 384}
    assert smallest_fit(buckets, {"B": 2, "S": 96}) == {"B": 8, "S": 96}
    assert smallest_fit(buckets, {"B": 2, "S": 97}) == {"B": 8, "S": 384}
    assert smallest_fit(buckets, {"B": 9, "S": 1}) is None
    assert smallest_fit([], {"B": 1}) is None


def outputs(*shape: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"y": ("float32", shape)}


def test_outputs_follow_the_symbols_of_two_runs():
    second = (outputs(3, 7, 10), {"B": 3, "S": 7})
    spec = spec_of_outputs(parse_spec(TEXT), outputs(2, 5, 10), {"B": 2, "S": 5}, second)
    assert spec.outputs == (TensorSpec("y", "float32", ("B", "S", 10)),)


def test_an_output_size_that_no_symbol_names_is_its_own():
    second = (outputs(3, 14), {"B": 3, "S": 7})
    spec = spec_of_outputs(parse_spec(TEXT), outputs(2, 10), {"B": 2, "S": 5}, second)
    assert spec.outputs[0].shape == ("B", "y_1")


def test_outputs_of_a_fixed_model():
    spec = spec_of_outputs(parse_spec(["x: float32[2]"]), outputs(2, 5), {}, None)
    assert spec.outputs[0].shape == (2, 5)


def test_an_output_that_changes_its_rank_is_refused():
    with pytest.raises(SpecError, match="changes its number of dimensions"):
        spec_of_outputs(parse_spec([IMAGE]), outputs(2, 5), {"B": 2}, (outputs(3), {"B": 3}))


def test_labels():
    assert bucket_label({"B": 8, "S": 128}) == "B8-S128"
    assert bucket_label({}) == "fixed"
