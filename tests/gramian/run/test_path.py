"""Operators of real runs: identities with their order, adjoints, oracles that share no code with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from entk import gradient_moments
from gramian import RealizedOperator, RealizedPath, Recorder, Recording, dense_operators, minibatches, record_training
from gramian._run.training import train
from tests.gramian.training_problems import (
    OPTIMIZERS,
    OUTPUTS,
    PARAMS,
    SOFTMAX,
    SQUARED,
    X_Q,
    M,
    N,
    X,
    apply_fn,
    record,
)

NAMES = ("propagator", "gramian", "motion", "displacement", "test_transfer")


def residuals(path, params, loss):
    """(I1)-(I4) of a run, from one probe and the forced part."""
    g = loss.grad(apply_fn(PARAMS, X))
    sweep = path.forward(g[None])
    pairs = [
        (sweep.probes.psi[0] + sweep.shared.forced.psi[0], loss.grad(apply_fn(params, X))),
        (sweep.sums.gramian.sum(), loss.value(apply_fn(PARAMS, X)) - loss.value(apply_fn(params, X))),
        *(
            (moved.sum(0), (apply_fn(params, x) - apply_fn(PARAMS, x)).ravel())
            for moved, x in ((sweep.sums.moved, X), (sweep.sums.moved_q, X_Q))
        ),
    ]
    return [float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) for found, expected in pairs]


@pytest.mark.parametrize(
    "name",
    [
        "sgd",
        "nesterov",
        "adamw",
        "clipped adam",
        "schedule",
        "gate before adam",
        "gate on the step",
        "every second step",
    ],
)
def test_the_identities_hold_for_the_real_run(tmp_path, name):
    params, run = record(tmp_path, OPTIMIZERS[name])
    assert max(residuals(RealizedPath(run, X_Q, 4), params, SOFTMAX)) < 1e-9


def exact_gate():
    """Lets through the coordinates whose mean gradient the batch itself tells from zero; a reading of theory (10)."""

    def update(grads, state, params=None, *, mean_grads, sum_sq_diff_grads, sample_size, **_):
        scale = sample_size * (sample_size - 1)
        return jax.tree.map(
            lambda g, m, s: jnp.where(m**2 > s / scale, g, 0.1 * g), grads, mean_grads, sum_sq_diff_grads
        ), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def moments(params, batch):
    def example_loss(params, example):
        x, y = example
        return jax.vmap(SOFTMAX.example_loss)(apply_fn(params, x), y)

    examples = jnp.asarray(X)[batch], SOFTMAX.targets[batch]
    return gradient_moments(example_loss, params, examples)._asdict()


def test_extra_arguments_of_the_optimizer_are_computed_again(tmp_path):
    """A gate with exact moments of every batch, before Adam: the identities hold, with the mask for a coefficient."""
    tx, batches = optax.chain(exact_gate(), optax.adam(0.02)), minibatches(N, 4, 5)
    params, run = record_training(apply_fn, PARAMS, X, SOFTMAX, tx, batches, Recorder(tmp_path, 8), extra_args=moments)
    assert max(residuals(RealizedPath(run, X_Q, 4), params, SOFTMAX)) < 1e-9
    plain = record(tmp_path / "plain", optax.adam(0.02), batches=batches)[0]
    assert np.abs(plain["a"] - params["a"]).max() > 1e-3, "the gate does something"
    with pytest.raises(TypeError, match=r"mean_grads.*extra_args\(params, batch\)"):
        RealizedPath(Recording(tmp_path, apply_fn, tx, SOFTMAX, X, run.params))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_residuals_fall_at_the_order_of_the_quadrature(tmp_path, name):
    """Steps half as long, twice as many: the error of q points falls 2^(2q)-fold, that of q = 2 to below 1e-5."""
    found = {}
    for scale, batches in ((1.0, minibatches(N, 4, 10)), (0.5, np.repeat(minibatches(N, 4, 10), 2, axis=0))):
        tx = {
            "sgd": optax.sgd(0.2 * scale),
            "adamw": optax.adamw(0.04 * scale, weight_decay=0.1),
        }[name]
        params, run = record(tmp_path / str(scale), tx, batches=batches)
        for points in (1, 2):
            found[scale, points] = max(residuals(RealizedPath(run, X_Q, points), params, SOFTMAX))
    assert found[1.0, 1] / found[0.5, 1] > 2.5
    assert found[1.0, 2] / found[0.5, 2] > 7
    assert found[0.5, 2] < 1e-5
    assert found[1.0, 2] < found[1.0, 1] / 20


@pytest.mark.parametrize("name", ["momentum", "gate before adam"])
def test_products_adjoints_and_matrices_agree(tmp_path, name):
    """More segments than one, so that states at their starts are kept and taken up again."""
    _, run = record(tmp_path, OPTIMIZERS[name], batches=minibatches(N, 4, 5), every=4)
    path = RealizedPath(run, X_Q)
    matrices, rng = dense_operators(path), np.random.default_rng(1)
    for which in NAMES:
        operator = RealizedOperator(path, which)
        matrix = matrices[which]
        assert operator.shape == matrix.shape == ((M if which == "test_transfer" else N) * OUTPUTS, N * OUTPUTS)
        x, y = rng.normal(size=(matrix.shape[1], 2)), rng.normal(size=(matrix.shape[0], 2))
        scale = float(jnp.abs(matrix).max())
        np.testing.assert_allclose(operator.mv(x), matrix @ x, atol=1e-11 * scale)
        np.testing.assert_allclose(operator.transpose_mv(y), matrix.T @ y, atol=1e-11 * scale)
    vector = rng.normal(size=N * OUTPUTS)
    np.testing.assert_allclose(RealizedOperator(path, "displacement").mv(vector), matrices["displacement"] @ vector)
    for which in ("gramian", "motion"):
        scale = float(jnp.abs(matrices[which]).max())
        np.testing.assert_allclose(
            matrices[which], matrices[which].T, atol=1e-12 * float(jnp.abs(matrices[which]).max())
        )


def test_against_operators_accumulated_in_numpy(tmp_path):
    """Mini-batch heavy-ball momentum on the squared loss, written out with whole Jacobians; one Gauss point."""
    rate, beta, batches = 0.05, 0.9, minibatches(N, 4, 4, replace=True)
    _, run = record(tmp_path, optax.sgd(rate, momentum=beta), loss=SQUARED, batches=batches, every=5)
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, PARAMS))

    def outputs(w, x):
        return apply_fn(unravel(w), x).ravel()

    def jacobian(w, x):
        return np.asarray(jax.jacobian(outputs)(w, x))

    size, targets = N * OUTPUTS, np.asarray(SQUARED.targets).ravel()
    w, trace = np.asarray(flat), np.zeros(flat.size)
    p, w_s, d, g_q, v = np.eye(size), *np.zeros((2, size, size)), np.zeros((M * OUTPUTS, size)), np.zeros((size, size))
    memory, reach = np.zeros((flat.size, size)), 0.0
    for batch in batches:
        weights = np.repeat(np.bincount(batch, minlength=N) * N / len(batch), OUTPUTS)[:, None]
        at = jacobian(w, X)
        trace = beta * trace + at.T @ (weights[:, 0] * (np.asarray(outputs(w, X)) - targets) / N)
        memory, reach = beta * memory + at.T @ (weights * p), beta * reach + 1
        step, moves = -rate * trace, -rate * memory
        s, s_q = jacobian(w + step / 2, X) @ moves, jacobian(w + step / 2, X_Q) @ moves
        w_s -= (p.T @ s + s.T @ p) / 2 + s.T @ s / (2 * N)
        v += moves.T @ moves / (rate * reach)
        p, d, g_q, w = p + s / N, d - s, g_q - s_q, w + step
    found = dense_operators(RealizedPath(run, X_Q, 1))
    for name, expected in zip(NAMES, (p, w_s, v, d, g_q), strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())


def test_full_batch_descent_on_the_squared_loss_has_the_closed_form(tmp_path):
    """W = (n/2)(I − PᵀP) and D = n(I − P), to rounding whatever the quadrature; not for another loss."""
    batches = np.tile(np.arange(N), (20, 1))
    for loss, holds in ((SQUARED, True), (SOFTMAX, False)):
        _, run = record(tmp_path / loss.name, optax.sgd(0.3), loss=loss, batches=batches)
        found = dense_operators(RealizedPath(run, X_Q, 1))
        p, identity = found["propagator"], np.eye(N * OUTPUTS)
        missed = np.linalg.norm(found["gramian"] - N / 2 * (identity - p.T @ p)) / np.linalg.norm(found["gramian"])
        assert (missed < 1e-12) == holds
        assert holds or missed > 0.1
        if holds:
            np.testing.assert_allclose(found["displacement"], N * (identity - p), atol=1e-12)
            assert np.linalg.eigvalsh(found["gramian"])[0] > -1e-10


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "gate on the step"])
def test_what_never_moved_the_parameters_is_invisible_at_test(tmp_path, name):
    """(I6′) for every eigenvector of V; V is positive semi-definite; W of mini-batches need not be."""
    _, run = record(tmp_path, OPTIMIZERS[name])
    path = RealizedPath(run, X_Q)
    sweep, found = path.forward(np.eye(N * OUTPUTS)), dense_operators(path)
    values, vectors = np.linalg.eigh(found["motion"])
    assert values[0] >= -1e-12 * values[-1]
    seen = np.sum((np.asarray(found["test_transfer"]) @ vectors) ** 2, axis=0)
    assert (seen <= float(sweep.sums.visibility) * values + 1e-12 * seen.max()).all()
    assert name != "adam" or np.linalg.eigvalsh(found["gramian"])[0] < 0


def test_the_motion_gramian_tends_to_w_in_the_flow_limit(tmp_path):
    away = []
    for steps in (50, 100):
        batches = np.tile(np.arange(N), (steps, 1))
        _, run = record(tmp_path / str(steps), optax.sgd(5.0 / steps), loss=SQUARED, batches=batches)
        found = dense_operators(RealizedPath(run))
        away.append(np.linalg.norm(found["motion"] - found["gramian"]) / np.linalg.norm(found["gramian"]))
    assert 1.8 < away[0] / away[1] < 2.2
    assert away[1] < 0.05


def test_a_run_that_begins_with_momentum(tmp_path):
    """What an optimizer remembers from before the recording is forced, not a response to its first gradient."""
    tx, batches = optax.sgd(0.02, momentum=0.9), minibatches(N, 4, 8)
    record(tmp_path / "before", tx, batches=batches)
    (*_, last) = Recording(tmp_path / "before", apply_fn, tx, SOFTMAX, X, PARAMS).segments()
    recorder = Recorder(tmp_path / "after", every=8)
    recorder.start(*last.end)
    state, _ = train(apply_fn, tx, SOFTMAX, X, last.end, jnp.asarray(batches[:8]))
    recorder.update(batches[:8], *state)
    recorder.close()
    run = Recording(tmp_path / "after", apply_fn, tx, SOFTMAX, X, PARAMS)
    sweep = RealizedPath(run, X_Q, 4).forward(SOFTMAX.grad(apply_fn(run.params, X))[None])
    moved = (apply_fn(state.params, X) - apply_fn(run.params, X)).ravel()
    np.testing.assert_allclose(sweep.sums.moved.sum(0), moved, rtol=1e-8, atol=1e-10)
    assert np.linalg.norm(sweep.sums.moved[1]) > 0.1 * np.linalg.norm(moved)


def test_states_that_were_not_kept_are_computed_again(tmp_path):
    """A run kept every 40 steps is swept 16 steps at a time, both ways, as one kept every 8."""
    batches, psi = minibatches(N, 4, 16), np.random.default_rng(0).normal(size=(2, N * OUTPUTS))
    seldom, often = (record(tmp_path / str(k), OPTIMIZERS["adamw"], batches=batches, every=k)[1] for k in (40, 8))
    for backwards in (False, True):
        pieces = list(seldom.segments(backwards=backwards, at_most=16))
        steps = [(piece.step, len(piece.batches)) for piece in pieces]
        assert sorted(steps) == [(0, 16), (16, 16), (32, 8), (40, 8)]
        assert steps == sorted(steps, reverse=backwards)
    kept = {segment.step: segment.start for segment in often.segments()}
    for piece in pieces:
        for a, b in zip(*map(jax.tree.leaves, (piece.start, kept[piece.step])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)
    one, other = (RealizedPath(run, X_Q, 1) for run in (seldom, often))
    np.testing.assert_allclose(one.forward(psi).sums.gramian, other.forward(psi).sums.gramian, rtol=1e-8)
    np.testing.assert_allclose(one.backward(psi, of="gramian"), other.backward(psi, of="gramian"), rtol=1e-7)


def test_without_test_points(tmp_path):
    _, run = record(tmp_path, OPTIMIZERS["adam"], batches=minibatches(N, 4, 2))
    assert dense_operators(RealizedPath(run))["test_transfer"].shape == (0, N * OUTPUTS)


def test_single_precision_stays_single(tmp_path):
    params = jax.tree.map(jnp.float32, PARAMS)
    _, run = record_training(
        apply_fn, params, jnp.float32(X), SOFTMAX, OPTIMIZERS["adam"], minibatches(N, 4, 3), Recorder(tmp_path)
    )
    sweep = RealizedPath(run, jnp.float32(X_Q)).forward(np.ones((1, N * OUTPUTS)))
    assert {leaf.dtype for leaf in jax.tree.leaves((sweep.sums, sweep.probes))} == {jnp.dtype("float32")}


def test_a_run_that_cannot_be_computed_again_is_refused(tmp_path):
    """Recorded with one learning rate, analysed with another."""
    _, run = record(tmp_path, optax.sgd(0.1))
    other = Recording(tmp_path, apply_fn, optax.sgd(0.2), SOFTMAX, X, run.params)
    with pytest.raises(ValueError, match="cannot be computed again"):
        RealizedPath(other).forward(np.ones((1, N * OUTPUTS)))


def test_bad_arguments(tmp_path):
    _, run = record(tmp_path, optax.sgd(0.1), batches=minibatches(N, 4, 1))
    with pytest.raises(ValueError, match="quadrature=0"):
        RealizedPath(run, quadrature=0)
    with pytest.raises(ValueError, match="must be one of"):
        RealizedOperator(RealizedPath(run), "jacobian")
    with pytest.raises(ValueError, match=r"\(35,\).*\(36,\)"):
        RealizedOperator(RealizedPath(run), "gramian").mv(np.ones(35))


def test_a_model_that_jax_cannot_batch(tmp_path):
    """A layer in `jax.lax.ragged_dot`, against the same layer as a product."""
    batches = minibatches(N, 4, 2)

    def grouped(params, x):
        sizes = jnp.array([len(x)], jnp.int32)
        return jax.lax.ragged_dot(jnp.tanh(x @ params["a"]), params["b"][None], sizes)

    sums = []
    for name, model in (("grouped", grouped), ("plain", apply_fn)):
        recorder = Recorder(tmp_path / name)
        _, run = record_training(model, PARAMS, X, SOFTMAX, OPTIMIZERS["adam"], batches, recorder)
        sums.append(RealizedPath(run, X_Q).forward(np.eye(N * OUTPUTS)[:2]).sums)
    for one, other in zip(*map(jax.tree.leaves, sums), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
