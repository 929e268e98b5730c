"""Statistics: what the gate knows of each gradient coordinate, its mean and its variance from step to step."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from transforms import _validation


class Moments(NamedTuple):
    """Mean and variance of the batch gradient, coordinate by coordinate, as a mask reads them.

    Attributes:
      mean: tree like the gradients; the estimate m̂ of the mean gradient, in units of the gradient.
      variance: tree like the gradients; the estimate ŝ of the variance of *one batch's* mean gradient, in units of
        the gradient squared. It is neither the per-example variance nor the variance of m̂ itself.
    """

    mean: optax.Updates
    variance: optax.Updates


class StatisticInitFn(Protocol):
    """`init(params) -> state`."""

    def __call__(self, params: optax.Params) -> Any: ...


class StatisticUpdateFn(Protocol):
    """`update(grads, state, params=None, **extra_args) -> (state, moments)`.

    Inside `poprisk_gate` the extra arguments are those of the optimizer's `update`, and `inner_state`, the state of
    the wrapped optimizer before this step. An implementation ignores what it does not need.
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


def ema_statistic(b1: ArrayLike = 0.9, rho: ArrayLike = 0.99, *, state_dtype: DTypeLike | None = None) -> Statistic:
    """Streaming mean and variance of the batch gradient, as in the paper's Algorithm 1.

    With g the gradient of step t = 1, 2, ... and m = s = 0 before the first,

        s <- rho s + (1 - rho) (g - m)²     (m still of the previous step)
        m <- b1 m + (1 - b1) g
        m̂ = m / (1 - b1^t),   ŝ = s / (1 - rho^t).

    The deviation is taken from the **raw** m, as in the paper, not from its bias-corrected form (which does not exist
    at the first step). Both averages start at zero, so early deviations contain part of the signal and ŝ is too large
    for about 1/(1 - rho) steps: m̂² = ŝ exactly at t = 1, and for a constant gradient m̂²/ŝ is about 2 at t = 10 and 31
    at t = 100. This works as a warm-up that keeps a strict gate shut at first.

    Later, ŝ also holds the movement of a drifting mean, and for pure noise it exceeds the variance of a batch gradient
    by the factor 2/(1 + b1), because m is noisy too.

    Args:
      b1: decay of the mean, in [0, 1).
      rho: decay of the variance, in [0, 1).
      state_dtype: floating-point dtype in which both averages are stored; None stores each in its parameter's dtype.
        Arithmetic is done in at least float32 either way. Choose float32 for bfloat16 parameters: in its 8 bits an
        average with rho = 0.99 stops moving when its input changes by less than about a third.

    Returns:
      A `Statistic`. Its moments have the gradients' shapes and are at least float32.

    Raises:
      ValueError: b1 or rho outside [0, 1).
      TypeError: b1 or rho not a number, state_dtype not floating-point, or (at `init`) a parameter that is not real
        floating-point.

    Not supported: complex parameters. Squares above a quarter of state_dtype's largest number are capped there, so that
    one huge gradient cannot leave an infinity behind; squares below its smallest are zero.

    Cost: state of 2 numbers a parameter and one counter; about 15 flops a parameter and no matrix products.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1.

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
    _validation.check_state_dtype(state_dtype)

    def init(params: optax.Params) -> EmaStatisticState:
        # Two trees of zeros: one shared by both fields could not be donated to a jitted step.
        mean, variance = _zeros_like(params, state_dtype), _zeros_like(params, state_dtype)
        return EmaStatisticState(jnp.zeros([], jnp.int32), mean, variance)

    def update(
        grads: optax.Updates, state: EmaStatisticState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[EmaStatisticState, Moments]:
        del params, extra_args
        step = jnp.asarray(optax.safe_increment(state.step))
        deviations = jax.tree.map(_squared_deviation, grads, state.mean, state.variance)
        mean, mean_hat = _ema(grads, state.mean, b1, step)
        variance, variance_hat = _ema(deviations, state.variance, rho, step)
        return EmaStatisticState(step, mean, variance), Moments(mean_hat, variance_hat)

    return Statistic(init, update)


class AdamStatisticState(NamedTuple):
    """State of `adam_statistic`: the raw moving average of squared deviations, and nothing else."""

    variance: optax.Updates


def adam_statistic(b1: ArrayLike, rho: ArrayLike, *, state_dtype: DTypeLike | None = None) -> Statistic:
    """`ema_statistic` that borrows step count and mean from the `optax.scale_by_adam(b1=b1)` inside the gate.

    It stores the variance alone. The inner state must be a `ScaleByAdamState` and `b1` its own, which is why
    `poprisk_adamw` builds the pair and this function is not public.
    """
    ema = ema_statistic(b1, rho, state_dtype=state_dtype)

    def init(params: optax.Params) -> AdamStatisticState:
        return AdamStatisticState(_zeros_like(params, state_dtype))

    def update(
        grads: optax.Updates,
        state: AdamStatisticState,
        params: optax.Params | None = None,
        *,
        inner_state: optax.ScaleByAdamState,
        **extra_args: Any,
    ) -> tuple[AdamStatisticState, Moments]:
        del params, extra_args
        # Of the joined state only the variance is kept: Adam takes the same step in count and mean itself.
        joined = EmaStatisticState(jnp.asarray(inner_state.count), inner_state.mu, state.variance)
        joined, moments = ema.update(grads, joined)
        return AdamStatisticState(joined.variance), moments

    return Statistic(init, update)


def _zeros_like(params: optax.Params, dtype: DTypeLike | None) -> optax.Updates:
    _validation.check_float_leaves(params)
    # The explicit dtype keeps a Python scalar from starting a weakly typed state that its first update would retype.
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.result_type(p) if dtype is None else dtype), params)


def _squared_deviation(grad: ArrayLike, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """(g - m)², capped so that no average of such squares overflows where it is stored."""
    deviation = jnp.asarray(grad, _compute_dtype(grad, mean, variance)) - mean
    return jnp.minimum(jnp.square(deviation), float(jnp.finfo(variance.dtype).max) / 4)


def _ema(values: Any, averages: Any, decay: ArrayLike, step: jax.Array) -> tuple[Any, Any]:
    """One step of an exponential moving average over a tree: (raw, to be stored; bias-corrected, to be used)."""

    def weights(value: ArrayLike, average: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        old = jnp.asarray(decay, _compute_dtype(value, average))
        new = 1 - old
        # Written so that total == new to the bit at step 1. Then the first mean is g and the first variance g²,
        # exactly, and a mask whose threshold lies there (HardMask at alpha = 1) does not depend on rounding.
        total = 1 - old * old ** (step - 1)
        return old, new, total

    def raw(value: ArrayLike, average: jax.Array) -> jax.Array:
        old, new, _ = weights(value, average)
        return (old * average + new * value).astype(average.dtype)

    def corrected(value: ArrayLike, average: jax.Array) -> jax.Array:
        old, new, total = weights(value, average)
        return (old / total) * average + (new / total) * value

    return jax.tree.map(raw, values, averages), jax.tree.map(corrected, values, averages)


def _compute_dtype(*arrays: ArrayLike) -> jnp.dtype:
    return jnp.result_type(*arrays, jnp.float32)
