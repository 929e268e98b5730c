"""P, W_S, D and G of a chain of frozen kernels: exact identities, negative controls, quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian import Operators, freeze, init_operators, update_operators

freeze_jit = jax.jit(freeze, static_argnums=2)
update = jax.jit(update_operators)


def chain(kind, seed, n, c, m, steps, log_h):
    """Operators of `steps` frozen kernels in a row, each with a kernel, a Hessian and a length of its own."""
    rng = np.random.default_rng(seed)
    operators, pieces = init_operators(n * c, m * c, np.float64), []
    for _ in range(steps):
        j_s, j_q = rng.normal(size=(n * c, n * c + 1)), rng.normal(size=(m * c, n * c + 1))
        pi = rng.dirichlet(np.ones(max(c, 2)), n)
        if kind == "squared":
            blocks = np.broadcast_to(np.eye(c) / n, (n, c, c))
        elif kind == "logistic":
            blocks = (pi[:, 0] * pi[:, 1])[:, None, None] / n
        else:
            blocks = (pi[:, :, None] * np.eye(c) - pi[:, :, None] * pi[:, None, :]) / n
        h = 10 ** (log_h + rng.uniform(-1, 1))
        pieces.append((j_s @ j_s.T, j_q @ j_s.T, blocks, h))
        frozen = freeze_jit(jnp.asarray(j_s @ j_s.T), jnp.asarray(blocks), kind == "squared")
        operators = update(operators, frozen, jnp.asarray(j_q @ j_s.T), h)
    return operators, pieces


def defect_of_i7(operators, n):
    """Relative defects of D = n(I − P) and W = (n/2)(I − PᵀP)."""
    p, w, d, _ = (np.asarray(operator) for operator in operators)
    eye = np.eye(len(p))
    return np.abs(d / n - (eye - p)).max(), np.abs(2 * w / n - (eye - p.T @ p)).max()


@settings(max_examples=20)
@given(shape=st.sampled_from([(1, 1, 1), (4, 1, 2), (3, 2, 3)]), seed=st.integers(0, 10**6), log_h=st.floats(-6, 5))
def test_i7_holds_for_the_squared_loss_with_any_kernels(shape, seed, log_h):
    n, c, m = shape
    operators, _ = chain("squared", seed, n, c, m, 5, log_h)
    assert max(defect_of_i7(operators, n)) < 1e-12
    assert np.linalg.eigvalsh(operators.gramian).max() <= n / 2 * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
def test_i7_fails_for_other_losses(kind):
    """The negative control: off by tenths, not by rounding."""
    c = 1 if kind == "logistic" else 3
    operators, _ = chain(kind, 1, 4, c, 2, 5, 0.5)
    assert min(defect_of_i7(operators, 4)) > 0.1


@settings(max_examples=20)
@given(kind=st.sampled_from(["squared", "logistic", "softmax"]), seed=st.integers(0, 10**6), log_h=st.floats(-6, 4))
def test_the_gramian_is_symmetric_positive_semi_definite_and_bounds_the_transfer(kind, seed, log_h):
    """(I6): ‖Gψ‖² ≤ (∫ λ_max(K_QQ)) ψᵀWψ, i.e. bound·W − GᵀG ⪰ 0."""
    operators, _ = chain(kind, seed, 4, {"softmax": 3}.get(kind, 1), 2, 4, log_h)
    w = np.asarray(operators.gramian)
    np.testing.assert_array_equal(w, w.T)
    assert np.linalg.eigvalsh(w).min() >= -1e-13 * np.abs(w).max()


@pytest.mark.parametrize("kind", ["squared", "logistic", "softmax"])
def test_transfer_is_bounded_as_i6_says(kind):
    n, c, m = 4, {"softmax": 3}.get(kind, 1), 2
    rng = np.random.default_rng(3)
    operators, bound = init_operators(n * c, m * c, np.float64), 0.0
    for h in (0.01, 0.3, 5.0, 100.0):
        jac = rng.normal(size=((n + m) * c, n * c + 1))
        j_s, j_q = jac[: n * c], jac[n * c :]
        pi = rng.dirichlet(np.ones(max(c, 2)), n)
        blocks = (pi[:, :c, None] * np.eye(c) - pi[:, :c, None] * pi[:, None, :c]) / n
        if kind == "squared":
            blocks = np.ones((n, 1, 1)) / n
        frozen = freeze_jit(jnp.asarray(j_s @ j_s.T), jnp.asarray(blocks), kind == "squared")
        operators = update(operators, frozen, jnp.asarray(j_q @ j_s.T), h)
        bound += h * np.linalg.eigvalsh(j_q @ j_q.T).max()
    slack = bound * operators.gramian - operators.test_transfer.T @ operators.test_transfer
    assert np.linalg.eigvalsh(slack).min() >= -1e-11 * bound * np.abs(operators.gramian).max()


@pytest.mark.parametrize("kind", ["squared", "logistic", "softmax"])
def test_every_operator_is_its_integral(kind):
    """Gauss-Legendre over exp(−τBK) from SciPy, piece after piece."""
    operators, pieces = chain(kind, 2, 3, {"softmax": 3}.get(kind, 1), 2, 3, -1.5)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    size = len(pieces[0][0])
    p, w, d, g = np.eye(size), 0.0, 0.0, 0.0
    for k, k_qs, blocks, h in pieces:
        generator = -scipy.linalg.block_diag(*blocks) @ k
        for node, weight in zip(nodes, weights, strict=True):
            inner = scipy.linalg.expm(h * (node + 1) / 2 * generator) @ p
            w, d, g = (
                total + h / 2 * weight * term
                for total, term in ((w, inner.T @ k @ inner), (d, k @ inner), (g, k_qs @ inner))
            )
        p = scipy.linalg.expm(h * generator) @ p
    for actual, expected in zip(operators, (p, w, d, g), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["squared", "softmax"])
def test_two_halves_make_a_whole(kind):
    n, c = 3, 2
    rng = np.random.default_rng(4)
    j = rng.normal(size=(n * c, 8))
    pi = rng.dirichlet(np.ones(c), n)
    blocks = np.broadcast_to(np.eye(c) / n, (n, c, c))
    if kind == "softmax":
        blocks = (pi[:, :, None] * np.eye(c) - pi[:, :, None] * pi[:, None, :]) / n
    frozen = freeze_jit(jnp.asarray(j @ j.T), jnp.asarray(blocks), kind == "squared")
    k_qs = jnp.asarray(rng.normal(size=(2, 8)) @ j.T)
    start = init_operators(n * c, 2, np.float64)
    whole = update(start, frozen, k_qs, 2.0)
    halves = update(update(start, frozen, k_qs, 0.75), frozen, k_qs, 1.25)
    for actual, expected in zip(halves, whole, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-12 * np.abs(expected).max())


def test_no_test_points():
    operators, _ = chain("squared", 0, 3, 2, 0, 2, 0.0)
    assert operators.test_transfer.shape == (0, 6)
    assert isinstance(operators, Operators)
    assert np.isfinite(operators.gramian).all()


def test_the_first_operators_are_those_of_no_training():
    start = init_operators(3, 2, np.float32)
    np.testing.assert_array_equal(start.propagator, np.eye(3))
    assert not any(np.any(operator) for operator in start[1:])
    assert {operator.dtype for operator in start} == {np.dtype(np.float32)}
