"""What surrounds the optimizer's step: torch, the Optax form that looks the same, and what it quietly does instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Around:
    """One line of the table: the torch code, the naive Optax code, the translation here, and the difference."""

    torch: str
    naive: str
    form: str
    differs: str


AROUND: tuple[Around, ...] = (
    Around(
        "torch.nn.utils.clip_grad_norm_(parameters, c)",
        "optax.clip_by_global_norm(c)",
        "clip_grad_norm(c)",
        "torch divides by norm + 1e-6 and multiplies always; Optax divides by the norm and selects",
    ),
    Around(
        "torch.nn.utils.clip_grad_norm_(parameters, c)",
        "optax.clip(c)",
        "clip_grad_norm(c)",
        "optax.clip clips each element: it is clip_grad_value_",
    ),
    Around(
        "torch.nn.utils.clip_grad_norm_(parameters, c, norm_type=0)",
        "count of the elements that are not 0",
        "clip_grad_norm(c, 0)",
        "the norm of the leaves' norms counts leaves, not elements",
    ),
    Around(
        "clip_grad_norm_(p for p in parameters if p.requires_grad)",
        "optax.chain(clip, freeze(inner))",
        "freeze(optax.chain(clip, inner))",
        "clipping outside counts the gradients of frozen leaves in the norm",
    ),
    Around(
        "torch.nn.utils.clip_grad_value_(parameters, v)",
        "optax.clip(v)",
        "clip_grad_value(v)",
        "none: the same function, NaN included",
    ),
    Around(
        "loss.backward() k times, optimizer.step()",
        "optax.MultiSteps(inner, k)",
        "accumulate(inner, k)",
        "torch sums; MultiSteps takes a running mean, in float32 also where gradients are float64",
    ),
    Around(
        "(loss / k).backward() k times, optimizer.step()",
        "optax.MultiSteps(inner, k)",
        "accumulate(inner, k, mean=True)",
        "torch divides each, then adds; the running mean rounds otherwise",
    ),
    Around(
        "scheduler.step() every micro-batch",
        "a schedule inside MultiSteps",
        "accumulate(optimizer(per_micro_batch(schedule, k)), k)",
        "inside, a schedule counts real updates: the rate falls k times more slowly",
    ),
    Around(
        "AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d))",
        "optax.ema(d)",
        'averaging("ema", d)',
        "optax.ema averages updates, from zero, divided by 1 - d^t; torch's first update copies the weights",
    ),
    Around(
        "optimizer.step(); averaged.update_parameters(model)",
        "the average of the parameters given to update",
        "with_average(optimizer, averaging(...))",
        "torch averages the new parameters: the other is one step old",
    ),
    Around(
        "AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())",
        "average + (weights - average) / (n + 1)",
        'averaging("swa", multi=True)',
        "torch's weight 1 / (n + 1) is float32 also for float64 parameters",
    ),
    Around(
        "AveragedModel(model, ..., use_buffers=True)",
        "the average of num_batches_tracked rounded, or in floats",
        "averaging(..., use_buffers=True)",
        "torch truncates integers after every update: the count never leaves its first value",
    ),
    Around(
        'parameter groups with "weight_decay": 0 for biases and norms',
        'a mask by names such as "LayerNorm"',
        "decay_mask(model)",
        "names miss layer_norm, ln_f and T5's weight; and optax.masked applies where the mask is True",
    ),
    Around(
        "parameter.requires_grad_(False)",
        "gradients of zero",
        "freeze(inner, frozen)",
        "weight decay and momentum go on moving a leaf whose gradient is zero",
    ),
    Around(
        "scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()",
        "optax.apply_if_finite(inner, n)",
        "scale_gradients(inner)",
        "apply_if_finite has no scale, and after n bad steps in a row it lets NaN through",
    ),
)
"""The rows of the documentation's table, in the order of a training step."""
