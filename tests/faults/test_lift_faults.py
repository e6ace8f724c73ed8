"""Faults planted in ports that hard-code float32: lifting shows them, and hides none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import jax.numpy as jnp  # noqa: E402 - they need jax and torch

import equivalence as eq  # noqa: E402
from equivalence.frameworks import adapt  # noqa: E402
from equivalence.observation import Batch  # noqa: E402
from equivalence.optimizers import resolve  # noqa: E402
from equivalence.runtimes.jax import JaxRunner, environment  # noqa: E402
from equivalence.runtimes.jax_constants import Memory  # noqa: E402
from equivalence.runtimes.jax_lift import Lifted, lifted  # noqa: E402
from equivalence.sources import Parts, compared  # noqa: E402
from tests.agreement import Arrays, assert_agree, disagreements  # noqa: E402

RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "x": RNG.standard_normal((7, 6)).astype(np.float32),
    "scale": RNG.uniform(0.5, 1.5, 6).astype(np.float32),
    "kernel": RNG.uniform(-0.7, 0.7, (6, 6)).astype(np.float32),
}


@dataclass(frozen=True)
class Choices:
    """Where a port may go wrong; the defaults are right."""

    eps: float = 1e-6
    base: float = 10000.0
    constant: float = 0.1
    drift: float = 0.0
    slope: float = 1.0
    stopped: bool = False
    power: float = 2.0


def norm(x: Any, scale: Any, eps: float, low: Any) -> Any:
    x = x.astype(low)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale.astype(low)


def rotary(x: Any, base: float, low: Any) -> Any:
    """Tables by NumPy, in float32 where the model is."""
    numpy = np.float32 if low == jnp.float32 else np.float64
    rates = 1.0 / (base ** (np.arange(0, 6, 2, dtype=numpy) / 6))
    angles = np.einsum("i,j->ij", np.arange(7), rates).astype(numpy)
    sines, cosines = (jnp.array(f(np.concatenate([angles, angles], 1))) for f in (np.sin, np.cos))
    turned = jnp.concatenate([-x[:, 3:], x[:, :3]], 1)
    return x.astype(low) * cosines + turned.astype(low) * sines


def gate(slope: float, power: float, low: Any) -> Callable[[Any], Any]:
    @jax.custom_jvp
    def made(x: Any) -> Any:
        return jnp.sign(x.astype(low)) * jnp.abs(x.astype(low)) ** power

    @made.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        return made(*primals), (slope * power * jnp.abs(primals[0].astype(low)) ** (power - 1)) * tangents[0]

    return made


def mixed(stopped: bool, low: Any) -> Callable[[Any, Any], Any]:
    @jax.custom_vjp
    def made(x: Any, kernel: Any) -> Any:
        return x.astype(low) @ kernel.astype(low)

    def backward(kept: Any, slope: Any) -> Any:
        x, kernel = kept
        weights = jax.lax.stop_gradient(slope) * 0 if stopped else slope
        return slope @ kernel.T, x.T @ weights

    made.defvjp(lambda x, kernel: (made(x, kernel), (x.astype(low), kernel.astype(low))), backward)
    return made


def model(arrays: Mapping[str, Any], chosen: Choices, low: Any) -> Any:
    """A block with casts to `low` all over, constants rounded to it, and rules of its own."""
    x = norm(arrays["x"], arrays["scale"], chosen.eps, low)
    x = x + jnp.asarray([chosen.constant, 0.25, 3.0, -0.7, 0.01, 6.5], low)
    x = jax.checkpoint(lambda x: rotary(x, chosen.base, low))(x)
    x = mixed(chosen.stopped, low)(x, arrays["kernel"].astype(low))
    x, _ = jax.lax.scan(lambda s, _: ((s + 0.3 * jnp.tanh(s) + chosen.drift).astype(low), None), x, None, length=3)
    return gate(chosen.slope, chosen.power, low)(x).astype(arrays["x"].dtype)


def seen(chosen: Choices, low: Any) -> Callable[[Arrays], Any]:
    def run(arrays: Arrays) -> Any:
        outputs = model(arrays, chosen, low)
        slopes = jax.grad(lambda given: jnp.sum(jnp.sin(model(given, chosen, low))))(dict(arrays))
        return {"outputs": outputs, **{f"gradients.{name}": slope for name, slope in slopes.items()}}

    return run


def native(bits: int, arrays: Arrays) -> Arrays:
    """The block written in the precision of the run."""
    with environment(bits, Memory()):
        return on_host(jax.jit(seen(Choices(), {32: jnp.float32, 64: jnp.float64}[bits]))(dict(arrays)))


def port(chosen: Choices) -> Callable[[int, Arrays], Arrays]:
    """The block that is float32 whatever the run, lifted in float64."""

    def run(bits: int, arrays: Arrays) -> Arrays:
        function = seen(chosen, jnp.float32)
        with environment(bits, Memory()):
            return on_host(jax.jit(lifted(function, Lifted()) if bits == 64 else function)(dict(arrays)))

    return run


def on_host(found: Any) -> Arrays:
    return {name: np.asarray(value) for name, value in found.items()}


PLANTED = {
    "eps 1e-5 for 1e-6": Choices(eps=1e-5),
    "rotary base 10001": Choices(base=10001.0),
    "a constant 0.1001": Choices(constant=0.1001),
    "a constant off by more than its rounding": Choices(constant=0.1000002),
    "a scan's body off by 1e-9": Choices(drift=1e-9),
    "a wrong custom slope": Choices(slope=1.000001),
    "a stopped gradient in a custom rule": Choices(stopped=True),
    "another power": Choices(power=2.0001),
}
IN_GRADIENTS_ONLY = ("a wrong custom slope", "a stopped gradient in a custom rule")


def test_the_block_without_a_fault_agrees() -> None:
    assert_agree(native, port(Choices()), ARRAYS)


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_is_seen_though_everything_is_lifted(name: str) -> None:
    found = disagreements(native, port(PLANTED[name]), ARRAYS)
    assert any(path.startswith("gradients") for path in found)
    assert ("outputs" in found) is (name not in IN_GRADIENTS_ONLY)


def test_a_stopped_gradient_stays_stopped() -> None:
    made = port(Choices(stopped=True))(64, {name: value.astype(np.float64) for name, value in ARRAYS.items()})
    assert not made["gradients.kernel"].any()
    assert made["gradients.x"].any()


# --- through the runner and `verify` ----------------------------------------------------------------------------------


class Reference(torch.nn.Module):
    """A linear layer behind an RMS norm that computes in the precision of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.from_numpy(ARRAYS["scale"].copy()))
        self.fc = torch.nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.fc(x)


