"""What a check may conclude from the decisions that are left to it."""

from __future__ import annotations

import pytest

from equivalence.conclusion import Conclusions, concluded
from equivalence.judgement import Decision, Finding
from equivalence.numerics import Measure
from equivalence.optimizers.pairs import STEPS


def decided(step: int) -> Decision:
    path = f"step{step}.parameters.w"
    finding = Finding("step", ("steps", 0), path, "plain", Measure(path, 0.0, 1e-8, 1e-8, 1.0, 1e-8, 4))
    return Decision(finding, 1e-16, 1.0, False, 1.0)


@pytest.mark.parametrize(
    ("last", "chaos", "verdict"), [(1, True, "inconclusive"), (STEPS, True, "equivalent"), (1, False, "equivalent")]
)
def test_steps_that_chaos_ended_everywhere_prove_nothing(last: int, chaos: bool, verdict: str) -> None:
    conclusions = Conclusions(("step",), 1e-6, asked=False, steps=STEPS)
    conclusions.take(decided(step) for step in range(1, last + 1))
    if chaos:
        conclusions.caveat("chaos", "rounding decides an update", check="step")
    assert concluded(conclusions, "step").verdict == verdict
