"""Statistics that read the moments of the Adam inside `poprisk_adamw`, so that less or nothing has to be stored."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from transforms import _validation
from transforms._estimators.averages import (
    compute_dtype,
    ema,
    one_minus_power,
    safe_decay,
    squared_deviations,
    sum_of_squared_weights,
    zeros_like,
)
from transforms._estimators.base import Moments, Statistic
from transforms._estimators.ema import check_data_noise, streaming_moments


class AdamStatisticState(NamedTuple):
    """State of `adam_statistic`: the raw moving average of squared deviations, and nothing else."""

    variance: optax.Updates


def adam_statistic(
    rho: ArrayLike = 0.99, *, data_noise: ArrayLike = 0.0, state_dtype: DTypeLike | None = None
) -> Statistic:
    """`ema_statistic` with Adam's own m for its mean: one number a parameter instead of two. For `poprisk_adamw` alone.

    Args:
      rho: decay of the variance, in [0, 1).
      data_noise: as in `ema_statistic`.
      state_dtype: dtype in which s is stored, as in `ema_statistic`: None for at least float32, `jnp.bfloat16` for half
        of that, rounded stochastically.

    Returns:
      A `Statistic` whose update needs Adam's state and decays, which `poprisk_adamw` passes.

    Raises:
      ValueError, TypeError: as `ema_statistic`.

    Cost: one number a parameter, 4 bytes or, in bfloat16, 2; about 20 flops a parameter (30 in bfloat16).

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> from transforms import poprisk_adamw
    >>> tx = poprisk_adamw(1e-3, statistic=adam_statistic(rho=0.95))
    """
    _validation.check_decay("rho", rho)
    check_data_noise(data_noise)
    _validation.check_state_dtype("state_dtype", state_dtype)

    def init(params: optax.Params) -> AdamStatisticState:
        return AdamStatisticState(zeros_like(params, state_dtype))

    def update(
        grads: optax.Updates,
        state: AdamStatisticState,
        params: optax.Params | None = None,
        *,
        inner_state: optax.ScaleByAdamState,
        new_inner_state: optax.ScaleByAdamState,
        b1: ArrayLike,
        b2: ArrayLike,
        **extra_args: Any,
    ) -> tuple[AdamStatisticState, Moments]:
        del params, b2, extra_args
        step = jnp.asarray(new_inner_state.count)
        squares = squared_deviations(grads, inner_state.mu, new_inner_state.mu, state.variance, b1)
        finite = jax.tree.map(jnp.isfinite, grads)
        variance, variance_hat = ema(squares, state.variance, rho, step, where=finite)
        mean_hat = jax.tree.map(lambda mu: _corrected(mu, b1, step), new_inner_state.mu)
        return AdamStatisticState(variance), streaming_moments(mean_hat, variance_hat, b1, rho, step, data_noise)

    return Statistic(init, update)


def adam_moments_statistic(*, data_noise: ArrayLike = 0.0) -> Statistic:
    """Mean and variance from Adam's m and v alone, without a state. For `poprisk_adamw` alone.

        ŝ = (v̂ - m̂²)₊ / (1 - c),   c = Σ w_i² of m̂'s weights

    With b1 = b2 this is the weighted sample variance about the weighted mean: never negative up to rounding, and about
    (1 + b1)/(1 - b1) - 1 degrees of freedom (18 at 0.9). With b2 > b1 it averages longer, and counts a mean that moved
    meanwhile as noise; where the difference is negative (m has grown), the coordinate is taken to be noiseless.

    Args:
      data_noise: as in `ema_statistic`.

    Returns:
      A `Statistic` whose update needs Adam's state and decays, which `poprisk_adamw` passes.

    Raises:
      ValueError, TypeError: data_noise negative, or not a number.

    Errors: v - m² cancels where |mean| is far above the noise: its relative error is about ε t² dof, harmless for a
    gate that such coordinates pass, unless v is stored in half precision.

    Cost: no state; about 15 flops a parameter.

    Source: Adam's moments as in Litman & Guo, arXiv:2605.01172; the variance is the weighted sample variance.

    >>> from transforms import poprisk_adamw
    >>> tx = poprisk_adamw(1e-3, b1=0.95, b2=0.95, statistic=adam_moments_statistic())
    """
    check_data_noise(data_noise)

    def init(params: optax.Params) -> optax.EmptyState:
        _validation.check_float_leaves(params)
        return optax.EmptyState()

    def update(
        grads: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        new_inner_state: optax.ScaleByAdamState,
        b1: ArrayLike,
        b2: ArrayLike,
        **extra_args: Any,
    ) -> tuple[optax.EmptyState, Moments]:
        del grads, params, extra_args
        step = jnp.asarray(new_inner_state.count)
        mean = jax.tree.map(lambda mu: _corrected(mu, b1, step), new_inner_state.mu)
        square = jax.tree.map(lambda nu: _corrected(nu, b2, step), new_inner_state.nu)
        c, dof, overlap = _null_constants(b1, b2, step)
        share = 1 / jnp.where(step > 1, 1 - c, 1)

        def variance(mean: jax.Array, square: jax.Array) -> jax.Array:
            # At the first step nothing is known of the noise: the squared mean stands for it, and c is 1.
            most = float(jnp.finfo(mean.dtype).max) / 4
            own = jnp.minimum(mean**2, most)
            return jnp.where(step > 1, jnp.maximum(square - own, 0) * share.astype(mean.dtype), own)

        ratio = c + jnp.asarray(data_noise, c.dtype)
        return state, Moments(mean, jax.tree.map(variance, mean, square), ratio, dof, overlap)

    return Statistic(init, update)


def _corrected(average: jax.Array, decay: ArrayLike, step: jax.Array) -> jax.Array:
    """Adam's own average without its bias, in at least float32."""
    average = jnp.asarray(average, compute_dtype(average))
    return average * (1 / one_minus_power(safe_decay(decay, average.dtype), step))


def _null_constants(b1: ArrayLike, b2: ArrayLike, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`noise_ratio`, `dof` and `overlap` for m = wᵀg and gᵀA g, A = diag(weights of b2) - w wᵀ, w those of b1."""
    b1, b2 = safe_decay(b1, float), safe_decay(b2, float)
    c = sum_of_squared_weights(b1, step)
    mixed = b1**2 * b2
    totals = one_minus_power(b1, step) ** 2 * one_minus_power(b2, step)
    cross = (1 - b1) ** 2 * (1 - b2) * one_minus_power(mixed, step) / ((1 - mixed) * totals)
    trace, trace_of_square = 1 - c, sum_of_squared_weights(b2, step) - 2 * cross + c**2
    # At the first step A is zero.
    known = step > 1
    overlap = (cross - c**2) / (c * jnp.where(known, trace, 1))
    dof = trace**2 / jnp.where(known, trace_of_square, 1)
    return c, jnp.where(known, dof, 1e-3), jnp.where(known, overlap, 0.0)
