"""What is asked of a model before a kernel is formed: examples that do not see each other, and memory."""

import functools
import math
import os
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import entk._checks.independence
import entk._checks.memory
import entk._checks.passed
from entk import empirical_ntk, jacobian, ntk_vector_product
from entk._checks.apply import check_apply
from entk._checks.cgroup import cgroup_headroom
from tests.entk.mlp_oracle import apply_fn, batch, init

PARAMS, X = init(0), batch(0, 5)
MIXED = (
    r"apply_fn's output for one example of x\w* changes when another example of the batch changes, by .*: it must "
    r"treat examples independently\. For batch statistics .*model\.eval\(\).*use_running_average=True.*jax\.vmap"
)


def normalised(x, axis):
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 1e-5)


def softmax_over_the_batch(params, x):
    return jax.nn.softmax(apply_fn(params, x), axis=0)


class NNXNorm(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(3, 4, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=rngs)
        self.out = nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.norm(self.hidden(x))))


def nnx_norm(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x), params  # copied: statistics are written


class LinenNorm(nn.Module):
    use_running_average: bool

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(self.use_running_average, param_dtype=jnp.float64, dtype=jnp.float64)
        return nn.Dense(2, param_dtype=jnp.float64)(jnp.tanh(norm(x)))


def linen_norm(use_running_average):
    model = LinenNorm(use_running_average)
    variables = model.init(jax.random.key(0), X)

    def model_fn(params, x):
        return model.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    return model_fn, variables["params"]


# ------------------------------------------------------------------------------------------------------ mixed examples

MIXING = {
    "batch normalisation, nnx": lambda: nnx_norm(NNXNorm()),
    "batch normalisation, linen": lambda: linen_norm(False),
    "batch normalisation": lambda: (lambda p, x: jnp.tanh(normalised(x @ p["w_in"], 0)) @ p["w_out"], PARAMS),
    "the mean of the batch": lambda: (lambda p, x: apply_fn(p, x) - 1e-9 * apply_fn(p, x).mean(0), PARAMS),
    "softmax over the batch": lambda: (softmax_over_the_batch, PARAMS),
    "the rows before": lambda: (lambda p, x: jnp.cumsum(apply_fn(p, x), axis=0), PARAMS),
    "the rows after": lambda: (lambda p, x: jax.lax.cumsum(apply_fn(p, x), reverse=True), PARAMS),
    "exchanged": lambda: (lambda p, x: apply_fn(p, x)[::-1], PARAMS),
    "attention between examples": lambda: (lambda p, x: jax.nn.softmax(x @ x.T) @ apply_fn(p, x), PARAMS),
    "NaN somewhere": lambda: (lambda p, x: apply_fn(p, x) + jnp.where(x[-1, 0] > 0, jnp.nan, 0.0), PARAMS),
    "something beside NaN": lambda: (lambda p, x: softmax_over_the_batch(p, x).at[:, 0].set(jnp.nan), PARAMS),
    "hidden by zeros": lambda: (
        lambda p, x: jnp.tanh(normalised(x @ p["w_in"], 0)) @ p["w_out"],
        {**PARAMS, "w_out": np.zeros((4, 2))},
    ),
    "seen at these parameters alone": lambda: (
        lambda p, x: normalised(x, 0) + jnp.sqrt(1 - p),  # NaN for a parameter above 1
        jnp.ones(()),
    ),
}


@pytest.mark.parametrize("case", MIXING)
def test_mixed_examples_are_refused(case):
    model, params = MIXING[case]()
    with pytest.raises(ValueError, match=MIXED):
        check_apply(model, params, X)


