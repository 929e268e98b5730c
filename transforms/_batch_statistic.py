"""The exact statistic of a batch, from moments that the caller took of its examples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from transforms import _validation
from transforms._statistic import Moments, Statistic, compute_dtype, ema, sum_of_squared_weights, zeros_like


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

    Micro-batches do as well: pass the moments of their k mean gradients, with `sample_size=k`. The aggregators of
    `optax.experimental.microbatching` and `aggregating` produce the same names.

    Args:
      b1: decay of an average over steps, in [0, 1); None takes each batch by itself, without a state.

    Returns:
      A `Statistic`. Its update needs `sum_sq_diff_grads` (tree like the gradients) and `sample_size` (>= 2), and takes
      `mean_grads`; where that is missing, the gradients are the means.

    Raises:
      ValueError: b1 outside [0, 1). At the update: a sample_size below 2, or a tree of moments unlike the gradients.
      TypeError: b1 not a number. At the update: a missing extra argument.

    A traced sample_size below 2 cannot be refused; it gives infinite noise, which shuts the gate for this step, and
    averages over steps pass the batch over. A negative sum of squares, which rounding can bring, counts as zero.

    Not supported: `optax.MultiSteps` around it, which passes the extra arguments of its last micro-batch only; join
    the moments instead (`join_moments`).

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
        sum_sq_diff_grads: optax.Updates,
        sample_size: ArrayLike,
        mean_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Moments]:
        del params, extra_args
        mean_grads = grads if mean_grads is None else mean_grads
        _check_moments(grads, mean_grads, sum_sq_diff_grads, sample_size)
        size = jnp.asarray(sample_size, float)
        scale = jnp.where(size > 1, 1 / (size * jnp.maximum(size - 1, 1)), jnp.inf)
        variances = jax.tree.map(lambda d: _variance(d, scale), sum_sq_diff_grads)
        means = jax.tree.map(lambda g: jnp.asarray(g, compute_dtype(g)), mean_grads)
        dof = jnp.maximum(size - 1, 1e-3)
        if b1 is None:
            return state, Moments(means, variances, dof=dof)
        # A batch that says nothing of its noise is left out of both averages.
        known = size > 1
        counted = jnp.where(known, optax.safe_increment(state.step), state.step)
        step = jnp.maximum(counted, 1)
        mean, mean_hat = ema(jax.tree.map(lambda m: jnp.where(known, m, jnp.nan), means), state.mean, b1, step)
        # The raw average of variances has the squared weights, (1 - b1)² b1^(2(t - i)).
        decay = jnp.asarray(b1, float)
        weight = (1 - decay) / (1 + decay)
        variance, _ = ema(jax.tree.map(lambda v: weight * v, variances), state.variance, decay**2, step)
        c, fourth = sum_of_squared_weights(b1, step), sum_of_squared_weights(decay**2, step)
        total = (1 - decay**step) ** 2
        # Σ w_i⁴ / (Σ w_i²)² is the sum of squares of the weights w_i²/Σ w_j², which decay with b1².
        variance_hat = jax.tree.map(lambda v: jnp.where(known, v / (total * c), jnp.inf), variance)
        moments = Moments(mean_hat, variance_hat, noise_ratio=c, dof=dof / fourth)
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
    size = jnp.asarray(sample_size, float)
    total = jax.lax.psum(size, axis_name)

    def joined_mean(own: ArrayLike) -> jax.Array:
        # Divided in the gradients' precision: a share in float32 would cost float64 ones half their digits.
        dtype = compute_dtype(own)
        return jax.lax.psum(size.astype(dtype) / total.astype(dtype) * own, axis_name)

    def spread(own: ArrayLike, own_mean: ArrayLike, mean: jax.Array) -> jax.Array:
        own = jnp.asarray(own, compute_dtype(own))
        return jax.lax.psum(own + size.astype(own.dtype) * (own_mean - mean) ** 2, axis_name)

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
    spread = jnp.maximum(jnp.asarray(sum_sq_diff, compute_dtype(sum_sq_diff)), 0)
    return jnp.where(jnp.isinf(scale), jnp.inf, spread * scale)  # 0 · inf


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
