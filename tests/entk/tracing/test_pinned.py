"""A function whose closure has changed gives the new value; one that has not compiles nothing."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from entk import (
    FullJacobian,
    NtkBlocks,
    NtkOperator,
    empirical_ntk,
    gradient_moments,
    jacobian,
    ntk_vector_product,
    plan,
    sharded_ntk,
    top_eigenpairs,
    trace,
)
from entk._tracing.pinned import pin
from tests.entk.mlp_oracle import apply_fn as mlp
from tests.entk.mlp_oracle import batch, init

PARAMS, X = init(0), batch(0, 5)
V = np.random.default_rng(3).normal(size=10)


class Scaled:
    def __init__(self):
        self.scale = 1.0

    def __call__(self, params, x):
        return self.scale * mlp(params, x)

    def apply(self, params, x):
        return self.scale * mlp(params, x)


def closure():
    scale = 1.0

    def apply_fn(params, x):
        return scale * mlp(params, x)

    def change():
        nonlocal scale
        scale = 3.0

    return apply_fn, change


def in_container(make, change):
    held = make()

    def apply_fn(params, x):
        return (3.0 if held.get("flag") else 1.0) * np.float64(1) * held["scale"] * mlp(params, x)

    return apply_fn, lambda: change(held)


def attribute(of):
    model = Scaled()
    return {"method": model.apply, "callable": model, "partial": functools.partial(model.apply)}[of], lambda: setattr(
        model, "scale", 3.0
    )


GLOBAL = jnp.ones(())


def reads_a_global():
    def change():
        global GLOBAL
        GLOBAL = 3 * jnp.ones(())

    return lambda params, x: GLOBAL * mlp(params, x), change


def custom_rule(kind):
    """The value stays, the derivative changes."""
    slope = [1.0]
    if kind == "jvp":
        through = jax.custom_jvp(lambda y: y)
        through.defjvp(lambda primals, tangents: (primals[0], slope[0] * tangents[0]))
    else:
        through = jax.custom_vjp(lambda y: y)
        through.defvjp(lambda y: (y, None), lambda _, ct: (slope[0] * ct,))
    return lambda params, x: through(mlp(params, x)), lambda: slope.__setitem__(0, 3.0)


def inside_a_loop():
    """A body made anew in each call; JAX keeps one that is defined outside by its identity, as it does `jax.jit`."""
    scale = [1.0]

    def apply_fn(params, x):
        return jax.lax.fori_loop(0, 2, lambda _, y: scale[0] ** 0.5 * y, mlp(params, x))

    return apply_fn, lambda: scale.__setitem__(0, 3.0)


CHANGES = {
    "a variable of the function around": closure,
    "a number in a dictionary": lambda: in_container(lambda: {"scale": 1.0}, lambda d: d.update(scale=3.0)),
    "a flag": lambda: in_container(lambda: {"scale": 1.0, "flag": False}, lambda d: d.update(flag=True)),
    "a NumPy array in place": lambda: in_container(
        lambda: {"scale": np.ones(2)}, lambda d: d["scale"].__setitem__(slice(None), 3.0)
    ),
    "a JAX array in a dictionary": lambda: in_container(
        lambda: {"scale": jnp.ones(2)}, lambda d: d.update(scale=jnp.full(2, 3.0))
    ),
    "an attribute behind a method": lambda: attribute("method"),
    "an attribute of a callable object": lambda: attribute("callable"),
    "an attribute behind a partial": lambda: attribute("partial"),
    "a global": reads_a_global,
    "the rule of custom_jvp": lambda: custom_rule("jvp"),
    "the rule of custom_vjp": lambda: custom_rule("vjp"),
    "a number inside of a loop": inside_a_loop,
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_kernel_follows_what_the_function_reads(case, caplog):
    apply_fn, change = CHANGES[case]()
    before = empirical_ntk(apply_fn, PARAMS, X)
    with jax.log_compiles():
        np.testing.assert_array_equal(empirical_ntk(apply_fn, PARAMS, X), before)
    assert "Compiling" not in caplog.text
    change()
    after = empirical_ntk(apply_fn, PARAMS, X)
    np.testing.assert_allclose(after, 9 * before, rtol=1e-10)


def entries(apply_fn):
    def losses(params, x):
        return apply_fn(params, x).sum(1)

    mesh = jax.make_mesh((1,), ("i",))
    return {
        "empirical_ntk": (2, lambda: empirical_ntk(apply_fn, PARAMS, X, X[:2])),
        "FullJacobian": (2, lambda: empirical_ntk(apply_fn, PARAMS, X, strategy=FullJacobian())),
        "inside jit": (2, lambda: jax.jit(lambda params: empirical_ntk(apply_fn, params, X))(PARAMS)),
        "sharded_ntk": (2, lambda: sharded_ntk(apply_fn, PARAMS, X, mesh=mesh, axis="i")),
        "NtkBlocks": (2, lambda: NtkBlocks(apply_fn, PARAMS, X, block_size=2)[1].values),
        "jacobian": (1, lambda: jacobian(apply_fn, PARAMS, X)),
        "ntk_vector_product": (2, lambda: ntk_vector_product(apply_fn, PARAMS, V, X)),
        "as_matrix": (2, lambda: NtkOperator(apply_fn, PARAMS, X, preconditioner=PARAMS_OF_ONES).as_matrix()),
        "top_eigenpairs": (
            2,
            lambda: top_eigenpairs(NtkOperator(apply_fn, PARAMS, X), 2, key=jax.random.key(0)).values,
        ),
        "trace": (2, lambda: trace(NtkOperator(apply_fn, PARAMS, X), key=jax.random.key(0)).value),
        "gradient_moments": (1, lambda: gradient_moments(losses, PARAMS, X).mean_grads["w_in"]),
    }


PARAMS_OF_ONES = jax.tree.map(jnp.ones_like, PARAMS)


@pytest.mark.parametrize("entry", entries(mlp))
def test_every_entry_follows(entry):
    apply_fn, change = closure()
    power, compute = entries(apply_fn)[entry]
    before = np.asarray(compute())
    change()
    np.testing.assert_allclose(compute(), 3.0**power * before, rtol=1e-10, atol=1e-12)


def test_the_plan_follows():
    layers = [True]

    def apply_fn(params, x):
        return mlp(params, x) if layers[0] else x @ params["w_in"][:, :2] + params["b_out"]

    before = plan(apply_fn, PARAMS, X)
    layers[0] = False
    assert {leaf.names for leaf in plan(apply_fn, PARAMS, X).leaves} != {leaf.names for leaf in before.leaves}


def test_an_operator_is_the_function_it_was_made_of():
    """Compiled products keep it; a program that is needed later is refused, rather than made of another function."""
    apply_fn, change = closure()
    operator = NtkOperator(apply_fn, PARAMS, X)
    blocks = NtkBlocks(apply_fn, PARAMS, X, block_size=2)
    before, first = operator.mv(V), blocks[1].values
    change()
    np.testing.assert_array_equal(operator.mv(V), before)
    np.testing.assert_array_equal(blocks[1].values, first)
    for compute in (lambda: operator.mv(np.stack([V, V, V], 1)), lambda: blocks[len(blocks) - 1]):
        with pytest.raises(RuntimeError, match=r"apply_fn has changed since .*Make the operator, .* anew"):
            compute()
    np.testing.assert_allclose(NtkOperator(apply_fn, PARAMS, X).mv(V), 9 * before, rtol=1e-10)
    np.testing.assert_array_equal(operator.mv(V), before)


def test_an_operator_of_the_callers_own_follows():
    matrix = np.diag(np.arange(1.0, 5.0))
    operator = types.SimpleNamespace(mv=lambda v: jnp.asarray(matrix) @ v, shape=(4, 4), dtype=jnp.float64)
    assert trace(operator, key=jax.random.key(0)).value == pytest.approx(10.0)
    matrix *= 2
    assert trace(operator, key=jax.random.key(0)).value == pytest.approx(20.0)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def test_batch_statistics_that_have_moved():
    """README's recipe for Flax NNX, and Linen's statistics in a dictionary that is changed in place."""
    model, x = Net(), jnp.asarray(X, jnp.float32)
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    before = empirical_ntk(apply_fn, params, x)
    model.train()
    model(3 + 2 * x)
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    after = empirical_ntk(apply_fn, params, x)
    assert abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(after, empirical_ntk(lambda p, x: nnx.merge(graph, p, rest)(x), params, x))

    norm = nn.BatchNorm(use_running_average=True)
    variables = dict(norm.init(jax.random.key(0), x))

    def linen(params, x):
        return norm.apply({**variables, "params": params}, x)

    before = empirical_ntk(linen, variables["params"], x)
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 1, variables["batch_stats"])
    assert abs(empirical_ntk(linen, variables["params"], x) - before).max() > 1e-3


def test_a_weight_in_a_loss():
    weight = {"decay": 0.0}

    def losses(params, x):
        return mlp(params, x).sum(1) + weight["decay"] * (params["w_in"] ** 2).sum()

    before = gradient_moments(losses, PARAMS, X).mean_grads["w_in"]
    weight["decay"] = 0.5
    after = gradient_moments(losses, PARAMS, X).mean_grads["w_in"]
    np.testing.assert_allclose(after - before, PARAMS["w_in"], rtol=1e-10)


@pytest.mark.parametrize(
    "pair", [(0.0, -0.0), (1.0, float("nan")), (1, 1.0), (1, True), (np.float32(1), np.float64(1))]
)
def test_constants_that_python_takes_for_equal_or_unequal(pair):
    held = [pair[0]]

    def model(params, x):
        return jnp.asarray(x @ params) / held[0] if held[0] == held[0] else x @ params

    arguments = jnp.ones(3, jnp.float32), jnp.ones((1, 3), jnp.float32)
    before = pin(model, arguments)
    assert before == pin(model, arguments)
    held[0] = pair[1]
    assert before != pin(model, arguments) or pair[0] is not pair[1]


def test_nothing_of_a_trace_is_kept_or_taken_for_equal():
    """Two traces of one function over tracers of equal type are two functions."""

    def compute(scale):
        pinned = pin(lambda params, x: scale * mlp(params, x), (PARAMS, X[:1]))
        assert pinned.is_traced
        return empirical_ntk(lambda params, x: scale * mlp(params, x), PARAMS, X)

    for scale in (1.0, 2.0):
        np.testing.assert_allclose(jax.jit(compute)(scale), scale**2 * empirical_ntk(mlp, PARAMS, X), rtol=1e-10)
    each = jax.vmap(compute)(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(each[1], 9 * each[0], rtol=1e-10)
