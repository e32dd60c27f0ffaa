"""The task metrics: against hand-counted values and scikit-learn, and with NaN, wrong shapes and odd labels."""

import math

import pytest
import torch

from onecard.errors import DataError, UsageError
from onecard.verify.metrics import METRICS, get_metric
from onecard.verify.spans import best_spans

NAN = float("nan")


def scores_of(classes, count):
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def test_unknown_lists_the_valid():
    with pytest.raises(UsageError, match=r"accuracy, top5, f1, .*miou"):
        get_metric("acuracy")
    for text in ("recall@0", "recall@x", "psnr@-1", "psnr@nan", "top5@3"):
        with pytest.raises(UsageError):
            get_metric(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accuracy(dtype):
    outputs = {"logits": scores_of([0, 1, 2, 2], 3).to(dtype)}
    assert get_metric("accuracy")(outputs, torch.tensor([0, 1, 2, 0])) == 0.75
    assert get_metric("accuracy")(outputs, {"y": torch.tensor([0, 1, 2, 0], dtype=torch.int32)}) == 0.75


def test_accuracy_of_tokens_ignores_negative_labels():
    outputs = {"logits": scores_of([[0, 1, 2], [2, 2, 2]], 3)}
    assert get_metric("accuracy")(outputs, torch.tensor([[0, 1, -100], [0, -100, 2]])) == 0.75


def test_accuracy_of_classes():
    assert get_metric("accuracy")({"class": torch.tensor([3, 1])}, torch.tensor([3, 2])) == 0.5


def test_the_first_output_that_fits_is_taken():
    outputs = {"hidden": torch.randn(2, 5, 8), "logits": scores_of([1, 0], 3), "other": scores_of([0, 0], 3)}
    assert get_metric("accuracy")(outputs, torch.tensor([1, 0])) == 1.0


def test_nan_is_wrong_everywhere():
    rows = torch.full((4, 8), NAN)
    labels = torch.tensor([0, 0, 0, 0])
    for name in ("accuracy", "top5", "f1", "recall@1"):
        assert get_metric(name)({"o": rows}, labels) == 0.0
    assert get_metric("cosine")({"o": rows}, torch.ones(4, 8)) == -1.0
    assert get_metric("psnr")({"o": rows}, torch.ones(4, 8)) == -200.0
    assert get_metric("miou")({"o": torch.full((1, 2, 3, 3), NAN)}, torch.zeros(1, 3, 3, dtype=torch.int64)) == 0.0
    spans = {"start": rows, "end": rows}
    for name in ("exact_match", "span_f1"):
        assert get_metric(name)(spans, torch.zeros(4, 2, dtype=torch.int64)) == 0.0


def test_infinite_masked_scores_are_not_wrong():
    scores = torch.tensor([[-math.inf, 1.0, 0.0]])
    assert get_metric("accuracy")({"o": scores}, torch.tensor([1])) == 1.0


def test_top5():
    scores = torch.arange(10.0).repeat(3, 1)
    assert get_metric("top5")({"o": scores}, torch.tensor([9, 5, 4])) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="C >= 5"):
        get_metric("top5")({"o": scores[:, :4]}, torch.tensor([1, 2, 3]))


def test_f1_as_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 6, (200,), generator=generator)
    scores = torch.randn(200, 7, generator=generator)
    expected = sklearn.f1_score(labels.numpy(), scores.argmax(-1).numpy(), average="macro")
    assert get_metric("f1")({"o": scores}, labels) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", ["accuracy", "top5", "f1"])
def test_labels_that_do_not_fit(name):
    outputs = {"logits": torch.randn(4, 6)}
    with pytest.raises(DataError, match=r"no output fits .*logits: float32\[4, 6\]"):
        get_metric(name)(outputs, torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"classes 0\.\.5"):
        get_metric(name)(outputs, torch.tensor([0, 1, 2, 6]))
    with pytest.raises(DataError, match="class numbers"):
        get_metric(name)(outputs, torch.ones(4))
    with pytest.raises(DataError, match="every label is negative"):
        get_metric(name)(outputs, torch.full((4,), -1))
    with pytest.raises(DataError, match="one tensor of labels"):
        get_metric(name)(outputs, {"a": torch.ones(4), "b": torch.ones(4)})


class TestSpans:
    def test_best_span_never_ends_before_it_starts(self):
        generator = torch.Generator().manual_seed(2)
        start, end = torch.randn(50, 9, generator=generator), torch.randn(50, 9, generator=generator)
        for row, (first, last) in enumerate(best_spans(start, end).tolist()):
            best = max((float(start[row, i] + end[row, j]), i, j) for i in range(9) for j in range(i, 9))
            assert (first, last) == best[1:]

    @pytest.mark.parametrize(
        "labels",
        [
            torch.tensor([[1, 2], [0, 3]]),
            {"start": torch.tensor([1, 0]), "end": torch.tensor([2, 3])},
            {"end_positions": torch.tensor([2, 3]), "start_positions": torch.tensor([1, 0])},
            {"span": torch.tensor([[1, 2], [0, 3]])},
        ],
    )
    def test_scores(self, labels):
        outputs = {"end_logits": scores_of([2, 2], 5) * 9, "start_logits": scores_of([1, 2], 5) * 9}
        assert get_metric("exact_match")(outputs, labels) == 0.5
        assert get_metric("span_f1")(outputs, labels) == pytest.approx((1 + 2 * 1 / 5) / 2)
        stacked = {"logits": torch.stack([outputs["start_logits"], outputs["end_logits"]], -1)}
        assert get_metric("exact_match")(stacked, labels) == 0.5
        unnamed = {"output_0": outputs["start_logits"], "output_1": outputs["end_logits"]}
        assert get_metric("exact_match")(unnamed, labels) == 0.5

    def test_no_overlap(self):
        outputs = {"start": scores_of([0], 4), "end": scores_of([0], 4)}
        assert get_metric("span_f1")(outputs, torch.tensor([[2, 3]])) == 0.0

    def test_bad(self):
        outputs = {"start": scores_of([0], 4), "end": scores_of([0], 4)}
        for labels in (torch.tensor([[2, 4]]), torch.tensor([[3, 2]]), torch.tensor([[-1, 2]])):
            with pytest.raises(DataError, match="not within the 4 tokens"):
                get_metric("span_f1")(outputs, labels)
        for wrong in (torch.tensor([1]), {"a": torch.tensor([1]), "b": torch.tensor([1])}):
            with pytest.raises(DataError, match="label_start"):
                get_metric("span_f1")(outputs, wrong)
        with pytest.raises(DataError, match="no outputs look like"):
            get_metric("span_f1")({"o": torch.randn(1, 4)}, torch.tensor([[1, 2]]))


