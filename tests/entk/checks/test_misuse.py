"""Arguments of other kinds than those meant are told by name, with the remedy."""

import subprocess
import sys
import types

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import entk._checks.memory
from entk import NtkOperator, empirical_ntk, gradient_moments, jacobian
from entk._checks.rlimit import rlimit_headroom
from tests.entk.mlp_oracle import apply_fn as mlp
from tests.entk.mlp_oracle import batch, init

PARAMS, X = init(0), batch(0, 5)
KEY = jax.random.key(0)


def of_library(module, name, **attributes):
    """An instance of a class of another library, which need not be installed."""
    return type(name, (), {"__module__": module, **attributes})()


TORCH = of_library("torch", "Tensor", shape=(5, 3), dtype="torch.float32")
FRAME = of_library("pandas.core.frame", "DataFrame", shape=(5, 3))
SERIES = of_library("pandas.core.series", "Series", shape=(5,), dtype=np.dtype(float))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (TORCH, r"x1? is a torch Tensor, but must be an array.*jnp\.asarray\(tensor\.detach\(\)\.cpu\(\)\.numpy\(\)\)"),
        (FRAME, r"x1? is a pandas DataFrame.*frame\.to_numpy"),
        ((X, SERIES), r"x1?\[1\] is a pandas Series.*to_numpy"),
        (np.ma.masked_invalid(X), r"MaskedArray.*mask would be dropped"),
        (np.array([["a", "b"]] * 5), r"array of dtype <U1, but must hold numbers: encode text"),
        (np.array([[None, 1.0]] * 5, object), r"array of dtype object, but must hold numbers.*jnp\.stack"),
        (np.array(["2026-01-01"] * 5, "datetime64[D]"), r"dtype datetime64\[D\], but must hold numbers"),
    ],
)
def test_inputs_of_other_libraries(x, message):
    for call in (empirical_ntk, jacobian, NtkOperator):
        with pytest.raises(TypeError, match=message):
            call(mlp, PARAMS, x)
    with pytest.raises(TypeError, match=message.replace("x1?", "batch")):
        gradient_moments(lambda params, x: mlp(params, x).sum(1), PARAMS, x)


def test_parameters_of_other_libraries():
    with pytest.raises(TypeError, match=r"params\['w_in'\] is a torch Tensor.*numpy\(\)"):
        empirical_ntk(mlp, {**PARAMS, "w_in": TORCH}, X)
    model = eqx.nn.MLP(3, 2, 4, depth=1, key=KEY)
    with pytest.raises(TypeError, match=r"params\.activation.* is .*, not an array: .*equinox\.partition"):
        empirical_ntk(lambda model, x: jax.vmap(model)(x), model, X)


def haiku_model():
    return hk.transform(lambda x: hk.Linear(2)(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), r"apply_fn is a flax Linear, .*nnx\.split\(.*nnx\.merge\(graphdef"),
        (nn.Dense(2), r"apply_fn is a flax Dense, .*model\.apply\(params, x\)"),
        (eqx.nn.MLP(3, 2, 4, depth=1, key=KEY), r"apply_fn is a equinox MLP, .*equinox\.partition\(.*equinox\.combine"),
        (haiku_model(), r"apply_fn is a haiku Transformed, .*haiku\.without_apply_rng\(transformed\)\.apply"),
        (haiku_model().apply, r"apply_fn\(params, rng.*\) takes a random key in the place of x.*without_apply_rng"),
        ((init, mlp), r"must be a function \(params, x\) -> outputs; .*pass its function apply"),
        (PARAMS, r"apply_fn=\{.*must be a function \(params, x\) -> outputs; it comes before params"),
        (
            type("Net", (type("Module", (), {"__module__": "torch.nn.modules.module"}),), {"__call__": lambda *a: 0})(),
            r"apply_fn is a .*Net, .*parameters of torch are not differentiated by JAX",
        ),
    ],
)
def test_models_in_the_place_of_a_function(model, message):
    for call in (empirical_ntk, jacobian, NtkOperator):
        with pytest.raises(TypeError, match=message):
            call(model, PARAMS, X)


def test_functions_of_libraries_pass():
    """Wrappers are objects of a library as well; haiku's without a key is what the message recommends."""
    assert jacobian(eqx.filter_jit(mlp), PARAMS, X).shape == (5, 2, 26)
    assert jacobian(nnx.jit(mlp), PARAMS, X).shape == (5, 2, 26)
    model = hk.without_apply_rng(haiku_model())
    x = jnp.asarray(X, jnp.float32)
    assert jacobian(model.apply, model.init(KEY, x), x).shape == (5, 2, 8)


