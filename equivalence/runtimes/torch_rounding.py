"""What rounding alone could have made of a run: every operation of torch that rounds, off by one ulp either way.

Moving weights by an ulp shows how rounding at the start carries on, but not what later operations add: where tanh or
a softmax saturates, 1 - y^2 and p * (g - sum(p * g)) are rounding of their own, however the weights are moved. The
idea is that of Monte Carlo arithmetic (Parker, https://web.cs.ucla.edu/~stott/mca/). Equal values are moved alike, so
that exact ties stay ties.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ULP = 2.0**-52
LARGEST = 1e300
"""Beyond it (a mask's most negative number) nothing is moved: it could overflow."""

# fmt: off - one name a line would fill a page
ROUNDS = frozenset(
    (
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "reciprocal",
        "sqrt",
        "rsqrt",
        "pow",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "log2",
        "sin",
        "cos",
        "tan",
        "tanh",
        "tanh_backward",
        "sigmoid",
        "sigmoid_backward",
        "erf",
        "erfc",
        "gelu",
        "gelu_backward",
        "silu",
        "silu_backward",
        "elu",
        "elu_backward",
        "softplus",
        "softplus_backward",
        "leaky_relu",
        "leaky_relu_backward",
        "mish",
        "mish_backward",
        "log_sigmoid_forward",
        "log_sigmoid_backward",
        "lerp",
        "addcmul",
        "addcdiv",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "addmv",
        "mv",
        "dot",
        "convolution",
        "convolution_backward",
        "_softmax",
        "_softmax_backward_data",
        "_log_softmax",
        "_log_softmax_backward_data",
        "_safe_softmax",
        "logsumexp",
        "sum",
        "mean",
        "var",
        "var_mean",
        "std",
        "std_mean",
        "prod",
        "cumsum",
        "cumprod",
        "norm",
        "linalg_vector_norm",
        "native_layer_norm",
        "native_layer_norm_backward",
        "native_group_norm",
        "native_group_norm_backward",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "native_batch_norm_backward",
        "_fused_rms_norm",
        "mse_loss",
        "mse_loss_backward",
        "smooth_l1_loss",
        "smooth_l1_loss_backward",
        "huber_loss",
        "huber_loss_backward",
        "nll_loss_forward",
        "nll_loss_backward",
        "binary_cross_entropy",
        "binary_cross_entropy_backward",
        "binary_cross_entropy_with_logits",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "avg_pool2d",
        "avg_pool2d_backward",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool2d_backward",
    )
)
# fmt: on
"""Operations whose results are rounded; all others (moves, choices, comparisons) give exact results."""


class Rounding(TorchDispatchMode):
    """Moves every float64 result of an operation that rounds by `amplitude` ulps, up or down by a hash of its bits."""

    def __init__(self, seed: int, amplitude: float = 1.0) -> None:
        super().__init__()
        self.salt = 2 * seed + 1
        self.step = amplitude * ULP

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in `TapeMode`: nothing here is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in ROUNDS or func._schema.is_mutable:
            return result
        if isinstance(result, torch.Tensor):
            return self._moved(result)
        if isinstance(result, (tuple, list)):
            return type(result)(self._moved(r) if isinstance(r, torch.Tensor) else r for r in result)
        return result

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        if value.dtype != torch.float64 or value.numel() == 0:
            return value
        self.salt = (self.salt * 6364136223846793005 + 1442695040888963407) % 2**64
        factor = (self.salt | 1) - (2**64 if self.salt >= 2**63 else 0)
        bits = value.contiguous().view(torch.int64)
        hashed = (bits ^ (bits >> 29)) * factor
        moved = value * (1.0 + torch.where(hashed < 0, -self.step, self.step))
        return torch.where(value.abs() < LARGEST, moved, value)
