"""Top eigenpairs, spectral densities and traces against NumPy's eigenvalues of matrices made for the purpose.

Every other size, rank or number of probes compiles anew, so tests share them.
"""

import types
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import entk
import entk._checks.memory
import entk._spectra.spectrum
from entk import Hutchinson, NtkOperator, XTrace, spectral_density, top_eigenpairs, trace
from entk._spectra.spectrum import SpectralDensity, nodes_and_weights
from tests.entk.mlp_oracle import assert_close, batch, init
from tests.entk.mlp_oracle import wavy_fn as apply_fn
from tests.entk.mlp_oracle import wavy_jacobian_by_hand as jacobian_by_hand

KEY, SIZE = jax.random.key(0), 60


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """A matrix as an operator that is a pytree: what is compiled for one serves all of its size."""

    matrix: jax.Array

    @property
    def shape(self):
        return self.matrix.shape

    @property
    def dtype(self):
        return self.matrix.dtype

    def mv(self, vector):
        return jnp.matmul(self.matrix, vector, precision="highest")


def padded(eigenvalues):
    return np.pad(np.asarray(eigenvalues, float), (0, SIZE - len(eigenvalues)))


def dense(eigenvalues, dtype=np.float64, seed=0, rotated=True):
    """An operator with these eigenvalues and zeros, in a random basis or as a diagonal matrix."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))[0]
    matrix = basis * padded(eigenvalues) @ basis.T if rotated else np.diag(padded(eigenvalues))
    return Dense(jnp.asarray((matrix + matrix.T) / 2, dtype))


HARMONIC = 1 / np.arange(1, SIZE + 1)
TRIPLES = [*np.repeat(1 / np.arange(1, 6) ** 2, 3), *np.linspace(0.001, 0.03, 45)]
SPECTRA = {
    "low rank": [3, 2, 1],
    "repeated": [3] * 5 + [1] * 5,
    "identity": [1] * SIZE,
    "zero": [],
    "triples": TRIPLES,
    "one outlier": [1e6, *np.linspace(1, 2, 30)],
}

# ---------------------------------------------------------------------------------------------------------- eigenpairs


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_neither_ghosts_nor_gaps_nor_nan(spectrum, rotated):
    """As many copies as there are, orthonormal vectors, whether the Krylov space is exhausted or not."""
    k = dense(SPECTRA[spectrum], rotated=rotated)
    exact = np.sort(padded(SPECTRA[spectrum]))[::-1][:8]
    scale = max(exact[0], 1e-300)
    pairs = top_eigenpairs(k, 8, key=KEY, num_steps=6)
    assert np.abs(pairs.values - exact).max() <= 1e-9 * scale
    assert np.abs(pairs.vectors.T @ pairs.vectors - np.eye(8)).max() <= 1e-12
    assert pairs.residuals.max() <= 1e-5 * scale


@pytest.mark.parametrize(("spectrum", "found"), [("low rank", 8), ("repeated", 3), ("identity", 8), ("zero", 8)])
def test_one_vector_restarts_where_the_krylov_space_is_exhausted(spectrum, found):
    """Every restart finds one more copy of 3, of 1 and of 0 where they repeat; twelve steps hold three restarts."""
    pairs = top_eigenpairs(dense(SPECTRA[spectrum], rotated=False), 8, key=KEY, block_size=1, num_steps=12)
    assert np.abs(pairs.values - padded(SPECTRA[spectrum])[:8])[:found].max() <= 1e-12
    assert pairs.residuals[:found].max() <= 1e-9
    assert np.abs(pairs.vectors.T @ pairs.vectors - np.eye(8)).max() <= 1e-12


def test_a_block_sees_the_copies_that_one_vector_misses():
    """Negative control, and why there are blocks: what one vector finds is right, and two copies of 1 are missing."""
    k = dense(TRIPLES)
    one = top_eigenpairs(k, 3, key=KEY, block_size=1, num_steps=8)
    assert one.residuals[0] < 1e-3
    assert_close(one.values, [1, 1 / 4, 1 / 9], 1e-2)
    assert_close(top_eigenpairs(k, 8, key=KEY, num_steps=6).values, np.repeat([1, 1 / 4, 1 / 9], 3)[:8], 1e-8)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), decay=st.floats(0, 4), sizes=st.sampled_from([(8, 8, 6), (3, 1, 8), (8, 1, 12)]))
def test_residuals_bound_the_errors_converged_or_not(seed, decay, sizes):
    rank, block_size, num_steps = sizes
    k = dense(np.arange(1, SIZE + 1) ** -decay, seed=seed)
    exact = np.linalg.eigvalsh(k.matrix)
    values, vectors, residuals = top_eigenpairs(
        k, rank, key=jax.random.key(seed), block_size=block_size, num_steps=num_steps
    )
    assert np.all(np.diff(values) <= 1e-14)
    assert np.all(np.abs(values[:, None] - exact).min(1) <= residuals + 1e-13)
    assert_close(np.linalg.norm(k.matrix @ vectors - vectors * values, axis=0) + 1, residuals + 1)
    assert np.abs(vectors.T @ vectors - np.eye(rank)).max() <= 1e-12


def test_more_steps_converge():
    k = dense(HARMONIC)
    few, more = (top_eigenpairs(k, n, key=KEY, block_size=1, num_steps=m).residuals[0] for n, m in ((3, 8), (8, 12)))
    assert few > 1e-6
    assert more < few / 20


@pytest.mark.parametrize(("rank", "sizes"), [(5, {"num_steps": 60, "block_size": 1}), (SIZE, {})])
def test_where_the_subspace_fills_the_space_the_matrix_is_formed(rank, sizes):
    pairs = top_eigenpairs(dense(HARMONIC), rank, key=KEY, **sizes)
    assert_close(pairs.values, HARMONIC[:rank], 1e-13)
    assert pairs.residuals.max() <= 1e-14


def test_float32_stays_float32():
    for spectrum in ("repeated", "zero"):
        k = dense(SPECTRA[spectrum], np.float32)
        pairs = top_eigenpairs(k, 8, key=KEY, num_steps=6)
        assert {leaf.dtype for leaf in pairs} == {np.dtype(np.float32)}
        assert np.abs(pairs.values - padded(SPECTRA[spectrum])[:8]).max() <= 1e-5
        density = spectral_density(k, key=KEY, num_steps=20, num_probes=4)
        assert density.nodes.dtype == np.float32
        assert np.all(np.isfinite(density.nodes))
        assert {leaf.dtype for leaf in trace(k, XTrace(8), key=KEY)} == {np.dtype(np.float32)}


def test_the_key_decides_and_nothing_else():
    k = dense(HARMONIC)
    first, again, other = (top_eigenpairs(k, 3, key=jax.random.key(i), block_size=1, num_steps=8) for i in (0, 0, 1))
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert np.abs(first.values - other.values).max() > 1e-9


# ------------------------------------------------------------------------------------------------- the whole spectrum


@pytest.fixture(scope="module")
def harmonic():
    """Probes enough for statistics, of an operator whose Krylov spaces are far from exhausted."""
    return spectral_density(dense(HARMONIC), key=KEY, num_steps=10, num_probes=4096, probe_batch_size=512)


def groups_of(density, probes):
    """The same probes as estimates of their own."""
    starts = range(0, len(density.nodes), probes)
    return [SpectralDensity(density.nodes[i : i + probes], density.weights[i : i + probes], SIZE) for i in starts]


def test_gauss_rules_are_exact_to_their_degree():
    """For a diagonal matrix and signs zᵀ f(K) z = tr f(K): what is left is the quadrature's error."""
    eigenvalues = np.linspace(-1, 1, SIZE)
    density = spectral_density(dense(eigenvalues, rotated=False), key=KEY, num_steps=5, num_probes=3)
    assert density.nodes.shape == density.weights.shape == (3, 5)
    for power in range(11):
        value, error = density.trace_of(lambda x, power=power: x**power)
        wrong = abs(value - np.sum(eigenvalues**power))
        assert wrong > 1e-3 if power == 10 else wrong <= 1e-12 * SIZE
        assert error <= 1e-12 * SIZE


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_exhausted_krylov_spaces_leave_a_rule_without_nan(spectrum, rotated):
    """One probe at a time rounds otherwise than four together, and differently exhausted spaces end otherwise."""
    k = dense(SPECTRA[spectrum], rotated=rotated)
    for probe_batch_size in (None, 1):
        density = spectral_density(k, key=KEY, num_steps=20, num_probes=4, probe_batch_size=probe_batch_size)
        check_density(density, SPECTRA[spectrum], rotated)


