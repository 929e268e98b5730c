"""The gate: an optax transformation that multiplies what another one proposes by how open each coordinate is."""

from typing import Any, NamedTuple

import jax
import optax

from transforms import _validation
from transforms._masks import Mask, SnrMask
from transforms._statistic import Statistic, ema_statistic


class PopriskGateState(NamedTuple):
    """State of `poprisk_gate`: that of its statistic, and that of the transformation it wraps."""

    statistic_state: Any
    inner_state: optax.OptState


def poprisk_gate(
    inner: optax.GradientTransformation = optax.identity(),  # noqa: B008 (a pair of pure functions)
    *,
    statistic: Statistic = ema_statistic(),  # noqa: B008 (a pair of pure functions)
    mask: Mask = SnrMask(),  # noqa: B008 (frozen)
) -> optax.GradientTransformationExtraArgs:
    """Scale each coordinate of an update by how well its gradient stands out of the noise.

        q = mask.openness(m̂, ŝ),   (m̂, ŝ) from statistic, fed with the raw gradient g
        update = q ⊙ inner(g)

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
      statistic: what estimates mean and variance of the gradient, e.g. `ema_statistic(b1=0.9, rho=0.99)`.
      mask: what turns them into q: `HardMask`, `SoftMask`, `SnrMask`, or any object with
        `openness(mean, variance) -> q`, elementwise on arrays.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its state is a `PopriskGateState`. Updates keep their dtype.

    Raises:
      TypeError: inner, statistic or mask of the wrong kind, or (at `init`) a parameter that is not real floating-point.

    The gate is neutral, that is equal to `inner`, for `mask=SnrMask(lam=0, eps=0)` and
    `mask=SoftMask(alpha=0, lam=0, eps=0)`. For finite gradients q is never NaN. A NaN gradient enters the statistic as
    it enters Adam's moments; `optax.apply_if_finite` around the whole optimizer keeps both clean. Inside
    `optax.MultiSteps` the statistic sees the accumulated gradients, each of them one batch.

    Not supported: complex and integer parameters (keep them out with `optax.masked`).

    Cost: that of `inner` and of `statistic` (for `ema_statistic`: two numbers a parameter, 8 bytes in float32, its own
    mean even where `inner` keeps one), and a few flops a parameter.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1.

    >>> import jax.numpy as jnp
    >>> tx = poprisk_gate(optax.sgd(1.0), mask=SnrMask(eps=0.0))
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> for g in ([1.0, 1.0], [1.0, -1.0], [1.0, 1.0]):  # a steady and a noisy coordinate
    ...     updates, state = tx.update(jnp.array(g), state, params)
    >>> [f"{u:.2f}" for u in updates]
    ['-0.55', '-0.09']

    Hyper-parameters, scheduled or changed by hand without recompiling:

    >>> @optax.inject_hyperparams
    ... def gated_adam(learning_rate, alpha):
    ...     return poprisk_gate(optax.adam(learning_rate), mask=SnrMask(alpha=alpha))
    >>> tx = gated_adam(1e-3, alpha=optax.linear_schedule(0.0, 1.0, transition_steps=100))
    >>> state = tx.init(params)
    >>> state.hyperparams["learning_rate"] = jnp.asarray(3e-4)
    """
    _validation.check_transformation("inner", inner)
    _check_statistic(statistic)
    _check_mask(mask)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> PopriskGateState:
        return PopriskGateState(statistic.init(params), inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PopriskGateState]:
        statistic_args = extra_args | {"inner_state": state.inner_state}
        statistic_state, moments = statistic.update(updates, state.statistic_state, params, **statistic_args)
        openness = jax.tree.map(mask.openness, moments.mean, moments.variance)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        updates = jax.tree.map(lambda q, u: (q * u).astype(u.dtype), openness, updates)
        return updates, PopriskGateState(statistic_state, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_statistic(statistic: Any) -> None:
    if not isinstance(statistic, Statistic):
        raise TypeError(
            f"statistic must be a transforms.Statistic such as ema_statistic(), got {statistic!r}. Call the factory "
            "first (ema_statistic(), not ema_statistic), or build one with Statistic(init, update)."
        )


def _check_mask(mask: Any) -> None:
    # The class HardMask has the method too, so an uncalled factory needs its own test.
    if isinstance(mask, type) or not callable(getattr(mask, "openness", None)):
        raise TypeError(
            f"mask must have a method openness(mean, variance), as HardMask(), SoftMask() and SnrMask() have, got "
            f"{mask!r}. A tree or function that selects parameters belongs in optax.masked or in weight_decay_mask."
        )
