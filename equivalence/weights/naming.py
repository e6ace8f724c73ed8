"""What a leaf's path says: words in one spelling, numbers, and the leaf's role; and how alike two paths are.

`layers.0.self_attn.q_proj.weight` and `blocks_0.attention.to_q.kernel` both read: block, a number, attention, query;
role weight. Nothing here knows a model by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

NUMBER = "#"
"""Stands for a number among the words of a path."""
ORDINAL = "nth"
"""Stands for a number that a word implies (`ORDINALS`): it says something only after a word like its own."""
PLACES = (NUMBER, ORDINAL)

ROLES: dict[str, str] = {
    **dict.fromkeys(("weight", "kernel", "scale", "embedding", "gamma", "w", "table"), "weight"),
    **dict.fromkeys(("bias", "beta", "b"), "bias"),
    **dict.fromkeys(("running_mean", "mean", "moving_mean"), "mean"),
    **dict.fromkeys(("running_var", "var", "moving_variance"), "var"),
}
"""The last part of a path -> what it is to its module, in torch, Flax, Equinox and Keras."""
STATISTICS = ("mean", "var")
"""Roles that Linen keeps in a collection of their own, away from the module's other leaves."""

PHRASES: dict[str, tuple[str, ...]] = {
    "qkv": ("in_proj", "c_attn", "qkv", "qkv_proj", "to_qkv", "query_key_value", "wqkv", "in_projection"),
    "kv": ("kv", "to_kv", "kv_proj", "key_value"),
    "query": ("q", "query", "to_q", "q_proj", "q_lin", "wq", "q_linear", "query_proj", "queries"),
    "key": ("k", "key", "to_k", "k_proj", "k_lin", "wk", "k_linear", "key_proj", "keys"),
    "value": ("v", "value", "to_v", "v_proj", "v_lin", "wv", "v_linear", "value_proj", "values"),
    "out": ("o", "out", "to_out", "o_proj", "out_proj", "out_lin", "wo", "output", "c_proj", "proj", "output_proj"),
    "gate_up": ("gate_up", "gate_up_proj", "w12"),
    "gate": ("gate", "gate_proj", "w_gate"),
    "up": ("up", "up_proj"),
    "attention": ("attn", "attention", "mha", "self_attn", "self_attention", "multi_head_attention", "sa"),
    "cross": ("cross_attn", "cross_attention", "encoder_attn", "encoder_attention", "multihead_attn", "encdec"),
    "mlp": ("mlp", "ffn", "ff", "feed_forward", "feedforward"),
    "norm": (
        *("norm", "ln", "layer_norm", "layernorm", "rms_norm", "rmsnorm", "batch_norm", "group_norm", "bn", "gn"),
        *("norm_f", "ln_f", "final_norm", "final_layer_norm", "final_layernorm", "norm_final"),
    ),
    "norm_f": ("norm_f", "ln_f", "final_norm", "final_layer_norm", "final_layernorm", "norm_final"),
    "token": (
        "wte",
        "embed_tokens",
        "word_embeddings",
        "token_embedding",
        "token_embeddings",
        "tok_embeddings",
        "tok_emb",
        "embed",
        "embedding",
        "token_embed",
        "word_embedding",
        "shared",
    ),
    "position": (
        "wpe",
        "embed_positions",
        "position_embeddings",
        "position_embedding",
        "pos_embed",
        "pos_embedding",
        "pos_emb",
        "position_embed",
        "positions",
    ),
    "block": ("h", "layers", "layer", "blocks", "block", "resblocks"),
    "head": ("lm_head", "head", "classifier", "proj_out", "output_projection", "logits", "unembed"),
    "conv": ("conv", "convolution", "conv1d", "conv2d", "conv3d"),
    "shortcut": ("downsample", "shortcut", "skip"),
    "linear": ("linear", "lin", "dense", "fc", "affine"),
    "ih": ("ih", "dense_i", "input_hidden"),
    "hh": ("hh", "dense_h", "hidden_hidden"),
}
"""Concept -> the parts of a path that are known to mean it. A part may mean several (`c_proj`, `wo`)."""

