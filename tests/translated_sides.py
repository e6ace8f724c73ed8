"""Trajectories of torch optimizers and of their translations over whole models, as two sides for `tests/agreement.py`.

A case is a torch class, its parameter groups and the mapping from the model's leaves to the port's. Arrays are
`params.NAME`, `gradients.NAME` (steps first) and `received.NAME` (steps; for SparseAdam steps and rows): where torch's
gradient is not None. Runs of any stretch of the steps share one compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import equivalence as eq
from equivalence.optimizers.torch_side import to_numpy
from equivalence.optimizers.trees import Layout, by_path, slots_in_reference
from equivalence.paths import unflatten
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from equivalence.weights import Leaves, Rule
from equivalence.weights import Mapping as Rules
from tests.agreement import Arrays, Side
from tests.rule_sides import part, sparse

Shapes = Mapping[str, tuple[int, ...]]

STEPS = 100
"""The length of every compiled run; shorter ones leave the other steps out."""

SHAPES: Shapes = {"kernel": (3, 2), "square": (4, 4), "conv": (2, 3, 1, 5), "bias": (7,), "gain": (), "nothing": (0, 6)}
PORT: Shapes = {
    "fc.kernel": (2, 3),
    "fc.square": (4, 4),
    "conv.kernel": (1, 5, 3, 2),
    "fc.bias": (7,),
    "gain": (),
    "nothing": (0, 6),
}
RULES = (
    Rule("kernel", "fc.kernel", "o i -> i o"),
    Rule("square", "fc.square", "o i -> i o"),
    Rule("conv", "conv.kernel", "o i h w -> h w i o"),
    Rule("bias", "fc.bias"),
    Rule("gain", "gain"),
    Rule("nothing", "nothing"),
)


@dataclass(frozen=True, eq=False)
class Case:
    """A torch class, its options, and by group (names, options); where its parameters lie in the port; what moves its
    rates: a torch scheduler of the optimizer, stepped every so many steps, or a function of the step."""

    name: str
    options: Mapping[str, Any]
    groups: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]
    shapes: Shapes = field(default_factory=lambda: SHAPES)
    port: Shapes = field(default_factory=lambda: PORT)
    rules: tuple[Rule, ...] = RULES
    frozen: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    scheduler: Callable[[Any], Any] = lambda optimizer: None
    every: int = 1

    @property
    def mapping(self) -> Rules:
        return Rules(self.rules)

    @functools.cached_property
    def layout(self) -> Layout:
        return Layout(self.mapping.bind(Leaves(dict(self.shapes), dict(self.ties)), Leaves(dict(self.port))))

    def model(self, params: Arrays) -> torch.nn.Module:
        made = torch.nn.Module()

        def put(name: str, parameter: torch.nn.Parameter) -> None:
            *inner, last = name.split(".")
            at = made
            for step in inner:
                if not hasattr(at, step):
                    at.add_module(step, torch.nn.Module())
                at = getattr(at, step)
            at.register_parameter(last, parameter)

        for name, value in params.items():
            put(name, torch.nn.Parameter(torch.tensor(np.array(value, order="C")), name not in self.frozen))
        for alias, name in self.ties.items():
            put(alias, made.get_parameter(name))
        return made

    def optimizer(self, model: torch.nn.Module) -> Any:
        named = dict(model.named_parameters())
        groups = [{"params": [named[name] for name in names], **options} for names, options in self.groups]
        return getattr(torch.optim, self.name)(groups, **self.options)

    def tree(self, leaves: Arrays, gradient: bool = False) -> Any:
        """Torch's leaves as the port's parameters."""
        return unflatten(self.layout.forward(dict(leaves), gradient))


def draw(case: Case, seed: int, missing: float = 0.2) -> dict[str, np.ndarray]:
    """Parameters and a run of gradients of few bits, each missing at some steps; a metric of each step."""
    rng = np.random.default_rng(seed)
    found = {f"params.{name}": rng.normal(size=shape) for name, shape in case.shapes.items()}
    for name, shape in case.shapes.items():
        found[f"gradients.{name}"] = np.round(rng.normal(size=(STEPS, *shape)) * 8 + 0.5) / 8 - 1 / 16
        rows = shape[:1] if case.name == "SparseAdam" else ()
        found[f"received.{name}"] = rng.random((STEPS, *rows)) >= (0.5 if rows else missing)
    for names, _ in case.layout.moves:
        # what the port holds in one leaf has its gradients together
        found |= {f"received.{name}": found[f"received.{names[0]}"] for name in names}
    return found | {"metric": np.round(rng.normal(size=STEPS) * 8) / 8}


class TorchRun:
    """A run of a torch optimizer on given gradients, inside the environment of its precision."""

    def __init__(self, case: Case, arrays: Arrays, params: Arrays | None = None) -> None:
        self.case, self.arrays = case, arrays
        self.model = case.model(part(arrays, "params") if params is None else params)
        self.optimizer = case.optimizer(self.model)
        self.scheduler = case.scheduler(self.optimizer)
        self.params = dict(self.model.named_parameters())

    def step(self, number: int) -> None:
        if callable(self.scheduler):
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.scheduler(number))
        for name, parameter in self.params.items():
            received = self.arrays[f"received.{name}"][number]
            gradient = torch.tensor(self.arrays[f"gradients.{name}"][number])
            if self.case.name == "SparseAdam":
                parameter.grad = sparse(gradient, torch.tensor(received))
            else:
                parameter.grad = gradient if received and name not in self.case.frozen else None
        self.optimizer.step()
        if hasattr(self.scheduler, "step") and (number + 1) % self.case.every == 0:
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*[float(self.arrays["metric"][number])] * plateau)

    def values(self) -> dict[str, np.ndarray]:
        return {name: to_numpy(parameter) for name, parameter in self.params.items()}

    def seen(self) -> dict[str, np.ndarray]:
        """Parameters and state now; a step counts also where the state is still to be made."""
        found = {f"{name}.param": value for name, value in self.values().items()}
        for name, parameter in self.params.items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{slot}"] = to_numpy(value)
        return found

    def state(self) -> dict[str, dict[str, Any]]:
        """The state as torch holds it."""
        return {
            name: {k: v.clone() if hasattr(v, "clone") else v for k, v in self.optimizer.state.get(p, {}).items()}
            for name, p in self.params.items()
        }


class Port:
    """A translated optimizer and its compiled run in one precision."""

    def __init__(self, case: Case, bits: int, transform: Any = None) -> None:
        self.case, self.bits = case, bits
        zeros = {name: np.zeros(shape, np.float64 if bits == 64 else np.float32) for name, shape in case.shapes.items()}
        with torch_environment.environment(bits, threads=1), jax_runtime.environment(bits):
            self.model = case.model(zeros)
            self.optimizer = case.optimizer(self.model)
            options = {"scheduler": case.scheduler(self.optimizer), "every": case.every}
            made = eq.to_optax(self.optimizer, model=self.model, mapping=case.mapping, **options)
        self.transform = made if transform is None else transform
        self.fields = {
            slot: how.field
            for options in self.optimizer.param_groups
            for slot, how in eq_rule(case).slots(options).items()
            if how.kind != "begun"
        }
        self.program, self.init = jax.jit(self._run), jax.jit(self.transform.init)

    def _run(self, params: Any, state: Any, *inputs: Any) -> Any:
        def step(carry: Any, now: Any) -> Any:
            gradient, mask, metric, on = now

            def taken(params: Any, state: Any) -> Any:
                changes, after = self.transform.update(gradient, state, params, received=mask, value=metric)
                return jax.tree.map(jnp.add, params, changes), after

            carry = jax.lax.cond(on, taken, lambda *carry: carry, *carry)
            return carry, (carry[0], self._slots(carry[1]))

        return jax.lax.scan(step, (params, state), inputs)

    def _slots(self, state: Any) -> Any:
        values = frozenset(("ax",))
        found = slots_in_reference(state, self.case.layout, self.case.port, values)
        return {slot: found[name] for slot, name in self.fields.items() if name in found}

    def start(self, params: Arrays) -> tuple[Any, Any]:
        tree = jax.tree.map(jnp.asarray, self.case.tree(params))
        return tree, self.init(tree)

    def run(self, arrays: Arrays, carry: Any, first: int, last: int) -> tuple[Any, dict[int, dict[str, np.ndarray]]]:
        """The carry after the steps from `first` to `last`, and what is seen after each of them."""
        gradients, received = part(arrays, "gradients"), part(arrays, "received")
        active = np.isin(np.arange(STEPS), np.arange(first, last))
        moved = [self.case.layout.forward({n: g[i] for n, g in gradients.items()}) for i in range(STEPS)]
        stacked = unflatten({leaf: np.stack([of_step[leaf] for of_step in moved]) for leaf in moved[0]})
        carry, (seen, slots) = self.program(*carry, stacked, self._received(received), arrays["metric"], active)
        params, slots = jax.tree.map(np.asarray, (by_path(seen), slots))
        found: dict[int, dict[str, np.ndarray]] = {}
        for number in range(first, last):
            now = ({path: rows[number] for path, rows in params.items()}, jax.tree.map(itemgetter(number), slots))
            found[number] = self._seen(*now)
        return carry, found

    def _seen(self, params: Any, slots: Any) -> dict[str, np.ndarray]:
        found = {f"{name}.param": v for name, v in self.case.layout.backward(params, gradient=False).items()}
        for slot, leaves in slots.items():
            found |= {f"{name}.{slot}": value for name, value in leaves.items() if name}
        return found

    def _received(self, received: Arrays) -> Any:
        if self.case.name != "SparseAdam":
            return unflatten({leaf: received[self.case.layout.sources(leaf)[0]] for leaf in self.case.port})
        shapes = self.case.shapes
        whole = {
            name: np.broadcast_to(rows.reshape(*rows.shape, *(1 for _ in shapes[name][1:])), (STEPS, *shapes[name]))
            for name, rows in received.items()
        }
        moved = [self.case.layout.forward({n: rows[i] for n, rows in whole.items()}) for i in range(STEPS)]
        return unflatten({leaf: np.stack([of_step[leaf] for of_step in moved]) for leaf in moved[0]})


def eq_rule(case: Case) -> Any:
    from equivalence.optimizers.rules import rule_for

    return rule_for(case.name)


@functools.cache
def port_of(case: Case, bits: int) -> Port:
    return Port(case, bits)


def seen_of(case: Case, arrays: Arrays, found: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What is seen by step, of state only what torch has: none before a parameter's first gradient."""
    eager = case.name in ("Adagrad", "SparseAdam")
    begun = {name: np.cumsum(received) for name, received in part(arrays, "received").items()} if not eager else {}
    return {
        f"{path}.{number:03d}": value.astype(float) if value.dtype.kind == "i" else value
        for number, seen in found.items()
        for path, value in seen.items()
        for name, slot in [path.rsplit(".", 1)]
        if slot == "param" or (name not in case.frozen and (eager or begun[name][number]))
    }


