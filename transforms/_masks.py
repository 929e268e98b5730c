"""Masks: how open each coordinate is, q in [0, 1], given the mean and the variance of its gradient.

A mask is a frozen dataclass of numbers with one method, `openness(mean, variance)`, elementwise on arrays. Any object
with that method will do. It is a method rather than a call because optax takes every callable hyper-parameter for a
schedule: `optax.inject_hyperparams(poprisk_adamw)(learning_rate=1e-3)` would call the mask with a step number.

Fields may be arrays, traced ones included, and every mask here is a pytree of its fields. So a mask can be an argument
of a jitted function, or be swept with `jax.vmap`, without being recompiled for each value.
"""

import dataclasses
import operator
from typing import Protocol, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from transforms import _validation

_T = TypeVar("_T")


class Mask(Protocol):
    """Anything with `openness(mean, variance) -> q`, elementwise on arrays of one shape, with q in [0, 1]."""

    def openness(self, mean: jax.Array, variance: jax.Array, /) -> jax.Array: ...


def _pytree(cls: type[_T]) -> type[_T]:
    """Register a dataclass as a pytree of its fields."""
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]

    def flatten_with_keys(mask: _T):
        return [(jax.tree_util.GetAttrKey(name), getattr(mask, name)) for name in names], None

    def unflatten(_: None, children) -> _T:
        # JAX rebuilds nodes around placeholders, which the range checks of a constructor would refuse.
        mask = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(mask, name, child)
        return mask

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


@_pytree
@dataclasses.dataclass(frozen=True)
class HardMask:
    """The paper's hard gate: open where the squared mean exceeds the threshold, shut elsewhere.

        q = 1[m̂² > alpha ŝ]

    The inequality is strict: a coordinate that has only seen zero gradients (0 > 0) is shut.

    With `ema_statistic` at its defaults and alpha = 1 this is far stricter than it looks: m̂ averages about 19 batches
    while ŝ is the variance of one. That is a 4.5-sigma test, which leaves 0.002 % of pure-noise coordinates open.

    Args:
      alpha: threshold in units of ŝ, >= 0. 1 for fresh batches; `finite_data_alpha` for replayed data.

    Raises:
      ValueError: alpha negative or not finite.
      TypeError: alpha not a number.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1.

    >>> import jax.numpy as jnp
    >>> print(HardMask().openness(jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 4.0, 0.0])))
    [1. 0. 0.]
    """

    alpha: ArrayLike = 1.0

    def __post_init__(self):
        _check_alpha(self.alpha)

    def openness(self, mean: jax.Array, variance: jax.Array, /) -> jax.Array:
        """q, with the shape of `mean` and `variance`."""
        signal, noise = _capped(jnp.square(mean)), _capped(variance)
        return (signal > self.alpha * noise).astype(signal.dtype)


@_pytree
@dataclasses.dataclass(frozen=True)
class SoftMask:
    """The paper's soft gate: shut below the threshold, opening smoothly above it.

        q = (m̂² - alpha ŝ)₊ / ((m̂² - alpha ŝ)₊ + lam ŝ + eps)

    Where lam ŝ + eps is exactly zero this is read as its limit 1[m̂² >= alpha ŝ]. Hence 0/0 (zero mean, zero variance,
    eps = 0) is open, and `SoftMask(alpha=0, lam=0, eps=0)` is neutral: open everywhere. With eps > 0 a coordinate that
    has only seen zero gradients is shut.

    Args:
      alpha: threshold in units of ŝ, >= 0. 1 for fresh batches; `finite_data_alpha` for replayed data.
      lam: width of the transition in units of ŝ, >= 0; 0 makes it the hard gate (up to eps).
      eps: in units of the gradient squared, >= 0. It is absolute: multiplying the loss by a constant changes q, and a
        coordinate with m̂² well below eps is shut whatever its variance.

    Raises:
      ValueError: a field negative or not finite.
      TypeError: a field that is not a number.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1.

    >>> import jax.numpy as jnp
    >>> print(SoftMask().openness(jnp.array([2.0, 1.0]), jnp.array([1.0, 4.0])))
    [0.75 0.  ]
    """

    alpha: ArrayLike = 1.0
    lam: ArrayLike = 1.0
    eps: ArrayLike = 1e-8

    def __post_init__(self):
        _check_alpha(self.alpha)
        _check_lam(self.lam)
        _check_eps(self.eps)

    def openness(self, mean: jax.Array, variance: jax.Array, /) -> jax.Array:
        """q, with the shape of `mean` and `variance`."""
        signal, noise = _capped(jnp.square(mean)), _capped(variance)
        excess = signal - self.alpha * noise
        return _share(jnp.maximum(excess, 0), self.lam * noise + self.eps, otherwise=excess >= 0)


