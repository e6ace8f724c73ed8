"""Which parameters the weight decay reaches, and which ones do not move at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from equivalence.errors import InputError


def decay_mask(model: Any, layers: tuple[type, ...] = (), norms: tuple[type, ...] = ()) -> dict[str, bool]:
    """Whether weight decay reaches each leaf under "no decay on biases and normalisation layers".

    Args:
        model: a torch module, judged by the *type* of the layer that owns each parameter; or shapes (or arrays) by
            path, where a leaf of at most one axis is spared: the same rule for a network of linear, convolution,
            embedding and normalisation layers.
        layers, norms: types of your own to be treated as torch's layers (all but what they call a bias is decayed) and
            as its norms (nothing is).

    Returns torch path -> True where it is decayed. In torch two groups: `{"params": [p for path, p in
    model.named_parameters() if mask[path]]}` and the rest with `"weight_decay": 0`. In Optax `adamw(mask=tree)` or
    `masked(add_decayed_weights(d), tree)`, with a tree of these booleans laid out as the port's parameters: both apply
    where the mask is True.

    Raises InputError for a vector owned by a layer that is not torch's own: nothing but its name could tell whether it
    is a norm scale (T5's `final_layer_norm.weight`), and names lie; say so with `layers=` or `norms=`.
    """
    if isinstance(model, Mapping):
        return {path: len(value.shape if hasattr(value, "shape") else value) > 1 for path, value in model.items()}
    mask: dict[str, bool] = {}
    unclear: list[str] = []
    for path, parameter in model.named_parameters():
        owner, name = _owner(model, path)
        verdict = _decays(owner, name, tuple(parameter.shape), layers, norms)
        mask[path] = bool(verdict)
        if verdict is None:
            unclear.append(f"{path} ({type(owner).__name__})")
    if unclear:
        raise InputError(
            f"whether weight decay reaches {', '.join(unclear)} cannot be told from the layer's type: name the type in"
            " layers= or norms="
        )
    return mask


def _owner(model: Any, path: str) -> tuple[Any, str]:
    """The layer that owns a parameter and the name it has there, looking through torch's parametrizations."""
    parts = path.split(".")
    if "parametrizations" in parts:
        at = parts.index("parametrizations")
        parts = parts[: at + 2]
        del parts[at]
    return model.get_submodule(".".join(parts[:-1])), parts[-1]


def _decays(
    owner: Any, name: str, shape: tuple[int, ...], layers: tuple[type, ...], norms: tuple[type, ...]
) -> bool | None:
    """None where neither the type nor the shape tells."""
    if isinstance(owner, (*norms, *_torch_norms())):
        return False
    if isinstance(owner, layers) or _from_torch(owner):
        return not (name == "bias" or name.startswith("bias_") or name.endswith("_bias"))
    vector = math.prod(shape) == max(shape, default=1)
    return None if vector else True


def _from_torch(owner: Any) -> bool:
    """Whether a module is one of torch's layers or a subclass of one; a container of others is not."""
    homes = (kind.__module__ for kind in type(owner).__mro__)
    return any(home.startswith("torch.nn.modules.") and not home.endswith((".module", ".container")) for home in homes)


def _torch_norms() -> tuple[type, ...]:
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase

    # BatchNorm, SyncBatchNorm and InstanceNorm all come from _NormBase
    return (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def freeze(
    inner: optax.GradientTransformation, frozen: Callable[[str], bool] | Any
) -> optax.GradientTransformationExtraArgs:
    """`parameter.requires_grad_(False)`: no update, no decay, no state, and no part in a norm taken inside `inner`.

    Args:
        inner: the optimizer of the others; it sees `optax.MaskedNode` in place of a frozen leaf, so that a clipping by
            the total norm *inside* it does not count them.
        frozen: of a dotted path, whether the leaf is frozen; or a tree of booleans like the parameters, True = frozen.

    The order is `accumulate(with_average(freeze(scale_gradients(chain(clip_grad_norm(c), adamw)), frozen)), k)`.

    Differs from gradients of zero, under which Adam's decay and momentum go on moving a leaf, and from clipping outside
    it, where the gradients of frozen leaves count in the norm.

    https://docs.pytorch.org/docs/stable/notes/autograd.html#setting-requires-grad
    """

    def labels(tree: Any) -> Any:
        if not callable(frozen):
            return jax.tree.map(_label, frozen)
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: _label(frozen(jax.tree_util.keystr(keys, simple=True, separator="."))), tree
        )

    return optax.partition({"moving": inner, "frozen": optax.set_to_zero()}, labels)


def _label(frozen: Any) -> str:
    return "frozen" if frozen else "moving"