def test_exchanged_arguments():
    with pytest.raises(TypeError, match=r"params and x1 seem to be exchanged: .*Write \(apply_fn, params, x1\)"):
        empirical_ntk(mlp, X, PARAMS)
    with pytest.raises(TypeError, match=r"must be a function \(params, x\) -> outputs; it comes before params"):
        empirical_ntk(PARAMS, mlp, X)


def test_other_features():
    for x2 in (np.ones((4, 4)), np.ones((4, 2))):
        with pytest.raises(ValueError, match=r"apply_fn takes examples of x1, float64\(3,\), and fails on those of x2"):
            empirical_ntk(mlp, PARAMS, X, x2)
    assert empirical_ntk(lambda w, x: x.sum(1) * w, jnp.ones(()), X, np.ones((4, 7))).shape == (5, 4)


def test_a_list_of_examples():
    with pytest.raises(TypeError, match=r"x1 is a list of 5 arrays, .*pass jnp\.stack\(x1\)"):
        empirical_ntk(mlp, PARAMS, list(X))


def test_an_nnx_model_in_training_mode():
    """The three-way split closes over statistics that batch normalisation writes: refused, in words."""
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    with pytest.raises(ValueError, match=r"model\.eval\(\) before flax\.nnx\.split"):
        empirical_ntk(lambda p, x: nnx.merge(graph, p, rest)(x), params, jnp.asarray(X, jnp.float32))


# --------------------------------------------------------------------------------------------------- limits of memory


def test_limits_of_the_process(monkeypatch):
    resource = types.SimpleNamespace(RLIMIT_AS=1, RLIMIT_DATA=2, RLIM_INFINITY=-1)
    used = types.SimpleNamespace(vms=700, data=100)
    monkeypatch.setattr("entk._checks.rlimit.resource", resource)
    monkeypatch.setattr("psutil.Process", lambda: types.SimpleNamespace(memory_info=lambda: used))
    for space, data, left in ((1000, -1, 300), (-1, 150, 50), (1000, 150, 50), (500, -1, 0), (-1, -1, float("inf"))):
        resource.getrlimit = lambda which, space=space, data=data: ((space, data)[which - 1], -1)
        assert rlimit_headroom() == left
    monkeypatch.setattr("entk._checks.rlimit.resource", None)
    assert rlimit_headroom() == float("inf")
    monkeypatch.setattr(entk._checks.memory, "rlimit_headroom", lambda: 4321)
    if jax.default_backend() == "cpu":
        assert entk._checks.memory.available_bytes() == 4321


UNDER_A_LIMIT = """
import resource
import jax, jax.numpy as jnp
from entk import empirical_ntk
w, x = jnp.ones(3), jnp.ones((20_000, 3))
empirical_ntk(lambda w, x: x @ w, w, x[:2])
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, -1))
try:
    empirical_ntk(lambda w, x: x @ w, w, x)
except MemoryError as error:
    print(error)
"""


def test_a_kernel_beyond_the_limit_of_the_process_is_refused():
    run = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], capture_output=True, text=True, check=False)
    assert "the 20000 x 20000 kernel in float32 takes 1.5 GiB and 0." in run.stdout, run.stderr
    assert "of the 20,000 examples would fit." in run.stdout
    assert "NtkOperator, which never forms it" in run.stdout


# ------------------------------------------------------------------------------------------------------ strict settings


def conv(params, x):
    x = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(x.mean((1, 2)) + params["b"][None]) @ params["w"]


def tokens(params, x):
    return jnp.tanh(params["table"][x].sum(1) + params["b"][None]) @ params["w"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("model", [conv, tokens])
def test_strict_promotion(model, dtype):
    rng = np.random.default_rng(0)
    shapes = {"k": (3, 3, 2, 4), "table": (7, 4), "b": (4,), "w": (4, 2)}
    del shapes["table" if model is conv else "k"]
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 5, 5, 2)), dtype) if model is conv else jnp.asarray(rng.integers(0, 7, (4, 3)))
    expected = empirical_ntk(model, params, x)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(empirical_ntk(model, params, x), expected)
        assert jacobian(model, params, x).shape[:2] == (4, 2)
        gradient_moments(lambda params, x: model(params, x).sum(1), params, x, microbatch_size=3)
        NtkOperator(model, params, x, microbatch_size=3).mv(jnp.ones((8, 2), dtype))
        with pytest.raises((TypeError, ValueError), match="promotion"):
            empirical_ntk(lambda p, x: model(p, x) + p["b"][0] * np.ones(2, np.float16)[:, None].sum(0), params, x)
