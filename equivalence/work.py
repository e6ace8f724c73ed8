"""What is worked on while one port is judged: the plan, the structure at hand, and what gathers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from equivalence.checks import REGISTRY
from equivalence.comparison import Comparison
from equivalence.conclusion import Conclusions
from equivalence.coverage import Covered
from equivalence.frameworks.subject import Subject
from equivalence.observation import Seen
from equivalence.runs import Example
from equivalence.weights import Bound


@dataclass
class Structure:
    """One structure of a model, both sides made: what all its examples share."""

    reference: Subject
    port: Subject
    bound: Bound
    comparison: Comparison
    examples: list[Example]
    keep: bool = False

    @property
    def trainable(self) -> bool:
        """Whether any parameter can be stepped."""
        return bool(set(self.reference.params) - self.reference.frozen)

    @property
    def sample(self) -> Example:
        """The example that extra runs are made on: moved weights where there is one, else the first."""
        return self.examples[min(1, len(self.examples) - 1)]


@dataclass(frozen=True)
class Plan:
    """What to do: the checks asked for (`asked` when the user named them) and how sharp the verdict must be."""

    checks: tuple[str, ...]
    resolution: float = 1e-6
    seed: int = 0
    shrink: bool = True
    asked: bool = False


@dataclass
class Work:
    """What gathers while one port is judged."""

    port: str
    plan: Plan
    conclusions: Conclusions
    covered: Covered = field(default_factory=Covered)
    first: Structure | None = None
    done: int = 0
    ties: dict[Any, bool] = field(default_factory=dict)
    blind: set[bool] = field(default_factory=set)
    tied: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    references: dict[tuple[int, bool], Seen] = field(default_factory=dict)

    def wants(self, run: str) -> list[str]:
        """The checks asked for that read this kind of run and that nothing has stopped."""
        return [n for n in self.plan.checks if REGISTRY[n].run == run and n not in self.conclusions.stopped]
