"""The process and the models are left as they were found, float64 needs no switch, and both runtimes see one thing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import jax.numpy as jnp  # noqa: E402 - they need the frameworks
from flax import nnx  # noqa: E402

import equivalence as eq  # noqa: E402
from equivalence.errors import EquivalenceError, InputError  # noqa: E402
from equivalence.frameworks import adapt  # noqa: E402
from equivalence.observation import Batch  # noqa: E402
from equivalence.optimizers import PAIRS, resolve  # noqa: E402
from equivalence.runtimes import jax as on_jax  # noqa: E402
from equivalence.runtimes import torch as on_torch  # noqa: E402
from equivalence.sources import Parts, compared  # noqa: E402
from tests.pairings import (  # noqa: E402
    NnxMLP,
    NnxNorm,
    TorchNorm,
    linen_mlp,
    nnx_step,
    rows,
    seeded,
    torch_mlp,
    torch_step,
)
from tests.pairs import translated  # noqa: E402

X, Y = rows(0, 6, 5), rows(1, 6, 3)


def process() -> dict[str, Any]:
    """Everything of the process that a run could leave changed."""
    return {
        "torch dtype": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "torch grad": torch.is_grad_enabled(),
        "torch matmul": torch.get_float32_matmul_precision(),
        "torch tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "torch autocast": torch.is_autocast_enabled("cpu"),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "numpy random": np.random.get_state()[1].tobytes(),
        "numpy errors": np.geterr(),
        "python random": random.getstate(),
        "jax x64": jax.config.jax_enable_x64,
        "jax matmul": jax.config.jax_default_matmul_precision,
        "jax debug": jax.config.jax_debug_nans,
        "float of jax": jnp.asarray(1.0).dtype,
        "float of torch": torch.ones(1).dtype,
    }


@contextlib.contextmanager
def odd_settings() -> Iterator[None]:
    """The settings of a user who has changed all of them."""
    dtype, precision, grad = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32, tf32 = False, torch.backends.cudnn.allow_tf32
    with jax.default_matmul_precision("bfloat16"), np.errstate(all="raise"), torch.autocast("cpu"):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
            torch.set_grad_enabled(grad)
            torch.backends.cudnn.allow_tf32 = tf32


PORTS: dict[str, Callable[[float], Any]] = {"nnx": NnxMLP, "linen": linen_mlp}


def judged(model: Any, port: Any, **options: Any) -> eq.Report:
    return eq.verify(model, port, (X,), targets=(Y,), loss="mse", examples=3, **options)


@pytest.mark.parametrize("settings", [contextlib.nullcontext, odd_settings])
@pytest.mark.parametrize("port", PORTS)
def test_the_process_is_left_as_it_was_found(port: str, settings: Callable[[], Any]) -> None:
    model, ported = torch_mlp(0.3), PORTS[port](0.3)
    with settings():
        before = process()
        report = judged(model, ported)
        assert process() == before
    assert report.verdict == "equivalent"


def test_the_users_settings_do_not_change_a_verdict_or_its_figures() -> None:
    model, port = torch_mlp(0.3), NnxMLP(0.3)
    plain = judged(model, port)
    with odd_settings():
        odd = judged(model, port)
    assert plain.reports[0].checks == odd.reports[0].checks


def test_x64_being_on_already_changes_nothing() -> None:
    model, port = torch_mlp(), NnxMLP()
    plain = judged(model, port)
    with jax.enable_x64(True):
        assert judged(model, port).reports[0].checks == plain.reports[0].checks
        assert jax.config.jax_enable_x64


class Failing(NnxMLP):
    def __call__(self, x: Any) -> Any:
        raise ValueError("not today")


class FailingTorch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def forward(self, x: Any) -> Any:
        raise ValueError("not today")


def test_a_run_that_fails_leaves_the_process_too() -> None:
    for model, port in ((torch_mlp(), Failing()), (seeded(FailingTorch), NnxMLP())):
        before, modes = process(), [module.training for module in model.modules()]
        with pytest.raises((ValueError, EquivalenceError), match="not today"):
            judged(model, port)
        assert process() == before
        assert [module.training for module in model.modules()] == modes


# --- the models -------------------------------------------------------------------------------------------------------


def torch_state(model: Any) -> Any:
    return (
        {name: (value.dtype, value.detach().numpy().tobytes()) for name, value in model.state_dict().items()},
        {name: (value.requires_grad, value.grad is None, id(value)) for name, value in model.named_parameters()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def nnx_state(model: Any) -> Any:
    def plain(value: Any) -> bytes:
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(value) if is_key else value).tobytes()

    flags = ("deterministic", "use_running_average")
    leaves = {path: plain(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return leaves, [[getattr(module, flag, None) for flag in flags] for _, module in nnx.iter_modules(model)]


@pytest.mark.parametrize("train", [False, True])
def test_models_keep_their_weights_modes_and_gradients(train: bool) -> None:
    model, port, ported = torch_mlp(0.3), NnxMLP(0.3), linen_mlp(0.3)
    model.train(train)
    model.fc1.bias.requires_grad_(False)
    (port.train if train else port.eval)()
    before = torch_state(model), nnx_state(port), jax.tree.map(np.array, ported.variables)
    judged(model, port)
    judged(model, ported)
    assert torch_state(model) == before[0]
    assert nnx_state(port) == before[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, ported.variables, before[2]))


def test_modes_that_differ_inside_a_model_come_back_one_by_one() -> None:
    model = torch_mlp(0.3)
    model.train()
    model.drop.eval()
    judged(model, NnxMLP(0.3))
    assert (model.training, model.fc1.training, model.drop.training) == (True, True, False)


def test_gradients_that_a_user_holds_are_kept() -> None:
    model = torch_mlp()
    model(torch.ones(1, 5)).sum().backward()
    before = {name: value.grad.clone() for name, value in model.named_parameters()}
    judged(model, NnxMLP(), train_step=(torch_step, nnx_step))
    assert all(torch.equal(value.grad, before[name]) for name, value in model.named_parameters())


def test_running_statistics_are_the_users_own_afterwards() -> None:
    model, port = seeded(TorchNorm), NnxNorm()
    model(torch.from_numpy(X))
    before = torch_state(model), nnx_state(port)
    eq.verify(model, port, (X,), checks=["outputs", "state"], examples=2)
    assert (torch_state(model), nnx_state(port)) == before


def test_the_users_arrays_are_not_written_to() -> None:
    x, y = X.copy(), Y.copy()
    x.flags.writeable = y.flags.writeable = False
    eq.verify(torch_mlp(), NnxMLP(), (x,), targets=(y,), loss="mse", examples=2).assert_equivalent()
    np.testing.assert_array_equal(x, X)


# --- observations -----------------------------------------------------------------------------------------------------


def pair(rate: float = 0.3, optimizer: str = "adam") -> tuple[on_torch.TorchRunner, on_jax.JaxRunner, Any]:
    ours, theirs = adapt(torch_mlp(rate)), adapt(NnxMLP(rate))
    from equivalence import losses

    _, comparison = compared(ours, theirs, None, Parts(losses.resolve("mse"), None, resolve(optimizer)), 0)
    return comparison.reference, comparison.port, ours


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("train", [False, True])
def test_both_runtimes_show_the_same_paths_in_the_precision_asked_for(bits: int, train: bool) -> None:
    reference, port, subject = pair()
    weights = {path: np.asarray(value) for path, value in subject.params.items()}
    ours = reference.observe(bits, weights, Batch((X,), (Y,)), train, 7)
    theirs = port.observe(bits, weights, Batch((X,), (Y,)), train, 7, ours)
    wanted = np.float32 if bits == 32 else np.float64
    assert {p: v.shape for p, v in ours.values.items()} == {p: v.shape for p, v in theirs.values.items()}
    assert {v.dtype for v in (*ours.values.values(), *theirs.values.values())} == {np.dtype(wanted)}
    assert len(ours.draws) == int(train)
    unit = float(np.finfo(wanted).eps)
    for path, value in ours.values.items():
        np.testing.assert_allclose(theirs.values[path], value, rtol=0, atol=64 * unit * np.abs(value).max() + unit)


def test_float64_is_float64_all_the_way() -> None:
    """A weight moved by 1e-12 moves the float64 observation of either runtime and neither of float32's."""
    reference, port, subject = pair(0.0)
    weights = {path: np.asarray(value, np.float64) for path, value in subject.params.items()}
    moved = {**weights, "fc1.weight": weights["fc1.weight"] * (1 + 1e-12)}
    batch = Batch((X,), (Y,))
    for bits, seen in ((32, False), (64, True)):
        ours = [reference.observe(bits, w, batch, False, 0) for w in (weights, moved)]
        theirs = [port.observe(bits, w, batch, False, 0, ours[0]) for w in (weights, moved)]
        for run in (ours, theirs):
            a, b = (seen_.values["outputs.output"] for seen_ in run)
            assert bool((a != b).any()) is seen


