"""Products with the empirical NTK against NumPy's J M Jᵀ, with J derived by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import entk._checks.memory
import entk._kernels.operator
from entk import NtkOperator, ntk_vector_product
from tests.entk.mlp_oracle import assert_close, batch, init
from tests.entk.mlp_oracle import wavy_fn as apply_fn
from tests.entk.mlp_oracle import wavy_jacobian_by_hand as jacobian_by_hand
from tests.entk.mlp_oracle import wavy_kernel_by_hand as kernel_by_hand

PARAMS, X_S, X_Q = init(0), batch(0, 6), batch(1, 4)
K_SS, K_QS = kernel_by_hand(PARAMS, X_S, X_S), kernel_by_hand(PARAMS, X_Q, X_S)
SIZES = [1, 4, 1000]  # for n = 6 and m = 4: single ones, a remainder, more than there are


def diagonal(seed, params=PARAMS):
    """A preconditioner with zeros among its entries, and the same as one vector in the order of the Jacobian's."""
    rng = np.random.default_rng(seed)
    tree = {name: rng.exponential(size=leaf.shape) * (rng.random(leaf.shape) < 0.8) for name, leaf in params.items()}
    return tree, np.concatenate([tree[name].ravel() for name in sorted(tree)])


def preconditioned_by_hand(params, m, x1, x2):
    rows, columns = jacobian_by_hand(params, x1), jacobian_by_hand(params, x2)
    return np.einsum("iap,p,jbp->iajb", rows, m, columns).reshape(rows.shape[0] * rows.shape[1], -1)


M, M_FLAT = diagonal(0)
KM_SS, KM_QS = preconditioned_by_hand(PARAMS, M_FLAT, X_S, X_S), preconditioned_by_hand(PARAMS, M_FLAT, X_Q, X_S)


def operator(x1=X_Q, x2=X_S, **kwargs):
    return NtkOperator(apply_fn, PARAMS, x1, x2, **kwargs)


def normal(*shape, seed=5):
    return np.random.default_rng(seed).normal(size=shape)


# ------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize(
    ("x1", "x2", "preconditioner", "kernel", "columns"),
    [(X_S, None, None, K_SS, ()), (X_Q, X_S, None, K_QS, (3,)), (X_S, None, M, KM_SS, (3,)), (X_Q, X_S, M, KM_QS, ())],
    ids=["K_SS", "K_QS", "KM_SS", "KM_QS"],
)
def test_products_with_the_operator_are_those_of_the_matrix(x1, x2, preconditioner, kernel, columns):
    k = operator(x1, x2, preconditioner=preconditioner)
    assert (k.shape, k.dtype, k.T.shape) == (kernel.shape, np.float64, kernel.T.shape)
    v, u = normal(k.shape[1], *columns), normal(k.shape[0], *columns)
    assert_close(k.mv(v), kernel @ v)
    assert_close(k.transpose_mv(u), kernel.T @ u)
    assert_close(k.T.mv(u), kernel.T @ u)
    assert_close(k.T.transpose_mv(v), kernel @ v)
    assert_close(k.as_matrix(), kernel)
    assert_close(k.T.as_matrix(), kernel.T)


def test_the_transpose_is_the_adjoint():
    """⟨K x, y⟩ = ⟨x, Kᵀ y⟩, without the matrix."""
    k = operator(preconditioner=M)
    x, y = normal(12), normal(8, seed=6)
    left, right = np.vdot(k.mv(x), y), np.vdot(x, k.transpose_mv(y))
    assert abs(left - right) <= 1e-12 * abs(left)


