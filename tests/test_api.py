"""`equivalence.verify` on pairs as a user writes them: everything that can be handed in, right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import jax.numpy as jnp  # noqa: E402 - they need the frameworks
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import equivalence as eq  # noqa: E402
from equivalence.errors import DivergenceError, InputError, MappingError  # noqa: E402
from tests.pairings import (  # noqa: E402
    LinenMLP,
    NnxMLP,
    NnxNorm,
    NnxTied,
    TorchNorm,
    TorchTied,
    linen_mlp,
    linen_step,
    nnx_step,
    rows,
    seeded,
    torch_mlp,
    torch_step,
)

X, Y = rows(0, 6, 5), rows(1, 6, 3)
FEW = 4
"""Examples: the pairs are small and so are their faults."""


def huber(outputs: Any, targets: Any) -> Any:
    return torch.nn.functional.huber_loss(outputs, targets, delta=0.5)


def jax_huber(outputs: Any, targets: Any, delta: float = 0.5) -> Any:
    return jnp.mean(optax.huber_loss(outputs, targets, delta=delta))


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.7)


def verdicts(report: eq.Report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.reports[0].checks}


def divergent(report: eq.Report) -> list[str]:
    return [name for name, verdict in verdicts(report).items() if verdict == "divergent"]


# --- a pair of the user's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [NnxMLP, linen_mlp])
def test_own_loss_own_targets_own_optimizer(port: Callable[[], Any]) -> None:
    report = eq.verify(
        torch_mlp(),
        port(),
        (X,),
        targets=(Y,),
        loss=(huber, jax_huber),
        optimizer=(sgd, optax.sgd(0.03, momentum=0.7)),
        examples=FEW,
    )
    report.assert_equivalent()
    checks = {check.name: check for check in report.reports[0].checks}
    assert set(verdicts(report).values()) == {"equivalent"}
    for name in ("outputs", "loss", "input_gradients", "parameter_gradients", "step", "optimizer_state"):
        assert checks[name].examples == FEW
        assert checks[name].gap is not None
        assert checks[name].resolution is not None
    assert checks["training"].examples == 1
    assert checks["state"].examples == 0
    assert report.reports[0].coverage.parameters == 1.0
    assert not report.reports[0].caveats


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another loss": ({"loss": (huber, lambda o, t: jax_huber(o, t, 0.5000005))}, "loss"),
    "a summed loss": ({"loss": (huber, lambda o, t: 18 * jax_huber(o, t))}, "loss"),
    "another momentum": ({"optimizer": (sgd, optax.sgd(0.03, momentum=0.7000007))}, "step"),
    "another rate": ({"optimizer": (sgd, optax.sgd(0.03000003, momentum=0.7))}, "step"),
    "nesterov": ({"optimizer": (sgd, optax.sgd(0.03, momentum=0.7, nesterov=True))}, "step"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_was_handed_in_is_found_where_it_first_shows(fault: str) -> None:
    options, first = FAULTS[fault]
    right = {"loss": (huber, jax_huber), "optimizer": (sgd, optax.sgd(0.03, momentum=0.7))}
    report = eq.verify(torch_mlp(), NnxMLP(), (X,), targets=(Y,), **{**right, **options}, examples=FEW)
    assert divergent(report)[0] == first
    with pytest.raises(DivergenceError, match=f"· {first} ·"):
        report.assert_equivalent()


def test_the_users_own_train_steps_on_nnx() -> None:
    report = eq.verify(torch_mlp(0.3), NnxMLP(0.3), (X,), targets=(Y,), train_step=(torch_step, nnx_step), examples=FEW)
    report.assert_equivalent()
    assert report.check("step").examples == FEW
    planted = eq.verify(
        torch_mlp(0.3), NnxMLP(0.3), (X,), targets=(Y,), examples=FEW,
        train_step=(torch_step, lambda *arguments: nnx_step(*arguments, bound=0.0500001)),
    )  # fmt: skip
    assert divergent(planted)[0] == "step"


def test_the_users_own_train_steps_on_linen() -> None:
    report = eq.verify(
        torch_mlp(0.3), linen_mlp(0.3), (X,), targets=(Y,), train_step=(torch_step, linen_step), examples=FEW
    )
    report.assert_equivalent()
    assert report.check("step").examples == FEW
    planted = eq.verify(
        torch_mlp(0.3), linen_mlp(0.3), (X,), targets=(Y,), examples=FEW,
        train_step=(torch_step, lambda *arguments: linen_step(*arguments, bound=0.0500001)),
    )  # fmt: skip
    assert divergent(planted)[0] == "step"


def test_a_torch_factory_alone_is_translated_and_the_report_says_so() -> None:
    report = eq.verify(
        torch_mlp(), NnxMLP(), (X,), loss="mse", targets=(Y,), optimizer=sgd, checks=["step"], examples=2
    )
    report.assert_equivalent()
    assert any("translated" in caveat.summary for caveat in report.reports[0].caveats)


def test_without_a_loss_a_random_cotangent_judges_gradients_and_steps() -> None:
    report = eq.verify(torch_mlp(), NnxMLP(), (X,), examples=FEW)
    report.assert_equivalent()
    assert report.check("loss").message == "no loss was given"
    assert report.check("parameter_gradients").examples == report.check("step").examples == FEW


# --- kinds of inputs and outputs ------------------------------------------------------------------------------


class TorchTwo(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(5, 3)

    def forward(self, x: Any, scale: Any) -> Any:
        h = self.fc(x)
        return {"logits": h * scale, "debug": h.detach() * 0.0, "all": (h, h * 2.0)}


class NnxTwo(nnx.Module):
    def __init__(self, swapped: bool = False) -> None:
        self.fc = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        self.swapped = swapped

    def __call__(self, scale: Any, x: Any) -> Any:
        """The arguments stand the other way round: by keyword that does not matter."""
        h = self.fc(x)
        pair = (h * 2.0, h) if self.swapped else (h, h * 2.0)
        return {"logits": h * scale, "debug": h * 0.0 + 1.0, "all": pair}


NAMED = {"x": X, "scale": rows(2, 6, 1)}


def picked(outputs: Any, **options: Any) -> eq.Report:
    checks = ["outputs", "parameter_gradients", "input_gradients"]
    return eq.verify(TorchTwo(), NnxTwo(**options), NAMED, outputs=outputs, checks=checks, examples=FEW)


@pytest.mark.parametrize("outputs", ["logits", lambda raw: raw["all"][1], lambda raw: (raw["logits"], raw["all"])])
def test_inputs_by_keyword_and_outputs_by_key_or_callable(outputs: Any) -> None:
    picked(outputs).assert_equivalent()


def test_what_is_not_picked_is_not_judged_and_what_is_picked_is() -> None:
    assert picked(None).verdict == "divergent"
    assert picked(lambda raw: raw["all"], swapped=True).verdict == "divergent"


def test_outputs_by_index() -> None:
    class Both(TorchTwo):
        def forward(self, x: Any, scale: Any) -> Any:
            return tuple(super().forward(x, scale).values())

    class NnxBoth(NnxTwo):
        def __call__(self, scale: Any, x: Any) -> Any:
            return tuple(super().__call__(scale, x).values())

    for index, verdict in ((0, "equivalent"), (1, "divergent"), (-1, "equivalent")):
        assert eq.verify(Both(), NnxBoth(), NAMED, outputs=index, checks=["outputs"], examples=2).verdict == verdict


def test_a_strategy_of_inputs() -> None:
    drawn = st.integers(0, 999).map(lambda seed: (rows(seed, 6, 5),))
    report = eq.verify(torch_mlp(), NnxMLP(), drawn, checks=["outputs", "parameter_gradients"], examples=6)
    report.assert_equivalent()
    assert report.check("outputs").examples == 6


class ClippedPort(NnxMLP):
    def __call__(self, x: Any) -> Any:
        return super().__call__(jnp.minimum(x, 9.0))


def test_a_strategy_reaches_what_the_users_one_input_would_not() -> None:
    """A port that clips its inputs at 9."""
    drawn = st.floats(0.0, 20.0).map(lambda top: (rows(0, 6, 5).clip(-2, 2) + np.float32(top),))
    assert eq.verify(torch_mlp(), ClippedPort(), drawn, checks=["outputs"], examples=10).verdict == "divergent"


def test_a_plain_function_is_a_port() -> None:
    model = torch_mlp()
    params = {
        name: {leaf: value.detach().numpy() for leaf, value in getattr(model, name).named_parameters()}
        for name in ("fc1", "fc2")
    }

    def mlp(params: Any, x: Any, slope: float = 0.0) -> Any:
        h = x @ params["fc1"]["weight"].T + params["fc1"]["bias"]
        return jnp.where(h > 0, h, slope * h) @ params["fc2"]["weight"].T + params["fc2"]["bias"]

    report = eq.verify(model, eq.function(mlp, params), (X,), loss="mse", targets=(Y,), examples=FEW)
    report.assert_equivalent()
    assert report.reports[0].port == "function"
    leaky = eq.function(lambda params, x: mlp(params, x, 1e-6), params)
    assert divergent(eq.verify(model, leaky, (X,), examples=FEW))[0] == "outputs"


# --- weights --------------------------------------------------------------------------------------------------


def converted(model: Any) -> NnxMLP:
    """An NNX port that already holds the reference's weights, as a user's own converter left them."""
    port = NnxMLP()
    for name in ("fc1", "fc2"):
        layer = getattr(model, name)
        getattr(port, name).kernel[...] = jnp.asarray(layer.weight.detach().numpy().T)
        getattr(port, name).bias[...] = jnp.asarray(layer.bias.detach().numpy())
    return port


def test_kept_weights_that_are_the_references() -> None:
    model = torch_mlp()
    eq.verify(model, converted(model), (X,), port_weights="keep", examples=FEW).assert_equivalent()


def test_kept_weights_one_ulp_off_are_seen_by_roundtrip() -> None:
    model = torch_mlp()
    port = converted(model)
    kernel = np.array(port.fc2.kernel[...])
    kernel[3, 1] = np.nextafter(kernel[3, 1], np.float32(9))
    port.fc2.kernel[...] = jnp.asarray(kernel)
    report = eq.verify(model, port, (X,), port_weights="keep", examples=FEW)
    assert report.verdict == "divergent"
    check = report.check("roundtrip")
    assert (check.verdict, check.worst) == ("divergent", "fc2.kernel")
    assert "1 of 21 elements differ" in str(check.message)
    assert eq.verify(model, port, (X,), examples=2, checks=["roundtrip", "outputs"]).verdict == "equivalent"


def test_kept_weights_that_were_never_converted() -> None:
    report = eq.verify(torch_mlp(), NnxMLP(), (X,), port_weights="keep", examples=2)
    assert divergent(report)[0] == "roundtrip"
    assert "outputs" in divergent(report)


def test_rules_of_the_users_own() -> None:
    rules = [eq.Rule("fc{i}.weight", "fc{i}.kernel", "o k -> k o"), eq.Rule("fc{i}.bias", "fc{i}.bias")]
    report = eq.verify(torch_mlp(), NnxMLP(), (X,), weights=eq.Mapping(rules), checks=["outputs"], examples=2)
    report.assert_equivalent()
    assert {"source": "fc1.weight", "target": "fc1.kernel", "axes": "o k -> k o"} in report.reports[0].mapping


def test_running_statistics_are_judged_by_state() -> None:
    checks = ["structure", "roundtrip", "outputs", "state"]
    model = seeded(TorchNorm)
    report = eq.verify(model, NnxNorm(), (X,), checks=checks, examples=FEW)
    report.assert_equivalent()
    assert report.check("state").examples == FEW
    assert report.check("state").gap is not None
    assert any("num_batches_tracked" in caveat.summary for caveat in report.reports[0].caveats)
    for planted in (NnxNorm(unbiased=False), NnxNorm(momentum=0.9), NnxNorm(momentum=0.1000001)):
        assert divergent(eq.verify(model, planted, (X,), checks=checks, examples=FEW)) == ["state"]


@pytest.mark.parametrize("port", [NnxMLP, linen_mlp])
def test_dropout_is_judged_and_not_switched_off(port: Callable[[float], Any]) -> None:
    eq.verify(torch_mlp(0.3), port(0.3), (X,), examples=FEW).assert_equivalent()
    planted = eq.verify(torch_mlp(0.3), port(0.31), (X,), examples=FEW)
    assert divergent(planted)[0] == "outputs"
    assert "bernoulli(0.7) (6, 7), the port for bernoulli(0.68" in str(planted.check("outputs").message)
    assert divergent(eq.verify(torch_mlp(0.3), port(0.0), (X,), examples=FEW))[0] == "outputs"


def test_a_frozen_parameter_stays_and_must_stay_in_the_port() -> None:
    model = torch_mlp()
    model.fc1.weight.requires_grad_(False)
    report = eq.verify(model, NnxMLP(), (X,), loss="mse", targets=(Y,), examples=FEW)
    report.assert_equivalent()
    moving = eq.verify(
        model, NnxMLP(), (X,), targets=(Y,), train_step=(torch_step, nnx_step), checks=["step"], examples=2
    )
    assert divergent(moving) == ["step"]
    assert "fc1.weight" in str(moving.check("step").worst)


TOKENS = np.random.default_rng(0).integers(0, 11, (4, 6))


def test_a_tied_embedding() -> None:
    eq.verify(seeded(TorchTied), NnxTied(), (TOKENS,), examples=FEW).assert_equivalent()
    rules = [
        eq.Rule("embed.weight", "embed.embedding"),
        eq.Rule("head.weight", "head.kernel", "v e -> e v"),
        eq.Rule("fc.weight", "fc.kernel", "o k -> k o"),
        eq.Rule("fc.bias", "fc.bias"),
    ]
    untied = eq.verify(seeded(TorchTied), NnxTied(tied=False), (TOKENS,), weights=eq.Mapping(rules), examples=FEW)
    assert divergent(untied)[0] == "structure"
    assert "embed.weight are one leaf in the reference" in str(untied.check("structure").message)
    assert {"parameter_gradients", "step"} <= set(divergent(untied))


# --- verdicts that are neither --------------------------------------------------------------------------------


class Dead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return self.fc(x) * 0.0


class NnxDead(nnx.Module):
    def __init__(self, factor: float = 1.0) -> None:
        self.fc = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return self.fc(self.factor * x) * 0.0


def test_a_model_that_shows_nothing_proves_nothing() -> None:
    """Both sides are 0, also where the port computes something else before."""
    for factor in (1.0, 3.0):
        report = eq.verify(Dead(), NnxDead(factor), (X,), examples=FEW)
        assert report.verdict == "inconclusive"
        assert set(report.reports[0].coverage.uncovered) == {"fc.weight", "fc.bias"}


class Log(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return torch.log(self.fc(x) - 1e6)


class NnxLog(nnx.Module):
    def __init__(self, guarded: bool = False) -> None:
        self.fc = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        self.guarded = guarded

    def __call__(self, x: Any) -> Any:
        h = self.fc(x) - 1e6
        return jnp.log(jnp.maximum(h, 1e-6) if self.guarded else h)


def test_nan_on_both_sides_is_inconclusive_and_on_one_side_divergent() -> None:
    both = eq.verify(Log(), NnxLog(), (X,), checks=["outputs"], examples=2)
    assert both.verdict == "inconclusive"
    assert "NaN or infinity on both sides in eval.outputs.output" in str(both.check("outputs").message)
    one = eq.verify(Log(), NnxLog(guarded=True), (X,), checks=["outputs"], examples=2)
    assert one.verdict == "divergent"
    assert "one side only" in str(one.check("outputs").message)


def test_another_shape_of_outputs_is_a_divergence_of_structure() -> None:
    class Sum(NnxMLP):
        def __call__(self, x: Any) -> Any:
            return super().__call__(x).sum(-1)

    report = eq.verify(torch_mlp(), Sum(), (X,), examples=2)
    assert divergent(report) == ["structure"]
    assert "(6, 3)" in str(report.check("structure").message)


# --- what cannot be used --------------------------------------------------------------------------------------


class Wide(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.fc1, self.fc2 = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)


class Renamed(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.fc2 = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)


def spoilt(value: float) -> Any:
    model = torch_mlp()
    with torch.no_grad():
        model.fc2.bias[1] = value
    return model


def nnx_spoilt() -> NnxMLP:
    port = NnxMLP()
    port.fc1.bias[...] = jnp.full(7, jnp.nan)
    return port


class OwnSGD(torch.optim.SGD):
    """A stranger's class: its steps could be anything."""


