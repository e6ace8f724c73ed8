"""ReduceLROnPlateau: a learning rate that a metric moves, so part of an optimizer's state and no function of a count.

https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.ReduceLROnPlateau.html
torch reduces after `patience + 1` steps without an improvement, `optax.contrib.reduce_on_plateau` after `patience`;
torch's threshold is relative to the best metric, Optax's is `rtol` and `atol` together; torch leaves a rate alone that
would move by less than `eps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivalence.errors import InputError


class PlateauState(NamedTuple):
    """Where a ReduceLROnPlateau is: the rates of the groups (groups,), the best metric, its counters, its steps."""

    lr: Any
    best: Any
    num_bad_epochs: Any
    cooldown_counter: Any
    count: Any


class ScaleByPlateauState(NamedTuple):
    """The optimizer steps taken, int32, and where the scheduler is."""

    count: Any
    plateau: PlateauState


@dataclass(frozen=True)
class Plateau:
    """The options of a torch ReduceLROnPlateau, read when made."""

    start: PlateauState
    better_is_less: bool
    relative: bool
    threshold: float
    factor: float
    patience: int
    cooldown: int
    floors: tuple[float, ...]
    eps: float

    @classmethod
    def of(cls, scheduler: Any) -> Plateau:
        """Read a scheduler. Raises InputError for a subclass, whose steps are not known."""
        kind = type(scheduler)
        if kind.__name__ != "ReduceLROnPlateau" or kind.__module__ != "torch.optim.lr_scheduler":
            raise InputError(f"{kind.__module__}.{kind.__name__} is not torch's ReduceLROnPlateau")
        return cls(
            state_of(scheduler),
            scheduler.mode == "min",
            scheduler.threshold_mode == "rel",
            float(scheduler.threshold),
            float(scheduler.factor),
            int(scheduler.patience),
            int(scheduler.cooldown),
            tuple(float(floor) for floor in scheduler.min_lrs),
            float(scheduler.eps),
        )

    def init(self) -> PlateauState:
        """The state in which the scheduler was when it was read, in the default float dtype."""
        lr, best, *counts = self.start
        return PlateauState(jnp.asarray(lr), jnp.asarray(best), *(jnp.asarray(n, jnp.int32) for n in counts))

    def advance(self, state: PlateauState, metric: Any) -> PlateauState:
        """One `scheduler.step(metric)`. Traceable; a metric of NaN is no improvement, as in torch. Raises InputError
        for a metric that is no number."""
        value = jnp.asarray(metric, state.best.dtype)
        if value.shape:
            raise InputError(f"ReduceLROnPlateau looks at one number, not at an array of shape {value.shape}")
        if self.relative:
            mark = state.best * (1.0 - self.threshold if self.better_is_less else 1.0 + self.threshold)
        else:
            mark = state.best + (-self.threshold if self.better_is_less else self.threshold)
        better = value < mark if self.better_is_less else value > mark
        bad = jnp.where(better, 0, state.num_bad_epochs + 1)
        cooling = state.cooldown_counter > 0
        bad, left = jnp.where(cooling, 0, bad), jnp.where(cooling, state.cooldown_counter - 1, state.cooldown_counter)
        reduced = bad > self.patience
        lower = jnp.maximum(state.lr * self.factor, jnp.asarray(self.floors, state.lr.dtype))
        moves = reduced & (state.lr - lower > self.eps)
        return PlateauState(
            jnp.where(moves, lower, state.lr),
            jnp.where(better, value, state.best),
            jnp.where(reduced, 0, bad),
            jnp.where(reduced, self.cooldown, left),
            state.count + 1,
        )

    def after(self, state: PlateauState, metric: Any, steps: Any, every: int) -> PlateauState:
        """The state after an optimizer step, the `steps`-th: each `every`-th of them looks at the metric."""
        if every == 1:
            return self.advance(state, metric)
        looks = steps % every == 0
        moved = self.advance(state, metric)
        return PlateauState(*(jnp.where(looks, new, old) for new, old in zip(moved, state, strict=True)))


def state_of(scheduler: Any) -> PlateauState:
    """Where a torch scheduler is, as NumPy arrays; `lr` is that of its optimizer's groups."""
    return PlateauState(
        np.asarray([float(group["lr"]) for group in scheduler.optimizer.param_groups]),
        np.asarray(float(scheduler.best)),
        np.asarray(scheduler.num_bad_epochs),
        np.asarray(scheduler.cooldown_counter),
        np.asarray(scheduler.last_epoch),
    )


def load_state(scheduler: Any, state: PlateauState) -> None:
    """Put a torch scheduler, and its optimizer's rates, where `state` is. Raises InputError for another number of
    groups."""
    groups, rates = scheduler.optimizer.param_groups, np.asarray(state.lr)
    if rates.shape != (len(groups),):
        raise InputError(f"the state holds {rates.size} learning rates, the optimizer has {len(groups)} groups")
    for group, rate in zip(groups, rates, strict=True):
        value = _unrounded(float(group["lr"]), rate)
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
    scheduler.best = _unrounded(float(scheduler.best), np.asarray(state.best))
    scheduler.num_bad_epochs = int(state.num_bad_epochs)
    scheduler.cooldown_counter = int(state.cooldown_counter)
    scheduler.last_epoch = int(state.count)
    scheduler._last_lr = [group["lr"] for group in groups]


def _unrounded(before: float, value: Any) -> float:
    """A value of the state as a Python float: what torch has already, where that is the same in the state's dtype."""
    return before if value.dtype.type(before) == value else float(value)


def scale_by_plateau(scheduler: Any, *, group: int = 0, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` whose rate is that of a torch ReduceLROnPlateau.

    Args:
        scheduler: the torch scheduler, anywhere in its course.
        group: the parameter group whose rate it is.
        every: steps between two looks at the metric (the steps of an epoch).

    `update(updates, state, params, value=metric)` takes the step with the rate before the metric is looked at, as
    `optimizer.step(); scheduler.step(metric)` does. Raises InputError without a metric, and for an `every` or a `group`
    that is none.

    Differs from `optax.contrib.reduce_on_plateau` as this module's first lines say; that also accumulates the mean of
    the metric over `accumulation_size` steps where torch looks at the last one.
    """
    plateau = Plateau.of(scheduler)
    if every < 1 or not 0 <= group < len(plateau.floors):
        raise InputError(f"scale_by_plateau(group={group}, every={every}): there is no such group, or no such step")

    def init(params: Any) -> ScaleByPlateauState:
        del params
        return ScaleByPlateauState(jnp.zeros((), jnp.int32), plateau.init())

    def update(
        updates: Any, state: ScaleByPlateauState, params: Any = None, *, value: Any = None, **others: Any
    ) -> tuple[Any, ScaleByPlateauState]:
        del params, others
        if value is None:
            raise InputError("ReduceLROnPlateau looks at a metric: update(updates, state, params, value=metric)")
        count, rate = optax.safe_increment(state.count), state.plateau.lr[group]
        scaled = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
        return scaled, ScaleByPlateauState(count, plateau.after(state.plateau, value, count, every))

    return optax.GradientTransformationExtraArgs(init, update)