def test_the_preconditioner_changes_the_operator():
    """Negative control: J M Jᵀ is neither J Jᵀ nor a multiple of it, and M = 1 is J Jᵀ."""
    v = normal(12)
    plain, other = operator(X_S, None).mv(v), operator(X_S, None, preconditioner=M).mv(v)
    cosine = np.vdot(plain, other) / np.linalg.norm(plain) / np.linalg.norm(other)
    assert abs(cosine) < 0.999
    ones = jax.tree.map(np.ones_like, PARAMS)
    assert_close(operator(X_S, None, preconditioner=ones).mv(v), plain)
    assert_close(operator(X_S, None, preconditioner=ones).as_matrix(), K_SS)


def test_the_symmetric_operator_is_its_own_transpose():
    k = operator(X_S, None, preconditioner=M)
    assert k.T is k
    assert_close(k.as_matrix(), k.as_matrix().T, 1e-14)


@pytest.mark.parametrize(("microbatch_size", "probe_batch_size"), [(None, 2), (4, 3)])  # r = 5
def test_probes_and_examples_in_blocks_with_remainders(microbatch_size, probe_batch_size):
    k = operator(preconditioner=M, microbatch_size=microbatch_size, probe_batch_size=probe_batch_size)
    assert_close(k.mv(normal(12, 5)), KM_QS @ normal(12, 5))
    assert_close(k.transpose_mv(normal(8, 5)), KM_QS.T @ normal(8, 5))


def test_probes_in_blocks_hold_less():
    params, v = init(0, width=256), np.ones((12, 64))
    held = [
        entk._kernels.operator._product.lower(NtkOperator(apply_fn, params, X_S, probe_batch_size=size), v)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for size in (None, 4)
    ]
    assert held[1] < held[0] / 4


@pytest.mark.parametrize(("microbatch_size", "probe_batch_size", "preconditioned"), [(None, None, True), (2, 8, False)])
def test_the_memory_foreseen_is_the_memory_the_program_takes(
    monkeypatch, microbatch_size, probe_batch_size, preconditioned
):
    params, x, v = init(0, inputs=64, width=200, outputs=64), batch(0, 4, inputs=64), np.ones((256, 16))
    foreseen = []
    monkeypatch.setattr(entk._kernels.operator, "check_fits", lambda num_bytes, *_, **__: foreseen.append(num_bytes))
    k = NtkOperator(
        apply_fn,
        params,
        x,
        preconditioner=jax.tree.map(np.abs, params) if preconditioned else None,
        microbatch_size=microbatch_size,
        probe_batch_size=probe_batch_size,
    )
    k.mv(v)
    account = entk._kernels.operator._product.lower(k, v).compile().memory_analysis()
    if account is None:
        pytest.skip("this backend keeps no account of memory")
    assert account.temp_size_in_bytes / 1.5 < foreseen[0] < 1.5 * account.temp_size_in_bytes


@pytest.mark.parametrize(
    ("x1", "x2", "columns", "kernel"), [(X_S, None, (), K_SS), (X_Q, X_S, (3,), K_QS), (X_Q, X_S, (0,), K_QS)]
)
def test_the_product_is_that_of_the_matrix(x1, x2, columns, kernel):
    assert_close(ntk_vector_product(apply_fn, PARAMS, normal(12, *columns), x1, x2), kernel @ normal(12, *columns))


@pytest.mark.parametrize("microbatch_size", SIZES)
def test_the_product_in_blocks_is_the_product(microbatch_size):
    product = ntk_vector_product(apply_fn, PARAMS, normal(12), X_Q, X_S, microbatch_size=microbatch_size)
    assert_close(product, K_QS @ normal(12))


def test_the_product_in_blocks_holds_less():
    x, params = batch(0, 512), PARAMS
    held = [
        entk._kernels.operator._product.lower(NtkOperator(apply_fn, params, x, microbatch_size=size), jnp.ones(1024))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for size in (None, 8)
    ]
    assert held[1] < held[0] / 2