ORDINALS: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("input_layernorm", "layernorm_before", "pre_attention_norm", "attention_norm"), ("norm", 1)),
    **dict.fromkeys(("post_attention_layernorm", "layernorm_after", "pre_mlp_norm", "ffn_norm"), ("norm", 2)),
    **dict.fromkeys(("up", "up_proj", "c_fc", "intermediate", "dense_h_to_4h", "wi", "fc_in"), ("fc", 1)),
    **dict.fromkeys(("down", "down_proj", "dense_4h_to_h", "fc_out", "ffn_output"), ("fc", 2)),
}
"""Parts that name the first or the second of a block's norms or linear layers, which others number: `ln_1`, `fc2`."""
OUTWARD = ("c_proj", "wo", "output", "proj")
"""Parts that name the projection out of attention, and elsewhere a block's second linear layer."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "qkv": ("query", "key", "value"),
    "kv": ("key", "value"),
    "gate_up": ("gate", "up"),
    "ifgo": ("gate i", "gate f", "gate g", "gate o"),
    "rzn": ("gate r", "gate z", "gate n"),
}
"""A fused leaf's concept -> the concepts of its parts, in the order in which they are stored."""

GATES = {f"{side}{gate}": (f"{side}h", f"gate {gate}") for side in "ih" for gate in "ifgorzn"}
"""Flax names a cell's gates `ii`, `if`, ... `hn`: from input or hidden state, and which gate."""

_CONCEPTS: dict[str, frozenset[str]] = {}
for _concept, _parts in PHRASES.items():
    for _part in _parts:
        _CONCEPTS[_part] = _CONCEPTS.get(_part, frozenset()) | {_concept}

WEAK = frozenset(("linear", "lin", "dense", "fc", "proj", "to", "module", "params", "batch", "stats"))
"""Words that say little: of what kind a module is, not which one."""


@dataclass(frozen=True)
class Name:
    """A module's path, read: its words with a sign for each number, the numbers, and the role of one of its leaves."""

    words: tuple[str, ...]
    numbers: tuple[int, ...]
    role: str


def read(path: str, ordinal: bool = True) -> Name:
    """The words, numbers and role of a leaf's path. Without `ordinal` a norm's name implies no number.

    >>> read("layers_0.self_attn.q_proj.weight")
    Name(words=('layers', '#', 'self_attn', 'q_proj'), numbers=(0,), role='weight')
    """
    *parts, leaf = (_snake(part).rstrip("_") for part in _PARAMETRIZED.sub(_original, path).split("."))
    role = ROLES.get(leaf)
    if role is None:
        found = re.fullmatch(r"(weight|bias)_(.+)|(.+)_(weight|bias)", leaf)
        role = (found[1] or found[4]) if found else "value"
        parts.append((found[2] or found[3]) if found else leaf)
    words, numbers = list[str](), list[int]()
    for place, part in enumerate(parts):
        if part in GATES:
            words += GATES[part]
            continue
        implied = ORDINALS.get(part)
        if part in OUTWARD and _second(words, parts[place + 1 :]):
            implied = "fc", 2
        if implied is not None and (ordinal or implied[0] != "norm"):
            words += [implied[0], ORDINAL]
            numbers.append(implied[1])
            continue
        for word in [part] if part in _CONCEPTS else _split(part):
            if word.isdigit():
                numbers.append(int(word))
            words.append(NUMBER if word.isdigit() else word)
    return Name(tuple(words), tuple(numbers), role)


def _second(before: list[str], after: list[str]) -> bool:
    """Whether what leads outward leads out of a feed-forward block, not out of attention."""
    around = frozenset().union(*(concepts(word) for word in before))
    return "mlp" in around or (not around & {"attention", "cross"} and after == ["dense"])


