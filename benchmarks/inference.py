"""How long it takes to infer a mapping: a decoder of 500 leaves, under the port's own names and under free ones.

python benchmarks/inference.py [--layers N]
"""

from __future__ import annotations

import argparse
import time

from _setup import line

from equivalence.weights import Leaves, infer

BOUND = 2.0
WIDTH, INNER, WORDS = 96, 257, 1009
NAMES = {
    "flax": ("model.layers_{i}", "self_attn.{s}_proj", "mlp.{f}"),
    "free": ("params.blocks.{i}", "attention.to_{s}", "ffn.{f}"),
}
FORWARD = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}


def decoder(layers: int) -> tuple[Leaves, dict[str, str]]:
    """Leaves and layer types of a torch decoder: nine leaves a layer, three around them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    kinds = {"model.embed_tokens.weight": "Embedding"}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        for part in "qkvo":
            shapes[f"{base}.self_attn.{part}_proj.weight"] = (WIDTH, WIDTH)
        for part in FORWARD:
            shapes[f"{base}.mlp.{part}.weight"] = (WIDTH, INNER) if part == "down_proj" else (INNER, WIDTH)
        for part in NORMS:
            shapes[f"{base}.{part}.weight"] = (WIDTH,)
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}
    kinds |= {path: "LayerNorm" if len(shape) == 1 else "Linear" for path, shape in shapes.items() if path not in kinds}
    return Leaves(shapes), kinds


def ported(source: Leaves, style: str) -> Leaves:
    """The same leaves as a Flax port would hold them."""
    block, attention, forward = NAMES[style]
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in source.shapes.items():
        parts = path.split(".")
        if len(parts) == 3 or parts[0] == "lm_head":
            name = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "scale"}.get(path, "kernel")
            root = "params." if style == "free" else ""
            shapes[f"{root}{'.'.join(parts[:-1])}.{name}"] = shape[::-1] if name == "kernel" else shape
            continue
        layer, last = parts[2], parts[-2]
        free = style == "free"
        if "self_attn" in parts:
            name = f"{attention}.kernel".format(s="out" if free and last[0] == "o" else last[0])
        elif "mlp" in parts:
            name = f"{forward}.kernel".format(f=FORWARD[last] if free else last)
        else:
            name = f"{NORMS[last] if free else last}.scale"
        shapes[f"{block.format(i=layer)}.{name}"] = shape[::-1]
    return Leaves(shapes)


def measured(layers: int, style: str) -> tuple[int, int, float]:
    """Leaves, rules found and the best of three times in seconds."""
    source, kinds = decoder(layers)
    target = ported(source, style)
    best, rules = float("inf"), 0
    for _ in range(3):
        start = time.perf_counter()
        mapping = infer(source, target, kinds)
        best = min(best, time.perf_counter() - start)
        rules = len(mapping.rules)
    mapping.bind(source, target)
    return len(source.shapes), rules, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=56, help="layers of nine leaves each (56)")
    layers = parser.parse_args().layers
    for style in NAMES:
        leaves, rules, seconds = measured(layers, style)
        print(line(f"{leaves} leaves to {rules} rules, {style} names", seconds, BOUND, " s"))


if __name__ == "__main__":
    main()
