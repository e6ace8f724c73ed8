"""Every option of every optimizer off by a little, and every convention swapped for its neighbour: each is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from equivalence.optimizers.rules import adam, adam_corrections, common, matrix, rule_for, steps
from equivalence.optimizers.rules.common import descend, gradient_of
from tests.agreement import disagreements
from tests.rule_sides import Case, Make, overflows, port_side, torch_side
from tests.test_optimizer_rules import SHAPE, draw, fixed

Options = Mapping[str, Any]


def noticed(case: Case, make: Make, kind: str = "normal", moving: tuple[str, ...] = (), state: bool = True) -> bool:
    """Whether a wrong rule shows; with `state=False` in the parameters alone."""
    shapes = {"leaf": SHAPE} | ({"vector": (7,)} if case.name == "Adafactor" else {})
    arrays = draw(case.name, 6, shapes, 7, kind, moving)
    reference, port = torch_side([case]), port_side([Case(case.name, case.options, make, state)], compiled=False)
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
    Base("Muon", {"momentum": 0.75, "eps": 16.0, "ns_steps": 1}),
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


def ahead(make: Make, **fields: Any) -> Make:
    """The rule with other values at its start."""

    def wrong(options: Options) -> optax.GradientTransformation:
        rule = optax.with_extra_args_support(make(options))
        return optax.GradientTransformationExtraArgs(
            lambda params: optax.tree.set(rule.init(params), **fields), rule.update
        )

    return wrong


def around(*pieces: Any, decoupled: bool = False) -> Make:
    """torch's chain around another direction; a piece may be made of the options."""

    def wrong(options: Options) -> optax.GradientTransformation:
        made = [piece if isinstance(piece, optax.GradientTransformation) else piece(options) for piece in pieces]
        decay = [optax.add_decayed_weights(options["weight_decay"])] if decoupled else []
        return optax.chain(*gradient_of(options, decay=not decoupled), *made, *decay, descend(options["lr"]))

    return wrong


def patched(module: Any, name: str, value: Any) -> Make:
    """The right rule of the case's optimizer, one of its pieces replaced while it runs."""

    def wrong(options: Options) -> optax.GradientTransformation:
        kind = {"w_adam": "Adam"}.get(name, options["_name"])
        rule = optax.with_extra_args_support(rule_for(kind).make(options))

        def update(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, name, value)
                return rule.update(*args, **kwargs)

        return optax.GradientTransformationExtraArgs(rule.init, update)

    return wrong


HEAVY = {"momentum": 0.9}
DECAY = {"weight_decay": 0.1}


def _pick(function: Any, *names: str) -> Any:
    return lambda options: function(*(options[name] for name in names))


def _decay(options: Options) -> optax.GradientTransformation:
    return optax.add_decayed_weights(options["weight_decay"])


def _sign_first_lost(options: Options) -> optax.GradientTransformation:
    """maximize turns the decay too."""
    rule = rule_for("SGD").make({**options, "maximize": False})
    return optax.chain(rule, optax.scale(-1.0))


def _rows(keep: Any) -> Make:
    """SparseAdam told of other rows: `keep(rows, gradient)`."""

    def wrong(options: Options) -> optax.GradientTransformationExtraArgs:
        rule = adam.sparse_adam(options)
        return optax.GradientTransformationExtraArgs(
            rule.init, lambda g, s, p=None, *, rows: rule.update(g, s, p, rows=keep(rows, g))
        )

    return wrong


def _sparse_of_adam(options: Options) -> optax.GradientTransformationExtraArgs:
    """Adam on the rows held, with eps where Adam has it."""
    b1, b2 = options["betas"]
    right, other = adam.sparse_adam(options), adam.scale_by_torch_adam(b1, b2, options["eps"])

    def update(g: Any, s: Any, p: Any = None, *, rows: Any) -> Any:
        _, after = right.update(g, s, p, rows=rows)
        direction, _ = other.update(g, optax.tree.get(s, "ScaleByAdamState") or s[0], p)
        return jnp.where(rows[:, None], -options["lr"] * direction, 0), after

    return optax.GradientTransformationExtraArgs(right.init, update)


def _asgd(**wrong: Any) -> Make:
    """ASGD whose rate or average follows at once."""

    def make(options: Options) -> optax.GradientTransformation:
        rule = steps.asgd(options)

        def update(g: Any, s: Any, p: Any = None) -> Any:
            state = s[-1]
            if "eta" in wrong:
                state = state._replace(eta=jnp.asarray(options["lr"], float))
            change, after = rule.update(g, (*s[:-1], state), p)
            if "ax" in wrong:
                after = (*after[:-1], after[-1]._replace(ax=p))
            return change, after

        return optax.GradientTransformation(rule.init, update)

    return make


@dataclass(frozen=True)
class Swap:
    """A convention of torch's beside the one that is often taken for it."""

    what: str
    name: str
    options: Options
    make: Make
    kind: str = "normal"
    moving: tuple[str, ...] = ()
    state: bool = False


