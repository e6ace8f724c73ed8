"""Mappings are found from names, layer types and shapes: under any of the ways in which ports are named and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equivalence.errors import MappingError
from equivalence.weights import Leaves, Rule, infer
from equivalence.weights.infer import propose
from equivalence.weights.layouts import constants
from equivalence.weights.naming import read

WIDTH, HEADS, SIZE, INNER, WORDS, PLACES = 12, 3, 4, 20, 31, 7
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Style:
    """How a port names and lays out a decoder."""

    root: str = ""
    layers: str = "layers.{i}"
    attention: str = "attn"
    projections: tuple[str, str, str, str] = ("query", "key", "value", "out")
    forward: tuple[str, str] = ("fc1", "fc2")
    norms: tuple[str, str, str] = ("ln_1", "ln_2", "ln_f")
    tables: tuple[str, str] = ("wte", "wpe")
    leaves: Mapping[str, str] = field(default_factory=lambda: FLAX)
    fused: str = ""
    stacked: bool = False
    split: bool = False


FLAX = {"linear": "kernel", "norm": "scale", "table": "embedding", "bias": "bias"}
TORCH = {"linear": "weight", "norm": "weight", "table": "weight", "bias": "bias"}

STYLES = st.builds(
    Style,
    root=st.sampled_from(["", "params.", "model.", "transformer.decoder."]),
    layers=st.sampled_from(["layers.{i}", "layers_{i}", "blocks_{i}", "h.{i}", "encoder.block{i}", "Block_{i}"]),
    attention=st.sampled_from(["attn", "self_attn", "attention", "mha", "MultiHeadAttention_0"]),
    projections=st.sampled_from(
        [
            ("query", "key", "value", "out"),
            ("to_q", "to_k", "to_v", "to_out"),
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            ("wq", "wk", "wv", "wo"),
            ("q", "k", "v", "proj"),
            ("q_lin", "k_lin", "v_lin", "out_lin"),
        ]
    ),
    forward=st.sampled_from(
        [
            ("fc1", "fc2"),
            ("mlp.up_proj", "mlp.down_proj"),
            ("ffn.lin1", "ffn.lin2"),
            ("intermediate.dense", "output.dense"),
            ("mlp.wi", "mlp.wo"),
            ("mlp.Dense_0", "mlp.Dense_1"),
            ("mlp.layers_0", "mlp.layers_2"),
        ]
    ),
    norms=st.sampled_from(
        [
            ("ln_1", "ln_2", "ln_f"),
            ("norm1", "norm2", "norm"),
            ("LayerNorm_0", "LayerNorm_1", "final_norm"),
            ("input_layernorm", "post_attention_layernorm", "norm"),
        ]
    ),
    tables=st.sampled_from([("wte", "wpe"), ("embed_tokens", "embed_positions"), ("tok_emb", "pos_emb")]),
    leaves=st.sampled_from([FLAX, TORCH]),
    fused=st.sampled_from(["", "qkv", "c_attn", "in_proj"]),
    stacked=st.booleans(),
    split=st.booleans(),
)


def reference(layers: int, fused: bool) -> tuple[Leaves, dict[str, str]]:
    """A torch decoder's leaves and layer types."""
    kinds: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(path: str, kind: str, shape: tuple[int, ...], bias: bool = True) -> None:
        for leaf, size in (("weight", shape), ("bias", shape[:1])):
            if leaf == "weight" or bias:
                shapes[f"{path}.{leaf}"], kinds[f"{path}.{leaf}"] = size, kind

    layer("model.wte", "Embedding", (WORDS, WIDTH), bias=False)
    layer("model.wpe", "Embedding", (PLACES, WIDTH), bias=False)
    for number in range(layers):
        base = f"model.h.{number}"
        layer(f"{base}.ln_1", "LayerNorm", (WIDTH,))
        if fused:
            for leaf, size in (("weight", (3 * WIDTH, WIDTH)), ("bias", (3 * WIDTH,))):
                shapes[f"{base}.attn.in_proj_{leaf}"], kinds[f"{base}.attn.in_proj_{leaf}"] = size, "MultiheadAttention"
        else:
            for part in "qkv":
                layer(f"{base}.attn.{part}_proj", "Linear", (WIDTH, WIDTH))
        layer(f"{base}.attn.out_proj", "Linear", (WIDTH, WIDTH))
        layer(f"{base}.ln_2", "LayerNorm", (WIDTH,))
        layer(f"{base}.mlp.fc1", "Linear", (INNER, WIDTH))
        layer(f"{base}.mlp.fc2", "Linear", (WIDTH, INNER))
    layer("model.ln_f", "LayerNorm", (WIDTH,))
    return Leaves(shapes), kinds


