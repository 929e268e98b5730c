"""The paper's Algorithm 1 in one call: AdamW whose direction is gated and whose decay is not."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from transforms import _validation
from transforms._gate import poprisk_gate
from transforms._masks import Mask, SnrMask
from transforms._statistic import adam_statistic


def poprisk_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    *,
    rho: ArrayLike = 0.99,
    mask: Mask = SnrMask(),  # noqa: B008 (frozen)
    state_dtype: DTypeLike | None = None,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a population-risk gate on Adam's direction and none on the decay: the paper's Algorithm 1.

        s <- rho s + (1 - rho) (g - m)²     (m still of the previous step, not bias-corrected)
        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g²
        q = mask.openness(m̂, ŝ)             (hats: bias-corrected)
        w <- w - learning_rate (q ⊙ m̂ / (√(v̂ + eps_root) + eps) + weight_decay w)

    It is `poprisk_gate(optax.scale_by_adam(...))` followed by `optax.add_decayed_weights` and
    `optax.scale_by_learning_rate`, except that the statistic reads Adam's m instead of keeping a copy. Arguments up to
    `weight_decay` are those of `optax.adamw`, in its order and with its defaults.

    Args:
      learning_rate: >= 0, or a schedule of the step count.
      b1: decay of m, in [0, 1). m is also the statistic's mean.
      b2: decay of v, in [0, 1).
      eps: in Adam's denominator, in units of the gradient, >= 0. The mask has an eps of its own.
      eps_root: under Adam's square root, in units of the gradient squared, >= 0.
      mu_dtype: dtype in which m is stored; None for the parameters' own.
      weight_decay: >= 0, or a schedule of the step count; multiplied by the learning rate, as in optax.
      rho: decay of s, in [0, 1).
      mask: what turns m̂ and ŝ into q: `HardMask`, `SoftMask`, `SnrMask`, or any object with
        `openness(mean, variance) -> q`. Not a tree of booleans: that is `weight_decay_mask`.
      state_dtype: dtype in which s is stored; None for the parameters' own.
      weight_decay_mask: which parameters decay: `mask` of `optax.adamw`, a tree of booleans (or a prefix of one) or a
        function from params to one.

    Returns:
      An `optax.GradientTransformationExtraArgs`. `update` needs `params`, for the decay.

    Raises:
      ValueError: a number out of the range stated above.
      TypeError: an argument of the wrong kind, or (at `init`) a parameter that is not real floating-point.

    With a neutral mask, `SnrMask(lam=0, eps=0)`, it equals `optax.adamw`.

    Not supported: Nesterov momentum; complex and integer parameters.

    Cost: the state of `optax.adamw` plus exactly one number a parameter (s; 4 bytes in float32), and about 20 flops a
    parameter more.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1.

    >>> import jax, jax.numpy as jnp
    >>> tx = poprisk_adamw(learning_rate=0.1, weight_decay=0.01)
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(params), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> [f"{w:.2f}" for w in params]
    ['0.84', '-1.84']

    Every number is injectable; a schedule inside the mask takes a function that builds the optimizer (see
    `poprisk_gate`):

    >>> tx = optax.inject_hyperparams(poprisk_adamw)(learning_rate=optax.cosine_decay_schedule(1e-3, 1000), rho=0.95)
    >>> sorted(tx.init(params).hyperparams)
    ['b1', 'b2', 'eps', 'eps_root', 'learning_rate', 'rho', 'weight_decay']
    """
    _validation.check_decay("b2", b2)
    _validation.check_nonnegative("eps", eps, "use 1e-8, Adam's usual")
    _validation.check_nonnegative("eps_root", eps_root, "use 0, Adam's usual")
    if not callable(learning_rate):
        _validation.check_nonnegative("learning_rate", learning_rate, "updates already point downhill; use e.g. 1e-3")
    if not callable(weight_decay):
        _validation.check_nonnegative("weight_decay", weight_decay, "use 0 for no decay")
    return optax.chain(
        poprisk_gate(
            optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
            statistic=adam_statistic(b1, rho, state_dtype=state_dtype),
            mask=mask,
        ),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
