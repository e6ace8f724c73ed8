"""torch's learning-rate schedulers as Optax schedules: functions of a count, exact at every count.

torch's schedulers are objects that change the optimizer, mostly by multiplying the rate that they find there; an Optax
schedule is a pure function of a count. A scheduler is resolved into stretches of counts on each of which one list of
simple schedulers is stepped (`schedule_runs`). A stretch has a closed form (`schedule_forms`), or torch's own recursion
runs through it in a `lax.fori_loop`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.errors import InputError, unknown
from equivalence.optimizers.schedule_forms import Rate, form_of, number
from equivalence.optimizers.schedule_runs import Run, leaves_of, runs_of

Schedule = Callable[[Any], Any]


def schedules(scheduler: Any) -> list[dict[str, Schedule]]:
    """A torch scheduler as one dict of schedules a parameter group.

    Args:
        scheduler: any of torch.optim.lr_scheduler except ReduceLROnPlateau (which looks at a metric), or
            torch.optim.swa_utils.SWALR; also one in the middle of its run.

    Returns, by group, {"lr": schedule} and, where the scheduler cycles momentum, "beta1" for optimizers with betas,
    else "momentum". A schedule takes the absolute position of the scheduler (`position`), a Python int or an integer
    scalar, traced or not, at least 0, and returns a scalar of JAX's default float dtype. It is computed in float64,
    also where 64-bit types are off, and rounded once. Where torch raises (OneCycleLR past total_steps) the last value
    is held.

    Raises InputError for a scheduler of another class, a subclass included; for groups whose present values are not
    what the scheduler gives at its position; and for nestings that torch cannot run.

    Cost: a closed form, but torch's recursion over scalars, O(count), for MultiplicativeLR; for a ChainedScheduler of
    what does more than multiply (CosineAnnealingLR with eta_min, or past T_max; a SequentialLR inside); and for a
    ChainedScheduler or SequentialLR inside a SequentialLR. For the user's functions see `user_function`.

    Differs from the Optax schedules of like names: `schedule_table` says how.
    https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate
    """
    runs, leaves = runs_of(scheduler), leaves_of(scheduler)
    if len({id(leaf) for leaf in leaves}) < len(leaves):
        raise InputError("one scheduler stands twice in a SequentialLR or ChainedScheduler: make two of it")
    size = len(scheduler.optimizer.param_groups)
    if any(len(leaf.base_lrs) != size for leaf in leaves):
        raise InputError(f"the optimizer has {size} parameter groups, more than when its scheduler was made")
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        groups = [_Group(leaves, runs, index) for index in range(size)]
        _assert_untouched(position(scheduler), groups)
    return [{name: in_float64(group.whole(parts)) for name, parts in group.values.items()} for group in groups]


def to_schedule(scheduler: Any, *, group: int = 0, value: str = "lr", every: int = 1) -> Schedule:
    """One value of one parameter group of a torch scheduler, as an Optax schedule.

    Args:
        scheduler: as in `schedules`, which also says what the schedule takes and what is raised.
        group: the number of the parameter group.
        value: "lr"; "momentum" or "beta1" where the scheduler cycles it.
        every: optimizer steps between two calls of `scheduler.step()`: the steps of an epoch, for a scheduler that is
            stepped once an epoch. The count is divided by it, rounding down.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.5)
    >>> schedule = to_schedule(torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5), every=10)
    >>> [float(schedule(count)) for count in (0, 19, 20, 45)]
    [0.5, 0.5, 0.25, 0.125]
    """
    if every < 1:
        raise InputError(f"to_schedule(every={every}): at least one optimizer step lies between two scheduler steps")
    groups = schedules(scheduler)
    if not 0 <= group < len(groups):
        raise InputError(f"to_schedule(group={group}): the optimizer has {len(groups)} parameter groups")
    if value not in groups[group]:
        raise unknown("value of the scheduler", value, groups[group])
    schedule = groups[group][value]
    return schedule if every == 1 else lambda count: schedule(count // every)


def position(scheduler: Any) -> int:
    """How often a scheduler was stepped: its `last_epoch`; for a ChainedScheduler, which has none, its first's."""
    while not hasattr(scheduler, "last_epoch"):
        scheduler = scheduler._schedulers[0]
    return int(scheduler.last_epoch)


