"""The Titanic network in PyTorch: eight features in, one logit out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impls.titanic_mlp.config import Config


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear layer, all of it uniform in ±1/sqrt(inputs)."""
    # differs: the weight is stored as (outputs, inputs).
    bound = inputs**-0.5
    layer = nn.Linear(inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    return layer


class TitanicMLP(nn.Module):
    """Three linear layers; dropout, then leaky ReLU, between them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        # differs: train() turns dropout on; it draws from torch's generator.
        self.linear1 = linear(config.features, config.hidden1, True)
        self.dropout1 = nn.Dropout(config.dropout)
        self.linear2 = linear(config.hidden1, config.hidden2, True)
        self.dropout2 = nn.Dropout(config.dropout)
        self.linear3 = linear(config.hidden2, 1, False)
        self.slope = config.negative_slope

    def forward(self, x: Tensor) -> Tensor:
        # differs: at exactly 0 leaky ReLU has the negative slope.
        h = self.dropout1(self.linear1(x))
        h = F.leaky_relu(h, self.slope)  # b h1
        h = self.dropout2(self.linear2(h))
        h = F.leaky_relu(h, self.slope)  # b h2
        return self.linear3(h).squeeze(-1)  # b


def build(config: Config, seed: int) -> TitanicMLP:
    """A freshly initialised network."""
    # differs: random numbers come from one global generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return TitanicMLP(config)


def loss_fn(logits: Tensor, survived: Tensor) -> Tensor:
    """Binary cross-entropy, logits (b,) against 0 or 1 (b,), averaged."""
    # differs: computed as (1 - y) z - log σ(z), which cancels for z << 0.
    return F.binary_cross_entropy_with_logits(
        logits, survived, reduction="mean"
    )


def make_optimizer(
    learning_rate: float,
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Adam, for the parameters it is then given."""
    # differs: an optimizer owns its parameters and changes them in place.
    return lambda parameters: torch.optim.Adam(
        parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8
    )


def train_step(
    model: TitanicMLP,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    survived: Tensor,
) -> Tensor:
    """One step on one batch; returns the loss before it."""
    # differs: gradients add up in .grad until they are cleared.
    optimizer.zero_grad()
    loss = loss_fn(model(x), survived)
    loss.backward()
    optimizer.step()
    return loss.detach()
