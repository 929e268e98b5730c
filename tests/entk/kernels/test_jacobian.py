"""The per-example Jacobian against NumPy: by hand, by complex steps, by finite differences."""

import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import entk._checks.memory
import entk._kernels.jacobian
from entk import FullJacobian, Structured, empirical_ntk, jacobian, ntk_vector_product
from entk._parameters import num_params
from tests.entk.mlp_oracle import (
    apply_fn,
    assert_close,
    batch,
    complex_step_jacobian,
    forward,
    init,
    jacobian_by_hand,
    kernel_by_hand,
)

# ---------------------------------------------------------------------------------------------------- right numbers


def test_equals_the_jacobian_derived_by_hand():
    params, x = init(0), batch(0, 6)
    assert_close(jacobian(apply_fn, params, x), jacobian_by_hand(params, x))


def test_the_hand_derivation_equals_complex_steps():
    """The oracle has an oracle: no derivative is taken here."""
    params, x = init(1, outputs=3), batch(1, 4)
    keys = sorted(params)
    ends = np.cumsum([params[key].size for key in keys])[:-1]

    def outputs(flat):
        parts = np.split(flat, ends)
        return forward({key: part.reshape(params[key].shape) for key, part in zip(keys, parts, strict=True)}, x)

    flat = np.concatenate([params[key].ravel() for key in keys])
    assert_close(complex_step_jacobian(outputs, flat), jacobian_by_hand(params, x))


def test_a_deep_network_equals_complex_steps():
    rng = np.random.default_rng(2)
    shapes = [(2, 5), (5, 5), (5, 4), (4, 2)]
    weights = [rng.normal(size=shape) for shape in shapes]
    x = rng.normal(size=(3, 2))

    def network(weights, x, xp):
        hidden = x
        for weight in weights[:-1]:
            hidden = xp.sin(hidden @ weight) + hidden.sum(1, keepdims=True) ** 2 / 9
        return xp.exp(hidden @ weights[-1] / 9) * hidden[:, :2]

    def outputs(flat):
        parts = np.split(flat, np.cumsum([weight.size for weight in weights])[:-1])
        return network([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)], x, np)

    expected = complex_step_jacobian(outputs, np.concatenate([weight.ravel() for weight in weights]))
    assert_close(jacobian(lambda weights, x: network(weights, x, jnp), weights, x), expected)


def test_a_linear_model_gives_its_features_exactly():
    features = batch(3, 5, inputs=7)
    np.testing.assert_array_equal(jacobian(lambda w, x: x @ w, jnp.ones(7), features)[:, 0], features)


@pytest.mark.parametrize("microbatch_size", [1, 2, 4, 5, 6, 1000, np.int64(3)])
def test_every_microbatch_size_gives_the_same(microbatch_size):
    params, x = init(4), batch(4, 6)
    assert_close(jacobian(apply_fn, params, x, microbatch_size=microbatch_size), jacobian_by_hand(params, x))


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 7),
    c=st.integers(1, 4),
    width=st.integers(1, 5),
    inputs=st.integers(1, 3),
    microbatch_size=st.none() | st.integers(1, 9),
)
def test_any_shape_equals_the_hand_derivation(seed, n, c, width, inputs, microbatch_size):
    params, x = init(seed, inputs, width, c), batch(seed, n, inputs)
    expected = jacobian_by_hand(params, x)
    assert_close(jacobian(apply_fn, params, x, microbatch_size=microbatch_size), expected)


# ------------------------------------------------------------------------------------------------------------ layout


