"""The gate's arithmetic: half precision, decays near 0 and 1, sizes near the ends of the numbers, no NaN of its own.

Oracles are plain NumPy in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transforms import (
    Alpha,
    ByLabel,
    HardMask,
    OpenShare,
    PerRow,
    PerTensor,
    SnrMask,
    SoftMask,
    Summary,
    TStatistic,
    adam_moments_statistic,
    adam_statistic,
    batch_statistic,
    ema_statistic,
    poprisk_adamw,
    poprisk_gate,
)
from transforms._estimators.averages import one_minus_power, stochastically_rounded

HALVES = [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]
ADAMW = functools.partial(poprisk_adamw, 1.0, weight_decay=0.0)
FORMS = {
    "ema": poprisk_gate,
    "adam": ADAMW,
    "adam moments": functools.partial(ADAMW, 0.9, 0.9, statistic=adam_moments_statistic()),
    "batch": functools.partial(poprisk_gate, statistic=batch_statistic()),
    "batch, b1": functools.partial(poprisk_gate, statistic=batch_statistic(0.9)),
}


def moments_of(gradient, size=4):
    spread = jax.tree.map(lambda g: 7 * jnp.square(g.astype(jnp.float32)), gradient)
    return {"sum_sq_diff_grads": spread, "sample_size": jnp.array(size)}


def run(tx, gradients, params, *, size=4, jit=True):
    """Updates of the last step, and the state, in one scan or step by step."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params, **moments_of(gradient, size))
        return state, updates

    state = tx.init(params)
    if jit:
        state, updates = jax.jit(lambda state, gradients: jax.lax.scan(step, state, gradients))(state, gradients)
        return jax.tree.map(lambda u: u[-1], updates), state
    for t in range(len(jax.tree.leaves(gradients)[0])):
        state, updates = step(state, jax.tree.map(lambda g, t=t: g[t], gradients))
    return updates, state


def noise(num_steps, *shape, size=1.0, dtype=jnp.float32):
    return jnp.asarray(size * np.random.default_rng(0).normal(size=(num_steps, *shape)), dtype)


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FORMS)
def test_statistics_are_kept_in_float32_and_updates_in_the_dtype_of_the_gradients(form, dtype):
    params = jnp.ones(11, dtype)
    tx = FORMS[form]()
    updates, state = run(tx, jnp.ones((2, 11), dtype), params)
    kept = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (11,)]
    assert set(kept) <= {jnp.dtype(jnp.float32)}
    assert updates.dtype == dtype


def test_adam_s_own_moments_inside_a_gate_stay_the_inner_optimizer_s():
    params = jnp.ones(11, jnp.bfloat16)
    state = poprisk_gate(optax.adamw(0.1)).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.statistic_state) if leaf.ndim} == {jnp.dtype(jnp.float32)}
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(optax.adamw(0.1).init(params))
    assert state.inner_state[0].mu.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("make", [optax.adamw, optax.adam])
def test_neutral_poprisk_adamw_of_half_precision_is_adamw_of_float32_copies(make, dtype):
    decay = 0.3 if make is optax.adamw else 0.0
    gradients, params = noise(4, 5, dtype=dtype), jnp.arange(5.0).astype(dtype)
    plain = optax.adamw(0.1, weight_decay=decay)
    ours, _ = run(poprisk_adamw(0.1, weight_decay=decay, mask=SnrMask(lam=0.0)), gradients, params)
    theirs, _ = run(optax.with_extra_args_support(plain), gradients.astype(jnp.float32), params.astype(jnp.float32))
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("form", ["ema", "adam"])
def test_half_precision_opens_what_float32_does(form, dtype, size):
    """A third of pure noise, whatever its size: in float16, squares of 1e-4 are zero and those of 1e3 infinite."""
    tx = FORMS[form](mask=HardMask(), threshold=TStatistic(1.0), summary=None)
    updates, _ = run(tx, noise(150, 2000, size=size, dtype=dtype), jnp.zeros(2000, dtype))
    assert jnp.isfinite(updates).all()
    assert abs((updates != 0).mean() - 0.32) < 0.04


