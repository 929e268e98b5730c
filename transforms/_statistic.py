"""Statistics: what the gate knows of each gradient coordinate, its mean and its variance from step to step."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from transforms import _validation


class Moments(NamedTuple):
    """Mean and variance of the gradient, coordinate by coordinate, and how they are to be compared.

    Attributes:
      mean: tree like the gradients; the estimate m̂ of the mean gradient, in units of the gradient.
      variance: tree like the gradients; the estimate ŝ of the variance of *one batch's* mean gradient, in units of
        the gradient squared. It is not the per-example variance.
      noise_ratio: c with Var m̂ = c E ŝ, so that t² = m̂²/(c ŝ).
      dof: degrees of freedom of ŝ.
      overlap: κ, how far m̂'s own noise enters ŝ: a share κ t² of it, so that t² <= 1/κ. It is zero for a variance about
        the very mean that is tested, as within a batch. On pure Gaussian noise (1 - κ) t² / (1 - κ t²) follows
        F(1, dof), up to the approximation by Satterthwaite's dof.
    """

    mean: optax.Updates
    variance: optax.Updates
    noise_ratio: ArrayLike = 1.0
    dof: ArrayLike = float("inf")
    overlap: ArrayLike = 0.0


class StatisticInitFn(Protocol):
    """`init(params) -> state`."""

    def __call__(self, params: optax.Params) -> Any: ...


class StatisticUpdateFn(Protocol):
    """`update(grads, state, params=None, **extra_args) -> (state, moments)`.

    Inside `poprisk_gate` the extra arguments are those of the optimizer's `update`, and `inner_state` and
    `new_inner_state`, the state of the wrapped optimizer before and after this step; inside `poprisk_adamw` also Adam's
    `b1` and `b2`. An implementation ignores what it does not need.
    """

    def __call__(
        self, grads: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Any, Moments]: ...


class Statistic(NamedTuple):
    """A pair of pure functions that turns a stream of gradients into `Moments`.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params=None, **extra_args) -> (state, moments)`.
    """

    init: StatisticInitFn
    update: StatisticUpdateFn


class EmaStatisticState(NamedTuple):
    """State of `ema_statistic`: the number of steps taken and the two raw (not bias-corrected) moving averages."""

    step: jax.Array
    mean: optax.Updates
    variance: optax.Updates


def ema_statistic(
    b1: ArrayLike = 0.9,
    rho: ArrayLike = 0.99,
    *,
    data_noise: ArrayLike = 0.0,
    state_dtype: DTypeLike | None = None,
) -> Statistic:
    """Streaming mean and variance of the batch gradient, as in the paper's Algorithm 1.

    With g the gradient of step t = 1, 2, ... and m = s = 0 before the first,

        s <- rho s + (1 - rho) (g - m)²     (m still of the previous step)
        m <- b1 m + (1 - b1) g
        m̂ = m / (1 - b1^t),   ŝ = s / (1 - rho^t).

    m̂ is itself an average of up to (1 + b1)/(1 - b1) batches, and ŝ holds the noise of the raw m besides that of g.
    Both are known, at every step, for batches that are independent of each other:

        noise_ratio = Var m̂ / E ŝ + data_noise.

    The deviation is taken from the **raw** m, as in the paper, not from its bias-corrected form (which does not exist
    at the first step). So early deviations contain part of the signal and ŝ is too large for about 1/(1 - rho) steps:
    m̂² = ŝ exactly at t = 1, and for a constant gradient m̂²/ŝ is about 2 at t = 10 and 31 at t = 100. Later, ŝ also
    holds the movement of a drifting mean (about ten times the variance on strongly drifting coordinates), which keeps
    the gate on the shut side; `batch_statistic` does not.

    Args:
      b1: decay of the mean, in [0, 1).
      rho: decay of the variance, in [0, 1).
      data_noise: variance of the training set's own mean gradient around the population's, in units of ŝ, >= 0:
        0 where every batch is fresh, `finite_data_alpha(b, n)` where batches of b are redrawn from n examples.
      state_dtype: floating-point dtype in which both averages are stored; None stores each in its parameter's dtype.
        Arithmetic is done in at least float32 either way. Choose float32 for bfloat16 parameters: in its 8 bits an
        average with rho = 0.99 stops moving when its input changes by less than about a third.

    Returns:
      A `Statistic`. Its moments have the gradients' shapes and are at least float32.

    Raises:
      ValueError: b1 or rho outside [0, 1), data_noise negative.
      TypeError: a number of the wrong kind, state_dtype not floating-point, or (at `init`) a parameter that is not real
        floating-point.

    A coordinate whose gradient is not finite keeps its averages. Squares above a quarter of state_dtype's largest
    number are capped there, so that one huge gradient cannot leave an infinity behind; squares below its smallest are
    zero.

    Not supported: complex parameters.

    Cost: state of 2 numbers a parameter and one counter; about 20 flops a parameter and no matrix products.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> import jax.numpy as jnp
    >>> statistic = ema_statistic()
    >>> state = statistic.init(jnp.zeros(2))
    >>> state, moments = statistic.update(jnp.array([1.0, 1.0]), state)
    >>> state, moments = statistic.update(jnp.array([1.0, -1.0]), state)
    >>> [f"{m:.2f}" for m in moments.mean], [f"{s:.2f}" for s in moments.variance]
    (['1.00', '-0.05'], ['0.90', '1.11'])
    """
    _validation.check_decay("b1", b1)
    _validation.check_decay("rho", rho)
    check_data_noise(data_noise)
    _validation.check_state_dtype(state_dtype)

    def init(params: optax.Params) -> EmaStatisticState:
        # Two trees of zeros: one shared by both fields could not be donated to a jitted step.
        mean, variance = zeros_like(params, state_dtype), zeros_like(params, state_dtype)
        return EmaStatisticState(jnp.zeros([], jnp.int32), mean, variance)

    def update(
        grads: optax.Updates, state: EmaStatisticState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[EmaStatisticState, Moments]:
        del params, extra_args
        step = jnp.asarray(optax.safe_increment(state.step))
        deviations = jax.tree.map(squared_deviation, grads, state.mean, state.variance)
        mean, mean_hat = ema(grads, state.mean, b1, step)
        variance, variance_hat = ema(deviations, state.variance, rho, step)
        moments = streaming_moments(mean_hat, variance_hat, b1, rho, step, data_noise)
        return EmaStatisticState(step, mean, variance), moments

    return Statistic(init, update)


def streaming_moments(
    mean: optax.Updates,
    variance: optax.Updates,
    b1: ArrayLike,
    rho: ArrayLike,
    step: jax.Array,
    data_noise: ArrayLike,
) -> Moments:
    """Bias-corrected averages with what is known of their noise."""
    noise_ratio, dof, overlap = _null_constants(b1, rho, step)
    # At the first step the squared mean is the variance. Rounding must not decide which of two equals is greater.
    variance = jax.tree.map(lambda v: v * jnp.where(step == 1, 1 + 32 * jnp.finfo(v.dtype).eps, 1), variance)
    return Moments(mean, variance, noise_ratio + data_noise, dof, overlap)


def check_data_noise(data_noise: ArrayLike) -> None:
    remedy = "use 0 for fresh batches, finite_data_alpha(batch_size, num_examples) for replayed data"
    _validation.check_nonnegative("data_noise", data_noise, remedy)


def zeros_like(params: optax.Params, dtype: DTypeLike | None) -> optax.Updates:
    """Zeros of the parameters' shapes, in `dtype` or their own."""
    _validation.check_float_leaves(params)
    # The explicit dtype keeps a Python scalar from starting a weakly typed state that its first update would retype.
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.result_type(p) if dtype is None else dtype), params)


def squared_deviation(grad: ArrayLike, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """(g - m)², capped so that no average of such squares overflows where it is stored; NaN where g is not finite."""
    deviation = jnp.asarray(grad, compute_dtype(grad, mean, variance)) - mean
    square = jnp.minimum(jnp.square(deviation), float(jnp.finfo(variance.dtype).max) / 4)
    return jnp.where(jnp.isfinite(grad), square, jnp.nan)


def ema(values: Any, averages: Any, decay: ArrayLike, step: jax.Array) -> tuple[Any, Any]:
    """One step of an exponential moving average over a tree: (raw, to be stored; bias-corrected, to be used).

    Where a value is not finite the average stays as it was. The corrected average is taken from the raw one before that
    is rounded to its storage dtype; written so, a compiled step reads each old average once and updates it in place.
    """

    def raw(value: ArrayLike, average: jax.Array) -> jax.Array:
        old = jnp.asarray(decay, compute_dtype(value, average))
        return jnp.where(jnp.isfinite(value), old * average + (1 - old) * value, average)

    def corrected(raw: jax.Array) -> jax.Array:
        return raw * (1 / (1 - jnp.asarray(decay, raw.dtype) ** step))

    raws = jax.tree.map(raw, values, averages)
    return jax.tree.map(lambda r, a: r.astype(a.dtype), raws, averages), jax.tree.map(corrected, raws)


def sum_of_squared_weights(decay: ArrayLike, step: ArrayLike) -> jax.Array:
    """Σ w_i² of a bias-corrected moving average after `step` values: Var m̂ in units of one value's variance."""
    decay = jnp.asarray(decay, float)
    fading = decay**step
    return (1 - decay) / (1 + decay) * (1 + fading) / (1 - fading)


def _null_constants(b1: ArrayLike, rho: ArrayLike, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`noise_ratio`, `dof` and `overlap` of `ema_statistic` on noise that is independent from step to step.

    m = wᵀg and ŝ = gᵀA g. The deviation of step i holds the noise of g_i and that of the raw m of i - 1 values,
    (1 - b1)/(1 + b1) (1 - b1^(2(i - 1))), and along w it is w_i (1 + b1^(2i - 1))/(1 + b1); both are averaged with the
    weights of rho, in closed form.
    """
    b1, rho = jnp.asarray(b1, float), jnp.asarray(rho, float)
    square, slow, fast = b1**2, rho**step, b1 ** (2 * step)
    # Σ_i rho^(t-i) b1^(2(i-1)) over i = 1 ... t is (rho^t - b1^(2t))/(rho - b1²), or t rho^(t-1) where they meet.
    meets = jnp.abs(rho - square) < 1e-4
    powers = jnp.where(meets, step * rho ** (step - 1), (slow - fast) / jnp.where(meets, 1, rho - square))
    weight = (1 - rho) / (1 - slow)
    trace = 1 + (1 - b1) / (1 + b1) * (1 - weight * powers)  # of A: E ŝ
    both = rho * square
    # Written without dividing by b1, which may be zero: Σ_k both^k (1 + b1^(2i - 1))² with k = t - i.
    cross = jnp.where(b1 > 0, fast / jnp.where(b1 > 0, b1, 1), 0.0) * (1 - slow) / (1 - rho)
    sums = (1 - both**step) / (1 - both) + 2 * cross + fast * powers
    overlap = weight * (1 - b1) * sums / ((1 + b1) * (1 - fast)) / trace  # wᵀA w / (wᵀw tr A)
    dof = (1 - overlap) ** 2 / jnp.maximum(sum_of_squared_weights(rho, step) - overlap**2, 1e-12)
    return sum_of_squared_weights(b1, step) / trace, jnp.where(step > 1, dof, 1e-3), overlap


def compute_dtype(*arrays: ArrayLike) -> jnp.dtype:
    """At least float32, and no narrower than any of the arrays."""
    return jnp.result_type(*arrays, jnp.float32)
