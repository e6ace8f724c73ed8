"""Constants that a trace rounds: kept in float64, recovered as what was written, or said to survive."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - they need jax

from equivalence.runtimes import jax_constants  # noqa: E402
from equivalence.runtimes.closed_forms import closed_form  # noqa: E402
from equivalence.runtimes.jax import environment  # noqa: E402
from equivalence.runtimes.jax_constants import Memory, exact, stays, watched  # noqa: E402
from equivalence.runtimes.jax_lift import Lifted, lifted  # noqa: E402

X = np.random.default_rng(0).uniform(0.5, 1.5, 6)
IRRATIONAL = np.sin(np.arange(1.0, 21.0)).astype(np.float32)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with environment(64, Memory()):
        yield


def same(made: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal but for what float64 rounds at the size of the largest element."""
    return bool(np.max(np.abs(made - wanted)) <= 2.0**-49 * max(1.0, np.max(np.abs(wanted))))


def found(function: Any, *args: Any) -> tuple[Any, tuple[str, ...]]:
    seen = Lifted()
    return np.asarray(lifted(function, seen)(*args)).view(np.ndarray), seen.surviving


@given(st.integers(1, 999_999), st.integers(-20, 20), st.booleans())
def test_a_decimal_of_six_digits_is_recovered_unless_it_is_alone(digits: int, power: int, negative: bool) -> None:
    written = float(f"{'-' if negative else ''}{digits}e{power}")
    rounded = np.float32(written)
    wanted = float(rounded) if stays(rounded) else written
    made = exact(np.float32([rounded, 0.71]))
    assert made is not None
    assert made.tolist() == [wanted, 0.71] or written == -0.71
    alone = exact(np.array(rounded))
    if closed_form(float(rounded)) is None and (digits <= 99_999 or stays(rounded)):
        assert alone == wanted


@pytest.mark.parametrize("of", [lambda n: 1 / n, np.sqrt, lambda n: 1 / np.sqrt(n)], ids=["1/n", "sqrt", "rsqrt"])
def test_a_number_that_is_a_short_decimal_by_chance_is_not_taken_for_it(of: Any) -> None:
    """One in twenty is of six digits: 1/sqrt(47), sqrt(35), 1/101."""
    for number in np.arange(1.0, 1025.0):
        made = exact(np.array(of(number), np.float32))
        assert made is None or abs(float(made) / of(number) - 1) < 2.0**-50


def test_a_complex_number_keeps_its_shape() -> None:
    turned = exact(np.array(0.1 + 1j, np.complex64))
    assert turned is not None
    assert turned.shape == ()
    made, _ = found(lambda x: jnp.real((x.astype(jnp.float32) * 1j)[None] * (1j * x.astype(jnp.float32))[:, None]), X)
    assert same(made, -X[None] * X[:, None])


@pytest.mark.parametrize("make", [np.float32, jnp.float32, lambda n: np.array(n, np.float32)], ids=["np", "jnp", "0-d"])
def test_a_float32_number_beside_float64_is_recovered_or_survives(make: Any) -> None:
    made, surviving = found(lambda x: make(0.1) * x, X)
    assert same(made, 0.1 * X)
    assert surviving == ()


@pytest.mark.parametrize("make", [np.float32, lambda n: np.array(n, np.float32)], ids=["np", "0-d"])
def test_a_float32_number_beside_float64_that_nothing_names_survives(make: Any) -> None:
    held = make(np.exp(-3.7))
    made, surviving = found(lambda x: jax.jit(lambda x: jnp.maximum(held, x))(x) * held, X)
    assert same(made, np.maximum(float(held), X) * float(held))
    assert surviving == (f"float32 constant {float(held):.9g}",)


def test_user_code_may_insist_on_numpy_as_it_is() -> None:
    def insists(x: Any) -> Any:
        table = np.arange(6, dtype=np.float32)
        assert type(table) is np.ndarray
        assert table.dtype == np.float32
        return x * (table.view(np.int32) % 7)

    with jax_constants.unwatched():
        bits = np.arange(6, dtype=np.float32).view(np.int32) % 7
    assert same(found(insists, X)[0], X * bits)


def test_limits_are_float32s_in_this_thread_and_block_and_put_back_in_any_order() -> None:
    ours = jnp.finfo, np.finfo
    started, ended = threading.Event(), threading.Event()
    seen: list[Any] = []

    def other() -> None:
        seen.append(jnp.finfo(jnp.float64).bits)
        with environment(64):
            started.set()
            ended.wait(9)
            seen.append((jnp.finfo(np.float64).bits, np.finfo(np.float64).bits, np.finfo(np.float16).bits))

    thread = threading.Thread(target=other)
    with environment(64):
        thread.start()
        started.wait(9)
        assert np.finfo(X.dtype).eps == jnp.finfo(X.dtype).eps == 2.0**-23
    ended.set()
    thread.join()
    assert seen == [64, (32, 32, 16)]
    assert (jnp.finfo, np.finfo) == ours


@pytest.mark.parametrize(
    "value", [1 / 48, math.sqrt(12), 1 / math.sqrt(80), math.sqrt(2 / math.pi), math.pi, 2 * math.pi, math.log(2)]
)
def test_a_number_that_code_computes_is_recovered(value: float) -> None:
    assert exact(np.array(-value, np.float32)) == -value


@pytest.mark.parametrize("exactly", [0.0, 3.0, -2097151.0, 2.0**-23, np.inf, np.finfo(np.float32).min, 0.375])
def test_exact_numbers_stay(exactly: float) -> None:
    assert exact(np.array([exactly, 0.1], np.float32)).tolist() == [exactly, 0.1]
    assert stays(np.array([exactly, 0.1], np.float32)).tolist() == [True, False]