def in_float64(value: Callable[[Any], Any]) -> Schedule:
    """A function of an int64 scalar, computed with 64-bit types on, as one in the caller's precision."""

    def schedule(count: Any) -> Any:
        dtype = jnp.result_type(float)
        with jax.enable_x64(True):
            n = jax.lax.convert_element_type(jnp.asarray(count), jnp.int64)
            return jax.lax.convert_element_type(value(n), dtype)

    return schedule


class _Group:
    """What a scheduler does to one parameter group: `values`, name -> one function of the count a stretch."""

    def __init__(self, leaves: Sequence[Any], runs: Sequence[Run], index: int) -> None:
        self.held = leaves[0].optimizer.param_groups[index]
        self.initial = number(self.held["initial_lr"])
        self.forms = {run: form_of(run.scheduler, index, run.entry, run.ahead) for run in runs}
        self.begins = sorted({run.begin for run in runs})
        self.active = [[run for run in runs if run.begin <= begin < run.end] for begin in self.begins]
        stretches = range(len(self.begins))
        self.values: dict[str, list[Callable[[Any], Any]]] = {"lr": [self.rate(i) for i in stretches]}
        cycling = [leaf for leaf in leaves if getattr(leaf, "cycle_momentum", False)]
        if cycling:
            self.built = form_of(cycling[-1], index)
            name = "beta1" if cycling[-1].use_beta1 else "momentum"
            self.values[name] = [self.momentum(i) for i in stretches]

    def whole(self, parts: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        """One function of the count from one a stretch."""
        if len(parts) == 1:
            return parts[0]
        return lambda n: jax.lax.switch(jnp.sum(n >= jnp.asarray(self.begins[1:])), parts, n)

    def at(self, parts: Sequence[Callable[[Any], Any]], count: int) -> float:
        """The value at a known count."""
        return float(parts[bisect_right(self.begins, count) - 1](jnp.int64(count)))

    def before(self, stretch: int) -> Rate:
        """The rate before the first step of a stretch."""
        return self.rate(stretch - 1)(jnp.int64(self.begins[stretch] - 1)) if stretch else jnp.float64(self.initial)

    def rate(self, stretch: int) -> Callable[[Any], Rate]:
        """The rate as a function of the count, right on one stretch."""
        begin, active = self.begins[stretch], self.active[stretch]
        forms = [self.forms[run] for run in active]
        if len(active) == 1 and self.closed(active[0], begin):
            return lambda n: self.alone(active[0], n - active[0].begin, partial(self.before, stretch))
        if all(form.scales and run.entry == "built" and not run.reset for form, run in zip(forms, active, strict=True)):
            return partial(self.product, active, min(form.until for form in forms))

        def through(n: Any) -> Rate:
            rate = self.before(stretch)
            for run in active:
                rate = jnp.float64(self.initial if run.reset else rate)
                if run.begin < begin or self.by_step(run):
                    rate = self.forms[run].step(jnp.int64(begin - run.begin), rate)
                elif run.entry == "built":
                    rate = self.forms[run].run(jnp.int64(0), rate)
                else:
                    rate = self.alone(run, jnp.int64(0), partial(jnp.asarray, rate))
            return self.recursion(active, jnp.int64(begin), n, rate)

        return through

    def closed(self, run: Run, begin: int) -> bool:
        """Whether the only scheduler that is stepped on a stretch gives its rate without a recursion."""
        form = self.forms[run]
        if form.absolute:
            return True
        # A scheduler made later may have changed initial_lr, to which SequentialLR then resets the rate.
        usual = run.entry == "restarted" or (run.entry == "built" and (not run.reset or self.initial == form.base))
        return run.begin == begin and usual

    def by_step(self, run: Run) -> bool:
        """Whether what sets its first rate is a step, not its constructor."""
        return run.entry == "stepped" or (self.forms[run].absolute and (run.reset or run.entry == "restarted"))

    def alone(self, run: Run, n: Any, rate: Callable[[], Rate]) -> Rate:
        """The rate n steps after a scheduler was built, or restarted at `rate`, in closed form."""
        form = self.forms[run]
        if form.absolute and self.by_step(run):
            return form.step(n, jnp.float64(form.base))
        if run.entry == "restarted" and form.restarted is not None:
            return form.restarted(n, rate())
        return form.run(n, jnp.float64(form.base))

    def product(self, active: Sequence[Run], until: int, n: Any) -> Rate:
        """Schedulers that multiply commute: the product of what each does alone, while each does no more than that."""
        rate: Rate = jnp.float64(self.initial)
        for run in active:
            rate = self.forms[run].run(jnp.minimum(n, until), rate)
        return self.recursion(active, jnp.minimum(n, until), n, rate)

    def recursion(self, active: Sequence[Run], begin: Any, end: Any, rate: Rate) -> Rate:
        """torch's own steps from count `begin`, where the rate is `rate`, to count `end`."""

        def body(count: Any, rate: Rate) -> Rate:
            for run in active:
                rate = self.forms[run].step(count - run.begin, rate)
            return rate

        return jax.lax.fori_loop(begin + 1, end + 1, body, jnp.float64(rate))

    def momentum(self, stretch: int) -> Callable[[Any], Any]:
        """The momentum as a function of the count, right on one stretch: what was set last stays."""
        for run in reversed(self.active[stretch]):
            if (cycle := self.forms[run].momentum) is not None:
                return lambda n: cycle(n - run.begin)
        if stretch:
            last = self.momentum(stretch - 1)
            return lambda n: last(jnp.int64(self.begins[stretch] - 1))
        assert self.built.momentum is not None
        first = self.built.momentum
        return lambda n: jnp.float64(first(jnp.int64(0)))

    def allowed(self, held: Any, right: float, at: int) -> float:
        """How far torch's value may lie from the closed form's by rounding.

        torch has multiplied `at` times, rounding by half an ulp of what holds the value (float64, or a tensor's dtype);
        8 more for the formulas, and as many ulps of the largest rate where the value was a difference of such. Past the
        bottom of a cosine torch divides by 1 + cos of nearly pi, and all that follows has that division's error.
        """
        unit = 4 * _epsilon(held)
        past = [form.condition for run, form in self.forms.items() if at > run.begin + form.until]
        largest = max(abs(number(v)) for k, v in self.held.items() if k in ("lr", "initial_lr", "max_lr", "swa_lr"))
        return unit * ((at + 8) * max(past, default=1.0) * abs(right) + largest)


def _epsilon(held: Any) -> float:
    import torch

    floating = isinstance(held, torch.Tensor) and held.dtype.is_floating_point
    return torch.finfo(held.dtype).eps if floating else math.ulp(1.0)


def _assert_untouched(at: int, groups: Sequence[_Group]) -> None:
    """Raise InputError for every group whose present values are not what the scheduler gives at its position."""
    found = []
    for index, group in enumerate(groups):
        for name, parts in group.values.items():
            held = group.held["betas"][0] if name == "beta1" else group.held[name]
            right = group.at(parts, at)
            present = number(held)
            if present != right and not abs(present - right) <= group.allowed(held, right, at):
                found.append(f"group {index}: {name} is {present!r}, the scheduler gives {right!r}")
    if found:
        raise InputError(
            f"values that the scheduler does not give at its position {at} (changed by hand, or by another one?): "
            + "; ".join(found)
        )
