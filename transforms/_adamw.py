"""AdamW whose direction is gated and whose decay is not, in one call."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from transforms import _validation
from transforms._estimators.adam import adam_statistic
from transforms._estimators.averages import compute_dtype, safe_decay
from transforms._estimators.base import Statistic
from transforms._gate import check_statistic, poprisk_gate
from transforms._masks import HardMask, Mask
from transforms._monitor import Summary
from transforms._reductions import PerScalar, Reduction
from transforms._thresholds import Threshold, TStatistic


def poprisk_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    *,
    statistic: Statistic = adam_statistic(),  # noqa: B008 (a pair of pure functions)
    threshold: Threshold = TStatistic(),  # noqa: B008 (frozen)
    mask: Mask = HardMask(),  # noqa: B008 (frozen)
    reduction: Reduction = PerScalar(),  # noqa: B008 (frozen)
    warmup: ArrayLike = 0,
    floor: ArrayLike = 0.0,
    summary: Summary | None = Summary(),  # noqa: B008 (frozen)
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a population-risk gate on Adam's direction and none on the decay, as in the paper's Algorithm 1.

        s <- rho s + (1 - rho) (g - m)²     (m still of the previous step, not bias-corrected)
        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g²
        q = mask.openness(m̂², noise of m̂, tau)             (hats: bias-corrected)
        w <- w - learning_rate (q ⊙ m̂ / (√(v̂ + eps_root) + eps) + weight_decay w)

    It is `poprisk_gate(optax.scale_by_adam(...))` followed by `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`, except that the statistic reads Adam's m instead of keeping a copy. Arguments up to
    `weight_decay` are those of `optax.adamw`, in its order and with its defaults. `algorithm_1` is this with the
    paper's own threshold and mask.

    Args:
      learning_rate: >= 0, or a schedule of the step count.
      b1: decay of m, in [0, 1). m is also the statistic's mean.
      b2: decay of v, in [0, 1).
      eps: in Adam's denominator, in units of the gradient, >= 0. Masks have an eps of their own.
      eps_root: under Adam's square root, in units of the gradient squared, >= 0.
      mu_dtype: dtype in which m is stored. None is float32, or float64 for float64 parameters; `jnp.bfloat16` halves it
        and rounds to nearest, as optax does.
      weight_decay: >= 0, or a schedule of the step count; multiplied by the learning rate, as in optax.
      statistic: `adam_statistic(rho)` keeps one number a parameter, `adam_moments_statistic()` none;
        `batch_statistic()` is exact, from extra arguments.
      threshold, mask, reduction, warmup, floor, summary: as in `poprisk_gate`. `mask` is not a tree of booleans:
        that is `weight_decay_mask`.
      weight_decay_mask: which parameters decay: `mask` of `optax.adamw`, a tree of booleans (or a prefix of one) or a
        function from params to one.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` needs `params`, for the decay.

    Raises:
      ValueError: a number out of the range stated above.
      TypeError: an argument of the wrong kind, or (at `init`) a parameter that is not real floating-point.

    The defaults are the leave-one-out rule (10) on the streaming t-statistic. They were chosen by `python -m
    experiments gate`, where every optimizer is tuned as hard as AdamW: better on regressions in which few coordinates
    matter, no decided difference nearly everywhere else (images with wrong labels, text). Larger z, or
    `OpenShare(0.05)`, gains more in the first case and loses in some of the others. Where batches are redrawn from n
    examples, say so, `adam_statistic(data_noise=finite_data_alpha(b, n))`: else the gate takes the training set's own
    noise for signal.

    With a neutral gate, `mask=SnrMask(lam=0)` or `floor=1`, it equals `optax.adamw`; for parameters in half precision,
    `optax.adamw` of their float32 copies. All of it is computed, and m, v and s are kept, in at least float32, whatever
    the parameters are: in bfloat16 the average of a constant would stop at a quarter to a half of it for v, at 0.8 for
    s. The updates have the gradients' dtype.

    Not supported: Nesterov momentum; complex and integer parameters.

    Cost: the state of `optax.adamw` plus exactly one number a parameter (s; 4 bytes, or 2 with
    `adam_statistic(state_dtype=jnp.bfloat16)`), or none with `adam_moments_statistic`, besides a few scalars and a name
    for each leaf; about 20 flops a parameter more.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> import jax, jax.numpy as jnp
    >>> tx = poprisk_adamw(learning_rate=0.1, weight_decay=0.01)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(params), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> [f"{w:.2f}" for w in params]
    ['0.80', '-1.79']

    Every number is injectable; a schedule inside the gate's objects needs nothing:

    >>> tx = optax.inject_hyperparams(poprisk_adamw)(learning_rate=optax.cosine_decay_schedule(1e-3, 1000))
    >>> sorted(tx.init(params).hyperparams)
    ['b1', 'b2', 'eps', 'eps_root', 'floor', 'learning_rate', 'warmup', 'weight_decay']
    >>> tx = poprisk_adamw(1e-3, threshold=TStatistic(optax.linear_schedule(0.0, 1.0, transition_steps=100)))
    """
    check_statistic(statistic)
    _validation.check_state_dtype("mu_dtype", mu_dtype)
    _validation.check_decay("b1", b1)
    _validation.check_decay("b2", b2)
    # Traced decays cannot be checked: the nearest number in range stands for them.
    b1, b2 = (b if _validation.is_known(b, lambda b: True) else safe_decay(b, float) for b in (b1, b2))
    _validation.check_nonnegative("eps", eps, "use 1e-8, Adam's usual")
    _validation.check_nonnegative("eps_root", eps_root, "use 0, Adam's usual")
    remedy = "updates already point downhill; use e.g. 1e-3"
    _validation.check_nonnegative_or_schedule("learning_rate", learning_rate, remedy)
    _validation.check_nonnegative_or_schedule("weight_decay", weight_decay, "use 0 for no decay")
    tx = optax.chain(
        poprisk_gate(
            optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
            statistic=Statistic(statistic.init, functools.partial(statistic.update, b1=b1, b2=b2)),
            threshold=threshold,
            mask=mask,
            reduction=reduction,
            warmup=warmup,
            floor=floor,
            summary=summary,
        ),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def init(params: optax.Params) -> optax.OptState:
        _validation.check_float_leaves(params)
        return tx.init(_wide(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer power
            steps, state = tx.update(_wide(updates), state, _wide(params), **extra_args)
        return jax.tree.map(lambda step, grad: step.astype(jnp.result_type(grad)), steps, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(tree: Any) -> Any:
    """Its leaves in at least float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, compute_dtype(leaf)), tree)
