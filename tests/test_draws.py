"""Draws of a traced program: found in whatever it was written in, in order, and replaced by the tape's arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from equivalence.errors import DrawsDiffer, UnsupportedDraw
from equivalence.randomness import Draw, Tape, assert_same_draws

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - they need jax

from equivalence.runtimes.draws import draws_of, find, trace, with_draws  # noqa: E402

X = jnp.linspace(-1.0, 2.0, 6).reshape(2, 3)
KEY = jax.random.key(0)


def dropout(x: Any, rate: float = 0.5, key: Any = KEY) -> Any:
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def served(function: Callable[..., Any], *args: Any, seed: int = 1) -> tuple[Any, list[np.ndarray], list[Draw]]:
    """A function's result on the tape's arrays, those arrays, and the draws it asked for."""
    asked = draws_of(function, *args)
    tape = Tape((seed,))
    arrays = [tape.take(draw) for draw in asked]
    return with_draws(function)([jnp.asarray(a) for a in arrays], *args), arrays, asked


def by_hand(mask: np.ndarray, x: Any = X, rate: float = 0.5) -> np.ndarray:
    return np.where(mask, np.asarray(x) / (1.0 - rate), 0.0)


WRAPPERS = {
    "plain": dropout,
    "jit": jax.jit(dropout),
    "jit in jit": jax.jit(lambda x: jax.jit(dropout)(x)),
    "remat": jax.checkpoint(dropout),
    "remat in jit": jax.jit(jax.checkpoint(dropout)),
    "closed over": lambda x: (lambda key: dropout(x, key=key))(jax.random.key(7)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_draw_is_found_in_whatever_it_is_written_in(name: str) -> None:
    result, arrays, asked = served(WRAPPERS[name], X)
    assert asked == [Draw("bernoulli", (2, 3), 0.5)]
    np.testing.assert_allclose(result, by_hand(arrays[0]))


def test_a_function_traced_before_is_no_blind_spot() -> None:
    """Patching jax.random would see no draw here: the inner program is cached."""
    inner = jax.jit(dropout)
    inner(X)
    result, arrays, asked = served(lambda x: inner(inner(x)), X)
    assert len(asked) == 2
    np.testing.assert_allclose(result, by_hand(arrays[1], by_hand(arrays[0])), rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_draws_anew_in_every_iteration(reverse: bool) -> None:
    def run(x: Any) -> Any:
        def body(carry: Any, row: Any) -> tuple[Any, Any]:
            carry = carry + dropout(row, 0.25)
            return carry, carry

        return jax.lax.scan(body, jnp.zeros(3), x, reverse=reverse)

    (last, all_), arrays, asked = served(run, X)
    assert asked == [Draw("bernoulli", (3,), 0.75)] * 2
    rows = [np.where(m, np.asarray(X[i]) / 0.75, 0.0) for i, m in enumerate(arrays)]
    np.testing.assert_allclose(last, rows[0] + rows[1], rtol=1e-6)
    np.testing.assert_allclose(all_[1], rows[1] + (0 if reverse else rows[0]), rtol=1e-6)


def test_draws_around_and_inside_a_scan_keep_their_order() -> None:
    def run(x: Any) -> Any:
        first = dropout(x, 0.5)
        second, _ = jax.lax.scan(lambda c, _: (dropout(dropout(c, 0.1), 0.2), None), first, None, length=3)
        return dropout(second, 0.75)

    result, arrays, asked = served(run, X)
    assert [d.probability for d in asked] == pytest.approx([0.5, *[0.9, 0.8] * 3, 0.25])
    wanted = by_hand(arrays[0])
    for mask, rate in zip(arrays[1:7], [0.1, 0.2] * 3, strict=True):
        wanted = by_hand(mask, wanted, rate)
    np.testing.assert_allclose(result, by_hand(arrays[7], wanted, 0.75), rtol=1e-5)


def test_a_scan_in_a_scan_and_under_jit() -> None:
    def run(x: Any) -> Any:
        def inner(c: Any, _: Any) -> tuple[Any, None]:
            return jax.jit(dropout)(c), None

        def outer(c: Any, _: Any) -> tuple[Any, None]:
            return jax.lax.scan(inner, c, None, length=2)[0], None

        return jax.jit(lambda x: jax.lax.scan(outer, x, None, length=3)[0])(x)

    result, arrays, asked = served(run, X)
    assert len(asked) == 6
    wanted = np.asarray(X)
    for mask in arrays:
        wanted = by_hand(mask, wanted)
    np.testing.assert_allclose(result, wanted, rtol=1e-6)


def test_batched_draws_ask_for_the_whole_batch_at_once() -> None:
    keys = jax.random.split(KEY, 2)
    asked = draws_of(jax.vmap(lambda k, row: dropout(row, key=k)), keys, X)
    assert [d.kind for d in asked] == ["bernoulli"]
    assert asked[0].shape == (2, 3)


def test_derivatives_see_the_same_draws() -> None:
    def loss(x: Any) -> Any:
        return jnp.sum(jnp.square(jax.checkpoint(dropout)(x)))

    asked = draws_of(loss, X)
    mask = Tape((1,)).take(asked[0])
    gradient = jax.grad(lambda x: with_draws(loss)([jnp.asarray(mask)], x))(X)
    np.testing.assert_allclose(gradient, np.where(mask, 8.0 * np.asarray(X), 0.0), rtol=1e-6)


def test_a_whole_training_step_that_is_differentiated_inside_is_followed() -> None:
    """The gradient is taken first and the draws are replaced in what comes out of it, as for a user's own step."""

    def step(x: Any) -> Any:
        return jax.value_and_grad(lambda x: jnp.sum(jnp.square(dropout(x))))(x)

    (loss, gradient), arrays, asked = served(jax.jit(step), X)
    assert len(asked) == 1
    np.testing.assert_allclose(loss, np.sum(by_hand(arrays[0]) ** 2), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(arrays[0], 8.0 * np.asarray(X), 0.0), rtol=1e-6)


