"""Traces of operators from products with random vectors: Hutchinson's estimator and XTrace (theory §4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float
from matfree import stochtrace

from entk._checks.counts import check_count
from entk._precision import free_promotion, model_precision
from entk._spectra.protocol import LinearOperator, check_key, check_operator, matvec_of, product


class Estimate(NamedTuple):
    """A random estimate and its standard error, both scalars; the error is 0 where the value is exact."""

    value: Float[Array, ""]
    standard_error: Float[Array, ""]


def estimate_mean(samples: Float[Array, " n"]) -> Estimate:
    """Mean and standard error of independent samples; a single sample stands for an exact value."""
    if len(samples) == 1:
        return Estimate(samples[0], jnp.zeros_like(samples[0]))
    return Estimate(samples.mean(), samples.std(ddof=1) / jnp.sqrt(len(samples)).astype(samples.dtype))


class TraceMethod(Protocol):
    """How a trace is estimated: hashable, as a static argument."""

    def estimate(self, matvec: Partial, size: int, dtype: jnp.dtype, key: Array) -> Estimate: ...


@dataclass(frozen=True)
class Hutchinson:
    """Hutchinson's estimator: the mean of zᵀ K z over random sign vectors z.

    Args:
      num_probes: sign vectors, at least 2; all N unit vectors are taken instead, and the trace is exact, where
        num_probes ≥ N.

    Returns:
      A method for `trace`. Its variance is 2·(‖K‖_F² − Σ_i K_ii²) / num_probes: the standard error falls like
      1/√num_probes.

    Raises:
      ValueError: fewer than two probes.

    Cost: num_probes products, num_probes·N numbers.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989, as matfree has it.

    Example:
      >>> from entk import Hutchinson
      >>> Hutchinson(100)
      Hutchinson(num_probes=100)
    """

    num_probes: int = 20

    def __post_init__(self):
        object.__setattr__(self, "num_probes", check_count("num_probes", self.num_probes, 2))

    def estimate(self, matvec: Partial, size: int, dtype: jnp.dtype, key: Array) -> Estimate:
        if self.num_probes >= size:
            return _exact(matvec, size, dtype, self.num_probes)
        sampler = stochtrace.sampler_signs(jnp.zeros(size, dtype), num=self.num_probes)
        estimator = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace(), sampler)
        return _unbiased(estimator(partial(product, matvec), key), self.num_probes)


@dataclass(frozen=True)
class XTrace:
    """XTrace: the trace of a low-rank approximation plus Hutchinson's estimate of the rest, every probe in both roles.

    Exact to rounding where rank K < num_probes; for spectra that fall fast far more accurate than `Hutchinson`.

    Args:
      num_probes: random vectors, at least 2; all N unit vectors are taken instead, and the trace is exact, where
        2·num_probes ≥ N.

    Returns:
      A method for `trace`. Its standard error is that of the leave-one-out estimates, which are not independent:
      about a fifth too small where eigenvalues fall fast, about half where the rank is just above num_probes.

    Raises:
      ValueError: fewer than two probes.

    Cost: 2·num_probes + 1 products, 3·num_probes·N numbers and 4·num_probes²·N operations.

    Source: Epperly, Tropp & Webber, "XTrace: Making the most of every sample in stochastic trace estimation",
    arXiv:2301.07825, as matfree has it.

    Example:
      >>> from entk import XTrace
      >>> XTrace(10)
      XTrace(num_probes=10)
    """

    num_probes: int = 20

    def __post_init__(self):
        object.__setattr__(self, "num_probes", check_count("num_probes", self.num_probes, 2))

    def estimate(self, matvec: Partial, size: int, dtype: jnp.dtype, key: Array) -> Estimate:
        if 2 * self.num_probes >= size:
            return _exact(matvec, size, dtype, self.num_probes)
        scale_key, key = jax.random.split(key)
        # matfree calls columns below machine epsilon dependent, whatever the unit: unscaled, a small kernel of full
        # rank would pass for one of low rank, with a wrong trace and no error bar.
        image = product(matvec, jax.random.normal(scale_key, (size,), dtype))
        scale = jnp.abs(image).max()
        scale = jnp.where(scale > 0, scale, 1)
        sampler = stochtrace.sampler_sphere(jnp.zeros(size, dtype), num=self.num_probes)
        estimator = stochtrace.estimator_leave_one_out_mean_and_sem(stochtrace.leave_one_out_xtrace(), sampler)
        value, error = _unbiased(estimator(lambda vector: product(matvec, vector) / scale, key), self.num_probes)
        return Estimate(scale * value, scale * error)


DEFAULT_METHOD = XTrace()


@free_promotion()
def trace(operator: LinearOperator, method: TraceMethod = DEFAULT_METHOD, *, key: Array) -> Estimate:
    """tr K from products with random vectors, with a standard error.

    Args:
      operator: symmetric positive semi-definite, with `shape` (N, N) and `mv` for vectors and blocks (N, r), e.g.
        `NtkOperator`.
      method: `XTrace(num_probes)` or `Hutchinson(num_probes)`.
      key: random key of the probes.

    Returns:
      `Estimate(value, standard_error)`, in the unit of K.

    Raises:
      TypeError, ValueError: an operator without mv or that is not square, something that is not a method, or not a
        random key.

    Cost: that of the method.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from entk import NtkOperator, XTrace, trace
      >>> x = jnp.ones((100, 3)).at[:50, 0].set(2.0)  # rank 3
      >>> k = NtkOperator(lambda w, x: x @ w, jnp.ones(3), x)
      >>> float(trace(k, XTrace(5), key=jax.random.key(0)).value.round(6))
      450.0
    """
    size, dtype = check_operator(operator)
    check_key(key)
    if not callable(getattr(method, "estimate", None)) or isinstance(method, type):
        raise TypeError(
            f"method={method!r} must be a method such as XTrace(num_probes=20) or Hutchinson(num_probes=100)."
        )
    return _trace(method, matvec_of(operator), size, dtype, key)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _trace(method, matvec, size, dtype, key):
    with model_precision():
        return method.estimate(matvec, size, dtype, key)


def _exact(matvec, size, dtype, batch_size):
    def entry(i):
        return product(matvec, jax.nn.one_hot(i, size, dtype=dtype))[i]

    value = jax.lax.map(entry, jnp.arange(size), batch_size=batch_size).sum()
    return Estimate(value, jnp.zeros_like(value))


def _unbiased(mean_and_error, num_probes):
    """matfree divides the squares by the number of probes; an unbiased variance divides them by one less."""
    mean, error = mean_and_error
    return Estimate(mean, error * jnp.sqrt(num_probes / (num_probes - 1)).astype(error.dtype))