def test_the_product_of_more_examples_than_a_matrix_would_hold():
    """N = 400,000: K would take 1.2 TiB."""
    x = normal(400_000, 3)
    k = NtkOperator(lambda w, x: x @ w, jnp.ones(3), x, microbatch_size=65_536, probe_batch_size=1)
    assert k.shape == (400_000, 400_000)
    assert_close(k.mv(x[:, :2]), x @ (x.T @ x[:, :2]))
    with pytest.raises(MemoryError, match=r"400000 x 400000 kernel"):
        k.as_matrix()


@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    c=st.integers(1, 3),
    microbatch_size=st.none() | st.integers(1, 8),
    probe_batch_size=st.none() | st.integers(1, 4),
    r=st.none() | st.integers(1, 3),
    preconditioned=st.booleans(),
)
def test_any_shape(seed, n, m, c, microbatch_size, probe_batch_size, r, preconditioned):
    params, x_s, x_q = init(seed, 2, 3, c), batch(seed, n, 2), batch(seed + 1, m, 2)
    preconditioner, flat = diagonal(seed, params)
    expected = preconditioned_by_hand(params, flat if preconditioned else np.ones_like(flat), x_q, x_s)
    k = NtkOperator(
        apply_fn,
        params,
        x_q,
        x_s,
        preconditioner=preconditioner if preconditioned else None,
        microbatch_size=microbatch_size,
        probe_batch_size=probe_batch_size,
    )
    vector = normal(*((n * c,) if r is None else (n * c, r)))
    product = k.mv(vector)
    assert product.shape == (m * c, *vector.shape[1:])
    # Entries may cancel: the bound is that of the sum, |J||M||Jᵀ|.
    scale = np.linalg.norm(jacobian_by_hand(params, x_q)) * np.linalg.norm(jacobian_by_hand(params, x_s))
    assert np.abs(product - expected @ vector).max() <= 1e-12 * scale * (1 + flat.max()) * np.linalg.norm(vector)


def test_outputs_of_two_axes_are_flattened_by_rows():
    def model(params, x):
        return apply_fn(params, x).reshape(-1, 2, 3)

    params = init(3, outputs=6)
    preconditioner, flat = diagonal(3, params)
    k = NtkOperator(model, params, X_Q, X_S, preconditioner=preconditioner, microbatch_size=4)
    expected = preconditioned_by_hand(params, flat, X_Q, X_S)
    assert k.shape == (24, 36)
    assert_close(k.mv(normal(36)), expected @ normal(36))
    assert_close(k.transpose_mv(normal(24, 2)), expected.T @ normal(24, 2))
    assert_close(k.as_matrix(), expected)


def test_constants_among_the_parameters_stay():
    """Integers, booleans and keys have no columns in J; what M holds for them is not used, not even checked."""

    def model(params, x):
        scaled = jnp.where(params["flip"], -1, 1) * apply_fn(params["net"], x[:, params["order"]])
        return scaled + 0 * jax.random.normal(params["rng"], ())

    params = {"net": PARAMS, "order": np.arange(3), "flip": np.array(True), "rng": jax.random.key(0)}
    preconditioner = params | {"net": M, "order": np.full(7, -1.0)}
    k = NtkOperator(model, params, X_Q, X_S, preconditioner=preconditioner)
    assert_close(k.mv(normal(12)), KM_QS @ normal(12))
    assert_close(k.transpose_mv(normal(8, 2)), KM_QS.T @ normal(8, 2))
    assert_close(k.as_matrix(), KM_QS)


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


def test_under_vmap_and_grad():
    vector = normal(12)

    def compute(params, m, vector):
        return NtkOperator(apply_fn, params, X_Q, X_S, preconditioner=m).mv(vector)

    networks, diagonals = [init(seed) for seed in range(2)], [diagonal(seed) for seed in range(2)]
    expected = np.stack(
        [preconditioned_by_hand(w, m, X_Q, X_S) @ vector for w, (_, m) in zip(networks, diagonals, strict=True)]
    )
    ensemble, diagonals = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (networks, [m for m, _ in diagonals])
    )
    assert_close(jax.vmap(compute, in_axes=(0, 0, None))(ensemble, diagonals, vector), expected)
    assert_close(jax.grad(lambda v: compute(PARAMS, M, v).sum())(vector), KM_QS.sum(0))
    slope = jax.grad(lambda m: compute(PARAMS, m, vector).sum())(M)["b_in"]
    rows, columns = (
        jacobian_by_hand(PARAMS, X_Q).sum((0, 1)),
        np.tensordot(vector.reshape(6, 2), jacobian_by_hand(PARAMS, X_S)),
    )
    assert_close(slope, (rows * columns)[:4])  # b_in comes first


