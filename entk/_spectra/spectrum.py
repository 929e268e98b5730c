"""Spectra of symmetric operators from products alone: top eigenpairs, and the density of all eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matfree import decomp

from entk._batching import map_examples
from entk._checks.counts import check_count
from entk._checks.memory import check_fits
from entk._precision import free_promotion, matmul, model_precision
from entk._spectra.protocol import LinearOperator, check_key, check_operator, matvec_of, product
from entk._spectra.trace import Estimate, estimate_mean


class Eigenpairs(NamedTuple):
    """Eigenvalues in descending order, (rank,), eigenvectors as columns, (N, rank), and ‖K v − λ v‖, (rank,).

    For every pair an eigenvalue of K lies within its residual of its value.
    """

    values: Float[Array, " rank"]
    vectors: Float[Array, "N rank"]
    residuals: Float[Array, " rank"]


@free_promotion()
def top_eigenpairs(
    operator: LinearOperator,
    rank: int,
    *,
    key: Array,
    num_steps: int | None = None,
    block_size: int | None = None,
) -> Eigenpairs:
    """The largest eigenpairs K v = λ v by block Lanczos with full reorthogonalisation (theory §4).

    Single-vector Lanczos sees one copy of a repeated eigenvalue, and the kernel of a model with c outputs repeats its
    eigenvalues c-fold, exactly or nearly: a block of b vectors sees b copies.

    Args:
      operator: symmetric, with `shape` (N, N) and `mv` for vectors and blocks (N, r), e.g. `NtkOperator`.
      rank: number of eigenpairs, 1 ≤ rank ≤ N.
      key: random key of the starting block.
      num_steps: products with the block; None takes 16 + 2·⌈rank / block_size⌉.
      block_size: vectors multiplied at once, and the number of copies of one eigenvalue that are sure to be seen; None
        takes min(rank, 16).

    Returns:
      `Eigenpairs(values, vectors, residuals)`: residuals ‖K v − λ v‖ are computed from fresh products, so each bounds
      the distance of its value to an eigenvalue of K. Pairs that have not converged show there: raise num_steps.

    Raises:
      TypeError, ValueError: an operator without mv or that is not square, a rank outside 1..N, a subspace of fewer than
        rank vectors, something that is not a random key.
      MemoryError: the Krylov vectors would not fit.

    Cost: block_size·num_steps + rank products; block_size·(num_steps + 3)·N numbers, and 4·N·(block_size·num_steps)²
    operations for the orthogonalisation. Where the subspace would fill the space, N products form the matrix instead
    and the pairs are those of its eigendecomposition.

    Source: Golub & Underwood, "The block Lanczos method for computing eigenvalues", 1977; Musco & Musco, "Randomized
    block Krylov methods for stronger and faster approximate singular value decomposition", arXiv:1504.05477.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from entk import NtkOperator, top_eigenpairs
      >>> x = jnp.diag(1 / jnp.arange(1.0, 101.0))
      >>> k = NtkOperator(lambda w, x: x @ w, jnp.ones((100, 2)), x)  # eigenvalues 1, 1, 1/4, 1/4, 1/9, 1/9, ...
      >>> pairs = top_eigenpairs(k, 4, key=jax.random.key(0))
      >>> pairs.values.round(12)
      Array([1.  , 1.  , 0.25, 0.25], dtype=float64)
      >>> bool(pairs.residuals.max() < 1e-6)
      True
    """
    size, dtype = check_operator(operator)
    check_key(key)
    rank = check_count("rank", rank)
    if rank > size:
        raise ValueError(f"rank={rank} exceeds N = {size}, the number of eigenpairs of this operator.")
    block_size = min(rank, 16) if block_size is None else check_count("block_size", block_size)
    num_steps = 16 + 2 * -(-rank // block_size) if num_steps is None else check_count("num_steps", num_steps)
    width = block_size * num_steps
    if width < rank:
        raise ValueError(
            f"block_size={block_size} times num_steps={num_steps} is {width} vectors, which hold no rank={rank} "
            f"eigenpairs: raise num_steps to {-(-rank // block_size)} or more; twice that for pairs that converge."
        )
    if width >= size:
        check_fits(3 * size**2 * dtype.itemsize, f"the {size} x {size} matrix and its eigenvectors", "Lower num_steps.")
        return _dense_eigenpairs(matvec_of(operator), size, dtype, rank, block_size)
    check_fits(
        (width + 3 * block_size) * size * dtype.itemsize,
        f"holding {width + 3 * block_size} Krylov vectors of {size:,} {dtype} numbers",
        "Lower block_size or num_steps.",
        count=num_steps,
        bytes_of=lambda steps: (steps + 3) * block_size * size * dtype.itemsize,
        unit="num_steps",
    )
    return _block_lanczos(matvec_of(operator), key, size, dtype, rank, block_size, num_steps)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _block_lanczos(matvec, key, size, dtype, rank, block_size, num_steps):
    width, keys = block_size * num_steps, jax.random.split(key, num_steps)

    def step(k, state):
        basis, projected, image = state
        block = _orthonormal(image, basis, keys[k])
        basis = jax.lax.dynamic_update_slice(basis, block, (0, k * block_size))
        image = matvec(block)
        return basis, jax.lax.dynamic_update_slice(projected, basis.T @ image, (0, k * block_size)), image

    with model_precision():
        shapes = (size, width), (width, width), (size, block_size)
        start = tuple(jnp.zeros(shape, dtype) for shape in shapes)  # no image yet: the first block is random
        basis, projected, _ = jax.lax.fori_loop(0, num_steps, step, start)
        # Column k was taken when the basis ended with block k: below the diagonal blocks it is empty.
        values, vectors = jnp.linalg.eigh(jnp.triu(projected) + jnp.triu(projected, 1).T)
        return _with_residuals(matvec, values[::-1][:rank], basis @ vectors[:, ::-1][:, :rank])


def _orthonormal(block, basis, key):
    """An orthonormal block orthogonal to the basis; where the block has no direction left, a random one.

    Noise at rounding level decides only where the Krylov space is exhausted: Lanczos then restarts in its complement,
    which holds the other copies of eigenvalues that repeat more often than the block is wide.
    """
    norm = jnp.linalg.norm(block, axis=0).max()
    noise = jax.random.normal(key, block.shape, block.dtype) / jnp.sqrt(len(block)).astype(block.dtype)
    block = block / jnp.where(norm > 0, norm, 1) + 10 * jnp.finfo(block.dtype).eps * noise
    # Twice is enough once a column is random, and the first time may leave nothing but noise of it.
    return jax.lax.fori_loop(0, 3, lambda _, block: jnp.linalg.qr(block - basis @ (basis.T @ block))[0], block)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _dense_eigenpairs(matvec, size, dtype, rank, batch_size):
    with model_precision():
        values, vectors = jnp.linalg.eigh(_dense(matvec, size, dtype, batch_size))
        return _with_residuals(matvec, values[::-1][:rank], vectors[:, ::-1][:, :rank])


def _with_residuals(matvec, values, vectors):
    return Eigenpairs(values, vectors, jnp.linalg.norm(matvec(vectors) - values * vectors, axis=0))


def _dense(matvec, size, dtype, batch_size):
    rows = jax.lax.map(partial(product, matvec), jnp.eye(size, dtype=dtype), batch_size=batch_size)
    return (rows + rows.T) / 2


class SpectralDensity(NamedTuple):
    """Gauss rules of the eigenvalues' distribution, one row a probe; one row of N equal weights where it is exact.

    `nodes` (num_probes, num_steps) have the unit of K; `weights` of a probe sum to 1; `size` is N.
    """

    nodes: Float[Array, "num_probes num_steps"]
    weights: Float[Array, "num_probes num_steps"]
    size: int

    @free_promotion()
    def trace_of(self, function: Callable[[Array], Array] = lambda eigenvalues: eigenvalues) -> Estimate:
        """tr f(K) = Σ_i f(λ_i) with its standard error, f applied elementwise; f(λ) = λ where none is given.

        Example:
          >>> import jax.numpy as jnp
          >>> from entk._spectra.spectrum import SpectralDensity
          >>> exact = SpectralDensity(jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 0.5]]), 2)
          >>> float(exact.trace_of(jnp.square).value)
          5.0
        """
        return estimate_mean(self.size * jnp.sum(self.weights * function(self.nodes), axis=1))

    @free_promotion()
    def density(self, grid: Float[Array | np.ndarray, " g"], width: float) -> Float[Array, " g"]:
        """The density of eigenvalues on a grid, (g,), smoothed by Gaussians of this width; its integral is 1.

        Example:
          >>> import jax.numpy as jnp
          >>> from entk._spectra.spectrum import SpectralDensity
          >>> exact = SpectralDensity(jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 0.5]]), 2)
          >>> exact.density(jnp.array([1.0, 1.5]), 0.1).round(3)
          Array([1.995, 0.   ], dtype=float64)
        """
        if isinstance(width, (int, float)) and not width > 0:
            raise ValueError(f"width={width} must be positive, in the unit of the eigenvalues.")
        distance = (jnp.asarray(grid)[:, None] - self.nodes.ravel()) / width
        peaks = jnp.exp(-(distance**2) / 2) / (width * jnp.sqrt(2 * jnp.pi).astype(distance.dtype))
        return matmul(peaks, self.weights.ravel()) / len(self.nodes)

    @free_promotion()
    def effective_rank(self) -> Estimate:
        """tr(K)² / tr(K²) with its standard error by the delta method (theory §2).

        Example:
          >>> import jax.numpy as jnp
          >>> from entk._spectra.spectrum import SpectralDensity
          >>> exact = SpectralDensity(jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 0.5]]), 2)
          >>> float(exact.effective_rank().value)
          1.8
        """
        first, second = (self.size * jnp.sum(self.weights * self.nodes**power, axis=1) for power in (1, 2))
        value = first.mean() ** 2 / second.mean()
        slope = value * (2 * first / first.mean() - second / second.mean())
        return Estimate(value, estimate_mean(slope).standard_error)


@free_promotion()
def spectral_density(
    operator: LinearOperator,
    *,
    key: Array,
    num_steps: int = 30,
    num_probes: int = 10,
    probe_batch_size: int | None = None,
) -> SpectralDensity:
    """The density of all eigenvalues by stochastic Lanczos quadrature.

    From every random sign vector z, Lanczos gives a Gauss rule Σ_j w_j f(θ_j) ≈ zᵀ f(K) z / N that is exact for
    polynomials f of degree < 2·num_steps; its mean over z is tr f(K) / N.

    Args:
      operator: symmetric, with `shape` (N, N) and `mv` for vectors and blocks (N, r), e.g. `NtkOperator`.
      key: random key of the probes.
      num_steps: products a probe; where num_steps ≥ N the matrix is formed and the result is exact.
      num_probes: random vectors, at least 2; standard errors fall like 1/√num_probes.
      probe_batch_size: probes whose Lanczos vectors are held at once; a remainder is allowed. None takes all.

    Returns:
      `SpectralDensity(nodes, weights, size)` with the methods `trace_of(function)`, `density(grid, width)` and
      `effective_rank()`.

    Raises:
      TypeError, ValueError: an operator without mv or that is not square, counts that are not integers or too small,
        something that is not a random key.
      MemoryError: the Lanczos vectors would not fit.

    Cost: num_steps·num_probes products; probe_batch_size·num_steps·N numbers.

    Source: Ubaru, Chen & Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017; the Lanczos
    process with full reorthogonalisation is matfree's.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from entk import NtkOperator, spectral_density
      >>> x = jnp.diag(jnp.sqrt(jnp.arange(1.0, 101.0)))
      >>> k = NtkOperator(lambda w, x: x @ w, jnp.ones(100), x)  # eigenvalues 1, 2, ..., 100
      >>> density = spectral_density(k, key=jax.random.key(0))
      >>> float(density.trace_of().value.round(6))  # signs are exact for the trace of a diagonal matrix
      5050.0
    """
    size, dtype = check_operator(operator)
    check_key(key)
    num_steps, num_probes = check_count("num_steps", num_steps), check_count("num_probes", num_probes, 2)
    if probe_batch_size is not None:
        probe_batch_size = check_count("probe_batch_size", probe_batch_size)
    held = min(probe_batch_size or num_probes, num_probes)
    if num_steps >= size:
        check_fits(2 * size**2 * dtype.itemsize, f"the {size} x {size} matrix", "Lower num_steps.")
        nodes, weights = _exact_density(matvec_of(operator), size, dtype, held)
    else:
        check_fits(
            held * num_steps * size * dtype.itemsize,
            f"holding {held} x {num_steps} Lanczos vectors of {size:,} {dtype} numbers",
            "Pass a smaller probe_batch_size, or lower num_steps.",
            count=held,
            bytes_of=lambda probes: probes * num_steps * size * dtype.itemsize,
            unit="probes at once",
        )
        nodes, weights = _quadrature(matvec_of(operator), key, size, dtype, num_steps, num_probes, held)
    return SpectralDensity(nodes, weights, size)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _exact_density(matvec, size, dtype, batch_size):
    with model_precision():
        return jnp.linalg.eigvalsh(_dense(matvec, size, dtype, batch_size))[None], jnp.full((1, size), 1 / size, dtype)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _quadrature(matvec, key, size, dtype, num_steps, num_probes, batch_size):
    # matfree's tridiag_sym averages both off-diagonals of this; the lower one alone, the norms of the remainders, says
    # where the Krylov space is exhausted: after that vectors need not be orthogonal, and the upper one is of order 1.
    arnoldi = decomp.hessenberg(num_steps, reortho="full", custom_vjp=False)

    def tridiagonal(key):
        start = jax.random.rademacher(key, (size,), dtype)
        projected = jnp.asarray(arnoldi(lambda vector, matvec: product(matvec, vector), start, matvec).J_small)
        return jnp.diag(projected), jnp.diag(projected, -1)

    with model_precision():
        diagonals = map_examples(tridiagonal, jax.random.split(key, num_probes), batch_size)
        # One after the other: batches of LAPACK's eigh have crashed on CPUs of many cores (JAX issue 39292).
        return jax.lax.map(lambda pair: nodes_and_weights(*pair), diagonals)


def nodes_and_weights(diagonal, off_diagonal):
    """The Gauss rule of a Lanczos process, cut where the Krylov space was exhausted (weight 0 from there on).

    There the next vector is rounding noise, or 0 / 0: what follows a NaN or a vanishing remainder is void.
    """
    known = jnp.where(jnp.isfinite(off_diagonal), off_diagonal, 0)
    scale = jnp.maximum(jnp.max(known, initial=0), jnp.max(jnp.abs(jnp.where(jnp.isfinite(diagonal), diagonal, 0))))
    reached = jnp.cumprod(known > 10 * jnp.finfo(known.dtype).eps * scale)
    diagonal = jnp.where(jnp.concatenate([jnp.ones(1, bool), reached.astype(bool)]), diagonal, 0)
    off_diagonal = jnp.where(reached.astype(bool), known, 0)
    tridiagonal = jnp.diag(diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
    nodes, vectors = jnp.linalg.eigh(tridiagonal)
    return nodes, vectors[0] ** 2
