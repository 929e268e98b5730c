"""Masks by themselves: formulas at chosen points, edge cases, and use with traced fields."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transforms import HardMask, SnrMask, SoftMask, ema_statistic, finite_data_alpha

ALL_MASKS = [
    HardMask(),
    HardMask(alpha=0.0),
    SoftMask(),
    SoftMask(alpha=0.0, lam=0.0, eps=0.0),
    SoftMask(alpha=1.0, lam=0.0, eps=0.0),
    SoftMask(eps=0.0),
    SoftMask(alpha=1e30, lam=1e30),
    SnrMask(),
    SnrMask(lam=0.0, eps=0.0),
    SnrMask(eps=0.0),
    SnrMask(alpha=1e30, lam=1e30),
    SnrMask(alpha=1e30, lam=0.0, eps=0.0),
]
NEUTRAL_MASKS = [SoftMask(alpha=0.0, lam=0.0, eps=0.0), SnrMask(lam=0.0, eps=0.0), SnrMask(alpha=0.0, eps=0.0)]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (HardMask(alpha=2.0), [0.0, 0.0, 1.0]),
        (SoftMask(alpha=2.0, lam=3.0, eps=1.0), [0.0, 0.0, 7 / (7 + 3 + 1)]),
        (SnrMask(alpha=2.0, lam=3.0, eps=1.0), [1 / (1 + 6 * 1 + 1), 2 / (2 + 6 * 1 + 1), 9 / (9 + 6 * 1 + 1)]),
    ],
)
def test_openness_at_chosen_points(mask, expected):
    mean = jnp.array([-1.0, jnp.sqrt(2.0), -3.0])  # below, at and above the threshold of 2
    np.testing.assert_allclose(mask.openness(mean, jnp.array([1.0, 1.0001, 1.0])), expected, rtol=1e-4)


@pytest.mark.parametrize("mask", [HardMask(), SoftMask(), SnrMask()])
def test_a_silent_coordinate_is_shut_by_default(mask):
    assert mask.openness(jnp.zeros(1), jnp.zeros(1)) == 0


@pytest.mark.parametrize("mask", [SoftMask(eps=0.0), SnrMask(eps=0.0)])
def test_a_silent_coordinate_is_open_without_eps(mask):
    assert mask.openness(jnp.zeros(1), jnp.zeros(1)) == 1


@pytest.mark.parametrize("mask", NEUTRAL_MASKS)
def test_neutral_masks_are_exactly_one(mask):
    mean = jnp.array([0.0, 0.0, 1e-30, 1.0, 3e38, 1.0])
    variance = jnp.array([0.0, 1.0, 0.0, 0.0, 1.0, jnp.inf])
    np.testing.assert_array_equal(mask.openness(mean, variance), 1.0)


def test_soft_mask_without_width_is_the_hard_mask():
    mean, variance = jnp.array([0.5, 1.5, 2.0]), jnp.ones(3)
    np.testing.assert_array_equal(
        SoftMask(alpha=1.0, lam=0.0, eps=0.0).openness(mean, variance), HardMask(alpha=1.0).openness(mean, variance)
    )


@pytest.mark.parametrize("rho", [0.0, 0.99])
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    gradients=hypothesis.extra.numpy.arrays(
        np.float32,
        (3, 12),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, 1.0, 1e-45, 1e-19, 3e19, float(np.finfo(np.float32).max)]).map(np.float32),
    )
)
def test_finite_gradients_never_give_nan_nor_leave_the_unit_interval(rho, gradients):
    statistic = ema_statistic(rho=rho)
    state = statistic.init(jnp.zeros(12))
    for gradient in gradients:
        state, moments = statistic.update(jnp.asarray(gradient), state)
        assert np.isfinite(state.variance).all()
        for mask in ALL_MASKS:
            q = np.asarray(mask.openness(*moments))
            assert ((q >= 0) & (q <= 1)).all(), mask


@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_huge_gradient_leaves_no_infinity_behind(state_dtype):
    statistic = ema_statistic(rho=0.5, state_dtype=state_dtype)
    state = statistic.init(jnp.zeros(1))
    largest = float(jnp.finfo(state_dtype).max)
    for gradient in (largest, -largest, largest, -largest):
        state, moments = statistic.update(jnp.full(1, gradient), state)
        assert all(jnp.isfinite(x).all() for x in (*state, *moments))
    before = state.variance
    for _ in range(8):
        state, _ = statistic.update(state.mean.astype(jnp.float32), state)
    assert state.variance < 0.01 * before


@pytest.mark.parametrize("mask", [SoftMask(eps=0.0), SnrMask(eps=0.0)])
def test_gradients_through_a_silent_coordinate_are_finite(mask):
    slope = jax.grad(lambda m, s: mask.openness(m, s).sum(), argnums=(0, 1))(jnp.zeros(2), jnp.zeros(2))
    assert all(jnp.isfinite(s).all() for s in slope)


@pytest.mark.parametrize("make", [HardMask, SoftMask, SnrMask])
def test_a_mask_is_an_argument_of_jit_and_vmap(make):
    mean, variance = jnp.array([0.5, 1.5, 2.5]), jnp.ones(3)
    traces = []

    @jax.jit
    def openness(mask):
        traces.append(mask)
        return mask.openness(mean, variance)

    alphas = jnp.array([0.1, 1.0, 4.0])
    swept = jax.vmap(openness)(jax.vmap(lambda alpha: make(alpha=alpha))(alphas))
    for alpha, q in zip(alphas, swept, strict=True):
        np.testing.assert_allclose(q, make(alpha=float(alpha)).openness(mean, variance), rtol=1e-6)
    assert (swept[0] != swept[2]).any()

    del traces[:]
    for alpha in (0.1, 1.0, 4.0):
        openness(make(alpha=alpha))
    assert len(traces) == 1


def test_a_mask_keeps_its_fields_through_flattening_and_is_frozen():
    mask = SoftMask(alpha=1.0, lam=2.0, eps=3.0)
    leaves, treedef = jax.tree.flatten(mask)
    assert leaves == [1.0, 2.0, 3.0]
    assert jax.tree.unflatten(treedef, leaves) == mask
    assert jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(mask)[1][0]) == ".lam"
    jax.tree.map(lambda _: object(), mask)  # placeholders pass
    with pytest.raises(AttributeError):
        mask.alpha = 2.0


def test_finite_data_alpha():
    assert finite_data_alpha(batch_size=128, num_examples=60_000) == 128 / (60_000 - 128)
    assert finite_data_alpha(np.int64(1), np.int64(2)) == 1.0