def test_the_preconditioned_matrix_is_differentiated_in_the_parameters():
    weights = normal(8, 12)

    def weighted(params):
        return (weights * NtkOperator(apply_fn, params, X_Q, X_S, preconditioner=M).as_matrix()).sum()

    slope = []
    for unit in np.eye(4):
        ahead, behind = ({**PARAMS, "b_in": PARAMS["b_in"] + sign * 1e-6 * unit} for sign in (1, -1))
        kernels = [preconditioned_by_hand(params, M_FLAT, X_Q, X_S) for params in (ahead, behind)]
        slope.append((weights * (kernels[0] - kernels[1])).sum() / 2e-6)
    assert_close(jax.grad(weighted)(PARAMS)["b_in"], slope, 1e-7)


# ------------------------------------------------------------------------------------------------- a pytree of arrays


def test_other_arrays_of_the_same_shapes_compile_nothing(caplog):
    """One trace, of one example, says whether the function is what it was."""
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return apply_fn(params, x)

    @jax.jit
    def quadratic(k, v):
        return v @ k.mv(v)

    def use(seed):
        k = NtkOperator(counted, init(seed), batch(seed, 6), preconditioner=diagonal(seed)[0], microbatch_size=4)
        return k.mv(normal(12)), k.transpose_mv(normal(12, 3)), k.as_matrix(), quadratic(k, normal(12))

    use(0)
    del traces[:]
    with jax.log_compiles():
        mv, transposed, matrix, quadratic_form = use(1)
    expected = preconditioned_by_hand(init(1), diagonal(1)[1], batch(1, 6), batch(1, 6))
    assert_close(mv, expected @ normal(12))
    assert_close(transposed, expected.T @ normal(12, 3))
    assert_close(matrix, expected)
    assert_close(quadratic_form, normal(12) @ expected @ normal(12))
    assert traces == [(1, 3)]
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_through_a_pytree_and_back():
    k = operator(preconditioner=M, microbatch_size=4, probe_batch_size=2)
    leaves, treedef = jax.tree.flatten(k)
    assert len(leaves) == 4 + 2 + 4
    assert len(jax.tree.leaves(operator(X_S, None))) == 4 + 1
    again = jax.tree.unflatten(treedef, leaves)
    assert again.shape == k.shape
    assert (again.microbatch_size, again.probe_batch_size) == (4, 2)
    np.testing.assert_array_equal(again.mv(normal(12, 3)), k.mv(normal(12, 3)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(k)]
    assert paths[:6] == [*(f".params['{name}']" for name in sorted(PARAMS)), ".x1", ".x2"]
    assert jax.tree.structure(k) != jax.tree.structure(operator(preconditioner=M))


def test_it_says_what_it_is():
    assert repr(operator()) == "NtkOperator(shape=(8, 12), dtype=float64)"


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


def test_bad_vectors_of_the_transpose():
    with pytest.raises(
        ValueError, match=r"vector has shape \(12,\), but must be \(8,\) or \(8, r\): one row a row of K"
    ):
        operator().transpose_mv(np.ones(12))
    with pytest.raises(TypeError, match="vector has dtype float32 and the outputs float64; cast the vector"):
        operator().transpose_mv(np.ones(8, np.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m["b_in"],
            ValueError,
            r"structure .*\*.* and params .*'b_in'.*: pass one number for every parameter",
        ),
        (
            lambda m: {**m, "extra": m["b_in"]},
            ValueError,
            r"'extra'.* and params .*e\.g\. jax\.tree\.map\(lambda v: 1 / ",
        ),
        (
            lambda m: {**m, "b_in": m["b_in"][:3]},
            ValueError,
            r"preconditioner\['b_in'\] has shape \(3,\) .* \(4,\): pass",
        ),
        (
            lambda m: {**m, "b_in": 1.0},
            ValueError,
            r"preconditioner\['b_in'\] has shape \(\) and the parameters \(4,\)",
        ),
        (
            lambda m: {**m, "w_in": m["w_in"].astype(np.float32)},
            TypeError,
            r"\['w_in'\] has dtype float32 and the parameters float64: cast it, e\.g\. jax\.tree\.map\(jnp\.float64",
        ),
        (
            lambda m: {**m, "b_in": np.array([1.0, 2.0, -0.5, 0.0])},
            ValueError,
            r"\['b_in'\] has entries in \[-0\.5, 2\.0\], but M must be positive semi-definite: every entry finite",
        ),
        (lambda m: {**m, "b_in": np.array([1.0, np.inf, 1.0, 1.0])}, ValueError, r"entries in \[1\.0, inf\]"),
        (lambda m: {**m, "b_in": np.array([1.0, np.nan, 1.0, 1.0])}, ValueError, r"entries in \[nan, nan\]"),
    ],
)
def test_bad_preconditioners(change, error, message):
    with pytest.raises(error, match=message):
        operator(preconditioner=change(M))
    with pytest.raises(error, match=message):
        ntk_vector_product(apply_fn, PARAMS, np.ones(12), X_Q, X_S, preconditioner=change(M))


