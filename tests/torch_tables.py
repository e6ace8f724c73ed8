"""torch's own tables of optimizer configurations and of losses: the yardsticks that nobody here wrote.

Importing them would forbid this process torch's global flags; that is kept from happening.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch

MODULES = """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AvgPool1d AvgPool2d AvgPool3d BCELoss BCEWithLogitsLoss BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU
    CTCLoss CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d
    Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineEmbeddingLoss CrossEntropyLoss ELU Embedding
    FractionalMaxPool2d FractionalMaxPool3d GELU GLU GRU GRUCell GaussianNLLLoss GroupNorm Hardshrink Hardswish
    Hardtanh HingeEmbeddingLoss HuberLoss InstanceNorm1d InstanceNorm2d InstanceNorm3d KLDivLoss L1Loss LPPool1d
    LPPool2d LPPool3d LSTM LSTMCell LayerNorm LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d
    LazyConvTranspose2d LazyConvTranspose3d LeakyReLU Linear LinearCrossEntropyLoss LocalResponseNorm LogSigmoid
    LogSoftmax MSELoss MarginRankingLoss MaxPool1d MaxPool2d MaxPool3d Mish MultiLabelMarginLoss
    MultiLabelSoftMarginLoss MultiMarginLoss MultiheadAttention NLLLoss PReLU PoissonNLLLoss RMSNorm RNN RNNCell
    ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d
    SELU SiLU Sigmoid SmoothL1Loss SoftMarginLoss Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh
    Tanhshrink Threshold Transformer TransformerDecoderLayer TransformerEncoder TransformerEncoderLayer ZeroPad1d
    ZeroPad2d ZeroPad3d
""".split()  # noqa: SIM905 - one name a line would fill two pages
"""The classes of `modules()`, without importing its table: tests are named before they run."""


def optimizer_configurations() -> dict[str, list[dict[str, Any]]]:
    """The options that torch tests each optimizer with, by class; a tensor among them as the number it holds."""
    return {
        info.optim_cls.__name__: [
            {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in config.kwargs.items()}
            for config in info.optim_inputs_func(device="cpu")
        ]
        for info in _table("common_optimizers", "optim_db")
    }


def modules() -> dict[str, Any]:
    """What torch tests its modules with, by class."""
    return {info.module_cls.__name__: info for info in _table("common_modules", "module_db")}


def _table(module: str, name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        pytest.importorskip("expecttest", reason="expecttest is not installed: torch's own tables need it")
        return getattr(importlib.import_module(f"torch.testing._internal.{module}"), name)