def test_a_constant_is_averaged_to_itself():
    """With rho = 0.99 in bfloat16, rounded to nearest, the average of a constant 1 stops at 0.8."""
    average = jnp.bfloat16(0)
    for _ in range(500):
        average = (0.99 * average.astype(jnp.float32) + 0.01).astype(jnp.bfloat16)
    assert average < 0.85
    gradients = jnp.where(jnp.arange(801)[:, None] % 2 == 0, 1, -1).astype(jnp.bfloat16) * jnp.ones(400, jnp.bfloat16)
    for dtype, within in ((None, 1e-3), (jnp.bfloat16, 0.01)):
        statistic = ema_statistic(b1=0.0, state_dtype=dtype)  # deviations from the step before: always 2
        update = functools.partial(lambda update, state, g: (update(g, state)[0], None), statistic.update)
        state = jax.lax.scan(update, statistic.init(gradients[0]), gradients)[0]
        assert abs(float(state.variance.astype(jnp.float32).mean()) - 4) < 4 * within
        assert state.variance.dtype == (dtype or jnp.float32)


# ---------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("value", [1.0, 1.001, 3.14159, -2.7, 1e-30, 6.1e30, 0.0])
def test_rounding_is_right_on_average_and_next_to_the_value(value):
    """Over coordinates at one step, and over steps at one coordinate."""
    value = float(np.float32(value))
    steps = jax.vmap(lambda step: stochastically_rounded(jnp.full((40, 50), value), step, 1))(jnp.arange(64))
    rounded = np.asarray(steps, np.float64)
    unit = abs(value) * 2.0**-7
    assert np.abs(rounded - value).max() <= unit
    assert abs(rounded[0].mean() - value) <= 5 * unit / 2000**0.5
    assert (np.abs(rounded.mean(0) - value) <= 6 * unit / 2 / 64**0.5).all()
    assert len(np.unique(rounded)) <= 2
    exact = float(jnp.bfloat16(value)) == value
    assert (len(np.unique(rounded)) == 1) == exact


def test_the_largest_numbers_are_not_rounded_to_infinity():
    largest = float(jnp.finfo(jnp.float32).max)
    for value in (largest, -largest):
        assert jnp.isfinite(stochastically_rounded(jnp.full(1000, value, jnp.float32), jnp.int32(3), 0)).all()


def test_rounding_errors_are_independent_of_each_other():
    """From step to step, between neighbours along each axis, and between leaves."""
    value = jnp.full((64, 64), 1.003, jnp.float32)
    up = jax.vmap(lambda step: stochastically_rounded(value, step, 0) > 1.003)(jnp.arange(32))
    up = np.asarray(up, np.float64) - np.mean(up)
    other = np.asarray(
        jax.vmap(lambda step: stochastically_rounded(value, step, 1) > 1.003)(jnp.arange(32)), np.float64
    )
    pairs = [(up[1:], up[:-1]), (up[:, 1:], up[:, :-1]), (up[..., 1:], up[..., :-1]), (up, other - other.mean())]
    for one, two in pairs:
        assert abs((one * two).mean() / (up**2).mean()) < 5 / one.size**0.5


def test_rounding_is_the_same_in_a_scan_and_in_float64_mode():
    value = jnp.linspace(1.0, 2.0, 100, dtype=jnp.float32)
    alone = stochastically_rounded(value, jnp.int32(7), 3)
    scanned = jax.lax.scan(lambda _, t: (_, stochastically_rounded(value, t, 3)), 0, jnp.arange(9, dtype=jnp.int32))[1]
    np.testing.assert_array_equal(alone, scanned[7])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(alone, stochastically_rounded(value, jnp.int32(7), 3))


# ---------------------------------------------------------------- decays


