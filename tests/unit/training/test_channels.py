"""Groups of channels: found, checked, ranked and removed."""

import copy
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from onecard.errors import MissingDependencyError, ModelError
from onecard.models.live import load_live
from onecard.models.request import Request
from onecard.spec import parse_spec
from onecard.training.channels import Choice, Limits, channels_of, find_groups, remove, trainable_copy
from onecard.training.data import in_memory
from onecard.training.importance import Block, accumulate_gradients, join, rank_blocks
from onecard.training.loop import TrainOptions
from onecard.verify.data import Dataset
from tests.unit.training import prune_models as zoo
from tests.unit.training.prune_models import IDS, IMAGE, ROWS, model_of, probes_of


def choose(kind: type[nn.Module], spec: str, **limits: object) -> Choice:
    model = model_of(kind, spec)
    return find_groups(model.flat, probes_of(model), Limits(**limits))


def roots(choice: Choice) -> set[str]:
    return {group.root.removeprefix("inner.") for group in choice.groups}


@pytest.mark.parametrize(
    ("kind", "spec", "expected"),
    [
        (zoo.Residual, IMAGE, {"stem.0", "two.0", "one"}),
        (zoo.Depthwise, IMAGE, {"stem", "depthwise", "gate", "pointwise", "grouped"}),
        (zoo.Branches, IMAGE, {"stem", "left", "joined"}),
        (zoo.Encoder, IDS, {f"layers.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}),
    ],
)
def test_whatever_can_go_still_leaves_a_model_that_runs_at_every_size(kind, spec, expected):
    model = model_of(kind, spec)
    probes = probes_of(model)
    choice = find_groups(model.flat, probes, Limits())
    assert roots(choice) <= expected
    assert all("output" in reason for reason in choice.kept.values())
    pruned = trainable_copy(model.flat)
    remove(pruned, probes[0], join(rank_blocks(pruned, probes[0], choice.groups, "magnitude")))
    for inputs in probes:
        assert [t.shape for t in pruned(*inputs)] == [t.shape for t in model.flat(*inputs)]
    left, had = channels_of(pruned), channels_of(model.flat)
    assert sum(o for _, o in left.values()) < 0.6 * sum(o for _, o in had.values())
    assert all(o % 8 == 0 for name, (_, o) in left.items() if o != had[name][1])


@pytest.mark.parametrize(("kind", "spec"), [(zoo.Residual, IMAGE), (zoo.Depthwise, IMAGE), (zoo.Branches, IMAGE)])
def test_channels_that_nobody_reads_can_go_without_a_trace(kind, spec):
    """The removal takes the right ones of every layer: those whose readers have zero weights change nothing."""
    model = model_of(kind, spec)
    probes = probes_of(model)
    for group in find_groups(model.flat, probes, Limits()).groups:
        units = group.units[-group.block :]
        channels = tuple(sorted(c for unit in units for c in unit))
        silent = trainable_copy(model.flat)
        silence(silent, group.root, channels, probes)
        wanted = [silent(*inputs)[0] for inputs in probes]
        remove(silent, probes[0], {group.root: channels})
        for inputs, ref in zip(probes, wanted, strict=True):
            torch.testing.assert_close(silent(*inputs)[0], ref, rtol=1e-4, atol=1e-5)


def silence(module: nn.Module, root: str, channels: Sequence[int], probes: object) -> None:
    """Make channels exactly zero wherever they are computed: their weights and biases, found by their names."""
    inner = module.inner
    twins = {
        "stem.0": [inner.stem, getattr(inner, "two", None)] if isinstance(inner, zoo.Residual) else [],
        "two.0": [inner.stem, getattr(inner, "two", None)] if isinstance(inner, zoo.Residual) else [],
    }.get(root.removeprefix("inner."), [])
    name = root.removeprefix("inner.")
    if isinstance(inner, zoo.Depthwise) and name in ("stem", "depthwise", "gate"):
        twins = [inner.stem, inner.depthwise]
    if isinstance(inner, zoo.Depthwise) and name in ("pointwise", "grouped"):
        twins = [inner.grouped]
        with torch.no_grad():  # the sigmoid between makes one half of zero
            per = inner.grouped.in_channels // inner.grouped.groups
            for c in channels:
                rows = slice(c // per * 6, c // per * 6 + 6)
                inner.grouped.weight[rows, c % per] = 0
    layers = [m for twin in (twins or [module.get_submodule(root)]) for m in twin.modules()]
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                layer.weight[list(channels)] = 0
                layer.bias[list(channels)] = 0
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean[list(channels)] = 0


def test_output_layers_are_kept_even_where_they_are_used_further():
    choice = choose(zoo.TwoOutputs, ROWS)
    assert roots(choice) == {"first"}
    assert set(choice.kept) == {"inner.features", "inner.head"}


def test_a_wrong_dependency_graph_is_found_out_by_trying():
    choice = choose(zoo.Mixed, ROWS)
    assert roots(choice) == {"first"}
    assert "mixed" in choice.kept["inner.second"]
    choice = choose(zoo.Fixed, ROWS)
    assert roots(choice) == {"second"}
    assert "inner.first" in choice.kept


def test_layers_that_the_user_keeps_are_kept_with_all_that_depends_on_them():
    assert roots(choose(zoo.Residual, IMAGE, keep=("stem.*",))) == {"one"}


def test_attention_loses_whole_heads():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    spec = ("input_ids: int64[B,S] in 0..49, B=1..4, S=2..8", "attention_mask: int64[B,S]")
    model = load_live(transformers.BertModel(config, add_pooling_layer=False), Request(spec))
    probes = probes_of(model)
    choice = find_groups(model.flat, probes, Limits())
    attention = next(g for g in choice.groups if "attention" in g.root)
    assert len(attention.units) == 4
    pruned = trainable_copy(model.flat)
    remove(pruned, probes[0], {attention.root: attention.units[1] + attention.units[3]})
    layer = pruned.inner.encoder.layer[0].attention
    assert layer.self.num_attention_heads == 2
    assert [getattr(layer.self, n).out_features for n in ("query", "key", "value")] == [32] * 3
    assert layer.output.dense.in_features == 32
    ours = model.flat.inner.encoder.layer[0].attention.self.query.weight
    assert torch.equal(layer.self.query.weight, torch.cat([ours[:16], ours[32:48]]))
    assert pruned(*probes[1])[0].shape == model.flat(*probes[1])[0].shape


def test_models_of_which_nothing_can_go_say_why():
    with pytest.raises(ModelError, match="Bare has no convolution"):
        choose(zoo.Bare, ROWS)
    with pytest.raises(ModelError, match="only 24 channels") as caught:
        choose(zoo.Residual, IMAGE, round_to=64)
    assert "--round-to" in caught.value.cure


def test_without_torch_pruning_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingDependencyError, match=r"onecard\[pruning\]"):
        choose(zoo.Residual, IMAGE)


def test_the_least_important_channels_go_first():
    model = model_of(zoo.TwoOutputs, ROWS)
    probes = probes_of(model)
    weak = (3, 5, 8, 9, 12, 20, 30, 31)
    with torch.no_grad():
        model.flat.inner.first.weight[list(weak)] *= 1e-3
        model.flat.inner.features.weight[:, list(weak)] *= 1e-3
    choice = find_groups(model.flat, probes, Limits())
    first = rank_blocks(trainable_copy(model.flat), probes[0], choice.groups, "magnitude")[0]
    assert first.channels == weak


@pytest.mark.parametrize("labelled", [True, False])
def test_taylor_finds_the_channels_that_the_loss_does_not_depend_on(labelled):
    """Large weights that multiply inputs which are always zero: magnitude keeps them, the gradient does not."""
    model = model_of(zoo.Mixed, ROWS)
    probes = probes_of(model)
    useless = tuple(range(8, 16))
    with torch.no_grad():
        inner = model.flat.inner
        inner.first.weight[list(useless)] = 0
        inner.first.weight[list(useless), 0] = 5.0
        inner.first.bias[:] = 1.0
        inner.first.bias[list(useless)] = -1.0
    rows = torch.rand(32, 8)
    rows[:, 0] = 0  # the useless units see -1 and stay silent behind their ReLU
    labels = torch.randint(0, 4, (32,)) if labelled else None
    data = in_memory(Dataset({"rows": rows}, labels, 32), model.spec)
    module = trainable_copy(model.flat)
    accumulate_gradients(module, data, TrainOptions(batch=8), model.spec)
    groups = find_groups(model.flat, probes, Limits()).groups
    assert rank_blocks(module, probes[0], groups, "taylor")[0].channels == useless
    assert rank_blocks(module, probes[0], groups, "magnitude")[0].channels != useless


def test_blocks_join_by_their_leading_layer():
    assert join([Block("a", (3, 1), 0.1), Block("b", (0,), 0.2), Block("a", (2,), 0.3)]) == {"a": (1, 2, 3), "b": (0,)}


def test_the_original_is_left_as_it_is():
    model = model_of(zoo.Residual, IMAGE)
    before = copy.deepcopy(model.flat.state_dict())
    find_groups(model.flat, probes_of(model), Limits())
    assert all(torch.equal(before[n], t) for n, t in model.flat.state_dict().items())
    assert not any(p.requires_grad for p in model.flat.parameters())
    assert parse_spec([IMAGE]).symbols == model.spec.symbols