def stepped(run: TorchRun, first: int, last: int) -> dict[int, dict[str, np.ndarray]]:
    found = {}
    for number in range(first, last):
        run.step(number)
        found[number] = run.seen()
    return found


def to_port(case: Case, port: Port, run: TorchRun, taken: int) -> Any:
    """The port's carry where torch's run is."""
    tree = jax.tree.map(jnp.asarray, case.tree(run.values()))
    options = {"mapping": case.mapping, "scheduler": run.scheduler, "every": case.every, "steps": taken}
    return tree, eq.optimizer_state(run.optimizer, port.transform, tree, model=run.model, **options)


def to_torch(case: Case, arrays: Arrays, carry: Any) -> TorchRun:
    """A new torch run where the port's carry is."""
    params = case.layout.backward({path: np.asarray(v) for path, v in by_path(carry[0]).items()}, gradient=False)
    run = TorchRun(case, arrays, params)
    options = {"mapping": case.mapping, "scheduler": run.scheduler, "every": case.every}
    eq.load_optimizer_state(run.optimizer, carry[1], carry[0], model=run.model, **options)
    return run


def same(one: Any, other: Any) -> bool:
    """Whether two values of torch's state are the same to the bit, type and dtype included."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is not type(other) or getattr(one, "dtype", None) != getattr(other, "dtype", None):
        return False
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def torch_side(case: Case) -> Side:
    def run(bits: int, arrays: Arrays) -> Arrays:
        found = {}
        with torch_environment.environment(bits, threads=1):
            torch_run = TorchRun(case, arrays)
            for number in range(STEPS):
                torch_run.step(number)
                found[number] = torch_run.seen()
        return seen_of(case, arrays, found)

    return run


def port_side(case: Case, made: Callable[[Case, int], Port] = port_of) -> Side:
    def run(bits: int, arrays: Arrays) -> Arrays:
        port = made(case, bits)
        with jax_runtime.environment(bits):
            return seen_of(case, arrays, port.run(arrays, port.start(part(arrays, "params")), 0, STEPS)[1])

    return run


def moved(arrays: Arrays) -> list[str]:
    """What the reference's noise may move."""
    return [path for path in arrays if not path.startswith("received") and path != "metric"]
