"""Ports by other people: Hugging Face's Flax models are its torch models, by mappings that are found, not written.

The yardstick of a mapping is transformers' own converter, written by hand by the ports' authors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("flax", reason="flax is not installed")
pytest.importorskip("transformers", reason="transformers is not installed (the extra hf)")

import equivalence as eq
from equivalence.frameworks import adapt
from equivalence.verdict import PortReport
from equivalence.weights import Rule, infer
from tests.thirdparty import huggingface as hf

JUDGED = ("bert", "gpt2", "llama", "vit", "bart")
CHECKS = ("structure", "roundtrip", "outputs", "input_gradients", "parameter_gradients", "step")
SHALLOW: dict[str, dict[str, int]] = {
    **{key: {"num_hidden_layers": 1} for key in ("bert", "llama", "vit")},
    "gpt2": {"n_layer": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
}
"""One layer of each sort: a second compiles as long again and shows nothing new."""
SHARP = 1e-8
"""The coarsest resolution that will do for models with float32 written into their code."""


@pytest.mark.parametrize("name", hf.MODELS)
def test_the_mapping_is_the_one_that_its_authors_wrote(name: str) -> None:
    model = hf.MODELS[name]
    torch_model, flax = hf.reference(model), hf.flax_model(model)
    ours, theirs = adapt(torch_model), adapt(eq.function(lambda params, x: x, flax.params))
    mapping = infer(ours.leaves, theirs.leaves, ours.layers, {*ours.buffers, *ours.frozen})
    got = mapping.bind(ours.leaves, theirs.leaves).forward({**ours.params, **ours.buffers})
    wanted = hf.converted(torch_model, flax)
    assert set(got) == set(theirs.params)
    for path, value in got.items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)
    numbered = [rule for rule in mapping.rules if rule.source and {"0", "1"} <= {*rule.source.split(".")}]
    assert not numbered, "layers that are alike share one rule"


def test_the_rules_are_written_as_a_person_would() -> None:
    model = hf.MODELS["gpt2"]
    ours, theirs = adapt(hf.reference(model)), adapt(hf.port(model, hf.flax_model(model)))
    layer = "transformer.h.{i}"
    assert infer(ours.leaves, theirs.leaves, ours.layers, ours.buffers).rules == (
        Rule(f"{layer}.attn.bias", None),
        Rule(f"{layer}.attn.c_attn.bias", f"{layer}.attn.c_attn.bias"),
        Rule(f"{layer}.attn.c_attn.weight", f"{layer}.attn.c_attn.kernel", "k o -> o k"),
        Rule(f"{layer}.attn.c_proj.bias", f"{layer}.attn.c_proj.bias"),
        Rule(f"{layer}.attn.c_proj.weight", f"{layer}.attn.c_proj.kernel", "k o -> o k"),
        Rule(f"{layer}.attn.masked_bias", None),
        Rule(f"{layer}.ln_1.bias", f"{layer}.ln_1.bias"),
        Rule(f"{layer}.ln_1.weight", f"{layer}.ln_1.scale"),
        Rule(f"{layer}.ln_2.bias", f"{layer}.ln_2.bias"),
        Rule(f"{layer}.ln_2.weight", f"{layer}.ln_2.scale"),
        Rule(f"{layer}.mlp.c_fc.bias", f"{layer}.mlp.c_fc.bias"),
        Rule(f"{layer}.mlp.c_fc.weight", f"{layer}.mlp.c_fc.kernel", "k o -> o k"),
        Rule(f"{layer}.mlp.c_proj.bias", f"{layer}.mlp.c_proj.bias"),
        Rule(f"{layer}.mlp.c_proj.weight", f"{layer}.mlp.c_proj.kernel", "k o -> o k"),
        Rule("transformer.ln_f.bias", "transformer.ln_f.bias"),
        Rule("transformer.ln_f.weight", "transformer.ln_f.scale"),
        Rule("transformer.wpe.weight", "transformer.wpe.embedding"),
        Rule("transformer.wte.weight", "transformer.wte.embedding"),
    )


def judged(name: str, checks: tuple[str, ...], ours: dict[str, Any], theirs: dict[str, Any]) -> PortReport:
    """The report on a model, with options of the reference's or of the port's configuration changed."""
    model, shallow = hf.MODELS[name], SHALLOW[name]
    reference = hf.reference(model, **shallow, **ours)
    port = hf.port(model, hf.flax_model(model, **shallow, **theirs))
    if name == "bart":
        reference = hf.InEvalMode(reference)
    return eq.verify(reference, port, model.inputs, outputs="logits", checks=checks, examples=1).reports[0]


@pytest.mark.parametrize("name", JUDGED)
def test_the_port_is_equivalent_with_the_mapping_inferred(name: str) -> None:
    # the steps of the one with an encoder and a decoder compile for as long as all else here
    report = judged(name, CHECKS if name != "bart" else CHECKS[:-1], {}, {})
    assert report.verdict == "equivalent", [(c.name, c.verdict, c.message) for c in report.checks]
    for check in report.checks:
        assert check.resolution is None or check.name == "roundtrip" or check.resolution <= SHARP, check


FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama: epsilon 1e-5 for 1e-6": ("llama", {}, {"rms_norm_eps": 1e-5}),
    "llama: rotary base 10000 for 10001": ("llama", {"rope_theta": 10001.0}, {}),
    "vit: an epsilon of 1e-12 that a sum in float32 loses": ("vit", {}, {"layer_norm_eps": 0.0}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_below_float32_is_caught(fault: str) -> None:
    name, ours, theirs = FAULTS[fault]
    report = judged(name, ("outputs",), ours, theirs)
    assert report.verdict == "divergent"
    assert not [c for c in report.caveats if c.kind == "mapping"], "no rearrangement of weights explains it"


def test_what_one_side_trains_and_the_other_does_not_is_said() -> None:
    """Flax's bart lists a buffer of torch's among its parameters."""
    model = hf.MODELS["bart"]
    whole = hf.port(dataclasses.replace(model, constant=()), hf.flax_model(model))
    report = eq.verify(
        hf.InEvalMode(hf.reference(model)), whole, model.inputs, outputs="logits", checks=["structure"], examples=1
    )
    assert report.check("structure").verdict == "divergent"
    assert "final_logits_bias is a buffer, the port's final_logits_bias is a parameter" in (
        report.check("structure").message or ""
    )
