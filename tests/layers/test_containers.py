"""Containers: layouts between layers, nesting, sharing, and what is refused."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from equivalence.frameworks.subject import Subject
from equivalence.frameworks.torch import subject
from equivalence.layers.translation import Translation
from equivalence.weights import Leaves
from tests.layers.sides import FRAMEWORKS, assert_translates, disagree, normal, perturbed


def images(rng: np.random.Generator) -> tuple[nn.Sequential, np.ndarray]:
    """A random stack of layers over images, flattened at last, and its input."""
    channels, height, width = (int(n) for n in rng.choice([2, 3, 4, 5, 6, 7], 3, replace=False))
    batch = normal(3, channels, height, width, seed=int(rng.integers(1000)))
    layers: list[nn.Module] = []
    for _ in range(int(rng.integers(1, 5))):
        kind = rng.choice(["conv", "norm", "group", "drop", "pool", "act", "inner", "pad"])
        if kind == "conv":
            out = int(rng.integers(1, 5))
            layers.append(nn.Conv2d(channels, out, (2, 3), padding=(1, 1)))
            channels = out
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(channels))
        elif kind == "group":
            layers.append(nn.GroupNorm(1, channels))
        elif kind == "drop":
            layers.append(nn.Dropout(0.25))
        elif kind == "pool":
            layers.append(nn.AvgPool2d((1, 2), stride=1))
        elif kind == "pad":
            layers.append(nn.ZeroPad2d((1, 0, 2, 1)))
        elif kind == "act":
            layers.append(nn.GELU())
        else:
            layers.append(nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Dropout(0.5), nn.Tanh()))
    model = nn.Sequential(*layers, nn.Flatten(int(rng.integers(1, 3))))
    features = model(torch.from_numpy(batch)).shape[-1]
    return nn.Sequential(*model, nn.Linear(features, 3)), batch


@settings(max_examples=4)
@given(st.integers(0, 10**6))
def test_a_random_stack_over_images(seed: int) -> None:
    model, batch = images(np.random.default_rng(seed))
    to = FRAMEWORKS[seed % 2]
    assert_translates(perturbed(model, seed), batch, frameworks=[to], train=bool(seed // 2 % 2), calls=2)


def test_a_linear_layer_after_a_convolution_acts_on_torch_s_last_axis() -> None:
    assert_translates(perturbed(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Linear(5, 4))), normal(2, 2, 7, 5))


def test_a_group_norm_without_a_batch_takes_channels_for_the_batch_as_torch_does() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(2, 4))
    assert_translates(perturbed(model), normal(2, 4, 5))


def test_dropout_between_convolutions_is_drawn_in_torch_s_shape() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Dropout(0.5), nn.Conv2d(3, 2, 1), nn.Dropout2d(0.5))
    assert_translates(perturbed(model), normal(2, 2, 4, 5), train=True)


def test_a_layer_that_stands_in_two_places_is_one_layer() -> None:
    inner = nn.Linear(4, 4)
    model = perturbed(nn.Sequential(inner, nn.Tanh(), inner))
    assert_translates(model, normal(3, 4))
    assert len(eq.translate(model).mapping.rules) == 2


def test_linen_cannot_share_a_layer_between_parents() -> None:
    inner = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(inner), nn.Sequential(inner))
    assert_translates(perturbed(model), normal(3, 4), frameworks=["nnx"])
    with pytest.raises(InputError, match=r"layers_0\.layers_0 and layers_1\.layers_0"):
        eq.translate(model, to="linen")


def test_swapped_layers_of_equal_shapes_are_noticed() -> None:
    model = perturbed(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))

    def swapped(subject: Subject) -> Subject:
        places = {"layers.0": "layers.2", "layers.2": "layers.0"}

        def apply(params: dict, *rest: object) -> object:
            return subject.apply({p: params[places[p[:8]] + p[8:]] for p in params}, *rest)

        return dataclasses.replace(subject, apply=apply)

    assert disagree(model, normal(3, 4), port=swapped)


@pytest.mark.parametrize("names", [("conv", "act", "head"), ("2", "1", "0"), ("0", "3", "5")], ids=str)
def test_a_sequential_of_named_layers_maps_by_their_order(names: tuple[str, ...]) -> None:
    layers = (nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = perturbed(nn.Sequential(OrderedDict(zip(names, layers, strict=True))))
    assert_translates(model, normal(3, 4))


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_call_runs_each_layer_in_its_own_mode(to: str, frozen: bool) -> None:
    model = perturbed(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Flatten(0)))
    model.train(frozen)
    model[0].train(not frozen)
    model[1].eval()
    batch = normal(4, 3)
    made = eq.translate(model, to=to)
    for _ in range(2):
        found, wanted = made(batch), model(torch.from_numpy(batch))
    np.testing.assert_array_max_ulp(np.asarray(found), wanted.detach().numpy(), 64)
    counts = [int(v) for path, v in sorted(made.subject.buffers.items()) if "tracked" in path]
    assert counts == [int(model[i].num_batches_tracked) for i in (0, 2)]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Better(nn.Linear):
    pass


def with_hook() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(layer)


def with_forward() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def tied() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return nn.Sequential(first, second)


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(2, 2), Own()), r"1 \(Own\) has no entry.*its layers \(fc\)"),
        (Better(2, 2), "Better has no entry"),
        (with_hook(), r"0 \(Linear\) has hooks"),
        (with_forward(), "forward of its own"),
        (tied(), r"1\.weight is the same parameter as 0\.weight"),
        (parametrized(), "ParametrizedLinear has no entry|ParametrizedLinear\\) has no entry"),
        (nn.LazyLinear(3), "call the torch module once"),
        (nn.Sequential(nn.LazyConv1d(3, 2)), r"0 \(LazyConv1d\) has no weights"),
        (nn.Sequential(nn.Linear(2, 2, device="meta")), r"0 \(Linear\) has weights on the device 'meta'"),
        (nn.Linear, "a torch.nn.Module is translated, not <class"),
        (nn.ParameterDict({"form": torch.ones(2)}), "ParameterDict holds 'form'"),
        (nn.ModuleDict({"deterministic": nn.Tanh()}), "ModuleDict holds 'deterministic'"),
    ],
    ids=[
        "own forward",
        "subclass",
        "hook",
        "forward on the object",
        "tied",
        "parametrized",
        "lazy",
        "lazy inside",
        "meta",
        "a class",
        "a taken name",
        "a layer of a taken name",
    ],
)
def test_what_cannot_be_read_is_refused_by_name(model: nn.Module, words: str) -> None:
    with pytest.raises(InputError, match=words):
        eq.translate(model)


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_bfloat16_is_taken_as_float32(to: str) -> None:
    model, batch = nn.Linear(4, 3).bfloat16(), torch.from_numpy(normal(2, 4)).bfloat16()
    found = np.asarray(eq.translate(model, to=to)(batch))
    np.testing.assert_array_max_ulp(found, model.float()(batch.float()).detach().numpy(), 64)


def test_an_unknown_framework_is_refused() -> None:
    with pytest.raises(InputError, match="nnx"):
        eq.translate(nn.Linear(2, 2), to="nmx")


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_lists_hold_their_layers_and_are_not_called(to: str) -> None:
    for model in (nn.ModuleList([nn.Linear(2, 3)]), nn.ModuleDict({"a": nn.Linear(2, 3)})):
        made = eq.translate(model, to=to)
        assert made.mapping.bind(*leaves_of(model, made)).moves
        with pytest.raises(NotImplementedError):
            made(np.ones((1, 2), np.float32))


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize(
    "model", [nn.ParameterList([torch.ones(2), torch.zeros(3)]), nn.ParameterDict({"w": torch.ones(2)})], ids=str
)
def test_lists_of_parameters(model: nn.Module, to: str) -> None:
    made = eq.translate(model, to=to)
    bound = made.mapping.bind(*leaves_of(model, made))
    assert len(bound.moves) == len(list(model.parameters()))


def leaves_of(model: nn.Module, made: Translation) -> tuple[Leaves, Leaves]:
    return subject(model).leaves, made.subject.leaves


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_a_call_is_torch_s_in_layout_and_in_mode(to: str) -> None:
    model = perturbed(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))).train()
    batch = normal(4, 2, 5, 6)
    made = eq.translate(model, to=to)
    for _ in range(3):
        wanted, found = model(torch.from_numpy(batch)), made(batch)
    assert found.shape == wanted.shape
    np.testing.assert_array_max_ulp(np.asarray(found[0, 0, 0, :1]), wanted.detach().numpy()[0, 0, 0, :1], 64)


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_verify_takes_a_translation(to: str) -> None:
    model = perturbed(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(36, 2)))
    checks = ["structure", "roundtrip", "outputs", "parameter_gradients", "input_gradients", "state"]
    report = eq.verify(model, eq.translate(model, to=to), (normal(3, 2, 4, 5),), checks=checks, examples=3)
    report.assert_equivalent()
