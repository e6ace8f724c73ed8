"""One rule: where leaves go and how their axes move. A bijection, so its inverse is the same rule read backwards.

The one law: *a hole on one side only must be an axis on the other.* A hole that only the source has stacks the
leaves it matches along that axis; one that only the target has splits along it. Renaming, stacking for scan,
fused projections, experts and gates are all this one law.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from equivalence.errors import MappingError

Array = Any
"""A NumPy or a JAX array: rules run inside compiled programs too."""

_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Change:
    """A change of values with its inverse. `forward` and `inverse` move values, `*_gradient` move gradients.

    It works on the target's axes: a rule applies it after the axes have moved, and undoes it `first`.
    """

    name: str
    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    forward_gradient: Callable[[Array], Array]
    inverse_gradient: Callable[[Array], Array]
    first: bool = False

    def swapped(self) -> Change:
        """The change that undoes this one."""
        name = f"not {self.name}"
        return Change(name, self.inverse, self.forward, self.inverse_gradient, self.forward_gradient, not self.first)


def offset(amount: float) -> Change:
    """The target holds the source plus `amount` (a norm stored as 1 + w has amount -1); gradients stay."""
    return Change(f"+ {amount}", lambda a: a + amount, lambda a: a - amount, lambda a: a, lambda a: a)


def flip(*axes: int) -> Change:
    """The target holds the source reversed along `axes` (a transposed convolution's kernel)."""

    def turn(a: Array) -> Array:
        return a[
            tuple(slice(None, None, -1) if i in {x % a.ndim for x in axes} else slice(None) for i in range(a.ndim))
        ]

    return Change(f"flip {axes}", turn, turn, turn, turn)


@dataclass(frozen=True, init=False)
class Rule:
    """`Rule(source, target, axes=None, change=None, **values)`.

    Args:
        source, target: dotted path templates with holes, `"h.{i}.attn.{s}.kernel"`. A target of None says that the
            port has no such leaf (a counter it does not keep); a source of None that the reference has none.
        axes: an einops pattern from the source's axes to the target's, `"o k -> k o"`; None leaves them.
        change: a change of values after the axes have moved.
        values: what a hole may stand for, in order, `s=("query", "key", "value")` or `g="ifgo"`; or the length of an
            axis that the shapes leave open, `c=16`.

    >>> Rule("fc.weight", "fc.kernel", "o k -> k o").inverse()
    Rule('fc.kernel', 'fc.weight', 'k o -> o k')
    """

    source: str | None
    target: str | None
    axes: str | None = None
    change: Change | None = None
    values: tuple[tuple[str, tuple[str, ...]], ...] = ()
    lengths: tuple[tuple[str, int], ...] = ()

    def __init__(
        self,
        source: str | None,
        target: str | None,
        axes: str | None = None,
        change: Change | None = None,
        **values: Sequence[str] | int,
    ) -> None:
        put = object.__setattr__
        put(self, "source", source)
        put(self, "target", target)
        put(self, "axes", axes)
        put(self, "change", change)
        lengths = {name: value for name, value in values.items() if isinstance(value, int)}
        choices = {name: value for name, value in values.items() if not isinstance(value, int)}
        put(self, "values", tuple((name, tuple(str(v) for v in choice)) for name, choice in choices.items()))
        put(self, "lengths", tuple(lengths.items()))
        self._obey_the_law()

    def _obey_the_law(self) -> None:
        if self.source is None or self.target is None:
            if self.source is None and self.target is None:
                raise MappingError("a rule needs a source or a target")
            return
        sides = self.sides()
        for own, other, side in ((self.source, self.target, 0), (self.target, self.source, 1)):
            for name in sorted(set(holes(own)) - set(holes(other))):
                if sides is None or [name] not in sides[side] or all(name not in group for group in sides[1 - side]):
                    raise MappingError(
                        f"{self}: the hole {{{name}}} stands on one side only, so {name!r} must be an axis of the"
                        " pattern, and an axis of its own on the hole's side"
                    )
        if sides is not None:
            left, right = (sorted(axis for group in side for axis in group) for side in sides)
            if left != right or len(set(left)) != len(left):
                raise MappingError(f"{self}: a pattern uses each axis exactly once on each side")

    def sides(self) -> tuple[list[list[str]], list[list[str]]] | None:
        """Both sides of the pattern as lists of groups of axis names, or None without a pattern."""
        if self.axes is None:
            return None
        left, arrow, right = self.axes.partition("->")
        if not arrow:
            raise MappingError(f"{self}: a pattern reads 'left -> right'")
        return groups(left), groups(right)

    def inverse(self) -> Rule:
        """The rule read from target to source."""
        axes = None
        if self.axes is not None:
            left, _, right = self.axes.partition("->")
            axes = f"{right.strip()} -> {left.strip()}"
        change = None if self.change is None else self.change.swapped()
        values: dict[str, Sequence[str] | int] = {**dict(self.values), **dict(self.lengths)}
        return Rule(self.target, self.source, axes, change, **values)

    def inside(self, source: str, target: str) -> Rule:
        """The rule of a module as that of a larger one: prefixes, with their dots, before both paths."""
        here = None if self.source is None else source + self.source
        there = None if self.target is None else target + self.target
        values: dict[str, Sequence[str] | int] = {**dict(self.values), **dict(self.lengths)}
        return Rule(here, there, self.axes, self.change, **values)

    def __repr__(self) -> str:
        parts = [repr(self.source), repr(self.target)]
        if self.axes is not None:
            parts.append(repr(self.axes))
        if self.change is not None:
            parts.append(f"change={self.change.name}")
        parts += [f"{name}={value!r}" for name, value in (*self.values, *self.lengths)]
        return f"Rule({', '.join(parts)})"


def holes(template: str) -> list[str]:
    """The holes of a path template, in order.

    >>> holes("h.{i}.attn.{s}.kernel")
    ['i', 's']
    """
    return _HOLE.findall(template)


def groups(side: str) -> list[list[str]]:
    """One side of a pattern as groups of axis names.

    >>> groups("(s h d) e")
    [['s', 'h', 'd'], ['e']]
    """
    found = [token.strip("()").split() for token in re.findall(r"\([^)]*\)|[^\s()]+", side)]
    if any(not re.fullmatch(r"[A-Za-z_]\w*", axis) for group in found for axis in group):
        raise MappingError(f"pattern {side.strip()!r}: axes are names (numbers and '...' are not reversible)")
    return found


def matcher(template: str, values: dict[str, tuple[str, ...]]) -> re.Pattern[str]:
    """A regular expression that reads the holes of a template off a path; a hole stays inside one path part."""
    pattern, position, seen = "", 0, set[str]()
    for hole in _HOLE.finditer(template):
        pattern += re.escape(template[position : hole.start()])
        name = hole.group(1)
        choice = "|".join(map(re.escape, values[name])) if name in values else r"[^.]+?"
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{choice})"
        seen.add(name)
        position = hole.end()
    return re.compile(pattern + re.escape(template[position:]))


