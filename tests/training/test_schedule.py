"""Schedules are functions of the optimiser step alone."""

import pytest

from slimba.errors import UserError
from slimba.training.schedule import fade, lr_factor


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_warms_up_then_decays_towards_zero(decay):
    values = [lr_factor(i, 100, 0.1, decay) for i in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == 1.0
    assert values.index(1.0) == 9
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0 < values[-1] < 0.02


def test_one_step_and_no_warmup():
    assert lr_factor(0, 1, 0.0, "linear") == 1.0


def test_unknown_decay_names_the_known():
    with pytest.raises(UserError, match="linear, cosine, constant"):
        lr_factor(0, 1, 0.0, "exponential")


def test_fade_reaches_zero_where_told():
    assert [fade(i, 10, 0.5) for i in range(7)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0])
    assert fade(0, 10, 0.0) == 0
