"""The tape: one seed, one sequence; draws that agree and draws that do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equivalence.errors import DrawsDiffer, UnsupportedDraw
from equivalence.randomness import KINDS, Draw, Tape, assert_same_draws

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DRAWS = st.one_of(
    st.builds(Draw, st.just("bernoulli"), SHAPES, st.floats(0.0, 1.0)),
    st.builds(Draw, st.sampled_from(KINDS[1:]), SHAPES),
)


@given(st.lists(DRAWS, max_size=6), st.tuples(st.integers(0, 2**31), st.integers(0, 1)))
def test_two_tapes_of_one_seed_serve_alike(draws: list[Draw], seed: tuple[int, int]) -> None:
    first, second = Tape(seed), Tape(seed)
    for draw in draws:
        a, b = first.take(draw), second.take(draw)
        assert a.tobytes() == b.tobytes()
        assert a.shape == draw.shape
        assert a.dtype == (bool if draw.kind == "bernoulli" else np.float64)
    assert first.draws == second.draws == draws
    assert all(a is b for a, b in zip(first.values, first.values, strict=True))
    assert_same_draws(first.draws, second.draws, "here")


def test_another_seed_serves_others() -> None:
    draw = Draw("normal", (9,))
    values = [Tape(seed).take(draw).tobytes() for seed in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(values)) == 4


def test_a_tape_never_serves_the_same_twice() -> None:
    tape = Tape((3,))
    assert not np.array_equal(tape.take(Draw("uniform", (5,))), tape.take(Draw("uniform", (5,))))


def test_what_is_served_is_distributed_as_asked() -> None:
    """Six standard errors of 200,000 values."""
    size = 200_000
    tape = Tape((11,))
    moments = {"uniform": (1 / 2, 1 / 12), "normal": (0.0, 1.0), "exponential": (1.0, 1.0)}
    for kind, (mean, variance) in moments.items():
        value = tape.take(Draw(kind, (size,)))
        assert abs(value.mean() - mean) < 6 * np.sqrt(variance / size)
        assert abs(value.var() - variance) < 6 * np.sqrt(9 / size)
    for p in (0.0, 0.01, 0.5, 0.99, 1.0):
        mask = tape.take(Draw("bernoulli", (size,), p))
        assert abs(mask.mean() - p) <= 6 * np.sqrt(p * (1 - p) / size)


def test_the_tape_leaves_numpys_global_state_alone() -> None:
    before = np.random.get_state()[1].tobytes()
    Tape((0,)).take(Draw("normal", (9,)))
    assert np.random.get_state()[1].tobytes() == before


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnsupportedDraw, match="cannot serve 'cauchy'"):
        Tape((0,)).take(Draw("cauchy", (2,)))


@pytest.mark.parametrize("p", [0.99, 0.9, 1 / 3, 1e-3])
def test_a_probability_agrees_with_its_rounding_in_float32_and_with_no_other(p: float) -> None:
    here = Draw("bernoulli", (2,), p)
    assert here.agrees(Draw("bernoulli", (2,), float(np.float32(p))))
    assert not here.agrees(Draw("bernoulli", (2,), p * (1 + 1e-6)))
    assert not here.agrees(Draw("bernoulli", (2,), 1 - p))
    assert not here.agrees(Draw("bernoulli", (2,)))


@pytest.mark.parametrize(
    ("reference", "port", "message"),
    [
        (
            [Draw("normal", (2,))],
            [Draw("normal", (3,))],
            r"here: draw 0 differs: .* normal \(2,\), the port for normal \(3,\)",
        ),
        ([Draw("normal", (2,))], [Draw("uniform", (2,))], "draw 0 differs"),
        ([Draw("normal", (2,))], [], r"1 draws, the port for 0; the first that only the reference asks for is normal"),
        ([], [Draw("bernoulli", (2,), 0.5)], r"only the port asks for is bernoulli\(0.5\) \(2,\)"),
        ([Draw("normal", (2,)), Draw("normal", (3,))], [Draw("normal", (3,)), Draw("normal", (2,))], "draw 0 differs"),
        (
            [Draw("normal", (2,)), Draw("bernoulli", (2,), 0.5)],
            [Draw("normal", (2,)), Draw("bernoulli", (2,), 0.6)],
            r"draw 1 differs: .*bernoulli\(0.5\).*bernoulli\(0.6\)",
        ),
    ],
)
def test_the_first_difference_is_named(reference: list[Draw], port: list[Draw], message: str) -> None:
    with pytest.raises(DrawsDiffer, match=message):
        assert_same_draws(reference, port, "here")


def torch_served(function: object) -> tuple[object, Tape]:
    torch = pytest.importorskip("torch")
    from equivalence.runtimes.torch_tape import TapeMode

    tape = Tape((5,))
    with TapeMode(tape), torch.random.fork_rng(devices=[]):
        return function(torch), tape  # type: ignore[operator]


def test_torch_draws_arrive_at_the_dispatcher() -> None:
    def run(torch: object) -> list[object]:
        x = torch.ones(2, 3)  # type: ignore[attr-defined]
        return [
            torch.nn.functional.dropout(x, 0.25),  # type: ignore[attr-defined]
            torch.rand(4),  # type: ignore[attr-defined]
            torch.randn_like(x),  # type: ignore[attr-defined]
            torch.empty(3).uniform_(2.0, 5.0),  # type: ignore[attr-defined]
            torch.empty(3).normal_(1.0, 3.0),  # type: ignore[attr-defined]
            torch.empty(3).exponential_(2.0),  # type: ignore[attr-defined]
            torch.distributions.Normal(torch.zeros(2), 1.0).rsample(),  # type: ignore[attr-defined]
        ]

    values, tape = torch_served(run)
    assert [d.kind for d in tape.draws] == [
        "bernoulli",
        "uniform",
        "normal",
        "uniform",
        "normal",
        "exponential",
        "normal",
    ]
    dropped, uniform, normal, scaled, shifted, slow, _ = (np.asarray(v) for v in values)  # type: ignore[attr-defined]
    np.testing.assert_allclose(dropped, tape.values[0] / 0.75, rtol=1e-6)
    np.testing.assert_allclose(uniform, tape.values[1], rtol=1e-6)
    np.testing.assert_allclose(normal, tape.values[2], rtol=1e-6)
    np.testing.assert_allclose(scaled, tape.values[3] * 3.0 + 2.0, rtol=1e-6)
    np.testing.assert_allclose(shifted, tape.values[4] * 3.0 + 1.0, rtol=1e-5)
    np.testing.assert_allclose(slow, tape.values[5] / 2.0, rtol=1e-6)


def test_a_torch_draw_that_the_tape_cannot_serve_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedDraw, match="multinomial"):
        torch_served(lambda torch: torch.multinomial(torch.ones(3), 2))
