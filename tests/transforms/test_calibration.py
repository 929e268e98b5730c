"""What the gate opens on pure noise: the share that was asked for, whatever the statistic, batch size, step and tails.

The exact share under Gaussian noise comes from matrices written out in NumPy: a streaming statistic's mean is wᵀg and
its variance gᵀA g, so that P(t² > tau) is a probability of a quadratic form, which Imhof's integral gives.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from transforms import (
    ByLabel,
    HardMask,
    OpenShare,
    PerRow,
    PerTensor,
    SnrMask,
    TStatistic,
    _null_distribution,
    adam_moments_statistic,
    adam_statistic,
    batch_statistic,
    ema_statistic,
    finite_data_alpha,
    poprisk_adamw,
    poprisk_gate,
)

SHARES = (0.05, 0.32, 0.6)
POINT = 0.01
STEPS = (3, 10, 100)
NUM_COORDINATES = 40_000
THRESHOLD_FOR = jax.jit(_null_distribution.threshold_for)


# ---------------------------------------------------------------- exact shares, by matrices


def weights(decay, t):
    """Of a bias-corrected moving average, oldest value first."""
    w = (1 - decay) * decay ** np.arange(t - 1, -1, -1.0)
    return w / w.sum()


def ema_matrices(b1, rho, t):
    """w and A with m̂ = wᵀg and ŝ = gᵀA g, for `ema_statistic` and `adam_statistic`."""
    form = np.zeros((t, t))
    for i, share in enumerate(weights(rho, t)):
        deviation = np.zeros(t)
        deviation[i] = 1
        deviation[:i] -= (1 - b1) * b1 ** np.arange(i - 1, -1, -1.0)  # the raw mean of the values before
        form += share * np.outer(deviation, deviation)
    return weights(b1, t), form


def adam_moments_matrices(b1, b2, t):
    w = weights(b1, t)
    return w, (np.diag(weights(b2, t)) - np.outer(w, w)) / (1 - w @ w)


def exact_share(w, form, tau):
    """P(m̂² > tau c ŝ) for Gaussian g, c = wᵀw/tr A, by Imhof's integral at 0."""
    ratio = w @ w / np.trace(form)
    values = np.linalg.eigvalsh(np.outer(w, w) - tau * ratio * form)
    values = values[np.abs(values) > 1e-12 * np.abs(values).max()] / np.abs(values).max()
    u = np.exp(np.linspace(-16, 16, 1601))[:, None]
    angle = np.arctan(values * u).sum(1) / 2
    damping = np.exp(-np.log1p((values * u) ** 2).sum(1) / 4)
    return 0.5 + np.trapezoid(np.sin(angle) * damping, np.log(u[:, 0])) / np.pi


MATRICES = {
    "ema": (ema_matrices, 0.9, 0.99),
    "ema, short mean": (ema_matrices, 0.8, 0.99),
    "ema, long mean": (ema_matrices, 0.98, 0.95),
    "ema, where both decays meet": (ema_matrices, 0.9, 0.81),
    "adam moments, b1 = b2": (adam_moments_matrices, 0.9, 0.9),
    "adam moments, b1 < b2": (adam_moments_matrices, 0.9, 0.99),
    "adam moments, Adam's usual": (adam_moments_matrices, 0.9, 0.999),
}


def moments_at(name, t, data_noise=0.0):
    """What the statistic itself says of its noise after t steps."""
    matrices, first, second = MATRICES[name]
    grads = jnp.zeros(1)
    if matrices is ema_matrices:
        statistic = ema_statistic(first, second, data_noise=data_noise)
        state = statistic.init(grads)._replace(step=jnp.array(t - 1, jnp.int32))
        return statistic.update(grads, state)[1]
    statistic = adam_moments_statistic(data_noise=data_noise)
    adam = optax.ScaleByAdamState(count=jnp.array(t, jnp.int32), mu=grads, nu=grads)
    return statistic.update(grads, statistic.init(grads), new_inner_state=adam, b1=first, b2=second)[1]


