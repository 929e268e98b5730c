"""Flows and recorded runs follow functions that have changed, and keep to the ones that they began with."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entk import empirical_ntk
from gramian import (
    Integrator,
    KernelSource,
    LiveChannel,
    Recorder,
    analyze_training,
    convex_loss,
    gradient_flow,
    minibatches,
    record_training,
    reference_flow,
    squared_loss,
)

X, Y, W = np.eye(3), np.array([1.0, -1.0, 0.5]), np.zeros(3)
LOSS = squared_loss(Y)


def scaled_model():
    held = {"scale": 1.0}
    return lambda w, x: held["scale"] * (x @ w), lambda: held.update(scale=2.0)


def squares():
    held = {"weight": 1.0}
    return lambda u, y: held["weight"] * jnp.sum((u - y) ** 2) / 2, lambda: held.update(weight=4.0)


@dataclass(frozen=True)
class Counted:
    """An observable whose update reads what is outside of it."""

    name: str = "counted"

    def init(self, source, loss, start):
        return jnp.zeros(())

    def update(self, state, source, point, operators, h):
        return state + FACTOR[0], state + FACTOR[0]


FACTOR = [1.0]


@pytest.mark.parametrize("run", [gradient_flow, reference_flow])
def test_a_flow_of_a_model_that_has_changed(run):
    model, change = scaled_model()
    run(model, W, X, LOSS, t1=1.0)
    change()
    flow = run(model, W, X, LOSS, t1=1.0)
    np.testing.assert_allclose(flow.operators.propagator, np.exp(-4 / 3) * np.eye(3), atol=1e-4)


@pytest.mark.parametrize("run", [gradient_flow, reference_flow])
def test_a_flow_of_a_loss_that_has_changed(run):
    example_loss, change = squares()
    loss = convex_loss(example_loss, Y[:, None])
    run(lambda w, x: x @ w, W, X, loss, t1=1.0)
    change()
    flow = run(lambda w, x: x @ w, W, X, loss, t1=1.0)
    np.testing.assert_allclose(flow.operators.propagator, np.exp(-4 / 3) * np.eye(3), atol=1e-4)


def test_a_flow_keeps_the_functions_it_began_with():
    model, change = scaled_model()
    flow = Integrator(KernelSource(model, X), LOSS)
    state, _ = flow.update(flow.init(W), 0.5)
    change()
    kept, _ = flow.update(state, 1.0)
    np.testing.assert_allclose(kept.params, (1 - np.exp(-1 / 3)) * Y, rtol=1e-4)
    ended = gradient_flow(model, W, X, LOSS, t1=0.5)
    assert ended.outputs(W)[0].shape == (3,)
    model_now = ended.source.apply_fn
    np.testing.assert_array_equal(empirical_ntk(model_now, W, X), 4 * np.eye(3))
    again, _ = flow.update(flow.init(W), 1.0)  # begun anew
    assert again.params[0] > kept.params[0]


def test_an_observable_that_reads_something():
    runs = []
    for FACTOR[0] in (1.0, 5.0):
        flow = gradient_flow(lambda w, x: x @ w, W, X, LOSS, t1=1.0, observables={"counted": Counted()})
        runs.append(flow.final(Counted) / flow.num_steps)
        assert isinstance(flow.observables["counted"], Counted)
    assert runs == [1.0, 5.0]


def momentum(held):
    def update(grads, state, params=None):
        return -held["rate"] * grads, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_a_recorded_run_of_functions_that_have_changed(tmp_path):
    """Model and optimizer; and the analysis of each run is that of its own."""
    model, change = scaled_model()
    held = {"rate": 0.3}
    optimizer, batches = momentum(held), minibatches(3, 3, 4)
    first, run = record_training(model, W, X, LOSS, optimizer, batches, Recorder(tmp_path / "first", every=2))
    np.testing.assert_allclose(first, (1 - 0.9**4) * Y, rtol=1e-10)
    report = analyze_training(run, quadrature=2)
    np.testing.assert_allclose(report.operators["propagator"], 0.9**4 * np.eye(3), atol=1e-10)
    change()
    held["rate"] = 0.15
    second, run = record_training(model, W, X, LOSS, optimizer, batches, Recorder(tmp_path / "second", every=2))
    np.testing.assert_allclose(second, (1 - 0.8**4) / 2 * Y, rtol=1e-10)
    report = analyze_training(run, quadrature=2)
    np.testing.assert_allclose(report.operators["propagator"], 0.8**4 * np.eye(3), atol=1e-10)


def test_probes_that_follow_a_changed_model():
    model, change = scaled_model()
    live = LiveChannel(model, LOSS, X, optax.sgd(0.3), rank=3)
    left = []
    for _ in range(2):
        state = live.init(W, optax.sgd(0.3).init(W))
        left.append(live.update(state, W, optax.sgd(0.3).init(W), jnp.arange(3))[1].left)
        change()
    np.testing.assert_allclose(left[0], 0.9, rtol=1e-10)
    np.testing.assert_allclose(left[1], 0.6, rtol=1e-10)
