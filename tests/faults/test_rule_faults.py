"""Every option of every optimizer off by a little, and every convention swapped for its neighbour: each is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
import pytest

from equivalence.optimizers.rules import adam, adam_corrections, matrix, rule_for, steps
from equivalence.optimizers.rules.common import descend, gradient_of
from tests.agreement import disagreements
from tests.rule_sides import Case, Make, overflows, port_side, remembered, torch_side
from tests.test_optimizer_rules import SHAPE, draw, fixed

Options = Mapping[str, Any]


def noticed(case: Case, make: Make, kind: str = "normal", moving: tuple[str, ...] = (), state: bool = True) -> bool:
    """Whether a wrong rule shows; with `state=False` in the parameters alone."""
    shapes = {"leaf": SHAPE} | ({"vector": (7,)} if case.name == "Adafactor" else {})
    arrays = draw(case.name, 8 if case.name == "RAdam" else 4, shapes, 7, kind, moving)  # rectified from step 6 on
    wrong = Case(case.name, case.options, make, with_state=state)
    reference, port = remembered(torch_side([case])), remembered(port_side([wrong], compiled=False))
    found = [path for path in disagreements(reference, port, arrays, fixed(arrays)) if state or ".param." in path]
    return bool(found) or (state and bool(overflows(reference, port, arrays)))


@dataclass(frozen=True)
class Base:
    """Options under which every other one has an effect, but for the silent ones."""

    name: str
    options: Options
    silent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


SIZES = {"eps": 1e-2, "weight_decay": 0.1}
BASES = [
    Base("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, ("nesterov",)),  # refused with dampening
    Base("SGD", {"momentum": 0.9, "nesterov": True}),
    Base("Adam", SIZES),
    Base("Adam", SIZES | {"amsgrad": True, "decoupled_weight_decay": True}),
    Base("AdamW", SIZES, ("decoupled_weight_decay",)),  # it always is
    Base("Adamax", SIZES),
    Base("NAdam", SIZES),
    Base("NAdam", SIZES | {"decoupled_weight_decay": True, "momentum_decay": 1.0}),
    Base("RAdam", SIZES | {"betas": (0.9, 0.99)}),
    Base("SparseAdam", {"eps": 1e-2}),
    Base("Adadelta", SIZES),
    Base("Adagrad", SIZES | {"lr_decay": 0.3, "initial_accumulator_value": 0.5}),
    Base("RMSprop", SIZES | {"momentum": 0.9}),
    Base("RMSprop", SIZES | {"centered": True}),
    Base("ASGD", {"lambd": 0.1, "t0": 2.0, "weight_decay": 0.1}),
    Base("Rprop", {"step_sizes": (0.004, 0.013)}),
    Base("Adafactor", {"weight_decay": 0.1}, ("eps1",)),  # reached in the next
    Base("Adafactor", {"eps": (1.0, 2.0)}, ("d",)),
    Base("Muon", {"momentum": 0.75, "ns_coefficients": (3.5, -4.75, 2.0)}, ("eps",)),
    Base("Muon", {"momentum": 0.75, "eps": 16.0, "ns_steps": 1}, ("ns_coefficients2",)),  # the matrix is small there
]
SWITCHES = ("foreach", "fused", "capturable", "differentiable")


def variants(base: Base) -> dict[str, dict[str, Any]]:
    """Each option in its turn a little larger (Muon's bfloat16 sees no less than percents) or flipped."""
    group = Case(base.name, base.options).group()
    found: dict[str, dict[str, Any]] = {}

    def larger(value: float) -> float:
        return value + 1 if isinstance(value, int) else value * (1.05 if base.name == "Muon" else 1.0001)

    for key, value in group.items():
        if isinstance(value, bool) and key not in SWITCHES:
            found[key] = {**group, key: not value}
        elif isinstance(value, (int, float)) and value and not isinstance(value, bool):
            found[key] = {**group, key: larger(value)}
        elif isinstance(value, tuple):
            for place, part in enumerate(value):
                if part:
                    found[f"{key}{place}"] = {**group, key: (*value[:place], larger(part), *value[place + 1 :])}
    return {key: options for key, options in found.items() if key not in base.silent}


OFF = [pytest.param(base, wrong, id=f"{base}-{key}") for base in BASES for key, wrong in variants(base).items()]


@pytest.mark.parametrize("base", BASES, ids=str)
def test_the_right_rule_is_not_noticed(base: Base) -> None:
    assert not noticed(Case(base.name, base.options), rule_for(base.name).make)


@pytest.mark.parametrize(("base", "wrong"), OFF)
def test_each_option_a_little_off_is_noticed(base: Base, wrong: Options) -> None:
    assert noticed(Case(base.name, base.options), lambda _: rule_for(base.name).make(wrong))


def patched(name: str, module: Any, piece: str, value: Any) -> Make:
    """The right rule of an optimizer with one of its pieces replaced."""

    def make(options: Options) -> optax.GradientTransformationExtraArgs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, piece, value)
            rule = optax.with_extra_args_support(rule_for(name).make(options))

        def update(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, piece, value)
                return rule.update(*args, **kwargs)

        return optax.GradientTransformationExtraArgs(rule.init, update)

    return make