@pytest.mark.parametrize("t", [2, 3, 10, 100])
@pytest.mark.parametrize("name", MATRICES)
def test_null_constants_equal_those_of_matrices_written_out(name, t):
    make, first, second = MATRICES[name]
    w, form = make(first, second, t)
    trace, own = np.trace(form), w @ form @ w
    moments = moments_at(name, t, data_noise=0.25)
    np.testing.assert_allclose(moments.noise_ratio, w @ w / trace + 0.25, rtol=2e-5)
    overlap = own / (w @ w * trace)
    np.testing.assert_allclose(moments.overlap, overlap, rtol=1e-4, atol=1e-5)
    if make is adam_moments_matrices:  # Satterthwaite's, of the whole form
        np.testing.assert_allclose(moments.dof, trace**2 / (form**2).sum(), rtol=2e-3)


@pytest.mark.parametrize("name", MATRICES)
def test_exact_share_of_gaussian_noise_is_the_stated_one_at_every_step(name):
    make, first, second = MATRICES[name]
    for t in (3, 10, 100):
        moments = moments_at(name, t)
        w, form = make(first, second, t)
        for share in SHARES:
            tau = _null_distribution.t_squared(THRESHOLD_FOR(share, moments.dof), moments.overlap)
            assert abs(exact_share(w, form, float(tau)) - share) < POINT, (t, share)
        # What a report calls the share of the leave-one-out rule on pure noise.
        told = _null_distribution.share_above(_null_distribution.f_value(1.0, moments.overlap), moments.dof)
        assert abs(exact_share(w, form, 1.0) - told) < POINT, t


@pytest.mark.parametrize(
    ("b1", "t", "low", "high"), [(0.0, 3, 0.08, 0.09), (0.0, 30, 0.0, 0.005), (0.5, 3, 0.02, 0.04)]
)
def test_limit_of_short_means_at_the_first_steps(b1, t, low, high):
    """A mean of one or two batches is not independent of their deviations from each other: more open than stated."""
    w, form = ema_matrices(b1, 0.99, t)
    statistic = ema_statistic(b1)
    state = statistic.init(jnp.zeros(1))._replace(step=jnp.array(t - 1, jnp.int32))
    _, moments = statistic.update(jnp.zeros(1), state)
    tau = _null_distribution.t_squared(THRESHOLD_FOR(0.05, moments.dof), moments.overlap)
    assert low <= exact_share(w, form, float(tau)) - 0.05 <= high


def test_imhof_s_integral_against_the_t_distribution():
    """The oracle itself, where the share is known: mean and variance of a plain sample of seven."""
    w = np.full(7, 1 / 7)
    form = np.eye(7) / 7 - np.outer(w, w)
    np.testing.assert_allclose(exact_share(w, form, 2.0), 2 * scipy.stats.t.sf(np.sqrt(2.0), 6), atol=1e-6)


# ---------------------------------------------------------------- the F distribution


@pytest.mark.parametrize("count", [1, 2, 5, 15, 40, 1e3, 1e6])
@pytest.mark.parametrize("dof", [1, 3, 18, 120, 1e5])
def test_null_distribution_against_scipy(count, dof):
    f = scipy.stats.f(count, count * dof)
    shares = np.array([0.001, 0.05, 0.32, 0.5, 0.9])
    np.testing.assert_allclose(_null_distribution.share_above(f.isf(shares), dof, count), shares, atol=0.004)
    back = f.sf(np.asarray(THRESHOLD_FOR(shares, dof, count), np.float64))
    np.testing.assert_allclose(back, shares, atol=0.004)


def test_null_distribution_at_its_ends():
    np.testing.assert_array_equal(_null_distribution.threshold_for(jnp.array([0.0, 1.0]), 9.0), [jnp.inf, 0.0])
    for overlap in (0.0, 0.3, -0.2):
        f = np.array([0.0, 0.5, 1.0, 2.0], np.float32)
        np.testing.assert_allclose(
            _null_distribution.f_value(_null_distribution.t_squared(f, overlap), overlap), f, rtol=1e-5
        )
    assert _null_distribution.t_squared(1e30, 0.25) == pytest.approx(4.0)  # no t² is above 1/overlap
    assert _null_distribution.t_squared(1e30, -0.25) == jnp.inf


# ---------------------------------------------------------------- simulation, through the gate itself

RNG = functools.partial(np.random.default_rng, 0)


