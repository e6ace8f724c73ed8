"""Hugging Face's torch models beside their own Flax models: tiny configurations, built here, every weight perturbed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

import equivalence as eq

# transformers says on every Flax model that Flax is going away: through its logger, once a class
logging.getLogger("transformers").setLevel(logging.ERROR)

IDS = np.array([[3, 17, 5, 29, 11, 8, 2], [41, 6, 19, 23, 4, 13, 2]])
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 53,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_dropout": 0.0,
}
SEEN = {**SMALL, "image_size": 12, "patch_size": 4, "num_channels": 3}
GPT2 = {
    **{"vocab_size": 53, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
BART = {
    **{"vocab_size": 53, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 40},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "use_cache": False},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "forced_eos_token_id": None},
}


def _positions(ids: Any) -> Any:
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def _encoder(input_ids: Any) -> tuple[Any, ...]:
    return input_ids, jnp.ones_like(input_ids), jnp.zeros_like(input_ids), _positions(input_ids), None


def _decoder(input_ids: Any) -> tuple[Any, ...]:
    return input_ids, jnp.ones_like(input_ids), _positions(input_ids)


def _both(input_ids: Any, decoder_input_ids: Any) -> tuple[Any, ...]:
    return (
        *(input_ids, jnp.ones_like(input_ids), decoder_input_ids, jnp.ones_like(decoder_input_ids)),
        *(_positions(input_ids), _positions(decoder_input_ids)),
    )


def _pixels(pixel_values: Any) -> tuple[Any, ...]:
    return (jnp.transpose(pixel_values, (0, 2, 3, 1)),)


@dataclass(frozen=True)
class Model:
    """One architecture: its torch class's name (Flax's has `Flax` before it), its configuration, its example."""

    name: str
    config: Callable[..., Any]
    options: dict[str, Any]
    call: Callable[..., tuple[Any, ...]]
    """What the Flax module is called with, from what the torch model is given."""
    inputs: dict[str, np.ndarray] = field(default_factory=lambda: {"input_ids": IDS})
    flax: dict[str, Any] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    """Leaves that are buffers in torch and that Flax's model lists among its parameters."""


_PIXELS = {"pixel_values": np.random.default_rng(5).standard_normal((2, 3, 12, 12)).astype(np.float32)}

MODELS: dict[str, Model] = {
    "bert": Model("BertForSequenceClassification", transformers.BertConfig, SMALL, _encoder),
    "gpt2": Model("GPT2LMHeadModel", transformers.GPT2Config, GPT2, _decoder),
    "llama": Model(
        "LlamaForCausalLM", transformers.LlamaConfig, {**SMALL, "num_key_value_heads": 2, "use_cache": False}, _decoder
    ),
    "vit": Model(
        "ViTForImageClassification",
        transformers.ViTConfig,
        SEEN,
        _pixels,
        _PIXELS,
        {"input_shape": (1, 12, 12, 3)},
    ),
    "bart": Model(
        "BartForConditionalGeneration",
        transformers.BartConfig,
        BART,
        _both,
        {"input_ids": IDS, "decoder_input_ids": IDS[:, ::-1][:, :5].copy()},
        constant=("final_logits_bias",),
    ),
    # other names (q_lin, lin1); shared layers and tied biases; statistics in a collection of their own
    "distilbert": Model(
        "DistilBertForMaskedLM",
        transformers.DistilBertConfig,
        {
            **{"vocab_size": 53, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
            **{"max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0},
        },
        lambda input_ids: (input_ids, jnp.ones_like(input_ids)),
    ),
    "albert": Model(
        "AlbertForMaskedLM",
        transformers.AlbertConfig,
        {**SMALL, "embedding_size": 16},
        lambda input_ids: _encoder(input_ids)[:4],
    ),
    "resnet": Model(
        "ResNetForImageClassification",
        transformers.ResNetConfig,
        {
            "num_channels": 3,
            "embedding_size": 8,
            "hidden_sizes": [12, 20],
            "depths": [1, 2],
            "layer_type": "bottleneck",
        },
        _pixels,
        {"pixel_values": np.random.default_rng(5).standard_normal((2, 3, 22, 18)).astype(np.float32)},
    ),
}


def configured(model: Model, **changed: Any) -> Any:
    """The configuration of a model, with options changed."""
    return model.config(**{**model.options, **changed}, attn_implementation="eager")


def reference(model: Model, seed: int = 0, **changed: Any) -> torch.nn.Module:
    """The torch model, every parameter and running statistic off its initial value."""
    torch.manual_seed(seed)
    made: torch.nn.Module = getattr(transformers, model.name)(configured(model, **changed)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        for path, held in made.named_buffers():
            if path.endswith("running_mean"):
                held.add_(0.1 * torch.randn(held.shape, generator=generator))
            elif path.endswith("running_var"):
                held.mul_(1 + 0.3 * torch.rand(held.shape, generator=generator))
    return made


def flax_model(model: Model, **changed: Any) -> Any:
    """Flax's own model of a configuration, all its leaves zero: what they hold comes from the reference."""
    made = getattr(transformers, f"Flax{model.name}")(configured(model, **changed), _do_init=False, **model.flax)
    made._is_initialized = True  # by zeros: running every initialiser takes seconds
    made.params = jax.tree_util.tree_map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made.params_shape_tree)
    return made


def port(model: Model, made: Any) -> Any:
    """A Flax model as a function of its parameters. What is a buffer in torch stays as it is."""
    held = flatten_dict(made.params)
    fixed = {path: value for path, value in held.items() if path[-1] in model.constant}

    def apply(params: Any, **inputs: Any) -> Any:
        whole = unflatten_dict({**flatten_dict(params), **fixed})
        return made.module.apply({"params": whole}, *model.call(**inputs), return_dict=True)

    return eq.function(apply, unflatten_dict({path: value for path, value in held.items() if path not in fixed}))


class ChannelsFirst(nn.Module):
    """A Flax vision model that takes torch's pixels."""

    inner: nn.Module

    def __call__(self, pixel_values: Any, deterministic: bool) -> Any:
        return self.inner(jnp.transpose(pixel_values, (0, 2, 3, 1)), deterministic, return_dict=True)


def linen_port(made: Any) -> Any:
    """A Flax model with running statistics, as a Linen module with its variables."""
    return eq.linen(ChannelsFirst(made.module), {name: {"inner": tree} for name, tree in made.params.items()})


class InEvalMode(torch.nn.Module):
    """A model that draws random numbers in train mode even where every probability is zero, kept out of it."""

    def __init__(self, kept: torch.nn.Module) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.kept.eval()(**inputs)


def converted(made: torch.nn.Module, flax: Any) -> dict[str, np.ndarray]:
    """The port's leaves as transformers' own converter makes them: the mapping that its authors wrote by hand."""
    found = convert_pytorch_state_dict_to_flax(made.state_dict(), flax)
    return {".".join(path): np.asarray(value) for path, value in flatten_dict(found).items()}