ADAM = _pick(lambda b, e: optax.scale_by_adam(*b, e), "betas", "eps")
SWAPS = [
    Swap("an average of gradients for a heavy ball", "SGD", HEAVY, around(optax.ema(0.9, debias=False))),
    Swap("dampening at the first step", "SGD", HEAVY | {"dampening": 0.5}, around(optax.scale(0.5), optax.trace(0.9))),
    Swap("decay after the momentum", "SGD", HEAVY | DECAY, lambda o: optax.chain(optax.trace(0.9), _decay(o), descend(o["lr"]))),
    Swap("decay of the first moved weights only", "SGD", HEAVY | DECAY, around(optax.trace(0.9), decoupled=True)),
    Swap("decay without the rate", "SGD", DECAY, lambda o: optax.chain(descend(o["lr"]), optax.add_decayed_weights(-0.1))),
    Swap("the rate inside the momentum", "SGD", HEAVY, lambda o: optax.chain(descend(o["lr"]), optax.trace(0.9)), moving=("lr",)),
    Swap("maximize turns the decay too", "SGD", DECAY | {"maximize": True}, _sign_first_lost),
    Swap("eps inside the root", "Adam", {"eps": 1e-3}, around(optax.scale_by_adam(eps=0.0, eps_root=1e-3))),
    Swap("eps before the bias correction", "Adam", {"eps": 1e-3}, around(lambda o: _eps_hat(o))),
    Swap("no bias correction", "Adam", {}, patched(adam, "one_minus_power", lambda b, t: jnp.ones([]))),
    Swap("the step off by one", "Adam", {}, ahead(adam.adam, count=jnp.asarray(1, jnp.int32))),
    Swap("decay decoupled", "Adam", DECAY, around(ADAM, decoupled=True)),
    Swap("decay coupled", "AdamW", DECAY, around(ADAM)),
    Swap("decay without the rate", "AdamW", DECAY, lambda o: optax.chain(ADAM(o), descend(o["lr"]), optax.add_decayed_weights(-0.1))),
    Swap("Optax's default decay", "AdamW", {}, lambda o: optax.adamw(o["lr"])),
    Swap("the maximum after the bias correction", "Adam", {"amsgrad": True}, around(optax.scale_by_amsgrad())),
    Swap("Nesterov's Adam", "Adam", {}, around(optax.scale_by_adam(nesterov=True))),
    Swap("eps added to the maximum", "Adamax", {"eps": 0.1}, lambda o: _eps_on_maximum(o)),
    Swap("a constant momentum", "NAdam", {}, around(optax.scale_by_adam(nesterov=True))),
    Swap("the product of momenta not kept", "NAdam", {}, lambda o: _nadam_power(o)),
    Swap("rectified from 5 on, eps after the correction", "RAdam", {}, around(optax.scale_by_radam())),
    Swap("rectified a step late", "RAdam", {}, lambda o: _radam_late(o)),
    Swap("all rows", "SparseAdam", {}, _rows(lambda rows, g: jnp.ones_like(rows))),
    Swap("rows without gradient left out", "SparseAdam", {}, _rows(lambda rows, g: rows & (g != 0).any(1)), "zeros"),
    Swap("eps after the bias correction", "SparseAdam", {"eps": 1e-3}, _sparse_of_adam),
    Swap("eps outside the roots", "Adadelta", {}, lambda o: _adadelta_outside(o)),
    Swap("eps inside the root", "Adagrad", {"eps": 1e-3}, around(optax.scale_by_rss(0.0, 1e-3))),
    Swap("the decay of the rate a step early", "Adagrad", {"lr_decay": 0.5}, ahead(rule_for("Adagrad").make, count=jnp.asarray(1, jnp.int32))),
    Swap("eps inside the root", "RMSprop", {"eps": 1e-3}, around(optax.scale_by_rms(0.99, 1e-3))),
    Swap("Optax's decay", "RMSprop", {}, around(optax.scale_by_rms(0.9, eps_in_sqrt=False))),
    Swap("the rate inside the momentum", "RMSprop", HEAVY, lambda o: optax.chain(optax.scale_by_rms(0.99, eps_in_sqrt=False), descend(o["lr"]), optax.trace(0.9)), moving=("lr",)),
    Swap("the rate of this step", "ASGD", {}, _asgd(eta=True), moving=("lr",)),
    Swap("the average of the weights before", "ASGD", {"t0": 2.0}, _asgd(ax=True), state=True),
    Swap("Optax's late step", "Rprop", {}, lambda o: optax.rprop(o["lr"])),
    Swap("a turned gradient still moves", "Rprop", {}, patched(steps, "_agreement", lambda g, p: jnp.maximum(jnp.sign(g * p), 0).astype(int))),
    Swap("signs that do not underflow", "Rprop", {}, patched(steps, "_agreement", lambda g, p: (jnp.sign(g) * jnp.sign(p)).astype(int)), "tiny"),
    Swap("the sign of NaN", "Rprop", {}, patched(steps, "_sign", jnp.sign), "nan", state=True),
    Swap("Optax's small matrices", "Adafactor", {}, lambda o: optax.adafactor(o["lr"])),
    Swap("NaN spreads from one element", "Adafactor", {}, patched(matrix, "_at_least", jnp.maximum), "nan", state=True),
    Swap("the plain average for an infinite gradient", "Adam", {}, patched(adam, "lerp", lambda s, e, w: (1 - w) * s + w * e), "infinite", state=True),
    Swap("squares multiplied first", "Adam", {}, patched(adam, "mean_square", lambda v, g, b: b * v + (1 - b) * (g * g)), "large", state=True),
    Swap("float32 for bfloat16", "Muon", {}, patched(matrix, "_bfloat16", lambda a: a.astype(jnp.float32))),
    Swap("a heavy ball", "Muon", {"nesterov": False}, patched(matrix, "lerp", lambda s, e, w: s * (1 - w) + e), state=True),
    Swap("the rate of wide matrices", "Muon", {}, patched(matrix, "ADJUSTMENTS", {None: lambda r, c: max(1, c / r) ** 0.5})),
]  # fmt: skip