def test_parameters_are_in_the_order_of_ravel_pytree():
    """Nested containers, a scalar leaf, an empty leaf: J · ravel(dw) is the change of the outputs along dw."""
    rng = np.random.default_rng(5)
    params = {
        "z": [rng.normal(size=(3, 2)), (rng.normal(size=2),)],
        "a": {"scale": jnp.asarray(1.5), "none": jnp.zeros((0, 4))},
        "m": rng.normal(size=(2, 2)),
    }
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    x = batch(5, 4)

    def model(params, x):
        weight, (bias,) = params["z"]
        return params["a"]["scale"] * jnp.sin(x @ weight + bias) @ params["m"]

    jac = jacobian(model, params, x)
    assert jac.shape == (4, 2, 6 + 2 + 1 + 0 + 4)
    along = jac @ ravel_pytree(direction)[0]
    assert_close(along, jax.jvp(lambda params: model(params, x), (params,), (direction,))[1])
    ahead = model(jax.tree.map(lambda w, dw: w + 1e-6 * dw, params, direction), x)
    behind = model(jax.tree.map(lambda w, dw: w - 1e-6 * dw, params, direction), x)
    assert_close(along, (ahead - behind) / 2e-6, 1e-8)


def scaled_model(params, x):
    noise = jax.random.normal(params["key"], (2,))
    hidden = jnp.tanh(x @ params["w"] + params["table"][params["index"]])
    return jnp.where(params["mask"], hidden, 2 * hidden) * params["power"] + noise


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_integers_booleans_and_random_keys_are_constants(microbatch_size):
    """They have no columns, and apply_fn receives them as they are."""
    rng = np.random.default_rng(18)
    constants = {"index": np.array(1), "mask": np.array([True, False]), "power": 3, "key": jax.random.key(0)}
    params = {"table": rng.normal(size=(2, 2)), "w": rng.normal(size=(3, 2))}
    x = batch(18, 4)
    expected = jacobian(lambda params, x: scaled_model(params | constants, x), params, x)
    assert expected.shape == (4, 2, 10)
    assert (np.asarray(expected)[..., :2] == 0).all()  # row 0 of the table is not looked up
    assert_close(jacobian(scaled_model, params | constants, x, microbatch_size=microbatch_size), expected)
    other = jacobian(scaled_model, params | constants | {"index": np.array(0)}, x, microbatch_size=microbatch_size)
    assert (np.asarray(other)[..., 2:4] == 0).all()
    for strategy in (Structured(), FullJacobian(microbatch_size=microbatch_size)):
        kernel = empirical_ntk(scaled_model, params | constants, x, strategy=strategy)
        assert_close(kernel, expected.reshape(8, 10) @ expected.reshape(8, 10).T)


def test_constants_do_not_count_as_parameters():
    params = {"index": np.arange(7), "w": np.ones((3, 2)), "key": jax.random.key(0), "scale": 1.5}
    assert num_params(params) == 7


def test_a_frozen_parameter_has_columns_of_zeros():
    params, x = init(19), batch(19, 4)

    def frozen(params, x):
        return apply_fn({**params, "w_in": jax.lax.stop_gradient(params["w_in"])}, x)

    expected = jacobian_by_hand(params, x)
    expected[..., 6:18] = 0  # after b_in (4) and b_out (2)
    assert_close(jacobian(frozen, params, x), expected)


def test_outputs_are_not_mixed_between_examples_or_components():
    """Output (i, a) is w[a] x[i]: its derivative is x[i] at parameter a and 0 elsewhere."""
    x = np.array([2.0, 3.0, 5.0])
    expected = x[:, None, None] * np.eye(4)
    np.testing.assert_array_equal(jacobian(lambda w, x: x[:, None] * w, jnp.ones(4), x), expected)


def test_one_output_as_a_vector_or_as_a_column():
    params, x = init(6, outputs=1), batch(6, 5)
    column = jacobian(apply_fn, params, x)
    assert column.shape == (5, 1, 21)
    np.testing.assert_array_equal(jacobian(lambda params, x: apply_fn(params, x)[:, 0], params, x), column)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2), (1, 6)])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_outputs_of_any_trailing_shape_are_flattened_by_rows(shape, microbatch_size):
    params, x = init(17, outputs=6), batch(17, 5)

    def model(params, x):
        return apply_fn(params, x).reshape(-1, *shape)

    jac = jacobian(model, params, x, microbatch_size=microbatch_size)
    assert_close(jac, jacobian_by_hand(params, x))
    for strategy in (Structured(), FullJacobian(microbatch_size=microbatch_size)):
        assert_close(empirical_ntk(model, params, x, strategy=strategy), kernel_by_hand(params, x, x))
    assert_close(ntk_vector_product(model, params, np.arange(30.0), x), kernel_by_hand(params, x, x) @ np.arange(30.0))


