"""Random draws of a traced JAX program: found in its jaxpr, compared, and replaced by the tape's arrays.

Why in the traced program and not by patching `jax.random`: a patched function sees no draw in an inner program that
was traced before, and one draw for a scan of five. In the jaxpr every draw is an equation that calls one of
`jax.random`'s own compiled functions (`_bernoulli`, `_uniform`, ...), inside whatever pjit, scan, remat or custom
derivative rule it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from equivalence.errors import UnsupportedDraw
from equivalence.randomness import Draw
from equivalence.runtimes.jax_constants import leniently

SAMPLERS = {
    "_bernoulli": "bernoulli",
    "_uniform": "uniform",
    "_normal": "normal",
    "_normal_real": "normal",
    "_exponential": "exponential",
    "_gumbel": "gumbel",
}
"""jax.random's compiled samplers by the name they carry in a jaxpr, and the tape's kind."""

RAW_BITS = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
"""Primitives that make random bits; outside a known sampler no reference can be asked for the same."""

FOLDED = ("convert_element_type", "broadcast_in_dim", "stop_gradient", "sub", "add", "mul", "div", "neg", "max", "min")
"""Operations through which a constant probability is followed."""

TRANSPARENT = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
"""Calls that may be opened without changing a derivative; a custom rule around a draw may not."""

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def _sampler(eqn: Any) -> str | None:
    name = eqn.params.get("name")
    if not isinstance(name, str) or "jaxpr" not in eqn.params:
        return None
    return SAMPLERS.get(name if name.startswith("_") else f"_{name}")


def inner(eqn: Any) -> Any | None:
    """The one closed jaxpr that a call-like equation runs, or None."""
    for key in _INNER:
        found = eqn.params.get(key)
        if found is not None:
            return found if hasattr(found, "consts") else core.ClosedJaxpr(found, ())
    return None


def all_inner(eqn: Any) -> Iterator[Any]:
    """Every inner program among an equation's params, closed."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item if hasattr(item, "consts") else core.ClosedJaxpr(item, ())


def _draws_inside(eqn: Any) -> bool:
    if _sampler(eqn) or eqn.primitive.name in RAW_BITS:
        return True
    return any(_draws_inside(one) for closed in all_inner(eqn) for one in closed.jaxpr.eqns)


def find(closed: Any, known: Sequence[Any] | None = None) -> list[Draw]:
    """The draws of a closed jaxpr, in order, scans unrolled.

    `known` holds a concrete value for each argument whose value is known, else None. Raises UnsupportedDraw for bits
    drawn outside `jax.random`'s samplers, for draws in a while loop or in branches, and for a probability that
    depends on data.
    """
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = {}
    for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
        values[var] = const
    for var, given in zip(jaxpr.invars, known or [None] * len(jaxpr.invars), strict=True):
        if given is not None:
            values[var] = given

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values.get(atom)

    draws: list[Draw] = []
    for eqn in jaxpr.eqns:
        inputs = [value(atom) for atom in eqn.invars]
        kind = _sampler(eqn)
        if kind is not None:
            draws.append(_draw(kind, eqn, inputs))
        elif eqn.primitive.name in RAW_BITS:
            raise UnsupportedDraw(f"the port draws random bits by {eqn.primitive.name}, outside jax.random's samplers")
        elif _draws_inside(eqn):
            draws += _nested(eqn, inputs)
        elif eqn.primitive.name in FOLDED and all(item is not None and np.size(item) <= 16 for item in inputs):
            values[eqn.outvars[0]] = np.asarray(eqn.primitive.bind(*inputs, **eqn.params))
    return draws


def _draw(kind: str, eqn: Any, inputs: list[Any]) -> Draw:
    shape = tuple(eqn.outvars[0].aval.shape)
    if kind == "gumbel":
        return Draw("exponential", shape)
    if kind != "bernoulli":
        return Draw(kind, shape)
    probability = inputs[1]
    if probability is None:
        raise UnsupportedDraw(f"the port draws bernoulli {shape} with a probability that depends on data")
    return Draw(kind, shape, float(np.asarray(probability).reshape(-1)[0]))


def _nested(eqn: Any, inputs: list[Any]) -> list[Draw]:
    name = eqn.primitive.name
    if name == "scan":
        consts = eqn.params["num_consts"]
        known = [*inputs[:consts], *[None] * (len(inputs) - consts)]
        return find(eqn.params["jaxpr"], known) * int(eqn.params["length"])
    called = inner(eqn)
    if called is None or name not in TRANSPARENT:
        raise UnsupportedDraw(f"the port draws random numbers inside {name}, which the tape cannot follow")
    return find(called, inputs)