def batch_means(noise, b, num_steps, num_coordinates=NUM_COORDINATES):
    """Mean gradients of batches of b examples of pure noise, exactly distributed."""
    rng, shape = RNG(), (num_steps, num_coordinates)
    if noise == "gaussian":
        return rng.standard_normal(shape, np.float32) / np.float32(b) ** 0.5
    if noise == "laplace":  # a difference of two exponential variables
        return (rng.standard_gamma(b, shape, np.float32) - rng.standard_gamma(b, shape, np.float32)) / b
    return np.mean([rng.standard_t(3, shape) for _ in range(b)], axis=0).astype(np.float32)


def batch_moments(noise, b, num_steps=1, num_coordinates=NUM_COORDINATES):
    """Mean and sum of squared deviations of b examples."""
    rng, shape = RNG(), (num_steps, num_coordinates)
    if noise == "gaussian" and b > 16:  # independent of each other, normal and chi-squared
        return batch_means(noise, b, num_steps, num_coordinates), rng.chisquare(b - 1, shape).astype(np.float32)
    shape = (b, *shape)
    examples = {
        "gaussian": lambda: rng.standard_normal(shape, np.float32),
        "laplace": lambda: rng.standard_exponential(shape, np.float32) * (2 * rng.integers(0, 2, shape) - 1),
        "student": lambda: rng.standard_t(3, shape),
    }[noise]()
    mean = examples.mean(0)
    return mean.astype(np.float32), np.square(examples - mean).sum(0).astype(np.float32)


def opened(make, thresholds, gradients, sum_sq_diff=None, sample_size=None):
    """Share of open coordinates, (step, threshold), of `make(threshold)`; thresholds are stacked in one object."""
    extra = {} if sum_sq_diff is None else {"sum_sq_diff_grads": jnp.asarray(sum_sq_diff)}
    params = jnp.zeros(gradients.shape[1:])

    @jax.jit
    @jax.vmap
    def run(threshold):
        tx = make(threshold=threshold, mask=HardMask(), summary=None)

        def step(state, inputs):
            gradient, extra = inputs
            sizes = {"sample_size": jnp.asarray(sample_size, jnp.float32)} if extra else {}
            updates, state = tx.update(gradient, state, params, **extra, **sizes)
            return state, (updates != 0).mean()

        return jax.lax.scan(step, tx.init(params), (jnp.asarray(gradients), extra))[1]

    return np.asarray(run(thresholds)).T


ALL_SHARES = OpenShare(jnp.array(SHARES))
STREAMING = {
    "ema_statistic": poprisk_gate,
    "adam_statistic": functools.partial(poprisk_adamw, 0.1, weight_decay=0.0),
    "ema_statistic, bfloat16": functools.partial(poprisk_gate, statistic=ema_statistic(state_dtype=jnp.bfloat16)),
    "adam_statistic, bfloat16": functools.partial(
        poprisk_adamw, 0.1, weight_decay=0.0, statistic=adam_statistic(state_dtype=jnp.bfloat16)
    ),
    "adam_moments_statistic, b1 = b2": functools.partial(
        poprisk_adamw, 0.1, 0.9, 0.9, weight_decay=0.0, statistic=adam_moments_statistic()
    ),
    "adam_moments_statistic, b1 < b2": functools.partial(
        poprisk_adamw, 0.1, weight_decay=0.0, statistic=adam_moments_statistic()
    ),
}


def errors_of(make, *stream, steps=STEPS):
    """Distance of the opened share from the stated one, in points, at some steps."""
    shares = opened(make, ALL_SHARES, *stream)
    return np.abs(shares[np.array(steps) - 1] - np.array(SHARES)) / POINT


@functools.cache
def stream(noise, b):
    return batch_means(noise, b, STEPS[-1])


@pytest.mark.parametrize(("noise", "b"), [("gaussian", 2), ("gaussian", 4096), ("laplace", 32), ("laplace", 4096)])
@pytest.mark.parametrize("make", STREAMING.values(), ids=STREAMING)
def test_streaming_statistics_open_the_stated_share(make, noise, b):
    assert errors_of(make, stream(noise, b)).max() < 1


