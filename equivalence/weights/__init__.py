"""Moving leaves between implementations: declarative, invertible rules, and mappings made of them."""

from equivalence.weights.infer import infer
from equivalence.weights.mapping import Bound, Leaves, Mapping
from equivalence.weights.rules import Change, Rule, flip, offset

__all__ = ["Bound", "Change", "Leaves", "Mapping", "Rule", "flip", "infer", "offset"]
