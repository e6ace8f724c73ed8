"""Every loss of torch.nn in one table: torch's call, the form one would write in JAX, ours, and what they differ in.

`form` and `ours` are expressions over the arrays of `example`, so that a page or a test can measure the gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
        name: of the function in `equivalence.losses`.
        torch: the class in torch.nn.
        call: the torch side, an expression over the arrays as tensors, with `torch` and `F` (torch.nn.functional).
        form: what one would write in JAX, over the arrays as jax arrays, with `jax`, `jnp` and `optax`; None where
            neither has the loss.
        ours: over the same arrays, with `losses` (this package).
        differs: what is quietly different in `form`, or, without one, easily missed in writing it.
        example: arrays, from a random generator, that show the difference.
    """

    name: str
    torch: str
    call: str
    form: str | None
    ours: str
    differs: str
    example: Callable[[np.random.Generator], dict[str, np.ndarray]]

    def torch_call(self, arrays: Arrays) -> Any:
        """The torch loss of the arrays, a tensor; integers and booleans stay what they are."""
        import torch

        tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        return eval(self.call, {"torch": torch, "F": torch.nn.functional, **tensors})

    def ours_call(self, arrays: Arrays) -> Any:
        """Our loss of the arrays, a jax array."""
        return _evaluated(self.ours, arrays)

    def form_call(self, arrays: Arrays) -> Any:
        """The naive form of the arrays, a jax array; None where there is none."""
        return None if self.form is None else _evaluated(self.form, arrays)


def _evaluated(expression: str, arrays: Arrays) -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    from equivalence import losses

    given = {name: jnp.asarray(value) for name, value in arrays.items()}
    return eval(expression, {"jax": jax, "jnp": jnp, "optax": optax, "losses": losses, **given})