_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original([01]?)$")


def _original(found: re.Match[str]) -> str:
    """What torch's weight_norm keeps as `parametrizations.weight.original0` and `1` is elsewhere `weight_g`, `_v`."""
    return found[1] + {"": "", "0": "_g", "1": "_v"}[found[2]]


@cache
def _snake(part: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower()


def _split(part: str) -> list[str]:
    """A part as known words and numbers: `layers_0` is `layers`, `0`; what is left are single words."""
    named = re.fullmatch(r"(.*?[a-z])_?(\d+)", part)
    if named:
        return [*([named[1]] if named[1] in _CONCEPTS else _split(named[1])), named[2]]
    return re.findall(r"\d+|[a-z]+", part)


def concepts(word: str) -> frozenset[str]:
    """What a word may mean; itself where it is not known."""
    return _CONCEPTS.get(word, frozenset((word,)))


@cache
def alike(a: str, b: str) -> float:
    """How alike two words are, 0 to 1: the same, of one meaning, or one beginning with the other."""
    if a == b:
        return 1.0
    if a in PLACES or b in PLACES:
        return 0.0
    if concepts(a) & concepts(b):
        return 0.8
    short, long = sorted((a, b), key=len)
    return 0.6 if len(short) >= 3 and long.startswith(short) else 0.0


class Likeness:
    """How alike paths of two models are: what they share, every word weighed by how much it tells within its model.

    A word that every module of a model has (a root prefix) says nothing; a rare one says a lot.
    """

    def __init__(self, left: Iterable[tuple[str, ...]], right: Iterable[tuple[str, ...]]) -> None:
        self._weights = tuple(_weights(list(side)) for side in (left, right))
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[float, tuple[tuple[int, int], ...]]] = {}

    def of(self, left: tuple[str, ...], right: tuple[str, ...]) -> tuple[float, tuple[tuple[int, int], ...]]:
        """`(likeness from 0 to 1, which of left's numbers stands for which of right's)`: the best common sequence."""
        key = left, right
        if key not in self._known:
            self._known[key] = self._align(left, right)
        return self._known[key]

    def _align(self, left: tuple[str, ...], right: tuple[str, ...]) -> tuple[float, tuple[tuple[int, int], ...]]:
        ours, theirs = ([w.get(word, 1.0) for word in s] for w, s in zip(self._weights, (left, right), strict=True))
        nothing: tuple[float, tuple[tuple[int, int], ...]] = 0.0, ()
        table = [[nothing] * (len(right) + 1) for _ in range(len(left) + 1)]
        for i, a in enumerate(left):
            for j, b in enumerate(right):
                best = max(table[i][j + 1], table[i + 1][j], key=lambda cell: cell[0])
                match = alike(a, b)
                if ORDINAL in (a, b) and a in PLACES and b in PLACES:
                    match = 1.0 if i and j and alike(left[i - 1], right[j - 1]) else 0.0
                if match:
                    total, pairs = table[i][j]
                    total += match * (ours[i] + theirs[j])
                    if total > best[0]:
                        # which of its side's numbers each of the two is
                        here, there = (sum(word in PLACES for word in words) for words in (left[:i], right[:j]))
                        best = total, (*pairs, (here, there)) if a in PLACES else pairs
                table[i + 1][j + 1] = best
        shared, pairs = table[-1][-1]
        whole = sum(ours) + sum(theirs)
        return (shared / whole if whole else 1.0), pairs


def _weights(modules: list[tuple[str, ...]]) -> dict[str, float]:
    """How much each word tells: the logarithm of how rare it is among modules, little for words of a kind."""
    seen = Counter(word for words in modules for word in set(words))
    floor = 0.05
    weights = {word: floor + math.log(len(modules) / count) for word, count in seen.items()}
    return {word: (0.5 * w if word in WEAK else floor if word in PLACES else w) for word, w in weights.items()}