def check_density(density, spectrum, rotated):
    assert np.all(np.isfinite(density.nodes))
    assert np.all(density.weights >= 0)
    assert_close(density.weights.sum(1), np.ones(4))
    for power in (1, 2, 3):
        value, error = density.trace_of(lambda x, power=power: x**power)
        exact = np.sum(padded(spectrum) ** power)
        assert abs(value - exact) <= 10 * error + 1e-11 * exact  # four probes
        assert rotated or abs(value - exact) <= 1e-11 * exact


def test_a_bulk_far_below_the_outlier_is_resolved():
    """Remainders a millionth of the largest eigenvalue are no rounding noise."""
    k = dense(SPECTRA["one outlier"], rotated=False)
    density = spectral_density(k, key=KEY, num_steps=20, num_probes=4)
    assert density.trace_of(lambda x: jnp.exp(-x)).value == pytest.approx(np.exp(-np.diag(k.matrix)).sum(), rel=1e-6)


@pytest.mark.parametrize("void", [np.nan, 0.0, 1e-16])
def test_what_follows_an_exhausted_krylov_space_is_cut(void):
    """0 / 0 makes all that follows NaN; rounding makes it noise."""
    after = void if np.isnan(void) else 7.0
    nodes, weights = nodes_and_weights(jnp.array([2.0, 1.0, after, after]), jnp.array([0.5, void, after]))
    exact_nodes, exact_vectors = np.linalg.eigh([[2.0, 0.5], [0.5, 1.0]])
    assert_close(nodes, [0, 0, *exact_nodes])
    assert_close(weights, [0, 0, *exact_vectors[0] ** 2])


