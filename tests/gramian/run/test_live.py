"""The live channel against the recorded run's operators."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entk import empirical_ntk
from gramian import LiveChannel, RealizedPath, dense_operators, minibatches
from gramian._run.training import TrainState, train
from tests.gramian.training_problems import OPTIMIZERS, OUTPUTS, PARAMS, SOFTMAX, N, X, apply_fn, record


def followed(tx, batches, basis, **settings):
    """What a live channel says after a run on these batches."""
    live = LiveChannel(apply_fn, SOFTMAX, X, tx, quadrature=2, **settings)
    train_state = TrainState(jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS))
    state = live.init(*train_state, basis)
    for batch in batches:
        state, info = live.update(state, *train_state, batch)
        train_state, _ = train(apply_fn, tx, SOFTMAX, X, train_state, batch[None])
    return state, info


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_period_costs_accuracy_of_first_order(tmp_path, name):
    """W on the probes against the recorded run's matrices: the error falls with the period, and drift bounds it."""
    tx, batches = OPTIMIZERS[name], minibatches(N, 4, 8)
    _, run = record(tmp_path, tx, batches=batches)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(N * OUTPUTS, 4)))[0]
    exact = basis.T @ np.asarray(dense_operators(RealizedPath(run, quadrature=2))["gramian"]) @ basis
    errors = {}
    for every in (1, 2, 4, 8):
        state, info = followed(tx, batches, basis, every=every)
        assert state.steps == 0
        errors[every] = np.linalg.norm(state.sums.gramian[:-1, :-1] - exact) / np.linalg.norm(exact)
        assert every == 1 or errors[every] < float(info.drift)
    assert errors[1] < 1e-9
    assert errors[2] < 0.7 * errors[4] < 0.5 * errors[8]
    assert errors[8] > 10 * errors[1]


def test_a_period_that_is_not_over_changes_nothing_yet():
    tx, basis = OPTIMIZERS["momentum"], np.eye(N * OUTPUTS)[:, :2]
    batches = minibatches(N, 4, 3)
    (whole, first), (partial, second) = (followed(tx, batches[:k], basis, every=4) for k in (4, 6))
    assert (whole.steps, partial.steps) == (0, 2)
    np.testing.assert_array_equal(first.gramian_eigenvalues, second.gramian_eigenvalues)
    assert np.abs(jax.tree.leaves(partial.moves)[0]).max() > 0
    assert np.abs(jax.tree.leaves(whole.moves)[0]).max() == 0


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_it_is_the_recorded_runs_w_and_v_on_the_probes(tmp_path, name):
    tx, batches = OPTIMIZERS[name], minibatches(N, 4, 5)
    _, run = record(tmp_path, tx, batches=batches)
    found = dense_operators(RealizedPath(run, quadrature=2))
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(N * OUTPUTS, 4)))[0]
    state, info = followed(tx, batches, basis)
    for values, which in ((info.gramian_eigenvalues, "gramian"), (info.motion_eigenvalues, "motion")):
        expected = np.linalg.eigvalsh(basis.T @ np.asarray(found[which]) @ basis)[::-1]
        np.testing.assert_allclose(values, expected, rtol=1e-8)
        assert (np.asarray(values) <= np.linalg.eigvalsh(found[which])[::-1][:4] * (1 + 1e-12)).all()
    np.testing.assert_allclose(
        info.left, np.linalg.norm(np.asarray(found["propagator"]) @ _signed(state, basis), axis=0)
    )


def _signed(state, basis):
    """The probes as the tracker orthonormalised them: up to signs the basis itself."""
    return np.asarray(jnp.linalg.qr(jnp.asarray(basis))[0])


def test_by_default_it_follows_the_top_of_the_kernel():
    tx = optax.sgd(1e-6)
    params = jax.tree.map(jnp.asarray, PARAMS)
    live = LiveChannel(apply_fn, SOFTMAX, X, tx, rank=3)
    _, info = live.update(live.init(params, tx.init(params)), params, tx.init(params), jnp.arange(N))
    top = np.linalg.eigvalsh(empirical_ntk(apply_fn, params, jnp.asarray(X)))[::-1][:3]
    np.testing.assert_allclose(info.gramian_eigenvalues, 1e-6 * top, rtol=1e-4)


def test_one_compilation_serves_the_loop(monkeypatch):
    tx, params = optax.adam(0.01), jax.tree.map(jnp.asarray, PARAMS)
    live, traces = LiveChannel(apply_fn, SOFTMAX, X, tx, rank=2), []
    state = live.init(params, tx.init(params))
    monkeypatch.setattr("gramian._run.live.take", _counted(traces))
    for batch in minibatches(N, 4, 2):
        state, _ = live.update(state, params, tx.init(params), batch)
    assert len(traces) == 1


def _counted(traces):
    from gramian._run.step import take

    def counted(*args):
        traces.append(1)
        return take(*args)

    return counted


def test_an_optimizer_that_cannot_be_followed():
    with pytest.raises(ValueError, match="scale_by_lion"):
        LiveChannel(apply_fn, SOFTMAX, X, optax.lion(0.1)).init(PARAMS, optax.lion(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="every=0"):
        LiveChannel(apply_fn, SOFTMAX, X, optax.sgd(0.1), every=0).init(PARAMS, optax.sgd(0.1).init(PARAMS))
