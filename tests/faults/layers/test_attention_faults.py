"""Faults planted in attention and in transformer layers: each is one that a port may have, and each must be caught."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from torch import nn

import equivalence as eq
from equivalence.errors import DrawsDiffer
from equivalence.layers import attention, transformer
from tests.layers.sides import disagree, normal, perturbed

X, MEMORY = normal(4, 3, 6), normal(5, 3, 6)
HIDDEN = np.arange(4) >= np.array([[3], [2], [1]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(4).numpy()
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def attend(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(6, 2, **options)


def encode(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(**{"d_model": 6, "nhead": 2, "dim_feedforward": 7, **options})


def decode(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(**{"d_model": 6, "nhead": 2, "dim_feedforward": 7, **options})


def stack(*norm: nn.Module) -> nn.Module:
    return nn.TransformerEncoder(encode(), 1, *norm, enable_nested_tensor=False)


SQUARE = (normal(4, 4, 6),) * 3
BLIND = {"key_padding_mask": np.array([[False, True, True, True], [True] * 4, [False] * 4]), "need_weights": False}
HINT = {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}
WRONG_HINT = {**HINT, "attn_mask": np.zeros((4, 4), np.float32)}

CALLS: dict[str, Call] = {
    "plain": (attend(), (X, X, X), {}),
    "padded": (attend(), (X, X, X), {"key_padding_mask": HIDDEN, "need_weights": False}),
    "blind": (attend(), (X, X, X), BLIND),
    "square": (attend(), SQUARE, {}),
    "hint": (attend(), (X, X, X), HINT),
    "wrong hint": (attend(), (X, X, X), WRONG_HINT),
    "more keys": (
        attend(add_bias_kv=True, add_zero_attn=True),
        (X, X, X),
        {"key_padding_mask": HIDDEN, "need_weights": False},
    ),
    "dropout": (attend(dropout=0.3), (X, X, X), {"train": True, "need_weights": False}),
    "layer": (encode(activation="gelu"), (X,), {}),
    "drops": (encode(), (X,), {"train": True}),
    "stack": (stack(nn.LayerNorm(6)), (X, CAUSAL), {}),
    "decoder": (decode(), (X, MEMORY), {"tgt_mask": CAUSAL}),
}


@functools.cache
def weighted(name: str) -> Call:
    module, inputs, options = CALLS[name]
    return perturbed(module), inputs, options


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name: str) -> None:
    module, inputs, options = weighted(name)
    assert not disagree(module, *inputs, **options)


def shared(right: Any, x: Any, p: float, key: Any, shape: tuple[int, ...]) -> Any:
    return x * right(jnp.ones((1, 1, *shape[2:]), x.dtype), p, key, (1, 1, *shape[2:]))


def minor(right: Any, x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], x.shape[2] // heads, heads).swapaxes(2, 3)


def strict(right: Any, queries: int, keys: int, dtype: Any) -> Any:
    hidden = (jnp.arange(keys) >= jnp.arange(queries)[:, None]) & (jnp.arange(keys) > 0)
    return jnp.where(hidden, -jnp.inf, 0).astype(dtype)


def post(right: Any, run: Any, x: Any, blocks: Any, norm_first: bool) -> Any:
    for norm, block in blocks.items():
        x = run(norm, x) + block(run(norm, x)) if norm_first else x + run(norm, block(x))
    return x


PATCHED: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "scores divided by the root of all features": (
        *("plain", attention, "attention_weights"),
        lambda right, q, *rest, **how: right(q / 2**0.5, *rest, **how),
    ),
    "heads stored minor": ("plain", attention, "split_heads", minor),
    "keys for queries": (
        *("plain", attention, "projected"),
        lambda right, *given: tuple(right(*given)[i] for i in (1, 0, 2)),
    ),
    "a mask that shows where it is True": (
        *("padded", attention, "additive"),
        lambda right, mask, dtype: right(~mask, dtype),
    ),
    "a padding mask left out": (
        *("padded", attention, "merged"),
        lambda right, mask, padding, *rest: right(mask, None, *rest),
    ),
    "a large number for infinity": (
        *("blind", attention, "additive"),
        lambda right, *given: jnp.maximum(right(*given), -3e4),
    ),
    "nan for a query that sees nothing": (
        *("blind", attention, "attention_weights"),
        lambda right, q, k, mask, unseen: right(q, k, mask, jnp.nan),
    ),
    "a causal mask that hides the present": ("hint", attention, "causal", strict),
    "the mask where there is a hint": (
        *("wrong hint", attention, "causal"),
        lambda right, queries, keys, dtype: jnp.zeros((queries, keys), dtype),
    ),
    "no key of zeros": ("more keys", attention, "extended", lambda right, *given: right(*given[:-1], False)),
    "one dropout mask for all heads": ("dropout", attention, "dropped", shared),
    "dropout left out": ("dropout", attention, "dropped", lambda right, x, *rest: x),
    "a norm before the sum": ("layer", transformer, "_residual", post),
    "a mask that is learned though it is causal": (
        *("stack", transformer, "without_slope_if_causal"),
        lambda right, mask, length: mask,
    ),
    "no dropout inside the feed-forward block": (
        *("drops", transformer, "_feed_forward"),
        lambda right, run, activation, x: run("linear2", activation(run("linear1", x))),
    ),
}
"""What is wrong -> the call that shows it, and a function replaced by `change(right, *arguments)`."""


@pytest.mark.parametrize("name", PATCHED)
def test_a_wrong_function_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, module, attribute, change = PATCHED[name]
    monkeypatch.setattr(module, attribute, functools.partial(change, getattr(module, attribute)))
    assert caught(call)


OTHER: dict[str, tuple[str, nn.Module]] = {
    "the batch for the sequence": ("square", attend(batch_first=True)),
    "the tanh approximation of GELU": ("layer", encode(activation=nn.GELU("tanh"))),
    "ReLU for GELU": ("layer", encode()),
    "Flax's eps of a norm": ("layer", encode(activation="gelu", layer_norm_eps=1e-6)),
    "the norm before the block": ("layer", encode(activation="gelu", norm_first=True)),
    "a decoder with its norms first": ("decoder", decode(norm_first=True)),
    "another number of heads": ("plain", nn.MultiheadAttention(6, 3)),
    "another rate of dropout": ("drops", encode(dropout=0.2)),
    "a last norm with another eps": ("stack", stack(nn.LayerNorm(6, eps=1e-6))),
}
"""What is wrong -> the call that shows it, and a torch module that is wrong in that way."""


@pytest.mark.parametrize("name", OTHER)
def test_another_layer_is_caught(name: str) -> None:
    call, other = OTHER[name]
    assert caught(call, lambda subject: eq.translate(other).subject)


def caught(call: str, port: Callable[[Any], Any] | None = None) -> bool:
    """Whether the two sides differ, in numbers or in what they draw."""
    module, inputs, options = weighted(call)
    try:
        return bool(disagree(module, *inputs, port=port, **options))
    except DrawsDiffer:
        return True
