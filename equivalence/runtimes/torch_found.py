"""What a subject's float64 runs on torch need to be float64, learnt from the first of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from equivalence.frameworks.subject import Subject
from equivalence.observation import Observation
from equivalence.runtimes.constants import recovered, shaken_by

LOOKS = 3
"""Runs of a kind that are watched before it is believed that nothing in them needs lifting."""


@dataclass
class Found:
    """What lifted runs met: dtypes lifted, constants that survive, operations that ran in low precision."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)
    operations: set[str] = field(default_factory=set)

    @property
    def coarsest(self) -> float:
        """The unit roundoff of the coarsest dtype that was lifted; 0 where none was."""
        return max((torch.finfo(dtype).eps / 2 for dtype in self.dtypes), default=0.0)

    @property
    def surviving(self) -> tuple[str, ...]:
        """Constants that survive and operations in low precision, by name."""
        return (*sorted(self.constants), *sorted(self.operations))

    @property
    def float64(self) -> str:
        """`native`, `lifted` or `float32 only`."""
        if self.operations:
            return "float32 only"
        return "lifted" if self.dtypes or self.constants else "native"

    def add(self, other: Found) -> None:
        """Take in what another run met."""
        self.dtypes |= other.dtypes
        self.constants |= other.constants
        self.operations |= other.operations


class Lifting:
    """What a subject's float64 runs need: learnt from the first runs of each kind, which all run lifted.

    `constants` are buffers that the port makes for itself: float32 rounded them before any run.
    """

    def __init__(self, subject: Subject, constants: Iterable[str] = ()) -> None:
        self.found = Found()
        floats = {path for path, value in subject.buffers.items() if value.dtype.kind == "f"}
        self._own = {path: subject.buffers[path] for path in constants if path in floats}
        self._fixed = False
        self._clean: Counter[str] = Counter()
        self._lifts: set[str] = set()

    @property
    def constants(self) -> tuple[str, ...]:
        """The buffers that are taken for constants."""
        return tuple(sorted(self._own))

    def wanted(self, kind: str) -> bool:
        """Whether float64 runs of a kind (`eval`, `train`, `steps`) run lifted: until some were seen not to need it."""
        return kind in self._lifts or self._clean[kind] < LOOKS

    def learn(self, kind: str, found: Found) -> None:
        """Take in what a lifted run met."""
        self.found.add(found)
        if found.float64 == "native":
            self._clean[kind] += 1
        else:
            self._lifts.add(kind)

    def fix(self, after_a_call: Callable[[], Observation]) -> None:
        """Once: a buffer that a training-mode call changes is no constant."""
        if self._fixed:
            return
        self._fixed = True
        if any(
            (meant := _meant(v)) is None or not np.array_equal(v, meant, equal_nan=True) for v in self._own.values()
        ):
            after = after_a_call()
            self._own = {p: v for p, v in self._own.items() if np.array_equal(_float32(v), after[p], equal_nan=True)}

    def meant(self, weights: Observation, shaken: int | None) -> Observation:
        """The weights of a float64 run: its constants as they were meant where that is known, else `shaken`."""
        found = dict(weights)
        for path, own in self._own.items():
            if not np.array_equal(_float32(own), _float32(weights[path]), equal_nan=True):
                continue
            meant = _meant(own)
            if meant is None:
                self.found.constants.add(path)
                meant = own.astype(np.float64) if shaken is None else shaken_by(own.astype(np.float64), shaken)
            elif not np.array_equal(meant, own, equal_nan=True):
                self.found.dtypes.add(torch.float32)
            found[path] = meant
        return found


def _float32(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32)


def _meant(own: np.ndarray) -> np.ndarray | None:
    """A constant buffer's own value: in float64 it is what it is."""
    return own if own.dtype == np.float64 else recovered(own)
