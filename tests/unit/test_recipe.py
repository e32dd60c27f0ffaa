"""A recipe's id is its whole name: it can be read back."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.backends import BACKENDS
from onecard.errors import UsageError
from onecard.recipe import ORIGINAL, PRECISIONS, Recipe
from onecard.search.recipes import MODES, Traits, default_recipes, parse_recipe
from onecard.transforms import TRANSFORMS

RECIPES = st.sampled_from([(backend, mode) for backend in BACKENDS for mode in MODES[backend]]).flatmap(
    lambda head: st.builds(
        Recipe,
        st.just(head[0]),
        st.just(head[1]),
        st.lists(st.sampled_from(list(TRANSFORMS)), max_size=4).map(tuple),
        st.booleans(),
    )
)


def test_ids():
    assert ORIGINAL.id == "eager"
    assert Recipe("inductor", "", ("channels_last", "fp16")).id == "inductor+channels_last+fp16"
    assert Recipe("cudagraph", "eager", ("tf32",), static=True).id == "cudagraph.eager+tf32@bucket"


@given(RECIPES)
def test_an_id_is_read_back_as_its_recipe(recipe):
    assert parse_recipe(recipe.id) == recipe


def test_every_offered_id_is_read_back():
    for flags in itertools.product([False, True], repeat=len(Traits.__dataclass_fields__) - 1):
        for recipe in default_recipes(Traits(*flags, alternatives=("pruned", "qat"))):
            assert parse_recipe(recipe.id) == recipe


def test_a_recipe_is_held_to_the_threshold_of_its_coarsest_step():
    assert parse_recipe("eager+fp16").tolerance == "fp16"
    assert parse_recipe("cudagraph.inductor+fp16+fp8@bucket").tolerance == "fp8"
    assert parse_recipe("onnxruntime.cpu+pruned+int8").tolerance == "pruned"
    assert parse_recipe("onnxruntime.cpu+pruned+int8").compressions == ("pruned", "int8")
    assert parse_recipe("cudagraph.inductor+fp16+fp8@bucket").precision == "fp16"


REFUSED = ["", "eagre", "eager+bn_fold", "eager@buckets", "eager+", "+fp16", ".trace", "eager.fast", "openvino.cpu"]


@pytest.mark.parametrize("text", REFUSED)
def test_other_text_is_refused_with_what_there_is(text):
    with pytest.raises(UsageError, match=r"no recipe matches.*BACKEND\[\.MODE\].*with backends aoti.*fold_bn"):
        parse_recipe(text, ["eager"])


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        (ORIGINAL, "fp32"),
        (Recipe("eager", "", ("channels_last", "fp16")), "fp16"),
        (Recipe("openvino", "bf16"), "bf16"),
        (Recipe("onnxruntime", "cuda", ("fp16",)), "fp16"),
        (Recipe("eager", "", ("autocast_bf16",)), "autocast_bf16"),
    ],
)
def test_precision_is_that_of_the_transform_or_the_mode(recipe, precision):
    assert recipe.precision == precision


def test_every_precision_is_a_transform():
    assert set(PRECISIONS) <= set(TRANSFORMS)


def test_recipe_survives_json():
    recipe = Recipe("cudagraph", "inductor", ("fold_bn", "fp16"), static=True)
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe
