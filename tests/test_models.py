"""Every model in impls/, every port, every check: one item each. `pytest -k titanic_mlp-nnx-parameter_gradients`."""

from equivalence.numerics import AGREES
from equivalence.pytest_plugin import ModelCheck


def test_model(model_check: ModelCheck) -> None:
    model_check.assert_equivalent()
    # A port that is not chaotic and not ill-conditioned stays within the first stage's bound in every check.
    for check in model_check.report.checks:
        assert (check.gap or 0.0) <= AGREES * (check.expected_gap or 0.0), check