def ported(arrays: Arrays, style: Style, layers: int, fused: bool) -> Arrays:
    """What the port holds, moved by hand."""
    made: Arrays = {}

    def put(path: str, kind: str, weight: np.ndarray, bias: np.ndarray | None) -> None:
        turned = kind == "linear" and style.leaves is FLAX and weight.ndim == 2
        made[f"{style.root}{path}.{style.leaves[kind]}"] = weight.T if turned else weight
        if bias is not None:
            made[f"{style.root}{path}.bias"] = bias

    for ours, theirs in zip(("wte", "wpe"), style.tables, strict=True):
        put(theirs, "table", arrays[f"model.{ours}.weight"], None)
    for number in range(layers):
        base, path = f"model.h.{number}", style.layers.format(i=number)
        for ours, theirs in zip(("ln_1", "ln_2"), style.norms, strict=False):
            put(f"{path}.{theirs}", "norm", arrays[f"{base}.{ours}.weight"], arrays[f"{base}.{ours}.bias"])
        parts = _projections(arrays, base, fused)
        attention = f"{path}.{style.attention}"
        if style.fused:
            whole = [np.concatenate([pair[side] for pair in parts]) for side in (0, 1)]
            put(f"{attention}.{style.fused}", "linear", whole[0], whole[1])
        else:
            for name, (weight, bias) in zip(style.projections, parts, strict=False):
                if style.split:
                    weight, bias = weight.T.reshape(WIDTH, HEADS, SIZE), bias.reshape(HEADS, SIZE)
                put(f"{attention}.{name}", "linear", weight, bias)
        weight, bias = (arrays[f"{base}.attn.out_proj.{leaf}"] for leaf in ("weight", "bias"))
        out = weight.T.reshape(HEADS, SIZE, WIDTH) if style.split and not style.fused else weight
        put(f"{attention}.{style.projections[3]}", "linear", out, bias)
        for ours, theirs in zip(("fc1", "fc2"), style.forward, strict=True):
            put(f"{path}.{theirs}", "linear", arrays[f"{base}.mlp.{ours}.weight"], arrays[f"{base}.mlp.{ours}.bias"])
    put(style.norms[2], "norm", arrays["model.ln_f.weight"], arrays["model.ln_f.bias"])
    return _stacked(made, style, layers) if style.stacked and layers > 1 else made


