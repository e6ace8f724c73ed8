"""Transformer layers and stacks of them, in torch's own layout, as they are under gradients.

Without gradients torch runs a fused kernel in eval mode, and TransformerEncoder cuts padding off: another function at
padded positions (0 before the last norm) and at queries that see nothing (nan). No one function can be both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.layers.attention import additive, causal
from equivalence.layers.containers import first
from equivalence.layers.form import Carrier, Form, moved
from equivalence.layers.registry import Example, layer
from equivalence.losses.arguments import demand

Inside = Callable[[Any], Form]
Forms = Mapping[str, Form]
Run = Callable[[str, Any], Any]
Block = Callable[[Any], Any]

OWN = ("self_attn", "dropout1")

DEFAULTS = "defaults that no weight shows: dropout 0.1, norm after each block, ReLU, (length, batch, features)"
PADDING = (
    "under torch.no_grad, in eval mode, torch's output at padded positions is 0 before the last norm; here it is not"
)


def _padded(rng: np.random.Generator) -> tuple[Any, ...]:
    hidden = np.arange(5) >= np.array([[5], [3], [4]])
    return rng.standard_normal((5, 3, 6)).astype(np.float32), None, hidden


@layer("TransformerEncoderLayer", Example("nn.TransformerEncoderLayer(6, 2, 7)", _padded), DEFAULTS)
def encoder_layer(module: Any, inside: Inside) -> Form:
    """nn.TransformerEncoderLayer."""
    children, activation, norm_first = _children(module, inside), _activation(module), bool(module.norm_first)

    def call(
        m: Carrier, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
    ) -> jax.Array:
        run = functools.partial(_run, m, children)

        blocks = {
            "norm1": lambda x: _attend(run, m, OWN, x, x, src_mask, src_key_padding_mask, is_causal),
            "norm2": lambda x: run("dropout2", _feed_forward(run, activation, x)),
        }
        return _residual(run, jnp.asarray(src), blocks, norm_first)

    return _form("TransformerEncoderLayer", call, children, "x = norm1(x + self_attn(x)); x = norm2(x + mlp(x))")


@layer("TransformerDecoderLayer", Example("nn.TransformerDecoderLayer(6, 2, 7)", ((5, 3, 6), (4, 3, 6))), DEFAULTS)
def decoder_layer(module: Any, inside: Inside) -> Form:
    """nn.TransformerDecoderLayer."""
    children, activation, norm_first = _children(module, inside), _activation(module), bool(module.norm_first)

    def call(
        m: Carrier,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        run = functools.partial(_run, m, children)

        seen = memory, memory_mask, memory_key_padding_mask, memory_is_causal
        blocks = {
            "norm1": lambda x: _attend(run, m, OWN, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal),
            "norm2": lambda x: _attend(run, m, ("multihead_attn", "dropout2"), x, *seen),
            "norm3": lambda x: run("dropout3", _feed_forward(run, activation, x)),
        }
        return _residual(run, jnp.asarray(tgt), blocks, norm_first)

    text = "x = norm1(x + self_attn(x)); x = norm2(x + multihead_attn(x, memory)); x = norm3(x + mlp(x))"
    return _form("TransformerDecoderLayer", call, children, text)


@layer(
    "TransformerEncoder",
    Example("nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7), 2, nn.LayerNorm(6))", _padded),
    PADDING,
)
def encoder(module: Any, inside: Inside) -> Form:
    """nn.TransformerEncoder."""
    children, batch_first = _stack(module, inside), _batch_first(module)

    def call(
        m: Carrier, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
    ) -> jax.Array:
        mask = None if mask is None else additive(mask, jnp.asarray(src).dtype)
        if is_causal is None and src_key_padding_mask is None:
            mask = without_slope_if_causal(mask, _length(src, batch_first))
        x = m.layer("layers")(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        return _run(m, children, "norm", x) if "norm" in children else x

    return _form("TransformerEncoder", call, children, "norm(layers(src))")


@layer(
    "TransformerDecoder",
    Example("nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 7), 2, nn.LayerNorm(6))", ((5, 3, 6), (4, 3, 6))),
    "all layers start as copies of one; " + DEFAULTS,
)
def decoder(module: Any, inside: Inside) -> Form:
    """nn.TransformerDecoder."""
    children, batch_first = _stack(module, inside), _batch_first(module)

    def call(
        m: Carrier,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        if tgt_is_causal is None and tgt_key_padding_mask is None:
            tgt_mask = without_slope_if_causal(tgt_mask, _length(tgt, batch_first))
        x = m.layer("layers")(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=bool(tgt_is_causal),
            memory_is_causal=memory_is_causal,
        )
        return _run(m, children, "norm", x) if "norm" in children else x

    return _form("TransformerDecoder", call, children, "norm(layers(tgt, memory))")


@layer(
    "Transformer",
    Example("nn.Transformer(6, 2, 2, 2, 7)", ((5, 3, 6), (4, 3, 6))),
    "the encoder and the decoder end in a norm of their own, whichever place norm_first gives the others",
)
def transformer(module: Any, inside: Inside) -> Form:
    """nn.Transformer; an encoder or decoder of one's own is translated where it is made of known layers."""
    children = {name: inside(child) for name, child in module._modules.items()}
    features, batch_axis = module.d_model, 0 if module.batch_first else 1

    def call(
        m: Carrier,
        src: Any,
        tgt: Any,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_key_padding_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> jax.Array:
        fits = src.ndim != 3 or (tgt.ndim == 3 and src.shape[batch_axis] == tgt.shape[batch_axis])
        demand(fits, f"src {src.shape} and tgt {tgt.shape} must have one batch")
        demand(
            src.shape[-1] == tgt.shape[-1] == features, f"src {src.shape} and tgt {tgt.shape} need {features} features"
        )
        memory = m.layer("encoder")(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
        )
        output: jax.Array = m.layer("decoder")(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return output

    return _form("Transformer", call, children, "decoder(tgt, encoder(src))")


def without_slope_if_causal(mask: Any, length: int) -> Any:
    """The mask; its gradient is 0 where it holds the causal mask, which torch then computes by itself."""
    if mask is None or jnp.shape(mask) != (length, length) or jnp.asarray(mask).dtype == bool:
        return mask
    is_causal = jnp.all(jnp.asarray(mask) == causal(length, length, jnp.asarray(mask).dtype))
    return jnp.where(is_causal, jax.lax.stop_gradient(mask), mask)


def _form(name: str, call: Callable[..., Any], children: Forms, text: str) -> Form:
    return Form(name, call, text=text, children=children, draws=any(child.draws for child in children.values()))


def _children(module: Any, inside: Inside) -> Forms:
    return {name: inside(child) for name, child in module._modules.items() if child is not None}


def _stack(module: Any, inside: Inside) -> Forms:
    """The layers of a stack as one form that runs them in turn, and the last norm."""
    if not len(module.layers):
        raise InputError(f"{type(module).__name__} has no layers, and cannot be called")
    children = dict(_children(module, inside))
    layers = children["layers"]
    turns = functools.partial(_in_turn, names=tuple(layers.children))
    draws = any(child.draws for child in layers.children.values())
    return {**children, "layers": dataclasses.replace(layers, call=turns, draws=draws)}


def _in_turn(m: Carrier, x: Any, *inputs: Any, names: tuple[str, ...], **options: Any) -> Any:
    for name in names:
        x = m.layer(name)(x, *inputs, **options)
    return x


def _batch_first(module: Any) -> bool:
    return bool(module.layers[0].self_attn.batch_first)


def _length(x: Any, batch_first: bool) -> int:
    return int(x.shape[1 if x.ndim == 3 and batch_first else 0])


def _activation(module: Any) -> Block | None:
    """The function between the two linear layers; None where it is a layer. Raises InputError for an unknown one."""
    import torch

    given, functional = module.activation, torch.nn.functional
    if isinstance(given, torch.nn.Module):
        return None
    if given in (functional.relu, torch.relu):
        return jax.nn.relu
    if given is functional.gelu:
        return functools.partial(jax.nn.gelu, approximate=False)
    raise InputError(
        f"{type(module).__name__} has a Python function as activation ({given}): give 'relu', 'gelu' or a layer"
    )


def _run(m: Carrier, children: Forms, name: str, x: Any) -> Any:
    """A layer inside, of one array in torch's layout."""
    form = children[name]
    return moved(m.layer(name)(moved(x, None, first(form.inputs))), first(form.outputs), None)


def _attend(run: Run, m: Carrier, names: tuple[str, str], x: Any, memory: Any, *how: Any) -> Any:
    """Attention and its dropout, by their names; `how` is the mask, the padding mask and whether it is causal."""
    mask, padding, is_causal = how
    options = {"key_padding_mask": padding, "need_weights": False, "attn_mask": mask, "is_causal": is_causal}
    return run(names[1], m.layer(names[0])(x, memory, memory, **options)[0])


def _feed_forward(run: Run, activation: Block | None, x: Any) -> Any:
    hidden = run("linear1", x)
    return run("linear2", run("dropout", run("activation", hidden) if activation is None else activation(hidden)))


def _residual(run: Run, x: Any, blocks: Mapping[str, Block], norm_first: bool) -> Any:
    """Every block added to its input, its norm before the block or after the sum."""
    for norm, block in blocks.items():
        x = x + block(run(norm, x)) if norm_first else run(norm, x + block(x))
    return x
