"""Runs that leave the finite numbers: said at the step, the good part kept, refused before LAPACK sees a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gramian._run.path
from gramian import (
    Recorder,
    Recording,
    analyze_training,
    convex_loss,
    gradient_flow,
    minibatches,
    record_training,
    squared_loss,
)
from tests.gramian.training_problems import PARAMS, SOFTMAX, SQUARED, X_Q, N, X, apply_fn

BATCHES = minibatches(N, 4, 4)  # 12 steps


def spoilt_at(step, rate=1e-3):
    """A rate that is infinite for one step, counted from 1."""
    return optax.sgd(lambda count: jnp.where(count == step - 1, jnp.inf, rate))


def forgetful(step):
    """An optimizer whose state alone spoils, while parameters stay as they are."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -1e-3 * g, grads), jnp.where(state > step - 1.5, jnp.nan, state + 1)

    return optax.GradientTransformation(lambda _: jnp.zeros(()), update)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 12])
def test_the_step_is_said_and_what_came_before_is_kept(tmp_path, step):
    tx = spoilt_at(step)
    kept = f"up to {step - 1} are recorded" if step > 1 else "none is recorded"
    with pytest.raises(FloatingPointError, match=rf"at step {step}: params\['a'\], params\['b'\] holds.*{kept}"):
        record_training(apply_fn, PARAMS, X, SOFTMAX, tx, BATCHES, Recorder(tmp_path, every=4))
    if step == 1:
        return
    run = Recording(tmp_path, apply_fn, tx, SOFTMAX, X, PARAMS)
    assert run.num_steps == step - 1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(list(run.segments())[-1].end))
    if step == 5:
        assert all(row.holds for row in analyze_training(run, X_Q).identities)
        with pytest.raises(FloatingPointError, match="at step 5"):  # the same call finds the same step
            record_training(apply_fn, PARAMS, X, SOFTMAX, tx, BATCHES, Recorder(tmp_path, every=4))


def test_an_optimizer_state_that_spoils_alone(tmp_path):
    with pytest.raises(FloatingPointError, match="at step 6: opt_state holds NaN"):
        record_training(apply_fn, PARAMS, X, SOFTMAX, forgetful(6), BATCHES, Recorder(tmp_path, every=4))


def test_a_state_that_begins_infinite_may_stay_so(tmp_path):
    tx = optax.chain(optax.sgd(0.01), optax.contrib.reduce_on_plateau())
    assert not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tx.init(PARAMS)))

    def value(params, batch):
        return {"value": jnp.inf}

    run = record_training(apply_fn, PARAMS, X, SOFTMAX, tx, BATCHES, Recorder(tmp_path), extra_args=value)[1]
    assert run.num_steps == 12


def test_a_loss_that_overflows_while_parameters_are_finite(tmp_path):
    """After step 3 weights are 1e200, whose squared error is not a number any more."""
    tx = optax.sgd(lambda count: jnp.where(count == 2, 1e200, 1e-3))
    with pytest.raises(FloatingPointError, match=r"at step 4: the loss of its batch is NaN or infinite.*up to 2 "):
        record_training(apply_fn, PARAMS, X, SQUARED, tx, BATCHES, Recorder(tmp_path, every=8))
    assert Recording(tmp_path, apply_fn, tx, SQUARED, X, PARAMS).num_steps == 2


@pytest.mark.parametrize("at", ["update", "close"])
def test_a_loop_of_ones_own_is_stopped_at_the_next_kept_state(tmp_path, at):
    tx = spoilt_at(7 if at == "update" else 10)
    recorder = Recorder(tmp_path, every=4)
    params, state, _ = recorder.start(PARAMS, tx.init(PARAMS))

    def loop():
        nonlocal params, state
        for batch in BATCHES[:8] if at == "update" else BATCHES[:11]:
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
            recorder.update(batch, params, state)
        recorder.close(params, state)

    first, last = (5, 8) if at == "update" else (9, 11)
    with pytest.raises(
        FloatingPointError, match=rf"params.*since a step from {first} to {last}.*up to step {first - 1} "
    ):
        loop()
    run = Recording(tmp_path, apply_fn, tx, SOFTMAX, X, PARAMS)
    assert run.num_steps == first - 1
    with pytest.raises(RuntimeError, match="call start"):
        recorder.update(BATCHES[0], params, state)


