"""Transformer layers and stacks against torch's: options, masks, hints, draws, layers of one's own, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import FRAMEWORKS, assert_translates, normal, perturbed

FEW = settings(max_examples=max(settings.default.max_examples // 10, 1))  # each example compiles two programs
CAUSAL = nn.Transformer.generate_square_subsequent_mask(4).numpy()
SRC, TGT = normal(5, 3, 6), normal(4, 3, 6)
PADDING = {5: np.arange(5) >= np.array([[5], [2], [4]]), 4: np.arange(4) >= np.array([[1], [4], [3]])}

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")

options = st.fixed_dictionaries(
    {
        "dropout": st.sampled_from([0.0, 0.3]),
        "activation": st.sampled_from(["relu", "gelu", nn.functional.gelu, nn.ReLU(), nn.GELU("tanh"), nn.PReLU()]),
        "layer_norm_eps": st.sampled_from([1e-5, 0.1]),
        "batch_first": st.booleans(),
        "norm_first": st.booleans(),
        "bias": st.booleans(),
    }
)
"""Of a layer."""


def laid(x: np.ndarray, given: dict[str, Any]) -> np.ndarray:
    return x.swapaxes(0, 1) if given["batch_first"] else x


@FEW
@given(options, st.booleans(), st.sampled_from([None, CAUSAL, CAUSAL < 0, normal(4, 4)]), st.sampled_from(FRAMEWORKS))
def test_encoder_layer(given: dict[str, Any], train: bool, mask: Any, to: str) -> None:
    module = perturbed(nn.TransformerEncoderLayer(6, 2, 7, **given))
    padding = PADDING[4] if mask is None else None
    assert_translates(module, laid(TGT, given), mask, padding, train=train, frameworks=[to])


@FEW
@given(options, st.booleans(), st.sampled_from([None, normal(4, 5), normal(4, 5) > 1]), st.sampled_from(FRAMEWORKS))
def test_decoder_layer(given: dict[str, Any], train: bool, memory_mask: Any, to: str) -> None:
    module = perturbed(nn.TransformerDecoderLayer(6, 3, 7, **given))
    masks = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_mask": memory_mask}
    assert_translates(module, laid(TGT, given), laid(SRC, given), train=train, frameworks=[to], **masks)


def test_unbatched_and_of_length_one() -> None:
    module = perturbed(nn.TransformerDecoderLayer(6, 2, 7, batch_first=True))
    how: dict[str, Any] = {"train": True, "frameworks": ["linen"]}
    assert_translates(module, TGT[:1, 0], SRC[:, 0], memory_key_padding_mask=PADDING[5][1], **how)


def test_a_batch_first_encoder_with_padding() -> None:
    """Under gradients torch does not cut the padding off, in eval mode neither."""
    layer = nn.TransformerEncoderLayer(6, 2, 7, batch_first=True, dropout=0.0)
    module = perturbed(nn.TransformerEncoder(layer, 1, nn.LayerNorm(6)))
    assert_translates(module, SRC.swapaxes(0, 1), src_key_padding_mask=PADDING[5], frameworks=["nnx"])


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL + np.eye(4, dtype=np.float32)])
def test_a_causal_mask_is_recognised(mask: np.ndarray) -> None:
    """The gradient by it is then 0."""
    module = perturbed(nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7), 1))
    assert_translates(module, TGT, mask, frameworks=["nnx"])


def test_a_decoder_recognises_a_causal_mask() -> None:
    module = perturbed(nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 7), 1))
    assert_translates(module, TGT, SRC, CAUSAL, frameworks=["nnx"])


def test_a_whole_transformer() -> None:
    module = perturbed(nn.Transformer(6, 2, 1, 1, 7))
    masks = {"tgt_mask": CAUSAL, "src_key_padding_mask": PADDING[5], "memory_key_padding_mask": PADDING[5]}
    assert_translates(module, SRC, TGT, train=True, frameworks=["linen"], **masks)


def test_layers_of_one_s_own() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7), 1, nn.GroupNorm(3, 3))
    assert_translates(perturbed(encoder), SRC, frameworks=["nnx"])
    module = perturbed(nn.Transformer(6, 2, 1, 1, 7, custom_encoder=encoder))
    assert [rule.source for rule in eq.translate(module).mapping.rules if "encoder.norm" in str(rule.source)]


def test_an_activation_that_is_a_function_is_refused() -> None:
    for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        with pytest.raises(InputError, match="activation"):
            eq.translate(kind(6, 2, 7, activation=torch.sin))


def test_a_stack_without_layers_is_refused() -> None:
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7), 0)
    with pytest.raises(IndexError):
        module(torch.from_numpy(TGT))
    with pytest.raises(InputError, match="no layers"):
        eq.translate(module)


@pytest.mark.parametrize("inputs", [(SRC, TGT[:, :2]), (SRC[..., :5], TGT), (SRC, TGT, normal(4, 5)), (SRC, TGT[:, 0])])
def test_what_torch_refuses_is_refused(inputs: tuple[np.ndarray, ...]) -> None:
    module = nn.Transformer(6, 2, 1, 1, 7)
    with pytest.raises((RuntimeError, AssertionError)):
        module(*map(torch.from_numpy, inputs))
    with pytest.raises(InputError):
        eq.translate(module)(*inputs)
