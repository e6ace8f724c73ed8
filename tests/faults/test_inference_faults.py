"""Faults that a mapping could hide: an inferred one never does. What would hide one is shown as a finding, not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch

import equivalence as eq

WIDTH, HEADS = 8, 2
X = np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)
NAMES = ("to_q", "to_k", "to_v", "to_out")


class Attention(torch.nn.Module):
    """Self-attention with a gated layer after it; every matrix is square."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj"):
            self.add_module(name, torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(getattr(self, f"{s}_proj")(x)) for s in "qkv")
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[operator]
        return torch.nn.functional.silu(self.gate_proj(y)) * self.up_proj(y)  # type: ignore[operator, no-any-return]

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class FusedAttention(Attention):
    """The same, with one projection for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(part) for part in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[operator]
        return torch.nn.functional.silu(self.gate_proj(y)) * self.up_proj(y)  # type: ignore[operator, no-any-return]


PARAMS = {
    n: {"kernel": np.zeros((WIDTH, WIDTH), np.float32), "bias": np.zeros(WIDTH, np.float32)}
    for n in (*NAMES, "gate", "up")
}


def port(
    swapped: tuple[str, str] | None = None, turned: str | None = None, minor: bool = False, interleaved: bool = False
) -> Callable[..., Any]:
    """The port, with one planted fault or none."""

    def apply(params: Any, x: Any) -> Any:
        used = dict(params)
        if swapped is not None:
            used[swapped[0]], used[swapped[1]] = used[swapped[1]], used[swapped[0]]

        def layer(name: str, x: Any) -> Any:
            kernel = used[name]["kernel"]
            return x @ (kernel.T if name == turned else kernel) + used[name]["bias"]

        def heads(x: Any) -> Any:
            split = (*x.shape[:2], -1, HEADS) if minor else (*x.shape[:2], HEADS, -1)
            return x.reshape(split).transpose(0, 3, 1, 2) if minor else x.reshape(split).transpose(0, 2, 1, 3)

        if "qkv" not in used:
            flat = [layer(name, x) for name in NAMES[:3]]
        elif interleaved:
            whole = layer("qkv", x).reshape(*x.shape[:2], HEADS, 3, -1)
            flat = [whole[..., part, :].reshape(x.shape) for part in range(3)]
        else:
            flat = jnp.split(layer("qkv", x), 3, -1)
        q, k, v = map(heads, flat)
        y = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS), -1) @ v
        y = y.transpose(0, 2, 3, 1) if minor else y.transpose(0, 2, 1, 3)
        y = layer("to_out", y.reshape(x.shape))
        return jax.nn.silu(layer("gate", y)) * layer("up", y)

    return apply


FUSED = {
    **{name: PARAMS[name] for name in ("to_out", "gate", "up")},
    "qkv": {"kernel": np.zeros((WIDTH, 3 * WIDTH), np.float32), "bias": np.zeros(3 * WIDTH, np.float32)},
}


def verdict(reference: torch.nn.Module, apply: Callable[..., Any], params: Any = PARAMS) -> tuple[str, str]:
    report = eq.verify(reference, eq.function(apply, params), (X,), checks=["outputs"], examples=1)
    return report.verdict, "; ".join(c.summary for c in report.reports[0].caveats if c.kind == "mapping")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "query and key swapped": (
        {"swapped": ("to_q", "to_k")},
        "q_proj and (k|q)_proj are swapped|k_proj and q_proj are swapped",
    ),
    "key and value swapped": ({"swapped": ("to_k", "to_v")}, "k_proj and v_proj are swapped"),
    "gate and up swapped": ({"swapped": ("gate", "up")}, "gate_proj and up_proj are swapped"),
    "a square kernel turned": ({"turned": "to_q"}, "q_proj.weight is stored transposed"),
    "a square kernel out of attention turned": ({"turned": "to_out"}, "out_proj.weight is stored transposed"),
    "heads minor": ({"minor": True}, "heads of size 4 are stored minor"),
}


def test_without_a_fault_the_mapping_is_found_and_the_port_is_right() -> None:
    assert verdict(Attention(), port()) == ("equivalent", "")
    assert verdict(FusedAttention(), port()) == ("equivalent", "")
    assert verdict(FusedAttention(), port(), FUSED) == ("equivalent", "")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_a_mapping_could_hide_is_divergent_and_named(fault: str) -> None:
    options, text = FAULTS[fault]
    found, finding = verdict(Attention(), port(**options))
    assert found == "divergent"
    assert any(part in finding for part in text.split("|")) or pytest.fail(finding)
    assert "pass weights=" in finding


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"swapped": ("to_q", "to_k")}, "fused parts are in the order"),
        ({"swapped": ("to_v", "to_k")}, "fused parts are in the order"),
        ({"minor": True}, "heads of size 4 are stored minor"),
    ],
)
def test_a_fused_projection_hides_none_either(options: dict[str, Any], text: str) -> None:
    found, finding = verdict(FusedAttention(), port(**options))
    assert (found, text in finding) == ("divergent", True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"interleaved": True}, "interleaved by heads of size 4, (h s d)"),
        ({"minor": True}, "heads of size 4 are stored minor"),
    ],
)
def test_nor_does_one_that_is_fused_on_both_sides(options: dict[str, Any], text: str) -> None:
    found, finding = verdict(FusedAttention(), port(**options), FUSED)
    assert (found, text in finding) == ("divergent", True)


@pytest.mark.parametrize("order", ["ifgo", "igfo"])
def test_gates_are_taken_by_name_and_never_reordered(order: str) -> None:
    """`order` is the gate that the port's own leaf of each place acts as: it should be the one that it is named."""

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(5, 3, bias=False, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]  # type: ignore[no-any-return]

    def last(params: Any, x: Any) -> Any:
        acts, h, c, found = dict(zip(order, "ifgo", strict=True)), jnp.zeros((2, 3)), jnp.zeros((2, 3)), []
        for step in range(x.shape[1]):
            z = {
                acts[g]: x[:, step] @ params["rnn"][f"i{g}"]["kernel"] + h @ params["rnn"][f"h{g}"]["kernel"]
                for g in order
            }
            c = jax.nn.sigmoid(z["f"]) * c + jax.nn.sigmoid(z["i"]) * jnp.tanh(z["g"])
            h = jax.nn.sigmoid(z["o"]) * jnp.tanh(c)
            found.append(h)
        return jnp.stack(found, 1)

    leaves = {f"{s}{g}": {"kernel": np.zeros((5 if s == "i" else 3, 3), np.float32)} for s in "ih" for g in "ifgo"}
    x = np.random.default_rng(1).standard_normal((2, 2, 5)).astype(np.float32)
    report = eq.verify(Last(), eq.function(last, {"rnn": leaves}), (x,), checks=["outputs"], examples=1)
    findings = [c.summary for c in report.reports[0].caveats if c.kind == "mapping"]
    assert report.verdict == ("equivalent" if order == "ifgo" else "divergent")
    assert len(findings) == (order != "ifgo")
    assert all("fused parts are in the order" in text for text in findings)


