"""Channel, four cells, coupling and fill order against direct linear algebra on small runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramian import (
    AboveThreshold,
    AdaptiveStep,
    ChannelFill,
    TraceShare,
    coupling,
    fill_order,
    four_cells,
    gradient_flow,
    logistic_loss,
    signal_channel,
    squared_loss,
)

RNG = np.random.default_rng(0)
X_S, X_Q = jnp.asarray(RNG.normal(size=(9, 3))), jnp.asarray(RNG.normal(size=(5, 3)))
Y = jnp.asarray(RNG.choice([-1.0, 1.0], 9))
CLEAN = Y.at[:2].multiply(-1)


def mlp(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def mlp_params(width, seed=1):
    keys = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(keys[0], (3, width)), "v": jax.random.normal(keys[1], (width,)) / width}


def run(loss, width=8, **settings):
    return gradient_flow(mlp, mlp_params(width), X_S, loss, X_Q, t1=20.0, controller=AdaptiveStep(1e-5), **settings)


@pytest.fixture(scope="module")
def squared():
    return run(squared_loss(Y))


@pytest.fixture(scope="module")
def logistic():
    return run(logistic_loss(Y), width=2)  # 8 parameters for 9 outputs: K and D are singular


# ------------------------------------------------------------------------------------------------------------ channel


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(1e-3, 1.0))
def test_trace_share_takes_the_fewest_eigenvalues_that_hold_the_share(values, share):
    values = np.sort(values)[::-1]
    rank = TraceShare(share).rank(values)
    total = values.sum()
    if total == 0:
        assert rank == 0
        return
    assert values[:rank].sum() >= share * total * (1 - 1e-9)
    assert rank == 1 or values[: rank - 1].sum() < share * total


def test_threshold_counts_eigenvalues_above_it():
    assert signal_channel(np.diag([3.0, 1.0, 2.0]), AboveThreshold(1.5)).rank == 2
    assert signal_channel(np.diag([3.0, 1.0, 2.0]), AboveThreshold(5.0)).rank == 0


def test_the_rule_decides_the_rank(squared):
    ranks = [signal_channel(squared.operators.gramian, TraceShare(share)).rank for share in (0.5, 0.999)]
    assert ranks[0] < ranks[1]


def test_projections_split_output_space(squared):
    channel = signal_channel(squared.operators.gramian)
    v = RNG.normal(size=9)
    signal, reservoir = channel.signal(v), channel.reservoir(v)
    np.testing.assert_allclose(signal + reservoir, v, atol=1e-12)
    assert abs(signal @ reservoir) < 1e-12
    np.testing.assert_allclose(channel.signal(signal), signal, atol=1e-12)
    # W_S itself is split: the channel holds the larger eigenvalues.
    w = np.asarray(squared.operators.gramian)
    assert abs(signal @ w @ reservoir) < 1e-10
    np.testing.assert_allclose(channel.eigenvalues, np.sort(np.linalg.eigvalsh(w))[::-1], atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [(np.ones((2, 3)), "square"), (np.array([[1.0, 2.0], [0.0, 1.0]]), "symmetry"), (np.diag([np.nan, 1]), "finite")],
)
def test_a_matrix_that_is_no_gramian_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        signal_channel(matrix)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        TraceShare(share)


def test_negative_threshold_is_refused():
    with pytest.raises(ValueError, match="negative"):
        AboveThreshold(-1.0)


# -------------------------------------------------------------------------------------------------------------- cells


def test_cells_against_explicit_projections(squared):
    w, vectors = np.linalg.eigh(np.asarray(squared.operators.gramian))
    channel = signal_channel(squared.operators.gramian)
    u = np.asarray(mlp(squared.params0, X_S))
    g, clean = (u - np.asarray(Y)) / 9, (u - np.asarray(CLEAN)) / 9
    top, rest = vectors[:, -channel.rank :], vectors[:, : -channel.rank]
    cells = {(c.part, c.space): c for c in four_cells(squared, channel, squared_loss(CLEAN))}
    p, transfer = np.asarray(squared.operators.propagator), np.asarray(squared.operators.test_transfer)
    for part, vector in (("signal", clean), ("noise", g - clean)):
        for space, basis in (("channel", top), ("reservoir", rest)):
            v, cell = basis @ basis.T @ vector, cells[part, space]
            gramian = vectors @ np.diag(w) @ vectors.T
            np.testing.assert_allclose(cell.gradient, v @ v / (g @ g), rtol=1e-8)
            np.testing.assert_allclose(cell.dissipated, v @ gramian @ v / (g @ gramian @ g), rtol=1e-8)
            np.testing.assert_allclose(
                cell.test_motion, np.sum((transfer @ v) ** 2) / np.sum((transfer @ g) ** 2), rtol=1e-8
            )
            np.testing.assert_allclose(cell.left, np.linalg.norm(p @ v) / np.linalg.norm(v), rtol=1e-8)


def test_shares_add_up_to_one(squared):
    for clean in (None, squared_loss(CLEAN)):
        cells = four_cells(squared, signal_channel(squared.operators.gramian), clean)
        np.testing.assert_allclose(np.sum([c[2:5] for c in cells], axis=0), 1, atol=1e-12)
        assert len(cells) == (3 if clean is None else 5)


def test_noise_in_a_slow_direction_sits_in_the_reservoir():
    # Two decoupled examples, one learnt ten thousand times faster; the noise is on the slow one.
    x = jnp.diag(jnp.array([10.0, 0.1]))
    clean = jnp.array([1.0, 0.0])
    noisy = jnp.array([1.0, 1.0])
    flow = gradient_flow(lambda w, x: x @ w, jnp.zeros(2), x, squared_loss(noisy), x, t1=1.0)
    channel = signal_channel(flow.operators.gramian)
    cells = {(c.part, c.space): c for c in four_cells(flow, channel, squared_loss(clean))}
    assert channel.rank == 1
    assert cells["signal", "channel"].left < 1e-10
    assert cells["noise", "reservoir"].left > 0.99
    assert cells["noise", "reservoir"].gradient == pytest.approx(0.5)
    assert cells["noise", "reservoir"].dissipated < 0.02
    assert cells["noise", "channel"].gradient == pytest.approx(0, abs=1e-12)


def test_a_clean_loss_of_another_kind_is_refused(squared):
    channel = signal_channel(squared.operators.gramian)
    with pytest.raises(ValueError, match="build both alike"):
        four_cells(squared, channel, logistic_loss(CLEAN))
    with pytest.raises(ValueError, match="build both alike"):
        four_cells(squared, channel, squared_loss(CLEAN[:4]))


# ----------------------------------------------------------------------------------------------------------- coupling


def test_squared_loss_couples_exactly(squared):
    result = coupling(squared)
    g, d = np.asarray(squared.operators.test_transfer), np.asarray(squared.operators.displacement)
    np.testing.assert_allclose(result.matrix, np.linalg.lstsq(d.T, g.T, rcond=None)[0].T, rtol=1e-6)
    assert result.residual < 1e-10
    assert result.correlation > 0.9999
    assert result.relative_error < 1e-3
    observed = np.asarray(mlp(squared.params, X_Q) - mlp(squared.params0, X_Q))
    np.testing.assert_allclose(result.observed, observed, rtol=1e-12)


def test_general_loss_finds_the_best_linear_predictor(logistic):
    result = coupling(logistic)
    g, d, w = (np.asarray(logistic.operators._asdict()[k]) for k in ("test_transfer", "displacement", "gramian"))
    values, vectors = np.linalg.eigh(w)
    kept = values > 1e-12 * values.max()
    root = vectors[:, kept] / np.sqrt(values[kept])

    def miss(a):
        return np.linalg.norm((g - a @ d) @ root)

    best = miss(result.matrix)
    assert result.residual < 1e-8
    for seed in range(20):
        step = 1e-3 * np.random.default_rng(seed).normal(size=g.shape)
        assert miss(result.matrix + step) > best
    assert result.unexplained == pytest.approx(best / np.linalg.norm(g @ root), rel=1e-6)


def test_coupling_needs_test_points():
    flow = gradient_flow(mlp, mlp_params(4), X_S, squared_loss(Y), t1=1.0)
    with pytest.raises(ValueError, match="x_q"):
        coupling(flow)


# --------------------------------------------------------------------------------------------------------- fill order


def test_a_still_kernel_fills_from_the_top():
    scales = np.array([4.0, 1.0, 2.0])
    flow = gradient_flow(
        lambda w, x: x @ w,
        jnp.zeros(3),
        jnp.diag(jnp.asarray(scales)),
        squared_loss(jnp.ones(3)),
        t1=9.0,
        controller=AdaptiveStep(1e-3, first_step=0.01),
        observables={"fill": ChannelFill()},
    )
    result = fill_order(flow)
    np.testing.assert_allclose(result.eigenvalues, [16, 4, 1])
    assert result.correlation == pytest.approx(1)
    # v_iᵀWv_i = (n/2)(1 − exp(−2λt/n)) reaches half of its final value at about n log 2/(2λ).
    final = 1 - np.exp(-2 * result.eigenvalues * 9 / 3)
    exact = -3 / (2 * result.eigenvalues) * np.log(1 - final / 2)
    np.testing.assert_allclose(result.half_times, exact, rtol=0.3)


def test_fill_order_needs_its_record(squared):
    with pytest.raises(ValueError, match="ChannelFill"):
        fill_order(squared)