def test_a_traced_preconditioner_is_not_asked_for_its_sign():
    negative = jax.tree.map(np.negative, M)
    product = jax.jit(lambda m: operator(preconditioner=m).mv(normal(12)))(negative)
    assert_close(product, -KM_QS @ normal(12))
    with pytest.raises(ValueError, match=r"has shape \(3,\)"):
        jax.jit(lambda m: operator(preconditioner={**m, "b_in": m["b_in"][:3]}).mv(normal(12)))(M)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "all"])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match=f"probe_batch_size={size!r} must be an integer of at least 1"):
        operator(probe_batch_size=size)
    with pytest.raises(ValueError, match=f"microbatch_size={size!r} must be a positive integer"):
        operator(microbatch_size=size)
    for name in ("probe_batch_size", "microbatch_size"):
        with pytest.raises(ValueError, match=f"{name}={size!r} must be"):
            ntk_vector_product(apply_fn, PARAMS, np.ones(12), X_Q, X_S, **{name: size})


@pytest.mark.parametrize(("probe_batch_size", "microbatch_size", "copies"), [(None, None, 5), (2, None, 2), (2, 4, 4)])
def test_memory_foreseen(monkeypatch, probe_batch_size, microbatch_size, copies):
    """One byte less than the copies of the 26 parameters take is refused, and as much is not."""
    k = operator(probe_batch_size=probe_batch_size, microbatch_size=microbatch_size)
    monkeypatch.setattr(entk._kernels.operator, "_product", lambda k, vector: vector)
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 8 * 26 * copies - 1)
    with pytest.raises(
        MemoryError, match=r"pushing \d probes at once through 26 float64 .*Pass a smaller probe_batch_size"
    ):
        k.mv(np.ones((12, 5)))
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 8 * 26 * copies)
    k.mv(np.ones((12, 5)))


@pytest.mark.parametrize("preconditioner", [None, M])
def test_a_matrix_that_does_not_fit_is_refused_at_every_call(monkeypatch, preconditioner):
    k = operator(preconditioner=preconditioner)
    k.as_matrix()
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 100)
    with pytest.raises(MemoryError, match="8 x 12 kernel"):
        k.as_matrix()
