"""The frozen-kernel solution against matrix exponentials, and φ₁, φ₂ against extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian import freeze
from gramian._flow.phi import displacement, integral, phi1, phi2

# ----------------------------------------------------------------------------------------------------------- φ₁ and φ₂

POINTS = -np.concatenate([np.logspace(-300, 8, 617), np.linspace(0.9, 1.1, 41), [1.0, np.nextafter(1, 0), 5e-324]])


def phi_in_extended_precision(z, order):
    """(Σ_{k≥order} zᵏ/k!) / z^order: the series where it is short, else the definition, in 64-bit mantissas."""
    z = np.longdouble(z)
    if abs(z) < 2:
        total, term = np.longdouble(0), np.longdouble(1)
        for k in range(1, 60):  # term = z^(k-1)·order!/(k-1+order)! / order!
            total += term
            term = term * z / (k + order)
        return total / (1 if order == 1 else 2)
    first = np.expm1(z) / z
    return first if order == 1 else (first - 1) / z


@pytest.mark.parametrize(("phi", "order", "at_zero"), [(phi1, 1, 1.0), (phi2, 2, 0.5)])
def test_phi_to_1e_14_over_three_hundred_decades(phi, order, at_zero):
    assert phi(jnp.zeros(())) == at_zero
    values = np.asarray(jax.jit(phi)(jnp.asarray(POINTS)))
    expected = np.array([phi_in_extended_precision(z, order) for z in POINTS])
    assert np.abs(values / expected - 1).max() < 1e-14


def test_phi2_does_not_jump_where_series_and_quotient_meet():
    inside, outside = phi2(jnp.array([-np.nextafter(1, 0), -1.0]))
    assert abs(inside - outside) < 1e-15


def test_phi_in_single_precision():
    z = POINTS[POINTS < -1e-30].astype(np.float32)
    for phi, order in ((phi1, 1), (phi2, 2)):
        values = np.asarray(phi(jnp.asarray(z)))
        assert values.dtype == np.float32
        expected = np.array([phi_in_extended_precision(float(x), order) for x in z])
        assert np.abs(values / expected - 1).max() < 5e-7


# ------------------------------------------------------------------------------------------------- the linear equation


def random_case(seed, n, c, kind):
    """K (N, N) and blocks (n, c, c), positive semi-definite."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n * c, n * c + 2 if kind != "low-rank kernel" else max(1, n * c // 2)))
    if kind == "isotropic":
        blocks = np.broadcast_to(np.eye(c) / n, (n, c, c))
    elif kind == "softmax":
        pi = rng.dirichlet(np.ones(c), n)
        blocks = (pi[:, :, None] * np.eye(c) - pi[:, :, None] * pi[:, None, :]) / n
    else:
        roots = rng.normal(size=(n, c, c))
        blocks = roots @ roots.transpose(0, 2, 1) / n
    return features @ features.T, blocks, rng.normal(size=(n * c, 3))


def dense(blocks):
    return scipy.linalg.block_diag(*blocks)


def by_matrix_exponential(k, blocks, h, v):
    """exp(−hBK) v and ∫₀ʰ exp(−τBK) v dτ from one exponential of an augmented matrix (Van Loan)."""
    size = len(k)
    augmented = np.block([[-dense(blocks) @ k, np.eye(size)], [np.zeros((size, 2 * size))]]) * h
    whole = scipy.linalg.expm(augmented)
    return whole[:size, :size] @ v, whole[:size, size:] @ v


KINDS = ["isotropic", "random", "softmax", "low-rank kernel"]
freeze_jit = jax.jit(freeze, static_argnums=2)
displacement_jit, integral_jit = jax.jit(displacement), jax.jit(integral)


def frozen_of(k, blocks, kind):
    return freeze_jit(jnp.asarray(k), jnp.asarray(blocks), kind == "isotropic")


