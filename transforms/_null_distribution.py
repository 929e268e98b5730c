"""What a squared t-statistic does on pure noise: shares above a threshold, and thresholds for a share (theory §7.3).

Under Gaussian noise the squared t-statistic of one coordinate follows the F distribution with 1 and `dof` degrees of
freedom; that of a block of `count` independent coordinates, each with `dof` of its own, the one with `count` and
`count·dof`. Both are written through the regularised incomplete beta function, in JAX: `dof` may change from step to
step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from jax.typing import ArrayLike

# JAX's incomplete beta function loses digits in float32 beyond these sizes; there the distance to the limit
# (infinitely many degrees of freedom), and that of the cube root of F to a normal variable, are smaller.
_MOST_DOF = 1e4
_LARGE_COUNT = 16
_LARGEST = 1e18  # its square is still finite
_ROUNDS = 48
# Four an octave: a root search for each of thousands of rows would take seconds.
_COUNTS = 2.0 ** np.linspace(0, 20, 81, dtype=np.float32)


def share_above(tau: ArrayLike, dof: ArrayLike, count: ArrayLike = 1.0) -> jax.Array:
    """P(F(count, count·dof) > tau), elementwise, to about 0.004 in float32."""
    tau, dof, count = (jnp.minimum(jnp.asarray(x, jnp.float32), _LARGEST) for x in (tau, dof, count))
    few = jnp.minimum(count, _LARGE_COUNT)
    few_dof = jnp.clip(dof, 1e-3, _MOST_DOF / few)
    exact = 1 - betainc(few / 2, few * few_dof / 2, tau / (few_dof + tau))
    # Paulson's approximation, after Wilson and Hilferty.
    above, below, root = 2 / (9 * count), 2 / (9 * count * dof), jnp.cbrt(tau)
    normal = ((1 - below) * root - (1 - above)) / jnp.sqrt(below * root**2 + above)
    return jnp.where(count < _LARGE_COUNT, exact, jax.scipy.special.ndtr(-normal))


def threshold_for(share: ArrayLike, dof: ArrayLike, count: ArrayLike = 1.0) -> jax.Array:
    """The tau with `share_above(tau, dof, count) == share`, elementwise, by bisection of its logarithm.

    For more counts than `_COUNTS` holds, at one share and dof, it is interpolated between those.
    """
    share, dof, count = (jnp.asarray(x, jnp.float32) for x in (share, dof, count))
    if max(share.size, dof.size) == 1 and count.size > _COUNTS.size:
        taus = _found(share.reshape(()), dof.reshape(()), _COUNTS)
        tau = jnp.interp(jnp.log2(count), np.log2(_COUNTS), taus)
    else:
        tau = _found(share, dof, count)
    return jnp.where(share <= 0, jnp.inf, jnp.where(share >= 1, 0.0, tau))


def _found(share: jax.Array, dof: jax.Array, count: ArrayLike) -> jax.Array:
    share, dof, count = jnp.broadcast_arrays(share, dof, count)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        too_low = share_above(jnp.exp(middle), dof, count) > share
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    # From exp(-40) to exp(40): a share of 1e-6 at one degree of freedom needs 4e11.
    bracket = jnp.full_like(share, -40.0), jnp.full_like(share, 40.0)
    low, high = jax.lax.fori_loop(0, _ROUNDS, halve, bracket)
    return jnp.exp((low + high) / 2)


def t_squared(f: ArrayLike, overlap: ArrayLike) -> jax.Array:
    """t² for a value of F, where a share overlap·t² of the variance is the tested mean's own (`Moments.overlap`)."""
    f, overlap = jnp.asarray(f, jnp.float32), jnp.asarray(overlap, jnp.float32)
    # For a negative overlap (the mean lowers the variance) t² is infinite from some f on.
    rest = (1 - overlap) / jnp.where(f == 0, 1, f) + overlap
    return jnp.where(f == 0, 0.0, jnp.where(rest > 0, 1 / jnp.where(rest > 0, rest, 1), jnp.inf))


def f_value(t_squared: ArrayLike, overlap: ArrayLike) -> jax.Array:
    """The inverse of `t_squared`: infinite where t² cannot be as large."""
    t_squared, overlap = jnp.asarray(t_squared, jnp.float32), jnp.asarray(overlap, jnp.float32)
    finite = jnp.minimum(t_squared, _LARGEST)
    rest = 1 - overlap * finite
    f = (1 - overlap) * finite / jnp.where(rest > 0, rest, 1)
    return jnp.where((rest > 0) & (t_squared <= _LARGEST), f, jnp.inf)
