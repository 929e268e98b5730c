"""How far a kernel has moved from another: drift, alignment, rotation, rank."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from entk._precision import matmul

Kernel = Float[Array | np.ndarray, "N N"]


def _check_square(**kernels: Kernel) -> None:
    for name, k in kernels.items():
        if not hasattr(k, "dtype"):
            raise TypeError(f"{name} is a {type(k).__name__}, but must be a square matrix: pass jnp.asarray({name}).")
        if jnp.iscomplexobj(k):
            raise TypeError(f"{name} has dtype {k.dtype}, but kernels are real: pass its real part.")
    shapes = {name: k.shape for name, k in kernels.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 2 or s[0] != s[1] or s[0] == 0 for s in shapes.values()):
        raise ValueError(f"kernels must be square matrices of one shape, with at least one row; got {shapes}.")


@jax.jit
def kernel_drift(k: Kernel, k0: Kernel) -> Float[Array, ""]:
    """Relative kernel drift ‖K − K₀‖₂ / ‖K₀‖₂ in the spectral norm (theory §2, "Kernel evolution").

    Args:
      k: symmetric kernel, (N, N).
      k0: symmetric reference kernel, (N, N), usually the one at initialisation.

    Returns:
      Scalar without unit; 0 for a lazy (frozen) kernel, inf or nan when k0 is zero.

    Raises:
      ValueError: shapes differ or are not square.

    Cost: two symmetric eigenvalue problems, O(N³).

    Example:
      >>> import jax.numpy as jnp
      >>> kernel_drift(3 * jnp.eye(2), jnp.eye(2))
      Array(2., dtype=float64)
    """
    _check_square(k=k, k0=k0)
    return jnp.abs(jnp.linalg.eigvalsh(k - k0)).max() / jnp.abs(jnp.linalg.eigvalsh(k0)).max()


@jax.jit
def centered_kernel_alignment(k: Kernel, k0: Kernel) -> Float[Array, ""]:
    """Centred kernel alignment CKA = ⟨HKH, HK₀H⟩_F / (‖HKH‖_F ‖HK₀H‖_F), H = I − 11ᵀ/N.

    Args:
      k, k0: symmetric kernels, (N, N).

    Returns:
      Scalar in [−1, 1], in [0, 1] for positive semi-definite kernels; 1 for kernels that are multiples
      of each other, nan where centring leaves nothing (a constant kernel, N = 1).

    Raises:
      ValueError: shapes differ or are not square.

    Cost: O(N²).

    Source: Cortes, Mohri & Rostamizadeh, "Algorithms for Learning Kernels Based on Centered Alignment", JMLR 2012.

    Example:
      >>> import jax.numpy as jnp
      >>> k = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
      >>> float(centered_kernel_alignment(k, 5 * k).round(12))
      1.0
    """
    _check_square(k=k, k0=k0)
    a, b = _centered(k), _centered(k0)
    return jnp.clip(jnp.sum(a * b), -1, 1)


def _scaled(k):
    """Its largest entry is 1, so that squares neither overflow nor vanish; nan for a zero kernel."""
    return k / jnp.abs(k).max()


def _centered(k):
    """HKH / ‖HKH‖_F; nan where it is nothing but the rounding of what was taken away."""
    k = _scaled(k)
    centered = k - k.mean(0, keepdims=True) - k.mean(1, keepdims=True) + k.mean()
    norm = jnp.linalg.norm(centered)
    return centered / jnp.where(norm > len(k) * jnp.finfo(centered.dtype).eps * jnp.linalg.norm(k), norm, jnp.nan)


def principal_angles(k: Kernel, k0: Kernel, rank: int) -> Float[Array, " r"]:
    """Principal angles between the top-r eigenspaces of two kernels, in radians, ascending.

    Args:
      k, k0: symmetric kernels, (N, N).
      rank: dimension r of the eigenspaces, 1 ≤ r ≤ N. Where the r-th and the next eigenvalue coincide the eigenspace,
        and so the angles, are not unique.

    Returns:
      Array (r,) in [0, π/2]; zeros for equal eigenspaces.

    Raises:
      ValueError: shapes differ or are not square, or rank is out of range.

    Cost: two eigendecompositions, O(N³). Angles come from the sine below 45° (Björck & Golub 1973), so that small ones
    are right to the rounding of the eigenvectors, where a cosine would lose all below 1e-8.

    Example:
      >>> import jax.numpy as jnp
      >>> k = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> principal_angles(k, k, 2)
      Array([0., 0.], dtype=float64)
    """
    _check_square(k=k, k0=k0)
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or not 1 <= rank <= k.shape[0]:
        raise ValueError(f"rank={rank!r} must be an integer in 1..{k.shape[0]}, the size of the kernels.")
    rank = int(rank)
    u = jnp.linalg.eigh(k)[1][:, -rank:]
    v = jnp.linalg.eigh(k0)[1][:, -rank:]
    overlap = matmul(u.T, v)
    cosines = jnp.clip(jnp.linalg.svd(overlap, compute_uv=False), 0, 1)
    sines = jnp.clip(jnp.linalg.svd(v - matmul(u, overlap), compute_uv=False), 0, 1)[::-1]
    return jnp.where(cosines**2 > 0.5, jnp.arcsin(sines), jnp.arccos(cosines))


@jax.jit
def effective_rank(k: Kernel) -> Float[Array, ""]:
    """Effective rank tr(K)² / tr(K²), the participation ratio of the eigenvalues (theory §2).

    Args:
      k: symmetric positive semi-definite kernel, (N, N).

    Returns:
      Scalar between 1 (one eigen-direction) and N (all eigenvalues equal), nan for a zero kernel.

    Raises:
      ValueError: k is not square.

    Cost: O(N²).

    Example:
      >>> import jax.numpy as jnp
      >>> effective_rank(jnp.eye(4))
      Array(4., dtype=float64)
    """
    _check_square(k=k)
    k = _scaled(k)
    return jnp.minimum(jnp.trace(k) ** 2 / jnp.sum(k * k.T), len(k))


@jax.jit
def target_alignment(k: Kernel, targets: Float[Array | np.ndarray, " N"]) -> Float[Array, ""]:
    """Alignment of a kernel with its targets, yᵀKy / (‖y‖² ‖K‖_F).

    Args:
      k: symmetric kernel, (N, N).
      targets: (N,), in the order of the kernel's rows.

    Returns:
      Scalar in [−1, 1]; 1 when K = yyᵀ, nan when K or y is zero.

    Raises:
      ValueError: k is not square or targets has another length.

    Cost: O(N²).

    Source: Cristianini et al., "On Kernel-Target Alignment", NeurIPS 2001.

    Example:
      >>> import jax.numpy as jnp
      >>> y = jnp.array([3.0, 4.0])
      >>> float(target_alignment(jnp.outer(y, y), y).round(12))
      1.0
    """
    _check_square(k=k)
    if jnp.shape(targets) != (k.shape[0],):
        raise ValueError(f"targets has shape {jnp.shape(targets)}, but the kernel needs ({k.shape[0]},).")
    k = _scaled(k)
    y = jnp.asarray(targets) / jnp.abs(jnp.asarray(targets)).max()
    share = jnp.vdot(y, matmul(k, y)) / (jnp.vdot(y, y) * jnp.linalg.norm(k))
    return jnp.clip(share, -1, 1)