@pytest.mark.parametrize("function", [lambda x: x, jnp.square, lambda x: jnp.exp(-3 * x)], ids=["K", "K²", "exp(-3K)"])
def test_moments_lie_within_their_standard_error(harmonic, function):
    """The standard error is that of Hutchinson's estimator of f(K), and errors are of its size."""
    values, vectors = np.linalg.eigh(dense(HARMONIC).matrix)
    matrix = vectors * np.asarray(function(values)) @ vectors.T
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    value, error = harmonic.trace_of(function)
    assert error == pytest.approx(np.sqrt(variance / 4096), rel=0.1)
    assert abs(value - np.trace(matrix)) <= 3.5 * error


def test_errors_fall_like_one_over_the_root_of_the_probes(harmonic):
    probes = [16, 64, 256]
    estimates = [[part.trace_of() for part in groups_of(harmonic, number)] for number in probes]
    errors = [np.sqrt(np.mean([(e.value - HARMONIC.sum()) ** 2 for e in of_number])) for of_number in estimates]
    stated = [np.sqrt(np.mean([e.standard_error**2 for e in of_number])) for of_number in estimates]
    assert np.polyfit(np.log(probes), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.15)
    assert np.polyfit(np.log(probes), np.log(stated), 1)[0] == pytest.approx(-0.5, abs=0.02)
    assert np.asarray(stated) / np.asarray(errors) == pytest.approx(1, abs=0.4)


def test_the_effective_rank_and_its_error(harmonic):
    value, error = harmonic.effective_rank()
    assert abs(value - entk.effective_rank(dense(HARMONIC).matrix)) <= 3.5 * error
    parts = [part.effective_rank() for part in groups_of(harmonic, 64)]
    scatter = np.std([part.value for part in parts], ddof=1)
    assert np.sqrt(np.mean([part.standard_error**2 for part in parts])) == pytest.approx(scatter, rel=0.35)
    assert error == pytest.approx(scatter / 8, rel=0.35)


def test_the_density_is_that_of_the_eigenvalues():
    eigenvalues, grid = np.linspace(0.5, 1.5, SIZE), np.linspace(0, 2, 201)
    exact = np.exp(-(((grid[:, None] - eigenvalues) / 0.1) ** 2) / 2).sum(1) / (0.1 * np.sqrt(2 * np.pi) * SIZE)
    density = spectral_density(dense(eigenvalues, rotated=False), key=KEY, num_steps=20, num_probes=4)
    smoothed = density.density(grid, 0.1)
    assert_close(smoothed, exact, 1e-4)
    assert np.trapezoid(smoothed, grid) == pytest.approx(1, abs=1e-4)
    assert np.abs(density.density(grid, 0.2) - smoothed).max() > 0.1
    with pytest.raises(ValueError, match=r"width=0\.0 must be positive, in the unit of the eigenvalues"):
        density.density(grid, 0.0)


