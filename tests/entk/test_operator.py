"""Products with the empirical NTK against NumPy's J Jᵀ, with J derived by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlp_oracle import assert_close, batch, init
from mlp_oracle import wavy_fn as apply_fn
from mlp_oracle import wavy_kernel_by_hand as kernel_by_hand

import entk._operator
from entk import ntk_vector_product

PARAMS, X_S, X_Q = init(0), batch(0, 6), batch(1, 4)
K_SS, K_QS = kernel_by_hand(PARAMS, X_S, X_S), kernel_by_hand(PARAMS, X_Q, X_S)
SIZES = [None, 1, 2, 4, 6, 1000]  # for n = 6 and m = 4: divisors, remainders, all, more


@pytest.mark.parametrize("columns", [(), (1,), (3,), (0,)])
@pytest.mark.parametrize("x2", [None, X_S])
def test_the_product_is_that_of_the_matrix(columns, x2):
    kernel, x1 = (K_SS, X_S) if x2 is None else (K_QS, X_Q)
    vector = np.random.default_rng(5).normal(size=(12, *columns))
    assert_close(ntk_vector_product(apply_fn, PARAMS, vector, x1, x2), kernel @ vector)


@pytest.mark.parametrize("microbatch_size", SIZES)
@pytest.mark.parametrize("columns", [(), (3,)])
def test_the_product_in_blocks_is_the_product(microbatch_size, columns):
    vector = np.random.default_rng(0).normal(size=(12, *columns))
    product = ntk_vector_product(apply_fn, PARAMS, vector, X_Q, X_S, microbatch_size=microbatch_size)
    assert_close(product, K_QS @ vector)


def test_the_product_in_blocks_holds_less():
    x, params = batch(0, 512), PARAMS
    held = [
        entk._operator._ntk_vector_product.lower(apply_fn, params, jnp.ones(1024), x, None, size)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for size in (None, 8)
    ]
    assert held[1] < held[0] / 2


def test_products_with_unit_vectors_are_the_columns():
    assert_close(ntk_vector_product(apply_fn, PARAMS, np.eye(12), X_Q, X_S), K_QS)


def test_the_product_of_more_examples_than_a_matrix_would_hold():
    """N = 400,000: K would take 1.2 TiB."""
    x = np.random.default_rng(6).normal(size=(400_000, 3))
    product = ntk_vector_product(lambda w, x: x @ w, jnp.ones(3), x[:, 0], x)
    assert_close(product, x @ (x.T @ x[:, 0]))


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    c=st.integers(1, 3),
    microbatch_size=st.none() | st.integers(1, 8),
    r=st.none() | st.integers(1, 3),
)
def test_any_shape(seed, n, m, c, microbatch_size, r):
    params, x_s, x_q = init(seed, 2, 3, c), batch(seed, n, 2), batch(seed + 1, m, 2)
    expected = kernel_by_hand(params, x_q, x_s)
    vector = np.random.default_rng(seed).normal(size=(n * c,) if r is None else (n * c, r))
    product = ntk_vector_product(apply_fn, params, vector, x_q, x_s, microbatch_size=microbatch_size)
    assert product.shape == (m * c, *vector.shape[1:])
    assert np.abs(product - expected @ vector).max() <= 1e-12 * np.linalg.norm(expected) * np.linalg.norm(vector)


def test_inputs_may_be_a_pytree():
    def model(params, x):
        return apply_fn(params, jnp.stack([x["a"], *x["b"]], axis=1))

    x_q, x_s = ({"a": x[:, 0], "b": (x[:, 1], x[:, 2])} for x in (X_Q, X_S))
    assert_close(ntk_vector_product(model, PARAMS, np.ones(12), x_q, x_s), K_QS @ np.ones(12))


def test_float32_stays_float32():
    params, x = jax.tree.map(np.float32, PARAMS), X_S.astype(np.float32)
    exact = kernel_by_hand(jax.tree.map(np.float64, params), x.astype(float), x.astype(float))
    vector = np.linspace(-1, 1, 12, dtype=np.float32)

    def check():
        product = ntk_vector_product(apply_fn, params, vector, x)
        assert product.dtype == jnp.float32
        assert_close(product, exact @ vector, 1e-5)

    check()
    with jax.enable_x64(False):
        check()


def test_the_product_under_jit_vmap_and_grad():
    vector = np.random.default_rng(8).normal(size=12)

    def compute(params, vector):
        return ntk_vector_product(apply_fn, params, vector, X_Q, X_S)

    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[init(seed) for seed in range(2)])
    expected = np.stack([kernel_by_hand(init(seed), X_Q, X_S) @ vector for seed in range(2)])
    assert_close(jax.jit(compute)(init(1), vector), expected[1])
    assert_close(jax.vmap(compute, in_axes=(0, None))(ensemble, vector), expected)
    gradient = jax.grad(lambda vector: compute(PARAMS, vector).sum())(vector)
    assert_close(gradient, K_QS.sum(0))


# ---------------------------------------------------------------------------------------------------------- bad input
# What every entry point refuses (outputs, params, inputs, dtypes) is in test_jacobian.py.


def test_x1_and_x2_with_different_numbers_of_outputs():
    message = "x1 has 3 outputs an example and x2 2, but one kernel needs the same number: pass inputs of one kind"
    with pytest.raises(ValueError, match=message):
        ntk_vector_product(lambda scale, x: scale * x, jnp.ones(()), jnp.ones(12), X_S, X_S[:, :2])


@pytest.mark.parametrize(
    ("x2", "error", "message"),
    [
        (X_S[:0], ValueError, "x2 holds zero examples"),
        (X_S.astype(np.float32), TypeError, r"x2 has dtype float32 and params float64.*x2\.astype\(jnp\.float64\)"),
        (2.0, ValueError, r"x2=2\.0 is a scalar"),
    ],
)
def test_bad_x2(x2, error, message):
    with pytest.raises(error, match=message):
        ntk_vector_product(apply_fn, PARAMS, jnp.ones(12), X_Q, x2)


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (np.ones(11), ValueError, r"vector has shape \(11,\), but must be \(12,\) or \(12, r\): one row a column of K"),
        (np.ones(8), ValueError, r"vector has shape \(8,\), but must be \(12,\)"),  # the rows of K_QS, not its columns
        (np.ones((3, 12)), ValueError, r"vector has shape \(3, 12\), but must be \(12,\) or \(12, r\)"),
        (np.ones((6, 2)), ValueError, r"vector has shape \(6, 2\), but must be \(12,\) or \(12, r\)"),
        (np.ones((12, 2, 1)), ValueError, r"vector has shape \(12, 2, 1\), but must be \(12,\) or \(12, r\)"),
        (np.ones(()), ValueError, r"vector has shape \(\), but must be \(12,\) or \(12, r\)"),
        (np.ones(12, int), TypeError, r"vector has dtype int64 and the outputs float64; cast the vector"),
        (np.ones(12, np.float32), TypeError, r"vector has dtype float32 and the outputs float64; cast the vector"),
        (1j * np.ones(12), TypeError, r"vector has dtype complex128 and the outputs float64; cast the vector"),
    ],
)
def test_bad_vectors(vector, error, message):
    with pytest.raises(error, match=message):
        ntk_vector_product(apply_fn, PARAMS, vector, X_Q, X_S)