def test_a_model_may_drop_the_axis_of_a_single_example():
    params, x = init(6, outputs=1), batch(6, 5)
    squeezed = jacobian(lambda params, x: jnp.squeeze(apply_fn(params, x)), params, x)
    assert_close(squeezed, jacobian_by_hand(params, x))


def test_one_example():
    params, x = init(7), batch(7, 1)
    assert_close(jacobian(apply_fn, params, x), jacobian_by_hand(params, x))


def test_inputs_may_be_a_pytree():
    params, x = init(8), batch(8, 5, inputs=3)
    parts = {"left": x[:, :1], "rest": (x[:, 1], x[:, 2])}

    def model(params, parts):
        columns = [parts["left"], parts["rest"][0][:, None], parts["rest"][1][:, None]]
        return apply_fn(params, jnp.concatenate(columns, axis=1))

    for microbatch_size in (None, 2):
        jac = jacobian(model, params, parts, microbatch_size=microbatch_size)
        assert_close(jac, jacobian_by_hand(params, x))


def test_integer_inputs_and_images():
    """Tokens need no gradient and inputs may have any rank."""
    tokens, table = np.array([[0, 2], [1, 1]]), np.random.default_rng(9).normal(size=(3, 2))
    jac = jacobian(lambda table, tokens: table[tokens].sum(1), table, tokens)
    counts = np.array([[1, 0, 1], [0, 2, 0]])
    np.testing.assert_array_equal(jac, np.einsum("nv,ab->navb", counts, np.eye(2)).reshape(2, 2, 6))
    images = batch(9, 4, inputs=12).reshape(4, 2, 2, 3)
    flat = jacobian(lambda w, x: x.reshape(len(x), -1) @ w, jnp.ones((12, 2)), images)
    np.testing.assert_array_equal(flat[:, 1].reshape(4, 12, 2)[..., 1], images.reshape(4, 12))


# ------------------------------------------------------------------------------------------------------------- dtypes


def test_float32_stays_float32_and_is_as_good_as_it_can_be():
    params, x = init(10), batch(10, 6)
    params32, x32 = jax.tree.map(np.float32, params), x.astype(np.float32)
    jac = jacobian(apply_fn, params32, x32)
    assert jac.dtype == jnp.float32
    exact = jacobian_by_hand(jax.tree.map(np.float64, params32), x32.astype(np.float64))
    assert_close(jac, exact, 2e-6)
    with jax.enable_x64(False):
        assert_close(jacobian(apply_fn, params32, x32), exact, 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_works_to_its_digits(dtype):
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), init(11)), jnp.asarray(batch(11, 6), dtype)
    jac = jacobian(apply_fn, params, x)
    assert jac.dtype == dtype
    exact = jacobian_by_hand(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), np.asarray(x, np.float64))
    assert_close(jac, exact, 8 * float(jnp.finfo(dtype).eps))


def test_products_run_at_full_precision_unless_the_caller_says_otherwise():
    """Accelerators round float32 products to 8 or 11 bits by default; a CPU never does, so the program is read."""
    params, x = jax.tree.map(np.float32, init(12)), batch(12, 3).astype(np.float32)
    vector = np.ones(6, np.float32)
    for program in (
        lambda: jacobian(apply_fn, params, x),
        lambda: empirical_ntk(apply_fn, params, x),
        lambda: ntk_vector_product(apply_fn, params, vector, x),
    ):
        full = str(jax.make_jaxpr(program)())
        assert full.count("dot_general[") == full.count("Precision.HIGHEST, Precision.HIGHEST") > 0
    with jax.default_matmul_precision("bfloat16"):
        assert "HIGHEST" not in str(jax.make_jaxpr(lambda: jacobian(apply_fn, params, x))())


