"""Models with operations that JAX cannot batch, against gradients of one output of one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from entk import FullJacobian, NtkOperator, empirical_ntk, gradient_moments, jacobian, plan
from entk._batching import map_examples
from entk._tracing.jaxpr import CALLS, called
from tests.entk.mlp_oracle import assert_close

N, C = 3, 2


def experts(params, x):
    """A mixture of experts, which `jax.lax.ragged_dot` multiplies group by group."""
    hidden = x.reshape(-1, 4)
    expert = jnp.argmax(hidden @ params["router"], 1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=3).astype(jnp.int32)
    mixed = lax.ragged_dot(hidden[order], params["experts"], sizes)[jnp.argsort(order)]
    return jnp.sin(mixed.reshape(x.shape).mean(1)[:, :C] + params["bias"])


@jax.custom_jvp
def sine_on_the_host(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@sine_on_the_host.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return sine_on_the_host(x), jax.pure_callback(np.cos, jax.ShapeDtypeStruct(x.shape, x.dtype), x) * dx


def callback(params, x):
    return sine_on_the_host(jnp.tanh(x.mean(1) @ params["router"])[:, :C] + params["bias"])


def ordered(params, x):
    two = io_callback(lambda _: np.float64(2), jax.ShapeDtypeStruct((), jnp.float64), x, ordered=True)
    return jnp.sin(two * (x.mean(1) @ params["router"])[:, :C] + params["bias"])


def linear_call(params, x):
    hidden = x.mean(1) @ params["router"]
    squares = jax.custom_derivatives.linear_call(lambda r, y: r * y, lambda r, y: r * y, x.mean(1)[:, :3], hidden)
    return jnp.sin(squares[:, :C] + params["bias"])


MODELS = {function.__name__: function for function in (experts, callback, ordered, linear_call)}


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_right_where_examples_cannot_be_batched(name):
    apply_fn, rng = MODELS[name], np.random.default_rng(0)
    params = {"router": rng.normal(size=(4, 3)), "experts": rng.normal(size=(3, 4, 4)), "bias": rng.normal(size=C)}
    x = rng.normal(size=(N, 5, 4))
    gradient = jax.jit(jax.grad(lambda params, x_i, weights: (apply_fn(params, x_i)[0] * weights).sum()))
    trees = [gradient(params, x[i : i + 1], np.eye(C)[a]) for i in range(N) for a in range(C)]
    jac = np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in trees])
    kernel, close = jac @ jac.T, 1e-12

    for size in (None, 2):
        assert_close(jacobian(apply_fn, params, x, microbatch_size=size), jac.reshape(N, C, -1), close)
        assert_close(empirical_ntk(apply_fn, params, x, strategy=FullJacobian(microbatch_size=size)), kernel, close)
        operator = NtkOperator(apply_fn, params, x, microbatch_size=size, probe_batch_size=size)
        probes = rng.normal(size=(N * C, 3))
        assert_close(operator.mv(probes[:, 0]), kernel @ probes[:, 0], close)
        assert_close(operator.mv(probes), kernel @ probes, close)
        moments = gradient_moments(lambda params, x: apply_fn(params, x).sum(1), params, x, microbatch_size=size)
        each = jac.reshape(N, C, -1).sum(1)
        mean, spread = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in moments[:2])
        assert_close(mean, each.mean(0), close)
        assert_close(spread, ((each - each.mean(0)) ** 2).sum(0), close)
    assert_close(empirical_ntk(apply_fn, params, x), kernel, close)
    assert_close(empirical_ntk(apply_fn, params, x[:2], x), kernel[: 2 * C], close)
    assert ("ragged_dot" in str(plan(apply_fn, params, x))) == (name == "experts")


def test_what_can_be_batched_is():
    """And an attempt that fails leaves nothing behind: the rows are printed once."""
    batched = jax.make_jaxpr(lambda x: map_examples(jnp.sin, x, None))(jnp.ones((3, 2)))
    equations = batched.jaxpr.eqns
    while equations[0].primitive.name in CALLS:  # which newer releases inline later
        equations = called(equations[0]).jaxpr.eqns
    assert [eqn.primitive.name for eqn in equations] == ["sin"]
    seen = []

    @jax.jit
    def apply(x):
        def row(x_i):
            jax.debug.callback(lambda x_i: seen.append(x_i.shape), x_i)
            return lax.ragged_dot(x_i, jnp.ones((1, 2, 2)), jnp.array([3], jnp.int32))

        return map_examples(row, x, None)

    jax.block_until_ready(apply(jnp.ones((4, 3, 2))))
    jax.effects_barrier()
    assert seen == [(3, 2)] * 4


def test_errors_of_the_function_itself_are_its_own():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        map_examples(lambda x: jnp.ones((3, 3)) @ x, jnp.ones((3, 2)), None)
    with pytest.raises(ValueError, match="no good"):
        map_examples(lambda x: (_ for _ in ()).throw(ValueError("no good")), jnp.ones((3, 2)), None)
