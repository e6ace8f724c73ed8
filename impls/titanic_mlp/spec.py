"""What the implementations of the Titanic network agree on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from equivalence.errors import InputError
from equivalence.spec import Arrays, Spec, TrainingData
from equivalence.weights import Rule
from impls.titanic_mlp.config import Config

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def configurations() -> SearchStrategy[Config]:
    """Few structures: no two sizes alike, so that no transpose fits."""
    from hypothesis import strategies as st

    return st.builds(
        Config,
        features=st.sampled_from((5, 8, 11)),
        hidden1=st.sampled_from((3, 13, 37)),
        hidden2=st.sampled_from((7, 17)),
        dropout=st.sampled_from((0.0, 0.01, 0.25, 0.5)),
        negative_slope=st.sampled_from((0.01, 0.2)),
        batch_size=st.sampled_from((2, 19)),
    )


def example(
    config: Config, generator: np.random.Generator, kind: str
) -> tuple[Arrays, Arrays]:
    """Features of one kind, float32 (b, f); targets 0 or 1, float32 (b,)."""
    x = generator.standard_normal((config.batch_size, config.features))
    survived = generator.integers(0, 2, config.batch_size)
    kinds = {
        "ordinary": x,
        "large": x * 100.0,
        "tiny": x * 1e-4,
        "zeros": np.zeros_like(x),
        "repeated": np.broadcast_to(x[:1], x.shape),
        "ties": np.round(x * 2.0) / 2.0,
    }
    return (kinds[kind].astype(np.float32),), (survived.astype(np.float32),)


def training(config: Config, seed: int) -> TrainingData:
    """Passengers to train on and held out; batches. Raises InputError."""
    from fixtures.batches import PassengerDataset, batch_plan
    from fixtures.titanic import FEATURES, load

    if config.features != len(FEATURES):
        raise InputError(
            f"passengers have {len(FEATURES)} features, not {config.features}"
        )
    train, held_out = load(seed=seed)
    plan = batch_plan(
        PassengerDataset(train), config.batch_size, config.epochs, seed
    )
    return TrainingData(
        (train.x,),
        (train.survived,),
        (held_out.x,),
        (held_out.survived,),
        plan,
        accuracy,
    )


def first(config: Config) -> tuple[Arrays, Arrays]:
    """The first batch of the real training run. Raises InputError."""
    data = training(replace(config, epochs=1), seed=0)
    rows = data.plan.batch(0)
    x, survived = data.inputs[0], data.targets[0]
    return (x[rows],), (survived[rows],)


def accuracy(logits: np.ndarray, survived: np.ndarray) -> float:
    """The fraction of passengers whose logit is on the right side of 0.

    >>> accuracy(np.array([2.0, -1.0]), np.array([1.0, 1.0]))
    0.5
    """
    return float(np.mean((logits > 0) == (survived > 0.5)))


RULES = (
    Rule("linear{i}.weight", "linear{i}.kernel", "o i -> i o"),
    Rule("linear{i}.bias", "linear{i}.bias"),
)

SPEC = Spec(
    name="titanic_mlp",
    title="Titanic survival: three linear layers, dropout, leaky ReLU",
    config=Config(),
    configurations=configurations,
    example=example,
    implementations={
        "torch": "impls.titanic_mlp.pytorch",
        "nnx": "impls.titanic_mlp.nnx",
        "linen": "impls.titanic_mlp.linen",
    },
    rules={"nnx": RULES, "linen": RULES},
    training=training,
    first=first,
)
