"""Thresholds: how far a squared mean has to stand above its noise.

A threshold turns what a statistic knows of its own noise into a `Level`: a unit of noise and a number tau of such
units. Masks compare the squared mean with both. Fields are numbers, arrays (traced ones included) or optax schedules of
the gate's step count; every threshold is a pytree of its numbers.
"""

import dataclasses
import operator
from typing import Any, NamedTuple, Protocol, SupportsIndex

import jax
import optax
from jax.typing import ArrayLike

from transforms import _null_distribution, _validation
from transforms._estimators.base import Moments
from transforms._pytree import at_step, pytree


class Level(NamedTuple):
    """What a mask compares with.

    Attributes:
      unit: noise = unit · ŝ; 1 for the variance of one batch's gradient, `Moments.noise_ratio` for that of m̂.
      tau: `tau(count)` is the threshold in units of noise for a block worth `count` independent coordinates.
    """

    unit: ArrayLike
    tau: Any


class Threshold(Protocol):
    """Anything with `level(moments, step) -> Level`; steps count from 0, as schedules have it."""

    def level(self, moments: Moments, step: jax.Array, /) -> Level: ...


@pytree
@dataclasses.dataclass(frozen=True)
class Alpha:
    """The paper's threshold: m̂² against alpha times the variance of one batch's gradient.

        unit = 1,   tau = alpha

    m̂ averages several batches, so what alpha = 1 means depends on the statistic: on `ema_statistic` with b1 = 0.9 it
    is a 4.5-sigma test that leaves 0.0008 % of pure-noise coordinates open; on `batch_statistic` it is `TStatistic(1)`.

    Args:
      alpha: >= 0, or a schedule. 1 for fresh batches; the paper takes `finite_data_alpha` for replayed data.

    Raises:
      ValueError: alpha negative or not finite.
      TypeError: alpha neither a number nor a schedule.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

    >>> Alpha(finite_data_alpha(batch_size=100, num_examples=1100))
    Alpha(alpha=0.1)
    """

    alpha: optax.ScalarOrSchedule = 1.0

    def __post_init__(self):
        remedy = "use 1 for fresh batches, finite_data_alpha(batch_size, num_examples) for replayed data"
        _validation.check_nonnegative_or_schedule("alpha", self.alpha, remedy)

    def level(self, moments: Moments, step: jax.Array, /) -> Level:
        """The level at this step."""
        del moments
        alpha = at_step(self.alpha, step)
        return Level(1.0, lambda count: alpha)


@pytree
@dataclasses.dataclass(frozen=True)
class TStatistic:
    """A threshold on the t-statistic of the mean that the statistic in use estimates.

        t² = m̂² / (noise_ratio · ŝ),   tau = z²

    z = 1 is the leave-one-out rule, (10) in the theory, for every statistic: step a coordinate iff doing so is
    estimated to lower the population risk, m̂² > Var m̂. It opens 32 % of pure-noise coordinates, by design (more with
    few degrees of freedom: half with batches of two). For a block of coordinates it compares sums: the same rule.

    Args:
      z: >= 0, or a schedule.

    Raises:
      ValueError: z negative or not finite.
      TypeError: z neither a number nor a schedule.

    Source: Litman & Guo, arXiv:2605.01172; theory (9), (10) and §7.3.

    >>> import jax.numpy as jnp
    >>> from transforms import Moments
    >>> moments = Moments(mean=jnp.array([3.0]), variance=jnp.array([4.0]), noise_ratio=0.25, dof=19.0)
    >>> unit, tau = TStatistic(z=2.0).level(moments, 1)
    >>> unit, tau(1)
    (0.25, 4.0)
    """

    z: optax.ScalarOrSchedule = 1.0

    def __post_init__(self):
        _validation.check_nonnegative_or_schedule("z", self.z, "use 1 for the leave-one-out rule")

    def level(self, moments: Moments, step: jax.Array, /) -> Level:
        """The level at this step."""
        z = at_step(self.z, step)
        return Level(moments.noise_ratio, lambda count: z * z)


@pytree
@dataclasses.dataclass(frozen=True)
class OpenShare:
    """The threshold that leaves a stated share of pure-noise coordinates open.

        P(F(1, dof) > f) = share,   tau = f / (1 - κ + κ f) in units of the noise of m̂

    dof and κ (`Moments.overlap`) come from the statistic (b - 1 and 0 for a batch of b), so that small batches and the
    first steps of a moving average are allowed for. A block of k coordinates takes F(k_eff, k_eff dof) with
    k_eff = (Σ noise)²/Σ noise² (Satterthwaite), which holds when its coordinates are independent. Open means q = 1 for
    `HardMask`, q > 0 for `SoftMask`, q > 1/2 for `SnrMask(lam=1)`.

    The noise is taken to be Gaussian. Averages over many steps or examples are, nearly. Within batches of 2 to 32
    examples with heavy tails (Laplace, Student's t with 3 degrees of freedom) small shares come out up to 2 points
    smaller than stated, shares around a half up to 4.5 points larger. A statistic whose mean spans a batch or two
    (`ema_statistic` with b1 below 0.8) opens more than stated in its first ten steps or so.

    Args:
      share: in [0, 1], or a schedule. 0.32 is about `TStatistic(1)`; small shares need strong evidence.

    Raises:
      ValueError: share outside [0, 1].
      TypeError: share neither a number nor a schedule.

    Cost: one scalar root search a step (about 0.1 ms); for `PerRow` at most 81 a leaf, whatever the number of rows.

    >>> import jax.numpy as jnp
    >>> from transforms import Moments
    >>> moments = Moments(mean=jnp.array([3.0]), variance=jnp.array([4.0]), noise_ratio=0.25, dof=127.0)
    >>> print(f"{OpenShare(0.3192).level(moments, 1).tau(1.0):.2f}")
    1.00
    """

    share: optax.ScalarOrSchedule = 0.05

    def __post_init__(self):
        if not callable(self.share):
            _validation.check_share("share", self.share)

    def level(self, moments: Moments, step: jax.Array, /) -> Level:
        """The level at this step."""
        share = at_step(self.share, step)

        def tau(count: ArrayLike) -> jax.Array:
            f = _null_distribution.threshold_for(share, moments.dof, count)
            return _null_distribution.t_squared(f, moments.overlap)

        return Level(moments.noise_ratio, tau)


def finite_data_alpha(batch_size: SupportsIndex, num_examples: SupportsIndex) -> float:
    """Variance of a training set's mean gradient around the population's, in units of a batch's variance.

        alpha = b / (n - b)

    With batches of b drawn without replacement from n fixed examples, ŝ estimates σ²/b · (1 - b/n), and the mean over
    all n has variance σ²/n = alpha ŝ. It is the statistics' `data_noise`. The paper takes it as the whole threshold,
    `Alpha(finite_data_alpha(b, n))`, as if m̂ were that mean; m̂'s own noise is then left out, and the gate with it: with
    `ema_statistic`, b = 128 and n = 60,000 leave 84 % of pure-noise coordinates open.

    Args:
      batch_size: b >= 1, examples in a batch.
      num_examples: n > b, examples in the training set.

    Returns:
      alpha, a float > 0.

    Raises:
      ValueError: b < 1 or n <= b.
      TypeError: b or n not an integer.

    Source: Litman & Guo, arXiv:2605.01172, Algorithm 1; theory §7.2.

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
            "data leaves nothing to generalize to: use smaller batches, or no correction if batches are fresh."
        )
    return b / (n - b)