@pytest.mark.parametrize("num_steps", [SIZE, 100])
def test_where_lanczos_would_run_to_the_end_the_density_is_exact(num_steps):
    density = spectral_density(dense(HARMONIC), key=KEY, num_steps=num_steps)
    assert_close(density.nodes, HARMONIC[None, ::-1], 1e-13)
    assert_close(density.weights, np.full((1, SIZE), 1 / SIZE))
    assert density.trace_of().standard_error == density.effective_rank().standard_error == 0
    assert density.effective_rank().value == pytest.approx(HARMONIC.sum() ** 2 / np.sum(HARMONIC**2), rel=1e-12)


# -------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_xtrace_is_exact_below_its_rank_and_not_above_in_any_unit(scale, dtype):
    """Negative control: more eigenvalues than probes leave an error, and the standard error says so."""
    tolerance = 300 * np.finfo(dtype).eps
    value, error = trace(dense(scale * np.arange(1, 8), dtype), XTrace(8), key=KEY)
    assert abs(value - 28 * scale) <= tolerance * 28 * scale
    assert error <= tolerance * 28 * scale
    spread = scale * np.linspace(1, 2, SIZE)
    value, error = trace(dense(spread, dtype), XTrace(8), key=KEY)
    assert 1e-4 * spread.sum() < error < 0.05 * spread.sum()
    assert 0 < abs(value - spread.sum()) <= 4 * error