PLACED = (
    r"output \d of example \d+ of \w+ is .* in a batch of \d+ and .* alone( at parameters moved by 0.001)? "
    r"\(rounding explains .*\): it must treat examples independently, wherever they are in the batch\. "
    r".*deterministic=True, model\.eval\(\).* a leaf of x"
)
KEY = jax.random.key(0)
PLACE_DEPENDENT = {
    "the largest": lambda p, x: jnp.maximum(apply_fn(p, x), apply_fn(p, x).max(0)),  # exchanging rows need not show it
    "noise for each place in the batch": lambda p, x: apply_fn(p, x) + jax.random.normal(KEY, (len(x), 2)),
    "dropout with one key": lambda p, x: jnp.where(jax.random.bernoulli(KEY, 0.5, (len(x), 2)), apply_fn(p, x), 0.0),
    "the place as a feature": lambda p, x: apply_fn(p, x + jnp.arange(len(x))[:, None]),
    "a mask of the first rows": lambda p, x: apply_fn(p, x) * (jnp.arange(len(x)) < 2)[:, None],
    "a mask of the last row": lambda p, x: apply_fn(p, x).at[-1].multiply(2.0),
    "the number of examples": lambda p, x: apply_fn(p, x) / len(x),
    "a branch on their number": lambda p, x: apply_fn(p, x - x.mean(0)) if len(x) > 2 else apply_fn(p, x),
    "rows in another order": lambda p, x: apply_fn(p, x)[jnp.arange(len(x)) // 2],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("case", PLACE_DEPENDENT)
def test_what_depends_on_the_place_is_refused(case, dtype):
    """Also where the last layer is zero, and all outputs with it, and in more examples than are told apart."""
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (PARAMS, batch(0, 12)))

    def model(params, x):
        return PLACE_DEPENDENT[case](params, x).astype(dtype)

    for some in (params, {**params, "w_out": jnp.zeros((4, 2), dtype), "b_out": jnp.zeros(2, dtype)}):
        with pytest.raises(ValueError, match=f"{PLACED}|{MIXED}"):
            check_apply(model, some, x)


def test_rows_are_compared_at_every_call():
    """The first two examples are alike, and so are all of the first batch: only the second batch gives it away."""

    def model(params, x):
        return apply_fn(params, x - jnp.where(jnp.abs(x - x[:1]).max() > 5, x.mean(0), 0.0))

    check_apply(model, PARAMS, X)
    with pytest.raises(ValueError, match=PLACED):
        check_apply(model, PARAMS, 100 * X)


def test_every_entry_point_refuses_them_and_names_the_argument():
    for compute in (
        lambda: jacobian(softmax_over_the_batch, PARAMS, X),
        lambda: empirical_ntk(softmax_over_the_batch, PARAMS, X),
        lambda: ntk_vector_product(softmax_over_the_batch, PARAMS, np.ones(10), X),
    ):
        with pytest.raises(ValueError, match=MIXED):
            compute()


def tokens_model(params, tokens):
    return jnp.tanh(params["table"][tokens].sum(1)) @ params["out"]


def mixing_tokens_model(params, tokens):
    return tokens_model(params, tokens) * (tokens == tokens[:1]).mean(1, keepdims=True)


TOKENS = np.random.default_rng(1).integers(0, 6, (4, 3))
TABLE = {"table": np.random.default_rng(2).normal(size=(6, 4)), "out": np.random.default_rng(3).normal(size=(4, 2))}


def test_integer_inputs():
    check_apply(tokens_model, TABLE, TOKENS)
    with pytest.raises(ValueError, match=MIXED):
        check_apply(mixing_tokens_model, TABLE, TOKENS)


def test_examples_that_start_alike():
    """[x, x] and [x, x] tell nothing: a later example, or one made up, has to serve."""
    for x in (X[[0, 0, 0, 1]], X[[0, 0, 0]], X[:1], np.full((2, 3), 0.5), np.zeros((1, 3)), jnp.ones((3, 3))):
        check_apply(apply_fn, PARAMS, x)
        with pytest.raises(ValueError, match=MIXED):
            check_apply(softmax_over_the_batch, PARAMS, x)
    with pytest.raises(ValueError, match=MIXED):
        check_apply(mixing_tokens_model, TABLE, TOKENS[[0, 0, 0, 1]])


def test_one_example_of_integers_cannot_be_checked():
    """No second one is at hand; a later call with two still finds out."""
    check_apply(mixing_tokens_model, TABLE, TOKENS[:1])
    check_apply(mixing_tokens_model, TABLE, TOKENS[[0, 0]])
    with pytest.raises(ValueError, match=MIXED):
        check_apply(mixing_tokens_model, TABLE, TOKENS)


def test_inputs_of_several_leaves_and_of_random_keys():
    """Only one leaf differs, and only the model's use of another one mixes."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = {"x": np.ones((4, 3)), "step": np.arange(4), "key": keys}

    def noisy(params, x):
        return apply_fn(params, x["x"]) + jax.vmap(lambda key: jax.random.normal(key, (2,)))(x["key"])

    def mixing(params, x):
        return noisy(params, x) * jax.random.normal(x["key"][-1])

    check_apply(noisy, PARAMS, x)
    for one_leaf in (x, x | {"step": np.zeros(4)}, x | {"key": keys[jnp.zeros(4, int)]}):
        if one_leaf["step"].dtype == int:
            with pytest.raises(ValueError, match=MIXED):
                check_apply(lambda p, x: noisy(p, x) * (1 + x["step"].mean()), PARAMS, one_leaf)
    with pytest.raises(ValueError, match=MIXED):
        check_apply(mixing, PARAMS, x | {"step": np.zeros(4, int)})


# -------------------------------------------------------------------------------------------------- no false refusals


@pytest.mark.parametrize("evaluate", ["nnx", "linen"])
def test_batch_normalisation_in_evaluation_mode_passes(evaluate):
    model = NNXNorm()
    model.eval()
    model_fn, params = nnx_norm(model) if evaluate == "nnx" else linen_norm(True)
    assert jacobian(model_fn, params, X).shape[:2] == (5, 2)


def test_a_refused_model_may_be_put_right():
    """apply_fn reads a model that changes: neither a refusal nor the program of it is remembered."""
    model = NNXNorm()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def model_fn(params, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    with pytest.raises(ValueError, match=MIXED):
        jacobian(model_fn, params, X)
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert jacobian(model_fn, params, X).shape[:2] == (5, 2)


def mlp(params, x):
    for weight in params["hidden"]:
        x = jax.nn.gelu(x @ weight)
    return x @ params["out"]


def cnn(params, x):
    for weight in params["hidden"]:
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
    return normalised(x.mean((1, 2)), 1) @ params["out"]


def attention(params, x):
    for weight in params["hidden"]:
        q, k, v = jnp.split(x @ weight, 3, -1)
        x = x + jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / 8) @ v
    return x[:, -1] @ params["out"]


def scan(params, x):
    def step(hidden, x_t):
        for weight in params["hidden"]:
            hidden = jnp.tanh(hidden @ weight + x_t)
        return hidden, None

    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[0] @ params["out"]


SHAPES = {
    mlp: ([(96, 512), (512, 512)], (512, 5), (96,)),
    cnn: ([(3, 3, 3, 24), (3, 3, 24, 24)], (24, 5), (17, 17, 3)),
    attention: ([(48, 144), (48, 144)], (48, 5), (33, 48)),
    scan: ([(64, 64)], (64, 5), (20, 64)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("model", SHAPES)
def test_independent_examples_pass_to_the_last_bit(model, dtype):
    """Of sizes at which the compiler tiles and threads; where a thousandth of the mean of the batch is found."""
    hidden, out, row = SHAPES[model]
    rng = np.random.default_rng(4)

    def glorot(shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), dtype)

    params, x = {"hidden": [glorot(shape) for shape in hidden], "out": glorot(out)}, rng.normal(size=(3, *row))
    x = jnp.asarray(x, dtype)
    assert entk._checks.independence._largest_change(model, params, x) == 0
    assert entk._checks.independence._largest_change(lambda p, x: model(p, x + x.mean(0) / 64), params, x) > 0


PASSING = {
    "the same noise for each example": (lambda p, x: apply_fn(p, x) + jax.random.normal(KEY, (2,)), X),
    "NaN everywhere": (lambda p, x: apply_fn(p, x) * jnp.nan, X),
    "infinite outputs": (lambda p, x: apply_fn(p, x) * jnp.inf, X),
    "NaN in one example": (lambda p, x: jnp.log(apply_fn(p, x)), X),
    "one example at a time": (lambda p, x: jax.vmap(lambda x_i: softmax_over_the_batch(p, x_i[None])[0])(x), X),
    "a loop over examples": (lambda p, x: jax.lax.map(lambda x_i: apply_fn(p, x_i), x), X),
    "one or five examples": (lambda p, x: {1: apply_fn, 5: apply_fn}[len(x)](p, x), X),
    "one example alone": (lambda p, x: apply_fn(p, x[0])[None], X[:1]),
    "other leaves of params": (lambda p, x: apply_fn(p, x) * p["step"], X),
}  # fmt: skip


@pytest.mark.parametrize("case", PASSING)
def test_what_does_not_mix_passes(case):
    model, x = PASSING[case]
    check_apply(model, {**PARAMS, "step": 3}, x)


def test_a_model_whose_sums_come_in_any_order_passes():
    """On a GPU a scatter adds in the order of arrival: the same call twice differs in the last digits."""
    calls = iter(range(1000))

    def noise(x):
        return np.full(x.shape, 1e-15 * next(calls))

    def unsteady(params, x):
        return apply_fn(params, x) + jax.pure_callback(noise, jax.ShapeDtypeStruct((len(x), 1), x.dtype), x[:, :1])

    check_apply(unsteady, PARAMS, X)
    with pytest.raises(ValueError, match=MIXED):
        check_apply(lambda p, x: softmax_over_the_batch(p, x) + unsteady(p, x), PARAMS, X)


def test_strict_settings_of_the_caller():
    """The check is made under them, and stumbles over none."""
    params, x = jnp.ones(3), jnp.asarray(X)
    with jax.transfer_guard("disallow"):
        assert entk._checks.independence._largest_change(lambda p, x: p * x, params, x) == 0
    with jax.debug_nans(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        # The square root of the shifted parameter is NaN.
        assert entk._checks.independence._largest_change(lambda p, x: jnp.sqrt(1 - p) * x, jnp.ones(()), x) == 0
    with jax.enable_x64(False):
        assert entk._checks.independence._largest_change(apply_fn, PARAMS, X) == 0


# ----------------------------------------------------------------------------------------------------- when it is done


@pytest.fixture
def runs(monkeypatch):
    """What is checked on values, call by call."""
    checked = []
    largest_change = entk._checks.independence._largest_change

    def counted(*args):
        change = largest_change(*args)
        checked.extend([] if change is None else [args])
        return change

    monkeypatch.setattr(entk._checks.independence, "_largest_change", counted)
    return checked


def test_a_model_is_checked_once(runs, caplog):
    """Exchanged examples: not again for other values or another number of examples; again for other shapes, dtypes, or
    another model."""

    def model(params, x):
        return apply_fn(params, x)

    for seed in range(3):
        empirical_ntk(model, init(seed), batch(seed, 4 + seed), batch(seed, 3))
        ntk_vector_product(model, init(seed), np.ones(8), batch(seed, 4))
    assert len(runs) == 1
    with jax.log_compiles():
        check_apply(model, init(3), batch(3, 6))
    assert "Compiling" not in caplog.text
    check_apply(model, init(3), batch(3, 9))
    assert len(runs) == 1
    check_apply(model, init(0, inputs=4), batch(0, 5, inputs=4))
    assert len(runs) == 2
    check_apply(model, *jax.tree.map(np.float32, (PARAMS, X)))
    assert len(runs) == 3
    check_apply(functools.partial(model), PARAMS, X)
    assert len(runs) == 4


def test_it_takes_one_compilation(caplog):
    traces = []

    def model(params, x):
        traces.append(x.shape)
        return apply_fn(params, x)

    with jax.log_compiles():
        check_apply(model, PARAMS, X)
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert len([message for message in compiled if "_together_and_alone" in message]) == 1
    assert not [message for message in compiled if "lambda" in message or "model" in message]
    assert set(traces) == {(1, 3), (5, 3)}
    traces.clear()
    check_apply(model, init(1), batch(1, 5))
    assert traces == [(1, 3)]  # whether it is the function that it was


def test_only_a_few_rows_are_moved(monkeypatch):
    """Two examples of a million, whether a NumPy or a JAX array holds them."""
    moved = []
    device_put = jax.device_put

    def counted(x, *args, **kwargs):
        moved.append(sum(np.size(leaf) for leaf in jax.tree.leaves(x)))
        return device_put(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", counted)
    for x in (np.random.default_rng(0).normal(size=(1_000_000, 3)), jnp.zeros((1_000_000, 3)).at[1].set(1.0)):
        moved.clear()
        check_apply(lambda w, x: x @ w, jnp.ones(3), x)
        assert 0 < sum(moved) < 50


def test_nothing_is_run_while_jax_traces(runs):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)

    shapes = []

    def model(params, x):
        shapes.append(x.shape)
        return softmax_over_the_batch(params, x)

    def compute(params):
        return jacobian(model, params, jnp.asarray(X))

    assert jax.jit(compute)(PARAMS).shape == (5, 2, 26)
    assert jax.vmap(compute)(stacked).shape == (2, 5, 2, 26)
    assert jax.grad(lambda params: compute(params).sum())(PARAMS)["w_in"].shape == (3, 4)
    assert jax.jit(lambda: compute(PARAMS))().shape == (5, 2, 26)
    jax.eval_shape(lambda x: jacobian(model, PARAMS, x), jnp.asarray(X))
    check_apply(model, PARAMS, jax.ShapeDtypeStruct((5, 3), jnp.float64))
    assert not runs
    assert set(shapes) == {(1, 3), (5, 3)}


def test_what_apply_fn_closes_over_may_be_traced():
    """The values of params and x are at hand, those of the outputs are not; nothing of the trace is kept."""

    def compute(scale):
        return jacobian(lambda params, x: scale * softmax_over_the_batch(params, x), PARAMS, X)

    passed = dict(entk._checks.passed._PASSED)
    assert jax.jit(compute)(2.0).shape == (5, 2, 26)
    assert jax.vmap(compute)(jnp.ones(3)).shape == (3, 5, 2, 26)
    assert passed == entk._checks.passed._PASSED


def test_what_is_remembered_is_bounded():
    for _ in range(2):
        for _ in range(entk._checks.passed.MAX_PASSED):
            entk._checks.passed.remember(object())
        assert len(entk._checks.passed._PASSED) == entk._checks.passed.MAX_PASSED


ON_EIGHT_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from entk import jacobian
from entk._checks.independence import _largest_change

def model(w, x):
    return jax.numpy.tanh(x @ w)

def mixing(w, x):
    return model(w, x - x.mean(0))

w, x = np.eye(8, dtype=np.float32), np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(kind,))
    w_all, x_rows = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((w, P()), (x, P("i"))))
    with jax.set_mesh(mesh):
        assert jacobian(model, w_all, x_rows).shape == (16, 8, 64)
    print(*(_largest_change(f, w_all, x_rows) for f in (model, mixing) if kind == AxisType.Auto))
print(*(_largest_change(f, jax.device_put(w, jax.devices()[3]), x) for f in (model, mixing)))
"""


def test_arrays_over_several_devices():
    """Where rows cannot be taken out of x, as with an explicit sharding, nothing is checked."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    by_rows, explicit, by_device = (list(map(float, line.split())) for line in run.stdout.splitlines())
    assert by_rows[0] == by_device[0] == 0 < by_rows[1]
    assert by_rows[1] == pytest.approx(by_device[1], rel=1e-5)
    assert not explicit


def test_an_equinox_model_and_a_bound_method_are_checked_once(runs):
    model = eqx.nn.MLP(3, 2, 4, depth=1, dtype=jnp.float64, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def model_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    for scale in (1.0, 2.0):
        check_apply(model_fn, jax.tree.map(lambda leaf, scale=scale: scale * leaf, params), X)
    linen = nn.Dense(2, param_dtype=jnp.float64)
    variables = linen.init(jax.random.key(0), X)
    for _ in range(2):
        check_apply(linen.apply, variables, X)
    assert len(runs) == 2


# --------------------------------------------------------------------------------------------------------------- memory

VERSION_2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 40\nfile 200\n"}
VERSION_1 = {
    "memory.limit_in_bytes": "1000\n",
    "memory.usage_in_bytes": "700\n",
    "memory.stat": "inactive_file 7\ntotal_inactive_file 40\n",
}


def groups(root, membership, **folders):
    """Files as the kernel shows them; `__` in a folder's name is a slash."""
    for folder, files in folders.items():
        path = root / "mount" / folder.replace("__", "/").strip("/")
        path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (path / name).write_text(text)
    (root / "membership").write_text(membership)
    return cgroup_headroom(root / "mount", root / "membership")


@pytest.mark.parametrize(
    ("membership", "folders", "headroom"),
    [
        ("0::/job/step", {"job__step": VERSION_2}, 340),
        ("0::/job/step", {"job": VERSION_2}, 340),  # a limit of the group above
        ("0::/job/step", {"job": VERSION_2 | {"memory.max": "720"}, "job__step": VERSION_2}, 60),
        ("0::/", {"": VERSION_2}, 340),  # within a container
        ("0::/docker/of/the/host", {"": VERSION_2}, 340),
        ("0::/../../outside", {"": VERSION_2}, 340),
        ("0::/other", {"job": VERSION_2}, math.inf),
        ("0::/job", {"job": VERSION_2 | {"memory.max": "max\n"}}, math.inf),
        ("0::/job", {"job": VERSION_2 | {"memory.stat": "anon 1"}}, 300),
        ("0::/job", {"job": VERSION_2 | {"memory.current": "2000", "memory.stat": ""}}, 0),
        ("0::/job", {"job": {"memory.max": "1000"}}, math.inf),
        ("3:cpu:/job\n4:memory:/job\n0::/", {"memory__job": VERSION_1, "cpu__job": {}}, 340),
        ("4:cpu,memory:/job:with:colons", {"memory__job:with:colons": VERSION_1}, 340),
        ("4:memory:/of/the/host", {"memory": VERSION_1}, 340),
        (
            "4:memory:/job",
            {"memory__job": VERSION_1 | {"memory.limit_in_bytes": str(2**63 - 4096)}},
            2**63 - 4096 - 660,
        ),
        ("4:cpuset:/job\n1:name=systemd:/", {"memory__job": VERSION_1}, math.inf),
        ("", {"": VERSION_2}, math.inf),
        ("nonsense\n\n0::/job", {"job": VERSION_2}, 340),
        ("nonsense", {"": VERSION_2}, math.inf),
        ("0::/job", {"..": VERSION_2}, math.inf),  # above what is mounted
    ],
)
def test_memory_that_control_groups_leave(tmp_path, membership, folders, headroom):
    assert groups(tmp_path, membership, **folders) == headroom


def test_no_control_groups_at_all(tmp_path):
    assert cgroup_headroom(tmp_path / "none", tmp_path / "none either") == math.inf
    assert cgroup_headroom() > 2**20  # those of this process


def test_the_smaller_of_machine_and_control_group_is_available(monkeypatch):
    whole = entk._checks.memory.available_bytes()
    monkeypatch.setattr(entk._checks.memory, "cgroup_headroom", lambda: 12345)
    if jax.default_backend() == "cpu":
        assert entk._checks.memory.available_bytes() == 12345
        with pytest.raises(MemoryError, match=r"takes .* GiB and 0\.0 GiB are available"):
            jacobian(apply_fn, PARAMS, batch(0, 1000))
    monkeypatch.setattr(entk._checks.memory, "cgroup_headroom", lambda: math.inf)
    assert entk._checks.memory.available_bytes() > whole / 2
