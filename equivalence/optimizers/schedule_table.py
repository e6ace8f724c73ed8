"""torch's schedulers, the Optax form that one would write for each, and what that quietly does otherwise.

Loads no framework: the strings are expressions, of `optimizer` (whose lr is LR) and of `optax` and `jnp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LR = 0.1
"""The rate of the optimizer that the forms are written for."""


@dataclass(frozen=True)
class SchedulerRow:
    """One line of the table: the torch call, the naive form (None: there is none), the difference."""

    torch: str
    form: str | None
    differs: str

    def make(self, optimizer: Any) -> Any:
        """The torch scheduler on an optimizer."""
        import torch

        return eval(self.torch, {"torch": torch, "optimizer": optimizer})


ROWS = (
    SchedulerRow(
        "torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda epoch: 0.95**epoch)",
        "lambda count: 0.1 * 0.95**count",
        "none in float64; in float32 the power loses digits as the count grows, and `math` functions do not trace",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lr_lambda=lambda epoch: 1 - 1 / (epoch + 9))",
        "lambda count: 0.1 * (1 - 1 / (count + 9))",
        "torch multiplies the present rate each step, from the second on: a running product, not a factor",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)",
        "optax.exponential_decay(0.1, transition_steps=30, decay_rate=0.1)",
        "without staircase=True Optax decays in between as well",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[30, 80], gamma=0.1)",
        "optax.piecewise_constant_schedule(0.1, {30: 0.1, 80: 0.01})",
        "Optax's scales multiply one another: the second is gamma again, not gamma**2",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1 / 3, total_iters=5)",
        "optax.constant_schedule(0.1)",
        "torch's is a warm-up: lr * factor until total_iters, then lr",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=5)",
        "optax.linear_schedule(0.0, 0.1, transition_steps=5)",
        "torch starts at lr * start_factor, Optax's usual warm-up at 0: its first step does nothing",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)",
        "optax.exponential_decay(0.1, transition_steps=1, decay_rate=0.9)",
        "none in float64; under x64 Optax still divides in float32 where the count is an int32 array",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.9)",
        "optax.polynomial_schedule(0.1, 0.0, power=0.9, transition_steps=50)",
        "none in float64; under x64 Optax still divides in float32 where the count is an int32 array",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.001)",
        "optax.cosine_decay_schedule(0.1, decay_steps=50, alpha=0.001)",
        "alpha is a share of lr (here 0.01), not a rate; past T_max torch comes up again, Optax stays",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2, eta_min=0.001)",
        "optax.sgdr_schedule([dict(init_value=0.001, peak_value=0.1, warmup_steps=0, decay_steps=10 * 2**i,"
        " end_value=0.001) for i in range(4)])",
        "none while the listed cycles last; torch's go on for ever",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=120)",
        "optax.cosine_onecycle_schedule(120, peak_value=0.1)",
        "torch's phases end one step earlier: its lowest rate is that of step total_steps - 1; "
        "momentum or beta1 is cycled too, unless cycle_momentum=False",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=20, mode='triangular2')",
        "optax.join_schedules([optax.linear_schedule(0.01, 0.1, 20), optax.linear_schedule(0.1, 0.01, 20)], [20])",
        "Optax has no cycles: one triangle only; torch cycles momentum or beta1 too, unless cycle_momentum=False",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.SequentialLR(optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1,"
        " total_iters=10), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)], milestones=[10])",
        "optax.warmup_cosine_decay_schedule(0.01, 0.1, warmup_steps=10, decay_steps=90)",
        "Optax's decay_steps include the warm-up: here they are 100",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1,"
        " total_iters=10), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01)])",
        "lambda count: jnp.where(count < 10, 0.1, 1.0) * optax.cosine_decay_schedule(0.1, 50, 0.1)(count)",
        "only schedulers that multiply commute: the cosine shrinks the reduced rate's distance from eta_min, and what "
        "multiplies after that takes the rate to another curve",
    ),
    SchedulerRow(
        "torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=10)",
        "optax.linear_schedule(0.1, 0.05, transition_steps=10)",
        "torch's default is a cosine",
    ),
    SchedulerRow(
        "torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=10)",
        None,
        "optax.contrib.reduce_on_plateau(factor=0.1, patience=10) is a transformation: it reduces after patience bad "
        "values, torch after patience + 1; its counts and thresholds differ as well",
    ),
)
"""Every scheduler of torch 2.13."""