def test_gradients_are_those_of_finite_differences() -> None:
    reference, _, subject = pair(0.0)
    weights = {path: np.asarray(value, np.float64) for path, value in subject.params.items()}
    batch = Batch((X,), (Y,))
    base = reference.observe(64, weights, batch, False, 0).values
    rng = np.random.default_rng(0)
    for path, value in weights.items():
        direction = rng.standard_normal(value.shape)
        step = 1e-6
        up, down = (
            reference.observe(64, {**weights, path: value + s * step * direction}, batch, False, 0).values["loss"]
            for s in (1, -1)
        )
        slope = float(np.sum(base[f"parameter_gradients.loss.{path}"] * direction))
        assert slope == pytest.approx(float(up - down) / (2 * step), rel=1e-6)


def test_another_seed_serves_other_draws() -> None:
    reference, _, subject = pair()
    weights = {path: np.asarray(value) for path, value in subject.params.items()}
    one, same, other = (reference.observe(64, weights, Batch((X,), (Y,)), True, s).values for s in (1, 1, 2))
    assert np.array_equal(one["outputs.output"], same["outputs.output"])
    assert not np.array_equal(one["outputs.output"], other["outputs.output"])


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_optimizers_takes_the_same_steps(name: str) -> None:
    checks = ["step", "optimizer_state"]
    report = judged(torch_mlp(), NnxMLP(), optimizer=name, checks=checks)
    assert {check.name: check.verdict for check in report.reports[0].checks} == dict.fromkeys(checks, "equivalent")
    assert report.check("step").gap is not None


