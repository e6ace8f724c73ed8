"""Distances against a slow exact version, and the units and ratios that the statistic is made of."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equivalence import numerics
from equivalence.numerics import (
    BLOCK,
    SHRINK,
    TINY32,
    U32,
    U64,
    Measure,
    accumulation,
    distance,
    expected,
    finite,
    measure,
    nonfinite,
    precision,
    ratio,
    representable,
    rms,
    ulp_twin,
    worst_index,
)

PLAIN = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-1e6, 1e6))
WILD = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 3.5, 5e-324, -5e-324, 1e-300, -1e-300, 1e300, -1e300, 1.7e308, math.inf, -math.inf, math.nan]
)


def exact(a: np.ndarray, b: np.ndarray | None) -> float:
    """The distance in rational arithmetic, rounded once at the end (to the precision of a 600-bit square root)."""
    total, count = Fraction(0), 0
    for x, y in zip(a.reshape(-1).tolist(), [0.0] * a.size if b is None else b.reshape(-1).tolist(), strict=True):
        if x == y or (math.isnan(x) and math.isnan(y)):
            count += 1
        elif math.isfinite(x) and math.isfinite(y):
            total, count = total + (Fraction(x) - Fraction(y)) ** 2, count + 1
        elif b is not None:
            return math.inf
    if not count or not total:
        return 0.0
    mean = total / count
    shift = max(0, mean.denominator.bit_length() - mean.numerator.bit_length()) + 600
    shift += shift % 2
    root = Fraction(math.isqrt(int(mean * 2**shift)), 2 ** (shift // 2))
    return float(root) if root < Fraction(1.79e308) else math.inf


def close(got: float, wanted: float) -> bool:
    """Equal up to the rounding of a short sum, which the tests of sizes below bound; tiny ones up to denormals."""
    if not (math.isfinite(got) and math.isfinite(wanted)):
        return got == wanted
    return abs(got - wanted) <= 64 * U64 * wanted + 5e-324


@given(PLAIN, st.integers(0, 2**31 - 1))
def test_distance_is_the_exact_one(a: np.ndarray, seed: int) -> None:
    b = a + np.random.default_rng(seed).standard_normal(a.shape)
    assert close(distance(a, b), exact(a, b))
    assert close(distance(a, None), exact(a, None))


@given(st.lists(st.tuples(WILD, WILD), min_size=1, max_size=8))
def test_distance_of_wild_values_is_the_exact_one(pairs: list[tuple[float, float]]) -> None:
    """NaN, infinities, denormals, and squares that overflow or vanish."""
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    wanted = exact(a, b)
    if wanted < math.inf or not np.isfinite(a).all() or not np.isfinite(b).all():
        assert close(distance(a, b), wanted)
    assert distance(a, a) == 0.0
    assert close(distance(a, b), distance(b, a))


def test_one_side_alone_being_finite_is_infinitely_far() -> None:
    for odd in (math.nan, math.inf, -math.inf):
        a, b = np.array([1.0, odd]), np.array([1.0, 2.0])
        assert distance(a, b) == distance(b, a) == math.inf
        assert distance(a, a.copy()) == 0.0
    assert distance(np.array([math.inf]), np.array([-math.inf])) == math.inf
    assert distance(np.array([math.nan]), np.array([math.inf])) == math.inf


@pytest.mark.parametrize("size", [5e-324, 1e-300, 1e-170, 1e-155])
def test_a_difference_whose_square_vanishes_is_a_difference(size: float) -> None:
    a = np.array([0.0, size])
    assert distance(a, np.zeros(2)) == distance(a, None) == pytest.approx(size / math.sqrt(2), rel=1e-12, abs=5e-324)
    assert distance(a, a.copy()) == 0.0


def test_an_agreeing_nan_does_not_hide_a_difference_beside_it() -> None:
    a, b = np.array([math.nan, 1.0, math.inf]), np.array([math.nan, 1.5, math.inf])
    assert distance(a, b) == pytest.approx(0.5 / math.sqrt(3))


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_add_up(size: int, dtype: type) -> None:
    rng = np.random.default_rng(size)
    a = rng.standard_normal(size).astype(dtype)
    b = a.astype(np.float64) + 1e-9 * rng.standard_normal(size)
    wanted = math.sqrt(math.fsum((a.astype(np.float64) - b) ** 2) / size)
    assert distance(a, b) == pytest.approx(wanted, rel=1e-12)
    planted = b.copy()
    planted[-1] += 1.0
    assert distance(a, planted) > 1e5 * distance(a, b)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (BLOCK // 64, 130)])
def test_memory_layout_does_not_matter(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(shape), rng.standard_normal(shape)
    wanted = math.sqrt(math.fsum(((a - b) ** 2).reshape(-1)) / a.size)
    spread = np.repeat(b, 2, axis=-1)[..., ::2]
    for other in (b, np.asfortranarray(b), spread, b.T.copy().T, b[..., ::-1].copy()[..., ::-1]):
        assert distance(np.asfortranarray(a), other) == pytest.approx(wanted, rel=1e-13)
    if len(set(shape)) > 1 and len(shape) == 2:
        square = rng.standard_normal((5, 5))
        assert distance(square, square.T) > 0.1


def test_a_permutation_that_keeps_every_mean_is_seen() -> None:
    a = np.random.default_rng(0).standard_normal((4, 6))
    assert distance(a, np.roll(a, 1, axis=1)) > 0.1
    assert abs(float(np.mean(a - np.roll(a, 1, axis=1)))) < 1e-15


def test_empty_and_scalar() -> None:
    assert distance(np.zeros((0, 3)), np.zeros((0, 3))) == rms(np.zeros(0)) == 0.0
    assert distance(np.array(2.0), np.array(5.0)) == 3.0
    assert rms(np.array([math.nan, 3.0, math.inf])) == 3.0
    assert rms(np.array([math.nan])) == 0.0


def test_units() -> None:
    assert float(np.finfo(np.float32).eps) / 2 == U32
    assert float(np.finfo(np.float64).eps) / 2 == U64
    assert SHRINK == 2.0**-29
    assert float(np.finfo(np.float32).smallest_normal) == TINY32
    assert (accumulation(1), accumulation(16), accumulation(1600)) == (1.0, 1.0, 10.0)


def test_finite_nonfinite_and_ratio() -> None:
    assert [finite(v) for v in (2.0, math.inf, math.nan)] == [2.0, 0.0, 0.0]
    assert nonfinite(np.array([1.0, math.nan]))
    assert not nonfinite(np.array([1.0]))
    assert not nonfinite(np.array([1, 2]))
    assert (ratio(0.0, 0.0), ratio(1.0, 0.0), ratio(1.0, 4.0)) == (0.0, math.inf, 0.25)


def four(gap: float = 0.0, port_error: float = 1e-7, shape: tuple[int, ...] = (100,)) -> Measure:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(shape)
    sign = rng.choice([-1.0, 1.0], shape)
    return measure("x", wide + 1e-7 * sign, wide, wide + port_error * sign, wide + gap * sign, wide.size)


def test_a_measure_holds_every_distance() -> None:
    m = four(gap=1e-12, port_error=3e-7)
    assert m.gap == pytest.approx(1e-12, rel=1e-3)
    assert m.rounding == pytest.approx(1e-7)
    assert [m.port_error, m.port_rounding] == pytest.approx([3e-7, 3e-7], rel=1e-5)
    assert m.scale_reference == pytest.approx(1.0, abs=0.2)
    assert (m.elements, m.exact, m.nonfinite) == (100, False, False)


def test_the_expectation_is_the_largest_of_three() -> None:
    shrunk = SHRINK * 1e-7
    sum_ = U64 * 2.5
    assert expected(four(port_error=0.0), 1.0) == pytest.approx(max(shrunk, sum_))
    assert expected(four(port_error=1e-3), 1.0) == pytest.approx(SHRINK * 1e-3)
    assert expected(four(port_error=0.0), 1e6) == pytest.approx(1e6 * sum_)
    assert expected(four(port_error=math.inf), math.nan) == pytest.approx(shrunk)


def test_precision_is_the_ratio_of_errors_and_has_a_floor() -> None:
    assert precision(four(port_error=1e-7), 1.0) == pytest.approx(1.0)
    assert precision(four(port_error=1e-3), 1.0) == pytest.approx(1e4)
    wide = np.ones(4)
    exact32 = measure("x", wide, wide, wide * (1 + U32), wide, 4)
    assert precision(exact32, 1.0) == pytest.approx(1.0)
    nothing = measure("x", 0 * wide, 0 * wide, 0 * wide + TINY32, 0 * wide, 4)
    assert precision(nothing, 0.0) == pytest.approx(1.0)
    overflowed = measure("x", wide, wide, wide * math.inf, wide, 4)
    assert precision(overflowed, 1.0) == math.inf
    both = measure("x", wide * math.inf, wide, wide * math.inf, wide, 4)
    assert precision(both, 1.0) == 1.0


def test_integers_and_booleans_count_what_differs() -> None:
    ours, theirs = np.array([1, 2, 3, 4]), np.array([1, 2, 4, 4])
    m = measure("x", ours, ours, theirs, theirs, 4)
    assert (m.gap, m.exact) == (0.25, True)
    flags = ours > 2
    assert measure("x", flags, flags, flags, flags, 4).gap == 0.0
    empty = np.zeros(0, np.int64)
    assert measure("x", empty, empty, empty, empty, 0).gap == 0.0


def test_complex_numbers_are_two_reals() -> None:
    a = np.array([1 + 2j, 3 - 1j])
    m = measure("x", a, a, a, a + 1e-3j, 2)
    assert m.gap == pytest.approx(1e-3 / math.sqrt(2))


def test_nan_on_both_sides_is_marked_and_on_one_side_is_a_gap() -> None:
    a, b = np.array([1.0, math.nan]), np.array([1.0, 2.0])
    assert measure("x", a, a, a, a, 2).nonfinite
    one = measure("x", a, a, b, b, 2)
    assert one.gap == math.inf
    assert not one.nonfinite


@given(hnp.arrays(np.float64, 9, elements=st.floats(1e-3, 1e3)), st.integers(0, 99))
def test_a_twin_moves_every_element_by_one_unit(array: np.ndarray, seed: int) -> None:
    twin = ulp_twin(array, np.random.default_rng(seed), 2.0**-52)
    assert ((twin != array) & (np.abs(twin - array) <= 2 * np.spacing(array))).all()
    assert ulp_twin(np.array([1, 2]), np.random.default_rng(0), 1.0).tolist() == [1, 2]


def test_the_worst_index() -> None:
    a = np.zeros((3, 4))
    b = a.copy()
    b[1, 2] = -5.0
    b[2, 3] = 1.0
    assert worst_index(a, b) == (1, 2)
    b[0, 1] = math.nan
    assert worst_index(a, b) == (0, 1)
    assert worst_index(np.array([math.nan, 1.0]), np.array([math.nan, 2.0])) == (1,)
    assert worst_index(np.array(1.0), np.array(2.0)) == worst_index(np.zeros(0), np.zeros(0)) == ()


def test_representable_rounds_floats_only() -> None:
    assert representable(np.array([0.1])).dtype == np.float32
    assert representable(np.array([1])).dtype == np.int64


def test_no_figure_of_the_design_has_moved() -> None:
    """What decides every verdict; a change answers to benchmarks/detection.py first."""
    assert (numerics.AGREES, numerics.DIFFERS, numerics.IMPRECISE) == (10.0, 100.0, 1000.0)
