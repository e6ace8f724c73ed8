"""to_optax over whole models: every optimizer of torch, its groups, mappings, missing gradients and schedulers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agreement import assert_agree
from tests.translated_cases import CASES, NETS, SCHEDULED
from tests.translated_sides import draw, moved, port_side, torch_side

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", list(CASES))
@settings(max_examples=2)
@given(seed=SEEDS)
def test_every_step_of_every_optimizer(name: str, seed: int) -> None:
    case = CASES[name]
    arrays = draw(case, seed)
    assert_agree(torch_side(case), port_side(case), arrays, moved(arrays))


@pytest.mark.parametrize("layout", list(NETS))
@settings(max_examples=2)
@given(seed=SEEDS)
def test_leaves_stacked_fused_split_tied_and_frozen(layout: str, seed: int) -> None:
    case = NETS[layout]
    arrays = draw(case, seed)
    assert_agree(torch_side(case), port_side(case), arrays, moved(arrays))


@pytest.mark.parametrize("what", list(SCHEDULED))
@settings(max_examples=2)
@given(seed=SEEDS)
def test_rates_that_move(what: str, seed: int) -> None:
    case = SCHEDULED[what]
    arrays = draw(case, seed)
    assert_agree(torch_side(case), port_side(case), arrays, moved(arrays))