@_pytree
@dataclasses.dataclass(frozen=True)
class SnrMask:
    """The paper's signal-to-noise gate, a Wiener-like shrinkage without a threshold.

        q = m̂² / (m̂² + lam alpha ŝ + eps)

    Where lam alpha ŝ + eps is exactly zero this is read as its limit 1. Hence 0/0 (zero mean, zero variance, eps = 0)
    is open, and `SnrMask(lam=0, eps=0)` is neutral: open everywhere. With eps > 0 a coordinate that has only seen zero
    gradients is shut.

    Args:
      alpha: noise level in units of ŝ, >= 0. 1 for fresh batches; `finite_data_alpha` for replayed data.
      lam: strength of the shrinkage, >= 0; only the product lam alpha matters.
      eps: in units of the gradient squared, >= 0. It is absolute: multiplying the loss by a constant changes q, and a
        coordinate with m̂² well below eps is shut whatever its variance (with 1e-8, a noiseless gradient of 3e-5 gets
        q = 0.08).

    Raises:
      ValueError: a field negative or not finite.
      TypeError: a field that is not a number.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1.

    >>> import jax.numpy as jnp
    >>> print(SnrMask().openness(jnp.array([2.0, 1.0]), jnp.array([1.0, 4.0])))
    [0.8 0.2]

    A sweep over one field, compiled once:

    >>> openness = jax.vmap(lambda lam: SnrMask(lam=lam).openness(jnp.array(2.0), jnp.array(1.0)))
    >>> print(openness(jnp.array([0.0, 1.0, 4.0])))
    [1.  0.8 0.5]
    """

    alpha: ArrayLike = 1.0
    lam: ArrayLike = 1.0
    eps: ArrayLike = 1e-8

    def __post_init__(self):
        _check_alpha(self.alpha)
        _check_lam(self.lam)
        _check_eps(self.eps)

    def openness(self, mean: jax.Array, variance: jax.Array, /) -> jax.Array:
        """q, with the shape of `mean` and `variance`."""
        signal, noise = _capped(jnp.square(mean)), _capped(variance)
        return _share(signal, self.lam * _capped(noise * self.alpha) + self.eps, otherwise=True)


def finite_data_alpha(batch_size: SupportsIndex, num_examples: SupportsIndex) -> float:
    """The paper's threshold for batches drawn without replacement from a fixed training set.

        alpha = b / (n - b)

    It vanishes as the data grow, and the gate with it: with `ema_statistic` and `HardMask`, b = 128 and n = 60,000
    leave 84 % of pure-noise coordinates open. Use 1 (the masks' default) when every batch is fresh.

    Args:
      batch_size: b >= 1, examples in a batch.
      num_examples: n > b, examples in the training set.

    Returns:
      alpha, a float > 0.

    Raises:
      ValueError: b < 1 or n <= b.
      TypeError: b or n not an integer.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1.

    >>> finite_data_alpha(batch_size=100, num_examples=1100)
    0.1
    """
    try:
        b, n = operator.index(batch_size), operator.index(num_examples)
    except TypeError:
        raise TypeError(
            f"batch_size and num_examples must be integers, got {batch_size!r} and {num_examples!r}: pass counts of "
            "examples."
        ) from None
    if b < 1:
        raise ValueError(f"batch_size must be >= 1, got {b}: pass the number of examples in a batch.")
    if n <= b:
        raise ValueError(
            f"num_examples must exceed batch_size, got {n} examples and batches of {b}. A batch that holds all the "
            "data leaves nothing to generalize to: use smaller batches, or alpha=1 if batches are fresh."
        )
    return b / (n - b)


def _capped(power: jax.Array) -> jax.Array:
    """Keep a mean square so far from overflow that no ratio of two is inf/inf and no multiple 0·inf."""
    return jnp.minimum(power, float(jnp.finfo(power.dtype).max) / 4)


def _share(part: jax.Array, rest: ArrayLike, otherwise: ArrayLike) -> jax.Array:
    """part / (part + rest) for non-negative numbers; `otherwise` where rest == 0."""
    # The inner where keeps 0/0 out of derivatives through the branch that is not taken.
    total = jnp.where(rest == 0, 1, part + rest)
    return jnp.where(rest == 0, otherwise, part / total).astype(part.dtype)


def _check_alpha(alpha: ArrayLike) -> None:
    remedy = "use 1 for fresh batches, finite_data_alpha(batch_size, num_examples) for replayed data"
    _validation.check_nonnegative("alpha", alpha, remedy)


def _check_lam(lam: ArrayLike) -> None:
    _validation.check_nonnegative("lam", lam, "use 1 for the default, 0 for no shrinkage by the variance")


def _check_eps(eps: ArrayLike) -> None:
    _validation.check_nonnegative("eps", eps, "use 1e-8 for the default, 0 for a gate that ignores the loss's scale")
