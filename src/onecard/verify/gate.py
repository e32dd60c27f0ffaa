"""The gate itself: run a variant on every case and say whether its answers may be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from onecard.evidence import OutputError, Verdict
from onecard.inputs import make_inputs
from onecard.spec import Bucket, Spec
from onecard.verify.cases import Case
from onecard.verify.compare import ROW_FACTOR, Threshold, compare, worst_row
from onecard.verify.judge import Rule, problem
from onecard.verify.reference import Reference, Run, one_row, probed_rows, read_answers, to_device

_WRONG_CURE = "Nothing to do: the variant is left out. --threshold loosens the gate if such an error is acceptable."


@dataclass
class Gate:
    """All that judging one variant needs.

    Args:
        spec: of the model.
        reference: the original's answers and what is known of them.
        folder: where those answers lie.
        threshold: how far an output may be from the original's.
        device: where the variant runs.
        data: rows of the user's data, if any.
        only_sane: True where a task metric decides, so that outputs need only be finite and consistent.
    """

    spec: Spec
    reference: Reference
    folder: Path
    threshold: Threshold
    device: str
    data: Mapping[str, Tensor] | None = None
    only_sane: bool = False
    errors: dict[str, OutputError] = field(default_factory=dict)

    def judge(self, run: Run, progress: Callable[[str], None] = lambda text: None) -> Verdict:
        """Run every case; stop at the first that is wrong.

        Args:
            run: the variant, for inputs of any size in the spec's range, on ``device``.
            progress: called with the name of each case before it runs.

        Returns:
            ``ok`` or ``wrong`` with the case, the output and the figure. ``errors`` then holds the worst
            error of each output over the cases that ran.
        """
        for case in self.reference.cases:
            progress(case.name)
            verdict = self._judge_case(run, case)
            if not verdict.ok:
                return verdict
        asked: list[Bucket] = []
        for case in self.reference.cases:
            if case.bucket in asked:
                continue
            asked.append(case.bucket)  # each size may have buffers of its own
            progress(f"repeated calls of {case.name}")
            verdict = self._judge_repeats(run, case)
            if not verdict.ok:
                return verdict
        return Verdict("ok")

    def _inputs(self, case: Case, seed_offset: int = 0) -> dict[str, Tensor]:
        made = make_inputs(self.spec, case.bucket, seed=case.seed + seed_offset, ragged=case.ragged, data=self.data)
        return to_device(made, self.device)

    def _judge_case(self, run: Run, case: Case) -> Verdict:
        inputs = self._inputs(case)
        outputs = run(inputs)
        answers, rows = read_answers(self.folder, case)
        missing = set(answers) - set(outputs)
        if missing:
            return _wrong(f"case {case.name}: no output named {sorted(missing)}")
        for name, ref in answers.items():
            out = outputs[name] if rows is None else outputs[name][rows.to(self.device)]
            verdict = self._judge_output(name, out, ref, case)
            if not verdict.ok:
                return verdict
        return self._judge_rows(run, case, inputs, outputs)

    def _judge_output(self, name: str, out: Tensor, ref: Tensor, case: Case) -> Verdict:
        error = compare(name, out, ref, case.name)
        known = self.errors.get(name)
        if known is None or error.relative_l2 > known.relative_l2:
            self.errors[name] = error
        rule = Rule(self.threshold, self.spec.batch_symbol is not None, self.only_sane)
        wrong = problem(out, ref, error, rule, f"output '{name}' in case {case.name}")
        return _wrong(wrong) if wrong else Verdict("ok")

    def _judge_rows(self, run: Run, case: Case, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Verdict:
        """Each row of a batch must equal that row alone: tried on the first, a middle and the last row."""
        batch = self.spec.batch_symbol
        if batch is None or not self.reference.row_invariant or self.spec.symbols[batch].low > 1:
            return Verdict("ok")
        size = case.bucket[batch]
        for row in probed_rows(size):
            alone = run(one_row(inputs, row))
            for name, out in outputs.items():
                error = worst_row(alone[name], out[row : row + 1])[1]
                if error > ROW_FACTOR * self.threshold.relative_l2:
                    return _wrong(
                        f"output '{name}' in case {case.name}: row {row} alone differs from row {row} in the batch "
                        f"by {error:.2e}"
                    )
        return Verdict("ok")

    def _judge_repeats(self, run: Run, case: Case) -> Verdict:
        """The same question gets the same answer, and an answer handed out is not overwritten later."""
        inputs, others = self._inputs(case), self._inputs(case, seed_offset=1000)
        first = run(inputs)
        kept = {name: out.clone() for name, out in first.items()}
        run(others)
        for name, out in first.items():  # before the same question is asked again, which would restore it
            if not torch.equal(_bits(out), _bits(kept[name])):
                return _wrong(
                    f"output '{name}' in case {case.name}: a later call overwrote an answer that was already handed out"
                )
        again = run(inputs)
        for name, ref in kept.items():
            error = worst_row(again[name], ref)[1]
            if error > self.threshold.relative_l2:
                return _wrong(
                    f"output '{name}' in case {case.name}: the same input gave another answer the second time "
                    f"({error:.2e})"
                )
        return Verdict("ok")


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaNs compare equal to themselves."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _wrong(detail: str) -> Verdict:
    return Verdict("wrong", detail, _WRONG_CURE)
