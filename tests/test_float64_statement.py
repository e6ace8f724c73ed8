"""Models with float32 written into them: verdicts as sharp as without, and a report that says how they were reached."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equivalence as eq
from equivalence.comparison import Comparison
from equivalence.report.text import float64_line
from equivalence.runtimes.torch import TorchRunner
from equivalence.runtimes.torch_found import Lifting
from equivalence.verdict import Report
from equivalence.weights import Mapping, Rule
from tests.pairs import normal, seeded

CHECKS = ("outputs", "input_gradients", "parameter_gradients")
WIDTH, TABLE = 10, 6
HELD = (1.0 / 10000.0 ** (np.arange(0, TABLE, 2) / TABLE)).astype(np.float32)
"""A table rounded before the port is traced."""
LONG = float(np.exp(-1.0))
"""A number that no short decimal or closed form names."""


class Cast(nn.Module):
    """What ported language models hold: an RMS norm, a rotary table and a GELU in float32, and a float32 constant."""

    def __init__(self, scale: float, low: torch.dtype, table: str) -> None:
        super().__init__()
        self.up = nn.Linear(7, WIDTH)
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.scale, self.low, self.table = torch.tensor(scale), low, table
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, TABLE, 2).float() / TABLE)
        if table == "buffer":
            self.register_buffer("frequencies", frequencies, persistent=False)
        elif table == "attribute":
            self.frequencies = frequencies

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.norm  # b t w
        with torch.autocast(device_type="cpu", enabled=False):
            positions = torch.arange(x.shape[1], dtype=torch.float32)
            made = 1.0 / 10000.0 ** (torch.arange(0, TABLE, 2, dtype=torch.int64).float() / TABLE)
            frequencies = made if self.table == "made" else self.frequencies
            angles = torch.outer(positions, frequencies).repeat(1, 2)  # t f
        turned, rest = h[..., :TABLE], h[..., TABLE:]
        turned = turned * angles.cos().to(x.dtype) + turned.roll(TABLE // 2, -1) * angles.sin().to(x.dtype)
        h = torch.cat([turned, rest], -1)
        h = F.gelu(h.to(self.low)).to(x.dtype) * self.scale
        return h.softmax(-1, dtype=torch.float32).to(x.dtype) + h


def cast_apply(
    params: Any, x: jax.Array, *, eps: float, base: float, approximate: bool, scale: float, inner: Any, held: bool
) -> jax.Array:
    h = x @ params["up"]["kernel"] + params["up"]["bias"]
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps) * params["norm"]
    frequencies = 1.0 / base ** (jnp.arange(0, TABLE, 2).astype(x.dtype) / TABLE)
    if held:
        frequencies = jnp.asarray(HELD)
    angles = jnp.tile(jnp.outer(jnp.arange(x.shape[1]).astype(x.dtype), frequencies), (1, 2))
    turned, rest = h[..., :TABLE], h[..., TABLE:]
    turned = turned * jnp.cos(angles) + jnp.roll(turned, TABLE // 2, -1) * jnp.sin(angles)
    h = jnp.concatenate([turned, rest], -1)
    h = jax.nn.gelu(h.astype(inner or x.dtype), approximate=approximate).astype(x.dtype) * scale
    return jax.nn.softmax(h) + h


def judged(
    table: str = "made",
    constant: float = 0.1,
    low: torch.dtype = torch.float32,
    checks: tuple[str, ...] = CHECKS,
    asked: float = 1e-6,
    **options: Any,
) -> Report:
    reference = seeded(lambda: Cast(constant, low, table))
    rules = [Rule("up.weight", "up.kernel", "o i -> i o"), Rule("up.bias", "up.bias"), Rule("norm", "norm")]
    if table == "buffer":
        rules.append(Rule("frequencies", None))
    params = {"up": {"kernel": np.zeros((7, WIDTH)), "bias": np.zeros(WIDTH)}, "norm": np.zeros(WIDTH)}
    chosen = {"eps": 1e-6, "base": 10000.0, "approximate": False, "scale": 0.1, "inner": None, "held": False, **options}
    port = eq.function(partial(cast_apply, **chosen), jax.tree_util.tree_map(np.float32, params))
    inputs = (normal(2, 11, 7),)
    options = {"loss": "mse", "targets": (normal(2, 11, WIDTH, seed=2),)} if "training" in checks else {}
    return eq.verify(
        reference, port, inputs, weights=Mapping(rules), checks=checks, examples=2, resolution=asked, **options
    )


def resolution(report: Report) -> float:
    return max(check.resolution or 0.0 for check in report.reports[0].checks)


def test_casts_are_lifted_and_the_verdict_is_as_sharp_as_without():
    report = judged()
    assert report.verdict == "equivalent", report.to_dict()
    assert resolution(report) <= 1e-8
    assert report.reports[0].float64["reference"] == "lifted"
    assert float64_line(report.reports[0]).startswith("float64: reference lifted, port ")
    assert report.to_dict()["reports"][0]["float64"]["reference"] == "lifted"


def test_without_lifting_the_right_port_looks_wrong(monkeypatch):
    monkeypatch.setattr(Lifting, "wanted", lambda self, kind: False)
    assert judged().verdict == "divergent"


def test_without_shaking_a_rounded_table_looks_wrong(monkeypatch):
    monkeypatch.setattr(Comparison, "rounded", lambda self, example, where: {})
    assert judged("buffer").verdict == "divergent"


def test_what_is_native_is_never_shaken(monkeypatch):
    shaken = []
    observe = TorchRunner.observe
    monkeypatch.setattr(TorchRunner, "observe", lambda *a, **k: (shaken.append(k.get("shaken")), observe(*a, **k))[1])
    assert judged().verdict == "equivalent"
    assert set(shaken) == {None}
    judged("buffer")
    assert {0, 1, 2, 3} < set(shaken)


@pytest.mark.parametrize(
    "fault",
    [{"eps": 1e-5}, {"base": 10001.0}, {"approximate": True}, {"scale": 0.1001}, {"scale": 0.1 * (1 + 1e-7)}],
    ids=str,
)
def test_a_fault_under_a_cast_is_a_divergence(fault):
    assert judged(**fault).verdict == "divergent"


@pytest.mark.parametrize(
    ("table", "held"), [("buffer", False), ("attribute", False), ("made", True), ("attribute", True)]
)
def test_a_table_rounded_before_any_run_widens_what_is_expected_and_is_said(table, held):
    report = judged(table, held=held)
    port = report.reports[0]
    assert report.verdict == "equivalent", report.to_dict()
    assert 1e-10 < resolution(report) <= 1e-6
    said = " ".join(caveat.summary for caveat in port.caveats if caveat.kind == "lifted")
    assert ("frequencies" in said) == (table != "made")
    assert ("the port holds" in said) == held


@pytest.mark.parametrize("fault", [{"base": 10001.0}, {"eps": 1e-5}, {"scale": 0.1001}], ids=str)
def test_a_fault_is_seen_beside_a_table_that_was_rounded(fault):
    assert judged("buffer", **fault).verdict == "divergent"


def test_a_constant_that_no_short_decimal_names_bounds_the_resolution():
    report = judged(constant=LONG, scale=LONG, asked=1e-4)
    assert report.verdict == "equivalent", report.to_dict()
    assert 1e-7 < resolution(report) <= 1e-5
    assert any("scale" in c.summary for c in report.reports[0].caveats)
    assert judged(constant=LONG, scale=0.3679).verdict == "divergent"
    blunt = judged(constant=LONG, scale=LONG, asked=resolution(report) / 2)
    assert blunt.verdict == "inconclusive"


def test_steps_follow_a_surviving_constant():
    checks = ("outputs", "step", "optimizer_state", "handover", "training")
    report = judged("attribute", checks=checks)
    assert [check.name for check in report.reports[0].checks if check.verdict == "divergent"] == []
    assert report.check("training").examples == 1
    assert judged("attribute", checks=("step",), eps=1e-5).verdict == "divergent"


@pytest.mark.parametrize("side", ["reference", "port"])
def test_bfloat16_on_one_side_only_is_a_divergence(side):
    report = judged(low=torch.bfloat16) if side == "reference" else judged(inner=jnp.bfloat16)
    assert report.verdict == "divergent"


def test_a_model_without_casts_is_native():
    reference = seeded(lambda: nn.Linear(5, 3))
    port = eq.function(lambda p, x: x @ p["kernel"] + p["bias"], {"kernel": normal(5, 3), "bias": normal(3)})
    rules = Mapping([Rule("weight", "kernel", "o i -> i o"), Rule("bias", "bias")])
    report = eq.verify(reference, port, (normal(4, 5),), weights=rules, checks=["outputs"], examples=1)
    assert report.reports[0].float64 == {"reference": "native", "port": "native"}
    assert float64_line(report.reports[0]) == ""


def diluted(inner: Any, part: float) -> Any:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["weight"].T + p["bias"]
        return h + part * jnp.tanh(h.astype(inner or h.dtype)).astype(h.dtype)

    return eq.function(apply, {"weight": np.zeros((5, 6), np.float32), "bias": np.zeros(5, np.float32)})


class Diluted(nn.Linear):
    """A linear layer and a small part of its tanh, in the precision of its input unless told otherwise."""

    def __init__(self, inner: torch.dtype | None, part: float, autocast: bool = False) -> None:
        super().__init__(6, 5)
        self.inner, self.part, self.autocast = inner, part, autocast

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            product = h @ torch.eye(5, dtype=h.dtype) if self.autocast else h.to(self.inner or h.dtype)
        return h + self.part * product.tanh().to(h.dtype)


@pytest.mark.parametrize(("inner", "part"), [(jnp.float16, 0.03), (jnp.bfloat16, 0.01), (jnp.float32, 0.03)], ids=str)
def test_half_precision_in_a_small_part_of_a_port_is_a_divergence(inner, part):
    reference = seeded(lambda: Diluted(None, part))
    report = eq.verify(reference, diluted(inner, part), (normal(4, 6),), checks=["outputs"], examples=3)
    assert report.verdict == ("equivalent" if inner == jnp.float32 else "divergent")


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_on_both_sides_is_right_and_named_where_one_is_coarser(autocast):
    reference = seeded(lambda: Diluted(torch.bfloat16, 0.03, autocast))
    named = []
    for inner in (jnp.bfloat16, jnp.float16):
        report = eq.verify(reference, diluted(inner, 0.03), (normal(4, 6),), checks=["outputs"], examples=3)
        assert report.verdict == "equivalent", report.to_dict()
        named.append(any("the reference computes in a dtype" in c.summary for c in report.reports[0].caveats))
    assert named == [False, True]