def fill(template: str, binding: dict[str, str]) -> str:
    """A template with its holes filled in."""
    return _HOLE.sub(lambda hole: binding[hole.group(1)], template)


@dataclass(frozen=True)
class Move:
    """A rule bound to the leaves of two models: `sources` stacked, rearranged, split into `targets`.

    `sources` and `targets` run over the holes of their own side in row-major order of `source_sizes` and
    `target_sizes`; `source_axes`, `target_axes` are the positions of those holes' axes in the pattern.
    """

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_sizes: tuple[int, ...] = ()
    target_sizes: tuple[int, ...] = ()
    source_axes: tuple[int, ...] = ()
    target_axes: tuple[int, ...] = ()
    lengths: tuple[tuple[str, int], ...] = dataclasses.field(default=())

    def run(self, arrays: Sequence[Array], stack: Callable[..., Array], gradient: bool = False) -> list[Array]:
        """The targets' arrays from the sources', with `stack` of NumPy or JAX. Gradients move by the linear part."""
        from einops import rearrange

        whole = arrays[0]
        if self.source_sizes:
            whole = stack(list(arrays), 0).reshape(self.source_sizes + tuple(arrays[0].shape))
            whole = _move_axes(whole, range(len(self.source_axes)), self.source_axes)
        change = self.rule.change
        if change is not None and change.first:
            whole = change.forward_gradient(whole) if gradient else change.forward(whole)
        if self.rule.axes is not None:
            whole = rearrange(whole, self.rule.axes, **dict(self.lengths))
        if change is not None and not change.first:
            whole = change.forward_gradient(whole) if gradient else change.forward(whole)
        if not self.target_sizes:
            return [whole]
        whole = _move_axes(whole, self.target_axes, range(len(self.target_axes)))
        whole = whole.reshape((len(self.targets), *whole.shape[len(self.target_sizes) :]))
        return [whole[number] for number in range(len(self.targets))]


def _move_axes(array: Array, source: Sequence[int], target: Sequence[int]) -> Array:
    order = [axis for axis in range(array.ndim) if axis not in set(source)]
    for to, start in sorted(zip(target, source, strict=True)):
        order.insert(to, start)
    return array.transpose(order)