def test_two_optimizers_are_not_each_other() -> None:
    for first, second in (("adam", "adamw"), ("momentum", "nesterov"), ("sgd", "sgd_decay"), ("adam_decay", "adamw")):
        sides = PAIRS[first].reference, translated(second)
        rate = PAIRS[first].learning_rate
        mixed = (lambda p, side=sides[0], rate=rate: side(p, rate), sides[1](rate))
        assert judged(torch_mlp(), NnxMLP(), optimizer=mixed, checks=["step"]).verdict == "divergent"


def test_a_subject_says_what_it_holds() -> None:
    ours, theirs, linen = adapt(seeded(TorchNorm)), adapt(NnxNorm()), adapt(linen_mlp())
    assert set(ours.params) == {"fc1.weight", "fc1.bias", "bn.weight", "bn.bias", "fc2.weight", "fc2.bias"}
    assert set(ours.buffers) == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert set(theirs.buffers) == {"bn.mean", "bn.var"}
    assert set(linen.params) == {"fc1.kernel", "fc1.bias", "fc2.kernel", "fc2.bias"}
    assert ours.layers["bn.weight"] == "BatchNorm1d"
    with pytest.raises(InputError):
        adapt("a model")


def test_torchs_newer_precision_settings_are_put_back_too() -> None:
    """Mixed with the older ones they make torch's own getters raise."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with on_torch.environment(32):
            assert torch.get_float32_matmul_precision() == "highest"
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)