@settings(max_examples=15)
@given(shape=st.sampled_from([(1, 2), (4, 1), (3, 3)]), seed=st.integers(0, 10**6), log_h=st.floats(-8, 1))
@pytest.mark.parametrize("kind", KINDS)
def test_displacement_and_integral_solve_the_linear_equation(kind, shape, seed, log_h):
    """K and B random, K of low rank, B singular: ∫KP v = K ∫P v, and P v = v − B ∫KP v."""
    k, blocks, v = random_case(seed, *shape, kind)
    h = 10**log_h
    frozen = frozen_of(k, blocks, kind)
    decayed, integrated = by_matrix_exponential(k, blocks, h, v)
    moved = np.asarray(displacement_jit(frozen, h, v))
    scale = np.abs(v).max()
    np.testing.assert_allclose(integral_jit(frozen, h, v), integrated, rtol=1e-9, atol=1e-12 * h * scale)
    np.testing.assert_allclose(moved, k @ integrated, rtol=1e-9, atol=1e-12 * h * np.abs(k).max() * scale)
    np.testing.assert_allclose(v - dense(blocks) @ moved, decayed, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_diagonalises_both(kind):
    k, blocks, _ = random_case(5, 4, 3, kind)
    frozen = frozen_of(k, blocks, kind)
    factor = np.asarray(frozen.factor)
    np.testing.assert_allclose(factor @ factor.T, k, atol=1e-13 * np.abs(k).max())
    np.testing.assert_allclose(
        factor.T @ dense(blocks) @ factor, np.diag(frozen.rates), atol=1e-13 * float(frozen.rates.max())
    )
    assert frozen.rates.min() >= -1e-13 * frozen.rates.max()


@pytest.mark.parametrize("kind", ["isotropic", "random", "softmax"])
def test_a_step_against_an_ordinary_solver(kind):
    """No exponential at all on this side: u̇ = −K g, ġ = B u̇."""
    k, blocks, v = random_case(7, 2, 3, kind)
    b = dense(blocks)
    size = len(k)

    def field(_, state):
        g = state[:size]
        return np.concatenate([-b @ k @ g, k @ g])

    start = np.concatenate([v[:, 0], np.zeros(size)])
    solution = scipy.integrate.solve_ivp(field, (0, 0.7), start, method="DOP853", rtol=1e-12, atol=1e-13)
    moved = displacement_jit(frozen_of(k, blocks, kind), 0.7, v[:, 0])
    np.testing.assert_allclose(moved, solution.y[size:, -1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["isotropic", "random", "softmax", "low-rank kernel"])
@pytest.mark.parametrize("stiffness", [1e3, 1e6])
def test_stiff_steps(kind, stiffness):
    """h·γ up to 1e6, slow modes beside fast ones: by eigenvalues of the symmetric form and φ₁ in 64-bit mantissas."""
    rng = np.random.default_rng(11)
    vectors = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    values = np.logspace(0, -8, 6) * (1 if kind != "low-rank kernel" else np.array([1, 1, 1, 0, 0, 0]))
    k = (vectors * values) @ vectors.T
    _, blocks, v = random_case(3, 2, 3, kind)
    frozen = frozen_of(k, blocks, kind)
    h = stiffness / float(frozen.rates.max())
    # K^(1/2) f(K^(1/2) B K^(1/2)) K^(1/2): another factor and another eigenproblem than the library's.
    root = (vectors * np.sqrt(values)) @ vectors.T
    rates, rotation = np.linalg.eigh(root @ dense(blocks) @ root)
    weights = h * np.array([float(phi_in_extended_precision(-h * max(r, 0), 1)) if r > 1e-300 else 1 for r in rates])
    modes = root @ rotation
    expected = (modes * weights) @ (modes.T @ v)
    np.testing.assert_allclose(displacement_jit(frozen, h, v), expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    # What the integral does to the outputs is the displacement, also where it is nearly zero against h·v.
    moved = k @ np.asarray(integral_jit(frozen, h, v))
    np.testing.assert_allclose(moved, expected, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_step_moves_by_its_derivative(kind):
    k, blocks, v = random_case(9, 3, 2, kind)
    frozen = frozen_of(k, blocks, kind)
    np.testing.assert_allclose(displacement_jit(frozen, 1e-12, v) / 1e-12, k @ v, rtol=1e-8)
    np.testing.assert_allclose(integral_jit(frozen, 1e-12, v) / 1e-12, v, rtol=1e-10)


def test_a_zero_kernel_moves_nothing():
    frozen = frozen_of(np.zeros((4, 4)), np.ones((4, 1, 1)), "random")
    assert not np.any(displacement(frozen, 5.0, jnp.ones(4)))
    np.testing.assert_array_equal(integral(frozen, 5.0, jnp.ones(4)), 5 * np.ones(4))
