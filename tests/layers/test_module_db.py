"""Every entry of torch's own module database, every sample, to NNX and to Linen: the yardstick nobody here wrote."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import pytest
import torch

from tests.layers.sides import FRAMEWORKS, disagree, perturbed
from tests.torch_tables import MODULES, modules

EVERY = 1 if os.environ.get("EQUIVALENCE_ALL") == "1" else 24
"""Of a test's samples every so many are run: all take a quarter of an hour on four cores (`make test-layers`)."""

SLICE = int(os.environ.get("EQUIVALENCE_SLICE", "0"))
"""Which of them: CI takes the next slice at every commit, and so comes to all."""

PARTS = {
    "LinearCrossEntropyLoss": 12,
    "MultiheadAttention": 6,
    "CrossEntropyLoss": 2,
    **dict.fromkeys(("Transformer", "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer"), 6),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), 3),
}
"""Into how many tests the samples of a large entry are dealt, so that workers share them."""


GAPS = {
    ("MultiheadAttention", 73): "heads of one feature and a saturated softmax: where torch's y (ct - sum(y ct)) is"
    " exact, JAX's y ct - y sum(y ct) rounds, and what is left of the gradient is 1e-5 of what cancels",
}
"""(entry, sample) -> why it cannot hold; docs/layers.md says so."""


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in MODULES for part in range(PARTS.get(name, 1))],
    ids=lambda value: str(value),
)
def test_every_sample_of_the_entry(name: str, part: int, to: str) -> None:
    mine = range(part, len(samples(name)), PARTS.get(name, 1))
    mine = mine[SLICE % min(EVERY, len(mine)) :: EVERY]
    different = [words for number in mine if (name, number) not in GAPS and (words := judge(name, number, to))]
    assert not different, "\n".join(different)


@functools.cache
def samples(name: str) -> list[tuple[bool, Any]]:
    """The samples of an entry, as (train mode, sample)."""
    info = modules()[name]
    found: list[tuple[bool, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for train in (False, True) if info.train_and_eval_differ else (False,):
            torch.manual_seed(0)
            made = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=train)
            found += [(train, sample) for sample in made if sample.forward_input is not None]
    return found


def judge(name: str, number: int, to: str) -> str:
    """What differs in a sample, in words; empty where nothing does.

    Precision is judged as `verify` judges it, by the median over examples: one alone may have a reference that is
    exact by chance.
    """
    found = compared(name, number, to, number)
    if found and all(path.endswith("(float32)") for path in found):
        others = [compared(name, number, to, number + seed) for seed in range(1, 5)]
        if sum(any(path in other for path in found) for other in others) < len(others) / 2:
            return ""
    train, sample = samples(name)[number]
    given = sample.constructor_input
    where = f"{name} sample {number} {sample.desc or ''} {given.args} {given.kwargs} {'train' if train else 'eval'}"
    return f"{where}: {found}" if found else ""


def compared(name: str, number: int, to: str, seed: int) -> dict[str, float]:
    """The paths at which a sample's translation differs, with weights by this seed."""
    train, sample = samples(name)[number]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        given = sample.constructor_input
        module = modules()[name].module_cls(*given.args, **given.kwargs)
        module.train(train)
        if any(torch.nn.parameter.is_lazy(leaf) for leaf in module.parameters()):
            module(*sample.forward_input.args, **sample.forward_input.kwargs)
        return disagree(
            perturbed(module, seed),
            *sample.forward_input.args,
            to=to,
            train=train,
            calls=2 if train and any(True for _ in module.buffers()) else 1,
            **sample.forward_input.kwargs,
        )


def test_the_entries_are_the_database_s() -> None:
    assert sorted(modules()) == MODULES
