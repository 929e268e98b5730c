"""Published gates, to rounding, so that published runs can be repeated; none is what this package recommends."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from transforms._adamw import poprisk_adamw
from transforms._estimators.adam import adam_statistic
from transforms._masks import Mask, SnrMask, SoftMask
from transforms._monitor import Summary
from transforms._reductions import PerScalar, Reduction
from transforms._thresholds import Alpha


def algorithm_1(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    *,
    alpha: optax.ScalarOrSchedule = 1.0,
    mask: Mask = SoftMask(eps=1e-8),  # noqa: B008 (frozen)
    rho: ArrayLike = 0.99,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    reduction: Reduction = PerScalar(),  # noqa: B008 (frozen)
    warmup: ArrayLike = 0,
    floor: ArrayLike = 0.0,
    summary: Summary | None = Summary(),  # noqa: B008 (frozen)
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The paper's Algorithm 1: streaming s, threshold alpha ŝ, soft mask.

    Args:
      learning_rate, weight_decay: as in `poprisk_adamw`. The paper's values were not available to us.
      alpha: 1 for fresh batches, `finite_data_alpha(b, n)` for batches of b redrawn from n examples.
      mask: `SoftMask(lam, eps)`; the paper's other two are `HardMask()` and `SnrMask(lam, eps)`.
      rho: decay of s.
      b1, b2, eps, eps_root, mu_dtype, reduction, warmup, floor, summary, weight_decay_mask: as in `poprisk_adamw`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError, TypeError: as `poprisk_adamw`.

    Cost: that of `poprisk_adamw`: one number a parameter more than AdamW.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> tx = algorithm_1(1e-3, alpha=0.1)
    """
    return poprisk_adamw(
        learning_rate,
        weight_decay=weight_decay,
        statistic=adam_statistic(rho),
        threshold=Alpha(alpha),
        mask=mask,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        reduction=reduction,
        warmup=warmup,
        floor=floor,
        summary=summary,
        weight_decay_mask=weight_decay_mask,
    )


def popriskmin(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    *,
    alpha: optax.ScalarOrSchedule = 1.0,
    mask: Mask = SnrMask(eps=1e-8),  # noqa: B008 (frozen)
    rho: ArrayLike = 0.99,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    reduction: Reduction = PerScalar(),  # noqa: B008 (frozen)
    warmup: ArrayLike = 0,
    floor: ArrayLike = 0.0,
    summary: Summary | None = Summary(),  # noqa: B008 (frozen)
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The authors' PyTorch package `popriskmin`, with its defaults: Algorithm 1 with the snr mask.

    Its Adam's eps, 1e-8, stands inside the mask as well, in units of the gradient squared, so that the gate depends on
    the scale of the loss.

    Args:
      learning_rate, weight_decay: as in `poprisk_adamw`.
      alpha: 1 for fresh batches, `finite_data_alpha(b, n)` for batches of b redrawn from n examples.
      mask: `SnrMask(lam, eps)`, `SoftMask(lam, eps)` or `HardMask()`; lam is its `softness`.
      reduction: `PerScalar()` or `PerTensor()`.
      rho: decay of s.
      b1, b2, eps, eps_root, mu_dtype, warmup, floor, summary, weight_decay_mask: as in `poprisk_adamw`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError, TypeError: as `poprisk_adamw`.

    Source: Litman & Guo, arXiv:2605.01172. The package's own code was not available to us: this follows its formulas as
    reimplementations and users' calls state them.

    Cost: that of `poprisk_adamw`: one number a parameter more than AdamW.

    >>> tx = popriskmin(3e-4)
    """
    return algorithm_1(
        learning_rate,
        weight_decay,
        alpha=alpha,
        mask=mask,
        rho=rho,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        reduction=reduction,
        warmup=warmup,
        floor=floor,
        summary=summary,
        weight_decay_mask=weight_decay_mask,
    )


def snr_grad(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    alpha: optax.ScalarOrSchedule = 1.0,
    mask: Mask = SnrMask(eps=1e-12),  # noqa: B008 (frozen)
    rho: ArrayLike = 0.99,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    reduction: Reduction = PerScalar(),  # noqa: B008 (frozen)
    warmup: ArrayLike = 0,
    floor: ArrayLike = 0.0,
    summary: Summary | None = Summary(),  # noqa: B008 (frozen)
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`SNRAdamW` of the PyTorch package snr-grad, with its defaults: Algorithm 1 with the snr mask and a small eps.

    Args:
      learning_rate, weight_decay: as in `poprisk_adamw`.
      alpha: its `alpha`: 1 is "online", `finite_data_alpha(b, n)` is "finite".
      mask: `SnrMask(lam, eps)`, `SoftMask(lam, eps)` or `HardMask()`; lam is its `lambda_pop`, eps its `gate_eps`.
      rho: decay of s.
      b1, b2, eps, eps_root, mu_dtype, reduction, warmup, floor, summary, weight_decay_mask: as in `poprisk_adamw`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError, TypeError: as `poprisk_adamw`.

    Not supported: its freezing, its adaptive thresholds and its Grokfast option.

    Cost: that of `poprisk_adamw`: one number a parameter more than AdamW.

    Source: github.com/mattsq/snr-grad, after arXiv:2605.01172.

    >>> tx = snr_grad(3e-4, mask=SnrMask(lam=2.0, eps=1e-12))
    """
    return algorithm_1(
        learning_rate,
        weight_decay,
        alpha=alpha,
        mask=mask,
        rho=rho,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        reduction=reduction,
        warmup=warmup,
        floor=floor,
        summary=summary,
        weight_decay_mask=weight_decay_mask,
    )