def using(port: Any = None, **options: Any) -> eq.Report:
    return eq.verify(torch_mlp(), NnxMLP() if port is None else port, (X,), **options)


UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "reference": (lambda: eq.verify(NnxMLP(), NnxMLP(), (X,)), "the reference is a torch.nn.Module"),
    "no model": (lambda: using(port=object()), "builtins.object is not a model this project knows"),
    "port in torch": (lambda: using(port=torch_mlp()), "the port is a JAX model"),
    "bare linen": (lambda: using(port=LinenMLP()), "not a model this project knows"),
    "linen args": (lambda: eq.linen(torch_mlp(), {}), "takes a flax.linen.Module first"),
    "linen variables": (lambda: eq.linen(LinenMLP(), {}), "collection 'params'"),
    "function": (lambda: eq.function(3, {}), "takes a callable first"),
    "bare array": (lambda: eq.verify(torch_mlp(), NnxMLP(), X), "inputs= takes a tuple or a dict"),
    "text": (lambda: eq.verify(torch_mlp(), NnxMLP(), (np.array(["a"]),)), "dtype <U1 cannot be compared"),
    "nan input": (lambda: eq.verify(torch_mlp(), NnxMLP(), (X * np.float32("nan"),)), "input 0 holds NaN or infinity"),
    "infinite weight": (lambda: eq.verify(spoilt(np.inf), NnxMLP(), (X,)), "holds NaN or infinity in fc2.bias"),
    "nan in the port": (lambda: using(port=nnx_spoilt()), "holds NaN or infinity in fc1.bias"),
    "check": (lambda: using(checks=["output"]), "unknown check 'output' .did you mean outputs"),
    "optimizer": (lambda: using(optimizer="adm"), "unknown optimizer 'adm' .did you mean adam"),
    "loss": (lambda: using(loss="mes"), "unknown loss 'mes' .did you mean mse"),
    "one loss": (lambda: using(loss=huber), "reference_loss, port_loss"),
    "one step": (lambda: using(train_step=torch_step), "reference_step, port_step"),
    "optax": (lambda: using(optimizer=(sgd, 3)), "the second has no init and update"),
    "translation": (lambda: using(optimizer=OwnSGD), "OwnSGD is not an optimizer of torch.optim"),
    "rows": (lambda: using(optimizer=torch.optim.SparseAdam), "SparseAdam moves the rows of a sparse gradient"),
    "outputs": (lambda: using(outputs=1.5), "a key, an index or a callable"),
    "port_weights": (lambda: using(port_weights="kept"), "unknown port_weights 'kept'"),
    "examples": (lambda: using(examples=0), "examples must be at least 1"),
    "sizes": (lambda: using(port=Wide()), r"fc1.weight \(7, 5\) does not fit fc1.kernel \(5, 8\).*fc2.weight"),
    "names": (lambda: using(port=Renamed()), "no port leaf is named like fc1.weight.*port leaves left: first"),
    "input shape": (lambda: eq.verify(torch_mlp(), NnxMLP(), (rows(0, 6, 4),)), "fails on these inputs"),
    "input count": (lambda: eq.verify(torch_mlp(), NnxMLP(), (X, X)), "fails on these inputs"),
    "keyword": (lambda: eq.verify(torch_mlp(), NnxMLP(), {"y": X}), "fails on these inputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_is_one_clear_line(case: str) -> None:
    call, message = UNUSABLE[case]
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2


def test_leaves_that_do_not_match_are_all_named() -> None:
    with pytest.raises(MappingError) as caught:
        eq.verify(torch_mlp(), Renamed(), (X,), weights=eq.Mapping([eq.Rule("fc2.bias", "fc2.bias")]))
    for leaf in ("fc1.weight", "fc1.bias", "fc2.weight", "first.kernel", "first.bias", "fc2.kernel"):
        assert leaf in str(caught.value)