@pytest.mark.parametrize("method", [XTrace(8), Hutchinson(20)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_traces_lie_within_their_standard_error(spectrum, method):
    k = dense(SPECTRA[spectrum], seed=3)
    value, error = trace(k, method, key=KEY)
    assert abs(value - np.trace(k.matrix)) <= 4 * error + 1e-11 * np.trace(k.matrix)


def sample(k, method, number=200):
    estimates = [trace(k, method, key=key) for key in jax.random.split(KEY, number)]
    values, errors = np.array(estimates).T
    return values, np.sqrt(np.mean(errors**2))


def test_hutchinsons_errors_are_those_of_its_variance():
    """Two probes, where a variance that is not unbiased is half of the true one."""
    k = dense(HARMONIC)
    values, error = sample(k, Hutchinson(2))
    exact = np.sqrt(np.sum(np.square(k.matrix)) - np.sum(np.square(np.diag(k.matrix))))
    assert error == pytest.approx(exact, rel=0.2)
    assert np.std(values) == pytest.approx(exact, rel=0.2)
    assert abs(np.mean(values) - HARMONIC.sum()) <= 4 * exact / np.sqrt(200)


def test_xtrace_is_unbiased_its_errors_nearly_right_and_smaller():
    """At 17 products against 20, where eigenvalues fall fast."""
    k = dense(0.5 ** np.arange(SIZE))
    values, error = sample(k, XTrace(8))
    assert abs(np.mean(values) - np.trace(k.matrix)) <= 4 * np.std(values) / np.sqrt(200)
    assert 0.6 < error / np.std(values) < 1.1
    assert np.std(values) < np.std(sample(k, Hutchinson(20))[0]) / 5


@pytest.mark.parametrize("method", [XTrace(SIZE // 2), XTrace(1000), Hutchinson(SIZE)])
def test_with_as_many_products_as_rows_the_trace_is_exact(method):
    value, error = trace(dense(HARMONIC), method, key=KEY)
    assert value == pytest.approx(HARMONIC.sum(), rel=1e-13)
    assert error == 0


# ----------------------------------------------------------------------------------------------------------- operators


def test_more_examples_than_a_matrix_would_hold():
    """N = 400,000: K would take 1.2 TiB; its non-zero eigenvalues are those of a 3 x 3 matrix."""
    x = np.random.default_rng(0).normal(size=(400_000, 3)) * [1, 2, 3]
    k = NtkOperator(lambda w, x: x @ w, jnp.ones(3), x)
    exact = np.linalg.eigvalsh(x.T @ x)[::-1]
    pairs = top_eigenpairs(k, 4, key=KEY, num_steps=2)
    assert_close(pairs.values, [*exact, 0])
    assert pairs.residuals.max() <= 1e-9 * exact[0]
    assert trace(k, XTrace(5), key=KEY).value == pytest.approx(exact.sum(), rel=1e-11)


def test_the_preconditioned_kernel_of_a_network():
    params, x = init(1, outputs=1), batch(1, 40)
    m = np.random.default_rng(1).exponential(size=sum(leaf.size for leaf in params.values()))
    parts = np.split(m, np.cumsum([params[name].size for name in sorted(params)])[:-1])
    tree = {name: part.reshape(params[name].shape) for name, part in zip(sorted(params), parts, strict=True)}
    jac = jacobian_by_hand(params, x).reshape(40, -1)
    exact, vectors = np.linalg.eigh(jac * m @ jac.T)
    pairs = top_eigenpairs(NtkOperator(apply_fn, params, x, preconditioner=tree), 2, key=KEY, num_steps=12)
    assert_close(pairs.values, exact[::-1][:2])
    assert np.abs(np.abs(vectors[:, ::-1][:, :2].T @ pairs.vectors) - np.eye(2)).max() <= 1e-9
    assert pairs.residuals.max() <= 1e-9 * exact[-1]


def test_other_arrays_of_the_same_shapes_compile_nothing(caplog):
    def use(k, key):
        top_eigenpairs(k, 8, key=key, num_steps=6)
        spectral_density(k, key=key, num_steps=20, num_probes=4)
        trace(k, XTrace(8), key=key)
        trace(k, Hutchinson(20), key=key)

    operators = [dense(HARMONIC, seed=seed) for seed in (1, 2)]
    use(operators[0], KEY)
    caplog.clear()
    with jax.log_compiles():
        use(operators[1], jax.random.key(1))
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


@pytest.mark.parametrize(
    "program",
    [
        lambda k: top_eigenpairs(k, 2, key=KEY, num_steps=3),
        lambda k: top_eigenpairs(k, 2, key=KEY, num_steps=9),  # formed whole
        lambda k: spectral_density(k, key=KEY, num_steps=3),
        lambda k: trace(k, XTrace(3), key=KEY),
        lambda k: trace(k, Hutchinson(3), key=KEY),
    ],
)
def test_products_run_at_full_precision_unless_the_caller_says_otherwise(program):
    """Orthogonality would be lost in the 8 or 11 bits of accelerators; a CPU has no such, so the program is read."""
    k = NtkOperator(lambda w, x: x @ w, jnp.ones(3, jnp.float32), batch(0, 9).astype(np.float32))
    full = str(jax.make_jaxpr(program)(k))
    assert full.count("dot_general[") == full.count("Precision.HIGHEST, Precision.HIGHEST") > 0
    with jax.default_matmul_precision("bfloat16"):
        assert "HIGHEST" not in str(jax.make_jaxpr(program)(k))


def recorder(shapes):
    """An operator that is no pytree, has no dtype, and notes what it is multiplied with."""
    matrix = np.asarray(dense(HARMONIC).matrix)

    def mv(vector):
        shapes.append(vector.shape)
        return matrix @ vector

    return types.SimpleNamespace(mv=mv, shape=matrix.shape)


def test_operators_of_any_kind_are_multiplied_in_blocks():
    """Probes reach the operator side by side, as many at once as was asked for, the remainder too."""
    shapes = []
    density = spectral_density(recorder(shapes), key=KEY, num_steps=20, num_probes=4, probe_batch_size=3)
    assert_close(density.nodes, spectral_density(dense(HARMONIC), key=KEY, num_steps=20, num_probes=4).nodes, 1e-9)
    assert {shape for shape in shapes if len(shape) == 2} == {(SIZE, 3), (SIZE, 1)}
    del shapes[:]
    value = trace(recorder(shapes), Hutchinson(20), key=KEY).value
    assert_close(value, trace(dense(HARMONIC), Hutchinson(20), key=KEY).value)
    assert {shape for shape in shapes if len(shape) == 2} == {(SIZE, 20)}


def test_an_ensemble_of_operators():
    """vmap over operators, around that over probes, and around a product with one vector."""
    operators = [dense(HARMONIC, seed=seed) for seed in range(2)]
    together = jax.vmap(lambda matrix: trace(Dense(matrix), XTrace(8), key=KEY).value)(
        jnp.stack([k.matrix for k in operators])
    )
    assert_close(together, [trace(k, XTrace(8), key=KEY).value for k in operators], 1e-11)


# ----------------------------------------------------------------------------------------------------------- bad input

CALLS = {
    "top_eigenpairs": lambda k, key=KEY: top_eigenpairs(k, 1, key=key),
    "spectral_density": lambda k, key=KEY: spectral_density(k, key=key),
    "trace": lambda k, key=KEY: trace(k, key=key),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bad_operators_and_keys(call):
    k = dense(HARMONIC)
    with pytest.raises(
        TypeError, match=r"operator of type Array\w* must have mv and shape, .* types\.SimpleNamespace\("
    ):
        call(k.matrix)
    with pytest.raises(TypeError, match="operator of type SimpleNamespace must have mv and shape"):
        call(types.SimpleNamespace(mv=k.mv))
    with pytest.raises(
        ValueError, match=r"shape \(8, 12\), but must be square, .*NtkOperator\(apply_fn, params, x_s\)"
    ):
        call(NtkOperator(apply_fn, init(0), batch(1, 4), batch(0, 6)))
    with pytest.raises(ValueError, match=r"shape \(0, 0\), but must be square, .* at least one row"):
        call(Dense(jnp.zeros((0, 0))))
    with pytest.raises(TypeError, match="operator has dtype int64, but must be real floating point: cast it"):
        call(Dense(jnp.eye(3, dtype=int)))
    for key in (0, jax.random.PRNGKey(0), jax.random.split(KEY, 2)):
        with pytest.raises(TypeError, match=r"must be one random key: pass jax\.random\.key\(0\), or one of jax"):
            call(k, key)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "all"])
def test_bad_counts(count):
    k = dense(HARMONIC)
    for name in ("rank", "num_steps", "block_size"):
        with pytest.raises(ValueError, match=rf"{name}={count!r} must be an integer of at least 1"):
            top_eigenpairs(k, **({"rank": 2, "key": KEY} | {name: count}))
    for name, least in (("num_steps", 1), ("num_probes", 2), ("probe_batch_size", 1)):
        with pytest.raises(ValueError, match=rf"{name}={count!r} must be an integer of at least {least}"):
            spectral_density(k, key=KEY, **{name: count})
    for method in (Hutchinson, XTrace):
        with pytest.raises(ValueError, match=rf"num_probes={count!r} must be an integer of at least 2"):
            method(count)
        with pytest.raises(ValueError, match="num_probes=1 must be an integer of at least 2"):
            method(1)


def test_ranks_that_cannot_be():
    k = dense(HARMONIC)
    with pytest.raises(ValueError, match="rank=61 exceeds N = 60, the number of eigenpairs of this operator"):
        top_eigenpairs(k, 61, key=KEY)
    message = (
        "block_size=2 times num_steps=3 is 6 vectors, which hold no rank=7 eigenpairs: raise num_steps to 4 or more"
    )
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(k, 7, key=KEY, block_size=2, num_steps=3)


@pytest.mark.parametrize("method", [100, "xtrace", XTrace])
def test_bad_methods(method):
    with pytest.raises(TypeError, match=r"method=.* must be a method such as XTrace\(num_probes=20\) or Hutchinson\("):
        trace(dense(HARMONIC), method, key=KEY)


@pytest.mark.parametrize(
    ("call", "numbers", "message"),
    [
        (lambda k: top_eigenpairs(k, 2, key=KEY, num_steps=5), 16 * SIZE, r"holding 16 Krylov .*Lower block_size or"),
        (
            lambda k: top_eigenpairs(k, 2, key=KEY, num_steps=50),
            3 * SIZE**2,
            r"60 x 60 matrix and its .*Lower num_steps",
        ),
        (
            lambda k: spectral_density(k, key=KEY, num_steps=5),
            50 * SIZE,
            r"10 x 5 Lanczos .*Pass a smaller probe_batch",
        ),
        (
            lambda k: spectral_density(k, key=KEY, num_steps=5, probe_batch_size=2),
            10 * SIZE,
            r"holding 2 x 5 Lanczos vectors of 60 float64 numbers",
        ),
        (lambda k: spectral_density(k, key=KEY, num_steps=60), 2 * SIZE**2, r"60 x 60 matrix takes .*Lower num_steps"),
    ],
)
def test_memory_foreseen(monkeypatch, call, numbers, message):
    for name in ("_block_lanczos", "_dense_eigenpairs", "_quadrature", "_exact_density"):
        monkeypatch.setattr(entk._spectra.spectrum, name, lambda *_: (None, None))
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 8 * numbers - 1)
    with pytest.raises(MemoryError, match=message):
        call(dense(HARMONIC))
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 8 * numbers)
    call(dense(HARMONIC))
