"""The empirical NTK against NumPy's J Jᵀ, with J derived by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import entk._checks.memory
import entk._kernels.full_jacobian
from entk import FullJacobian, Structured, empirical_ntk
from tests.entk.mlp_oracle import assert_close, batch, init
from tests.entk.mlp_oracle import wavy_fn as apply_fn
from tests.entk.mlp_oracle import wavy_jacobian_by_hand as jacobian_by_hand
from tests.entk.mlp_oracle import wavy_kernel_by_hand as kernel_by_hand

PARAMS, X_S, X_Q = init(0), batch(0, 6), batch(1, 4)
K_SS, K_QS = kernel_by_hand(PARAMS, X_S, X_S), kernel_by_hand(PARAMS, X_Q, X_S)
TIGHT = Structured(workspace_bytes=5_000)  # for two or three of the examples at once
STRATEGIES = [Structured(), TIGHT, FullJacobian(), *map(FullJacobian, (1, 2, 4, 6, 1000))]

# ---------------------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_k_ss_is_j_times_its_transpose(strategy):
    assert_close(empirical_ntk(apply_fn, PARAMS, X_S, strategy=strategy), K_SS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_k_qs_has_test_rows_and_training_columns(strategy):
    k_qs = empirical_ntk(apply_fn, PARAMS, X_Q, X_S, strategy=strategy)
    assert k_qs.shape == (8, 12)
    assert_close(k_qs, K_QS)


@pytest.mark.parametrize("strategy", [Structured(), TIGHT])
def test_q_equal_to_s_gives_k_ss(strategy):
    k_ss = empirical_ntk(apply_fn, PARAMS, X_S, strategy=strategy)
    assert_close(empirical_ntk(apply_fn, PARAMS, X_S, X_S, strategy=strategy), k_ss)


def test_k_sq_is_the_transpose_of_k_qs():
    assert_close(empirical_ntk(apply_fn, PARAMS, X_S, X_Q), K_QS.T)


@pytest.mark.parametrize("strategy", [Structured(), TIGHT])
def test_rows_and_columns_are_example_major(strategy):
    """Row i·c + a belongs to output a of example i; written out entry by entry, for unequal n and m."""
    assert K_QS[0, 1] != pytest.approx(K_QS[1, 0], rel=0.1)  # else exchanged outputs would pass unseen
    jac_q, jac_s = jacobian_by_hand(PARAMS, X_Q), jacobian_by_hand(PARAMS, X_S)
    kernel = empirical_ntk(apply_fn, PARAMS, X_Q, X_S, strategy=strategy)
    for i in range(4):
        for j in range(6):
            for a in range(2):
                for b in range(2):
                    assert kernel[2 * i + a, 2 * j + b] == pytest.approx(
                        jac_q[i, a] @ jac_s[j, b], rel=1e-11, abs=1e-11
                    )


@pytest.mark.parametrize("strategy", [Structured(), TIGHT])
def test_symmetric_and_positive_semi_definite_to_rounding(strategy):
    """30 outputs and 21 parameters: nine eigenvalues are zero and may not turn out negative beyond rounding."""
    params = init(2, outputs=1)
    kernel = np.asarray(empirical_ntk(apply_fn, params, batch(2, 30), strategy=strategy))
    eigenvalues = np.linalg.eigvalsh(kernel)
    assert np.abs(kernel - kernel.T).max() <= 1e-14 * eigenvalues[-1]
    assert np.abs(eigenvalues[:9]).max() <= 1e-14 * eigenvalues[-1]
    assert eigenvalues[9] > 1e-12 * eigenvalues[-1]


def test_a_linear_model_gives_the_gram_matrix_of_its_features():
    features = np.random.default_rng(3).integers(-4, 5, (5, 7)).astype(float)  # small integers: exact
    np.testing.assert_array_equal(empirical_ntk(lambda w, x: x @ w, jnp.ones(7), features), features @ features.T)
    two = empirical_ntk(lambda w, x: x @ w, jnp.ones((7, 2)), features)
    np.testing.assert_array_equal(two, np.kron(features @ features.T, np.eye(2)))


@pytest.mark.parametrize("strategy", [Structured(), TIGHT])
def test_no_normalisation_is_hidden(strategy):
    """Scaling the outputs by s scales K by s², and twice the examples leave the old entries alone."""
    kernel = empirical_ntk(lambda p, x: 3 * apply_fn(p, x), PARAMS, X_S, strategy=strategy)
    assert_close(kernel, 9 * K_SS)
    twice = empirical_ntk(apply_fn, PARAMS, np.concatenate([X_S, X_Q]), strategy=strategy)
    assert_close(twice[:12, :12], K_SS)


@pytest.mark.parametrize("strategy", [Structured(), TIGHT])
def test_one_output_as_a_vector_or_as_a_column(strategy):
    params = init(4, outputs=1)
    kernel = empirical_ntk(lambda p, x: apply_fn(p, x)[:, 0], params, X_Q, X_S, strategy=strategy)
    assert kernel.shape == (4, 6)
    assert_close(kernel, kernel_by_hand(params, X_Q, X_S))
    assert_close(empirical_ntk(apply_fn, params, X_Q, X_S, strategy=strategy), kernel)


def test_an_empty_parameter_array_adds_nothing():
    params = {**PARAMS, "unused": np.zeros((0, 3))}
    for strategy in (Structured(), TIGHT):
        assert_close(empirical_ntk(apply_fn, params, X_S, strategy=strategy), K_SS)


def test_inputs_may_be_a_pytree():
    def model(params, x):
        return apply_fn(params, jnp.stack([x["a"], *x["b"]], axis=1))

    x_q, x_s = ({"a": x[:, 0], "b": (x[:, 1], x[:, 2])} for x in (X_Q, X_S))
    for strategy in (Structured(), TIGHT):
        assert_close(empirical_ntk(model, PARAMS, x_q, x_s, strategy=strategy), K_QS)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    c=st.integers(1, 3),
    width=st.integers(1, 5),
    strategy=st.sampled_from([Structured(), Structured(workspace_bytes=20_000), FullJacobian(3)]),
)
def test_any_shape(seed, n, m, c, width, strategy):
    params, x_s, x_q = init(seed, 2, width, c), batch(seed, n, 2), batch(seed + 1, m, 2)
    expected = kernel_by_hand(params, x_q, x_s)
    assert_close(empirical_ntk(apply_fn, params, x_q, x_s, strategy=strategy), expected)


# --------------------------------------------------------------------------------------------- dtypes, transformations


def test_float32_stays_float32():
    params, x = jax.tree.map(np.float32, PARAMS), X_S.astype(np.float32)
    exact = kernel_by_hand(jax.tree.map(np.float64, params), x.astype(float), x.astype(float))

    def check():
        for strategy in (Structured(), TIGHT):
            kernel = empirical_ntk(apply_fn, params, x, strategy=strategy)
            assert kernel.dtype == jnp.float32
            assert_close(kernel, exact, 3e-6)

    check()
    with jax.enable_x64(False):
        check()


def test_bfloat16_works_to_its_digits():
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS), jnp.asarray(X_S, jnp.bfloat16)
    params64, x64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
    kernel = empirical_ntk(apply_fn, params, x, strategy=TIGHT)
    assert kernel.dtype == jnp.float32  # a kernel of eight bits would be worth little
    assert_close(kernel, kernel_by_hand(params64, x64, x64), 0.03)


@pytest.mark.parametrize("strategy", [Structured(), TIGHT])
def test_under_jit_vmap_and_grad(strategy):
    ensemble = [init(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ensemble)
    expected = np.stack([kernel_by_hand(params, X_Q, X_S) for params in ensemble])

    def compute(params):
        return empirical_ntk(apply_fn, params, X_Q, X_S, strategy=strategy)

    assert_close(jax.jit(compute)(ensemble[1]), expected[1])
    assert_close(jax.vmap(compute)(stacked), expected)
    weights = np.random.default_rng(7).normal(size=(8, 12))
    gradient = jax.grad(lambda params: (weights * compute(params)).sum())(PARAMS)["b_in"]
    slope = []
    for unit in np.eye(4):
        ahead, behind = ({**PARAMS, "b_in": PARAMS["b_in"] + sign * 1e-6 * unit} for sign in (1, -1))
        slope.append((weights * (kernel_by_hand(ahead, X_Q, X_S) - kernel_by_hand(behind, X_Q, X_S))).sum() / 2e-6)
    assert_close(gradient, slope, 1e-7)


# ---------------------------------------------------------------------------------------------------------- bad input
# What every entry point refuses (outputs, params, inputs, dtypes) is in test_jacobian.py.


def test_x1_and_x2_with_different_numbers_of_outputs():
    def model(scale, x):
        return scale * x

    message = "x1 has 3 outputs an example and x2 2, but one kernel needs the same number: pass inputs of one kind"
    with pytest.raises(ValueError, match=message):
        empirical_ntk(model, jnp.ones(()), X_S, X_S[:, :2])


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
        empirical_ntk(apply_fn, PARAMS, X_Q, x2)


@pytest.mark.parametrize(
    ("x2", "microbatch_size", "numbers"),
    [
        (None, None, 6 * 2 * 26 + 2 * 144),  # one Jacobian
        (X_S, None, 12 * 2 * 26 + 2 * 144),  # two
        (None, 2, 4 * 2 * 26 + 2 * 144),  # a block of rows and a block of columns
        (X_Q, 5, 9 * 2 * 26 + 2 * 96),
    ],
)
def test_memory_foreseen(monkeypatch, x2, microbatch_size, numbers):
    """One byte less than Jacobian rows and twice the kernel take is refused, and as much is not."""
    assert sum(leaf.size for leaf in PARAMS.values()) == 26
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 8 * numbers - 1)
    with pytest.raises(
        MemoryError,
        match=r"GiB are available\. .*\d of the 6 examples.* would fit\. Pass a smaller microbatch_size, or use",
    ):
        empirical_ntk(apply_fn, PARAMS, X_S, x2, strategy=FullJacobian(microbatch_size))
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 8 * numbers)
    assert empirical_ntk(apply_fn, PARAMS, X_S, x2, strategy=FullJacobian(microbatch_size)).size > 0


@pytest.mark.parametrize("microbatch_size", [None, 7, 8])
def test_the_memory_foreseen_is_the_memory_the_program_takes(monkeypatch, microbatch_size):
    params, x = init(9, inputs=64, width=64, outputs=3), batch(9, 64, inputs=64)
    foreseen = []
    monkeypatch.setattr(
        entk._kernels.full_jacobian, "check_fits", lambda num_bytes, *_, **__: foreseen.append(num_bytes)
    )
    empirical_ntk(apply_fn, params, x, x, strategy=FullJacobian(microbatch_size))
    account = (
        entk._kernels.full_jacobian._kernel.lower(apply_fn, params, x, x, microbatch_size).compile().memory_analysis()
    )
    if account is None:
        pytest.skip("this backend keeps no account of memory")
    taken = account.temp_size_in_bytes + account.output_size_in_bytes
    assert taken / 2 < foreseen[0] < 2 * taken


@pytest.mark.parametrize("strategy", [Structured(), FullJacobian(1)])
def test_a_kernel_that_does_not_fit_is_refused_before_anything_is_computed(strategy):
    """N = 3,000,000: K alone takes 65 TiB, whatever the strategy; the inputs are shapes only."""
    x = jax.ShapeDtypeStruct((3_000_000, 3), jnp.float64)
    with pytest.raises(MemoryError, match=r"3000000 x 3000000 kernel in float64 takes .* GiB are available"):
        jax.eval_shape(lambda x: empirical_ntk(lambda w, x: x @ w, jnp.ones(3), x, strategy=strategy), x)
