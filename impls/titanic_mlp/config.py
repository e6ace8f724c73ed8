"""What every implementation of the Titanic network is built from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Sizes of the network and the settings of its training."""

    features: int = 8
    hidden1: int = 32
    hidden2: int = 16
    dropout: float = 0.01
    negative_slope: float = 0.01
    batch_size: int = 64
    epochs: int = 500
    learning_rate: float = 0.01