def applied(eps: float, dtype: Any, odd: Callable[[Any], Any] = lambda x: x) -> Callable[[Any, Any], Any]:
    def apply(params: Any, x: Any) -> Any:
        x = odd(norm(x, params["scale"], eps, dtype or x.dtype))
        return x @ params["fc"]["kernel"] + params["fc"]["bias"]

    return apply


def params() -> dict[str, Any]:
    return {
        "scale": jnp.zeros(6),
        "fc": {"kernel": jnp.zeros((6, 3)), "bias": jnp.zeros(3)},
    }


@pytest.mark.parametrize(("eps", "verdict"), [(1e-6, "equivalent"), (1e-5, "divergent")])
def test_a_port_in_float32_is_judged_as_if_it_followed_its_input(eps: float, verdict: str) -> None:
    made = eq.function(applied(eps, jnp.float32), params())
    report = eq.verify(Reference(), made, (ARRAYS["x"],), checks=["outputs", "parameter_gradients"], examples=2)
    assert report.verdict == verdict


TABLE = np.sin(np.arange(1.0, 7.0)).astype(np.float32)


def on_host_float32(x: Any) -> Any:
    call = jax.custom_jvp(lambda x: jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x))
    call.defjvp(lambda primals, tangents: (call(*primals), tangents[0] * (1 - call(*primals) ** 2)))
    return call(x.astype(jnp.float32))


KINDS: dict[str, tuple[Any, Callable[[Any], Any], str, tuple[str, ...]]] = {
    "follows its input": (None, lambda x: x, "native", ()),
    "float32 inside": (jnp.float32, lambda x: x, "lifted", ()),
    "a rounded table": (jnp.float32, lambda x: x * jnp.asarray(TABLE), "lifted", ("float32 constant (6,)",)),
    "a callback": (None, on_host_float32, "float32 only", ("pure_callback in float32",)),
}


@pytest.fixture(params=KINDS)
def runner(request: Any) -> tuple[JaxRunner, Any, Any, tuple[Any, ...]]:
    kind = KINDS[request.param]
    ours, theirs = adapt(Reference()), adapt(eq.function(applied(1e-6, kind[0], kind[1]), params()))
    _, comparison = compared(ours, theirs, None, Parts(None, None, resolve("adam")), 0)
    return comparison.port, comparison.reference, ours, kind


def test_a_runner_says_how_its_float64_runs_are_made_and_shakes_what_survived(
    runner: tuple[JaxRunner, Any, Any, tuple[Any, ...]],
) -> None:
    jax_side, reference, ours, (_, _, float64, surviving) = runner
    weights = {path: np.asarray(value) for path, value in ours.params.items()}
    batch = Batch((ARRAYS["x"],), ())
    observed = reference.observe(64, weights, batch, False, 0)
    made = [jax_side.observe(64, weights, batch, False, 0, observed, shaken=seed).values for seed in (None, 1, 2)]
    assert (jax_side.float64, jax_side.surviving) == (float64, surviving)
    outputs = [values["outputs.output"] for values in made]
    assert {value.dtype for values in made for value in values.values()} == {np.dtype(np.float64)}
    for first, second in ((0, 1), (1, 2)):
        apart = np.max(np.abs(outputs[first] - outputs[second]))
        assert 0 < apart < 1e-6 if surviving else apart == 0
    jax_side.advance(64, weights, batch, observed, shaken=3)
    compiled, plain = (
        jax_side.observe(64, weights, batch, False, 0, observed, compiled=c).values for c in (True, False)
    )
    assert np.max(np.abs(compiled["outputs.output"] - plain["outputs.output"])) < 1e-14