def around(*pieces: Any, decoupled: bool = False) -> Make:
    """torch's chain around another direction; a piece may be made of the options."""

    def make(options: Options) -> optax.GradientTransformation:
        made = [piece if isinstance(piece, tuple) else piece(options) for piece in pieces]
        decay = [optax.add_decayed_weights(options["weight_decay"])] if decoupled else []
        return optax.chain(*gradient_of(options, decay=not decoupled), *made, *decay, descend(options["lr"]))

    return make


def chained(*pieces: Any) -> Make:
    """A chain of its own; `"lr"` stands for the step down."""
    return lambda options: optax.chain(*(descend(options["lr"]) if piece == "lr" else piece for piece in pieces))


def from_state(direction: Any, state: Any = lambda state, options: state, eps: Any = lambda eps, root: eps) -> Make:
    """A direction made anew each step: from another state, or with eps across the bias correction."""

    def make(options: Options) -> optax.GradientTransformationExtraArgs:
        b1, b2 = options["betas"]

        def update(g: Any, s: Any, p: Any = None, **extra: Any) -> Any:
            root = jnp.sqrt(1 - b2 ** (s.count + 1.0))
            made = direction(b1, b2, eps(options["eps"], root))
            return optax.with_extra_args_support(made).update(g, state(s, options), p, **extra)

        return optax.GradientTransformationExtraArgs(direction(b1, b2, 0.0).init, update)

    return around(make)


def started(name: str, count: int) -> Make:
    """The right rule, its counter off by so much."""

    def make(options: Options) -> optax.GradientTransformation:
        rule = rule_for(name).make(options)
        return optax.GradientTransformation(
            lambda params: optax.tree.set(rule.init(params), count=jnp.asarray(count, jnp.int32)), rule.update
        )

    return make


def of_rows(keep: Any) -> Make:
    """SparseAdam told of other rows: `keep(rows, gradient)`."""

    def make(options: Options) -> optax.GradientTransformationExtraArgs:
        rule = adam.sparse_adam(options)
        return optax.GradientTransformationExtraArgs(
            rule.init, lambda g, s, p=None, *, rows: rule.update(g, s, p, rows=keep(rows, g))
        )

    return make


def asgd(before: Any = lambda state, rate: state, after: Any = lambda state, weights: state) -> Make:
    """ASGD with its state changed before or after each step."""

    def make(options: Options) -> optax.GradientTransformation:
        rule = steps.torch_asgd(options["lr"], options["lambd"], options["alpha"], options["t0"])

        def update(g: Any, s: Any, p: Any = None) -> Any:
            change, state = rule.update(g, before(s, jnp.asarray(options["lr"], float)), p)
            return change, after(state, p)

        return optax.GradientTransformation(rule.init, update)

    return make