def test_a_recording_with_a_step_that_is_not_finite_is_refused_with_it(tmp_path, monkeypatch):
    run = record_training(apply_fn, PARAMS, X, SOFTMAX, optax.sgd(0.1), BATCHES, Recorder(tmp_path, every=4))[1]
    plain = gramian._run.path._forward

    def spoilt(*args):
        shared, probes, sums, course = plain(*args)
        return shared, probes, sums, course._replace(loss=course.loss.at[1].set(jnp.nan))

    monkeypatch.setattr(gramian._run.path, "_forward", spoilt)
    monkeypatch.setattr(np.linalg, "eigh", lambda *_: pytest.fail("LAPACK was asked"))
    with pytest.raises(FloatingPointError, match="the training loss is not finite at step 2 of 12"):
        analyze_training(run, X_Q)


def test_half_precision_is_refused_at_the_start(tmp_path):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (PARAMS, X, SQUARED.targets))
    params, x, y = half
    for run in (
        lambda: gradient_flow(apply_fn, params, x, squared_loss(y), t1=1.0),
        lambda: record_training(apply_fn, params, x, squared_loss(y), optax.sgd(0.1), BATCHES, Recorder(tmp_path)),
    ):
        with pytest.raises(TypeError, match=r"bfloat16.*float32"):
            run()


# ---------------------------------------------------------------------------------------------------------------- flows

Z = np.random.default_rng(0).normal(size=(4, 3))
Y = np.ones(4)


@pytest.mark.parametrize(
    "model", [lambda p, x: jnp.sqrt(jnp.abs(x @ p)), lambda p, x: jnp.linalg.norm(p) * x[:, 0]], ids=["sqrt", "norm"]
)
def test_a_kernel_that_is_infinite_at_the_start_is_refused_and_does_not_hang(model):
    with pytest.raises(FloatingPointError, match=r"at the start, t=0.*K_SS holds 16 NaN"):
        gradient_flow(model, np.zeros(3), Z, squared_loss(Y), t1=1.0)


def test_test_points_with_infinite_derivatives_are_found():
    def model(p, x):  # fine on S, where the second feature is 0
        return x[:, 0] * p[0] + jnp.where(x[:, 1] > 0, jnp.sqrt(jnp.abs(x[:, 1] * p[1])), 0.0)

    x_s, x_q = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 1.0]])
    with pytest.raises(FloatingPointError, match="not finite"):
        gradient_flow(model, np.zeros(2), x_s, squared_loss(np.ones(2)), x_q, t1=1.0)


def test_a_loss_that_overflows_at_the_first_outputs():
    loss = convex_loss(lambda u, y: jnp.sum(jnp.exp(u) - u * y), Y[:, None])
    with pytest.raises(ValueError, match=r"the value of the .* loss is not finite.*at most 3000.*Scale"):
        gradient_flow(lambda p, x: x @ p, np.full(3, 1e3), np.ones((4, 3)), loss, t1=1.0)


def test_a_fitted_softmax_is_convex_at_any_time():
    """Blocks of B as small as 1e-12 are no concavity, in a loss written by hand."""

    def by_hand(u, y):
        return jax.nn.logsumexp(u) - jnp.vdot(u, y)

    loss = convex_loss(by_hand, np.eye(3))
    flow = gradient_flow(lambda w, x: x @ w, np.zeros((3, 3)), np.eye(3), loss, t1=1e6)
    assert float(flow.history["loss"][-1]) < 1e-5