def _projections(arrays: Arrays, base: str, fused: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    if fused:
        weights, biases = (np.split(arrays[f"{base}.attn.in_proj_{leaf}"], 3) for leaf in ("weight", "bias"))
        return list(zip(weights, biases, strict=True))
    return [(arrays[f"{base}.attn.{s}_proj.weight"], arrays[f"{base}.attn.{s}_proj.bias"]) for s in "qkv"]


def _stacked(made: Arrays, style: Style, layers: int) -> Arrays:
    first = style.root + style.layers.format(i=0) + "."
    kept = {
        path: value
        for path, value in made.items()
        if all(style.layers.format(i=n) + "." not in path for n in range(layers))
    }
    for path in [path for path in made if path.startswith(first)]:
        rest = path.removeprefix(first)
        each = [made[style.root + style.layers.format(i=n) + "." + rest] for n in range(layers)]
        kept[f"{style.root}blocks.{rest}"] = np.stack(each)
    return kept


def numbered(leaves: Leaves) -> Arrays:
    """Every element of every leaf another number."""
    made, start = {}, 0
    for path, shape in leaves.shapes.items():
        size = int(np.prod(shape))
        made[path] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
        start += size
    return made


@given(STYLES, st.integers(1, 11), st.booleans())
def test_a_decoder_is_found_under_any_style(style: Style, layers: int, fused: bool) -> None:
    source, kinds = reference(layers, fused)
    arrays = numbered(source)
    wanted = ported(arrays, style, layers, fused)
    target = Leaves({path: value.shape for path, value in wanted.items()})
    proposal = propose(source, target, kinds)
    assert not proposal.problems, (proposal.problems, list(target.shapes))
    assert not proposal.choices, list(map(str, proposal.choices))
    mapping = proposal.mapping()
    got = mapping.bind(source, target).forward(arrays)
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    assert len(mapping.rules) <= 2 * len(reference(1, fused)[0].shapes)


def moved(source: Leaves, target: Leaves, kinds: Mapping[str, str], framework: str = "") -> Arrays:
    """The port's leaves, by the mapping that is inferred."""
    return infer(source, target, kinds, framework=framework).bind(source, target).forward(numbered(source))


def linear(*paths: str, shape: tuple[int, int] = (5, 5)) -> tuple[Leaves, dict[str, str]]:
    """Linear layers without biases."""
    names = [f"{path}.weight" for path in paths]
    return Leaves(dict.fromkeys(names, shape)), dict.fromkeys(names, "Linear")


@given(st.permutations(["to_q", "to_k", "to_v", "to_out"]))
def test_names_decide_among_equal_shapes_in_whatever_order(order: list[str]) -> None:
    source, kinds = linear("q_proj", "k_proj", "v_proj", "out_proj")
    got = moved(source, Leaves({f"{name}.kernel": (5, 5) for name in order}), kinds)
    given_ = numbered(source)
    for ours, theirs in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        np.testing.assert_array_equal(got[f"{theirs}.kernel"], given_[f"{ours}.weight"].T)


@pytest.mark.parametrize("leaf", ["w", "weight"])
def test_a_square_matrix_under_a_name_that_says_nothing_is_asked_with_both_choices(leaf: str) -> None:
    source, kinds = linear("a", "b")
    with pytest.raises(MappingError) as caught:
        infer(source, Leaves({f"a.{leaf}": (5, 5), f"b.{leaf}": (5, 5)}), kinds)
    for rule in (Rule("a.weight", f"a.{leaf}"), Rule("a.weight", f"a.{leaf}", "o k -> k o")):
        assert repr(rule) in str(caught.value)
    assert len(propose(source, Leaves({f"a.{leaf}": (5, 5), f"b.{leaf}": (5, 5)}), kinds).choices) == 1


@pytest.mark.parametrize("turned", [True, False])
def test_one_layer_that_is_not_square_shows_how_all_are_kept(turned: bool) -> None:
    source = Leaves({"a.weight": (5, 5), "b.weight": (3, 5)})
    target = Leaves({"a.w": (5, 5), "b.w": (5, 3) if turned else (3, 5)})
    got, given_ = moved(source, target, dict.fromkeys(source.shapes, "Linear")), numbered(source)
    np.testing.assert_array_equal(got["a.w"], given_["a.weight"].T if turned else given_["a.weight"])


def test_equinox_keeps_torchs_own_layouts() -> None:
    source, kinds = linear("a", "b")
    got = moved(source, Leaves(dict(source.shapes)), kinds, "equinox")
    np.testing.assert_array_equal(got["a.weight"], numbered(source)["a.weight"])


def test_layers_with_nothing_of_a_name_in_common_stay_open_both_ways() -> None:
    source, kinds = linear("alpha", "omega")
    proposal = propose(source, Leaves({"first.kernel": (5, 5), "second.kernel": (5, 5)}), kinds)
    (choice,) = proposal.choices
    ends = [{(rule.source, rule.target) for rule in picked} for picked in choice.alternatives]
    straight = {("alpha.weight", "first.kernel"), ("omega.weight", "second.kernel")}
    assert ends == [straight, {("alpha.weight", "second.kernel"), ("omega.weight", "first.kernel")}]
    with pytest.raises(MappingError, match=r"alpha\.weight, omega\.weight could be any of"):
        proposal.mapping()


def test_numbers_of_layers_without_weights_between_are_counted_through() -> None:
    """`net.0`, `net.2`, `net.5` of a Sequential are Flax's first, second and third Dense."""
    source, kinds = linear("net.0", "net.2", "net.5", shape=(5, 5))
    got, given_ = moved(source, Leaves({f"Dense_{n}.kernel": (5, 5) for n in range(3)}), kinds), numbered(source)
    for ours, theirs in ((0, 0), (2, 1), (5, 2)):
        np.testing.assert_array_equal(got[f"Dense_{theirs}.kernel"], given_[f"net.{ours}.weight"].T)


def test_a_convolution_and_its_statistics_in_collections_of_their_own() -> None:
    norm = {"weight": (7,), "bias": (7,), "running_mean": (7,), "running_var": (7,), "num_batches_tracked": ()}
    source = Leaves({"conv.weight": (7, 2, 3, 4), **{f"bn.{leaf}": shape for leaf, shape in norm.items()}})
    kinds = {path: "Conv2d" if "conv" in path else "BatchNorm2d" for path in source.shapes}
    target = {"params.conv.kernel": (3, 4, 2, 7), "params.bn.scale": (7,), "params.bn.bias": (7,)}
    target |= {"batch_stats.bn.mean": (7,), "batch_stats.bn.var": (7,)}
    got, given_ = moved(source, Leaves(target), kinds), numbered(source)
    np.testing.assert_array_equal(got["params.conv.kernel"], given_["conv.weight"].transpose(2, 3, 1, 0))
    for ours, theirs in (("weight", "params.bn.scale"), ("running_mean", "batch_stats.bn.mean")):
        np.testing.assert_array_equal(got[theirs], given_[f"bn.{ours}"])


@pytest.mark.parametrize("keyword", ["f", "f_"])
def test_gates_in_one_leaf_and_in_leaves_of_their_own(keyword: str) -> None:
    """NNX calls the forget gate `if_`: `if` is Python's."""
    source = Leaves({"rnn.weight_ih_l0": (12, 5), "rnn.weight_hh_l0": (12, 3)})
    spelt = {"f": keyword}
    target = {f"cell.i{spelt.get(gate, gate)}.kernel": (5, 3) for gate in "figo"}
    target |= {f"cell.h{gate}.kernel": (3, 3) for gate in "ogif"}
    got, given_ = moved(source, Leaves(target), dict.fromkeys(source.shapes, "LSTM")), numbered(source)
    for place, gate in enumerate("ifgo"):
        rows = slice(3 * place, 3 * place + 3)
        np.testing.assert_array_equal(got[f"cell.i{spelt.get(gate, gate)}.kernel"], given_["rnn.weight_ih_l0"][rows].T)
        np.testing.assert_array_equal(got[f"cell.h{gate}.kernel"], given_["rnn.weight_hh_l0"][rows].T)


def test_two_biases_that_the_port_adds_up_are_refused_by_name() -> None:
    source = Leaves(
        {"rnn.weight_ih_l0": (12, 5), "rnn.weight_hh_l0": (12, 3), "rnn.bias_ih_l0": (12,), "rnn.bias_hh_l0": (12,)}
    )
    target = {f"cell.i{g}.kernel": (5, 3) for g in "ifgo"}
    target |= {f"cell.h{g}.{leaf}": shape for g in "ifgo" for leaf, shape in (("kernel", (3, 3)), ("bias", (3,)))}
    with pytest.raises(MappingError, match=r"rnn\.bias_ih_l0"):
        infer(source, Leaves(target), dict.fromkeys(source.shapes, "LSTM"))


def test_layers_kept_apart_here_and_in_one_leaf_there() -> None:
    """Ten layers: their order is that of their numbers, not of their names."""
    source, kinds = linear(*(f"layers.{n}.fc" for n in range(11)), shape=(4, 3))
    mapping = infer(source, Leaves({"blocks.fc.kernel": (11, 3, 4)}), kinds)
    assert mapping.rules == (Rule("layers.{n}.fc.weight", "blocks.fc.kernel", "n o k -> n k o"),)
    got = mapping.bind(source, Leaves({"blocks.fc.kernel": (11, 3, 4)})).forward(numbered(source))
    np.testing.assert_array_equal(got["blocks.fc.kernel"][10], numbered(source)["layers.10.fc.weight"].T)


def test_a_table_of_positions_with_and_without_an_axis_of_one() -> None:
    source, target = (
        Leaves({"pos_embed": (1, 7, 5), "cls_token": (1, 1, 5)}),
        {"pos_embed.embedding": (7, 5), "cls": (1, 1, 5)},
    )
    got = moved(source, Leaves(target), dict.fromkeys(source.shapes, "Vision"))
    np.testing.assert_array_equal(got["pos_embed.embedding"], numbered(source)["pos_embed"][0])


def test_a_leaf_tied_here_and_kept_twice_there_goes_to_both() -> None:
    source = Leaves({"wte.weight": (9, 5)}, {"lm_head.weight": "wte.weight"})
    target = Leaves({"wte.embedding": (9, 5), "lm_head.kernel": (5, 9)})
    got = moved(source, target, {"wte.weight": "Embedding", "lm_head.weight": "Linear"})
    np.testing.assert_array_equal(got["wte.embedding"], numbered(source)["wte.weight"])
    np.testing.assert_array_equal(got["lm_head.kernel"], numbered(source)["wte.weight"].T)


def test_a_leaf_tied_on_both_sides_is_moved_once() -> None:
    source = Leaves({"wte.weight": (9, 5)}, {"lm_head.weight": "wte.weight"})
    assert infer(source, Leaves({"wte.embedding": (9, 5)}), {"wte.weight": "Embedding"}).rules == (
        Rule("wte.weight", "wte.embedding"),
    )


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"), ("gate", "up", "wo")])
def test_numbers_that_say_something_else_are_no_evidence(names: tuple[str, str, str]) -> None:
    """Llama's `w1` is the gate and `w3` the way up: neither is the first linear layer that `up_proj` implies."""
    shapes = {"w1": (7, 5), "w2": (5, 7), "w3": (7, 5)}
    source = Leaves({f"layers.{i}.feed_forward.{name}.weight": s for i in range(2) for name, s in shapes.items()})
    turned = [(5, 7), (5, 7), (7, 5)]
    target = Leaves({f"layers.{i}.mlp.{n}.kernel": s for i in range(2) for n, s in zip(names, turned, strict=True)})
    proposal = propose(source, target, dict.fromkeys(source.shapes, "Linear"))
    assert not proposal.problems
    open_ = [choice for choice in proposal.choices if any("w1" in (r.source or "") for r in choice.alternatives[0])]
    for number, choice in enumerate(open_):
        ends = [{(rule.source, rule.target) for rule in way} for way in choice.alternatives]
        ours, theirs = f"layers.{number}.feed_forward", f"layers.{number}.mlp"
        for one, three in ((names[0], names[1]), (names[1], names[0])):
            wanted = {(f"{ours}.w1.weight", one), (f"{ours}.w3.weight", three)}
            assert {(s, f"{theirs}.{name}.kernel") for s, name in wanted} in ends
    assert len(open_) == 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            ("pre_attn_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm"),
        ),
        (("norm1", "norm2", "norm3"), ("self_attn_norm", "cross_attn_norm", "ffn_norm")),
    ],
)
def test_a_name_implies_no_place_among_more_than_two_norms(ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    source = Leaves({f"h.{i}.{name}.weight": (5,) for i in range(2) for name in ours})
    target = Leaves({f"h.{i}.{name}.scale": (5,) for i in range(2) for name in theirs})
    proposal = propose(source, target, dict.fromkeys(source.shapes, "LayerNorm"))
    assert not proposal.problems
    right = {(f"h.{i}.{a}.weight", f"h.{i}.{b}.scale") for i in range(2) for a, b in zip(ours, theirs, strict=True)}
    assert {(rule.source, rule.target) for rule in proposal.rules} <= right
    for choice in proposal.choices:
        assert any({(rule.source, rule.target) for rule in way} <= right for way in choice.alternatives)


def test_what_little_a_name_says_is_never_left_to_a_run() -> None:
    """Under parents that share nothing a query is still no key; a run that would have it so is not asked."""
    ours, theirs = "red.green.blue.violet.black.white", "uno.dos.tres.quatro.cinco.seis"
    beside = [f"x{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    source, kinds = linear(*(f"{ours}.{name}" for name in ("query", "key", "value")), *beside)
    shapes = {f"{name}.weight": (5, 6 + place) for place, name in enumerate(beside)}
    target = {f"{theirs}.{name}.kernel": (5, 5) for name in ("q_proj", "k_proj", "v_proj")}
    target |= {f"{name}.kernel": (6 + place, 5) for place, name in enumerate(beside)}
    proposal = propose(Leaves({**source.shapes, **shapes}), Leaves(target), kinds)
    found = [*proposal.rules, *(r for choice in proposal.choices for way in choice.alternatives for r in way)]
    for a, b in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        assert {r.target for r in found if r.source == f"{ours}.{a}.weight"} == {f"{theirs}.{b}.kernel"}


def test_a_linear_layer_of_the_users_own_may_keep_either_layout() -> None:
    source = Leaves({"a.weight": (4, 5)})
    got = moved(source, Leaves({"a.kernel": (4, 5)}), {"a.weight": "FastLinear"})
    np.testing.assert_array_equal(got["a.kernel"], numbered(source)["a.weight"])
    square = Leaves({"a.weight": (5, 5)})
    assert len(propose(square, Leaves({"a.kernel": (5, 5)}), {"a.weight": "FastLinear"}).choices) == 1


@pytest.mark.parametrize(("ours", "theirs"), [((5, 5, 3, 2), (5, 5, 3, 2)), ((6, 5, 3, 2), (10, 3, 3, 2))])
def test_equinox_keeps_a_transposed_convolution_turned_and_its_groups_with_the_outputs(
    ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    source, groups = Leaves({"up.weight": ours}), ours[0] // theirs[1]
    got = moved(source, Leaves({"up.weight": theirs}), {"up.weight": "ConvTranspose2d"}, "equinox")["up.weight"]
    parts = np.split(numbered(source)["up.weight"][:, :, ::-1, ::-1], groups)
    np.testing.assert_array_equal(got, np.concatenate([part.swapaxes(0, 1) for part in parts]))


def test_constants_that_forgetting_would_not_show_are_no_constants() -> None:
    ones, table = np.ones(3, np.float32), np.array([0.0, 1.0], np.float32)
    assert constants({"one": ones, "zero": 0 * ones, "eps": ones * 1e-5, "table": table}) == {"eps", "table"}


def test_constants_that_the_port_does_not_hold_are_let_go_and_parameters_are_not() -> None:
    source = Leaves({"fc.weight": (3, 4), "h.0.mask": (6, 6), "h.1.mask": (6, 6)})
    target, kinds = Leaves({"fc.kernel": (4, 3)}), {"fc.weight": "Linear"}
    assert Rule("h.{i}.mask", None) in infer(source, target, kinds, buffers=("h.0.mask", "h.1.mask")).rules
    with pytest.raises(MappingError, match=r"no port leaf is named like h\.0\.mask"):
        infer(source, target, kinds)


def test_a_linear_layer_after_convolutions_may_read_channels_first_or_last() -> None:
    source = Leaves({"conv.weight": (3, 2, 5, 5), "fc.weight": (7, 12), "out.weight": (7, 7)})
    kinds = {"conv.weight": "Conv2d", "fc.weight": "Linear", "out.weight": "Linear"}
    target = Leaves({"conv.kernel": (5, 5, 2, 3), "fc.kernel": (12, 7), "out.kernel": (7, 7)})
    (choice,) = propose(source, target, kinds).choices
    assert choice.alternatives == (
        (Rule("fc.weight", "fc.kernel", "o k -> k o"),),
        (Rule("fc.weight", "fc.kernel", "o (c p) -> (p c) o", c=3),),
    )


UNSAID: dict[str, Callable[[Leaves], Leaves]] = {
    "no leaf for a parameter": lambda t: Leaves({p: s for p, s in t.shapes.items() if "fc1.bias" not in p}),
    "a leaf too many": lambda t: Leaves({**t.shapes, "layers.0.attn.gate.kernel": (WIDTH, WIDTH)}),
    "another width": lambda t: Leaves({p: tuple(n + (n == INNER) for n in s) for p, s in t.shapes.items()}),
    "another type": lambda t: Leaves({p: s if "fc2.kernel" not in p else (*s, 1, 1) for p, s in t.shapes.items()}),
}


@pytest.mark.parametrize("fault", UNSAID)
def test_what_does_not_fit_is_refused_by_name(fault: str) -> None:
    source, kinds = reference(2, fused=False)
    target = Leaves({p: v.shape for p, v in ported(numbered(source), Style(), 2, False).items()})
    infer(source, target, kinds)
    with pytest.raises(MappingError, match=r"fc1|fc2|attn\.gate"):
        infer(source, UNSAID[fault](target), kinds)


@pytest.mark.parametrize(
    ("path", "words", "numbers", "role"),
    [
        ("layers_10.self_attn.q_proj.weight", ("layers", "#", "self_attn", "q_proj"), (10,), "weight"),
        ("BatchNorm_0.mean", ("batch_norm", "#"), (0,), "mean"),
        ("rnn.weight_ih_l1", ("rnn", "ih", "l", "#"), (1,), "weight"),
        ("attn.in_proj_bias", ("attn", "in_proj"), (), "bias"),
        ("conv.parametrizations.weight.original0", ("conv", "g"), (), "weight"),
        ("h.0.mlp.c_proj.weight", ("h", "#", "mlp", "fc", "nth"), (0, 2), "weight"),
        ("h.0.attn.c_proj.weight", ("h", "#", "attn", "c_proj"), (0,), "weight"),
        ("cls_token", ("cls", "token"), (), "value"),
    ],
)
def test_paths_are_read(path: str, words: tuple[str, ...], numbers: tuple[int, ...], role: str) -> None:
    name = read(path)
    assert (name.words, name.numbers, name.role) == (words, numbers, role)
