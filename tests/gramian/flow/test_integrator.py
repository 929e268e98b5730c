"""The (init, update) pair below gradient_flow: the same numbers, rejected steps, NaN, losses that turn non-convex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gramian import (
    AdaptiveStep,
    ConstantStep,
    ExponentialEuler,
    ExponentialMidpoint,
    Integrator,
    KernelEvolution,
    KernelSource,
    convex_loss,
    gradient_flow,
    squared_loss,
)
from tests.gramian.flow_problems import problem


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_loop_of_ones_own_equals_the_driver_bit_for_bit():
    apply_fn, params, x_s, loss, x_q = problem("softmax")
    observables = {"kernel": KernelEvolution()}
    flow = gradient_flow(apply_fn, params, x_s, loss, x_q, t1=1.0, observables=observables)
    integrator = Integrator(KernelSource(apply_fn, x_s, x_q), loss, observables=observables)
    state, infos = integrator.init(params), []
    while state.t < 1.0:
        state, info = integrator.update(state, 1.0)
        infos.append(info)
    assert bits((state.params, state.operators, state.observed)) == bits((flow.params, flow.operators, flow.observed))
    assert [info.t for info in infos] == flow.history["t"].tolist()
    assert [info.loss for info in infos] == flow.history["loss"].tolist()
    assert state.num_rejected == flow.num_rejected


@pytest.mark.parametrize("stepper", [ExponentialEuler(), ExponentialMidpoint()])
def test_update_is_pure(stepper):
    """The same state gives the same step, and is not changed by it."""
    apply_fn, params, x_s, loss, x_q = problem("logistic")
    integrator = Integrator(KernelSource(apply_fn, x_s, x_q), loss, stepper)
    state = integrator.init(params)
    before = bits(state)
    first, second = integrator.update(state, 1.0), integrator.update(state, 1.0)
    assert bits(first) == bits(second)
    assert bits(state) == before


def test_a_step_that_is_too_long_is_rejected_and_counted():
    apply_fn, params, x_s, loss, x_q = problem("logistic")
    source = KernelSource(apply_fn, x_s, x_q)
    integrator = Integrator(source, loss, controller=AdaptiveStep(1e-6, first_step=1e3))
    state, info = integrator.update(integrator.init(params), 1e4)
    assert state.num_rejected > 2
    assert state.num_steps == 1
    assert info.error <= 1
    # What was rejected leaves no trace: the same step, asked for at once, gives the same.
    direct = Integrator(source, loss, controller=AdaptiveStep(1e-6, first_step=info.h))
    other, _ = direct.update(direct.init(params), 1e4)
    assert bits(other.operators) == bits(state.operators)


def test_a_step_never_passes_its_end_and_ends_there_exactly():
    apply_fn, params, x_s, loss, x_q = problem("logistic")
    integrator = Integrator(KernelSource(apply_fn, x_s, x_q), loss, controller=ConstantStep(0.1))
    state = integrator.init(params)
    for _ in range(3):
        state, info = integrator.update(state, 0.3)
    assert state.t == 0.3  # 0.1 + 0.1 + 0.1 > 0.3 in floating point
    assert info.h == pytest.approx(0.1)
    t0, t1 = -5.05, 0.59
    assert t0 + (t1 - t0) != t1
    whole = Integrator(KernelSource(apply_fn, x_s, x_q), loss, controller=ConstantStep(100.0))
    assert whole.update(whole.init(params, t0), t1)[0].t == t1


def test_a_step_cut_short_by_a_stop_does_not_shorten_the_next():
    apply_fn, params, x_s, loss, x_q = problem("logistic")
    integrator = Integrator(KernelSource(apply_fn, x_s, x_q), loss, controller=AdaptiveStep(1e-6))
    state, _ = integrator.update(integrator.init(params), 1.0)
    cut, info = integrator.update(state, state.t + 1e-6)
    assert info.h == pytest.approx(1e-6)
    assert cut.h == state.h


def poisoned(where):
    """A model whose outputs on `where` (1 for S, 2 for Q) become NaN as soon as its parameter passes 0.5."""

    def apply_fn(w, x):
        bad = (jnp.abs(w[0]) > 0.5) & (x[:, 0] == where)
        return jnp.where(bad, jnp.nan, x @ w)

    return apply_fn


@pytest.mark.parametrize("where", [1.0, 2.0], ids=["training", "test"])
@pytest.mark.parametrize("controller", [AdaptiveStep(1e-3), ConstantStep(0.3)])
def test_outputs_that_turn_nan_stop_the_flow_there(where, controller):
    """Also test outputs, which drive nothing: a NaN may not hide behind a number in a maximum."""
    x_s, x_q = jnp.array([[1.0]]), jnp.array([[2.0]])
    with pytest.raises(FloatingPointError, match=r"no step from t=0\.\d+ meets the tolerance.*not finite there"):
        gradient_flow(poisoned(where), jnp.zeros(1), x_s, squared_loss(jnp.ones(1)), x_q, t1=5.0, controller=controller)


def cubic(u, y):
    return jnp.sum(-(u**3) - u)


@pytest.mark.parametrize("stepper", [ExponentialEuler(), ExponentialMidpoint()])
def test_a_loss_that_turns_non_convex_on_the_way_is_refused_there(stepper):
    """ℓ = −u³ − u is convex for u < 0 and drives u past 0: fine at the start, refused where it ceases to be convex."""
    loss = convex_loss(cubic, jnp.zeros((2, 1)))
    with pytest.raises(
        ValueError, match=r"not convex: B K_SS has the eigenvalue -[\d.e+-]+ in the step from t=0\.\d*[1-9]"
    ):
        gradient_flow(lambda w, x: x @ w, jnp.array([-0.1]), jnp.ones((2, 1)), loss, t1=0.3, stepper=stepper)
    short = gradient_flow(lambda w, x: x @ w, jnp.array([-0.1]), jnp.ones((2, 1)), loss, t1=0.05, stepper=stepper)
    assert -0.1 < short.params[0] < 0