def test_uniform_normal_exponential_and_gumbel_are_served_as_they_were_asked() -> None:
    def run() -> Any:
        a, b, c, d = jax.random.split(KEY, 4)
        return (
            jax.random.uniform(a, (4,), minval=2.0, maxval=5.0),
            jax.random.normal(b, (4,)) * 3.0 + 1.0,
            jax.random.exponential(c, (4,)),
            jax.random.gumbel(d, (4,)),
        )

    (uniform, normal, exponential, gumbel), arrays, asked = served(run)
    assert [d.kind for d in asked] == ["uniform", "normal", "exponential", "exponential"]
    np.testing.assert_allclose(uniform, arrays[0] * 3.0 + 2.0, rtol=1e-6)
    np.testing.assert_allclose(normal, arrays[1] * 3.0 + 1.0, rtol=1e-5)
    np.testing.assert_allclose(exponential, arrays[2], rtol=1e-6)
    np.testing.assert_allclose(gumbel, -np.log(arrays[3]), rtol=1e-5)


def test_nothing_drawn_is_left_alone() -> None:
    assert draws_of(lambda x: x * 2.0, X) == []
    calls = []

    def function(x: Any) -> Any:
        calls.append(x)
        return x

    with_draws(function)([], X)
    assert calls[0] is X