class TestRecall:
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 5.0], [-1.0, 0.0], [1.0, -0.05]])

    def test_nearest_of_the_group(self):
        labels = torch.tensor([0, 0, 1, 1, 2, 7])  # rows 4 and 5 are alone; row 0's nearest is row 5
        assert get_metric("recall@1")({"e": self.rows}, labels) == 0.75
        assert get_metric("recall@5")({"e": self.rows}, labels) == 1.0
        assert get_metric("recall@2")({"e": self.rows}, labels) == 1.0

    def test_as_brute_force_over_several_chunks(self):
        generator = torch.Generator().manual_seed(3)
        rows, labels = torch.randn(1100, 6, generator=generator), torch.randint(0, 20, (1100,), generator=generator)
        unit = torch.nn.functional.normalize(rows, dim=-1)
        cosines = unit @ unit.T
        cosines.fill_diagonal_(-9)
        expected = float((labels[cosines.argmax(-1)] == labels).double().mean())
        assert get_metric("recall@1")({"e": rows}, labels) == pytest.approx(expected, abs=2e-3)

    def test_no_groups(self):
        with pytest.raises(DataError, match="same label"):
            get_metric("recall@1")({"e": self.rows}, torch.arange(6))

    def test_a_broken_row_is_no_neighbour(self):
        rows = self.rows.clone()
        rows[5] = NAN
        assert get_metric("recall@1")({"e": rows}, torch.tensor([0, 0, 1, 1, 2, 7])) == 1.0


def test_cosine_and_psnr_of_targets():
    target = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    assert get_metric("cosine")({"o": target * 3}, target) == pytest.approx(1.0)
    assert get_metric("psnr")({"o": target}, target) == 200.0
    assert get_metric("psnr")({"o": target + 0.1}, {"t": target}) == pytest.approx(20.0, abs=1e-3)
    assert get_metric("psnr@255")({"o": target + 25.5}, target) == pytest.approx(20.0, abs=1e-3)
    both = {"a": target, "b": -target}
    assert get_metric("cosine")(both, {"a": target, "b": target}) == pytest.approx(0.0)
    with pytest.raises(DataError, match="no output fits"):
        get_metric("psnr")({"o": target[:, :1]}, target)
    with pytest.raises(DataError, match="the target of 'o'"):
        get_metric("psnr")({"o": target[:, :1]}, {"o": target})


def test_miou():
    labels = torch.tensor([[[0, 0], [1, 255]], [[1, 1], [-1, 0]]])
    predicted = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [0, 0]]])
    scores = scores_of(predicted.tolist(), 3).permute(0, 3, 1, 2)
    assert get_metric("miou")({"out": scores}, labels) == pytest.approx((2 / 3 + 3 / 4) / 2)
    with pytest.raises(DataError, match=r"classes 0\.\.2"):
        get_metric("miou")({"out": scores}, labels.clamp(max=4))
    with pytest.raises(DataError, match="to be ignored"):
        get_metric("miou")({"out": scores}, torch.full_like(labels, 255))
    with pytest.raises(DataError, match="no output fits"):
        get_metric("miou")({"out": scores}, labels[:, :1])


def test_users_function(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "import torch\ndef good(outputs, labels):\n    return (outputs['o'] == labels).float().mean()\n"
        "def text(outputs, labels):\n    return 'fine'\ndef broken(outputs, labels):\n    return outputs['absent']\n"
    )
    outputs, labels = {"o": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 3.0])
    assert get_metric(f"{path}:good")(outputs, labels) == 0.5
    with pytest.raises(DataError, match="returned a str"):
        get_metric(f"{path}:text")(outputs, labels)
    with pytest.raises(DataError, match="KeyError"):
        get_metric(f"{path}:broken")(outputs, labels)
    with pytest.raises(UsageError, match="Did you mean good"):
        get_metric(f"{path}:goood")


def test_metrics_change_none_of_their_arguments():
    outputs, labels = {"o": torch.randn(8, 6)}, torch.tensor([0, 0, 1, 1, 2, 2, -1, 3])
    before = (outputs["o"].clone(), labels.clone())
    for name in ("accuracy", "top5", "f1", "recall@1"):
        METRICS[name](outputs, labels)
    assert torch.equal(outputs["o"], before[0])
    assert torch.equal(labels, before[1])
