"""The measures of kernel evolution against NumPy and SciPy, with known values, invariances and negative controls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from entk import (
    centered_kernel_alignment,
    effective_rank,
    empirical_ntk,
    kernel_drift,
    principal_angles,
    target_alignment,
)
from tests.entk.mlp_oracle import apply_fn, assert_close, batch, init

SIZE = 6  # one size, so that hypothesis compiles once
seeds = st.integers(0, 2**31)
scales = st.floats(1e-6, 1e6)


def orthogonal(seed, n=SIZE):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def kernel(seed, n=SIZE, rank=SIZE):
    factor = np.random.default_rng(seed).normal(size=(n, rank))
    return factor @ factor.T


def rotation(angle, n=SIZE, first=0, second=1):
    """Turns direction `first` towards `second`."""
    turn = np.eye(n)
    turn[first, first] = turn[second, second] = np.cos(angle)
    turn[second, first], turn[first, second] = np.sin(angle), -np.sin(angle)
    return turn


# --------------------------------------------------------------------------------------------------------------- drift


@given(seeds)
def test_drift_is_the_relative_spectral_norm_of_the_change(seed):
    k, k0 = kernel(seed), kernel(seed + 1)
    assert_close(kernel_drift(k, k0), np.linalg.norm(k - k0, 2) / np.linalg.norm(k0, 2))


@given(seeds, st.floats(0, 1e3))
def test_drift_of_a_multiple_is_the_distance_of_the_factor_from_one(seed, factor):
    k = kernel(seed)
    assert float(kernel_drift(factor * k, k)) == pytest.approx(abs(factor - 1), rel=1e-12, abs=1e-12)


@given(seeds, scales)
def test_drift_is_free_of_scale_and_basis(seed, scale):
    k, k0, basis = kernel(seed), kernel(seed + 1), orthogonal(seed + 2)
    drift = kernel_drift(k, k0)
    assert_close(kernel_drift(scale * k, scale * k0), drift, 1e-11)
    assert_close(kernel_drift(basis @ k @ basis.T, basis @ k0 @ basis.T), drift, 1e-11)


def test_drift_counts_what_shrinks_as_well_as_what_grows():
    """The largest eigenvalue in size, not in sign; and it is relative to the second argument."""
    assert kernel_drift(jnp.diag(jnp.array([1.0, 3.0])), jnp.diag(jnp.array([10.0, 2.0]))) == 0.9
    assert kernel_drift(jnp.eye(2), 4 * jnp.eye(2)) == 0.75
    assert kernel_drift(4 * jnp.eye(2), jnp.eye(2)) == 3


def test_drift_is_zero_for_a_linear_model_and_not_for_a_network():
    rng, x = np.random.default_rng(0), batch(0, 5)

    def drift(model, before, after):
        return float(kernel_drift(empirical_ntk(model, after, x), empirical_ntk(model, before, x)))

    assert drift(lambda w, x: x @ w, rng.normal(size=3), rng.normal(size=3)) == 0
    params = init(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
    assert drift(apply_fn, params, params) == 0
    assert drift(apply_fn, params, moved) > 0.01


def test_drift_from_a_zero_kernel_is_not_a_number_that_could_be_believed():
    zero = np.zeros((2, 2))
    assert np.isposinf(kernel_drift(np.eye(2), zero))
    assert np.isnan(kernel_drift(zero, zero))


# ----------------------------------------------------------------------------------------------------------------- CKA


@given(seeds)
def test_cka_centres_by_the_matrix_h(seed):
    k, k0 = kernel(seed), kernel(seed + 1)
    h = np.eye(SIZE) - np.ones((SIZE, SIZE)) / SIZE
    a, b = h @ k @ h, h @ k0 @ h
    assert_close(centered_kernel_alignment(k, k0), np.trace(a @ b) / np.linalg.norm(a) / np.linalg.norm(b))


@given(seeds, scales, scales)
def test_cka_ignores_scale_constant_features_and_common_rotations(seed, scale, scale0):
    k, k0 = kernel(seed), kernel(seed + 1)
    alignment = centered_kernel_alignment(k, k0)
    assert_close(centered_kernel_alignment(scale * k, scale0 * k0), alignment, 1e-11)
    shift = np.random.default_rng(seed).normal(size=SIZE)
    shifted = k + shift[:, None] + shift[None, :] + 3.0  # features moved by a constant vector
    assert_close(centered_kernel_alignment(shifted, k0), alignment, 1e-11)
    assert_close(centered_kernel_alignment(k0, k), alignment)
    order = np.random.default_rng(seed).permutation(SIZE)
    assert_close(centered_kernel_alignment(k[order][:, order], k0[order][:, order]), alignment, 1e-11)
    assert 0 <= alignment <= 1 + 1e-12


def test_cka_of_known_kernels():
    k = kernel(1)
    assert_close(centered_kernel_alignment(k, 7 * k), 1.0)
    assert_close(centered_kernel_alignment(k, -k), -1.0)
    y, z = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    assert centered_kernel_alignment(np.outer(y, y), np.outer(z, z)) == 0
    both = np.outer(y, y) + np.outer(z, z)
    assert_close(centered_kernel_alignment(np.outer(y, y), both), np.sqrt(0.5))


def test_cka_without_the_centring_would_be_another_number():
    """A kernel that is nearly constant: uncentred alignment sees only the constant."""
    k, k0 = 100 + kernel(2), 100 + kernel(3)
    uncentred = (k * k0).sum() / np.linalg.norm(k) / np.linalg.norm(k0)
    assert uncentred > 0.99
    assert centered_kernel_alignment(k, k0) < 0.9


def test_cka_of_a_constant_kernel_is_nan():
    assert np.isnan(centered_kernel_alignment(np.ones((3, 3)), np.ones((3, 3))))
    assert np.isnan(centered_kernel_alignment(np.ones((1, 1)), np.ones((1, 1))))


# -------------------------------------------------------------------------------------------------------------- angles


@settings(max_examples=30)
@given(seeds, st.integers(1, SIZE))
def test_angles_are_those_of_scipy(seed, rank):
    k, k0 = kernel(seed), kernel(seed + 1)
    top, top0 = (np.linalg.eigh(matrix)[1][:, -rank:] for matrix in (k, k0))
    expected = np.sort(scipy.linalg.subspace_angles(top, top0))
    angles = np.asarray(principal_angles(k, k0, rank))
    np.testing.assert_allclose(angles, expected, atol=1e-7)
    assert (np.diff(angles) >= -1e-12).all()


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-6, 1e-3, 0.1, np.pi / 4, 1.0, 1.5, np.pi / 2 - 1e-6, np.pi / 2])
def test_a_rotation_is_found_with_its_angle(angle):
    """Out of the leading pair of a four-dimensional space: the other leading direction stays."""
    k0 = np.diag([4.0, 3.0, 0.5, 0.25])
    turn = rotation(angle, 4, first=0, second=2)
    angles = principal_angles(turn @ k0 @ turn.T, k0, 2)
    assert angles[0] <= 1e-13
    # To rounding: a cosine alone would lose what is below 1e-8, a sine alone the digits close to a right angle.
    assert float(angles[1]) == pytest.approx(angle, rel=0, abs=2e-14)


def test_small_angles_are_found_in_any_basis():
    basis = orthogonal(4)
    k0 = basis @ np.diag([6.0, 5, 4, 0.3, 0.2, 0.1]) @ basis.T
    turn = basis @ rotation(1e-9, first=0, second=3) @ rotation(2e-6, first=1, second=4) @ basis.T
    angles = principal_angles(turn @ k0 @ turn.T, k0, 3)
    np.testing.assert_allclose(angles[1:], [1e-9, 2e-6], rtol=1e-4)
    assert angles[0] < 1e-13


def test_angles_see_subspaces_and_not_their_bases():
    """Negative and positive controls: a turn inside the leading space is none, a turn out of it is one."""
    k0 = np.diag([4.0, 3.0, 2.0, 1.0])
    inside, outside = rotation(0.3, 4, 0, 1), rotation(0.3, 4, 1, 2)
    np.testing.assert_allclose(principal_angles(inside @ k0 @ inside.T, k0, 2), 0, atol=1e-14)
    np.testing.assert_allclose(principal_angles(outside @ k0 @ outside.T, k0, 2), [0, 0.3], atol=1e-14)
    np.testing.assert_allclose(principal_angles(inside @ k0 @ inside.T, k0, 1), [0.3], atol=1e-14)


def test_angles_of_known_spaces():
    up, down = np.diag([3.0, 2, 1, 0]), np.diag([0.0, 1, 2, 3])
    np.testing.assert_allclose(principal_angles(up, down, 2), np.pi / 2, atol=1e-14)  # orthogonal
    np.testing.assert_allclose(principal_angles(up, down, 3), [0, 0, np.pi / 2], atol=1e-14)  # they must meet
    np.testing.assert_allclose(principal_angles(up, down, 4), 0, atol=1e-14)  # the whole space
    assert principal_angles(np.eye(1), np.eye(1), 1).shape == (1,)
    int_of_numpy: Any = np.int64(2)
    np.testing.assert_allclose(principal_angles(up, 5 * up, int_of_numpy), 0, atol=1e-14)


def test_angles_under_jit_and_vmap():
    k0 = np.diag([4.0, 3.0, 0.5, 0.25])
    turned = np.stack([rotation(a, 4, 0, 2) @ k0 @ rotation(a, 4, 0, 2).T for a in (0.1, 1.2)])
    angles = jax.jit(jax.vmap(lambda k: principal_angles(k, k0, 2)))(turned)
    np.testing.assert_allclose(angles, [[0, 0.1], [0, 1.2]], atol=1e-14)


# ------------------------------------------------------------------------------------------------------ effective rank


@given(seeds)
def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues(seed):
    k = kernel(seed)
    eigenvalues = np.linalg.eigvalsh(k)
    assert_close(effective_rank(k), eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


@given(seeds, st.integers(1, SIZE), scales)
def test_effective_rank_of_a_projection_is_its_rank(seed, rank, scale):
    top = orthogonal(seed)[:, :rank]
    assert_close(effective_rank(scale * top @ top.T), rank)


@given(seeds)
def test_effective_rank_lies_between_one_and_the_rank(seed):
    assert 1 - 1e-12 <= effective_rank(kernel(seed, rank=3)) <= 3 + 1e-12


def test_effective_rank_of_known_spectra():
    assert effective_rank(np.diag([1.0, 1, 0, 0])) == 2
    assert effective_rank(np.diag([3.0, 1])) == pytest.approx(1.6, rel=1e-15)
    assert effective_rank(np.array([[1, 2], [2, 5]])) == pytest.approx(36 / 34)  # entries, not only the diagonal
    assert np.isnan(effective_rank(np.zeros((2, 2))))


# ---------------------------------------------------------------------------------------------------- target alignment


@given(seeds)
def test_target_alignment_is_the_cosine_of_k_and_the_targets_kernel(seed):
    k, y = kernel(seed), np.random.default_rng(seed + 1).normal(size=SIZE)
    ideal = np.outer(y, y)
    assert_close(target_alignment(k, y), (k * ideal).sum() / np.linalg.norm(k) / np.linalg.norm(ideal))


@given(seeds, scales, scales)
def test_target_alignment_ignores_scale(seed, scale, target_scale):
    k, y = kernel(seed), np.random.default_rng(seed + 1).normal(size=SIZE)
    assert_close(target_alignment(scale * k, -target_scale * y), target_alignment(k, y), 1e-11)


def test_target_alignment_of_known_kernels():
    y, z = np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
    assert target_alignment(np.outer(y, y), y) == 1
    assert target_alignment(-np.outer(y, y), y) == -1
    assert target_alignment(np.outer(z, z), y) == 0
    assert target_alignment(np.eye(4), y) == 0.5
    assert np.isnan(target_alignment(np.eye(4), np.zeros(4)))


# ---------------------------------------------------------------------------------------------- dtypes, transformations

MEASURES = {
    "kernel_drift": kernel_drift,
    "centered_kernel_alignment": centered_kernel_alignment,
    "principal_angles": lambda k, k0: principal_angles(k, k0, 2),
    "effective_rank": lambda k, k0: effective_rank(k),
    "target_alignment": lambda k, k0: target_alignment(k, k0[0]),
}


@pytest.mark.parametrize("name", MEASURES)
def test_float32_integers_jit_and_vmap(name):
    measure = MEASURES[name]
    # The spectrum is spread, so that eigenspaces are well determined in float32 too.
    basis, basis0 = orthogonal(5), orthogonal(6)
    k, k0 = basis @ np.diag(2.0 ** np.arange(SIZE)) @ basis.T, basis0 @ np.diag(2.0 ** np.arange(SIZE)) @ basis0.T
    exact = measure(k, k0)
    assert exact.dtype == jnp.float64
    single = measure(k.astype(np.float32), k0.astype(np.float32))
    assert single.dtype == jnp.float32
    assert_close(single, exact, 1e-5)
    assert_close(jax.jit(measure)(k, k0), exact, 1e-12)
    assert_close(jax.vmap(measure)(np.stack([k, k0]), np.stack([k0, k0]))[0], exact, 1e-12)
    whole, whole0 = np.diag([5, 4, 1]), np.diag([1, 5, 4])
    assert_close(measure(whole, whole0), measure(whole.astype(float), whole0.astype(float)))


# ----------------------------------------------------------------------------------------------------------- bad input

SHAPES = [((2, 3), (2, 3)), ((2, 2), (3, 3)), ((4,), (4,)), ((), ()), ((2, 2, 2), (2, 2, 2)), ((0, 0), (0, 0))]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", ["kernel_drift", "centered_kernel_alignment", "principal_angles"])
def test_two_kernels_must_be_square_and_alike(name, shapes):
    k, k0 = np.ones(shapes[0]), np.ones(shapes[1])
    with pytest.raises(
        ValueError, match=r"kernels must be square matrices of one shape.*got \{'k': .*'k0': "
    ) as refusal:
        MEASURES[name](k, k0)
    assert str(shapes[0]) in str(refusal.value)
    assert str(shapes[1]) in str(refusal.value)


@pytest.mark.parametrize("shape", [(2, 3), (4,), (), (2, 2, 2), (0, 0)])
def test_one_kernel_must_be_square(shape):
    for call in (lambda k: effective_rank(k), lambda k: target_alignment(k, np.ones(2))):
        with pytest.raises(ValueError, match=r"kernels must be square matrices .*got \{'k': \("):
            call(np.ones(shape))


@pytest.mark.parametrize("targets", [np.ones(3), np.ones((2, 1)), np.ones((1, 2)), np.float64(1)])
def test_targets_must_have_one_number_a_row(targets):
    with pytest.raises(ValueError, match=r"targets has shape \(.*\), but the kernel needs \(2,\)"):
        target_alignment(np.eye(2), targets)


@pytest.mark.parametrize("rank", [0, -1, 4, 1.0, True, None, "2"])
def test_ranks_that_are_not_dimensions(rank):
    with pytest.raises(ValueError, match=r"rank=.* must be an integer in 1\.\.3, the size of the kernels"):
        principal_angles(np.eye(3), np.eye(3), rank)


@pytest.mark.parametrize("name", MEASURES)
def test_lists_and_complex_kernels(name):
    with pytest.raises(TypeError, match=r"k is a list, but must be a square matrix: pass jnp\.asarray\(k\)"):
        MEASURES[name]([[1.0, 0.0], [0.0, 1.0]], np.eye(2))
    with pytest.raises(TypeError, match=r"k has dtype complex128, but kernels are real"):
        MEASURES[name](1j * np.eye(2), np.eye(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cosines_are_one_at_most_and_ranks_at_most_the_size(dtype):
    rng = np.random.default_rng(0)
    for _ in range(50):
        j = rng.normal(size=(6, 3)).astype(dtype)
        k = j @ j.T
        assert float(centered_kernel_alignment(k, 3 * k)) <= 1
        assert float(target_alignment(np.outer(j[:, 0], j[:, 0]), j[:, 0])) <= 1
    assert float(effective_rank(np.eye(7, dtype=dtype) / 3)) <= 7


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_measures_do_not_depend_on_the_scale_of_the_kernel(scale):
    """In float32, where the squares of these numbers are 0 and infinite."""
    rng = np.random.default_rng(0)
    j, y = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    k, other, size = j @ j.T, j[:, :2] @ j[:, :2].T, np.float32(scale)
    for measure in (lambda k: centered_kernel_alignment(k, other), effective_rank):
        np.testing.assert_allclose(measure(size * k), measure(k), rtol=1e-5)
    np.testing.assert_allclose(target_alignment(size * k, size * y), target_alignment(k, y), rtol=1e-5)


def test_a_constant_kernel_has_no_alignment():
    """Centring leaves the rounding of 0.1, of which a cosine would be any number."""
    assert np.isnan(centered_kernel_alignment(np.full((5, 5), 0.1), np.eye(5)))
