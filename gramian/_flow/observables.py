"""What to record along a flow: (init, update) pairs of pure functions, one a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from entk import (
    centered_kernel_alignment,
    effective_rank,
    kernel_drift,
    principal_angles,
    target_alignment,
)
from entk.internal import check_count, matmul
from gramian._flow.steppers import KernelPoint, rms
from gramian._losses import OutputLoss, block_product
from gramian._operators import Operators
from gramian._problem import KernelSource

PyTree = Any


class Observable(Protocol):
    """A question asked of every accepted step. Objects are static: hashable, with fields for their settings."""

    def init(self, source: KernelSource, loss: OutputLoss, start: KernelPoint) -> PyTree:
        """State before the first step; `start` is the kernel at t0."""
        ...

    def update(
        self, state: PyTree, source: KernelSource, point: KernelPoint, operators: Operators, h: Float[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        """New state and this step's value. `point` is the kernel of the step, `operators` those at its end."""
        ...


class Evolution(NamedTuple):
    """Values of `KernelEvolution`, scalars without unit (angle in radians)."""

    drift: Array
    alignment: Array
    effective_rank: Array
    target_alignment: Array
    largest_angle: Array
    top_eigenvalue: Array


@dataclass(frozen=True)
class KernelEvolution:
    """How far K_SS has moved from K_SS(t0) (theory §2): drift, CKA, effective rank, alignment, rotation.

    The target alignment is that of K with −g(t0), what the outputs lack at the start. The angle is the largest
    principal angle between the eigenspaces of the `rank` top eigenvalues of K(t) and K(t0).

    Args:
      rank: dimension of the eigenspaces compared.

    Example:
      >>> from gramian import KernelEvolution
      >>> KernelEvolution(rank=5).rank
      5

    Raises:
      ValueError: rank < 1.
    """

    rank: int = 5

    def __post_init__(self):
        object.__setattr__(self, "rank", check_count("rank", self.rank))

    def init(self, source, loss, start):
        return start.frozen.k_ss, loss.grad(source.outputs(start.params)[0])

    def update(self, state, source, point, operators, h):
        k0, g0 = state
        k = point.frozen.k_ss
        rank = min(self.rank, k.shape[0])
        value = Evolution(
            drift=kernel_drift(k, k0),
            alignment=centered_kernel_alignment(k, k0),
            effective_rank=effective_rank(k),
            target_alignment=target_alignment(k, g0),
            largest_angle=principal_angles(k, k0, rank)[-1],
            top_eigenvalue=jnp.sum(point.frozen.factor**2, axis=0).max(),
        )
        return state, value


@dataclass(frozen=True)
class ChannelFill:
    """How full each eigen-direction of K_SS(t0) is: v_iᵀ W_S v_i, top eigenvalue first (theory §6, "implicit bias").

    Under the squared loss a direction is empty at 0 and full at n/2.
    """

    def init(self, source, loss, start):
        return jnp.linalg.eigh(start.frozen.k_ss)[1][:, ::-1]

    def update(self, state, source, point, operators, h):
        return state, jnp.sum(state * matmul(operators.gramian, state), axis=0)


@dataclass(frozen=True)
class Dissipation:
    """The loss dissipated so far as the Gramian predicts it: g(t0)ᵀ W_S g(t0) (theory I2), a scalar."""

    def init(self, source, loss, start):
        return loss.grad(source.outputs(start.params)[0])

    def update(self, state, source, point, operators, h):
        return state, jnp.vdot(state, matmul(operators.gramian, state))


@dataclass(frozen=True)
class TestKernelTop:
    """λ_max(K_QQ) of every step, for the bound (I6); matrix-free, warm-started from the step before.

    The value is the Ritz value plus the norm of its residual, so that it bounds the eigenvalue it has converged to
    from above.

    Args:
      iterations: power iterations a step; the first step takes ten times as many.

    Raises:
      ValueError: iterations < 1.
    """

    __test__ = False  # not a test class, whatever its name suggests to pytest

    iterations: int = 4

    def __post_init__(self):
        object.__setattr__(self, "iterations", check_count("iterations", self.iterations))

    def init(self, source, loss, start):
        u_q = source.outputs(start.params)[1]
        v = jax.random.normal(jax.random.key(0), u_q.shape, u_q.dtype)
        return _power_iterate(source, start.params, v, 10 * self.iterations)[0] if v.size else v

    def update(self, state, source, point, operators, h):
        if state.size == 0:
            return state, jnp.zeros((), state.dtype)
        return _power_iterate(source, point.params, state, self.iterations)


def _power_iterate(source, params, v, iterations):
    def k_qq(v):
        _, pull = jax.vjp(lambda p: source.outputs(p)[1], params)
        return source.push(params, pull(v)[0])[1]

    v = jax.lax.fori_loop(0, iterations, lambda _, v: _normalise(k_qq(v)), _normalise(v))
    kv = k_qq(v)
    ritz = jnp.vdot(v, kv)
    return v, ritz + jnp.linalg.norm(kv - ritz * v)


def _normalise(v):
    return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)


@dataclass(frozen=True)
class DoublingGramian:
    """W_S once more, by scaling and squaring instead of eigendecompositions: the check of (I5).

    A short piece h/2ˢ of each step is integrated by its Taylor series, then doubled s times:
    W₂ₕ = Wₕ + Eₕᵀ Wₕ Eₕ, E₂ₕ = Eₕ². The value is the root mean square of W so far; the state holds P and W.
    """

    def init(self, source, loss, start):
        k = start.frozen.k_ss
        return jnp.eye(k.shape[0], dtype=k.dtype), jnp.zeros_like(k)

    def update(self, state, source, point, operators, h):
        p, w = state
        decay, dissipated = _double(point.frozen.k_ss, point.frozen.hessian, h)
        w = w + matmul(p.T, matmul(dissipated, p))
        return (matmul(decay, p), w), rms(w)


def _double(k, hessian, h):
    """exp(−hBK) and ∫₀ʰ exp(−τKB) K exp(−τBK) dτ without an eigendecomposition."""
    generator = -block_product(hessian, k)
    size = h * jnp.linalg.norm(generator)
    doublings = jnp.maximum(jnp.ceil(jnp.log2(jnp.maximum(8 * size, 1))), 0).astype(int)
    piece = h / 2.0**doublings
    identity = jnp.eye(k.shape[0], dtype=k.dtype)
    # K exp(τA)  is symmetric, so the integrand is K exp(2τA); both series are in A = −BK with ‖piece·A‖ ≤ 1/8.
    decay, average = identity, identity
    for order in range(12, 0, -1):
        decay = identity + piece / order * matmul(generator, decay)
        average = identity + 2 * piece / (order + 1) * matmul(generator, average)
    dissipated = piece * matmul(k, average)

    def double(_, pair):
        e, w = pair
        return matmul(e, e), w + matmul(e.T, matmul(w, e))

    return jax.lax.fori_loop(0, doublings, double, (decay, dissipated))
