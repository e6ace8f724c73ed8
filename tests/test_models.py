"""Every model in impls/, every port, every check: one item each. `pytest -k titanic_mlp-nnx-parameter_gradients`."""

from equivalence.pytest_plugin import ModelCheck


def test_model(model_check: ModelCheck) -> None:
    model_check.assert_equivalent()
