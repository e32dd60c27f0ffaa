"""The judge of trials asks a little more than the gate, which sees single rows."""

import pytest

from onecard.evidence import OutputError
from onecard.search.bench import _within
from onecard.verify.compare import Threshold

LIMIT = Threshold(0.1, 0.99)


def error(relative: float, cosine: float = 1.0) -> OutputError:
    return OutputError("logits", relative, cosine, 0.0, None, "judged rows")


@pytest.mark.parametrize(
    ("errors", "passes"),
    [
        ([error(0.08)], True),
        ([error(0.095)], False),  # within the gate's limit on average: some row will not be
        ([error(0.08), error(0.2)], False),
        ([error(0.08, 0.98)], False),
        ([error(float("nan"))], False),
    ],
)
def test_every_output_keeps_a_distance_from_the_limit(errors, passes):
    assert _within(errors, LIMIT) is passes
