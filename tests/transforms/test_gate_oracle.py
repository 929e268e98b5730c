"""The gate against an independent NumPy transcription of Algorithm 1, and against what its noise level implies."""

import functools

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
    PerTensor,
    SnrMask,
    SoftMask,
    TStatistic,
    adam_moments_statistic,
    adam_statistic,
    algorithm_1,
    ema_statistic,
    finite_data_alpha,
    poprisk_adamw,
    poprisk_gate,
    popriskmin,
    snr_grad,
)

LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, RHO = 0.1, 0.8, 0.95, 1e-8, 0.3, 0.9


def hard(m, s, tau):
    return 1.0 if m * m > tau * s else 0.0


def soft(m, s, tau, lam=0.5, eps=1e-3):
    excess = max(m * m - tau * s, 0.0)
    return excess / (excess + lam * s + eps)


def snr(m, s, tau, lam=2.0, eps=1e-3):
    return m * m / (m * m + lam * tau * s + eps)


MASKS = {
    "hard": (HardMask(), hard),
    "soft": (SoftMask(lam=0.5, eps=1e-3), soft),
    "snr": (SnrMask(lam=2.0, eps=1e-3), snr),
}


def gated_gradient(**options):
    gate = poprisk_gate(statistic=ema_statistic(B1, RHO), **options)
    return optax.chain(gate, optax.adam(LEARNING_RATE, B1, B2, EPS))


def gated_step(**options):
    return poprisk_gate(optax.adam(LEARNING_RATE, B1, B2, EPS), statistic=ema_statistic(B1, RHO), **options)


def gated_adamw(**options):
    inner = optax.adamw(LEARNING_RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY)
    return poprisk_gate(inner, statistic=ema_statistic(B1, RHO), **options)


def decay_outside(**options):
    return poprisk_adamw(
        LEARNING_RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY, statistic=adam_statistic(RHO), **options
    )


PLACEMENTS = {
    "gradient": gated_gradient,
    "step": gated_step,
    "step with decay": gated_adamw,
    "decay outside": decay_outside,
}


def noise_ratio(b1, rho, t):
    """Var m̂ / E ŝ after t steps, from the weights of each gradient in the mean and in every deviation."""
    total = sum((1 - b1) * b1 ** (t - i) for i in range(1, t + 1))
    of_mean = sum(((1 - b1) * b1 ** (t - i) / total) ** 2 for i in range(1, t + 1))
    of_variance = sums = 0.0
    for i in range(1, t + 1):
        weight = (1 - rho) * rho ** (t - i)
        sums += weight
        of_variance += weight * (1 + sum(((1 - b1) * b1 ** (i - 1 - j)) ** 2 for j in range(1, i)))
    return of_mean / (of_variance / sums)


def oracle(placement, q_of, gradients, weight, *, b1=B1, rho=RHO, decay=WEIGHT_DECAY, unit=lambda t: 1.0):
    """Updates of one scalar parameter, step by step, in plain Python."""
    mean = variance = m = v = 0.0
    updates = []
    for t, g in enumerate(gradients, start=1):
        variance = rho * variance + (1 - rho) * (g - mean) ** 2
        mean = b1 * mean + (1 - b1) * g
        q = q_of(mean / (1 - b1**t), unit(t) * variance / (1 - rho**t))
        seen = q * g if placement == "gradient" else g
        m = b1 * m + (1 - b1) * seen
        v = B2 * v + (1 - B2) * seen**2
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
        update = {
            "gradient": -LEARNING_RATE * direction,
            "step": -LEARNING_RATE * q * direction,
            "step with decay": -LEARNING_RATE * q * (direction + decay * weight),
            "decay outside": -LEARNING_RATE * (q * direction + decay * weight),
        }[placement]
        updates.append(update)
        weight += update
    return updates


RUNS = {}  # one compilation an optimizer