def test_what_is_none_of_these_is_not_guessed() -> None:
    assert exact(IRRATIONAL) is None
    assert exact(np.append(np.float32(0.1), IRRATIONAL)) is None
    assert exact(np.append(np.full(20, 0.1, np.float32), IRRATIONAL)) is None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fewer_digits_are_believed_of_a_narrower_dtype(dtype: Any) -> None:
    assert exact(np.array(0.1, dtype)) == 0.1
    assert exact(IRRATIONAL.astype(dtype)) is None


def test_a_python_number_keeps_all_its_digits() -> None:
    third = 1.0000000001 / 3
    made, surviving = found(lambda x: x.astype(jnp.float32) * third + jnp.full((6,), third * 2, jnp.float32), X)
    assert same(made, X * third + third * 2)
    assert surviving == ()


def test_a_number_beyond_a_narrow_dtype_is_no_trouble() -> None:
    made, surviving = found(lambda x: x.astype(jnp.float32) * 1.23456789e30 * 1.23456789e-30, X)
    assert same(made, X * 1.23456789 * 1.23456789)
    assert surviving == ()


def test_a_table_that_jax_rounds_keeps_all_its_digits() -> None:
    table = np.cos(X)
    made, surviving = found(lambda x: jnp.asarray(table, jnp.float32) * x.astype(jnp.float32), X)
    np.testing.assert_array_equal(made, table * X)
    assert surviving == ()


def test_two_numbers_that_round_to_one_are_not_told_apart() -> None:
    one, other = 1.23456789, 1.23456789 * (1 + 1e-12)
    made, surviving = found(lambda x: (x.astype(jnp.float32) * one) + (x.astype(jnp.float32) * other), X)
    assert same(made, X * float(np.float32(one)) * 2)
    assert surviving == ("float32 constant 1.23456788",)


@jax.jit
def scaled(x: jax.Array, number: Any) -> jax.Array:
    return x.astype(jnp.float32) * jnp.float32(0.7654321)


def test_a_function_that_jax_traced_for_another_memory_is_traced_again() -> None:
    for _ in range(2):
        with environment(64, jax_constants.Memory()):
            made, surviving = found(lambda x: scaled(x, 1), X)
        assert same(made, X * 0.7654321)
        assert surviving == ()


def test_what_other_programs_rounded_before_does_not_matter() -> None:
    for number in (0.3, 0.300000001, 0.3):
        with environment(64, jax_constants.Memory()):
            assert same(found(lambda x, number=number: x.astype(jnp.float32) * number, X)[0], X * number)


def sinusoids(positions: int, size: int, base: float = 10000.0) -> Any:
    """The table of a rotary embedding, computed with NumPy in float32 as ports do."""
    rates = 1.0 / (base ** (np.arange(0, size, 2, dtype=np.float32) / size))
    angles = np.einsum("i,j->ij", np.arange(positions), rates).astype("float32")
    out = np.zeros((positions, size))
    out[:, : size // 2] = np.sin(np.concatenate([angles]))
    out[:, size // 2 :] = np.cos(angles)
    return jnp.array(out.astype(np.float32))


def test_a_table_computed_with_numpy_in_the_trace_stays_in_float64() -> None:
    made, surviving = found(lambda x: sinusoids(300, 6)[x], np.arange(300))
    angles = np.arange(300.0)[:, None] / 10000.0 ** (np.arange(0.0, 6.0, 2.0) / 6)
    assert same(made, np.concatenate([np.sin(angles), np.cos(angles)], 1))
    assert surviving == ()


def test_only_user_code_in_this_thread_is_watched() -> None:
    kept = np.arange(3.0)
    assert np.arange(3, dtype=np.float32).dtype == kept.astype(np.float32).dtype == np.float64
    assert type(np.random.default_rng(0).uniform(size=3)) is np.ndarray
    assert np.zeros(3, np.float32).dtype == np.array(0.5, np.float32).dtype == np.float32
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(np.arange(3, dtype=np.float32)))
    thread.start()
    thread.join()
    assert (type(seen[0]), seen[0].dtype) == (np.ndarray, np.float32)
    with jax_constants.unwatched():
        assert np.arange(3, dtype=np.float32).dtype == kept.astype(np.float32).dtype == np.float32


def test_numpy_is_put_back_whatever_happens() -> None:
    def numpy() -> list[Any]:
        return [getattr(np, name) for name in jax_constants.FACTORIES]

    inside, seen = numpy(), []

    def elsewhere() -> None:
        before = numpy()
        with pytest.raises(ValueError, match="odd"), watched():
            raise ValueError("odd")
        seen.append(numpy() == before)

    elsewhere()
    assert seen == [True]
    assert numpy() == inside


def test_an_array_that_was_rounded_before_is_not_taken_for_a_double() -> None:
    made, surviving = found(lambda x: jnp.asarray(np.array(IRRATIONAL, dtype=np.float32)) + x[0], X)
    np.testing.assert_array_equal(made, IRRATIONAL.astype(np.float64) + X[0])
    assert surviving == ("float32 constant (20,)",)


def test_a_loop_that_insists_on_its_dtype_is_traced_all_the_same() -> None:
    def run(x: Any) -> Any:
        start = np.linspace(0, 1, 6, dtype=np.float32)
        return jax.lax.scan(lambda state, _: (state + x.astype(jnp.float32), None), start, None, length=2)[0]

    made, surviving = found(run, X)
    assert same(made, np.float64([0, 0.2, 0.4, 0.6, 0.8, 1]) + X + X)
    assert surviving == ()


def test_an_error_of_the_user_is_the_users() -> None:
    with pytest.raises(TypeError, match="not today"):
        lifted(failing, Lifted())(X)


def failing(x: Any) -> Any:
    raise TypeError("not today")
