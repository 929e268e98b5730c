"""Masks: how open each coordinate is, q in [0, 1], given its squared mean, its noise and a threshold.

A mask is a frozen dataclass of numbers with one method, `openness(signal, noise, tau)`, elementwise on arrays. Any
object with that method will do. It is a method rather than a call because optax takes every callable hyper-parameter
for a schedule: `optax.inject_hyperparams(poprisk_adamw)(learning_rate=1e-3)` would call the mask with a step number.

Without `eps` every mask depends on signal/noise alone, so that multiplying the loss by a constant leaves q as it is.
Published implementations add an absolute eps, which does not; it is here to reproduce them.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from transforms import _validation
from transforms._pytree import pytree


class Mask(Protocol):
    """Anything with `openness(signal, noise, tau) -> q`, elementwise on arrays of one shape, with q in [0, 1]."""

    def openness(self, signal: jax.Array, noise: jax.Array, tau: ArrayLike, /) -> jax.Array: ...


@pytree
@dataclasses.dataclass(frozen=True)
class HardMask:
    """The paper's hard gate: open where the squared mean exceeds the threshold, shut elsewhere.

        q = 1[m̂² > tau noise]

    The inequality is strict: a coordinate that has only seen zero gradients (0 > 0) is shut.

    Raises: nothing.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> import jax.numpy as jnp
    >>> print(HardMask().openness(jnp.array([4.0, 1.0, 0.0]), jnp.array([1.0, 4.0, 0.0]), 1.0))
    [1. 0. 0.]
    """

    def openness(self, signal: jax.Array, noise: jax.Array, tau: ArrayLike, /) -> jax.Array:
        """q, with the shape of `signal` and `noise`."""
        signal, noise = capped(signal), capped(noise)
        return (signal > _finite(tau, noise) * noise).astype(signal.dtype)


@pytree
@dataclasses.dataclass(frozen=True)
class SoftMask:
    """The paper's soft gate: shut below the threshold, opening smoothly above it.

        q = (m̂² - tau noise)₊ / ((m̂² - tau noise)₊ + lam noise + eps)

    Where the denominator's lam noise + eps is exactly zero this is read as its limit, 1 from the threshold upwards and
    0 below it; hence `SoftMask(lam=0)` with a threshold of zero is neutral.

    Args:
      lam: width of the transition in units of the noise, >= 0; 0 makes it the hard gate (up to eps).
      eps: in units of the gradient squared, >= 0. It is absolute: a coordinate with m̂² well below it is shut whatever
        its noise.

    Raises:
      ValueError: a field negative or not finite.
      TypeError: a field that is not a number.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> import jax.numpy as jnp
    >>> print(SoftMask().openness(jnp.array([4.0, 1.0]), jnp.array([1.0, 4.0]), 1.0))
    [0.75 0.  ]
    """

    lam: ArrayLike = 1.0
    eps: ArrayLike = 0.0

    def __post_init__(self):
        _check_lam(self.lam)
        _check_eps(self.eps)

    def openness(self, signal: jax.Array, noise: jax.Array, tau: ArrayLike, /) -> jax.Array:
        """q, with the shape of `signal` and `noise`."""
        signal, noise = capped(signal), capped(noise)
        excess = signal - _finite(tau, noise) * noise
        rest = _like(self.lam, noise) * noise + _like(self.eps, noise)
        return _share(jnp.maximum(excess, 0), rest, otherwise=excess >= 0)


@pytree
@dataclasses.dataclass(frozen=True)
class SnrMask:
    """The paper's signal-to-noise gate, a Wiener-like shrinkage without a cut.

        q = m̂² / (m̂² + lam tau noise + eps)

    q = 1/2 where m̂² = lam tau noise. Where lam tau noise + eps is exactly zero this is read as its limit 1. Hence 0/0
    (zero mean, zero noise, eps = 0) is open, and `SnrMask(lam=0)` is neutral: open everywhere. With eps > 0 a
    coordinate that has only seen zero gradients is shut.

    Args:
      lam: strength of the shrinkage, >= 0; only the product lam tau matters.
      eps: in units of the gradient squared, >= 0. It is absolute: a coordinate with m̂² well below it is shut whatever
        its noise (with 1e-8, a noiseless gradient of 3e-5 gets q = 0.08).

    Raises:
      ValueError: a field negative or not finite.
      TypeError: a field that is not a number.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> import jax.numpy as jnp
    >>> print(SnrMask().openness(jnp.array([4.0, 1.0]), jnp.array([1.0, 4.0]), 1.0))
    [0.8 0.2]

    A sweep over one field, compiled once:

    >>> openness = jax.vmap(lambda lam: SnrMask(lam=lam).openness(jnp.array(4.0), jnp.array(1.0), 1.0))
    >>> print(openness(jnp.array([0.0, 1.0, 4.0])))
    [1.  0.8 0.5]
    """

    lam: ArrayLike = 1.0
    eps: ArrayLike = 0.0

    def __post_init__(self):
        _check_lam(self.lam)
        _check_eps(self.eps)

    def openness(self, signal: jax.Array, noise: jax.Array, tau: ArrayLike, /) -> jax.Array:
        """q, with the shape of `signal` and `noise`."""
        signal, noise = capped(signal), capped(noise)
        rest = _like(self.lam, noise) * capped(noise * _finite(tau, noise)) + _like(self.eps, noise)
        return _share(signal, rest, otherwise=True)


def capped(power: jax.Array) -> jax.Array:
    """Keep a mean square so far from overflow that no ratio of two is inf/inf and no multiple 0·inf."""
    return jnp.minimum(power, float(jnp.finfo(power.dtype).max) / 4)


def _finite(tau: ArrayLike, noise: jax.Array) -> jax.Array:
    """A threshold that no value passes (a share of zero) times no noise at all is no threshold, rather than 0·inf."""
    return capped(_like(tau, noise))


def _like(value: ArrayLike, noise: jax.Array) -> jax.Array:
    return jnp.asarray(value, noise.dtype)


def _share(part: jax.Array, rest: ArrayLike, otherwise: ArrayLike) -> jax.Array:
    """part / (part + rest) for non-negative numbers; `otherwise` where rest == 0."""
    # The inner where keeps 0/0 out of derivatives through the branch that is not taken.
    total = jnp.where(rest == 0, 1, part + rest)
    return jnp.where(rest == 0, jnp.asarray(otherwise, part.dtype), part / total)


def _check_lam(lam: ArrayLike) -> None:
    _validation.check_nonnegative("lam", lam, "use 1 for the default, 0 for no shrinkage by the noise")


def _check_eps(eps: ArrayLike) -> None:
    _validation.check_nonnegative("eps", eps, "use 0 for a gate that ignores the loss's scale, 1e-8 for popriskmin's")
