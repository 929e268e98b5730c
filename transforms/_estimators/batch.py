"""The exact statistic of a batch, from moments that the caller took of its examples."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from transforms import _validation
from transforms._estimators.averages import (
    compute_dtype,
    ema,
    one_minus_power,
    safe_decay,
    sum_of_squared_weights,
    zeros_like,
)
from transforms._estimators.base import Moments, Statistic


class BatchStatisticState(NamedTuple):
    """State of `batch_statistic(b1)`: steps taken, average of the means, and variance of that average (both raw)."""

    step: jax.Array
    mean: optax.Updates
    variance: optax.Updates


def batch_statistic(b1: ArrayLike | None = None) -> Statistic:
    """Mean and variance over the examples of this very batch: nothing is assumed of other steps.

        m̂ = ḡ,   ŝ = Σ_i (g_i - ḡ)² / (b (b - 1)),   noise_ratio = 1,   dof = b - 1

    ŝ is the variance of ḡ, so `TStatistic(1)` is the leave-one-out rule (10) to the letter: ḡ² > σ²/(b - 1) with the
    biased σ². With a decay b1 the means are averaged over steps, m <- b1 m + (1 - b1) ḡ, and so are their variances,
    with the squared weights; then m̂ = m/(1 - b1^t) and Var m̂ is exact again for batches independent of each other.

    The moments come as extra arguments of the optimizer's `update`, under optax's names:

        moments = entk.gradient_moments(loss_fn, params, batch)
        updates, state = tx.update(moments.mean_grads, state, params, **moments._asdict())

    Micro-batches do as well: pass the moments of their k mean gradients, with `sample_size=k`. A batch that comes in
    micro-batches needs the moments of all its examples: `gradient_moments(..., microbatch_size=)` in one call, or
    `optax.experimental.aggregating`, which takes per-example gradients and hands the same names on:

        aggregating.process(optax.identity(), aggregating.get_per_element_mean_and_sum_sq_diff_grads(
            per_elt_axis=0, accumulation_steps=k), tx, aggregator_has_aux=True)

    Args:
      b1: decay of an average over steps, in [0, 1); None takes each batch by itself, without a state. The averages are
        kept in at least float32.

    Returns:
      A `Statistic`. Its update needs `sum_sq_diff_grads` (tree like the gradients) and `sample_size` (>= 2), and takes
      `mean_grads`; where that is missing, the gradients are the means.

    Raises:
      ValueError: b1 outside [0, 1), or rounded to 1 by float32. At the update: a sample_size below 2, or a tree of
        moments unlike the gradients.
      TypeError: b1 not a number. At the update: a missing extra argument.
      NotImplementedError: at the update, inside `optax.MultiSteps`: it averages gradients over micro-batches and passes
        the extra arguments of the last one only.

    A traced sample_size below 2 cannot be refused; it gives infinite noise, which shuts the gate for this step, and
    averages over steps pass the batch over. A negative sum of squares, which rounding can bring, counts as zero.

    Cost: none of its own beyond the moments (`entk.gradient_moments`: about 1 to 2 batch gradients); with b1, two
    numbers a parameter.

    Source: Litman & Guo, arXiv:2605.01172; theory (9), (10) and §7.3.

    >>> import jax.numpy as jnp
    >>> from transforms import HardMask, TStatistic, poprisk_gate
    >>> tx = poprisk_gate(statistic=batch_statistic(), threshold=TStatistic(1.0), mask=HardMask())
    >>> examples = jnp.array([[1.0, 1.0], [1.1, -1.0], [0.9, 0.3]])
    >>> mean = examples.mean(0)
    >>> moments = {"sum_sq_diff_grads": ((examples - mean) ** 2).sum(0), "sample_size": 3}
    >>> updates, _ = tx.update(mean, tx.init(mean), **moments)
    >>> print(updates)
    [1. 0.]
    """
    if b1 is not None:
        _validation.check_decay("b1", b1)

    def init(params: optax.Params) -> optax.EmptyState | BatchStatisticState:
        if b1 is None:
            _validation.check_float_leaves(params)
            return optax.EmptyState()
        return BatchStatisticState(jnp.zeros([], jnp.int32), zeros_like(params, None), zeros_like(params, None))

    def update(
        grads: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sum_sq_diff_grads: optax.Updates | None = None,
        sample_size: ArrayLike | None = None,
        mean_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Moments]:
        del params, extra_args
        _check_given(sum_sq_diff_grads=sum_sq_diff_grads, sample_size=sample_size)
        _check_not_accumulated()
        mean_grads = grads if mean_grads is None else mean_grads
        _check_moments(grads, mean_grads, sum_sq_diff_grads, sample_size)
        size = jnp.asarray(sample_size).astype(float)
        known = size > 1
        scale = 1 / jnp.where(known, size * (size - 1), 1)
        variances = jax.tree.map(lambda spread: _variance(spread, scale), sum_sq_diff_grads)
        means = jax.tree.map(lambda g: jnp.asarray(g, compute_dtype(g)), mean_grads)
        dof = jnp.maximum(size - 1, 1e-3)
        if b1 is None:
            return state, Moments(means, jax.tree.map(lambda v: jnp.where(known, v, jnp.inf), variances), dof=dof)
        # A batch that says nothing of its noise is left out of both averages, and so is a gradient that is not finite.
        counted = jnp.where(known, optax.safe_increment(state.step), state.step)
        step = jnp.maximum(counted, 1)
        decay = safe_decay(b1, float)
        finite = [jax.tree.map(lambda x: known & jnp.isfinite(x), tree) for tree in (means, variances)]
        mean, mean_hat = ema(means, state.mean, decay, step, where=finite[0])
        # The raw average of variances has the squared weights, (1 - b1)² b1^(2(t - i)).
        weight = (1 - decay) / (1 + decay)
        weighted = jax.tree.map(lambda v: weight.astype(v.dtype) * v, variances)
        variance, _ = ema(weighted, state.variance, decay**2, step, where=finite[1])
        c, fourth = sum_of_squared_weights(decay, step), sum_of_squared_weights(decay**2, step)
        total = one_minus_power(decay, step) ** 2 * c

        def corrected(variance: jax.Array) -> jax.Array:
            return jnp.where(known, variance / total.astype(variance.dtype), jnp.inf)

        # Σ w_i⁴ / (Σ w_i²)² is the sum of squares of the weights w_i²/Σ w_j², which decay with b1².
        moments = Moments(mean_hat, jax.tree.map(corrected, variance), noise_ratio=c, dof=dof / fourth)
        return BatchStatisticState(counted, mean, variance), moments

    return Statistic(init, update)


def join_moments(
    mean_grads: optax.Updates, sum_sq_diff_grads: optax.Updates, sample_size: ArrayLike, *, axis_name: Any
) -> dict[str, Any]:
    """The moments of all devices' examples, exactly, from those of each device's own (Chan, Golub & LeVeque).

        n = Σ n_d,   ḡ = Σ n_d ḡ_d / n,   D = Σ [D_d + n_d (ḡ_d - ḡ)²]

    To be called where `axis_name` is bound: inside `jax.shard_map`, `jax.pmap` or `jax.vmap(axis_name=...)`. Where
    examples are sharded in one global program (`jax.jit` over sharded arrays), `entk.gradient_moments` of the global
    batch is already exact.

    Args:
      mean_grads, sum_sq_diff_grads, sample_size: moments of this device's examples; sizes may differ.
      axis_name: of the mesh axis (or axes) over which examples are spread.

    Returns:
      A dict with the same three names, equal on every device:
      `tx.update(joined["mean_grads"], state, params, **joined)`.

    Raises:
      NameError: axis_name is not bound here.
      ValueError: the means are known to be the same on every device. Inside `jax.shard_map` a gradient with respect to
        replicated parameters is already summed over devices; take this device's own with respect to
        `jax.lax.pcast(params, axis_name, to="varying")`.

    Cost: two all-reduces of a tree like the parameters.

    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), for the moments of
    Litman & Guo, arXiv:2605.01172.

    >>> means, spreads = jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0])  # of two devices with two examples each
    >>> joined = jax.vmap(lambda m, d: join_moments(m, d, 2, axis_name="devices"), axis_name="devices")(means, spreads)
    >>> joined["mean_grads"][0].item(), joined["sum_sq_diff_grads"][0].item(), joined["sample_size"][0].item()
    (2.0, 8.0, 4.0)
    """
    _check_varying(mean_grads, axis_name)
    size = jnp.asarray(sample_size).astype(float)
    total = jax.lax.psum(size, axis_name)

    def joined_mean(own: ArrayLike) -> jax.Array:
        # Divided in the gradients' precision: a share in float32 would cost float64 ones half their digits.
        own = jnp.asarray(own, compute_dtype(own))
        return jax.lax.psum(size.astype(own.dtype) / total.astype(own.dtype) * own, axis_name)

    def spread(own: ArrayLike, own_mean: ArrayLike, mean: jax.Array) -> jax.Array:
        dtype = compute_dtype(own, own_mean)
        own, shift = jnp.asarray(own, dtype), jnp.asarray(own_mean, dtype) - mean.astype(dtype)
        return jax.lax.psum(own + size.astype(dtype) * shift**2, axis_name)

    mean = jax.tree.map(joined_mean, mean_grads)
    return {
        "mean_grads": jax.tree.map(lambda joined, own: joined.astype(jnp.result_type(own)), mean, mean_grads),
        "sum_sq_diff_grads": jax.tree.map(spread, sum_sq_diff_grads, mean_grads, mean),
        "sample_size": total,
    }


def _check_varying(mean_grads: optax.Updates, axis_name: Any) -> None:
    for name in axis_name if isinstance(axis_name, tuple) else (axis_name,):

        def varies(value: ArrayLike, name: Any = name) -> bool:
            kind = jax.typeof(value)
            kind = getattr(kind, "mat", kind)  # from JAX 0.10.2 on
            return name in getattr(kind, "varying", getattr(kind, "vma", ()))

        # Without check_vma (and under vmap) nothing is known to vary, not even the device's own number.
        if varies(jax.lax.axis_index(name)) and not any(map(varies, jax.tree.leaves(mean_grads))):
            raise ValueError(
                f"mean_grads must be each device's own, got the same along {name!r} everywhere: inside jax.shard_map a "
                "gradient with respect to replicated parameters is already summed over devices. Differentiate with "
                f"respect to jax.lax.pcast(params, {name!r}, to='varying')."
            )


def _variance(sum_sq_diff: ArrayLike, scale: jax.Array) -> jax.Array:
    spread = jnp.asarray(sum_sq_diff, compute_dtype(sum_sq_diff))
    return jnp.maximum(spread, 0) * scale.astype(spread.dtype)


def _check_given(**moments: Any) -> None:
    missing = [name for name, value in moments.items() if value is None]
    if missing:
        raise TypeError(
            f"batch_statistic() needs the moments of the batch, and {' and '.join(missing)} did not come: moments = "
            "entk.gradient_moments(loss_fn, params, batch), then tx.update(moments.mean_grads, state, params, "
            "**moments._asdict()). ema_statistic() needs gradients alone."
        )


def _check_not_accumulated() -> None:
    """Raise inside `optax.MultiSteps`: nothing that reaches a transformation tells it that its gradient is an average.

    A step is traced (or run) while `MultiSteps.update` is on the stack, so that is looked up by its code object.
    """
    accumulating, frame = optax.MultiSteps.update.__code__, inspect.currentframe()
    while frame is not None:
        if frame.f_code is accumulating:
            raise NotImplementedError(
                "batch_statistic() inside optax.MultiSteps: that averages gradients over micro-batches, but passes the "
                "moments of the last one only. Take the moments of the whole batch, entk.gradient_moments(loss_fn, "
                "params, batch, microbatch_size=...), accumulate them with optax.experimental.aggregating (see "
                "batch_statistic), or use ema_statistic(), which takes each averaged gradient for one batch."
            )
        frame = frame.f_back


def _check_moments(grads: Any, mean_grads: Any, sum_sq_diff_grads: Any, sample_size: Any) -> None:
    for name, tree in (("mean_grads", mean_grads), ("sum_sq_diff_grads", sum_sq_diff_grads)):
        expected, got = (jax.tree.map(jnp.shape, t) for t in (grads, tree))
        if expected != got:
            raise ValueError(
                f"{name} must be a tree of the gradients' shapes, got {_shown(got)} for gradients {_shown(expected)}. "
                "Pass the moments of the same parameters: entk.gradient_moments(loss_fn, params, batch)."
            )
    _validation.check_sample_size(sample_size)


def _shown(shapes: Any) -> str:
    text = str(shapes)
    return text if len(text) <= 200 else text[:200] + " ..."