@pytest.mark.parametrize("decay", [1 - 1e-8, np.float64(1 - 2e-8), jnp.float32(1 - 1e-9)])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (ema_statistic, "b1"),
        (ema_statistic, "rho"),
        (adam_statistic, "rho"),
        (batch_statistic, "b1"),
        (lambda **options: poprisk_adamw(0.1, **options), "b1"),
        (lambda **options: poprisk_adamw(0.1, **options), "b2"),
    ],
)
def test_decays_that_float32_rounds_to_one_are_refused(build, name, decay):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\).*got .*: \w+"):
        build(**{name: decay})


@pytest.mark.parametrize("rho", [0.0, 1e-8, 0.9999999])
@pytest.mark.parametrize("b1", [0.0, 1e-30, 0.9999999])
def test_every_other_decay_gives_finite_updates(b1, rho):
    for tx in (poprisk_gate(statistic=ema_statistic(b1, rho)), ADAMW(b1, statistic=adam_statistic(rho))):
        updates, _ = run(tx, noise(3, 20), jnp.zeros(20))
        assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
@pytest.mark.parametrize("name", ["b1", "rho", "batch b1", "adam b1", "adam b2"])
def test_injected_decays_out_of_range_are_safe(name, value):
    """They cannot be refused: the nearest decay stands for them."""

    def make(decay):
        return {
            "b1": lambda: poprisk_gate(statistic=ema_statistic(b1=decay)),
            "rho": lambda: poprisk_gate(statistic=ema_statistic(rho=decay)),
            "batch b1": lambda: poprisk_gate(statistic=batch_statistic(decay)),
            "adam b1": lambda: ADAMW(b1=decay),
            "adam b2": lambda: ADAMW(b2=decay),
        }[name]()

    tx = optax.inject_hyperparams(make)(decay=0.5)
    state = tx.init(jnp.zeros(20))
    state.hyperparams["decay"] = jnp.asarray(value)
    for gradient in noise(3, 20):
        updates, state = jax.jit(tx.update)(gradient, state, jnp.zeros(20), **moments_of(gradient))
        assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("b1", [1e-8, 1e-30])
@pytest.mark.parametrize("form", ["ema", "adam"])
def test_a_tiny_b1_is_a_b1_of_zero(form, b1):
    gradients = noise(60, 500)

    def updates(b1):
        options = {"b1": b1} if form == "adam" else {"statistic": ema_statistic(b1=b1)}
        return run(FORMS[form](mask=SnrMask(), summary=None, **options), gradients, jnp.zeros(500))[0]

    np.testing.assert_allclose(updates(b1), updates(0.0), rtol=1e-4)


@pytest.mark.parametrize("b1", [1e-3, 0.05, 0.1, 0.2, 0.9])
def test_deviations_of_adam_s_mean_do_not_cancel(b1):
    """Both ways of writing g - m, against float64."""
    gradients = noise(40, 50)
    _, state = run(ADAMW(b1, summary=None), gradients, jnp.zeros(50))
    mean = variance = np.zeros(50)
    for g in np.asarray(gradients, np.float64):
        variance = 0.99 * variance + 0.01 * (g - mean) ** 2
        mean = b1 * mean + (1 - b1) * g
    np.testing.assert_allclose(state[0].statistic_state.variance, variance, rtol=2e-5)


@pytest.mark.parametrize("decay", [0.0, 1e-8, 0.5, 0.99, 1 - 2**-20])
def test_what_a_bias_correction_divides_by(decay):
    decay = np.float32(decay)
    for step in (0, 1, 2, 100, 10**6):
        expected = -np.expm1(step * np.log(np.float64(decay))) if decay and step else float(step > 0)
        np.testing.assert_allclose(one_minus_power(jnp.asarray(decay), step), expected, rtol=1e-6)


# ---------------------------------------------------------------- sizes, and no NaN


