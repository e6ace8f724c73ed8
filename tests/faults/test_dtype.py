"""Code that looks at its dtype: float64 runs are told float32's limits; what still changes with the dtype is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import equivalence as eq

FLOAT32_EPS = float(np.finfo(np.float32).eps)
X = np.random.default_rng(0).standard_normal((11, 7)).astype(np.float32)
PARAMS = {
    "fc": {"weight": np.zeros((12, 7), np.float32), "bias": np.zeros(12, np.float32)},
    "norm": {"weight": np.zeros(12, np.float32)},
}


class Normed(torch.nn.Module):
    """A linear layer whose small outputs are normalised by `RMSNorm(eps=None)`: eps is the dtype's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(7, 12)
        self.norm = torch.nn.RMSNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(x) * 1e-2)


class Branching(Normed):
    """Scales its output by the dtype it runs in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        return h * (1.5 if h.dtype == torch.float64 else 1.0) * self.norm.weight


def normed(eps: float | None) -> Callable[..., jax.Array]:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        h = (x @ params["fc"]["weight"].T + params["fc"]["bias"]) * 1e-2
        small = jnp.finfo(h.dtype).eps if eps is None else eps
        return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + small) * params["norm"]["weight"]

    return apply


def branching(in_float32: float) -> Callable[..., jax.Array]:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        h = x @ params["fc"]["weight"].T + params["fc"]["bias"]
        return h * (1.5 if h.dtype == jnp.float64 else in_float32) * params["norm"]["weight"]

    return apply


@pytest.mark.parametrize(("eps", "verdict"), [(FLOAT32_EPS, "equivalent"), (None, "equivalent"), (1e-6, "divergent")])
def test_an_eps_of_the_dtype_is_that_of_float32(eps: float | None, verdict: str) -> None:
    finfo = torch.finfo, jnp.finfo
    report = eq.verify(Normed(), eq.function(normed(eps), PARAMS), (X,), examples=2, checks=["outputs"])
    assert report.verdict == verdict
    assert (torch.finfo, jnp.finfo) == finfo


@pytest.mark.parametrize(("in_float32", "verdict"), [(1.0, "equivalent"), (1.0001, "divergent")])
def test_a_reference_that_depends_on_its_dtype_is_named_and_compared_in_float32(
    in_float32: float, verdict: str
) -> None:
    report = eq.verify(Branching(), eq.function(branching(in_float32), PARAMS), (X,), examples=2, checks=["outputs"])
    assert report.verdict == verdict
    assert "dtype" in {caveat.kind for caveat in report.reports[0].caveats}