def test_a_finding_that_is_accepted_makes_the_port_equivalent() -> None:
    """What is printed is what to paste."""
    _, finding = verdict(Attention(), port(minor=True))
    printed = finding.partition("Rule(")[2].rpartition(")")[0]
    accepted = eval(f"[Rule({printed})]", {"Rule": eq.Rule})
    given = {rule.source for rule in accepted}
    rest = [
        eq.Rule(f"{ours}.{leaf}", f"{theirs}.{other}", "o k -> k o" if leaf == "weight" else None)
        for ours, theirs in (("gate_proj", "gate"), ("up_proj", "up"), ("out_proj", "to_out"))
        for leaf, other in (("weight", "kernel"), ("bias", "bias"))
        if f"{ours}.{leaf}" not in given
    ]
    weights = eq.Mapping([*accepted, *rest])
    report = eq.verify(
        Attention(), eq.function(port(minor=True), PARAMS), (X,), weights=weights, checks=["outputs"], examples=1
    )
    assert report.verdict == "equivalent"


def test_a_fault_that_no_rearrangement_explains_has_no_finding() -> None:
    def wrong(params: Any, x: Any) -> Any:
        return port()(params, x) * (1 + 1e-6)

    assert verdict(Attention(), wrong) == ("divergent", "")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_frozen_parameter_at_its_initial_value_is_not_forgotten_unseen(value: float) -> None:
    """A shift of zeros or a factor of ones that the port leaves out: both sides agree until it is loaded."""

    class Scaled(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(WIDTH, WIDTH)
            self.held = torch.nn.Parameter(torch.full((WIDTH,), value), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y * self.held if value else y + self.held  # type: ignore[no-any-return]

    forgetful = eq.function(lambda p, x: x @ p["fc"]["kernel"] + p["fc"]["bias"], {"fc": PARAMS["to_q"]})
    with pytest.raises(eq.MappingError, match="no port leaf is named like held"):
        eq.verify(Scaled(value), forgetful, (X,))


@pytest.mark.parametrize("swapped", [False, True])
def test_gate_and_up_under_names_that_do_not_say_are_told_apart_by_a_run(swapped: bool) -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]

    def apply(params: Any, x: Any) -> Any:
        gate, up = (params[name]["kernel"] for name in (("up", "gate") if swapped else ("gate", "up")))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ params["down"]["kernel"]

    leaves = {name: {"kernel": PARAMS["gate"]["kernel"]} for name in ("gate", "up", "down")}
    report = eq.verify(Gated(), eq.function(apply, leaves), (X,), checks=["outputs"], examples=1)
    ends = {entry["source"]: entry["target"] for entry in report.to_dict()["reports"][0]["mapping"]}
    assert report.verdict == "equivalent"
    assert ends["w1.weight"] == ("up.kernel" if swapped else "gate.kernel")
