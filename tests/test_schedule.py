import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enat import EnatError
from enat.runtime.schedule import schedule


def test_published_counts() -> None:
    steps = schedule(256, 8, 2.5, 1.5, 6.0)
    assert [step.masked for step in steps] == [256, 251, 236, 212, 181, 142, 97, 49]
    assert steps[-1].keep == 0
    assert [step.guidance for step in steps] == [2.5 * t / 8 for t in range(8)]
    assert steps[-1].sampling_temperature == 1e-3
    assert steps[0].sampling_temperature == 6.0 * 7 / 8
    assert steps[3].mask_temperature == 1.5 * 0.5


@given(st.integers(1, 32).flatmap(lambda grid: st.tuples(st.just(grid**2), st.integers(1, grid**2))))
def test_every_token_is_revealed_once(sizes: tuple[int, int]) -> None:
    length, count = sizes
    steps = schedule(length, count, 3.0, 1.0, 1.0)
    assert steps[0].masked == length
    assert steps[0].visible == 0
    assert steps[-1].keep == 0
    assert all(0 <= step.keep <= step.masked for step in steps)
    for step, following in itertools.pairwise(steps):
        assert following.masked == step.keep
        assert following.new == step.masked - step.keep
        assert following.seen == step.seen + step.new
        assert following.visible + following.masked == length
        assert step.keep == math.floor(length * math.cos((step.index + 1) / count * math.pi / 2))
        assert following.guidance > step.guidance
    assert len(steps) <= count


def test_a_step_may_reveal_nothing() -> None:
    assert all(step.masked > step.keep for step in schedule(256, 35, 1, 1, 1))
    assert any(step.masked == step.keep for step in schedule(256, 36, 1, 1, 1))


@pytest.mark.parametrize(
    "settings", [(0, 1, 1, 1), (257, 1, 1, 1), (8, -1, 1, 1), (8, 1e6 + 1, 1, 1), (8, 1, math.nan, 1), (8, 1, 1, math.inf)]
)
def test_settings_out_of_range(settings: tuple[int, float, float, float]) -> None:
    with pytest.raises(EnatError, match="expected"):
        schedule(256, *settings)
