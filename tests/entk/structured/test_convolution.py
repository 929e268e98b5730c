"""The input gradient of convolutions, against JAX's own; derivatives of kernels through it."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from entk import JacobianBlocks, Structured, empirical_ntk
from entk._structured.convolution import convolution
from tests.entk.mlp_oracle import assert_close

LAYOUTS = {1: [("NHC", "HIO", "NHC"), ("NCH", "OIH", "NHC")], 2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "IOWH", "CNHW")]}


@st.composite
def problems(draw):
    """Arguments of conv_general_dilated that give at least one output pixel."""
    rank = draw(st.sampled_from([1, 2]))
    sizes = [draw(st.integers(3, 8)) for _ in range(rank)]
    kernel = [draw(st.integers(1, min(4, size))) for size in sizes]
    strides = [draw(st.integers(1, 4)) for _ in range(rank)]
    explicit = [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(rank)]
    padding = draw(st.sampled_from(["SAME", "VALID", explicit]))
    return sizes, kernel, strides, padding, draw(st.sampled_from(LAYOUTS[rank])), draw(st.sampled_from([1, 1, 2]))


@settings(max_examples=25)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_it_is_the_transpose(problem, seed):
    sizes, kernel, strides, padding, layout, groups = problem
    rng = np.random.default_rng(seed)
    space, taps = dict(zip("HW", sizes, strict=False)), dict(zip("HW", kernel, strict=False))
    x = jnp.array(rng.normal(size=[{"N": 2, "C": 2 * groups, **space}[axis] for axis in layout[0]]))
    w = jnp.array(rng.normal(size=[{"I": 2, "O": 3 * groups, **taps}[axis] for axis in layout[1]]))

    def plain(x):
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, feature_group_count=groups)

    (eqn,) = [eqn for eqn in jax.make_jaxpr(plain)(x).eqns if eqn.primitive.name == "conv_general_dilated"]
    out, expected = jax.vjp(plain, x)
    same, found = jax.vjp(lambda x: convolution(eqn, x, w), x)
    assert_close(same, out, 1e-14)
    cotangent = jnp.array(rng.normal(size=out.shape))
    assert_close(found(cotangent)[0], expected(cotangent)[0], 1e-12)


def cnn(params, x):
    hidden = jnp.tanh(lax.conv_general_dilated(x, params["first"], (1, 1), "SAME", dimension_numbers=LAYOUTS[2][0]))
    hidden = jnp.tanh(
        lax.conv_general_dilated(hidden, params["second"], (2, 2), "SAME", dimension_numbers=LAYOUTS[2][0])
    )
    return hidden.reshape(len(x), -1) @ params["last"]


def test_kernels_of_convolutions_are_differentiated_in_both_modes():
    """Convolutions that depend on parameters before them, and one that does not."""
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 3, 1, 2), "second": (3, 3, 2, 2), "last": (8, 2)}
    params = {name: jnp.array(rng.normal(size=shape)) for name, shape in shapes.items()}
    x, weights = jnp.array(rng.normal(size=(3, 4, 4, 1))), rng.normal(size=(6, 6))
    strategy = Structured(contractions=(JacobianBlocks(),))

    def value(params):
        return (weights * empirical_ntk(cnn, params, x, strategy=strategy)).sum()

    def by_hand(params):
        jac = jax.jacobian(lambda params: cnn(params, x).ravel())(params)
        rows = jnp.concatenate([leaf.reshape(6, -1) for leaf in jax.tree.leaves(jac)], axis=1)
        return (weights * (rows @ rows.T)).sum()

    expected, found = jax.grad(by_hand)(params), jax.grad(value)(params)
    for name in params:
        assert_close(found[name], expected[name], 1e-10)
    direction = {name: jnp.array(rng.normal(size=shape)) for name, shape in shapes.items()}
    slope = jax.jvp(value, (params,), (direction,))[1]
    assert_close(slope, sum((expected[name] * direction[name]).sum() for name in params), 1e-10)
