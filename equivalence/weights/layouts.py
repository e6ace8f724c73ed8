"""How the leaves of each torch layer type are named and laid out in Flax: facts, one row a leaf.

Source: the parameter shapes in the reference pages of torch.nn and flax.nnx / flax.linen.
"""

from __future__ import annotations

LAYOUTS: dict[tuple[str, str], tuple[str, str | None]] = {
    ("Linear", "weight"): ("kernel", "o k -> k o"),
    ("Conv1d", "weight"): ("kernel", "o i w -> w i o"),
    ("Conv2d", "weight"): ("kernel", "o i h w -> h w i o"),
    ("Conv3d", "weight"): ("kernel", "o i d h w -> d h w i o"),
    ("Embedding", "weight"): ("embedding", None),
    ("LayerNorm", "weight"): ("scale", None),
    ("RMSNorm", "weight"): ("scale", None),
    ("GroupNorm", "weight"): ("scale", None),
    ("BatchNorm1d", "weight"): ("scale", None),
    ("BatchNorm2d", "weight"): ("scale", None),
    ("BatchNorm3d", "weight"): ("scale", None),
    ("BatchNorm1d", "running_mean"): ("mean", None),
    ("BatchNorm2d", "running_mean"): ("mean", None),
    ("BatchNorm3d", "running_mean"): ("mean", None),
    ("BatchNorm1d", "running_var"): ("var", None),
    ("BatchNorm2d", "running_var"): ("var", None),
    ("BatchNorm3d", "running_var"): ("var", None),
}
"""(torch layer type, leaf) -> (Flax leaf, axes). A bias keeps its name and shape everywhere."""

COUNTERS = ("num_batches_tracked",)
"""Buffers that count calls and that Flax does not keep."""
