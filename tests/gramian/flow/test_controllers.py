"""Step-size rules: decisions by hand, limits, bad settings."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramian import AdaptiveStep, ConstantStep


@pytest.mark.parametrize("order", [1, 2, 3])
@given(error=st.floats(1e-12, 1e12), h=st.floats(1e-6, 1e6))
def test_adaptive_step_follows_the_error_to_the_power_of_the_order(order, error, h):
    decision = AdaptiveStep().update(h, error, order)
    assert decision.accept is (error <= 1)
    assert decision.h == pytest.approx(h * min(4, max(0.2, 0.9 * error ** (-1 / (order + 1)))))
    assert decision.h < h or error < 0.9 ** (order + 1) * (1 + 1e-12)


def test_a_step_at_the_limit_stands_and_no_error_at_all_quadruples():
    assert AdaptiveStep().update(1.0, 1.0, 2) == (True, 0.9)
    assert AdaptiveStep().update(2.0, 0.0, 2) == (True, 8.0)
    assert not AdaptiveStep().update(1.0, math.nextafter(1, 2), 2).accept


def test_the_first_step_is_the_fastest_time_scale_unless_it_is_given():
    assert AdaptiveStep().init(fastest_rate=4.0) == 0.25
    assert AdaptiveStep(first_step=3.0).init(fastest_rate=4.0) == 3.0
    assert math.isfinite(AdaptiveStep().init(fastest_rate=0.0))
    assert math.isfinite(AdaptiveStep().init(fastest_rate=-1e-18))


def test_errors_are_scaled_by_both_tolerances():
    assert AdaptiveStep(rtol=1e-2, atol=0.5).scale(2.0, 50.0) == 2.0
    assert AdaptiveStep(rtol=1e-2).scale(1.0, 50.0) == 2.0
    assert AdaptiveStep(rtol=1e-2).scale(0.0, 0.0) == 0.0
    assert AdaptiveStep(rtol=1e-2).scale(1e-300, 0.0) == math.inf
    assert math.isnan(AdaptiveStep().scale(math.nan, 1.0))
    assert ConstantStep(0.1).scale(2.0, 4.0) == 0.5
    assert ConstantStep(0.1).scale(2.0, 0.0) == 0.0


def test_tolerance_is_the_sum_of_what_the_steps_may_miss():
    assert AdaptiveStep(rtol=1e-6).tolerance(num_steps=50) == pytest.approx(5e-5)
    assert ConstantStep(0.1).tolerance(num_steps=50) is None


def test_constant_step_takes_every_step():
    controller = ConstantStep(0.25)
    assert controller.init(1e9) == 0.25
    assert controller.update(0.1, 1e9, 2) == (True, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rtol": 0.0}, r"rtol=0\.0 must be positive and finite"),
        ({"rtol": -1e-3}, r"rtol=-0\.001 must be positive"),
        ({"rtol": math.nan}, "rtol=nan must be positive"),
        ({"rtol": math.inf}, "rtol=inf must be positive"),
        ({"atol": -1.0}, r"atol=-1\.0 must be finite and not negative"),
        ({"atol": math.nan}, "atol=nan must be finite"),
        ({"first_step": 0.0}, r"first_step=0\.0 must be positive and finite, or None"),
        ({"first_step": math.inf}, "first_step=inf must be positive"),
    ],
)
def test_bad_settings_of_adaptive_step(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveStep(**settings)


@pytest.mark.parametrize("dt", [0.0, -1.0, math.nan, math.inf])
def test_bad_constant_step(dt):
    with pytest.raises(ValueError, match=r"dt=.* must be positive and finite"):
        ConstantStep(dt)
