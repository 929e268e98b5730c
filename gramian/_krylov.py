"""Spectra of symmetric operators whose products are long computations of their own: few of them, in blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from entk.internal import LinearOperator, SpectralDensity, check_count, nodes_and_weights


class RitzPairs(NamedTuple):
    """The largest Ritz pairs of a symmetric operator.

    Attributes:
      values: descending, (rank,). For every one an eigenvalue lies within its residual; a top eigenvalue is never
        smaller than its Ritz value.
      vectors: orthonormal, in the columns, (N, rank).
      residuals: ‖W v − λ v‖, (rank,).
      lowest: the smallest Ritz value; the smallest eigenvalue is no larger.
      density: of all eigenvalues, from the same products: block Lanczos quadrature, one Gauss rule a random vector of
        the first block, exact along it for polynomials of degree < 2·num_products.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    lowest: float
    density: SpectralDensity


def ritz_pairs(
    operator: LinearOperator, rank: int, *, block_size: int | None = None, num_products: int = 2, seed: int = 0
) -> RitzPairs:
    """The largest eigenpairs by randomised block Krylov iteration (block Lanczos, fully reorthogonalised; theory §4).

    The first product multiplies random vectors, the second what came out of it: with two this is a randomised
    eigendecomposition, with more of them block Lanczos. `entk.top_eigenpairs` does the same inside one compiled
    program; here every product may read from disk.

    Args:
      operator: symmetric, with `shape` (N, N) and `mv` for blocks (N, r).
      rank: number of pairs.
      block_size: vectors multiplied at once; None takes rank + 4.
      num_products: products with a block; one alone sees nothing but random directions.
      seed: of the first block.

    Returns:
      `RitzPairs`; residuals cost nothing more and say how far to trust each pair.

    Raises:
      ValueError: a rank larger than N or than all vectors together.

    Cost: num_products products with a block; 2·block_size·num_products·N numbers.

    Source: Musco & Musco, "Randomized block Krylov methods", arXiv:1504.05477.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import NtkOperator
      >>> from gramian import ritz_pairs
      >>> k = NtkOperator(lambda w, x: x @ w, jnp.ones(50), jnp.diag(1 / jnp.arange(1.0, 51.0)))
      >>> ritz_pairs(k, 2, num_products=5).values.round(6)
      array([1.  , 0.25])
    """
    size = operator.shape[0]
    rank, num_products = check_count("rank", rank), check_count("num_products", num_products)
    block_size = min(size, rank + 4) if block_size is None else check_count("block_size", block_size)
    if rank > min(size, block_size * num_products):
        raise ValueError(
            f"rank={rank} exceeds the {min(size, block_size * num_products)} vectors that block_size={block_size} and "
            f"num_products={num_products} span for N = {size}; raise them."
        )
    rng = np.random.default_rng(seed)
    basis, image = np.zeros((size, 0)), rng.standard_normal((size, block_size))
    images, first = np.zeros((size, 0)), 0
    for _ in range(num_products):
        block = _orthonormal(image, basis, rng)
        if not block.shape[1]:
            break
        image = np.asarray(operator.mv(jnp.asarray(block)), np.float64)
        basis, images = np.hstack([basis, block]), np.hstack([images, image])
        first = first or block.shape[1]
    projected = basis.T @ images
    values, rotation = np.linalg.eigh((projected + projected.T) / 2)
    values, rotation = values[::-1], rotation[:, ::-1]
    vectors = basis @ rotation[:, :rank]
    residuals = np.linalg.norm(images @ rotation[:, :rank] - vectors * values[:rank], axis=0)
    weights = rotation[:first] ** 2
    density = SpectralDensity(jnp.asarray(np.broadcast_to(values, weights.shape)), jnp.asarray(weights), size)
    return RitzPairs(values[:rank], vectors, residuals, float(values[-1]), density)


def spectrum_of(density: SpectralDensity) -> tuple[np.ndarray, np.ndarray]:
    """The places among all N eigenvalues, largest first, that a density whose probes share their nodes gives each node.

    A node of a quadrature stands in the midst of its share; where the density is exact these are 1 to N.
    """
    nodes, mass = np.asarray(density.nodes[0]), density.size * np.asarray(density.weights).mean(0)
    order = np.argsort(-nodes)
    return np.cumsum(mass[order]) - mass[order] / 2 + 0.5, nodes[order]


def _orthonormal(block: np.ndarray, basis: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An orthonormal basis of what the block adds; as many columns as there is room for."""
    room = len(block) - basis.shape[1]
    block = block[:, :room] / max(np.linalg.norm(block), np.finfo(float).tiny)
    block = block + 1e-14 * rng.standard_normal(block.shape) / len(block) ** 0.5  # a new direction where it has none
    for _ in range(3):
        block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block


def sampled_density(
    operator: LinearOperator, *, num_steps: int = 8, num_probes: int = 8, seed: int = 0
) -> SpectralDensity:
    """The density of all eigenvalues by stochastic Lanczos quadrature, all probes multiplied at once.

    `entk.spectral_density` does the same inside one compiled program. The operator may be indefinite, as W of a
    mini-batch run is.

    Args:
      operator: symmetric, with `shape` (N, N) and `mv` for blocks (N, r).
      num_steps: Lanczos steps, at most N.
      num_probes: random sign vectors, at least 2 for standard errors.
      seed: of the vectors.

    Returns:
      `entk.SpectralDensity`: `trace_of(function)`, `density(grid, width)`, `effective_rank()`.

    Cost: num_steps products with a block of num_probes; num_steps·num_probes·N numbers.

    Source: Ubaru, Chen & Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import NtkOperator
      >>> from gramian import sampled_density
      >>> x = jnp.diag(jnp.sqrt(jnp.arange(1.0, 51.0)))
      >>> k = NtkOperator(lambda w, x: x @ w, jnp.ones(50), x)  # eigenvalues 1, 2, ..., 50
      >>> float(sampled_density(k).trace_of().value.round(6))
      1275.0
    """
    size = operator.shape[0]
    num_steps = min(check_count("num_steps", num_steps), size)
    num_probes = check_count("num_probes", num_probes, 2)
    vectors = np.random.default_rng(seed).choice([-1.0, 1.0], (size, num_probes)) / size**0.5
    basis = np.zeros((num_steps, size, num_probes))
    diagonal, off_diagonal = np.zeros((num_probes, num_steps)), np.zeros((num_probes, num_steps - 1))
    for k in range(num_steps):
        basis[k] = vectors
        image = np.asarray(operator.mv(jnp.asarray(vectors)), np.float64)
        diagonal[:, k] = np.sum(vectors * image, axis=0)
        for _ in range(2):
            image = image - np.einsum("knr,kr->nr", basis, np.einsum("knr,nr->kr", basis, image))
        norms = np.linalg.norm(image, axis=0)
        if k + 1 < num_steps:
            off_diagonal[:, k] = norms
            vectors = image / np.where(norms > 0, norms, 1)
    rules = [nodes_and_weights(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(diagonal, off_diagonal, strict=True)]
    nodes, weights = (jnp.stack(column) for column in zip(*rules, strict=True))
    return SpectralDensity(nodes, weights, size)
