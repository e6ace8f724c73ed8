"""Trajectories of torch optimizers and of their rules, as two sides for `tests/agreement.py`.

A case is a torch class and its options. A side takes `params.LEAF`, `gradients.LEAF` (steps first), for SparseAdam
`rows.LEAF` (steps, rows), and what moves: `moving.lr` and others (steps,). It returns the parameter and every entry of
torch's state after every step, as `CASE.LEAF.SLOT.STEP`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from equivalence.optimizers.rules import rule_for
from equivalence.optimizers.rules.common import Rule
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from tests.agreement import Arrays, Side

Make = Callable[[Mapping[str, Any]], optax.GradientTransformation]


@dataclass(frozen=True)
class Case:
    """A torch class, its options, and for a planted fault or a plain form another way to make the rule.

    `with_state` is False where that has another state than the rule: its parameters are looked at alone.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Make | None = None
    with_state: bool = True

    @property
    def rule(self) -> Rule:
        return rule_for(self.name)

    def label(self, number: int) -> str:
        return f"{self.name}{number}"

    def optimizer(self, params: Sequence[Any]) -> Any:
        return getattr(torch.optim, self.name)(params, **self.options)

    def group(self) -> dict[str, Any]:
        made = self.optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
        return {**made.defaults, **{k: v for k, v in made.param_groups[0].items() if k != "params"}}


def part(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    return {path.split(".", 1)[1]: value for path, value in arrays.items() if path.startswith(f"{name}.")}


def with_moving(group: Mapping[str, Any], moving: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options with what moves put in its place; a beta1 moves only where there are betas."""
    found = {**group, **{name: value for name, value in moving.items() if name in group}}
    if "beta1" in moving and "betas" in group:
        found["betas"] = (moving["beta1"], group["betas"][1])
    return found


def torch_side(cases: Sequence[Case]) -> Side:
    def run(bits: int, arrays: Arrays) -> Arrays:
        seen: dict[str, np.ndarray] = {}
        with torch_environment.environment(bits, threads=1):
            for number, case in enumerate(cases):
                leaves = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in part(arrays, "params").items()}
                optimizer = case.optimizer(list(leaves.values()))
                steps = len(next(iter(part(arrays, "gradients").values())))
                for step in range(steps):
                    moving = {name: float(v[step]) for name, v in part(arrays, "moving").items()}
                    optimizer.param_groups[0].update(with_moving(optimizer.param_groups[0], moving))
                    for name, leaf in leaves.items():
                        leaf.grad = torch.tensor(arrays[f"gradients.{name}"][step])
                        if case.rule.needs_rows:
                            leaf.grad = sparse(leaf.grad, torch.tensor(arrays[f"rows.{name}"][step]))
                    optimizer.step()
                    for name, leaf in leaves.items():
                        known = {"param": leaf.detach(), **optimizer.state[leaf]}
                        for slot, value in known.items():
                            if value is not None:
                                path = f"{case.label(number)}.{name}.{slot}.{step}"
                                seen[path] = np.array(torch.as_tensor(value).numpy(), copy=True)
        return seen

    return run


def sparse(gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    held = torch.nonzero(rows)[:, 0]
    return torch.sparse_coo_tensor(held[None], gradient[held], gradient.shape, check_invariants=True)


def held(rule: Rule, group: Mapping[str, Any], state: Any) -> dict[str, Any]:
    """torch's state names and what the rule's state holds for them; a matrix has no `variance`, torch no `begun`."""
    found: dict[str, Any] = {}
    for name, slot in rule.slots(group).items():
        value = optax.tree.get(state, slot.field)
        if jax.tree.leaves(value) and slot.kind != "begun":
            found[name] = jnp.asarray(value, float) if slot.kind == "count" else value
    return found


def port_side(cases: Sequence[Case], compiled: bool = True) -> Side:
    """The rules' side: one program for all cases a structure and precision, or one operation after the other."""

    def step_of(case: Case) -> Callable[..., Any]:
        group, make = case.group(), case.make or case.rule.make

        def start(params: Any) -> Any:
            return {name: make(with_moving(group, {"lr": 0.5})).init(leaf) for name, leaf in params.items()}

        def step(params: Any, states: Any, gradients: Any, rows: Any, moving: Any) -> Any:
            rule = make(with_moving(group, moving))
            after, state, seen = {}, {}, {}
            for name, leaf in params.items():
                extra = {"rows": rows[name]} if case.rule.needs_rows else {}
                change, state[name] = rule.update(gradients[name], states[name], leaf, **extra)
                after[name] = leaf + change
                seen[name] = {"param": after[name]}
                if case.with_state:
                    seen[name] |= held(case.rule, group, state[name])
            return after, state, seen

        return start, step

    rules = {case.label(number): step_of(case) for number, case in enumerate(cases)}

    def whole(params: Any, *inputs: Any) -> Any:
        def step(carry: Any, now: Any) -> Any:
            found = {label: advance(*carry[label], *now) for label, (_, advance) in rules.items()}
            return {label: f[:2] for label, f in found.items()}, {label: f[2] for label, f in found.items()}

        carry = {label: (params, start(params)) for label, (start, _) in rules.items()}
        if compiled:
            return jax.lax.scan(step, carry, inputs)[1]
        seen = []
        for number in range(len(jax.tree.leaves(inputs)[0])):
            carry, now = step(carry, jax.tree.map(lambda leaf, n=number: leaf[n], inputs))
            seen.append(now)
        return jax.tree.map(lambda *values: np.stack(values), *seen)

    program = jax.jit(whole) if compiled else whole

    def run(bits: int, arrays: Arrays) -> Arrays:
        with jax_runtime.environment(bits):
            given = {k: jnp.asarray(v) for k, v in arrays.items()}
            seen = program(*(part(given, name) for name in ("params", "gradients", "rows", "moving")))
        return {
            f"{label}.{leaf}.{slot}.{step}": value
            for label, leaves in seen.items()
            for leaf, slots in leaves.items()
            for slot, stack in slots.items()
            for step, value in enumerate(np.asarray(stack))
        }

    return run


def remembered(side: Side) -> Side:
    """A side that runs once on equal arrays."""
    known: dict[Any, Arrays] = {}

    def run(bits: int, arrays: Arrays) -> Arrays:
        key = bits, tuple((path, value.tobytes()) for path, value in arrays.items())
        if key not in known:
            known[key] = side(bits, arrays)
        return known[key]

    return run


def overflows(reference: Side, port: Side, arrays: Arrays) -> list[str]:
    """Paths that are infinite or NaN at other places, or of another sign of infinity, in either precision.

    The statistic alone sees what float64 does; in float32 it forgives a side's overflow where the other overflows too.
    """
    found = []
    for bits, kind in ((32, np.float32), (64, np.float64)):
        given = {k: v.astype(np.float32).astype(kind) if v.dtype.kind == "f" else v for k, v in arrays.items()}
        ours, theirs = reference(bits, given), port(bits, given)
        for path in ours:
            a, b = (np.where(np.isfinite(side[path]), 0, side[path]) for side in (ours, theirs))
            if not np.array_equal(a, b, equal_nan=True):
                found.append(f"{path} (float{bits})")
    return found
