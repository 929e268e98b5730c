"""Order of convergence, exactness on a linear model, error estimates, and residuals that follow the tolerance."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gramian import (
    AdaptiveStep,
    ConstantStep,
    ExponentialEuler,
    ExponentialMidpoint,
    Integrator,
    KernelSource,
    gradient_flow,
    reference_flow,
    squared_loss,
)
from gramian._flow.integrator import _trial
from tests.gramian.flow_problems import linear, mlp, problem, relative, residuals

LOSSES = ["squared", "logistic", "softmax"]
STEPPERS = [pytest.param(ExponentialEuler(), id="euler"), pytest.param(ExponentialMidpoint(), id="midpoint")]
STEPS = np.array([8, 16, 32])


@functools.cache
def truth(name):
    """The flow to t = 1 to twelve digits, by an explicit Runge-Kutta method that freezes nothing."""
    return reference_flow(*problem(name), t1=1.0, rtol=1e-12, atol=1e-14)


@functools.cache
def runs(name, stepper):
    """Errors against the truth, and residuals of (I1)-(I4), for 8, 16 and 32 steps."""
    args, exact = problem(name), truth(name)
    errors, defects = [], []
    for steps in STEPS:
        flow = gradient_flow(*args, t1=1.0, stepper=stepper, controller=ConstantStep(1 / steps))
        assert flow.num_steps == steps
        u_q = flow.outputs(flow.params)[1], exact.outputs(exact.params)[1]
        pairs = [(flow.params, exact.params), u_q, *zip(flow.operators, exact.operators, strict=True)]
        errors.append([relative(actual, expected) for actual, expected in pairs])
        defects.append(residuals(flow))
    return np.array(errors), np.array(defects)


def slopes(values):
    return -np.polyfit(np.log(STEPS), np.log(values), 1)[0]


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("name", LOSSES)
def test_order_of_convergence_of_parameters_outputs_and_operators(name, stepper):
    """The slope for w, U_Q, P, W, D and G, each for itself."""
    errors, _ = runs(name, stepper)
    assert errors[-1].max() < (2e-3 if stepper.order == 1 else 5e-6)
    assert np.abs(slopes(errors) - stepper.order).max() < (0.15 if stepper.order == 1 else 0.2)


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("name", LOSSES)
def test_residuals_of_the_identities_fall_at_the_order_of_the_stepper(name, stepper):
    """(I1)-(I4); 0.5 of room above, because two parts of (I2) nearly cancel for the squared loss."""
    _, defects = runs(name, stepper)
    assert (slopes(defects) > stepper.order - 0.2).all()
    assert (slopes(defects) < stepper.order + 0.5).all()


@pytest.mark.parametrize("name", LOSSES)
def test_residuals_follow_rtol(name):
    """Like rtol^(p/(p+1)): 10^(4/3) = 21.5 for a hundredth of rtol, and below the tolerance that the run states."""
    args = problem(name)
    flows = [gradient_flow(*args, t1=1.0, controller=AdaptiveStep(rtol)) for rtol in (1e-4, 1e-6)]
    coarse, fine = (residuals(flow) for flow in flows)
    for flow, values in zip(flows, (coarse, fine), strict=True):
        assert values.max() < flow.tolerance
    assert flows[1].tolerance == pytest.approx(flows[1].num_steps * 1e-6)
    gain = np.exp(np.mean(np.log(coarse / fine)))
    assert 10 ** (4 / 3) / 1.7 < gain < 10 ** (4 / 3) * 1.7
    assert flows[1].num_steps > 3 * flows[0].num_steps


# -------------------------------------------------------------------------------------------------------- linear model


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("h", [1.0, 100.0, 1e4])
def test_exact_on_a_linear_model_whatever_the_step(h, stepper):
    """One step; w, P, W, D and G against the solution by eigenvalues of XXᵀ."""
    rng = np.random.default_rng(0)
    n = 6
    x, x_q, y, w = (rng.normal(size=shape) for shape in ((n, 8), (3, 8), n, 8))
    values, vectors = np.linalg.eigh(x @ x.T / n)
    propagator = (vectors * np.exp(-values * h)) @ vectors.T
    integrated = (vectors * (-np.expm1(-values * h) / values)) @ vectors.T
    flow = gradient_flow(linear, w, x, squared_loss(y), x_q, t1=h, stepper=stepper, controller=ConstantStep(h))
    assert flow.num_steps == 1
    assert relative(flow.params, w - x.T @ integrated @ (x @ w - y) / n) < 1e-10
    p, gramian, d, g = flow.operators
    np.testing.assert_allclose(p, propagator, atol=1e-10)
    assert relative(gramian, n / 2 * (np.eye(n) - propagator @ propagator)) < 1e-10
    assert relative(d, n * (np.eye(n) - propagator)) < 1e-10
    assert relative(g, x_q @ x.T @ integrated) < 1e-10


# ----------------------------------------------------------------------------------------------------- error estimates


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_error_estimate_is_within_a_factor_of_ten_of_the_error(name, stepper):
    """Of training outputs, test outputs and gradient, after one step, at two lengths; and it falls like h^(p+1)."""
    apply_fn, params, x_s, loss, x_q = problem(name)
    source = KernelSource(apply_fn, x_s, x_q)
    estimates = []
    for h in (0.1, 0.05):
        flow = Integrator(source, loss, stepper, ConstantStep(h))
        state, _ = flow.update(flow.init(params), 10.0)  # the carry is then that of a step, not of a start
        step = _trial(stepper, source, loss, state.params, state.carry, jnp.asarray(h))
        exact = reference_flow(
            apply_fn, state.params, x_s, loss, x_q, t1=h, rtol=1e-12, atol=1e-14, operators=False
        ).params
        u_s, u_q = source.outputs(exact)
        missed = step.outputs_s - u_s, step.outputs_q - u_q, loss.grad(step.outputs_s) - loss.grad(u_s)
        errors = np.array([np.sqrt(np.mean(np.square(difference))) for difference in missed])
        estimates.append(np.array([step.error_s, step.error_q, step.error_g]))
        assert (estimates[-1] > errors / 10).all()
        assert (estimates[-1] < errors * 10).all()
    orders = np.log2(estimates[0] / estimates[1])
    assert np.abs(orders - (stepper.order + 1)).max() < 0.35


def test_more_passes_of_the_midpoint_find_its_fixed_point():
    """Two passes and five differ by less than either misses the flow; one pass is refused."""
    args, exact = problem("squared"), truth("squared")
    ends = [
        gradient_flow(*args, t1=1.0, stepper=ExponentialMidpoint(k), controller=ConstantStep(1 / 16)).params
        for k in (2, 5)
    ]
    assert 0 < relative(ends[0], ends[1]) < relative(ends[1], exact.params)
    for bad in (1, 2.0, "2"):
        with pytest.raises(ValueError, match=r"iterations=.* must be an integer of at least 2"):
            ExponentialMidpoint(bad)


def test_without_test_points_nothing_changes_for_training():
    apply_fn, params, x_s, loss, x_q = problem("softmax")
    settings = {"t1": 0.5, "controller": ConstantStep(0.1)}
    with_test = gradient_flow(apply_fn, params, x_s, loss, x_q, **settings)
    without = gradient_flow(mlp, params, x_s, loss, **settings)
    assert without.operators.test_transfer.shape == (0, 10)
    assert without.outputs(without.params)[1].shape == (0,)
    assert relative(without.params, with_test.params) < 1e-14
    assert relative(without.operators[:3], with_test.operators[:3]) < 1e-14
