"""Where to look: configurations, weights, inputs and draws, drawn by Hypothesis as small plain descriptions."""

from equivalence.search.arrays import KINDS, batch_like, moved
from equivalence.search.trials import Trial, draw, smallest, trials

__all__ = ["KINDS", "Trial", "batch_like", "draw", "moved", "smallest", "trials"]