def eps_on_the_maximum(options: Options) -> optax.GradientTransformation:
    rule = adam.scale_by_torch_adamax(0.9, 0.999, 0.0)

    def update(g: Any, s: Any, p: Any = None) -> Any:
        direction, state = rule.update(g, s, p)
        return direction * state.nu / (state.nu + options["eps"]), state

    return optax.GradientTransformation(rule.init, update)


ITERATION = matrix.orthogonalized.__wrapped__


def in_float32(matrix_: Any, coefficients: Any, steps_: int, eps: float) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "_bfloat16", lambda array: array.astype(jnp.float32))
        return ITERATION(matrix_, coefficients, steps_, eps)


@dataclass(frozen=True)
class Swap:
    """What is taken for torch's convention, and the rule that takes it so."""

    what: str
    name: str
    options: Options
    make: Make
    kind: str = "normal"
    moving: tuple[str, ...] = ()
    state: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def nan_spreads(options: Any) -> optax.GradientTransformation:
    """Rprop whose change is NaN where the gradient is: jnp.sign's NaN for torch.sign's 0."""
    right = steps.rprop(options)

    def update(gradient: Any, state: Any, param: Any = None) -> Any:
        change, state = right.update(gradient, state, param)
        return jnp.where(jnp.isnan(gradient), gradient, change), state

    return optax.GradientTransformation(right.init, update)


