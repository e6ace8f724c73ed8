"""Training with torch.optim.LBFGS and with its translation, as two sides for tests/agreement.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.optim import LBFGS
from torch.optim import lbfgs as source

from equivalence.optimizers import lbfgs
from equivalence.optimizers.lbfgs_slots import read, slots_of_state
from equivalence.runtimes.jax import environment
from tests.agreement import Arrays, Side
from tests.branches import FLOAT32, FLOAT64, TWINS, Jitter, Path, shared, still

TORCH = (LBFGS.step, source._strong_wolfe, source._cubic_interpolate)
KINDS = {32: torch.float32, 64: torch.float64}
MOST = 100


def network(xp: Any, p: Any, data: Any) -> Any:
    out = xp.tanh(data["x"] @ p["w"] + p["b"]) @ p["v"] * p["s"]
    return ((out - data["y"]) ** 2).mean()


def squares(xp: Any, p: Any, data: Any) -> Any:
    return ((data["x"] @ p["w"] + p["b"] - data["y"]) ** 2).mean()


def valley(xp: Any, p: Any, data: Any) -> Any:
    x = p["w"]
    return (data["x"] * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


LOSSES = {"network": network, "squares": squares, "valley": valley}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "network": {"p.w": (3, 4), "p.b": (4,), "p.v": (4, 2), "p.s": (), "x": (7, 3), "y": (7, 2)},
    "squares": {"p.w": (3, 2), "p.b": (2,), "x": (7, 3), "y": (7, 2)},
    "valley": {"p.w": (4,), "x": (3,)},
}


def problem(name: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {key: rng.normal(size=shape) for key, shape in SHAPES[name].items()}
    return arrays | ({"x": rng.uniform(1, 20, size=3)} if name == "valley" else {})


def parts(arrays: Arrays, make: Callable[[Any], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and data."""
    made = {key: make(value) for key, value in arrays.items()}
    params = {key.removeprefix("p."): value for key, value in made.items() if key.startswith("p.")}
    return params, {key: value for key, value in made.items() if not key.startswith("p.")}


