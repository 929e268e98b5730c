"""The gate: an optax transformation that multiplies what another one proposes by how open each coordinate is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from transforms import _validation
from transforms._estimators.averages import compute_dtype
from transforms._estimators.base import Statistic
from transforms._estimators.ema import ema_statistic
from transforms._masks import Mask, SnrMask, capped
from transforms._monitor import Summary, no_summary, summary_of
from transforms._reductions import PerScalar, Pooled, Reduction, debiased
from transforms._thresholds import Threshold, TStatistic


class PopriskGateState(NamedTuple):
    """State of `poprisk_gate`.

    Attributes:
      step: steps taken.
      statistic_state: that of the statistic.
      inner_state: that of the transformation it wraps.
      summary: what the gate did lately, an array with a row for each leaf that `LeafSummary(*row)` names; `gate_report`
        shows it. None with `summary=None`.
      leaf_names: names of these leaves, rows of UTF-8 bytes. None with `summary=None`.
    """

    step: jax.Array
    statistic_state: Any
    inner_state: optax.OptState
    summary: Any
    leaf_names: Any


def poprisk_gate(
    inner: optax.GradientTransformation = optax.identity(),  # noqa: B008 (a pair of pure functions)
    *,
    statistic: Statistic = ema_statistic(),  # noqa: B008 (a pair of pure functions)
    threshold: Threshold = TStatistic(),  # noqa: B008 (frozen)
    mask: Mask = SnrMask(),  # noqa: B008 (frozen)
    reduction: Reduction = PerScalar(),  # noqa: B008 (frozen)
    warmup: ArrayLike = 0,
    floor: ArrayLike = 0.0,
    summary: Summary | None = Summary(),  # noqa: B008 (frozen)
) -> optax.GradientTransformationExtraArgs:
    """Scale each coordinate of an update by how well its gradient stands out of the noise.

        (m̂, ŝ, c) from statistic, fed with the raw gradient g;   (unit, tau) from threshold
        q = mask.openness(m̂², unit ŝ, tau),   m̂² and ŝ averaged over the blocks of reduction
        update = max(q, floor) ⊙ inner(g)

    What `inner` is decides where the gate stands, and the placements are different optimizers:

    - `optax.chain(poprisk_gate(), optax.adam(1e-3))` gates the **gradient** that Adam sees. Adam divides by its own
      second moment, so a slowly varying q is partly normalised away.
    - `poprisk_gate(optax.adam(1e-3))` gates the **step** that Adam takes.
    - `poprisk_gate(optax.adamw(1e-3))` gates the **weight decay** too: its step is -lr q ⊙ (direction + decay w), so
      that shut coordinates do not decay. In the paper's Algorithm 1 the decay stands outside the gate,
      -lr (q ⊙ direction + decay w), and every coordinate decays. That optimizer is `poprisk_adamw`.

    Args:
      inner: the transformation to gate. It receives the gradient, `params` and every extra argument unchanged, and its
        state advances as if there were no gate.
      statistic: what estimates mean and variance of the gradient: `ema_statistic(b1=0.9, rho=0.99)` from the stream of
        batches, `batch_statistic()` exactly from the examples of each batch.
      threshold: where noise ends: `TStatistic(z)` on the statistic's own t-statistic, `OpenShare(share)` of pure-noise
        coordinates, `Alpha(alpha)` as the paper has it.
      mask: how signal over noise becomes q: `HardMask`, `SoftMask`, `SnrMask`, or any object with
        `openness(signal, noise, tau) -> q`, elementwise on arrays.
      reduction: which coordinates are decided on together: `PerScalar`, `PerRow`, `PerTensor`, `ByLabel`.
      warmup: steps at the start during which the gate is open and its statistic only watches, >= 0.
      floor: the least q, in [0, 1]; 0 lets the gate shut, 1 makes it neutral.
      summary: what the state keeps for `gate_report`, and how often; None keeps nothing.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its state is a `PopriskGateState`. Updates keep their dtype.

    Raises:
      TypeError: an argument of the wrong kind, or (at `init`) a parameter that is not real floating-point.
      ValueError: warmup or floor out of the range stated above.

    The gate is neutral, that is equal to `inner`, for `mask=SnrMask(lam=0)` and for `floor=1`. q does not depend on the
    scale of the loss, as long as squared gradients are representable (in float32, gradients from 1e-19 to 1e19), and
    nothing that the gate computes of finite gradients is NaN. Where a gradient is not finite, the statistic stays as it
    was; `inner` sees that gradient all the same, and `optax.apply_if_finite` around the whole optimizer keeps its state
    clean. Inside `optax.MultiSteps` the statistic sees the accumulated gradients, each of them one batch;
    `batch_statistic` refuses it.

    The statistic is kept and q computed in at least float32, whatever the parameters are. `inner` keeps what it keeps:
    `optax.adam` of bfloat16 parameters has bfloat16 moments, `poprisk_adamw` has not.

    Not supported: complex and integer parameters (keep them out with `optax.masked`).

    Cost: that of `inner` and of `statistic` (for `ema_statistic`: two numbers a parameter, 8 bytes in float32, its own
    mean even where `inner` keeps one), and about 20 flops a parameter.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1, with thresholds on the t-statistic instead of alpha.

    >>> tx = poprisk_gate(optax.sgd(1.0))
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> for g in ([1.0, 1.0], [1.0, -1.0], [1.0, 1.0]):  # a steady and a noisy coordinate
    ...     updates, state = tx.update(jnp.array(g), state, params)
    >>> [f"{u:.2f}" for u in updates]
    ['-0.79', '-0.24']

    Hyper-parameters, scheduled or changed by hand without recompiling:

    >>> @optax.inject_hyperparams
    ... def gated_adam(learning_rate, z):
    ...     return poprisk_gate(optax.adam(learning_rate), threshold=TStatistic(z))
    >>> tx = gated_adam(1e-3, z=optax.linear_schedule(0.0, 1.0, transition_steps=100))
    >>> state = tx.init(params)
    >>> state.hyperparams["learning_rate"] = jnp.asarray(3e-4)
    """
    _validation.check_transformation("inner", inner)
    check_statistic(statistic)
    _validation.check_method("threshold", threshold, "level", "TStatistic(z) or OpenShare(share)")
    _validation.check_method("mask", mask, "openness", "HardMask(), SoftMask() and SnrMask()")
    _validation.check_method("reduction", reduction, "pool", "PerScalar(), PerRow() and PerTensor()")
    _validation.check_nonnegative("warmup", warmup, "use 0 for a gate that acts from the first step")
    _validation.check_share("floor", floor)
    _check_summary(summary)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> PopriskGateState:
        _validation.check_float_leaves(params)
        rows, names = (None, None) if summary is None else no_summary(params, summary)
        return PopriskGateState(jnp.zeros([], jnp.int32), statistic.init(params), inner.init(params), rows, names)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PopriskGateState]:
        step = jnp.asarray(optax.safe_increment(state.step))
        proposed, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        statistic_args = extra_args | {"inner_state": state.inner_state, "new_inner_state": inner_state}
        statistic_state, moments = statistic.update(updates, state.statistic_state, params, **statistic_args)
        level = threshold.level(moments, state.step)
        treedef = jax.tree.structure(moments.mean)
        signal = jax.tree.map(lambda mean: capped(jnp.square(mean)), moments.mean)
        noise = jax.tree.map(lambda var: capped(jnp.asarray(level.unit, var.dtype) * var), moments.variance)
        blocks = treedef.flatten_up_to(reduction.pool(signal, noise))
        pooled = [block._replace(num_together=debiased(block.num_together, moments.dof)) for block in blocks]
        watching = step.astype(jnp.float32) <= jnp.asarray(warmup, jnp.float32)

        def q_of(pooled: Pooled) -> jax.Array:
            dtype = pooled.signal.dtype
            q = mask.openness(pooled.signal, pooled.noise, jnp.asarray(level.tau(pooled.num_together), dtype))
            return jnp.where(watching, 1, jnp.maximum(q.astype(dtype), jnp.asarray(floor, dtype)))

        def gated(pooled: Pooled, proposed: jax.Array) -> jax.Array:
            q = q_of(pooled)
            dtype = compute_dtype(q, proposed)
            return (q.astype(dtype) * jnp.asarray(proposed, dtype)).astype(jnp.result_type(proposed))

        leaves = treedef.flatten_up_to(proposed)
        rows = state.summary
        if summary is not None:
            means, variances = (treedef.flatten_up_to(tree) for tree in (moments.mean, moments.variance))
            samples = [summary.take(*leaf) for leaf in zip(leaves, means, variances, pooled, strict=True)]

            def summarize() -> jax.Array:
                rows = [summary_of(sample, q_of, level, mask, moments) for sample in samples]
                return jnp.stack(rows) if rows else state.summary

            rows = jax.lax.cond(state.step % summary.every == 0, summarize, lambda: state.summary)
        steps = treedef.unflatten(map(gated, pooled, leaves))
        return steps, PopriskGateState(step, statistic_state, inner_state, rows, state.leaf_names)

    return optax.GradientTransformationExtraArgs(init, update)


def check_statistic(statistic: Any) -> None:
    if not isinstance(statistic, Statistic):
        raise TypeError(
            f"statistic must be a transforms.Statistic such as ema_statistic(), got {statistic!r}. Call the factory "
            "first (ema_statistic(), not ema_statistic), or build one with Statistic(init, update)."
        )


def _check_summary(summary: Any) -> None:
    if summary is not None and not isinstance(summary, Summary):
        raise TypeError(f"summary must be a transforms.Summary or None, got {summary!r}: Summary() is the default.")
