"""Mistakes made in porting convolutions, padding, folding and reshaping layers, each of which must be seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from einops import rearrange
from jax import lax
from torch import nn

from equivalence.layers import registry
from equivalence.layers.convolution import convolve, convolve_transposed
from equivalence.layers.folding import fold, unfold
from equivalence.layers.form import Form, Own
from equivalence.layers.padding import padded
from equivalence.layers.shapes import flatten
from equivalence.weights import Rule
from tests.layers.sides import disagree, normal, perturbed

Shape = tuple[int, ...]
Change = Callable[[Form], Form]
BIAS = Rule("bias", "bias")


def called(call: Callable[..., Any]) -> Change:
    """The form with another function, which is no layer of Flax's own."""
    return lambda form: dataclasses.replace(form, call=call, own={})


def own(name: str, *arguments: Any, **options: Any) -> Change:
    return lambda form: dataclasses.replace(form, own={"nnx": Own(name, *arguments, **options)})


def moved(axes: str, **lengths: int) -> Change:
    return lambda form: dataclasses.replace(form, rules=(Rule("weight", "kernel", axes, **lengths), BIAS))


def strided(**options: Any) -> Callable[..., Any]:
    how = {"strides": (2, 1), "padding": ((1, 1), (0, 0)), "dilation": (1, 2), "groups": 1, **options}
    return lambda m, x: convolve(x, m["kernel"], m["bias"], **how)


def upwards(turn: Callable[[Any], Any] = lambda kernel: kernel, **options: Any) -> Callable[..., Any]:
    how = {"strides": (2,), "padding": (1,), "output_padding": (1,), "dilation": (1,), "groups": 2, **options}
    return lambda m, x, output_size=None: convolve_transposed(x, turn(m["kernel"]), m["bias"], **how)


STRIDED = (nn.Conv2d(3, 4, 3, (2, 1), (1, 0), (1, 2)), (2, 3, 8, 7))
GROUPED = (nn.Conv2d(2, 6, (3, 2), groups=2), (2, 2, 5, 4))
MODED = (nn.Conv1d(3, 4, 3, 3, 2, padding_mode="circular"), (2, 3, 4))
UPWARDS = (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 5))
PLAIN = (nn.ConvTranspose1d(3, 4, 3, 2, 1, 1), (2, 3, 4))
TIMES = {"transpose_kernel": True, "strides": (2,)}

CONVOLUTIONS: dict[str, tuple[tuple[nn.Module, Shape], Change]] = {
    "SAME for padding 1 at stride 2": (
        (nn.Conv2d(3, 4, 3, 2, 1), (2, 3, 8, 6)),
        own("Conv", 3, 4, (3, 3), strides=(2, 2), padding="SAME"),
    ),
    "the odd zero before": (
        (nn.Conv1d(3, 4, 2, padding="same"), (2, 3, 6)),
        own("Conv", 3, 4, (2,), strides=(1,), padding=((1, 0),)),
    ),
    "stride and dilation exchanged": (
        (nn.Conv1d(3, 4, 2, stride=2), (2, 3, 4)),
        own("Conv", 3, 4, (2,), strides=(1,), padding="VALID", kernel_dilation=(2,)),
    ),
    "no dilation where SAME hides it": (
        (nn.Conv1d(3, 4, 3, padding=2, dilation=2), (2, 3, 6)),
        own("Conv", 3, 4, (3,), strides=(1,), padding="SAME"),
    ),
    "a kernel that is turned": (STRIDED, called(lambda m, x: strided()(Turned(m), x))),
    "a kernel laid out (w h)": (STRIDED, moved("o i h w -> w h i o")),
    "a bias left out": (STRIDED, called(lambda m, x: strided()({"kernel": m["kernel"], "bias": None}, x))),
    "outputs of a depthwise kernel multiplier-major": (GROUPED, moved("(g m) i h w -> h w i (m g)", g=2)),
    "Flax's CIRCULAR, which pads by the kernel": (MODED, own("Conv", 3, 4, (3,), strides=(3,), padding="CIRCULAR")),
    "zeros for a padding mode": (MODED, own("Conv", 3, 4, (3,), strides=(3,), padding=((2, 2),))),
    "a transposed kernel not turned": (UPWARDS, called(upwards(lambda kernel: kernel[::-1]))),
    "output padding before": (
        PLAIN,
        own("ConvTranspose", 3, 4, (3,), padding=((2, 1),), **TIMES),
    ),
    "SAME for a transposed convolution": (PLAIN, own("ConvTranspose", 3, 4, (3,), padding="SAME", **TIMES)),
    "transposed groups group-minor": (UPWARDS, called(upwards(lambda k: rearrange(k, "... (i g) -> ... (g i)", g=2)))),
    "transposed outputs group-minor": (
        UPWARDS,
        called(lambda m, x, _=None: rearrange(upwards()(m, x), "... (g o) -> ... (o g)", g=2)),
    ),
}


class Turned:
    """A carrier whose kernel is turned around."""

    def __init__(self, m: Any) -> None:
        self.m = m

    def __getitem__(self, name: str) -> Any:
        return self.m[name][::-1, ::-1] if name == "kernel" else self.m[name]


def cropped(x: Any, before: int, after: int) -> Any:
    return padded(x, ((before, after),))


PATCHED = (nn.Unfold((2, 3), (1, 2), (1, 0), (2, 1)), (2, 3, 5, 7))
SUMMED = (nn.Fold((4, 5), (2, 3), padding=(1, 0), stride=(1, 2)), (2, 12, 10))
FOLDS = (4, 5), (2, 3), (1, 1), (1, 0), (1, 2)