@dataclass(frozen=True)
class Case:
    """A problem, torch's options, and how many steps to take."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 8
    seed: int = 0

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return problem(self.name, self.seed)

    @property
    def group(self) -> dict[str, Any]:
        group = LBFGS([torch.nn.Parameter(torch.zeros(1))], **self.options).param_groups[0]
        return {key: value for key, value in group.items() if key != "params"}


def flat(step: int, slots: Mapping[str, Any], size: int) -> dict[str, np.ndarray]:
    """Slots by path, with histories filled up with zeros so that shapes do not depend on how many pairs are held."""

    def padded(rows: Any) -> np.ndarray:
        rows = np.asarray(rows, np.float64)
        return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]))])

    found: dict[str, Any] = {}
    for key, value in slots.items():
        if value is None:
            continue
        if key in ("old_dirs", "old_stps"):
            found |= {f"{key}.{name}": padded(rows) for name, rows in value.items()}
        elif key in ("ro", "al"):
            found[key] = padded([number for number in value if number is not None])
        elif isinstance(value, dict):
            found |= {f"{key}.{name}": leaf for name, leaf in value.items()}
        else:
            found[key] = value if key in ("n_iter", "func_evals") else float(value)
    return {f"{step:03d}.{key}": np.asarray(value) for key, value in found.items()}


def in_torch(case: Case, bits: int, arrays: Arrays, jitter: Jitter = still) -> dict[str, np.ndarray]:
    params, data = parts(arrays, lambda value: torch.tensor(value, dtype=KINDS[bits]))
    optimizer = LBFGS([param.requires_grad_() for param in params.values()], **case.options)

    def closure() -> Any:
        at = {name: torch.from_numpy(jitter(p.detach().numpy())).requires_grad_() for name, p in params.items()}
        loss = LOSSES[case.name](torch, at, data)
        for param, gradient in zip(params.values(), torch.autograd.grad(loss, list(at.values())), strict=True):
            param.grad = torch.from_numpy(jitter(gradient.numpy()))
        return torch.from_numpy(jitter(loss.detach().numpy()))

    found: dict[str, np.ndarray] = {}
    for step in range(case.steps):
        found[f"{step:03d}.loss"] = np.asarray(optimizer.step(closure))
        found |= {f"{step:03d}.params.{name}": param.detach().numpy().copy() for name, param in params.items()}
        found |= flat(step, read(optimizer, list(params)), case.group["history_size"])
    return found


NUMBERS = ("lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change")


def training(name: str, search: str | None, size: int) -> Callable[..., Any]:
    """Up to `MOST` steps in one program; numbers of options are its arguments."""

    def run(params: Any, data: Any, numbers: Any, steps: Any) -> Any:
        transform = lbfgs.scale_by_torch_lbfgs({**numbers, "line_search_fn": search, "history_size": size})

        def value(params: Any) -> Any:
            return LOSSES[name](jnp, params, data)

        def step(carry: Any) -> Any:
            params, state = carry
            loss, gradient = jax.value_and_grad(value)(params)
            change, state = transform.update(gradient, state, params, value_fn=value)
            params = optax.apply_updates(params, change)
            return (params, state), {"loss": loss, "params": params, "state": state}

        def put(number: Any, all_: Any) -> Any:
            carry, seen = all_
            carry, now = step(carry)
            return carry, jax.tree.map(lambda rows, row: rows.at[number].set(row), seen, now)

        start = params, transform.init(params)
        rows = jax.tree.map(lambda s: jnp.zeros((MOST, *s.shape), s.dtype), jax.eval_shape(step, start)[1])
        return jax.lax.fori_loop(0, steps, put, (start, rows))[1]

    return jax.jit(run)


kept = functools.cache(training)


def in_jax(case: Case, bits: int, arrays: Arrays, make: Callable[..., Any] = kept) -> dict[str, np.ndarray]:
    group, found = case.group, {}
    with environment(bits):
        params, data = parts(arrays, jnp.asarray)
        numbers = {key: jnp.asarray(np.asarray(group[key]).item()) for key in NUMBERS}
        program = make(case.name, group["line_search_fn"], group["history_size"])
        seen = jax.tree.map(np.asarray, program(params, data, numbers, case.steps))
        for step in range(case.steps):
            now = jax.tree.map(lambda rows, step=step: rows[step], seen)
            found[f"{step:03d}.loss"] = now["loss"]
            found |= {f"{step:03d}.params.{name}": value for name, value in now["params"].items()}
            found |= flat(step, slots_of_state(now["state"]), group["history_size"])
    return found


def wide(arrays: Arrays) -> Arrays:
    return {key: value.astype(np.float32).astype(np.float64) for key, value in arrays.items()}


def settled(case: Case, twins: int = TWINS) -> tuple[Path, int, int]:
    """The lines of torch's step in the steps to judge, how many those are, and in how many of them float32 counts."""

    def run(jitter: Jitter) -> Any:
        return in_torch(case, 64, wide(case.arrays), jitter)

    whole, broad, narrow = shared(run, TORCH, FLOAT64, FLOAT32, twins=twins)
    starts = [number for number, line in enumerate(whole) if line == whole[0]] + [len(whole)]

    def steps(prefix: Path) -> int:
        return max(number for number, start in enumerate(starts) if start <= len(prefix))

    return whole[: starts[steps(broad)]], steps(broad), steps(narrow)


def sides(case: Case, judged: int, narrow: int, make: Callable[..., Any] = kept) -> tuple[Side, Side]:
    """Both sides over the steps that rounding does not decide; float32 where it does not decide in float32 either."""

    def limited(run: Callable[..., dict[str, np.ndarray]]) -> Side:
        short = dataclasses.replace(case, steps=judged)

        def side(bits: int, arrays: Arrays) -> Arrays:
            found = run(short, 64, wide(arrays) if bits == 32 else arrays) if narrow < judged or bits == 64 else {}
            if bits == 32 and narrow:
                found |= run(dataclasses.replace(case, steps=narrow), 32, arrays)
            return found

        return side

    return limited(in_torch), limited(lambda *given: in_jax(*given, make))
