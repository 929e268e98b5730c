"""The streaming estimator: mean and variance of the batch gradient from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from transforms import _validation
from transforms._estimators.averages import (
    ema,
    one_minus_power,
    safe_decay,
    squared_deviations,
    sum_of_squared_weights,
    zeros_like,
)
from transforms._estimators.base import Moments, Statistic


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
      state_dtype: dtype in which both averages are stored. None is float32, or float64 for float64 parameters: in the
        8 bits of a bfloat16 parameter an average of a constant 1 with rho = 0.99 would stop at 0.8. `jnp.bfloat16`
        halves the state and rounds stochastically, so that averages are right on average; its rounding adds about 2 %
        to the spread of ŝ, whose own is 10 %. Arithmetic is done in at least float32 either way.

    Returns:
      A `Statistic`. Its moments have the gradients' shapes and are at least float32.

    Raises:
      ValueError: b1 or rho outside [0, 1), or so near 1 that float32 rounds it to 1; data_noise negative.
      TypeError: a number of the wrong kind, a state_dtype other than the three, or (at `init`) a parameter that is not
        real floating-point.

    A coordinate whose gradient is not finite keeps its averages. Squares are those of float32: above a quarter of its
    largest number (gradients above 1e19) they are capped there, so that one huge gradient cannot leave an infinity
    behind, and below its smallest (gradients below 1e-19) they are zero. A decay that is traced, or injected, cannot be
    refused: it is taken to be the nearest number of [0, 1) that float32 holds.

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
    _validation.check_state_dtype("state_dtype", state_dtype)

    def init(params: optax.Params) -> EmaStatisticState:
        # Two trees of zeros: one shared by both fields could not be donated to a jitted step.
        mean, variance = zeros_like(params, state_dtype), zeros_like(params, state_dtype)
        return EmaStatisticState(jnp.zeros([], jnp.int32), mean, variance)

    def update(
        grads: optax.Updates, state: EmaStatisticState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[EmaStatisticState, Moments]:
        del params, extra_args
        step = jnp.asarray(optax.safe_increment(state.step))
        finite = jax.tree.map(jnp.isfinite, grads)
        mean, mean_hat = ema(grads, state.mean, b1, step, where=finite)
        squares = squared_deviations(grads, state.mean, mean, state.variance, b1)
        variance, variance_hat = ema(squares, state.variance, rho, step, where=finite)
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

    def at_first_step(variance: jax.Array) -> jax.Array:
        # At the first step the squared mean is the variance. Rounding must not decide which of two equals is greater.
        more = jnp.where(step == 1, 1 + 32 * float(jnp.finfo(variance.dtype).eps), 1)
        return variance * more.astype(variance.dtype)

    variance = jax.tree.map(at_first_step, variance)
    return Moments(mean, variance, noise_ratio + jnp.asarray(data_noise, noise_ratio.dtype), dof, overlap)


def check_data_noise(data_noise: ArrayLike) -> None:
    remedy = "use 0 for fresh batches, finite_data_alpha(batch_size, num_examples) for replayed data"
    _validation.check_nonnegative("data_noise", data_noise, remedy)


def _null_constants(b1: ArrayLike, rho: ArrayLike, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`noise_ratio`, `dof` and `overlap` of `ema_statistic` on noise that is independent from step to step.

    m = wᵀg and ŝ = gᵀA g. The deviation of step i holds the noise of g_i and that of the raw m of i - 1 values,
    (1 - b1)/(1 + b1) (1 - b1^(2(i - 1))), and along w it is w_i (1 + b1^(2i - 1))/(1 + b1); both are averaged with the
    weights of rho, in closed form.
    """
    b1, rho = safe_decay(b1, float), safe_decay(rho, float)
    square = b1**2
    slow, fast = one_minus_power(rho, step), one_minus_power(square, step)  # 1 - rho^t, 1 - b1^(2t)
    count = jnp.asarray(step).astype(rho.dtype)
    # Σ_i rho^(t-i) b1^(2(i-1)) over i = 1 ... t is (rho^t - b1^(2t))/(rho - b1²), or t rho^(t-1) where they meet.
    meets = jnp.abs(rho - square) < 1e-4
    where_they_meet = count * (1 - one_minus_power(rho, step - 1))
    powers = jnp.where(meets, where_they_meet, (fast - slow) / jnp.where(meets, 1, rho - square))
    weight = (1 - rho) / slow
    trace = 1 + (1 - b1) / (1 + b1) * (1 - weight * powers)  # of A: E ŝ
    both = rho * square
    # Written without dividing by b1, which may be zero: Σ_k both^k (1 + b1^(2i - 1))² with k = t - i.
    cross = (1 - one_minus_power(b1, 2 * step - 1)) * slow / (1 - rho)
    sums = one_minus_power(both, step) / (1 - both) + 2 * cross + (1 - fast) * powers
    overlap = weight * (1 - b1) * sums / ((1 + b1) * fast) / trace  # wᵀA w / (wᵀw tr A)
    dof = (1 - overlap) ** 2 / jnp.maximum(sum_of_squared_weights(rho, step) - overlap**2, 1e-12)
    return sum_of_squared_weights(b1, step) / trace, jnp.where(step > 1, dof, 1e-3), overlap
