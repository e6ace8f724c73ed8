"""Rules, mappings and their inference: the one law, both directions, every problem told, and nothing by shape alone."""

from __future__ import annotations

import itertools
import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equivalence.errors import MappingError
from equivalence.weights import Bound, Leaves, Mapping, Rule, flip, infer, offset


def arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[p].shape == b[p].shape and a[p].tobytes() == b[p].tobytes() for p in a)


def there_and_back(bound: Bound, given: dict[str, np.ndarray]) -> bool:
    """Whether every bit survives the way there and back, and the inverse of the inverse is the mapping."""
    forward = bound.forward(given)
    return same(bound.backward(forward), given) and same(bound.inverse().inverse().forward(given), forward)


# --- what rules mean, against plain NumPy ------------------------------------------------------------------------


def test_a_transpose_is_a_transpose() -> None:
    bound = Mapping([Rule("fc.weight", "fc.kernel", "o k -> k o")]).bind(
        Leaves({"fc.weight": (2, 3)}), Leaves({"fc.kernel": (3, 2)})
    )
    given = arrays({"fc.weight": (2, 3)})
    np.testing.assert_array_equal(bound.forward(given)["fc.kernel"], given["fc.weight"].T)
    assert there_and_back(bound, given)


def test_layers_are_stacked_in_their_own_order() -> None:
    """Twelve layers: in the order of strings, layer 10 would come before layer 2."""
    shapes = {f"h.{i}.fc.weight": (2, 3) for i in range(12)}
    bound = Mapping([Rule("h.{i}.fc.weight", "blocks.fc.kernel", "i o k -> i k o")]).bind(
        Leaves(shapes), Leaves({"blocks.fc.kernel": (12, 3, 2)})
    )
    given = arrays(shapes)
    wanted = np.stack([given[f"h.{i}.fc.weight"].T for i in range(12)])
    np.testing.assert_array_equal(bound.forward(given)["blocks.fc.kernel"], wanted)
    assert there_and_back(bound, given)


def test_a_fused_projection_is_split_in_the_order_of_its_values() -> None:
    shapes = {"h.0.qkv.weight": (3 * 2 * 5, 7), "h.1.qkv.weight": (3 * 2 * 5, 7)}
    target = {f"b.{i}.{s}.kernel": (7, 2, 5) for i in range(2) for s in ("query", "key", "value")}
    rule = Rule("h.{i}.qkv.weight", "b.{i}.{s}.kernel", "(s h d) e -> s e h d", s=("query", "key", "value"))
    bound = Mapping([rule]).bind(Leaves(shapes), Leaves(target))
    given = arrays(shapes)
    got = bound.forward(given)
    for i, (number, name) in itertools.product(range(2), enumerate(("query", "key", "value"))):
        part = given[f"h.{i}.qkv.weight"][10 * number : 10 * number + 10]
        np.testing.assert_array_equal(got[f"b.{i}.{name}.kernel"], part.reshape(2, 5, 7).transpose(2, 0, 1))
    assert there_and_back(bound, given)


def test_gates_keep_the_order_of_the_letters() -> None:
    target = {f"cell.i{g}.kernel": (3, 4) for g in "ifgo"}
    bound = Mapping([Rule("rnn.weight_ih_l0", "cell.i{g}.kernel", "(g h) x -> g x h", g="ifgo")]).bind(
        Leaves({"rnn.weight_ih_l0": (16, 3)}), Leaves(target)
    )
    given = arrays({"rnn.weight_ih_l0": (16, 3)})
    for number, gate in enumerate("ifgo"):
        np.testing.assert_array_equal(
            bound.forward(given)[f"cell.i{gate}.kernel"], given["rnn.weight_ih_l0"][4 * number : 4 * number + 4].T
        )
    assert there_and_back(bound, given)