@pytest.mark.parametrize("mask", [HardMask(), SoftMask(), SnrMask()])
@pytest.mark.parametrize("form", ["ema", "batch", "batch, b1"])
def test_the_gate_does_not_depend_on_the_scale_of_the_loss(form, mask):
    gradients = noise(30, 200)

    def openness(scale):
        tx = FORMS[form](mask=mask, summary=None)
        return run(tx, scale * gradients, jnp.zeros(200))[0] / (scale * gradients[-1])

    usual = openness(1.0)
    for scale in (1e-15, 1e-8, 1e8, 1e15):
        np.testing.assert_allclose(openness(scale), usual, rtol=1e-3, atol=1e-4)


SHAPES = {"w": (3, 4), "scalar": (), "empty": (0, 3)}
NAN_CASES = [
    {"threshold": OpenShare(0.0), "mask": HardMask(), "reduction": PerTensor()},
    {"threshold": TStatistic(), "mask": SnrMask(), "summary": Summary(every=1, of_step=True)},
    {"threshold": Alpha(0.0), "mask": SoftMask(), "reduction": ByLabel("all")},
]


@pytest.mark.parametrize("case", NAN_CASES, ids=["tensor", "scalar", "label"])
@pytest.mark.parametrize("form", FORMS)
def test_no_nan_of_its_own_in_a_compiled_step(form, case):
    """Zero gradients, gradients whose squares overflow or vanish, batches that say nothing of their noise."""
    rng = np.random.default_rng(0)
    unit = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    # Adam's own v is infinite for gradients of 1e30.
    scales = (0.0, 1.0, 1e-30, 1e18) if "adam" in form else (0.0, 1.0, 1e-30, 1e30)
    with jax.debug_nans(True):
        tx = FORMS[form](**{"summary": Summary(every=1)} | case)
        update = jax.jit(tx.update)
        for scale in scales:
            for size in (4, 1) if "batch" in form else (4,):
                state = tx.init(unit)
                for sign in (1, -0.5):
                    gradient = jax.tree.map(lambda g, factor=sign * scale: factor * g, unit)
                    updates, state = update(gradient, state, unit, **moments_of(gradient, size))
                assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("form", FORMS)
def test_no_nan_of_its_own_step_by_step_and_in_a_scan(form):
    gradients = {"w": jnp.zeros((2, 2, 3)), "b": noise(2, 3)}
    params = jax.tree.map(lambda g: g[0], gradients)
    with jax.debug_nans(True):
        tx = FORMS[form](threshold=OpenShare(0.3) if form == "batch" else TStatistic())
        run(tx, gradients, params, jit=False)
        run(tx, gradients, params)


# ---------------------------------------------------------------- strict promotion


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("reduction", [None, PerRow(), PerTensor(), ByLabel("all")])
def test_strict_dtype_and_rank_promotion(reduction, dtype, x64):
    options = {} if reduction is None else {"reduction": reduction}
    options |= {"warmup": jnp.array(1), "floor": np.float32(0.1), "summary": Summary(every=1, of_step=True)}
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        params = {"w": jnp.ones((3, 4), dtype), "b": jnp.ones((), dtype)}
        for form, make in FORMS.items():
            inner = () if "adam" in form else (optax.sgd(0.1),)
            for threshold, mask in ((TStatistic(1), HardMask()), (OpenShare(), SoftMask()), (Alpha(), SnrMask())):
                tx = make(*inner, threshold=threshold, mask=mask, **options)
                updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params, **moments_of(params))
                assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)


@pytest.mark.parametrize("statistic", [adam_statistic(), adam_moments_statistic()])
def test_adam_s_statistics_under_strict_promotion(statistic):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        params = jnp.ones((3, 4))
        adam = optax.scale_by_adam().init(params)._replace(count=jnp.array(3, jnp.int32))
        states = {"inner_state": adam, "new_inner_state": adam}
        _, moments = statistic.update(params, statistic.init(params), b1=0.9, b2=0.999, **states)
        assert moments.variance.dtype == jnp.float32
