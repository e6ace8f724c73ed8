"""Optimizers on both sides: named pairs, and the translation of a torch optimizer that the user gave alone."""

from equivalence.optimizers.pairs import PAIRS, OptimizerPair, resolve

__all__ = ["PAIRS", "OptimizerPair", "resolve"]
