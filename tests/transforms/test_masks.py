"""Masks by themselves: formulas at chosen points, edge cases, and use with traced fields."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transforms import (
    Alpha,
    HardMask,
    OpenShare,
    PerTensor,
    SnrMask,
    SoftMask,
    TStatistic,
    adam_moments_statistic,
    adam_statistic,
    batch_statistic,
    ema_statistic,
    finite_data_alpha,
    poprisk_adamw,
    poprisk_gate,
)

ALL_MASKS = [
    HardMask(),
    SoftMask(),
    SoftMask(lam=0.0),
    SoftMask(eps=1e-8),
    SoftMask(lam=1e30),
    SnrMask(),
    SnrMask(lam=0.0),
    SnrMask(eps=1e-8),
    SnrMask(lam=1e30),
]
ALL_OPENNESS = jax.jit(
    lambda *moments: [mask.openness(*moments, tau) for mask in ALL_MASKS for tau in (0.0, 1.0, 1e30, jnp.inf)]
)
NEUTRAL = [(SoftMask(lam=0.0), 0.0), (SnrMask(lam=0.0), 1.0), (SnrMask(), 0.0)]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (HardMask(), [0.0, 0.0, 1.0]),
        (SoftMask(lam=3.0, eps=1.0), [0.0, 0.0, 7 / (7 + 3 + 1)]),
        (SnrMask(lam=3.0, eps=1.0), [1 / (1 + 6 * 1 + 1), 2 / (2 + 6 * 1 + 1), 9 / (9 + 6 * 1 + 1)]),
    ],
)
def test_openness_at_chosen_points(mask, expected):
    signal = jnp.array([1.0, 2.0, 9.0])  # below, at and above the threshold of 2
    np.testing.assert_allclose(mask.openness(signal, jnp.array([1.0, 1.0001, 1.0]), 2.0), expected, rtol=1e-4)


@pytest.mark.parametrize("mask", [HardMask(), SoftMask(eps=1e-8), SnrMask(eps=1e-8)])
def test_a_silent_coordinate_is_shut_with_eps(mask):
    assert mask.openness(jnp.zeros(1), jnp.zeros(1), 1.0) == 0


@pytest.mark.parametrize("mask", [SoftMask(), SnrMask()])
def test_a_silent_coordinate_is_open_without_eps(mask):
    assert mask.openness(jnp.zeros(1), jnp.zeros(1), 1.0) == 1


@pytest.mark.parametrize(("mask", "tau"), NEUTRAL)
def test_neutral_masks_are_exactly_one(mask, tau):
    signal = jnp.array([0.0, 0.0, 1e-38, 1.0, 3e38, 1.0])
    noise = jnp.array([0.0, 1.0, 0.0, 0.0, 1.0, jnp.inf])
    np.testing.assert_array_equal(mask.openness(signal, noise, tau), 1.0)


def test_soft_mask_without_width_is_the_hard_mask():
    signal, noise = jnp.array([0.5, 1.5, 2.0]), jnp.ones(3)
    np.testing.assert_array_equal(
        SoftMask(lam=0.0).openness(signal, noise, 1.0), HardMask().openness(signal, noise, 1.0)
    )


STATISTICS_OF = {rho: ema_statistic(rho=rho) for rho in (0.0, 0.99)}
UPDATES = {rho: jax.jit(statistic.update) for rho, statistic in STATISTICS_OF.items()}


@pytest.mark.parametrize("rho", STATISTICS_OF)
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    gradients=hypothesis.extra.numpy.arrays(
        np.float32,
        (3, 12),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, 1.0, 1e-45, 1e-19, 3e19, float(np.finfo(np.float32).max)]).map(np.float32),
    )
)
def test_finite_gradients_never_give_nan_nor_leave_the_unit_interval(rho, gradients):
    statistic = STATISTICS_OF[rho]
    state = statistic.init(jnp.zeros(12))
    for gradient in gradients:
        state, moments = UPDATES[rho](jnp.asarray(gradient), state)
        assert np.isfinite(state.variance).all()
        for q in ALL_OPENNESS(moments.mean**2, moments.noise_ratio * moments.variance):
            assert ((q >= 0) & (q <= 1)).all()


RNG = np.random.default_rng(0)
STREAM = RNG.normal(0.3, 1.0, (6, 8)).astype(np.float32)
STATISTICS = {
    "ema": lambda **options: poprisk_gate(**options),
    "batch": lambda **options: poprisk_gate(statistic=batch_statistic(), **options),
    "batch, b1": lambda **options: poprisk_gate(statistic=batch_statistic(0.9), **options),
    # Without its eps, Adam's direction is free of the scale itself.
    "adam": lambda **options: poprisk_adamw(1.0, eps=0.0, weight_decay=0.0, statistic=adam_statistic(), **options),
    "adam moments": lambda **options: poprisk_adamw(
        1.0, 0.9, 0.9, eps=0.0, weight_decay=0.0, statistic=adam_moments_statistic(), **options
    ),
}


def openness_of(make, scales, **options):
    """q of the last step of a stream of gradients multiplied by each of `scales`."""
    gated, plain = make(**options, summary=None), make(floor=1.0, summary=None)

    def at_scale(scale):
        def step(states, gradient):
            extra = {"sum_sq_diff_grads": (1 + gradient**2) * scale**2, "sample_size": jnp.array(5)}
            pairs = [
                tx.update(gradient * scale, state, STREAM[0], **extra)
                for tx, state in zip((gated, plain), states, strict=True)
            ]
            updates, states = zip(*pairs, strict=True)
            return states, updates

        start = gated.init(STREAM[0]), plain.init(STREAM[0])
        updates, proposed = jax.lax.scan(step, start, jnp.asarray(STREAM))[1]
        return updates[-1] / proposed[-1]

    return np.asarray(jax.jit(jax.vmap(at_scale))(jnp.array(scales, jnp.float32)))


SCALES = (1.0, 1e-6, 1e-3, 1e3, 1e6)


@pytest.mark.parametrize("make", STATISTICS.values(), ids=STATISTICS)
@pytest.mark.parametrize(
    ("mask", "threshold"),
    [(HardMask(), Alpha(0.1)), (SoftMask(), TStatistic(0.5)), (SnrMask(lam=2.0), OpenShare(0.5))],
)
def test_openness_does_not_change_when_the_loss_is_rescaled(make, mask, threshold):
    usual, *others = openness_of(make, SCALES, mask=mask, threshold=threshold)
    for other in others:
        np.testing.assert_allclose(other, usual, rtol=2e-4, atol=1e-6)


def test_openness_of_blocks_does_not_change_when_the_loss_is_rescaled():
    options = {"mask": SnrMask(), "threshold": OpenShare(0.3), "reduction": PerTensor()}
    usual, *others = openness_of(STATISTICS["ema"], SCALES, **options)
    for other in others:
        np.testing.assert_allclose(other, usual, rtol=2e-4)


@pytest.mark.parametrize("mask", [SoftMask(eps=1e-8), SnrMask(eps=1e-8)])
def test_negative_control_an_absolute_eps_shuts_the_gate_for_a_small_loss(mask):
    usual, small = openness_of(STATISTICS["ema"], (1.0, 1e-6), mask=mask, threshold=TStatistic(0.5))
    assert usual.max() > 0.5
    assert small.max() < 1e-3


@pytest.mark.parametrize("state_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_huge_gradient_leaves_no_infinity_behind(dtype, state_dtype):
    statistic = ema_statistic(rho=0.5, state_dtype=state_dtype)
    state = statistic.init(jnp.zeros(1, dtype))
    largest = float(jnp.finfo(dtype).max)
    for gradient in (largest, -largest, largest, -largest):
        state, moments = statistic.update(jnp.full(1, gradient, dtype), state)
        assert all(jnp.isfinite(x).all() for x in state)
        assert not any(jnp.isnan(x).any() for x in moments)
    before = state.variance
    for _ in range(8):
        state, _ = statistic.update(state.mean.astype(jnp.float32), state)
    assert state.variance < 0.01 * before


@pytest.mark.parametrize("mask", [SoftMask(), SnrMask()])
def test_gradients_through_a_silent_coordinate_are_finite(mask):
    slope = jax.grad(lambda m, s: mask.openness(m, s, 1.0).sum(), argnums=(0, 1))(jnp.zeros(2), jnp.zeros(2))
    assert all(jnp.isfinite(s).all() for s in slope)


@pytest.mark.parametrize("make", [SoftMask, SnrMask])
def test_a_mask_is_an_argument_of_jit_and_vmap(make):
    signal, noise = jnp.array([0.5, 1.5, 2.5]), jnp.ones(3)
    traces = []

    @jax.jit
    def openness(mask):
        traces.append(mask)
        return mask.openness(signal, noise, 1.0)

    lams = jnp.array([0.1, 1.0, 4.0])
    swept = jax.vmap(openness)(jax.vmap(lambda lam: make(lam=lam))(lams))
    for lam, q in zip(lams, swept, strict=True):
        np.testing.assert_allclose(q, make(lam=float(lam)).openness(signal, noise, 1.0), rtol=1e-6)
    assert (swept[0] != swept[2]).any()

    del traces[:]
    for lam in (0.1, 1.0, 4.0):
        openness(make(lam=lam))
    assert len(traces) == 1


def test_a_mask_keeps_its_fields_through_flattening():
    mask = SoftMask(lam=2.0, eps=3.0)
    leaves, treedef = jax.tree.flatten(mask)
    assert leaves == [2.0, 3.0]
    assert jax.tree.unflatten(treedef, leaves) == mask
    assert jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(mask)[0][0]) == ".lam"
    jax.tree.map(lambda _: object(), mask)  # placeholders pass


def test_schedules_are_part_of_a_threshold_s_structure():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    assert not jax.tree.leaves(TStatistic(schedule))
    assert jax.tree.map(lambda x: x, TStatistic(schedule)) == TStatistic(schedule)
    assert jax.tree.leaves(OpenShare(0.3)) == [0.3]


def test_finite_data_alpha():
    assert finite_data_alpha(batch_size=128, num_examples=60_000) == 128 / (60_000 - 128)
    assert finite_data_alpha(np.int64(1), np.int64(2)) == 1.0
