"""Lifted programs: what code hard-codes in float32 runs in float64, as the same program written in float64 would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - they need jax
import optax  # noqa: E402
from jax.extend import core  # noqa: E402

from equivalence.numerics import distance, finite, rms  # noqa: E402
from equivalence.runtimes.draws import draws_of, with_draws  # noqa: E402
from equivalence.runtimes.jax import environment  # noqa: E402
from equivalence.runtimes.jax_constants import Memory  # noqa: E402
from equivalence.runtimes.jax_lift import LIFTABLE, Lifted, lifted  # noqa: E402

Function = Callable[..., Any]
X = np.random.default_rng(0).uniform(0.5, 1.5, 5)
W = np.random.default_rng(1).uniform(-0.8, 0.8, (5, 5))


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with environment(64, Memory()):
        yield


def base(x: Any, w: Any, low: Any) -> Any:
    x = jnp.sin(x.astype(low)) * (1 / 3) + jnp.asarray(0.1, low)
    x = jax.lax.dot_general(w.astype(low), x, (((1,), (0,)), ((), ())), preferred_element_type=low)
    return x + jnp.arange(5, dtype=low) / jnp.full((5,), 7, low) - jnp.linspace(0, 1, 5, dtype=low)


def in_jit(f: Function, low: Any) -> Function:
    return jax.jit(lambda x, w: jax.nn.gelu(f(x, w).astype(low)))


def in_remat(f: Function, low: Any) -> Function:
    return jax.checkpoint(lambda x, w: jnp.tanh(f(x, w).astype(low) * np.sqrt(0.3)))


def in_scan(f: Function, low: Any) -> Function:
    def run(x: Any, w: Any) -> Any:
        def body(state: Any, row: Any) -> Any:
            return (0.5 * f(state, w) + row).astype(low), (state * row).astype(low)

        last, all_ = jax.lax.scan(body, x.astype(low), jnp.cos(w.astype(low))[:3], reverse=True)
        return last + all_.sum(0)

    return run


def in_while(f: Function, low: Any) -> Function:
    def run(x: Any, w: Any) -> Any:
        scaled = w.astype(low) * 0.25

        def body(state: Any) -> Any:
            count, value = state
            return count + 1, (f(value, scaled) * 0.9).astype(low)

        return jax.lax.while_loop(lambda s: (s[0] < 3) & (jnp.sum(scaled) < 99), body, (0, x.astype(low)))[1]

    return run


def in_rows_of_while(f: Function, low: Any) -> Function:
    def run(x: Any, w: Any) -> Any:
        def row(v: Any) -> Any:
            start = (0, jnp.abs(f(v, w)).astype(low))
            return jax.lax.while_loop(lambda s: jnp.sum(s[1]) < 4, lambda s: (s[0] + 1, s[1] * 1.2 + 0.1), start)

        counts, rows = jax.vmap(row)(jnp.stack([x, x * 0.1, x * 3]).astype(low))
        return jnp.sum(rows * counts[:, None], 0)

    return run


def in_cond(f: Function, low: Any) -> Function:
    return lambda x, w: jax.lax.cond(
        jnp.sum(x) > 0, lambda v: f(v, w).astype(low), lambda v: v.astype(low) * 0.7, x.astype(low)
    )


def in_switch(f: Function, low: Any) -> Function:
    branches = [lambda v, w: v.astype(low), lambda v, w: f(v, w).astype(low), lambda v, w: (v * v).astype(low)]
    return lambda x, w: jax.lax.switch(jnp.argmax(x) % 2 + 1, branches, x, w)


def in_custom_jvp(f: Function, low: Any) -> Function:
    @jax.custom_jvp
    def ruled(x: Any, w: Any, power: Any) -> Any:
        return f(x, w).astype(low) ** power

    @ruled.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        x = primals[0]
        return ruled(*primals), (1.7 * jnp.exp(-x.astype(low)) * tangents[0] + (tangents[1] @ x)).astype(low)

    return lambda x, w: ruled(x, w, 2)


def in_custom_vjp(f: Function, low: Any) -> Function:
    @jax.custom_vjp
    def ruled(x: Any, w: Any, power: Any) -> Any:
        return f(x, w).astype(low) ** power

    def forward(x: Any, w: Any, power: Any) -> Any:
        return ruled(x, w, power), (x, jnp.sin(w.astype(low)))

    def backward(kept: Any, slope: Any) -> Any:
        x, sines = kept
        return (slope * x.astype(low) / 3).astype(x.dtype), (slope * sines).astype(jnp.float64), None

    ruled.defvjp(forward, backward)
    return lambda x, w: ruled(x, w, 2)


def in_solve(f: Function, low: Any) -> Function:
    return lambda x, w: jnp.linalg.solve(jnp.eye(5, dtype=low) * 3 + w.astype(low), f(x, w).astype(low))


def in_scatter(f: Function, low: Any) -> Function:
    return lambda x, w: (
        f(x, w).astype(low).at[jnp.array([1, 3, 3])].add(x.astype(low)[:3])
        + jax.lax.reduce(w.astype(low), jnp.zeros((), low), lambda a, b: a + 0.5 * b, (1,))
        + jnp.cumsum(jax.nn.logsumexp(w.astype(low), axis=0))
        + jnp.sort(w[0].astype(low))[::-1]
    )


WRAPS: dict[str, Callable[[Function, Any], Function]] = {
    name.removeprefix("in_"): wrap for name, wrap in dict(globals()).items() if name.startswith("in_")
}


def program(kinds: tuple[str, ...], low: Any) -> Function:
    """A program of these constructs, one inside the other, that computes in `low` throughout."""

    def made(x: Any, w: Any) -> Any:
        return base(x, w, low)

    for kind in kinds:
        made = WRAPS[kind](made, low)
    return lambda x, w: jnp.asarray(made(x, w), jnp.float64) * 2.0


def slopes(kinds: tuple[str, ...], function: Function) -> Function:
    """Everything seen of a program: results and derivatives, in those modes that its constructs allow."""

    def seen(x: Any, w: Any) -> Any:
        found = {"result": function(x, w)}
        if not {"while", "rows_of_while"} & set(kinds):
            found["reverse"] = jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums=(0, 1))(x, w)
        if "custom_vjp" not in kinds:
            found["forward"] = jax.jvp(function, (x, w), (jnp.cos(x), jnp.sin(w)))
        return found

    return seen


def same(first: Any, second: Any, ulps: float = 0) -> bool:
    """In float64 on both sides and equal, but for so many units of float64's roundoff of the array's size."""
    unit = ulps * 2.0**-53
    return all(
        a.dtype == b.dtype == jnp.float64
        and finite(distance(np.asarray(a), np.asarray(b))) <= unit * rms(np.asarray(b))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def judge(kinds: tuple[str, ...], x: Any, w: Any) -> None:
    """The derivatives of the lifted program, and the lifted derivatives, are those of the one written in float64.

    XLA fuses what it compiles as a whole otherwise than what was lifted out of inner programs: a few ulps of it.
    """
    written = program(kinds, jnp.float32)
    native = jax.jit(slopes(kinds, program(kinds, jnp.float64)))(x, w)
    outside, inside = slopes(kinds, lifted(written, Lifted())), lifted(slopes(kinds, written), Lifted())
    made = jax.jit(lambda x, w: (outside(x, w), inside(x, w)))(x, w)
    assert same((native, native), made, ulps=64)


@pytest.mark.parametrize("kind", ["base", *WRAPS])
def test_a_lifted_program_is_the_one_written_in_float64(kind: str) -> None:
    judge(() if kind == "base" else (kind,), X, W)


@settings(max_examples=5, phases=[Phase.generate])  # what costs is compiling a structure
@given(st.lists(st.sampled_from(sorted(WRAPS)), min_size=2, max_size=3), st.integers(0, 2**31))
def test_constructs_inside_one_another_are_lifted(kinds: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    judge(tuple(kinds), rng.uniform(-1, 1, 5), rng.uniform(-0.8, 0.8, (5, 5)))


def test_without_lifting_it_would_not_be() -> None:
    native = program((), jnp.float64)(X, W)
    assert same(native, lifted(program((), jnp.float32), Lifted())(X, W))
    assert not same(native, program((), jnp.float32)(X, W), ulps=1e6)


@pytest.mark.parametrize("low", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_every_lower_precision_is_lifted(low: Any) -> None:
    def run(x: Any, low: Any, middle: Any) -> Any:
        return jnp.exp(jnp.asarray(x, low).astype(middle)).sum() * jnp.asarray(3, low).astype(middle)

    assert same(lifted(lambda x: run(x, low, jnp.float32), Lifted())(X), run(X, jnp.float64, jnp.float64))


def test_a_lifted_program_compiles_and_complex_numbers_are_lifted() -> None:
    def run(x: Any, real: Any, both: Any) -> Any:
        return jnp.abs(jnp.fft.fft(x.astype(real)).astype(both) * (0.3 + 0.1j)).sum()

    low = jax.jit(lifted(lambda x: run(x, jnp.float32, jnp.complex64), Lifted()))(X)
    high = jax.jit(lambda x: run(x, jnp.float64, jnp.complex128))(X)
    assert same(low, high)


def test_simulated_rounding_is_dropped() -> None:
    found = Lifted()
    assert same(lifted(lambda x: jax.lax.reduce_precision(x, 8, 7), found)(X), jnp.asarray(X))
    assert found.float64 == "lifted"


def test_a_program_without_low_precision_is_run_as_it_is() -> None:
    calls = []

    def run(x: Any) -> Any:
        calls.append(x)
        return jnp.sin(x)

    found = Lifted()
    lifted(run, found)(X)
    assert calls[-1] is X
    assert (found.float64, found.surviving) == ("native", ())


def test_integers_are_left_alone() -> None:
    def run(x: Any) -> Any:
        places = jnp.floor(x.astype(jnp.float32) * 10).astype(jnp.int32)
        return {"wrapped": places * jnp.int32(2**30), "places": places, "largest": jnp.argmax(x.astype(jnp.float32))}

    made = lifted(run, Lifted())(X)
    assert {name: value.dtype.name for name, value in made.items()} == {
        "wrapped": "int32",
        "places": "int32",
        "largest": "int64",
    }
    np.testing.assert_array_equal(made["places"], np.floor(X * 10))


# --- what cannot be lifted --------------------------------------------------------------------------------------------


def host_sine(x: Any) -> Any:
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_a_callback_runs_as_it_was_traced_and_is_said_to() -> None:
    found = Lifted()
    made = lifted(lambda x: host_sine(x.astype(jnp.float32)) * 0.1, found)(X)
    assert same(made, jnp.asarray(np.sin(X.astype(np.float32)).astype(np.float64) * 0.1))
    assert (found.float64, found.surviving) == ("float32 only", ("pure_callback in float32",))


def test_a_callback_in_float64_hinders_nothing() -> None:
    found = Lifted()
    assert same(lifted(lambda x: host_sine(x) + x.astype(jnp.float32), found)(X), jnp.asarray(np.sin(X) + X))
    assert found.float64 == "lifted"


def test_tricks_with_bits_keep_the_bits_that_they_were_written_for() -> None:
    def inverse_root(x: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
        guess = jax.lax.bitcast_convert_type(0x5F3759DF - (bits >> 1), jnp.float32)
        return guess * (1.5 - 0.5 * x * guess * guess)

    found = Lifted()
    made = lifted(inverse_root, found)(X)
    assert np.max(np.abs(made * np.sqrt(X) - 1)) < 2e-3
    assert found.float64 == "float32 only"


def test_random_bits_are_those_of_the_trace() -> None:
    def run(key: Any) -> Any:
        return jax.random.uniform(key, (7,), jnp.float32), jax.random.bits(key, (3,), "uint8")

    uniform, bits = lifted(run, Lifted())(jax.random.key(3))
    assert bits.dtype == jnp.uint8
    np.testing.assert_array_equal(uniform, np.asarray(run(jax.random.key(3))[0], np.float64))


def test_a_users_own_primitive_runs_in_the_precision_it_was_written_for() -> None:
    mine = core.Primitive("mine")
    mine.def_impl(lambda x: x + x)
    mine.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    found = Lifted()
    made = lifted(lambda x: mine.bind(x.astype(jnp.float32)), found)(X)
    assert same(made, jnp.asarray(2.0 * X.astype(np.float32).astype(np.float64)))
    assert found.surviving == ("mine in float32",)


def test_primitives_of_others_are_not_taken_for_ours() -> None:
    assert {"pallas_call", "ffi_call", "pure_callback", "io_callback"}.isdisjoint(LIFTABLE)
    assert {"dot_general", "conv_general_dilated", "reduce_sum", "scatter-add", "cumsum", "erf", "sort"} <= LIFTABLE


# --- constants --------------------------------------------------------------------------------------------------------

TABLE = np.sin(np.arange(12.0)).astype(np.float32).reshape(3, 4)


def with_table(x: Any) -> Any:
    return jnp.asarray(TABLE) * x[0].astype(jnp.float32)


def test_a_table_rounded_before_is_listed() -> None:
    found = Lifted()
    made = lifted(with_table, found)(X)
    np.testing.assert_array_equal(made, TABLE.astype(np.float64) * X[0])
    assert (found.float64, found.surviving) == ("lifted", ("float32 constant (3, 4)",))


@given(st.integers(0, 2**32 - 1))
def test_what_survived_is_shaken_by_its_rounding(seed: int) -> None:
    still = np.asarray(lifted(with_table, Lifted(), (seed, 0.0))(X))
    moved = np.asarray(lifted(with_table, Lifted(), (seed, 1.0))(X))
    np.testing.assert_array_equal(still, lifted(with_table, Lifted())(X))
    change = np.divide(moved, still, out=np.ones_like(still), where=still != 0) - 1
    assert moved[0, 0] == 0
    np.testing.assert_array_equal(np.round(np.abs(change.ravel()[1:]) * 2**24, 6), 1)


def test_seeds_shake_otherwise_and_in_one_compiled_program() -> None:
    run = jax.jit(lambda seed, x: lifted(with_table, Lifted(), (seed, 1.0))(x))
    made = [np.asarray(run(np.uint32(seed), X)) for seed in (1, 2, 1)]
    assert np.array_equal(made[0], made[2])
    assert not np.array_equal(made[0], made[1])
    assert run._cache_size() == 1


def test_the_result_of_a_callback_is_shaken() -> None:
    def run(x: Any) -> Any:
        return host_sine(x.astype(jnp.float32))

    change = np.asarray(lifted(run, Lifted(), (3, 1.0))(X) / lifted(run, Lifted())(X) - 1)
    np.testing.assert_array_equal(np.round(np.abs(change) * 2**24, 6), 1)


# --- draws and optimizers ---------------------------------------------------------------------------------------------


def test_draws_inside_a_lifted_program_are_served_in_float64() -> None:
    def noisy(x: Any) -> Any:
        def body(state: Any, key: Any) -> Any:
            return state + jax.random.normal(key, (5,), jnp.float32) * 0.1, None

        start = x.astype(jnp.float32) * jax.random.uniform(jax.random.key(1), (5,), jnp.float32, 0.5, 2.0)
        return jax.lax.scan(body, start, jax.random.split(jax.random.key(0), 3))[0]

    assert len(draws_of(noisy, X)) == 4
    served = list(np.random.default_rng(5).uniform(0.1, 0.9, (4, 5)))
    made = lifted(with_draws(noisy), Lifted())(served, X)
    wanted = jnp.asarray(X * (served[0] * 1.5 + 0.5))
    for draw in served[1:]:
        wanted = wanted + draw * 0.1
    assert same(made, wanted)


def test_accumulators_that_optax_makes_in_float32_are_lifted() -> None:
    optimizer = optax.MultiSteps(optax.sgd(optax.linear_schedule(0.3, 0.1, 7)), 3)
    gradients = np.random.default_rng(2).standard_normal((6, 5))
    params = jnp.asarray(X)
    found = Lifted()
    held = jax.eval_shape(optimizer.init, params)
    state = lifted(optimizer.init, found)(params)
    step = jax.jit(lifted(optimizer.update, found, as_if=(params, held, params)))
    for gradient in gradients:
        updates, state = step(jnp.asarray(gradient), state, params)
        params = params + updates
    wanted = X - 0.3 * gradients[:3].mean(0) - (0.3 - 0.2 / 7) * gradients[3:].mean(0)
    assert np.max(np.abs(params - wanted)) < 2e-15
    assert found.float64 == "lifted"
