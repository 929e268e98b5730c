"""Every rule of the factored contraction over dtypes, ranks and operand orders, against autodiff, to the last bit.

All numbers are small integers, so that every product and sum is exact in every dtype. All cases are one model whose
outputs stand side by side: a leaf moves the outputs of its own case alone, and a fault shows in that case's block.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from entk import JacobianBlocks, PositionPairs, Structured, empirical_ntk, gradient_moments, plan

N = 4
STRATEGIES = [Structured(contractions=(one,)) for one in (PositionPairs(), JacobianBlocks())]
INTEGERS = [jnp.uint8, jnp.int8, jnp.uint16, jnp.int16, jnp.uint32, jnp.int32, jnp.uint64, jnp.int64]

# Einsum of the input and the weight: scalars, vectors, batch axes, free axes on either side, several contracted axes.
PATTERNS = ["nd,d", "nd,dh", "nd,hd", "ntd,dh", "ntd,tdh", "nd,edh", "ntd,td", "nd,dgh", "n,h", "n,", "nd,"]


def small(rng, shape, dtype):
    return jnp.asarray(rng.integers(0, 2 if dtype is bool else 4, shape), dtype)


def side_by_side(cases, params, x):
    """The outputs of all cases, (n, c)."""
    outputs = [case(params[name], x[name]) for name, (case, *_) in cases.items()]
    return jnp.concatenate([out.reshape(out.shape[0], -1) for out in outputs], axis=1)


def check(cases, dtype, exact=True):
    """Kernels by every strategy, and gradient moments, against a Jacobian that JAX makes of one output at a time.

    A case is (function of its parameters and inputs, shapes of the parameters, inputs, why they are left to autodiff).
    """
    rng = np.random.default_rng(0)
    params = {name: [small(rng, shape, dtype) + 1 for shape in shapes] for name, (_, shapes, _, _) in cases.items()}
    x = {name: inputs for name, (_, _, inputs, _) in cases.items()}
    apply_fn = partial(side_by_side, cases)
    width = jax.eval_shape(apply_fn, params, x).shape[1]
    weights = jnp.asarray(1 + np.arange(width) % 3, dtype)

    def losses(params, x):
        return apply_fn(params, x) @ weights

    @jax.jit
    def everything(params, x):
        def one(params, x_i):
            return apply_fn(params, jax.tree.map(lambda leaf: leaf[None], x_i))[0]

        jac = lax.map(lambda x_i: jax.jacrev(one)(params, x_i), x)
        return (
            jac,
            [empirical_ntk(apply_fn, params, x, strategy=strategy) for strategy in STRATEGIES],
            gradient_moments(losses, params, x, microbatch_size=2),
        )

    jac, kernels, moments = jax.device_get(everything(params, x))
    rows = [np.asarray(leaf, np.float64).reshape(N * width, -1) for leaf in jax.tree.leaves(jac)]
    expected = sum(leaf @ leaf.T for leaf in rows)
    compare = np.testing.assert_array_equal if exact else partial(np.testing.assert_allclose, rtol=1e-6)
    with np.errstate(invalid="ignore"):
        for kernel in kernels:
            compare(kernel, expected, err_msg=f"outputs of {owners(cases, params, x)}")
    gradients = [np.einsum("nap,a->np", leaf.reshape(N, width, -1), np.asarray(weights, np.float64)) for leaf in rows]
    for mean, spread, each in zip(*map(jax.tree.leaves, moments[:2]), gradients, strict=True):
        compare(mean.ravel(), each.mean(0))
        # Deviations from a mean are no small integers, whatever the gradients are.
        np.testing.assert_allclose(spread.ravel(), ((each - each.mean(0)) ** 2).sum(0), rtol=1e-6)

    why = {leaf.names: leaf.reason for leaf in plan(apply_fn, params, x).leaves}
    for name, (_, _, _, reason) in cases.items():
        found = " ".join(reason for names, reason in why.items() if any(f"['{name}']" in each for each in names))
        assert (reason in found) if reason else not found, f"{name}: {found!r}"
        assert "cannot be read" not in found, f"{name}: {found!r}"


def owners(cases, params, x):
    """Which outputs are which case's, for the message of a comparison that fails."""
    sizes = [jax.eval_shape(case, params[name], x[name]).size // N for name, (case, *_) in cases.items()]
    return {name: int(stop - size) for name, size, stop in zip(cases, sizes, np.cumsum(sizes), strict=True)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_every_rank_order_and_input(dtype):
    """Inputs that are integers or booleans are promoted inside the product, by JAX and by what is kept of it."""
    rng, sizes = np.random.default_rng(1), dict(n=N, d=3, h=2, t=2, e=2, g=2)
    cases = {}
    for k, pattern in enumerate(PATTERNS):
        seen, weight = pattern.split(",")
        out = "".join(dict.fromkeys(seen.replace("d", "") + weight.replace("d", "")))
        out = out.replace("t", "") if pattern == "ntd,td" else out
        for swapped, other in ((k % 2, dtype), (1 - k % 2, (bool, jnp.uint8, jnp.int8, jnp.int32)[k % 4])):
            signs = f"{weight},{seen}->{out}" if swapped else f"{seen},{weight}->{out}"

            def product(params, x, signs=signs, swapped=swapped):
                return jnp.einsum(signs, *((params[0], x) if swapped else (x, params[0]))).astype(dtype)

            inputs = small(rng, [sizes[axis] for axis in seen], other)
            cases[f"{signs} {jnp.dtype(other)}"] = product, [tuple(sizes[axis] for axis in weight)], inputs, ""
    check(cases, dtype)


def biases(dtype):
    """What is added to a product, scalars and the order of the operands among it."""
    rng = np.random.default_rng(2)
    x, flat = small(rng, (N, 3), dtype), small(rng, (N, 2, 3), dtype)
    shared = "is consumed by add"
    return {
        "vector": (lambda p, x: x @ p[0] + p[1], [(3, 2), (2,)], x, ""),
        "vector first": (lambda p, x: p[1] + x @ p[0], [(3, 2), (2,)], x, ""),
        "scalar": (lambda p, x: x @ p[0] + p[1], [(3,), ()], x, ""),
        "scalar first": (lambda p, x: p[1] + x @ p[0], [(3,), ()], x, ""),
        "scalar of one column": (lambda p, x: x @ p[0] + p[1], [(3, 1), ()], x, ""),
        "scalar at positions": (lambda p, x: x @ p[0] + p[1], [(3, 1), ()], flat, ""),
        "scalar of two columns": (lambda p, x: x @ p[0] + p[1], [(3, 2), ()], x, shared),
        "one of two columns": (lambda p, x: x @ p[0] + p[1], [(3, 2), (1,)], x, shared),
        "one row": (lambda p, x: x @ p[0] + p[1], [(3, 2), (1, 2)], x, ""),
        "scalar of a number": (lambda p, x: (x @ p[0]).sum(1) + p[1], [(3, 2), ()], x, shared),
        "scalar on scalar": (lambda p, x: x[:, 0] * p[0] + p[1], [(), ()], x, "is consumed by"),
        "subtracted": (lambda p, x: x @ p[0] - p[1], [(3, 2), (2,)], x, "is consumed by sub"),
        "subtracted from": (lambda p, x: p[1] - x @ p[0], [(3,), ()], x, "is consumed by sub"),
        "twice": (lambda p, x: x @ p[0] + p[1] + p[1], [(3,), ()], x, shared),
        "scaled": (lambda p, x: x @ p[0] + 2 * p[1], [(3,), ()], x, shared),
        "of a scaled weight": (lambda p, x: x @ (2 * p[0]) + p[1], [(3,), ()], x, ""),
        "of a lookup": (lambda p, x: p[0][abs(x).astype(int)].sum((1, 2)) + p[1], [(4, 2), ()], x, "is consumed by"),
        "a weight too": (lambda p, x: jnp.dot(p[0], x[:, 0]) + p[0], [()], x, "a bias"),
    }


def factors(dtype):
    """A parameter times and over constants, on either side, where it is a scalar, and where it is an exponent."""
    x = small(np.random.default_rng(3), (N, 3), dtype)
    tiny, huge = (2.0**-40, 2.0**40) if dtype in (jnp.float32, jnp.float64, jnp.bfloat16) else (0.0, 0.0)
    by = "is consumed by"
    return {
        "1 w": (lambda p, x: x @ (1.0 * p[0]), [(3, 2)], x, ""),
        "w 2": (lambda p, x: x @ (p[0] * 2), [(3, 2)], x, ""),
        "w / 4": (lambda p, x: x @ (p[0] / 4), [(3, 2)], x, ""),
        "-w": (lambda p, x: x @ -p[0], [(3, 2)], x, ""),
        "-2 w.T": (lambda p, x: x @ (-2 * p[0]).T, [(2, 3)], x, ""),
        "8 / w": (lambda p, x: x @ (8 / (p[0] * 0 + 2)), [(3, 2)], x, by),
        "0 w": (lambda p, x: x @ (0.0 * p[0]), [(3, 2)], x, by),
        "tiny w": (lambda p, x: x @ (tiny * p[0]), [(3, 2)], x, by),
        "huge w": (lambda p, x: x @ (huge * p[0]) * tiny, [(3, 2)], x, by),
        "s x": (lambda p, x: p[0] * x, [()], x, by),
        "x s": (lambda p, x: x * p[0], [()], x, by),
        "x / s": (lambda p, x: x / (p[0] * 0 + 2), [()], x, by),
        "s (x w)": (lambda p, x: p[1] * (x @ p[0]), [(3, 2), ()], x, by),
        "(s w) x": (lambda p, x: x @ (p[1] * p[0]), [(3, 2), ()], x, by),
        "dot(s, x)": (lambda p, x: jnp.dot(p[0], x), [()], x, ""),
        "dot(x, 2 s)": (lambda p, x: jnp.dot(x, 2 * p[0]), [()], x, ""),
        "s in a row": (lambda p, x: x @ p[0].reshape(1).repeat(3), [()], x, by),
        "s as a matrix": (lambda p, x: x[:, :1] @ p[0][None, None], [()], x, ""),
        "s ** 2": (lambda p, x: x * p[0] ** 2, [()], x, by),
        "x ** s": (lambda p, x: jnp.ones_like(x) ** p[0], [()], x, by),
        "table / 2": (lambda p, x: (p[0] / 2)[abs(x).astype(int)].sum(1), [(4, 2)], x, ""),
        "rows and columns": (lambda p, x: x @ p[0] @ (p[0].T / 2), [(3, 2)], x, ""),
        "in two shapes": (lambda p, x: x @ p[0] + x[:, :2] @ p[0].reshape(2, 3)[:, :2], [(3, 2)], x, by),
        "cast": (lambda p, x: (x.astype(float) @ p[0].astype(float)).astype(dtype), [(3, 2)], x, ""),
        "cast to integers": (lambda p, x: (x.astype(int) @ p[0].astype(int)).astype(dtype), [(3, 2)], x, by),
        "as complex": (lambda p, x: jnp.real((x + 1j * x) @ p[0]).astype(dtype), [(3, 2)], x, by),
    }


@pytest.mark.parametrize(
    ("group", "dtype"), [(biases, jnp.float64), (biases, jnp.float16), (factors, jnp.float32), (factors, jnp.float16)]
)
def test_what_is_done_to_a_parameter_beside_a_product(group, dtype):
    check(group(dtype), dtype)


@pytest.mark.parametrize("factor", [np.inf, np.nan])
def test_factors_that_are_not_finite_are_those_of_autodiff(factor):
    """0·∞ in a branch that is not taken is NaN in JAX's own derivative, and not a fault of Python's division here."""
    x = small(np.random.default_rng(4), (N, 3), jnp.float64)
    cases = {
        "times": (lambda p, x: jnp.where(x > 9, p[0] * factor, p[0]) * x, [(3,)], x, "consumed by"),
        "over": (lambda p, x: jnp.where(x[:, :2] > 9, x @ (p[0] / 0.0), 1.0), [(3, 2)], x, "consumed by div"),
    }
    check(cases, jnp.float64)


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap", "promise_in_bounds"])
def test_lookups_by_integers_of_every_width(mode):
    """In a table whose number of rows a byte cannot say, with indices outside it on both sides."""

    def lookup(params, tokens):
        if mode == "wrap":
            return jnp.take(params[0], tokens, axis=0, mode="wrap").sum((1, 2))
        return jnp.nan_to_num(params[0].at[tokens].get(mode=mode)).sum((1, 2))

    rng, cases = np.random.default_rng(5), {}
    for integer in INTEGERS:
        rows = 120 if mode == "wrap" or integer == jnp.int8 else 256  # JAX counts rows in the index's dtype here
        lowest, highest = int(jnp.iinfo(integer).min), min(int(jnp.iinfo(integer).max), 2**40)
        tokens = rng.integers(max(-rows, lowest), min(rows, highest + 1), (N, 5))
        if mode != "wrap":
            tokens[0, :3] = np.clip([rows + 5, 2**35, -rows - 1], lowest, highest)
        cases[jnp.dtype(integer).name] = lookup, [(rows, 1)], jnp.asarray(tokens, integer), ""
    tokens = jnp.ones((N, 2), jnp.uint8)
    cases["other axis"] = (lambda p, t: p[0][:, t].sum((0, 2)), [(2, 9)], tokens, "")
    check(cases, jnp.float32)


def test_four_bits_and_booleans():
    """JAX's own rules for them: numbers below 8 are indices, booleans are masks and no indices."""
    tokens = jnp.asarray([[0, 1], [7, 3], [2, 2], [5, 0]])
    check({"uint4": (lambda p, t: p[0][t.astype(jnp.uint4)].sum(1), [(256, 2)], tokens, "")}, jnp.float32)
    check({"cast": (lambda p, t: p[0][(t > 2).astype(jnp.uint8)].sum(1), [(256, 2)], tokens, "")}, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_convolutions_and_scans_in_every_dtype(dtype):
    rng = np.random.default_rng(6)
    image, sequence = small(rng, (N, 4, 4, 2), dtype), small(rng, (N, 3, 2), dtype)
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(p, x, **options):
        pixels = lax.conv_general_dilated(x, p[0], (2, 1), "SAME", dimension_numbers=numbers, **options)
        return (pixels + p[1]).sum((1, 2))

    def scanned(p, x, **options):
        def step(h, row):
            return row @ p[0] + h, row @ p[0] * 2

        carry, rows = lax.scan(step, x[:, 0] * 0, x.swapaxes(0, 1), **options)
        return carry + rows.sum(0)

    cases = {
        "convolution": (convolve, [(2, 3, 2, 2), (2,)], image, ""),
        "groups": (partial(convolve, feature_group_count=2), [(2, 3, 1, 4), (1,)], image, "is consumed by add"),
        "one channel": (convolve, [(2, 3, 2, 1), ()], image, ""),
        "bytes": (
            lambda p, x: convolve(p, x.astype(dtype)),
            [(2, 3, 2, 2), (2,)],
            small(rng, (N, 4, 4, 2), jnp.uint8),
            "",
        ),
        "scan": (scanned, [(2, 2)], sequence, ""),
        "backwards": (partial(scanned, reverse=True, unroll=2), [(2, 2)], sequence, ""),
    }
    check(cases, dtype)