def overlaps(x: Any) -> Any:
    return fold(jnp.ones_like(x), *FOLDS)


MOVES: dict[str, tuple[tuple[nn.Module, Shape], Callable[..., Any]]] = {
    "the first axis's pads first": (
        (nn.ZeroPad2d((1, 2, 2, 1)), (2, 3, 4, 5)),
        lambda m, x: padded(x, ((1, 2), (2, 1))),
    ),
    "before and after exchanged": (
        (nn.ReplicationPad1d((1, 2)), (2, 3, 4)),
        lambda m, x: padded(x, ((2, 1),), "replicate"),
    ),
    "another constant": ((nn.ConstantPad1d(1, 0.5), (2, 3, 4)), lambda m, x: padded(x, ((1, 1),))),
    "an edge repeated": (
        (nn.ReflectionPad1d((1, 2)), (2, 3, 4)),
        lambda m, x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)), mode="symmetric"),
    ),
    "reflected for replicated": ((nn.ReplicationPad1d(1), (2, 3, 4)), lambda m, x: padded(x, ((1, 1),), "reflect")),
    "replicated for wrapped": ((nn.CircularPad1d(1), (2, 3, 4)), lambda m, x: padded(x, ((1, 1),), "replicate")),
    "reflected what cropping left": (
        (nn.ReflectionPad1d((-3, 3)), (2, 3, 6)),
        lambda m, x: jnp.pad(cropped(x, -3, 0), ((0, 0), (0, 3), (0, 0)), mode="reflect"),
    ),
    "wrapped before cropping": (
        (nn.CircularPad1d((-1, 2)), (2, 3, 6)),
        lambda m, x: cropped(padded(x, ((0, 2),), "circular"), -1, 0),
    ),
    "patches pixel after pixel": (
        PATCHED,
        lambda m, x: rearrange(unfold(x, *PATCH), "... (c k) -> ... (k c)", c=3),
    ),
    "patches down the columns": (
        PATCHED,
        lambda m, x: rearrange(unfold(x, *PATCH), "n (y x) f -> n (x y) f", y=3),
    ),
    "a patch by its columns": (
        PATCHED,
        lambda m, x: rearrange(unfold(x, *PATCH), "... (c i j) -> ... (c j i)", c=3, i=2),
    ),
    "overlaps averaged": (SUMMED, lambda m, x: fold(x, *FOLDS) / overlaps(x)),
    "patches summed pixel after pixel": (
        SUMMED,
        lambda m, x: fold(rearrange(x, "... (k c) -> ... (c k)", k=6), *FOLDS),
    ),
    "depth to space": (
        (nn.PixelShuffle(2), (2, 12, 3, 5)),
        lambda m, x: rearrange(x, "... h w (i j c) -> ... (h i) (w j) c", i=2, j=2),
    ),
    "pixels of a cell by columns": (
        (nn.PixelShuffle(2), (2, 4, 3, 5)),
        lambda m, x: rearrange(x, "... h w (c i j) -> ... (h j) (w i) c", i=2, j=2),
    ),
    "space to depth": (
        (nn.PixelUnshuffle(2), (2, 3, 4, 6)),
        lambda m, x: rearrange(x, "... (h i) (w j) c -> ... h w (i j c)", i=2, j=2),
    ),
    "channels dealt out the other way": (
        (nn.ChannelShuffle(2), (2, 6, 3, 5)),
        lambda m, x: rearrange(x, "... (c g) -> ... (g c)", g=2),
    ),
    "flattened channels last": (
        (nn.Flatten(), (2, 3, 4, 5)),
        lambda m, x: flatten(jnp.moveaxis(x, 1, -1)),
    ),
    "unflattened minor first": (
        (nn.Unflatten(1, (3, 3)), (2, 9)),
        lambda m, x: x.reshape(-1, 3, 3).swapaxes(1, 2),
    ),
}
PATCH = (2, 3), (1, 2), (1, 0), (2, 1)


def plant(patch: pytest.MonkeyPatch, name: str, change: Change) -> None:
    entry = registry.entries()[name]

    def translate(module: Any, inside: Any) -> Form:
        return change(entry.translate(module, inside))

    patch.setitem(registry._ENTRIES, name, dataclasses.replace(entry, translate=translate))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_another_convolution_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (module, shape), change = CONVOLUTIONS[name]
    plant(monkeypatch, type(module).__name__, change)
    assert disagree(perturbed(module), normal(*shape))


@pytest.mark.parametrize("name", MOVES)
def test_another_move_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (module, shape), wrong = MOVES[name]
    plant(monkeypatch, type(module).__name__, called(wrong))
    assert disagree(module, normal(*shape))


def test_what_is_planted_is_all_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, shape, call in (
        (*STRIDED, strided()),
        (*UPWARDS, upwards()),
        (*PATCHED, lambda m, x: unfold(x, *PATCH)),
        (*SUMMED, lambda m, x: fold(x, *FOLDS)),
    ):
        plant(monkeypatch, type(module).__name__, called(call))
        assert not disagree(perturbed(module), normal(*shape))


def test_a_patch_that_overwrites_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(m: Any, x: Any) -> Any:
        image = jnp.zeros((2, 1, 4, 1), x.dtype)
        for at in range(3):
            image = lax.dynamic_update_slice(image, x[:, None, at, :, None], (0, 0, at, 0))
        return image

    plant(monkeypatch, "Fold", called(call))
    assert disagree(nn.Fold((1, 4), (1, 2)), normal(2, 2, 3))