def _logs(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def _pair(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": 2 * rng.standard_normal((5, 7)), "y": 2 * rng.standard_normal((5, 7))}


def _meeting(rng: np.random.Generator) -> dict[str, np.ndarray]:
    drawn = _pair(rng)
    drawn["y"][1, 2] = drawn["x"][1, 2]
    return drawn


def _classes(rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = rng.integers(0, 7, 5)
    labels[2] = -100
    return {"x": rng.standard_normal((5, 7)), "y": labels, "w": rng.uniform(0.5, 2, 7)}


def _logs_of_classes(rng: np.random.Generator) -> dict[str, np.ndarray]:
    arrays = _classes(rng)
    return {**arrays, "x": _logs(arrays["x"]), "y": np.abs(arrays["y"]) % 7}


def _scores(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((5, 7)), "y": rng.integers(0, 7, 5)}


def _label_lists(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((3, 4)), "y": np.array([[3, 0, -1, 1], [2, -1, 0, 0], [0, 1, 2, -1]])}


def _signs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": 2 * rng.standard_normal((5, 7)), "y": rng.choice([-1.0, 1.0], (5, 7))}


def _two(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"a": rng.standard_normal((5, 7)), "b": rng.standard_normal((5, 7)), "y": rng.choice([-1.0, 1.0], 5)}


def _three(rng: np.random.Generator) -> dict[str, np.ndarray]:
    a = rng.standard_normal((5, 7))
    return {"a": a, "p": a + 0.01 * rng.standard_normal((5, 7)), "n": a + 0.1 * rng.standard_normal((5, 7))}


def _binary(rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = rng.integers(0, 2, (5, 7)).astype(float)
    return {"x": 2 * rng.standard_normal((5, 7)), "y": labels, "w": rng.uniform(2, 4, 7)}


def _certain(rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = rng.uniform(0.01, 0.99, (5, 7))
    x[1, 2] = 0.0
    return {"x": x, "y": np.ones((5, 7))}


def _counts(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((5, 7)), "y": rng.poisson(3.0, (5, 7)).astype(float)}


def _normals(rng: np.random.Generator) -> dict[str, np.ndarray]:
    v = rng.uniform(0.5, 2, (5, 7))
    v[0, 0] = 1e-8
    return {**_pair(rng), "v": v}


def _distributions(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": _logs(rng.standard_normal((5, 7))), "y": np.exp(_logs(rng.standard_normal((5, 7))))}


def _sequences(rng: np.random.Generator) -> dict[str, np.ndarray]:
    labels = np.array([[1, 2, 2, 3], [4, 1, 0, 0], [2, 0, 0, 0]])
    lengths = np.array([4, 2, 1])
    return {"x": _logs(rng.standard_normal((9, 3, 5))), "y": labels, "t": np.array([9, 7, 8]), "s": lengths}


def _layer(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((5, 3)), "w": rng.standard_normal((7, 3)), "y": rng.integers(0, 7, 5)}


def _adaptive(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"head": (4, 8), "a0": (4, 8), "b0": (3, 4), "a1": (2, 8), "b1": (5, 2)}
    return {
        **{name: rng.standard_normal(shape) for name, shape in shapes.items()},
        "x": rng.standard_normal((6, 8)),
        "y": np.array([0, 1, 2, 4, 5, 9]),
    }


_LEAVES = (
    '{"head.weight": head, "tail.0.0.weight": a0, "tail.0.1.weight": b0, "tail.1.0.weight": a1, "tail.1.1.weight": b1}'
)
_ADAPTIVE = (
    "torch.func.functional_call(torch.nn.AdaptiveLogSoftmaxWithLoss(8, 10, [2, 5], div_value=2.0),"
    f" {_LEAVES}, (x, y)).loss"
)
_PADDED = (
    "optax.ctc_loss(x.transpose(1, 0, 2), (jnp.arange(9) >= t[:, None]) * 1.0, y, (jnp.arange(4) >= s[:, None]) * 1.0)"
)

# fmt: off
LOSSES: tuple[Loss, ...] = (
    Loss("l1", "L1Loss", "F.l1_loss(x, y)", "jnp.abs(x - y).mean()", "losses.l1(x, y)",
         "Where they meet the slope of jnp.abs is 1, torch's is 0: equal values, other gradients", _meeting),
    Loss("mse", "MSELoss", "F.mse_loss(x, y)", "optax.l2_loss(x, y).mean()", "losses.mse(x, y)",
         "optax.l2_loss is half of it: optax.squared_error", _pair),
    Loss("cross_entropy", "CrossEntropyLoss", "F.cross_entropy(x, y, w, label_smoothing=0.1)",
         "optax.softmax_cross_entropy(x, optax.smooth_labels(jax.nn.one_hot(y, 7), 0.1)).mean()",
         "losses.cross_entropy(x, y, weight=w, label_smoothing=0.1)",
         "The mean counts ignored labels and knows no class weights, by whose sum torch divides", _classes),
    Loss("nll", "NLLLoss", "F.nll_loss(x, y, w)", "-(w[y] * jnp.take_along_axis(x, y[:, None], 1)[:, 0]).mean()",
         "losses.nll(x, y, weight=w)", "torch's mean divides by the sum of the weights, not by the batch",
         _logs_of_classes),
    Loss("ctc", "CTCLoss", "F.ctc_loss(x, y, t, s)", f"{_PADDED}.mean()", "losses.ctc(x, y, t, s)",
         "torch's mean first divides each loss by its target's length; without an alignment inf, not about 1e5",
         _sequences),
    Loss("poisson_nll", "PoissonNLLLoss", "F.poisson_nll_loss(x, y, full=True)",
         "-jax.scipy.stats.poisson.logpmf(y, jnp.exp(x)).mean()", "losses.poisson_nll(x, y, full=True)",
         "torch has Stirling's approximation of log(target!), and nothing where target <= 1", _counts),
    Loss("gaussian_nll", "GaussianNLLLoss", "F.gaussian_nll_loss(x, y, v)",
         "-jax.scipy.stats.norm.logpdf(y, x, jnp.sqrt(v)).mean()", "losses.gaussian_nll(x, y, v)",
         "torch leaves log(2 pi) / 2 away, and clamps the variance at 1e-6, which no gradient sees", _normals),
    # F.kl_div warns of its default mean
    Loss("kl_div", "KLDivLoss", "F.kl_div(x, y, reduction='none').mean()", "optax.kl_divergence(x, y).mean()",
         "losses.kl_div(x, y)",
         "torch's default mean divides by the classes too; its batchmean is Optax's mean", _distributions),
    Loss("bce", "BCELoss", "F.binary_cross_entropy(x, y)",
         "-(y * jnp.log(x + 1e-15) + (1 - y) * jnp.log(1 - x + 1e-15)).mean()", "losses.bce(x, y)",
         "torch clamps the logarithms at -100; a small constant inside them clamps elsewhere", _certain),
    Loss("bce_with_logits", "BCEWithLogitsLoss", "F.binary_cross_entropy_with_logits(x, y, pos_weight=w)",
         "optax.sigmoid_binary_cross_entropy(x, y).mean()", "losses.bce_with_logits(x, y, pos_weight=w)",
         "Optax has no pos_weight", _binary),
    Loss("margin_ranking", "MarginRankingLoss", "F.margin_ranking_loss(a[:, 0], b[:, 0], y)",
         "jax.nn.relu(y * (a[:, 0] - b[:, 0])).mean()", "losses.margin_ranking(a[:, 0], b[:, 0], y)",
         "Target 1 wants the first to be larger: the sign is minus", _two),
    Loss("hinge_embedding", "HingeEmbeddingLoss", "F.hinge_embedding_loss(x, y)", "optax.hinge_loss(x, y).mean()",
         "losses.hinge_embedding(x, y)", "optax.hinge_loss is max(0, 1 - x y); torch's is x where y is 1", _signs),
    Loss("multi_label_margin", "MultiLabelMarginLoss", "F.multilabel_margin_loss(x, y)", None,
         "losses.multi_label_margin(x, y)", "Labels are read up to the first -1; a label listed twice counts twice",
         _label_lists),
    Loss("huber", "HuberLoss", "F.huber_loss(x, y, delta=2.0)", "optax.huber_loss(x, y, delta=2.0).mean()",
         "losses.huber(x, y, delta=2.0)", "None", _pair),
    Loss("smooth_l1", "SmoothL1Loss", "F.smooth_l1_loss(x, y, beta=2.0)", "optax.huber_loss(x, y, delta=2.0).mean()",
         "losses.smooth_l1(x, y, beta=2.0)", "Huber's loss is delta times it: equal at 1 only", _pair),
    Loss("soft_margin", "SoftMarginLoss", "F.soft_margin_loss(x, y)", "optax.sigmoid_binary_cross_entropy(x, y).mean()",
         "losses.soft_margin(x, y)", "torch's targets are 1 and -1, Optax's 1 and 0", _signs),
    Loss("multi_label_soft_margin", "MultiLabelSoftMarginLoss", "F.multilabel_soft_margin_loss(x, y, w)",
         "optax.sigmoid_binary_cross_entropy(x, y).sum(-1).mean()", "losses.multi_label_soft_margin(x, y, weight=w)",
         "torch takes the mean over the classes, not the sum, and has class weights", _binary),
    Loss("cosine_embedding", "CosineEmbeddingLoss", "F.cosine_embedding_loss(a, b, y, margin=0.1)",
         "jnp.where(y == 1, 1 - optax.cosine_similarity(a, b), optax.cosine_similarity(a, b) - 0.1).mean()",
         "losses.cosine_embedding(a, b, y, margin=0.1)",
         "Below the margin nothing is lost; no nan at zero vectors", _two),
    Loss("multi_margin", "MultiMarginLoss", "F.multi_margin_loss(x, y)",
         "optax.losses.multiclass_hinge_loss(x, y).mean()", "losses.multi_margin(x, y)",
         "Optax takes the largest violation, torch the mean of all", _scores),
    Loss("triplet_margin", "TripletMarginLoss", "F.triplet_margin_loss(a, p, n)",
         "optax.losses.triplet_margin_loss(a, p, n).mean()", "losses.triplet_margin(a, p, n)",
         "torch adds eps 1e-6 to every difference, Optax to the sum of their squares", _three),
    Loss("triplet_margin_with_distance", "TripletMarginWithDistanceLoss",
         "F.triplet_margin_with_distance_loss(a, p, n, swap=True)", "optax.losses.triplet_margin_loss(a, p, n).mean()",
         "losses.triplet_margin_with_distance(a, p, n, swap=True)", "Optax cannot swap the anchor", _three),
    Loss("adaptive_log_softmax", "AdaptiveLogSoftmaxWithLoss", _ADAPTIVE, None,
         f"losses.adaptive_log_softmax(x, y, {_LEAVES})[1]", "Its weights are its argument: the module's own leaves",
         _adaptive),
    Loss("linear_cross_entropy", "LinearCrossEntropyLoss", "F.linear_cross_entropy(x, w, y)",
         "optax.softmax_cross_entropy_with_integer_labels(x @ w.T, y).mean()",
         "losses.linear_cross_entropy(x, w, y)", "None; ignored labels, weights and smoothing are missing", _layer),
)
# fmt: on
"""All 23 losses of torch.nn, in its order of export."""