def trace(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """`(closed jaxpr, output tree)` of a function of pytrees; arguments may be abstract."""
    made = jax.make_jaxpr(function, return_shape=True)
    closed, shape = leniently(made, *args)
    return closed, jax.tree_util.tree_structure(shape)


def draws_of(function: Callable[..., Any], *args: Any) -> list[Draw]:
    """The draws that `function(*args)` asks for; nothing is computed."""
    return find(trace(function, *args)[0])


def with_draws(function: Callable[..., Any]) -> Callable[..., Any]:
    """`new(draws, *args)`: the function with its draws replaced, in order, by the arrays of `draws`.

    Without draws the function is called as it is.
    """

    def replaced(draws: Sequence[Any], *args: Any) -> Any:
        if not draws:
            return function(*args)
        closed, tree = trace(function, *args)
        flat = jax.tree_util.tree_leaves(args)
        results = evaluate(closed, flat, list(draws))
        return jax.tree_util.tree_unflatten(tree, results)

    return replaced


Rule = Callable[[Any, list[Any]], "list[Any] | None"]
"""What an equation gives, from the equation and its inputs; None where it is to run as it stands."""


def evaluate(closed: Any, args: Sequence[Any], draws: list[Any]) -> list[Any]:
    """Run a closed jaxpr, taking draws off the front of `draws`."""

    def rule(eqn: Any, inputs: list[Any]) -> list[Any] | None:
        kind = _sampler(eqn)
        if kind is not None:
            return [_served(kind, draws.pop(0), inputs, eqn.outvars[0].aval)]
        if not _draws_inside(eqn):
            return None
        return _scan(eqn, inputs, draws) if eqn.primitive.name == "scan" else evaluate(inner(eqn), inputs, draws)

    return walk(closed, args, rule)


def walk(closed: Any, args: Sequence[Any], rule: Rule, constant: Callable[[Any, Any], Any] | None = None) -> list[Any]:
    """Run a closed jaxpr equation by equation as `rule` says; `constant(value, aval)` stands for each constant."""
    made = constant or (lambda value, aval: value)
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = {
        var: made(value, var.aval) for var, value in zip(jaxpr.constvars, closed.consts, strict=True)
    }
    values.update(zip(jaxpr.invars, args, strict=True))

    def value(atom: Any) -> Any:
        return made(atom.val, atom.aval) if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [value(atom) for atom in eqn.invars]
        results = rule(eqn, inputs)
        values.update(zip(eqn.outvars, bind(eqn, inputs) if results is None else results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def bind(eqn: Any, inputs: Sequence[Any], **other: Any) -> list[Any]:
    """Run one equation, with `other` params where given; custom derivative rules and inner programs are kept."""
    bound = eqn.primitive.get_bind_params({**eqn.params, **other})
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair before jax 0.10
    with eqn.ctx.manager:
        outcome = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outcome) if eqn.primitive.multiple_results else [outcome]


def _served(kind: str, draw: Any, inputs: list[Any], aval: Any) -> Any:
    if kind == "bernoulli":
        return jnp.asarray(draw, bool)
    standard = jnp.asarray(draw, aval.dtype)
    if kind == "uniform":
        low, high = inputs[1], inputs[2]
        return standard * (high - low) + low
    return -jnp.log(standard) if kind == "gumbel" else standard


def _scan(eqn: Any, inputs: list[Any], draws: list[Any]) -> list[Any]:
    """A scan whose body draws: the draws of all iterations become one more sequence that it scans over."""
    consts, length, body = int(eqn.params["num_consts"]), int(eqn.params["length"]), eqn.params["jaxpr"]
    known = [item if isinstance(item, (np.ndarray, np.generic, int, float)) else None for item in inputs[:consts]]
    count = len(find(body, [*known, *[None] * (len(inputs) - consts)]))
    taken = [draws.pop(0) for _ in range(count * length)]
    stacked = [jnp.stack([jnp.asarray(taken[i * count + j]) for i in range(length)]) for j in range(count)]
    return scan(eqn, inputs, lambda args, random: evaluate(body, args, list(random)), stacked)


def scan(
    eqn: Any, inputs: list[Any], body: Callable[[list[Any], Sequence[Any]], list[Any]], more: Sequence[Any] = ()
) -> list[Any]:
    """Run a scan's equation with another body: `body(inputs, row of each of more) -> results`."""
    consts, carry = int(eqn.params["num_consts"]), int(eqn.params["num_carry"])

    def step(state: Any, given: Any) -> tuple[Any, Any]:
        sequences, rows = given
        results = body([*inputs[:consts], *state, *sequences], rows)
        return tuple(results[:carry]), tuple(results[carry:])

    final, outputs = jax.lax.scan(
        step,
        tuple(inputs[consts : consts + carry]),
        (tuple(inputs[consts + carry :]), tuple(more)),
        length=int(eqn.params["length"]),
        reverse=bool(eqn.params["reverse"]),
        unroll=eqn.params["unroll"],
    )
    return [*final, *outputs]
