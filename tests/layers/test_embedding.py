"""Embedding and EmbeddingBag against torch's: gradients of padding, frequencies and ties, and the moved weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.agreement import assert_agree
from tests.layers.sides import FRAMEWORKS, assert_translates, normal, perturbed

some = settings(max_examples=max(1, settings().max_examples // 3))  # what costs is compiling a structure
NORMS = st.sampled_from((None, (1.0, 2.0), (0.7, 1.0), (0.5, float("inf")), (2.0, 0.5)))


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[nn.Module, np.ndarray]:
    """An embedding of any options, and indices that repeat."""
    count, size = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    module = nn.Embedding(count, size, **_options(draw, count), scale_grad_by_freq=draw(st.booleans()))
    shape = draw(st.sampled_from(((), (0,), (1,), (7,), (2, 4), (3, 1, 2))))
    return perturbed(module), _indices(draw, count, shape)


@st.composite
def bags(draw: st.DrawFn) -> tuple[nn.Module, tuple[Any, ...]]:
    """A bag of any options with any legal call: empty bags, bags of padding alone, weights, both forms of offsets."""
    count, size = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(("sum", "mean", "max")))
    options = _options(draw, count) | {"mode": mode, "include_last_offset": draw(st.booleans())}
    options["scale_grad_by_freq"] = mode != "max" and draw(st.booleans())
    module = perturbed(nn.EmbeddingBag(count, size, **options))
    words = draw(st.sampled_from((0, 1, 5, 8)))
    offsets = None
    shape: tuple[int, ...] = (draw(st.integers(0, 3)), words)
    if words == 0 or draw(st.booleans()):
        shape = (words,)
        cuts = sorted(draw(st.lists(st.integers(0, words), max_size=3)))
        offsets = np.array([0, *cuts] + ([words] if module.include_last_offset else []))
    weights = (normal(*shape),) if mode == "sum" and draw(st.booleans()) else ()
    return module, (_indices(draw, count, shape), offsets, *weights)


def _options(draw: st.DrawFn, count: int) -> dict[str, Any]:
    padding = draw(st.one_of(st.none(), st.integers(-count, count - 1)))
    norm = draw(NORMS)
    return {"padding_idx": padding} | ({} if norm is None else {"max_norm": norm[0], "norm_type": norm[1]})


def _indices(draw: st.DrawFn, count: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return rng.integers(0, count, shape, draw(st.sampled_from((np.int64, np.int32))))


@some
@given(embeddings(), st.sampled_from(FRAMEWORKS))
def test_any_embedding(case: tuple[nn.Module, np.ndarray], to: str) -> None:
    assert_translates(*case, frameworks=(to,))


@some
@given(bags(), st.sampled_from(FRAMEWORKS))
def test_any_bag(case: tuple[nn.Module, tuple[Any, ...]], to: str) -> None:
    assert_translates(case[0], *case[1], frameworks=(to,))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_no_words_at_all(mode: str) -> None:
    module = nn.EmbeddingBag(4, 3, mode=mode, include_last_offset=True)
    assert_translates(module, np.zeros(0, int), np.array([0, 0, 0]), frameworks=("nnx",))


def test_ties_in_a_maximum_give_the_gradient_to_the_first() -> None:
    module = nn.EmbeddingBag(4, 3, mode="max")
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2, 3], [1, 2, 0], [1, 5, 3], [1, 2, 3]]))
    assert_translates(module, np.array([1, 0, 3, 2, 3, 3]), np.array([0, 4]), moved=())


def test_a_bare_number_in_an_embedding_of_one_row() -> None:
    assert_translates(perturbed(nn.Embedding(1, 3)), np.array(0))


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_weight_and_a_padding_row_put_in_after_construction(kind: type[nn.Module], to: str) -> None:
    module = kind(4, 3)
    module.weight = nn.Parameter(torch.ones(6, 2))
    assert_translates(perturbed(module), np.array([[1, 5], [5, 0]]), frameworks=(to,))
    module.padding_idx = -1
    assert_translates(module, np.array([[1, 5], [5, 0]]), frameworks=(to,))
    module.padding_idx = 6
    with pytest.raises(InputError, match="padding_idx 6 is none of its 6 rows"):
        eq.translate(module, to=to)


def test_a_row_as_long_as_the_largest_norm_stays() -> None:
    module = nn.Embedding(3, 2, max_norm=5.0)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]]))
    assert_translates(module, np.array([0, 1, 2, 1]), moved=())


def moved_by_max_norm(kind: type[nn.Module], to: str) -> None:
    """Raise AssertionError unless one call shortens the weight's rows as torch's does: those asked for, no others."""
    indices = np.array([[1, 2, 2], [4, 1, 1]])
    before = normal(5, 3)

    def run(bits: int, arrays: Any, port: bool) -> Any:
        module = kind(5, 3, max_norm=0.3, _weight=torch.from_numpy(arrays["weight"].copy()))
        if not port:
            module(torch.from_numpy(indices))
            return {"weight": module.weight.detach().numpy()}
        with jax.enable_x64(bits == 64):
            made = eq.translate(module, to=to)
            made(indices)
            held = made.module.embedding[...] if to == "nnx" else made.variables["params"]["embedding"]
            return {"weight": np.asarray(held)}

    assert_agree(lambda bits, a: run(bits, a, False), lambda bits, a: run(bits, a, True), {"weight": before})
    after = run(64, {"weight": before.astype(np.float64)}, True)["weight"]
    assert (after != before).any(1).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_changes_the_weight_as_torch_does(kind: type[nn.Module], to: str) -> None:
    moved_by_max_norm(kind, to)


def test_max_norm_in_an_nnx_step_moves_the_weight_and_keeps_the_gradient() -> None:
    module = perturbed(nn.Embedding(5, 3, max_norm=0.8))
    made = eq.translate(module).module

    @nnx.jit
    def slope(made: nnx.Module) -> Any:
        return nnx.grad(lambda model: model(jnp.array([1, 2])).sum() + 2 * model(jnp.array([2, 4])).sum())(made)

    found = slope(made).embedding[...]
    assert np.array_equal(found, np.array([0, 1, 3, 0, 2])[:, None] * np.ones((5, 3)))
    module(torch.tensor([1, 2, 4]))
    assert np.linalg.norm(made.embedding[...], axis=1)[[1, 2, 4]].max() < 0.81


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_gradient_is_the_same_numbers_densely(kind: type[nn.Module]) -> None:
    indices = np.array([[1, 2, 2], [4, 1, 1]])
    options = {"mode": "sum"} if kind is nn.EmbeddingBag else {}
    module = perturbed(kind(5, 3, sparse=True, **options))
    module(torch.from_numpy(indices)).sum().backward()
    made = eq.translate(module)
    found = nnx.grad(lambda model: model(jnp.asarray(indices)).sum())(made.module).embedding[...]
    assert np.array_equal(found, module.weight.grad.to_dense().numpy())


def test_what_torch_refuses_by_value_is_nan() -> None:
    made = eq.translate(nn.Embedding(5, 3), to="nnx")
    out = np.asarray(jax.jit(made)(jnp.array([0, -1, 5, 4])))
    assert np.isnan(out).any(1).tolist() == [False, True, True, False]
    wrapped = eq.translate(nn.Embedding(5, 3), to="linen")
    assert np.array_equal(wrapped(jnp.array([-1])), wrapped(jnp.array([4])))
    for mode in ("sum", "mean", "max"):
        bag = jax.jit(eq.translate(nn.EmbeddingBag(5, 3, mode=mode)))
        assert np.isnan(bag(jnp.array([0, 5, 1]), jnp.array([0, 2]))).any(1).tolist() == [True, False]
        for offsets in ([1, 2], [0, 4], [0, 2, 1]):
            assert np.isnan(bag(jnp.array([0, 1, 2]), jnp.array(offsets))).all(), offsets


REFUSED = {
    "floats": (nn.Embedding(5, 3), (normal(2),)),
    "floats in a bag": (nn.EmbeddingBag(5, 3), (normal(2, 2),)),
    "flat without offsets": (nn.EmbeddingBag(5, 3), (np.array([1, 2]),)),
    "bags with offsets": (nn.EmbeddingBag(5, 3), (np.array([[1, 2]]), np.array([0]))),
    "three axes": (nn.EmbeddingBag(5, 3), (np.array([[[1, 2]]]),)),
    "offsets of two axes": (nn.EmbeddingBag(5, 3), (np.array([1, 2]), np.array([[0]]))),
    "bags of no words": (nn.EmbeddingBag(5, 3), (np.zeros((2, 0), int),)),
    "no last offset": (nn.EmbeddingBag(5, 3, include_last_offset=True), (np.array([1]), np.zeros(0, int))),
    "weights in a mean": (nn.EmbeddingBag(5, 3), (np.array([[1, 2]]), None, normal(1, 2))),
    "weights of another shape": (nn.EmbeddingBag(5, 3, mode="sum"), (np.array([[1, 2]]), None, normal(2))),
}


@pytest.mark.parametrize(("module", "inputs"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        module(*(given if given is None else torch.from_numpy(given) for given in inputs))
    for to in FRAMEWORKS:
        with pytest.raises((InputError, ValueError)):
            jax.jit(eq.translate(module, to=to))(*inputs)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}])
def test_options_that_a_maximum_does_not_take(options: dict[str, bool]) -> None:
    module = nn.EmbeddingBag(5, 3, mode="max", **options)
    with pytest.raises(ValueError, match="max mode does not support"):
        module(torch.tensor([[1, 2]]))
    with pytest.raises(InputError, match="in torch too"):
        eq.translate(module)


def test_a_translation_keeps_the_options_of_its_day() -> None:
    module = nn.Embedding(5, 3, max_norm=0.5)
    made = eq.translate(module)
    module.max_norm = 100.0
    rows = np.asarray(made(np.arange(5)))
    assert np.linalg.norm(rows, axis=-1).max() <= 0.5