def test_a_flatten_of_channels_last_needs_one_length() -> None:
    rule = Rule("fc.weight", "fc.kernel", "o (c h w) -> (h w c) o", c=2, h=3)
    bound = Mapping([rule]).bind(Leaves({"fc.weight": (5, 24)}), Leaves({"fc.kernel": (24, 5)}))
    given = arrays({"fc.weight": (5, 24)})
    wanted = given["fc.weight"].reshape(5, 2, 3, 4).transpose(2, 3, 1, 0).reshape(24, 5)
    np.testing.assert_array_equal(bound.forward(given)["fc.kernel"], wanted)
    assert there_and_back(bound, given)


def test_changes_of_values_invert_and_gradients_take_the_linear_part() -> None:
    source, target = Leaves({"norm.weight": (5,)}), Leaves({"norm.scale": (5,)})
    given = {"norm.weight": np.linspace(0.5, 2.0, 5)}
    shifted = Mapping([Rule("norm.weight", "norm.scale", change=offset(-1.0))]).bind(source, target)
    np.testing.assert_array_equal(shifted.forward(given)["norm.scale"], given["norm.weight"] - 1.0)
    np.testing.assert_array_equal(shifted.backward(shifted.forward(given))["norm.weight"], given["norm.weight"])
    np.testing.assert_array_equal(shifted.forward(given, gradient=True)["norm.scale"], given["norm.weight"])
    turned = Mapping([Rule("norm.weight", "norm.scale", change=flip(0))]).bind(source, target)
    np.testing.assert_array_equal(turned.forward(given)["norm.scale"], given["norm.weight"][::-1])
    np.testing.assert_array_equal(
        turned.backward(given | {"norm.scale": given["norm.weight"]})["norm.weight"], given["norm.weight"][::-1]
    )


def test_a_tied_leaf_may_go_under_either_name_and_stays_one_leaf() -> None:
    source = Leaves({"embed.weight": (7, 3)}, {"head.weight": "embed.weight"})
    given = arrays({"embed.weight": (7, 3)})
    tied = Leaves({"embed.embedding": (7, 3)})
    for name in ("embed.weight", "head.weight"):
        bound = Mapping([Rule(name, "embed.embedding")]).bind(source, tied)
        assert there_and_back(bound, given)
    untied = Leaves({"embed.embedding": (7, 3), "head.kernel": (3, 7)})
    bound = Mapping([Rule("embed.weight", "embed.embedding"), Rule("head.weight", "head.kernel", "v e -> e v")]).bind(
        source, untied
    )
    assert bound.forward(given)["head.kernel"].shape == (3, 7)
    assert there_and_back(bound, given)


def test_leaves_on_one_side_only_must_be_declared() -> None:
    source = Leaves({"bn.num_batches_tracked": (), "bn.weight": (3,)})
    target = Leaves({"bn.scale": (3,), "bn.count": ()})
    renamed = Rule("bn.weight", "bn.scale")
    with pytest.raises(MappingError, match=r"num_batches_tracked .*not claimed.*bn.count .*not produced"):
        Mapping([renamed]).bind(source, target)
    bound = Mapping([renamed, Rule("bn.num_batches_tracked", None), Rule(None, "bn.count")]).bind(source, target)
    assert bound.without_counterpart() == (["bn.num_batches_tracked"], ["bn.count"])
    assert bound.inverse().without_counterpart() == (["bn.count"], ["bn.num_batches_tracked"])