HEAVY, DECAY, DECAYED = {"momentum": 0.9}, {"weight_decay": 0.1}, optax.add_decayed_weights(0.1)
SWAPS = [
    Swap("an average, no heavy ball", "SGD", HEAVY, around(optax.ema(0.9, debias=False))),
    Swap("dampening at the first step", "SGD", HEAVY | {"dampening": 0.5}, around(optax.scale(0.5), optax.trace(0.9))),
    Swap("decay after the momentum", "SGD", HEAVY | DECAY, chained(optax.trace(0.9), DECAYED, "lr")),
    Swap("decay without the rate", "SGD", DECAY, chained("lr", optax.add_decayed_weights(-0.1))),
    Swap("rate inside the momentum", "SGD", HEAVY, chained("lr", optax.trace(0.9)), moving=("lr",)),
    Swap("maximize turns the decay", "SGD", DECAY | {"maximize": True}, chained(DECAYED, optax.scale(-1.0), "lr")),
    Swap("eps inside the root", "Adam", {"eps": 1e-3}, around(optax.scale_by_adam(eps=0.0, eps_root=1e-3))),
    Swap(
        "eps before the correction",
        "Adam",
        {"eps": 1e-3},
        from_state(adam.scale_by_torch_adam, eps=lambda eps, root: eps / root),
    ),
    Swap("no bias correction", "Adam", {}, patched("Adam", adam, "one_minus_power", lambda b, t: jnp.ones([]))),
    Swap("step off by one", "Adam", {}, started("Adam", 1)),
    Swap("decay decoupled", "Adam", DECAY, around(optax.scale_by_adam(), decoupled=True)),
    Swap("decay coupled", "AdamW", DECAY, around(optax.scale_by_adam())),
    Swap("Optax's default decay", "AdamW", {}, lambda options: optax.adamw(options["lr"])),
    Swap("maximum after the correction", "Adam", {"amsgrad": True}, around(optax.scale_by_amsgrad())),
    Swap("Nesterov", "Adam", {}, around(optax.scale_by_adam(nesterov=True))),
    Swap("eps on the maximum", "Adamax", {"eps": 0.1}, around(eps_on_the_maximum)),
    Swap("a constant momentum", "NAdam", {}, around(optax.scale_by_adam(nesterov=True))),
    Swap(
        "a power for the product of momenta",
        "NAdam",
        {},
        from_state(adam_corrections.scale_by_torch_nadam, lambda s, _: s._replace(mu_product=0.9 ** (s.count * 1.0))),
    ),
    Swap("Optax's eps", "RAdam", {"eps": 1e-3}, around(optax.scale_by_radam(eps=1e-3))),
    Swap(
        "eps after the correction",
        "RAdam",
        {"eps": 1e-3, "betas": (0.9, 0.9)},
        from_state(adam_corrections.scale_by_torch_radam, eps=lambda eps, root: eps * root),
    ),
    Swap(
        "rectified a step late",
        "RAdam",
        {},
        patched("RAdam", adam_corrections, "first_rectified", lambda b2: 7),
    ),
    Swap("all rows", "SparseAdam", {}, of_rows(lambda rows, g: jnp.ones_like(rows))),
    Swap("rows by their gradient", "SparseAdam", {}, of_rows(lambda rows, g: rows & (g != 0).all(1)), "zero"),
    Swap(
        "eps after the correction",
        "SparseAdam",
        {"eps": 1e-3},
        from_state(adam.scale_by_torch_sparse_adam, eps=lambda eps, root: eps * root),
    ),
    Swap("Optax's sum", "Adagrad", {"eps": 1e-3}, around(optax.scale_by_rss(0.0, 1e-3))),
    Swap("rate decays a step early", "Adagrad", {"lr_decay": 0.5}, started("Adagrad", 1)),
    Swap("eps inside the root", "RMSprop", {"eps": 1e-3}, around(optax.scale_by_rms(0.99, 1e-3))),
    Swap("Optax's decay", "RMSprop", {}, around(optax.scale_by_rms(0.9, eps_in_sqrt=False))),
    Swap(
        "rate inside the momentum",
        "RMSprop",
        HEAVY,
        chained(optax.scale_by_rms(0.99, eps_in_sqrt=False), "lr", optax.trace(0.9)),
        moving=("lr",),
    ),
    Swap("this step's rate", "ASGD", {}, asgd(lambda s, rate: s._replace(eta=rate)), moving=("lr",)),
    Swap("weights averaged before they move", "ASGD", {}, asgd(after=lambda s, p: s._replace(ax=p)), state=True),
    Swap("Optax's late step", "Rprop", {}, lambda options: optax.rprop(options["lr"])),
    Swap(
        "a turned gradient still moves",
        "Rprop",
        {},
        patched("Rprop", steps, "_product", lambda g, p: jnp.maximum(g * p, 0) * 2.0**100),
    ),
    Swap("NaN has no sign", "Rprop", {}, nan_spreads, "nan"),
    Swap("Optax's Adafactor", "Adafactor", {}, lambda options: optax.adafactor(options["lr"])),
    Swap("NaN spreads", "Adafactor", {}, patched("Adafactor", matrix, "_at_least", jnp.maximum), "nan"),
    Swap("float32 for bfloat16", "Muon", {}, patched("Muon", matrix, "orthogonalized", in_float32)),
    Swap("a heavy ball", "Muon", {}, patched("Muon", matrix, "lerp", lambda s, e, w: (1 - w) * s + e)),
    Swap(
        "the rate of the transpose",
        "Muon",
        {},
        patched("Muon", matrix, "ADJUSTMENTS", {None: lambda rows, columns: max(1, columns / rows) ** 0.5}),
    ),
    Swap(
        "an average that keeps infinity",
        "Adam",
        {},
        patched("Adam", adam, "lerp", lambda s, e, w: (1 - w) * s + w * e),
        "infinite",
        state=True,
    ),
    Swap(
        "squares multiplied first",
        "Adam",
        {},
        patched("Adam", adam, "mean_square", lambda v, g, b: b * v + (1 - b) * (g * g)),
        "large",
        state=True,
    ),
]


@pytest.mark.parametrize("swap", SWAPS, ids=str)
def test_each_swapped_convention_is_noticed(swap: Swap) -> None:
    case = Case(swap.name, swap.options)
    assert noticed(case, swap.make, swap.kind, swap.moving, swap.state)
