"""Ritz pairs against full eigendecompositions."""

import jax.numpy as jnp
import numpy as np
import pytest

from entk._spectra.spectrum import SpectralDensity
from gramian import ritz_pairs, sampled_density
from gramian._krylov import spectrum_of


class Matrix:
    """A symmetric matrix that counts its products."""

    def __init__(self, values, seed=0):
        basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
        self.matrix, self.calls = (basis * values) @ basis.T, 0
        self.shape, self.dtype = self.matrix.shape, np.dtype(np.float64)

    def mv(self, block):
        self.calls += 1
        return self.matrix @ block


def test_a_fast_spectrum_is_found_with_three_products():
    values = np.concatenate([[100.0, 100.0, 50.0], 2.0 ** -np.arange(40), [-0.5] * 7])
    operator = Matrix(values)
    found = ritz_pairs(operator, 3, num_products=3)
    assert operator.calls == 3
    np.testing.assert_allclose(found.values, [100, 100, 50], rtol=1e-9)
    exact = np.linalg.norm(operator.matrix @ found.vectors - found.vectors * found.values, axis=0)
    np.testing.assert_allclose(found.residuals, exact, atol=1e-10)
    assert -0.5 <= found.lowest < 0


@pytest.mark.parametrize("num_products", [1, 2, 4])
def test_values_are_bounds_and_residuals_cover_their_error(num_products):
    values = np.sort(np.random.default_rng(1).exponential(size=60))[::-1] - 0.2
    operator = Matrix(values)
    found = ritz_pairs(operator, 5, num_products=num_products, seed=3)
    assert (found.values <= values[:5] + 1e-12).all()
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(values - value).min() <= residual + 1e-12
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-12)


def test_more_products_bring_the_residual_down():
    operator = Matrix(1.0 / np.arange(1, 201))
    residuals = [ritz_pairs(operator, 4, num_products=k).residuals.max() for k in (1, 2, 4, 8)]
    assert residuals[3] < residuals[2] < residuals[1] < residuals[0]
    assert residuals[3] < residuals[0] / 20


def test_the_whole_space_and_an_exhausted_one():
    operator = Matrix(np.array([3.0, 2.0, 1.0, 0.0, 0.0]))
    np.testing.assert_allclose(ritz_pairs(operator, 5, num_products=3).values, [3, 2, 1, 0, 0], atol=1e-12)
    low_rank = Matrix(np.concatenate([[2.0, 1.0], np.zeros(48)]))
    np.testing.assert_allclose(ritz_pairs(low_rank, 4, num_products=3).values, [2, 1, 0, 0], atol=1e-10)


def test_a_rank_that_cannot_be_reached():
    with pytest.raises(ValueError, match="rank=9 exceeds the 4"):
        ritz_pairs(Matrix(np.ones(20)), 9, block_size=2, num_products=2)


def test_the_density_of_an_indefinite_spectrum():
    values = np.concatenate([np.linspace(1, 3, 60), np.linspace(-0.5, 0, 20)])
    operator = Matrix(values)
    density = sampled_density(operator, num_steps=12, num_probes=16)
    assert operator.calls == 12
    for function, exact in ((lambda v: v, values.sum()), (lambda v: v**2, (values**2).sum())):
        value, error = density.trace_of(function)
        assert abs(float(value) - exact) < 5 * float(error)
    rank, error = density.effective_rank()
    assert abs(float(rank) - values.sum() ** 2 / (values**2).sum()) < 5 * float(error)
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-12)


def test_the_same_products_give_the_density():
    """Moments up to degree 2·num_products − 1 are those of the first block's own vectors; places are those of N."""
    values = np.concatenate([np.linspace(1, 3, 60), np.linspace(-0.5, 0, 20)])
    operator = Matrix(values)
    density = ritz_pairs(operator, 4, block_size=10, num_products=3).density
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-12)
    for power in range(1, 6):
        value, error = density.trace_of(lambda v, power=power: v**power)
        assert abs(float(value) - (values**power).sum()) < 4 * float(error)
        assert float(error) < 0.1 * (values**power).sum()
    even = np.linspace(3, -1, 80)
    places, nodes = spectrum_of(ritz_pairs(Matrix(even), 4, block_size=10, num_products=3).density)
    assert np.abs(np.interp(places, np.arange(1, 81), even) - nodes).mean() < 0.2
    exact = SpectralDensity(jnp.array([[1.0, 3.0, 2.0]]), jnp.full((1, 3), 1 / 3), 3)
    np.testing.assert_allclose(spectrum_of(exact)[0], [1, 2, 3])


def test_all_steps_give_the_moments_of_the_probe_exactly():
    operator = Matrix(np.arange(1.0, 13.0))
    density = sampled_density(operator, num_steps=12, num_probes=3, seed=5)
    probes = np.random.default_rng(5).choice([-1.0, 1.0], (12, 3))
    for power in (1, 2, 5):
        moments = np.diagonal(probes.T @ np.linalg.matrix_power(operator.matrix, power) @ probes) / 12
        np.testing.assert_allclose((density.weights * density.nodes**power).sum(1), moments, rtol=1e-10)


def test_an_exhausted_probe_leaves_no_nan():
    density = sampled_density(Matrix(np.concatenate([[2.0], np.ones(29)])), num_steps=6, num_probes=4)
    assert np.isfinite(density.nodes).all()
    np.testing.assert_allclose(density.trace_of(lambda v: v).value, 31, rtol=0.2)