def test_a_key_that_is_split_but_not_used_draws_nothing() -> None:
    assert draws_of(lambda x: (x, jax.random.split(KEY)[0])[0], X) == []


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "while": (lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) > 1e9, dropout, x), "inside while"),
    "cond": (lambda x: jax.lax.cond(jnp.sum(x) > 0, dropout, lambda x: x, x), "inside cond"),
    "bits": (lambda x: x + jax.random.bits(KEY, x.shape).astype(x.dtype), "outside jax.random's samplers"),
    "randint": (lambda x: x + jax.random.randint(KEY, x.shape, 0, 9), "draws random|outside"),
    "probability from data": (lambda x: jax.random.bernoulli(KEY, jax.nn.sigmoid(x)), "depends on data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(UnsupportedDraw, match=message):
        draws_of(function, X)


def test_a_draw_under_a_custom_derivative_rule_is_refused() -> None:
    """Opening it would lose the rule, and with it the derivative the author wrote."""

    @jax.custom_jvp
    def noisy(x: Any) -> Any:
        return dropout(x)

    @noisy.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        return noisy(*primals), 2.0 * tangents[0]

    with pytest.raises(UnsupportedDraw, match="inside custom_jvp"):
        draws_of(noisy, X)


def test_a_custom_rule_beside_a_draw_is_kept() -> None:
    @jax.custom_jvp
    def doubled_slope(x: Any) -> Any:
        return x * 3.0

    @doubled_slope.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        return doubled_slope(*primals), 42.0 * tangents[0]

    def loss(x: Any) -> Any:
        return jnp.sum(doubled_slope(dropout(x)))

    mask = Tape((1,)).take(draws_of(loss, X)[0])
    gradient = jax.grad(lambda x: with_draws(loss)([jnp.asarray(mask)], x))(X)
    np.testing.assert_allclose(gradient, np.where(mask, 84.0, 0.0))


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda x: dropout(x, 0.49), r"draw 0 differs: .*bernoulli\(0.5\) \(2, 3\), the port for bernoulli\(0.5"),
        (lambda x: dropout(x.T), r"the port for bernoulli\(0.5\) \(3, 2\)"),
        (lambda x: x, "asks for 1 draws, the port for 0"),
        (lambda x: dropout(dropout(x)), "asks for 1 draws, the port for 2"),
        (lambda x: x + jax.random.normal(KEY, x.shape), "the port for normal"),
    ],
)
def test_other_draws_are_named(planted: Callable[[Any], Any], message: str) -> None:
    assert_same_draws(draws_of(dropout, X), draws_of(jax.jit(dropout), X), "train mode")
    with pytest.raises(DrawsDiffer, match=message):
        assert_same_draws(draws_of(dropout, X), draws_of(planted, X), "train mode")


def test_the_order_of_two_draws_matters() -> None:
    def wide_first(x: Any) -> Any:
        return dropout(dropout(x)[0])

    def narrow_first(x: Any) -> Any:
        return dropout(x + dropout(x[0]))

    with pytest.raises(DrawsDiffer, match="draw 0"):
        assert_same_draws(draws_of(wide_first, X), draws_of(narrow_first, X), "train mode")


@pytest.mark.parametrize("x64", [False, True])
def test_a_probability_is_read_in_either_precision(x64: bool) -> None:
    with jax.enable_x64(x64):
        (asked,) = draws_of(lambda x: dropout(x, 0.01), np.zeros((2, 3), np.float32))
    assert asked.agrees(Draw("bernoulli", (2, 3), 0.99))
    assert not asked.agrees(Draw("bernoulli", (2, 3), 0.9901))


def test_known_arguments_reach_a_probability() -> None:
    closed, _ = trace(lambda p, x: jnp.where(jax.random.bernoulli(KEY, p, x.shape), x, 0.0), 0.25, X)
    with pytest.raises(UnsupportedDraw, match="depends on data"):
        find(closed)
    assert find(closed, [np.float32(0.25), None])[0].probability == 0.25


def test_attention_without_dropout_draws_nothing() -> None:
    """torch tags its fused attention kernels as random, whatever their dropout."""
    import torch

    from equivalence.randomness import Tape
    from equivalence.runtimes.torch_tape import TapeMode

    q = torch.ones(1, 2, 3, 4)
    tape = Tape((0,))
    with TapeMode(tape):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert tape.draws == []
        torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert [draw.kind for draw in tape.draws] == ["bernoulli"]
