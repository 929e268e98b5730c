"""The output-space equation (2) solved exactly while the kernel stands still (theory §5).

For K = K_SS and B frozen, one factor diagonalises both: K = F Fᵀ and Fᵀ B F = diag(γ), γ ≥ 0. Every function f of
B K that a step needs is then K f(B K) = F f(γ) Fᵀ: symmetric, positive semi-definite for f ≥ 0, and indifferent to
singular blocks of B.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from entk.internal import matmul
from gramian._losses import block_product


class FrozenKernel(NamedTuple):
    """K_SS and B at one point, diagonalised together: K = F Fᵀ, Fᵀ B F = diag(rates)."""

    k_ss: Float[Array, "N N"]
    hessian: Float[Array, "n c c"]
    factor: Float[Array, "N N"]
    rates: Float[Array, " N"]


def freeze(k_ss: Array, hessian: Array, isotropic: bool) -> FrozenKernel:
    """Diagonalises K and B together: one symmetric eigenproblem for isotropic B, else two."""
    values, vectors = jnp.linalg.eigh(k_ss)
    factor = vectors * jnp.sqrt(jnp.maximum(values, 0))
    if isotropic:
        return FrozenKernel(k_ss, hessian, factor, hessian[0, 0, 0] * jnp.maximum(values, 0))
    rates, rotation = jnp.linalg.eigh(matmul(factor.T, block_product(hessian, factor)))
    return FrozenKernel(k_ss, hessian, matmul(factor, rotation), rates)


def displacement(frozen: FrozenKernel, h: Array, v: Array) -> Array:
    """∫₀ʰ K P(τ) dτ v = F hφ₁(−hγ) Fᵀ v: minus the change of the outputs that the output gradient v drives."""
    return matmul(frozen.factor, scale_rows(h * phi1(-h * frozen.rates), matmul(frozen.factor.T, v)))


def integral(frozen: FrozenKernel, h: Array, v: Array) -> Array:
    """∫₀ʰ P(τ) dτ v = hφ₁(−hBK) v, written without dividing by γ: h v − B F h²φ₂(−hγ) Fᵀ v."""
    curved = scale_rows(h**2 * phi2(-h * frozen.rates), matmul(frozen.factor.T, v))
    return h * v - block_product(frozen.hessian, matmul(frozen.factor, curved))


def phi1(z: Array) -> Array:
    """φ₁(z) = (eᶻ − 1)/z, φ₁(0) = 1, to rounding for z ≤ 0."""
    safe = jnp.where(z == 0, 1, z)
    return jnp.where(z == 0, 1, jnp.expm1(safe) / safe)


def phi2(z: Array) -> Array:
    """φ₂(z) = (φ₁(z) − 1)/z, φ₂(0) = 1/2, to rounding for z ≤ 0."""
    small = jnp.abs(z) < 1
    inside = jnp.where(small, z, 0)
    series = jnp.zeros_like(z)
    for k in range(20, 1, -1):  # 1/2 + z/6 + z²/24 + ... by Horner's rule: Σ zᵏ⁻²/k!
        series = (1 + inside * series) / k
    outside = jnp.where(small, 1, z)
    return jnp.where(small, series, (phi1(outside) - 1) / outside)


def scale_rows(scale: Array, v: Array) -> Array:
    return scale.reshape(scale.shape + (1,) * (v.ndim - 1)) * v
