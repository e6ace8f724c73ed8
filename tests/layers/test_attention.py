"""MultiheadAttention against torch's: options, masks, dropout, queries that see nothing, empty sizes, refusals."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import FRAMEWORKS, assert_translates, normal, perturbed

FEW = settings(max_examples=max(settings.default.max_examples // 3, 1))  # each example compiles two programs
REFUSED = (AssertionError, RuntimeError, ValueError, InputError)


def attention(heads: int = 2, **options: Any) -> nn.Module:
    return perturbed(nn.MultiheadAttention(6, heads, **options))


def hidden(batch: int, length: int) -> np.ndarray:
    """A padding mask (batch, length): each row is shorter than the one before, and none is empty."""
    return np.arange(length) >= np.maximum(length - np.arange(batch), 1)[:, None]


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.Module, list[np.ndarray], dict[str, Any]]:
    """A module, and the inputs and options of a legal call."""
    queries, keys = draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([1, 4, 5]))
    batch, heads = draw(st.sampled_from([None, 1, 3])), draw(st.sampled_from([1, 2, 3]))
    sizes = draw(st.sampled_from([{}, {"kdim": 5, "vdim": 7}, {"vdim": 4}]))
    options = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    module = attention(heads, dropout=draw(st.sampled_from([0.0, 0.3])), **options, **sizes)
    features = 6, sizes.get("kdim", 6), sizes.get("vdim", 6)
    middle = [] if batch is None else [batch]
    shapes = [
        (*middle, n, f) if options["batch_first"] else (n, *middle, f)
        for n, f in zip((queries, keys, keys), features, strict=True)
    ]
    scores = normal(*draw(st.sampled_from([(queries, keys), ((batch or 1) * heads, queries, keys)])))
    masks = {"attn_mask": scores, "key_padding_mask": normal(*middle, keys)}
    blind = {
        "attn_mask": (scores > 0.5) & (np.arange(keys) > 0),
        "key_padding_mask": hidden(3, keys)[-batch if batch else -1 :],
    }
    if batch is None:
        blind["key_padding_mask"] = blind["key_padding_mask"][0]
    kind = draw(st.sampled_from([masks, blind]))
    given = {name: mask for name, mask in kind.items() if draw(st.booleans())}
    if "attn_mask" in given and scores.shape == (queries, keys):
        given["is_causal"] = draw(st.booleans())
    flags = {name: draw(st.booleans()) for name in ("need_weights", "average_attn_weights")}
    return module, [normal(*shape, seed=i) for i, shape in enumerate(shapes)], {**given, **flags}


@FEW
@given(calls(), st.booleans(), st.sampled_from(FRAMEWORKS))
def test_every_option(call: Any, train: bool, to: str) -> None:
    module, inputs, options = call
    assert_translates(module, *inputs, train=train, frameworks=[to], **options)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_a_query_that_sees_nothing(name: str, need_weights: bool) -> None:
    mask = {"attn_mask": np.array([[1, 1, 1], [1, 0, 0]], bool), "key_padding_mask": hidden(2, 3) | [[False], [True]]}
    x = normal(3, 2, 6)
    assert_translates(attention(dropout=0.3), x[:2], x, x, train=True, need_weights=need_weights, **{name: mask[name]})


def test_a_hint_is_taken_for_the_mask_only_where_torch_takes_it() -> None:
    x, wrong = normal(4, 3, 6), np.zeros((4, 4), np.float32)
    for options in ({"need_weights": False}, {}):
        assert_translates(attention(), x, x, x, attn_mask=wrong, is_causal=True, frameworks=["nnx"], **options)


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_empty_sizes(queries: int, keys: int, batch: int) -> None:
    assert_translates(
        attention(dropout=0.3), normal(queries, batch, 6), *[normal(keys, batch, 6)] * 2, train=True, frameworks=["nnx"]
    )


def test_both_kinds_of_masks_at_once() -> None:
    x = normal(4, 3, 6)
    with pytest.warns(UserWarning, match="mismatched"):
        assert_translates(attention(), x, x, x, key_padding_mask=hidden(3, 4), attn_mask=normal(4, 4))


X = normal(4, 3, 6)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ((X[0, 0], X[0, 0], X[0, 0]), {}),
        ((X, X[0], X[0]), {}),
        ((X, X[:, :2], X[:, :2]), {}),
        ((X, X, X[:3]), {}),
        ((X[..., :4], X, X), {}),
        ((X, X[..., :4], X[..., :4]), {}),
        ((X, X, X), {"is_causal": True}),
        ((X, X, X), {"attn_mask": normal(4, 5)}),
        ((X, X, X), {"attn_mask": normal(3, 4, 4)}),
        ((X, X, X), {"attn_mask": np.ones((4, 4), int)}),
        ((X, X, X), {"key_padding_mask": normal(4, 3)}),
        ((X[:, 0], X[:, 0], X[:, 0]), {"key_padding_mask": normal(3, 4)}),
        ((X[:, 0], X[:, 0], X[:, 0]), {"attn_mask": normal(6, 4, 4)}),
    ],
)
def test_what_torch_refuses_is_refused(inputs: Any, options: dict[str, Any]) -> None:
    module = attention()
    with pytest.raises(REFUSED):
        module(
            *map(torch.from_numpy, inputs),
            **{k: torch.from_numpy(v) if k != "is_causal" else v for k, v in options.items()},
        )
    with pytest.raises(InputError):
        eq.translate(module)(*inputs, **options)


def test_it_runs_under_jit_and_follows_the_dtype() -> None:
    made = eq.translate(attention(), to="linen")
    run = jax.jit(lambda x: made.module.apply(made.variables, x, x, x)[0])
    assert run(X).dtype == np.float32