# --- any rule that obeys the law is a bijection ---------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Rule, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """A rule over axes of pairwise distinct lengths: any permutation, any fusing on either side, any number of holes
    on the source alone, on the target alone and on both."""
    count = draw(st.integers(1, 5))
    names = list(string.ascii_lowercase[:count])
    lengths = dict(zip(names, draw(st.permutations((1, 2, 3, 4, 5)))[:count], strict=True))
    sides = []
    for _ in range(2):
        order = draw(st.permutations(names))
        grouped: list[list[str]] = []
        for name in order:
            if grouped and draw(st.booleans()):
                grouped[-1].append(name)
            else:
                grouped.append([name])
        sides.append(grouped)
    alone = [[group[0] for group in side if len(group) == 1] for side in sides]
    split = draw(st.lists(st.sampled_from(alone[1]), unique=True, max_size=2)) if alone[1] else []
    stacked = [n for n in alone[0] if n not in split]
    stack = draw(st.lists(st.sampled_from(stacked), unique=True, max_size=2)) if stacked else []
    shared = draw(st.integers(0, 2))

    def template(own: list[str], word: str) -> str:
        return ".".join([word, *(["{layer}"] if shared else []), *(f"{n}{{{n}}}" for n in own), "leaf"])

    def text(side: list[list[str]]) -> str:
        return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in side)

    def shapes(own: list[str], word: str, side: list[list[str]]) -> dict[str, tuple[int, ...]]:
        shape = tuple(math.prod(lengths[n] for n in group) for group in side if group[0] not in own or len(group) > 1)
        found = {}
        for values in itertools.product(*(range(lengths[n]) for n in own)):
            for layer in range(max(1, shared)):
                path = template(own, word).replace("{layer}", str(layer))
                for name, value in zip(own, values, strict=True):
                    path = path.replace(f"{{{name}}}", str(value))
                found[path] = shape
        return found

    rule = Rule(
        template(stack, "torch"),
        template(split, "jax"),
        f"{text(sides[0])} -> {text(sides[1])}",
        **{n: lengths[n] for n in names if n not in stack and n not in split},
    )
    return rule, shapes(stack, "torch", sides[0]), shapes(split, "jax", sides[1])


@given(layouts(), st.integers(0, 2**31 - 1))
def test_every_rule_moves_every_element_and_moves_it_back(
    layout: tuple[Rule, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]], seed: int
) -> None:
    rule, source, target = layout
    bound = Mapping([rule]).bind(Leaves(source), Leaves(target))
    given = arrays(source, seed)
    got = bound.forward(given)
    assert {path: value.shape for path, value in got.items()} == target
    assert there_and_back(bound, given)
    ours, theirs = (np.sort(np.concatenate([a.reshape(-1) for a in side.values()])) for side in (given, got))
    assert ours.tobytes() == theirs.tobytes()
    backwards = Mapping([rule]).inverse().bind(Leaves(target), Leaves(source))
    assert same(backwards.forward(got), given)


@given(layouts())
def test_a_mapping_of_integers_moves_the_same_places(
    layout: tuple[Rule, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]],
) -> None:
    """Where each element goes does not depend on its value: gradients and moments move like weights."""
    rule, source, target = layout
    bound = Mapping([rule]).bind(Leaves(source), Leaves(target))
    ends = np.cumsum([0, *(math.prod(shape) for shape in source.values())])
    places = {
        path: np.arange(start, start + math.prod(shape)).reshape(shape)
        for (path, shape), start in zip(source.items(), ends, strict=False)
    }
    as_values, as_gradients = bound.forward(places), bound.forward(places, gradient=True)
    assert all(np.array_equal(as_values[path], as_gradients[path]) for path in target)


# --- the law, broken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h.{i}.w", "blocks.w"), "hole {i} stands on one side only"),
        (("h.{i}.w", "blocks.w", "o k -> k o"), "hole {i} stands on one side only"),
        (("w", "blocks.{s}.w", "(s o) k -> (s k) o"), "hole {s} stands on one side only"),
        (("w", "w", "o k -> k"), "each axis exactly once"),
        (("w", "w", "o o -> o o"), "each axis exactly once"),
        (("w", "w", "o k"), "left -> right"),
        (("w", "w", "o ... -> ... o"), "axes are names"),
        (("w", "w", "o 1 -> o"), "axes are names"),
        ((None, None), "a source or a target"),
    ],
)
def test_a_rule_that_is_no_bijection_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(MappingError, match=message.replace("{", r"\{").replace("}", r"\}")):
        Rule(*arguments)


def test_all_problems_come_in_one_message_with_the_nearest_names() -> None:
    source = Leaves({"fc1.weight": (2, 3), "fc1.bias": (2,), "fc2.weight": (4, 2), "norm.weight": (2,)})
    target = Leaves({"fc1.kernel": (3, 2), "fc1.bias": (2,), "fc2.kernel": (4, 2), "norm.scale": (2,)})
    rules = [
        Rule("fc1.weight", "fc1.kernel", "o k -> k o"),
        Rule("fc1.weight", "fc1.kernel", "o k -> k o"),
        Rule("fc2.weight", "fc2.kernel", "o k -> k o"),
        Rule("fc3.weight", "fc3.kernel"),
    ]
    with pytest.raises(MappingError) as caught:
        Mapping(rules).bind(source, target)
    text = str(caught.value)
    for part in (
        "reference leaf fc1.weight is claimed 2 times",
        "port leaf fc1.kernel is produced 2 times",
        "fc2.weight (4, 2) does not fit fc2.kernel (4, 2) by 'o k -> k o'",
        "matches no reference leaf (nearest: fc2.weight",
        "reference leaf fc1.bias (2,) is not claimed",
        "reference leaf norm.weight (2,) is not claimed",
        "port leaf norm.scale (2,) is not produced",
    ):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("rule", "source", "target", "message"),
    [
        (Rule("w", "w", "o k -> k o"), {"w": (2, 3)}, {"w": (2, 3)}, "does not fit"),
        (Rule("w", "w"), {"w": (2, 3)}, {"w": (3, 2)}, "does not fit .* without axes"),
        (Rule("w", "w", "o k -> k o"), {"w": (6,)}, {"w": (3, 2)}, "has 1 axes, the pattern names 2"),
        (
            Rule("w", "w", "o (c h w) -> (h w c) o"),
            {"w": (2, 6)},
            {"w": (6, 2)},
            "leave c, h, w open: give lengths, c=",
        ),
        (Rule("w", "w", "(a b) -> a b"), {"w": (6,)}, {"w": (2, 2)}, "does not fit"),
        (Rule("h.{i}.w", "b.w", "i o -> i o"), {"h.0.w": (2,), "h.1.w": (3,)}, {"b.w": (2, 2)}, "different shapes"),
        (Rule("h.{i}.w", "b.w", "i o -> i o"), {"h.0.w": (2,), "h.1.w": (2,)}, {"b.w": (3, 2)}, "does not fit"),
        (Rule("w", "b.{s}.w", "(s o) -> s o", s="xyz"), {"w": (6,)}, {"b.x.w": (2,), "b.y.w": (2,)}, "no leaf for s=z"),
        (Rule("h.{i}.w", "b.{i}.w"), {"h.0.w": (2,), "h.1.w": (2,)}, {"b.0.w": (2,)}, "no leaf b.1.w"),
    ],
)
def test_what_does_not_fit_is_said(
    rule: Rule, source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(MappingError, match=message):
        Mapping([rule]).bind(Leaves(source), Leaves(target))


def test_a_wrong_layout_is_seen_in_the_values() -> None:
    """Heads and their width fused the other way round fit the shape and move other elements."""
    source, target = Leaves({"w": (6, 5)}), Leaves({"w": (5, 2, 3)})
    given = arrays({"w": (6, 5)})
    right = Mapping([Rule("w", "w", "(h d) e -> e h d", h=2)]).bind(source, target).forward(given)["w"]
    wrong = Mapping([Rule("w", "w", "(d h) e -> e h d", h=2)]).bind(source, target).forward(given)["w"]
    assert right.shape == wrong.shape
    assert not np.array_equal(right, wrong)


# --- inference --------------------------------------------------------------------------------------------------------


def test_inference_goes_by_layer_type_also_where_shapes_would_fit_both_ways() -> None:
    square = Leaves({"fc.weight": (4, 4), "emb.weight": (4, 4)})
    port = Leaves({"fc.kernel": (4, 4), "emb.embedding": (4, 4)})
    mapping = infer(square, port, {"fc.weight": "Linear", "emb.weight": "Embedding"})
    given = arrays(dict(square.shapes))
    got = mapping.bind(square, port).forward(given)
    np.testing.assert_array_equal(got["fc.kernel"], given["fc.weight"].T)
    np.testing.assert_array_equal(got["emb.embedding"], given["emb.weight"])


def test_inference_never_goes_by_shape() -> None:
    """The one leaf left on each side, of equal shape: still no mapping."""
    with pytest.raises(MappingError, match=r"no port leaf is named like a.weight.*port leaves left: b.kernel"):
        infer(Leaves({"a.weight": (3, 5)}), Leaves({"b.kernel": (5, 3)}), {"a.weight": "Linear"})


def test_a_layout_of_the_wrong_shape_is_no_mapping() -> None:
    source, port = Leaves({"fc.weight": (2, 3)}), Leaves({"fc.kernel": (2, 3)})
    with pytest.raises(MappingError, match="does not fit"):
        infer(source, port, {"fc.weight": "Linear"}).bind(source, port)


def test_what_is_ambiguous_is_asked() -> None:
    port = Leaves({"fc.kernel": (4, 4), "fc.weight": (4, 4)})
    with pytest.raises(
        MappingError, match=r"fc.weight could be any of: Rule\('fc.weight', 'fc.kernel', .*weights=Mapping"
    ):
        infer(Leaves({"fc.weight": (4, 4)}), port, {"fc.weight": "Linear"})


def test_inference_reads_numbered_modules_either_way_and_drops_counters() -> None:
    source = Leaves({"layers.0.weight": (2, 3), "bn.running_mean": (2,), "bn.num_batches_tracked": ()})
    port = Leaves({"layers_0.kernel": (3, 2), "bn.mean": (2,)})
    layers = {"layers.0.weight": "Linear", "bn.running_mean": "BatchNorm1d", "bn.num_batches_tracked": "BatchNorm1d"}
    bound = infer(source, port, layers).bind(source, port)
    assert set(bound.forward(arrays(dict(source.shapes)))) == set(port.shapes)
    assert bound.without_counterpart()[0] == ["bn.num_batches_tracked"]


# --- on real models ---------------------------------------------------------------------------------------------------


def test_torch_to_nnx_to_linen_to_torch_is_bit_exact() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    from equivalence.frameworks import adapt
    from equivalence.spec import load

    spec = load("titanic_mlp")
    torch, nnx, linen = (adapt(spec.implementation(f).build(spec.config, 3)) for f in ("torch", "nnx", "linen"))
    to_nnx = Mapping(spec.rules["nnx"]).bind(torch.leaves, nnx.leaves)
    to_linen = Mapping(spec.rules["linen"]).bind(torch.leaves, linen.leaves)
    rng = np.random.default_rng(0)
    weights = {
        p: np.array([0.0, -0.0, np.nan, 1e-45, 3e38], np.float32)[rng.integers(0, 5, v.shape)] + v
        for p, v in torch.params.items()
    }
    in_nnx = to_nnx.forward(weights)
    in_linen = to_linen.forward(to_nnx.backward(in_nnx))
    assert {p: v.shape for p, v in in_nnx.items()} == {p: v.shape for p, v in nnx.params.items()}
    assert {p: v.shape for p, v in in_linen.items()} == {p: v.shape for p, v in linen.params.items()}
    assert same(to_linen.backward(in_linen), weights)
    spoilt = {**in_linen, "linear2.bias": np.nextafter(in_linen["linear2.bias"], np.float32(9))}
    assert not same(to_linen.backward(spoilt), weights)


@pytest.mark.parametrize("axes", ["i o h -> h i o", "o k h -> k h o", None])
def test_a_change_along_an_axis_is_undone_where_it_was_done(axes):
    array = np.arange(24.0).reshape(2, 3, 4)
    target = array if axes is None else np.einsum(array, [0, 1, 2], {"i": [2, 0, 1], "o": [1, 2, 0]}[axes[0]])
    rule = Rule("w", "k", axes, change=flip(0))
    bound = Mapping([rule]).bind(Leaves({"w": array.shape}), Leaves({"k": target.shape}))
    moved = bound.forward({"w": array})
    np.testing.assert_array_equal(moved["k"], target[::-1])
    np.testing.assert_array_equal(bound.backward(moved)["w"], array)
    np.testing.assert_array_equal(bound.backward(moved, gradient=True)["w"], array)