def updates_and_expected(tx, one_scalar, gradients, weights):
    """Every coordinate's updates in float64, and those of `one_scalar(gradients, weight)`."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    with jax.enable_x64(True):
        params = jnp.asarray(weights)
        run = RUNS.setdefault(tx, jax.jit(lambda start, gradients: jax.lax.scan(step, start, gradients)[1]))
        ours = run((params, tx.init(params)), jnp.asarray(gradients))
    expected = [one_scalar(gradients[(slice(None), *i)], weights[i]) for i in np.ndindex(*weights.shape)]
    expected = np.moveaxis(np.array(expected), 0, -1).reshape(gradients.shape)
    return np.asarray(ours), expected


ALGORITHM_1 = {
    (placement, mask): PLACEMENTS[placement](mask=MASKS[mask][0], threshold=Alpha(0.7), summary=None)
    for placement in PLACEMENTS
    for mask in MASKS
}
GENERATE = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # smaller examples say no more here
VALUES = st.floats(-50, 50).map(lambda x: round(x, 3))


@pytest.mark.parametrize(("placement", "mask_name"), ALGORITHM_1)
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True, phases=GENERATE)
@hypothesis.given(
    gradients=hypothesis.extra.numpy.arrays(np.float64, (6, 2, 3), elements=VALUES),
    weights=hypothesis.extra.numpy.arrays(np.float64, (2, 3), elements=VALUES),
)
def test_updates_equal_a_scalar_transcription_of_algorithm_1(placement, mask_name, gradients, weights):
    q_of = functools.partial(MASKS[mask_name][1], tau=0.7)
    tx, expected_of = ALGORITHM_1[placement, mask_name], functools.partial(oracle, placement, q_of)
    ours, expected = updates_and_expected(tx, expected_of, gradients, weights)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-10)


GRADIENTS = np.random.default_rng(0).normal(0.4, 1.0, (8, 5))
WEIGHTS = np.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mask_name", MASKS)
def test_the_calibrated_gate_equals_a_scalar_transcription(placement, mask_name):
    """`TStatistic` with its noise ratio added up from the weights, not from a closed form."""
    mask, q_of = MASKS[mask_name]
    tx = PLACEMENTS[placement](mask=mask, threshold=TStatistic(0.8), summary=None)
    expected_of = functools.partial(
        oracle, placement, lambda m, s: q_of(m, s, 0.8**2), unit=lambda t: noise_ratio(B1, RHO, t)
    )
    ours, expected = updates_and_expected(tx, expected_of, GRADIENTS, WEIGHTS)
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-9)


PRESETS = {
    "algorithm_1": (algorithm_1, 0.01, lambda m, s: soft(m, s, 1.0, 1.0, 1e-8)),
    "popriskmin": (popriskmin, 0.01, lambda m, s: snr(m, s, 1.0, 1.0, 1e-8)),
    "snr_grad": (snr_grad, 0.0, lambda m, s: snr(m, s, 1.0, 1.0, 1e-12)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_with_their_defaults_equal_a_scalar_transcription(name):
    make, decay, q_of = PRESETS[name]
    expected_of = functools.partial(oracle, "decay outside", q_of, b1=0.9, rho=0.99, decay=decay)
    ours, expected = updates_and_expected(make(LEARNING_RATE, b2=B2, summary=None), expected_of, GRADIENTS, WEIGHTS)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_with_other_masks_and_alpha(name, mask_name):
    mask, q_of = MASKS[mask_name]
    tx = PRESETS[name][0](LEARNING_RATE, WEIGHT_DECAY, alpha=0.3, mask=mask, rho=RHO, b1=B1, b2=B2, summary=None)
    ours, expected = updates_and_expected(
        tx, functools.partial(oracle, "decay outside", lambda m, s: q_of(m, s, 0.3)), GRADIENTS, WEIGHTS
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-10)


def test_popriskmin_per_tensor():
    """Means over the tensor, of the squared mean as of the variance."""
    tx = popriskmin(LEARNING_RATE, 0.0, reduction=PerTensor(), b2=B2, summary=None)
    state, params, update = tx.init(jnp.zeros(5)), jnp.zeros(5), jax.jit(tx.update)
    mean = variance = m = v = np.zeros(5)
    for t, gradient in enumerate(GRADIENTS, start=1):
        updates, state = update(jnp.asarray(gradient, jnp.float32), state, params)
        variance = 0.99 * variance + 0.01 * (gradient - mean) ** 2
        mean = 0.9 * mean + 0.1 * gradient
        m, v = mean, B2 * v + (1 - B2) * gradient**2
        q = snr(np.sqrt(np.mean((mean / (1 - 0.9**t)) ** 2)), np.mean(variance / (1 - 0.99**t)), 1.0, 1.0, 1e-8)
        direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - B2**t)) + 1e-8)
        np.testing.assert_allclose(updates, -LEARNING_RATE * q * direction, rtol=1e-4)


def test_adam_moments_statistic_is_the_weighted_variance_about_the_weighted_mean():
    options = {"statistic": adam_moments_statistic(), "mask": SnrMask(), "summary": None}
    tx = poprisk_adamw(LEARNING_RATE, 0.8, 0.8, EPS, weight_decay=0.0, **options)
    state, params, update = tx.init(jnp.zeros(5)), jnp.zeros(5), jax.jit(tx.update)
    for t in range(1, 9):
        updates, state = update(jnp.asarray(GRADIENTS[t - 1], jnp.float32), state, params)
        w = 0.8 ** np.arange(t - 1, -1, -1.0)
        w /= w.sum()
        past = GRADIENTS[:t]
        mean, c = w @ past, w @ w
        spread = w @ (past - mean) ** 2 / (1 - c) if t > 1 else mean**2
        q = mean**2 / (mean**2 + c * spread)
        np.testing.assert_allclose(
            updates, -LEARNING_RATE * q * mean / (np.sqrt(w @ past**2) + EPS), rtol=1e-3, atol=1e-7
        )


def test_the_deviation_is_taken_from_the_raw_previous_mean():
    statistic = ema_statistic(b1=0.5, rho=0.5)
    state = statistic.init(jnp.zeros(()))
    for gradient in (1.0, 3.0):
        state, moments = statistic.update(jnp.asarray(gradient), state)
    # m = 0.5 after one step (1.0 if it were bias-corrected), s = 0.5·0.5 + 0.5·(3 - 0.5)².
    np.testing.assert_allclose(state.variance, 3.375, rtol=1e-6)
    np.testing.assert_allclose(moments.variance, 3.375 / 0.75, rtol=1e-6)
    np.testing.assert_allclose(moments.mean, (0.5 * 0.5 + 0.5 * 3) / 0.75, rtol=1e-6)
    np.testing.assert_allclose(moments.noise_ratio, noise_ratio(0.5, 0.5, 2), rtol=1e-6)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("rho", [0.0, 0.999])
def test_first_step_is_on_the_hard_threshold_hence_shut(b1, rho, jit):
    gradients = jax.random.normal(jax.random.key(0), (200,))
    for threshold in (Alpha(1.0), TStatistic(1.0)):
        statistic = ema_statistic(b1, rho)
        tx = poprisk_gate(statistic=statistic, threshold=threshold, mask=HardMask(), summary=None)
        update = jax.jit(tx.update) if jit else tx.update
        updates, _ = update(gradients, tx.init(gradients))
        np.testing.assert_array_equal(updates, 0.0)
    _, moments = statistic.update(gradients, statistic.init(gradients))
    np.testing.assert_allclose(moments.mean, gradients, rtol=1e-6)
    np.testing.assert_allclose(moments.variance, gradients**2, rtol=2e-5)


def test_gate_and_poprisk_adamw_differ_by_the_decay_alone():
    shut = {"threshold": TStatistic(1e3), "mask": HardMask()}
    gate = poprisk_gate(optax.adamw(0.1, weight_decay=0.5), **shut)
    ours = poprisk_adamw(0.1, weight_decay=0.5, **shut)
    params, gradients = jnp.array([2.0]), jnp.array([1.0])
    still, _ = gate.update(gradients, gate.init(params), params)
    decayed, _ = ours.update(gradients, ours.init(params), params)
    np.testing.assert_allclose(still, 0.0)
    np.testing.assert_allclose(decayed, -0.1 * 0.5 * params)


@pytest.mark.parametrize(
    ("alpha", "low", "high"),
    [
        (1.0, 0.0, 1e-4),  # a 4.5-sigma test: 0.0008 %
        (1 / 127, 0.66, 0.72),  # ŝ/(b - 1) with b = 128, a scale error seen in ports: 69 %
        (finite_data_alpha(128, 60_000), 0.82, 0.86),  # b/(n - b): 84 %
    ],
)
def test_share_of_pure_noise_that_the_published_thresholds_leave_open(alpha, low, high):
    statistic = ema_statistic()

    def step(state, key):
        return statistic.update(jax.random.normal(key, (50_000,)), state)[0], None

    @jax.jit
    def moments():
        keys = jax.random.split(jax.random.key(1), 301)
        state, _ = jax.lax.scan(step, statistic.init(jnp.zeros(50_000)), keys[:-1])
        return statistic.update(jax.random.normal(keys[-1], (50_000,)), state)[1]

    mean, variance, *_ = moments()
    unit, tau = Alpha(alpha).level(moments(), jnp.array(0))
    share = HardMask().openness(mean**2, unit * variance, tau(1)).mean()
    assert low <= share <= high
    np.testing.assert_allclose(jnp.square(mean).mean() / variance.mean(), noise_ratio(0.9, 0.99, 301), rtol=0.03)
