"""One-line recipes: a model of each library as `apply_fn(params, x)`. And the zoo: models of every kind.

Each recipe function holds what a user types. It is checked twice: its kernel, which does not depend on the order of the
parameters, against NumPy's for the same weights; its Jacobian against finite differences, which see the order too.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from entk import FullJacobian, empirical_ntk, jacobian, ntk_vector_product
from entk._parameters import differentiable
from tests.entk.mlp_oracle import assert_close, batch, kernel_by_hand
from tests.entk.model_zoo import ZOO

X = batch(0, 5)


def weights(w_in, b_in, w_out, b_out):
    return {"w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out}


# -------------------------------------------------------------------------------------------------------- the recipes


def plain_jax():
    keys = jax.random.split(jax.random.key(0), 2)
    params = [
        {"w": jax.random.normal(keys[0], (3, 4)), "b": jnp.zeros(4)},
        {"w": jax.random.normal(keys[1], (4, 2)), "b": jnp.zeros(2)},
    ]

    def apply_fn(params, x):
        hidden = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
        return hidden @ params[1]["w"] + params[1]["b"]

    first, second = params
    return apply_fn, params, weights(first["w"], first["b"], second["w"], second["b"])


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, param_dtype=jnp.float64, rngs=rngs)
        self.out = nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def flax_nnx():
    model = NNXModel(nnx.Rngs(0))

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    hidden, out = (nnx.to_pure_dict(params)[name] for name in ("hidden", "out"))
    return apply_fn, params, weights(hidden["kernel"], hidden["bias"], out["kernel"], out["bias"])


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(4, param_dtype=jnp.float64)(x))
        return nn.Dense(2, param_dtype=jnp.float64)(hidden)


def flax_linen():
    model = LinenModel()

    params = model.init(jax.random.key(0), X)
    apply_fn = model.apply

    first, second = params["params"]["Dense_0"], params["params"]["Dense_1"]
    return apply_fn, params, weights(first["kernel"], first["bias"], second["kernel"], second["bias"])


def equinox():
    model = eqx.nn.MLP(3, 2, 4, depth=1, activation=jnp.tanh, dtype=jnp.float64, key=jax.random.key(0))

    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    first, second = model.layers
    return apply_fn, params, weights(first.weight.T, first.bias, second.weight.T, second.bias)


def haiku():
    def forward(x):
        hidden = jnp.tanh(hk.Linear(4)(x))
        return hk.Linear(2)(hidden)

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), X)
    apply_fn = model.apply

    first, second = params["linear"], params["linear_1"]
    return apply_fn, params, weights(first["w"], first["b"], second["w"], second["b"])


RECIPES = [plain_jax, flax_nnx, flax_linen, equinox, haiku]


# ---------------------------------------------------------------------------------------------------------- the checks


def finite_differences(apply_fn, params, x, step=1e-5):
    """Central differences, one parameter at a time in `ravel_pytree` order."""
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def outputs(shift):
        return apply_fn(unravel(flat + shift), x)

    shifts = step * jnp.eye(len(flat))
    columns = [(outputs(shift) - outputs(-shift)) / (2 * step) for shift in shifts]
    return np.moveaxis(np.asarray(columns), 0, -1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe):
    apply_fn, params, arrays = recipe()
    arrays = jax.tree.map(np.asarray, arrays)
    kernel = kernel_by_hand(arrays, X, X)
    assert_close(empirical_ntk(apply_fn, params, X), kernel)
    assert_close(empirical_ntk(apply_fn, params, X, strategy=FullJacobian(microbatch_size=2)), kernel)
    assert_close(ntk_vector_product(apply_fn, params, np.arange(10.0), X), kernel @ np.arange(10.0))
    assert_close(jacobian(apply_fn, params, X), finite_differences(apply_fn, params, X), 1e-8)


def test_a_bound_method_is_compiled_once(caplog):
    """`model.apply` is a new object at every mention; it must still count as the same function."""
    model = LinenModel()
    params = model.init(jax.random.key(0), X)
    jacobian(model.apply, params, X)
    with jax.log_compiles():
        jacobian(model.apply, params, X)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


class Regularised(nnx.Module):
    """Batch statistics and dropout: state that is not differentiated, used in evaluation mode."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (2, 2), param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(2, param_dtype=jnp.float64, dtype=jnp.float64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(18, 2, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        hidden = self.dropout(jnp.tanh(self.norm(self.conv(x))))
        return self.out(hidden.reshape(len(x), -1))