# -------------------------------------------------------------------------------------------- under the caller's JAX


def test_under_jit_vmap_and_grad():
    x = batch(13, 4)
    ensemble = [init(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ensemble)
    expected = np.stack([jacobian_by_hand(params, x) for params in ensemble])

    def compute(params):
        return jacobian(apply_fn, params, x, microbatch_size=3)

    assert_close(jax.jit(compute)(ensemble[0]), expected[0])
    assert_close(jax.vmap(compute)(stacked), expected)

    def half_square(params):
        return (compute(params) ** 2).sum() / 2

    gradient = jax.grad(half_square)(ensemble[0])["b_in"]
    steps = [{**ensemble[0], "b_in": ensemble[0]["b_in"] + 1e-6 * unit} for unit in np.eye(4)]
    back = [{**ensemble[0], "b_in": ensemble[0]["b_in"] - 1e-6 * unit} for unit in np.eye(4)]
    slope = [
        ((jacobian_by_hand(a, x) ** 2).sum() - (jacobian_by_hand(b, x) ** 2).sum()) / 4e-6
        for a, b in zip(steps, back, strict=True)
    ]
    assert_close(gradient, slope, 1e-7)


def test_apply_fn_may_close_over_what_the_caller_traces():
    params, x = init(14), batch(14, 3)
    scales = np.array([1.0, 2.0])

    def compute(scale):
        return jacobian(lambda params, x: scale * apply_fn(params, x), params, x)

    expected = scales[:, None, None, None] * jacobian_by_hand(params, x)
    assert_close(jax.jit(jax.vmap(compute))(scales), expected)


def test_a_second_call_compiles_nothing_and_traces_one_example(caplog):
    """One trace of one example a call says whether the function is what it was."""
    traces = []

    def model(params, x):
        traces.append(x.shape)
        return apply_fn(params, x)

    def compiled(seed):
        params, x = init(seed), batch(seed, 5)
        caplog.clear()
        with jax.log_compiles():
            jacobian(model, params, x, microbatch_size=2)
            empirical_ntk(model, params, x)
            empirical_ntk(model, params, x, strategy=FullJacobian(microbatch_size=2))
            ntk_vector_product(model, params, np.ones(10), x)
        return [record for record in caplog.records if "Compiling" in record.getMessage()]

    assert compiled(0)
    first = len(traces)
    assert not compiled(1)
    assert traces[first:] == [(1, 3)] * 4


# ---------------------------------------------------------------------------------------------------------- bad input

PARAMS, X = init(15), batch(15, 5)

BAD_OUTPUTS = {
    "rank 0": (lambda p, x: apply_fn(p, x).sum(), ValueError, r"shape \(\), but must be \(5, c\) or \(5,\).*Reshape"),
    "no examples": (
        lambda p, x: apply_fn(p, x).ravel(),
        ValueError,
        r"shape \(10,\), but must be .*any trailing shape",
    ),
    "one row short": (lambda p, x: apply_fn(p, x)[1:], ValueError, r"shape \(4, 2\), but must be \(5, c\)"),
    "transposed": (lambda p, x: apply_fn(p, x).T, ValueError, r"shape \(2, 5\), but must be \(5, c\)"),
    "a square transposed": (
        lambda p, x: (x @ p["w_in"] @ np.ones((4, 5))).T,
        ValueError,
        r"5 outputs an example on the 5 examples of x1? and \(5, 1\) on one example",
    ),
    "tuple": (lambda p, x: (apply_fn(p, x), x), TypeError, r"must return one array .* got PyTreeDef.*alone, e.g. out"),
    "dict": (lambda p, x: {"out": apply_fn(p, x)}, TypeError, r"must return one array .*'out'"),
    "none": (lambda p, x: None, TypeError, r"must return one array .*None"),
    "zero outputs": (lambda p, x: apply_fn(p, x)[:, :0], ValueError, r"shape \(5, 0\): zero outputs.*at least one"),
    "another dtype": (
        lambda p, x: apply_fn(p, x).astype(jnp.float32),
        TypeError,
        r"apply_fn\(x1?\) has dtype float32 and params float64.*out\.astype\(jnp\.float64\)",
    ),
    "integers": (lambda p, x: apply_fn(p, x).argmax(1), TypeError, r"has dtype int64 and params float64"),
    "complex": (lambda p, x: apply_fn(p, x) * 1j, TypeError, r"has dtype complex128 and params float64"),
    "Gram matrix of the batch": (
        lambda p, x: apply_fn(p, x) @ apply_fn(p, x).T,
        ValueError,
        r"5 outputs an example on the 5 examples of x1? and \(1, 1\) on one example.*independently. Remove",
    ),
}

BAD_PARAMS = {
    "nothing": ({}, ValueError, "params has no leaves; pass the pytree of arrays"),
    "mixed dtypes": (
        {**PARAMS, "b_in": PARAMS["b_in"].astype(np.float32)},
        TypeError,
        r"mixes dtypes: float32 \(params\['b_in'\]\), float64 \(params\['b_out'\]\)\. Cast the floating-point",
    ),
    "constants only": (
        {"step": np.arange(3), "mask": np.ones(3, bool)},
        ValueError,
        r"leaves of dtype bool, int64 only, which are constants: at least one leaf must be floating point.*tree\.map",
    ),
    "complex": (
        {**PARAMS, "w": 1j * np.ones(3)},
        TypeError,
        r"params\['w'\] has dtype complex128, but .* must be real",
    ),
    "a function": (
        {**PARAMS, "act": jnp.tanh},
        TypeError,
        r"params\['act'\] is .*tanh.*not an array.*equinox.partition",
    ),
    "a string": ({**PARAMS, "name": "mlp"}, TypeError, r"params\['name'\] is 'mlp', not an array"),
}

BAD_INPUTS = {
    "zero examples": (np.ones((0, 3)), ValueError, r"x1? holds zero examples; pass at least one"),
    "a scalar": (1.0, ValueError, r"x1?=1\.0 is a scalar.*leading axis of examples.*jnp\.asarray"),
    "an array scalar": (jnp.asarray(1.0), ValueError, r"is a scalar.*leading axis of examples"),
    "nested lists": ([[1.0, 2.0, 3.0]], ValueError, r"x1?\[0\]\[0\]=1\.0 is a scalar.*nested lists.*jnp\.asarray"),
    "nothing": (None, ValueError, r"x1?=None holds no arrays; pass an array"),
    "a string": ("digits", TypeError, r"x1? is 'digits', not an array"),
    "leaves that disagree": ((np.ones((5, 3)), np.ones((4, 3))), ValueError, r"disagree.*\[4, 5\].*one row for each"),
    "another float dtype": (X.astype(np.float32), TypeError, r"x1? has dtype float32 and params float64.*astype\("),
}


def entry_points(model, params, x):
    """The same arguments through everything that takes a model."""
    yield lambda: jacobian(model, params, x)
    yield lambda: empirical_ntk(model, params, x)
    yield lambda: ntk_vector_product(model, params, jnp.ones(10), x)


def assert_refused(model, params, x, error, message):
    for call in entry_points(model, params, x):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_outputs(case):
    model, error, message = BAD_OUTPUTS[case]
    assert_refused(model, PARAMS, X, error, message)


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params(case):
    params, error, message = BAD_PARAMS[case]
    assert_refused(apply_fn, params, X, error, message)


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(case):
    x, error, message = BAD_INPUTS[case]
    assert_refused(apply_fn, PARAMS, x, error, message)


def test_bad_functions():
    assert_refused(3, PARAMS, X, TypeError, r"apply_fn=3 must be a function \(params, x\).*before params")

    class Unhashable:
        def __call__(self, params, x):
            return apply_fn(params, x)

        def __eq__(self, other):
            return self is other

    assert_refused(Unhashable(), PARAMS, X, TypeError, r"type Unhashable must be hashable.*function defined once")


@pytest.mark.parametrize("microbatch_size", [0, -1, 2.0, True, "all", np.float64(2), (2,)])
def test_bad_microbatch_sizes(microbatch_size):
    message = r"microbatch_size=.* must be a positive integer, or None"
    with pytest.raises(ValueError, match=message):
        jacobian(apply_fn, PARAMS, X, microbatch_size=microbatch_size)
    with pytest.raises(ValueError, match=message):
        FullJacobian(microbatch_size=microbatch_size)


def test_bad_input_is_refused_under_jit_too():
    with pytest.raises(TypeError, match="mixes dtypes"):
        jax.jit(lambda params: jacobian(apply_fn, params, X))(BAD_PARAMS["mixed dtypes"][0])


# ------------------------------------------------------------------------------------------------------------- memory


def lookup(table, rows):
    return table[rows]


def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def test_a_jacobian_of_512_x_10_x_1M_is_refused_before_memory_is_spent(monkeypatch):
    monkeypatch.setattr(entk._checks.memory, "available_bytes", lambda: 32 * 2**30)
    table, rows = jnp.zeros((100_000, 10)), jnp.arange(512)
    before = peak_bytes()
    message = (
        r"512 x 10 x 1,000,000 float64 Jacobian \(of 38\.1 GiB\) takes 76\.3 GiB and 32\.0 GiB are available\. "
        r"214 of the 512 examples would fit\. Use empirical_ntk, .*, or ntk_vector_product"
    )
    with pytest.raises(MemoryError, match=message):
        jacobian(lookup, table, rows)
    with pytest.raises(MemoryError, match=r"holding 512 x 10 x 1,000,000 .* smaller microbatch_size, or .*vector_prod"):
        empirical_ntk(lookup, table, rows, strategy=FullJacobian())
    assert peak_bytes() - before < 2**28


def test_what_no_machine_holds_is_refused_with_the_memory_of_this_one():
    """A Jacobian of 186 TiB; its parameters are shapes only."""
    table = jax.ShapeDtypeStruct((10**9, 10), jnp.float32)
    with pytest.raises(MemoryError, match=r"takes .* GiB and .* GiB are available"):
        jax.eval_shape(lambda table: jacobian(lookup, table, jnp.arange(512)), table)


@pytest.mark.parametrize("microbatch_size", [None, 7, 8])
def test_the_memory_foreseen_is_the_memory_the_program_takes(monkeypatch, microbatch_size):
    """Whole, with a remainder, without: the compiler's own account, less than half as much again as foreseen."""
    params, x = init(16, inputs=64, width=64, outputs=3), batch(16, 64, inputs=64)
    foreseen = []
    monkeypatch.setattr(entk._kernels.jacobian, "check_fits", lambda num_bytes, *_, **__: foreseen.append(num_bytes))
    jacobian(apply_fn, params, x, microbatch_size=microbatch_size)
    program = entk._kernels.jacobian._jacobian.lower(apply_fn, params, x, microbatch_size).compile()
    account = program.memory_analysis()
    if account is None:
        pytest.skip("this backend keeps no account of memory")
    taken = account.temp_size_in_bytes + account.output_size_in_bytes
    assert taken / 1.5 < foreseen[0] < 1.5 * taken


def test_memory_is_read_from_the_device_or_else_the_machine(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_limit": 100, "bytes_in_use": 30})])
    assert entk._checks.memory.available_bytes() == 70
    for stats in (None, {}):
        monkeypatch.setattr(jax, "local_devices", lambda stats=stats: [Device(stats)])
        assert entk._checks.memory.available_bytes() > 2**20
