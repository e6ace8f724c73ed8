"""Lifting: a traced JAX program run again with every low-precision float dtype turned into float64.

Real code says `dtype=jnp.float32` inside; a float64 run then leaves float64 arithmetic, and a right port looks wrong.
Programs are lifted whole, derivatives included: by then JAX has put every custom derivative rule where its author
wanted it. One law holds throughout: what the trace holds in low precision is held in float64, all else as traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from equivalence.runtimes.draws import TRANSPARENT, all_inner, bind, inner, scan, trace, walk
from equivalence.runtimes.jax_constants import exact, leniently, low, stays, wide, widened

LIFTABLE = frozenset(
    (
        *(getattr(primitives, name).name for name in dir(primitives) if name.endswith("_p")),
        *("split", "scatter-sub", "tile", "stack", "unstack", "broadcast_to", "optimization_barrier", "copy"),
        *("ragged_dot_general", "geqrf", "ormqr", "custom_vmap_call", "composite", "linear_call", "empty"),
    )
)
"""Primitives that take float64: JAX's public list and what it leaves out. All others (callbacks, kernels, primitives
of a user) run as they were traced."""

BITS = "bitcast_convert_type"

REMATERIALISED = ("remat", "remat2", "checkpoint")

CUSTOM = ("custom_jvp_call", "custom_vjp_call")

Shake = tuple[Any, Any]


@dataclass
class Lifted:
    """What lifting met in the programs of one subject: low precision at all, and what of it could not be lifted."""

    low: bool = False
    coarsest: float = 0.0
    """The unit roundoff of the coarsest dtype that was computed in; 0 where none was low."""
    constants: dict[str, None] = field(default_factory=dict)
    operations: dict[str, None] = field(default_factory=dict)

    @property
    def float64(self) -> str:
        """How the float64 runs are made: "native", "lifted", or "float32 only" where an operation stayed low."""
        return "float32 only" if self.operations else "lifted" if self.low else "native"

    @property
    def surviving(self) -> tuple[str, ...]:
        """Each constant and operation that stayed in low precision, in words."""
        return (*self.constants, *self.operations)


def lifted(
    function: Callable[..., Any], found: Lifted, shake: Shake | None = None, as_if: Sequence[Any] | None = None
) -> Callable[..., Any]:
    """The function of pytrees with its low-precision arithmetic in float64; x64 must be on. Differentiable.

    Args:
        found: is told what was met.
        shake: `(seed, size)`, numbers that may be traced: each element of a constant that stayed rounded, and of the
            result of an operation that stayed low, is multiplied by 1 ± size × the unit roundoff of its dtype.
        as_if: arguments, or their abstract values, with whose dtypes the function is traced; None takes those given.
    """

    def run(*args: Any) -> Any:
        closed, tree = trace(function, *(args if as_if is None else as_if))
        flat = jax.tree_util.tree_leaves(args)
        given = [
            jnp.asarray(value, wide(aval.dtype)) if low(aval.dtype) else value
            for value, aval in zip(flat, closed.in_avals, strict=True)
        ]
        lifting = _Lifting(found, shake)
        if not any(isinstance(value, jax.core.Tracer) for value in flat) and not lifting.meets(closed, given):
            return leniently(function, *args)  # as it stands: a run that is not compiled may ask whether it is traced
        return jax.tree_util.tree_unflatten(tree, lifting.run(closed, given))

    return run


def _up(value: Any) -> Any:
    return jnp.asarray(value, wide(value.dtype)) if low(value.dtype) else value


class _Lifting:
    """One pass over one program."""

    def __init__(self, found: Lifted, shake: Shake | None) -> None:
        self.found, self.shake = found, shake
        self._low: dict[Any, bool] = {}

    def run(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        """Run a closed jaxpr on lifted arguments."""
        return walk(closed, args, self.equation, self.constant)

    def meets(self, closed: Any, args: Sequence[Any]) -> bool:
        """Whether a run of the program would meet low precision, custom derivative rules looked into."""
        if not self._inside(closed) and not any(low(aval.dtype) for aval in (*closed.in_avals, *closed.out_avals)):
            return False
        tried = Lifted()
        jax.eval_shape(lambda *given: _Lifting(tried, self.shake).run(closed, given), *args)
        return tried.low

    def touches(self, eqn: Any) -> bool:
        """Whether an equation holds low precision, itself or in a program inside it, or may hide it in a rule."""
        if eqn.primitive.name in (*CUSTOM, "reduce_precision"):
            return True
        return _is_low(eqn) or _holds_widened(eqn) or any(self._inside(one) for one in all_inner(eqn))

    def _inside(self, closed: Any) -> bool:
        if closed.jaxpr not in self._low:
            self._low[closed.jaxpr] = any(self.touches(eqn) for eqn in closed.jaxpr.eqns)
        return self._low[closed.jaxpr]

    def constant(self, value: Any, aval: Any) -> Any:
        """A constant of the trace in float64: the double it was rounded from, or itself, which is noted and shaken."""
        dtype = np.dtype(np.float32) if widened(value) else aval.dtype
        if not low(dtype) or isinstance(value, jax.core.Tracer):
            return _up(value) if low(dtype) else value
        self.found.low = True
        rounded = np.asarray(value, dtype)
        doubles = exact(rounded)
        if doubles is not None:
            return doubles
        size = f"{aval.shape}" if aval.shape else f"{float(rounded):.9g}" if rounded.dtype.kind != "c" else ""
        self.found.constants[f"{rounded.dtype.name} constant {size}"] = None
        return self.shaken(rounded, ~stays(rounded))

    def shaken(self, rounded: Any, loose: Any = True) -> Any:
        """Values of low precision in float64, each moved by its rounding where `loose`; equal ones stay equal."""
        if self.shake is None:
            return _up(rounded)
        seed, size = self.shake
        places = rounded.real if jnp.issubdtype(rounded.dtype, jnp.complexfloating) else rounded
        bits = jax.lax.bitcast_convert_type(places, f"uint{8 * places.dtype.itemsize}").astype(jnp.uint32)
        bits = (bits ^ (jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x85EBCA6B))) * jnp.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
        sign = jnp.where(bits >> 31, 1.0, -1.0)
        return _up(rounded) * (1 + sign * loose * size * float(jnp.finfo(rounded.dtype).eps) / 2)

    def equation(self, eqn: Any, inputs: list[Any]) -> list[Any] | None:
        """What an equation gives in float64, or None where nothing in it is low."""
        name, params = eqn.primitive.name, eqn.params
        if name in CUSTOM:
            return self._custom(eqn, inputs)
        if name == "reduce_precision":
            self.found.low = True
            self._computed(2.0 ** -(params["mantissa_bits"] + 1))
            return inputs
        if not self.touches(eqn):
            return None
        self.found.low |= _is_low(eqn)  # what is low inside is met when it is run
        for aval in (atom.aval for atom in eqn.outvars):
            if low(aval.dtype):
                self._computed(float(jnp.finfo(aval.dtype).eps) / 2)
        if name == BITS or name not in LIFTABLE:
            return self._as_traced(eqn, inputs)
        if name in TRANSPARENT:
            called = inner(eqn)
            if name in REMATERIALISED:
                kept = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
                return list(jax.checkpoint(lambda *args: self.run(called, args), **kept)(*inputs))
            return self.run(called, inputs)
        if name == "scan":
            return scan(eqn, inputs, lambda args, _: self.run(params["jaxpr"], args))
        if name == "while":
            return self._while(eqn, inputs)
        if name == "cond":
            branches = [lambda *args, branch=branch: self.run(branch, args) for branch in params["branches"]]
            return list(jax.lax.switch(inputs[0], branches, *inputs[1:]))
        if name == "convert_element_type" and low(params["new_dtype"]) and inputs[0].dtype == wide(params["new_dtype"]):
            return inputs
        return bind(eqn, inputs, **{key: self._param(value) for key, value in params.items()})

    def _computed(self, roundoff: float) -> None:
        self.found.coarsest = max(self.found.coarsest, roundoff)

    def _param(self, value: Any) -> Any:
        """A parameter of an equation with the dtypes and programs in it lifted."""
        if isinstance(value, (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
            return None
        if isinstance(value, np.dtype) and low(value):
            return wide(value)
        if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
            return self._program(value)
        if isinstance(value, tuple):
            items = [self._param(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    def _program(self, held: Any) -> Any:
        closed = held if isinstance(held, core.ClosedJaxpr) else core.ClosedJaxpr(held, ())
        avals = [
            jax.ShapeDtypeStruct(aval.shape, wide(aval.dtype) if low(aval.dtype) else aval.dtype)
            for aval in closed.in_avals
        ]
        made = jax.make_jaxpr(lambda *args: self.run(closed, args))(*avals)
        return made if held is closed else made.jaxpr

    def _while(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        params = eqn.params
        first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]

        def going_on(state: Any) -> Any:
            return self.run(params["cond_jaxpr"], [*inputs[:first], *state])[0]

        def body(state: Any) -> Any:
            after, going = self.run(params["body_jaxpr"], [*inputs[first:last], *state]), going_on(state)
            if not jnp.ndim(going):
                return after
            # Under vmap the condition is one of each row, and rows that are done stay as they are.
            rows = [going.reshape(going.shape + (1,) * (jnp.ndim(old) - going.ndim)) for old in state]
            return [jnp.where(row, new, old) for row, new, old in zip(rows, after, state, strict=True)]

        return list(jax.lax.while_loop(lambda state: jnp.any(going_on(state)), body, inputs[last:]))

    def _as_traced(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        """An equation that takes no float64, in the precision of the trace."""
        name = eqn.primitive.name
        if eqn.outvars and (name != BITS or low(eqn.invars[0].aval.dtype)):
            names = [np.dtype(aval.dtype).name for aval in _avals((*eqn.invars, *eqn.outvars)) if low(aval.dtype)]
            self.found.operations[f"{name} in {names[0] if names else 'low precision'}"] = None
        down = [
            jnp.asarray(value, atom.aval.dtype) if low(atom.aval.dtype) else value
            for value, atom in zip(inputs, eqn.invars, strict=True)
        ]
        return [self.shaken(value) if low(value.dtype) else value for value in bind(eqn, down)]

    def _custom(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        """A function with its author's derivative rule: both are lifted, the rule from a trace of its own."""
        called, ins, outs = eqn.params["call_jaxpr"], _avals(eqn.invars), _avals(eqn.outvars)

        def as_traced(*args: Any) -> list[Any]:
            return bind(eqn, args)

        def pushed(args: Any, slopes: Any) -> Any:
            results, pushed = jax.jvp(as_traced, args, _whole(slopes, ins))
            return results, _smooth(pushed, outs)

        def pulled(args: Any, slopes: Any) -> Any:
            results, pull = jax.vjp(as_traced, *args)
            return results, _smooth(pull(_whole(slopes, outs)), ins)

        def derived(rule: Any, args: Any, slopes: Any, along: list[Any]) -> Any:
            as_if = (ins, _smooth(along, along))
            return lifted(rule, self.found, self.shake, as_if)(list(args), _smooth(slopes, along))

        def push(primals: Any, tangents: Any) -> Any:
            results, slopes = derived(pushed, primals, tangents, ins)
            return results, _whole(slopes, outs)

        def forward(*args: Any) -> Any:
            zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in outs]
            return derived(pulled, args, zeros, outs)[0], args

        def backward(args: Any, slopes: Any) -> Any:
            return tuple(_whole(derived(pulled, args, slopes, outs)[1], ins))

        if eqn.primitive.name == "custom_jvp_call":
            pushing = jax.custom_jvp(lambda *args: self.run(called, args))
            pushing.defjvp(push)
            return list(pushing(*inputs))
        pulling = jax.custom_vjp(lambda *args: self.run(called, args))
        pulling.defvjp(forward, backward)
        return list(pulling(*inputs))


def _is_low(eqn: Any) -> bool:
    """Whether an equation itself takes or gives low precision."""
    return any(low(atom.aval.dtype) for atom in (*eqn.invars, *eqn.outvars) if hasattr(atom.aval, "dtype"))


def _holds_widened(eqn: Any) -> bool:
    return any(isinstance(atom, core.Literal) and widened(atom.val) for atom in eqn.invars)


def _avals(atoms: Sequence[Any]) -> list[Any]:
    return [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in atoms]


def _smooth(slopes: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    """The slopes of what is floating."""
    return [slope for slope, aval in zip(slopes, avals, strict=True) if jnp.issubdtype(aval.dtype, jnp.inexact)]


def _whole(slopes: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    """Slopes of everything: those of integers are zeros without size."""
    given = iter(slopes)
    return [
        next(given) if jnp.issubdtype(aval.dtype, jnp.inexact) else np.zeros(aval.shape, jax.dtypes.float0)
        for aval in avals
    ]