def test_nnx_keeps_batch_statistics_and_random_state_out_of_the_parameters():
    model = Regularised(nnx.Rngs(0))
    model.eval()
    images = batch(1, 4, 9).reshape(4, 3, 3, 1)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    jac = jacobian(apply_fn, params, images, microbatch_size=3)
    assert jac.shape == (4, 2, (4 * 2 + 2) + 2 * 2 + (18 * 2 + 2))
    assert_close(jac, finite_differences(apply_fn, params, images), 1e-8)
    batched_state = nnx.split(model)[1]
    with pytest.raises(TypeError, match=r"params mixes dtypes: .*params\['norm'\]\['mean'\]"):
        jacobian(lambda state, x: nnx.merge(graphdef, state)(x), batched_state, images)


def test_nnx_random_state_may_stay_with_the_parameters():
    """Its keys and counters are constants; flax leaves the choice of what is split off to the user."""
    model = Regularised(nnx.Rngs(0))
    model.eval()
    images = batch(1, 4, 9).reshape(4, 3, 3, 1)
    graphdef, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rest)} > {"uint32"}  # a counter and a key
    alone = jacobian(lambda params, x: nnx.merge(graphdef, params, statistics, rest)(x), params, images)
    together = nnx.merge_state(params, rest)
    assert_close(jacobian(lambda state, x: nnx.merge(graphdef, state, statistics)(x), together, images), alone)


def test_an_equinox_model_passed_whole_is_told_to_partition():
    model = eqx.nn.MLP(3, 2, 4, depth=1, dtype=jnp.float64, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"params\.activation is .*, not an array: .*equinox\.partition"):
        jacobian(lambda model, x: jax.vmap(model)(x), model, X)


# ------------------------------------------------------------------------------------------------------------- the zoo

ROUNDED = {"nnx_attention", "weight_cast"}  # to float32 on the way, as small steps would show
UNSEEN = {"frozen_parameters", "weight_through_bfloat16"}  # where the derivative asked for is not that of the values
SYMMETRIC_BLOCKS = {"linear_without_bias", "one_output_without_an_axis"}


@pytest.mark.parametrize("model", ZOO, ids=lambda model: model.name)
def test_zoo(model):
    """The Jacobian along a direction is the slope of the outputs; and the model is one on which faults show."""
    apply_fn, params, x1, x2 = model.build()
    x = jax.tree.map(lambda a, b: np.concatenate([a, b]), x1, x2)
    leaves, rebuild = differentiable(params)
    direction = [np.random.default_rng(i).normal(size=leaf.shape) for i, leaf in enumerate(leaves)]
    step, tolerance = (1e-3, 1e-3) if model.name in ROUNDED else (1e-6, 1e-7)

    def outputs(leaves):
        return apply_fn(rebuild(leaves), x).reshape(7, -1)

    @jax.jit  # one program for everything
    def compute(leaves):
        if model.name in UNSEEN:
            slope = jax.jvp(outputs, (leaves,), (direction,))[1]
        else:
            ahead, behind = (
                [w + sign * step * dw for w, dw in zip(leaves, direction, strict=True)] for sign in (1, -1)
            )
            slope = (outputs(ahead) - outputs(behind)) / (2 * step)
        return jacobian(apply_fn, rebuild(leaves), x), slope

    jac, slope = map(np.asarray, compute(leaves))
    n, c, p = jac.shape
    along = jac @ np.concatenate([leaf.ravel() for leaf in direction])
    assert_close(along, slope, 1e-2 if "bfloat16" in model.name else tolerance)
    assert n == 7
    assert c <= 5
    assert p <= 2000
    assert len({row.tobytes() for row in jac}) == 7
    kernel = np.einsum("iap,jbp->iajb", jac[:3], jac[3:])
    asymmetry = np.abs(kernel - kernel.swapaxes(1, 3)).max() / np.abs(kernel).max()
    assert (asymmetry > 1e-3) == (model.name not in SYMMETRIC_BLOCKS)


def test_the_zoo_is_the_same_every_time_and_of_the_dtype_asked_for():
    assert len({model.name for model in ZOO}) == len(ZOO)
    for model in ZOO:
        (apply_fn, *first), (_, *second) = (model.build(jnp.float32) for _ in range(2))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            assert a.dtype == b.dtype
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(a, b)
                assert a.dtype in (jnp.float32, jnp.int32, jnp.int64, jnp.bool)
        params, x1, x2 = first
        assert jax.eval_shape(apply_fn, params, x1).dtype == jnp.float32
        assert (len(jax.tree.leaves(x1)[0]), len(jax.tree.leaves(x2)[0])) == (3, 4)