@pytest.mark.parametrize(("noise", "within"), [("laplace", 2.5), ("student", 3.0)])
@pytest.mark.parametrize("make", STREAMING.values(), ids=STREAMING)
def test_streaming_limits_of_heavy_tails_in_batches_of_two(make, noise, within):
    """At the third step, six examples were seen. Student's t with 3 degrees of freedom has no fourth moment."""
    errors = errors_of(make, stream(noise, 2))
    assert 1 < errors.max() < within
    assert errors[1:].max() < (1 if noise == "laplace" else 2.25)


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize(
    ("noise", "b"),
    [("gaussian", 2), ("gaussian", 3), ("gaussian", 16), ("gaussian", 4096), ("laplace", 64), ("student", 128)],
)
def test_batch_statistic_opens_the_stated_share(noise, b, b1):
    steps, size = ((1,), NUM_COORDINATES) if b1 is None else ((1, 3, 10), NUM_COORDINATES // (4 if b > 16 else 1))
    make = functools.partial(poprisk_gate, statistic=batch_statistic(b1))
    errors = errors_of(make, *batch_moments(noise, b, steps[-1], size), b, steps=steps)
    assert errors.max() < 1


@pytest.mark.parametrize("noise", ["laplace", "student"])
@pytest.mark.parametrize("b", [2, 4, 16])
def test_within_batch_limit_of_heavy_tails_in_small_batches(noise, b):
    """Few heavy-tailed values have a t-statistic of lighter tails and a broader middle than Student's.

    Small shares come out up to two points smaller, shares around a half up to 4.5 points larger.
    """
    make = functools.partial(poprisk_gate, statistic=batch_statistic())
    found = (opened(make, ALL_SHARES, *batch_moments(noise, b), b)[0] - np.array(SHARES)) / POINT
    assert -2 < found[0] < 0
    assert 1 < np.abs(found).max() < 4.5


@pytest.mark.parametrize("b", [2, 5, 128, 4096])
def test_the_leave_one_out_rule_opens_what_student_s_t_says(b):
    make = functools.partial(poprisk_gate, statistic=batch_statistic())
    (share,) = opened(make, TStatistic(jnp.ones(1)), *batch_moments("gaussian", b), b)[0]
    assert abs(share - 2 * scipy.stats.t.sf(1, b - 1)) < POINT
    assert abs(share - (0.5 if b == 2 else 0.3173)) < (0.06 if b == 5 else POINT)


def test_the_leave_one_out_rule_in_streams_opens_its_exact_share():
    for name, make in STREAMING.items():
        shares = opened(make, TStatistic(jnp.ones(1)), stream("gaussian", 2))[:, 0]
        matrices = {"b1 = b2": (adam_moments_matrices, 0.9, 0.9), "b1 < b2": (adam_moments_matrices, 0.9, 0.999)}
        matrix, first, second = matrices.get(name.split(", ")[-1], (ema_matrices, 0.9, 0.99))
        for t in STEPS:
            assert abs(shares[t - 1] - exact_share(*matrix(first, second, t), 1.0)) < POINT, (name, t)


@pytest.mark.parametrize("name", ["ema_statistic", "adam_moments_statistic"])
def test_data_noise_allows_for_batches_redrawn_from_a_fixed_data_set(name):
    """Over redraws of the data set, the open share of coordinates whose population gradient is zero is as stated."""
    n, b, num_steps, num_orders = 64, 8, 60, 40
    rng = RNG()

    def means_in_one_order():
        data = rng.standard_normal((n, NUM_COORDINATES // num_orders), np.float32)
        return np.stack([data[rng.permutation(n)[:b]].mean(0) for _ in range(num_steps)])

    gradients = np.concatenate([means_in_one_order() for _ in range(num_orders)], axis=1)

    def make(data_noise, **options):
        if name == "ema_statistic":
            return poprisk_gate(statistic=ema_statistic(data_noise=data_noise), **options)
        statistic = adam_moments_statistic(data_noise=data_noise)
        return poprisk_adamw(0.1, 0.9, 0.9, weight_decay=0.0, statistic=statistic, **options)

    errors = errors_of(functools.partial(make, finite_data_alpha(b, n)), gradients, steps=(num_steps,))
    without = errors_of(functools.partial(make, 0.0), gradients, steps=(num_steps,))
    assert errors.max() < 1
    assert without.min() > 10  # the negative control


# ---------------------------------------------------------------- blocks


def blocks_opened(scales, b, num_blocks=20_000):
    """Share of open columns of independent noise within one batch, one block each."""
    mean, spread = (x.T for x in batch_moments("gaussian", b, num_blocks, len(scales)))
    tx = poprisk_gate(
        statistic=batch_statistic(),
        threshold=OpenShare(SHARES[1]),
        mask=HardMask(),
        reduction=PerRow(),
        summary=None,
    )
    gradients, spread = jnp.asarray(mean * scales[:, None]), jnp.asarray(spread * scales[:, None] ** 2)
    extra = {"sum_sq_diff_grads": spread, "sample_size": jnp.array(b)}
    updates, _ = jax.jit(tx.update)(gradients, tx.init(gradients), **extra)
    found = np.asarray(updates != 0)
    assert (found == found[:1]).all()
    return found[0].mean()


@pytest.mark.parametrize("num", [2, 6, 48])
@pytest.mark.parametrize("b", [4, 32])
def test_blocks_of_independent_noise_open_the_stated_share(num, b):
    assert abs(blocks_opened(np.ones(num, np.float32), b) - SHARES[1]) < POINT


def test_blocks_of_unequal_noise_open_nearly_the_stated_share():
    assert abs(blocks_opened(np.geomspace(1, 10, 12).astype(np.float32), 16) - SHARES[1]) < 2 * POINT


def test_tensors_and_labels_are_such_blocks():
    """`PerTensor` of a leaf, and `ByLabel` of its parts, see what `PerRow` sees of it as a column."""
    signal, noise = jnp.asarray(RNG().gamma(1.0, 1.0, (2, 6)), jnp.float32)
    column = PerRow().pool(signal[:, None], noise[:, None])
    tensor = PerTensor().pool(signal.reshape(2, 3), noise.reshape(2, 3))
    parts = [{"a": x[:2], "b": x[2:]} for x in (signal, noise)]
    label = ByLabel({"a": "one", "b": "one"}).pool(*parts)
    for other in (tensor, label["a"], label["b"]):
        for mine, theirs in zip(column, other, strict=True):
            np.testing.assert_allclose(np.ravel(mine), np.ravel(theirs), rtol=1e-6)


def test_thresholds_of_many_rows_are_those_of_each():
    counts = np.geomspace(1, 1e5, 200)
    many = THRESHOLD_FOR(0.05, 7.0, counts)
    each = jnp.stack([THRESHOLD_FOR(0.05, 7.0, count) for count in counts[::20]])
    np.testing.assert_allclose(many[::20], each, rtol=0.01)
    for share in (0.0, 1.0):
        np.testing.assert_array_equal(THRESHOLD_FOR(share, 7.0, counts), THRESHOLD_FOR(share, 7.0))


# ---------------------------------------------------------------- the leave-one-out identity


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), b=st.integers(2, 12), shift=st.floats(-2, 2))
def test_z_of_one_opens_just_the_coordinates_that_help_examples_held_out(seed, b, shift):
    """Equations (9) and (10), each example held out of its own batch in turn."""
    examples = np.random.default_rng(seed).standard_t(3, (b, 40)) + shift
    gain = np.mean([examples[i] * np.delete(examples, i, axis=0).mean(0) for i in range(b)], axis=0)
    mean = examples.mean(0)
    spread = np.square(examples - mean).sum(0)
    hypothesis.assume((np.abs(gain) > 1e-9 * np.square(examples).max(0)).all())
    with jax.enable_x64(True):
        tx = poprisk_gate(statistic=batch_statistic(), threshold=TStatistic(1.0), mask=HardMask(), summary=None)
        gradient = jnp.asarray(mean)
        extra = {"sum_sq_diff_grads": jnp.asarray(spread), "sample_size": b}
        updates, _ = tx.update(gradient, tx.init(gradient), **extra)
    np.testing.assert_array_equal(np.asarray(updates) != 0, gain > 0)


def test_the_statistic_s_own_parts_of_adam_statistic_are_those_of_ema_statistic():
    gradients = stream("gaussian", 2)[:12, :50]
    adam = poprisk_adamw(1.0, eps=0.0, weight_decay=0.0, statistic=adam_statistic(0.9), mask=SnrMask())
    gate = poprisk_gate(optax.scale_by_adam(eps=0.0), statistic=ema_statistic(0.9, 0.9), mask=SnrMask())
    params = jnp.zeros(50)
    adam_state, gate_state = adam.init(params), gate.init(params)
    for gradient in gradients:
        ours, adam_state = jax.jit(adam.update)(gradient, adam_state, params)
        theirs, gate_state = jax.jit(gate.update)(gradient, gate_state, params)
        np.testing.assert_allclose(ours, -theirs, rtol=1e-4, atol=1e-6)
