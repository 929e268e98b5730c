"""Moments of tables that examples index, against every example's gradient by `jax.grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from entk import gradient_moments
from entk._kernels.moments import BLOCK_BYTES, _example_bytes, _moments
from entk._kernels.row_moments import _order
from entk._structured.factors import FactoredModel

ROWS, N, TOKENS = 7, 8, 5


def by_hand(losses, params, batch):
    """(ḡ, Σ (g_i − ḡ)²) in float64."""

    def loss(params, i):
        return losses(params, jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, i, 1), batch))[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, jnp.arange(len(jax.tree.leaves(batch)[0])))
    gradients = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradients)
    return jax.tree.map(lambda g: (g.mean(0), ((g - g.mean(0)) ** 2).sum(0)), gradients)


def check(losses, params, batch, microbatch_size, tolerance):
    moments = gradient_moments(losses, params, batch, microbatch_size=microbatch_size)
    expected = by_hand(losses, params, batch)
    for name in params:
        mean, spread = expected[name]
        scale = np.sqrt((spread + len(jax.tree.leaves(batch)[0]) * mean**2).max())
        assert np.abs(np.asarray(moments.mean_grads[name], np.float64) - mean).max() <= tolerance * scale, name
        assert np.abs(np.asarray(moments.sum_sq_diff_grads[name], np.float64) - spread).max() <= tolerance * scale**2
        assert moments.mean_grads[name].shape == mean.shape
    return moments


def row(p, t):
    return jnp.sin(p["table"][t[:, 0]]) @ p["out"]


def bag(p, t):
    return jnp.tanh(p["table"][t].sum(1)) @ p["out"]


def weighted_sequence(p, t):
    return (jnp.tanh(p["table"][t] * (1 + jnp.arange(TOKENS, dtype=p["out"].dtype))[:, None]) @ p["out"]).sum(1)


def two_lookups(p, t):
    return (p["table"][t[:, 0]] * jnp.tanh(p["table"][t[:, 1:3]].sum(1))) @ p["out"]


def tied(p, t):
    hidden = jnp.tanh(p["table"][t].mean(1) * p["out"])
    return jax.nn.logsumexp(hidden @ p["table"].T, -1)


def tied_at_every_token(p, t):
    return jax.nn.logsumexp(jnp.tanh(p["table"][t] * p["out"]) @ p["table"].T, -1).sum(1)


def one_hot_too(p, t):
    return jnp.tanh(p["table"][t].sum(1) + jax.nn.one_hot(t[:, 0], ROWS, dtype=p["out"].dtype) @ p["table"]) @ p["out"]


def scaled(p, t):
    return jnp.tanh((-0.5 * p["table"])[t].sum(1)) @ p["out"]


def columns(p, t):
    return p["out"] @ jnp.sin(jnp.take(p["table"].T, t, axis=1).sum(2))


def by_mode(mode, **options):
    def losses(p, t):
        return jnp.tanh(p["table"].at[t - 3].get(mode=mode, **options).sum(1)) @ p["out"]  # from −3 to ROWS + 2

    losses.__name__ = f"mode {mode}"
    return losses


def wrapped(p, t):
    return jnp.tanh(jnp.take(p["table"], t - 20, axis=0, mode="wrap").sum(1)) @ p["out"]


def padded(p, t):
    taken = jnp.where(t[:, :, None] > 1, p["table"][t], 0)
    return jnp.tanh(taken.sum(1)) @ p["out"]


FORMS = [
    row, bag, weighted_sequence, two_lookups, tied, tied_at_every_token, one_hot_too, scaled, columns, padded,
    by_mode("fill", fill_value=0), by_mode("clip"), wrapped,
]  # fmt: skip


def inputs(dtype, rows=ROWS):
    """Tokens of which several come twice in an example; the last row is taken by none."""
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(rows, 3)), dtype), "out": jnp.asarray(rng.normal(size=3), dtype)}
    return params, rng.integers(0, max(1, rows - 1), size=(N, TOKENS))


@pytest.mark.parametrize(
    ("losses", "microbatch_size"),
    [*((form, 3) for form in FORMS), (row, None), (bag, None)],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_ways_to_take_rows(losses, microbatch_size):
    params, tokens = inputs(jnp.float64)
    if "mode" in losses.__name__:
        tokens = np.random.default_rng(1).integers(0, ROWS + 6, size=(N, TOKENS))
    check(losses, params, tokens, microbatch_size, 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("losses", [bag, tied])
def test_other_dtypes(losses, dtype, tolerance):
    params, tokens = inputs(dtype)
    moments = check(losses, params, tokens, 3, tolerance)
    assert moments.mean_grads["table"].dtype == moments.sum_sq_diff_grads["table"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint32])
def test_tokens_of_any_integer_type(dtype):
    params, tokens = inputs(jnp.float64)
    check(bag, params, tokens.astype(dtype), 3, 1e-13)


def test_one_row_and_one_token():
    params, tokens = inputs(jnp.float64, rows=1)
    check(bag, params, tokens, 3, 1e-13)
    params, tokens = inputs(jnp.float64)
    check(bag, params, tokens[:, :1], None, 1e-13)


def test_a_table_of_scalars():
    params, tokens = inputs(jnp.float64)
    params = {"bias": params["table"][:, 0]}
    check(lambda p, t: jnp.exp(p["bias"][t].sum(1)), params, tokens, 3, 1e-13)


@pytest.mark.parametrize("rows", [0, 4])
def test_a_table_that_is_not_used(rows):
    params, tokens = inputs(jnp.float64)
    params["spare"] = jnp.ones((rows, 2))
    moments = gradient_moments(bag, params, tokens)
    np.testing.assert_array_equal(moments.mean_grads["spare"], np.zeros((rows, 2)))
    np.testing.assert_array_equal(moments.sum_sq_diff_grads["spare"], np.zeros((rows, 2)))


def test_tables_that_a_scan_takes_apart():
    """(layers, rows, width), one table a step; the tokens of a step come twice as well."""
    params, tokens = inputs(jnp.float64)
    params = {"tables": jnp.stack([params["table"], 2 - params["table"], params["table"] ** 2])}

    def losses(p, t):
        start = jnp.zeros((len(t), 3), p["tables"].dtype)
        hidden, _ = lax.scan(lambda hidden, table: (jnp.tanh(hidden + table[t].sum(1)), None), start, p["tables"])
        return hidden.sum(1)

    check(losses, params, tokens, 3, 1e-13)


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.parametrize("repeats", [1, 4])
def test_no_square_of_a_mean_is_subtracted(repeats, microbatch_size):
    """Gradients a thousand times their spread in a row that all examples take, and in one that half of them take."""
    values = (1000 + np.random.default_rng(0).normal(size=(64, 3))).astype(np.float32)
    tokens = np.repeat(np.stack([np.zeros(64, int), np.arange(64) % 2 + 1], 1), repeats, axis=1)

    def losses(p, data):
        tokens, values = data
        return (p["table"][tokens].sum(1) * values).sum(1)

    params = {"table": jnp.zeros((3, 3), jnp.float32)}
    moments = gradient_moments(losses, params, (tokens, values), microbatch_size=microbatch_size)
    _, expected = by_hand(losses, params, (tokens, values))["table"]
    np.testing.assert_allclose(moments.sum_sq_diff_grads["table"], expected, rtol=1e-4)
    assert (expected[0] * 1e3 < expected[1]).all()


def test_equal_gradients_have_no_spread_below_zero():
    params = {"table": jnp.ones((2, 1), jnp.float32)}
    tokens = np.zeros(9, int)
    for size in (None, 4):
        moments = gradient_moments(lambda p, t: p["table"][t, :].sum(1) / 3, params, tokens, microbatch_size=size)
        assert (moments.sum_sq_diff_grads["table"] >= 0).all()
        assert (moments.sum_sq_diff_grads["table"] <= 1e-12).all()


def test_what_is_not_a_number_stays_in_its_row():
    params, tokens = inputs(jnp.float64)
    weights = np.ones(N)
    weights[2] = np.nan

    def losses(p, data):
        return jnp.sin(p["table"][data[0][:, 0]]).sum(1) * data[1]

    spread = np.asarray(gradient_moments(losses, params, (tokens, weights)).sum_sq_diff_grads["table"])
    assert np.isnan(spread[tokens[2, 0]]).all()
    assert np.isfinite(np.delete(spread, tokens[2, 0], 0)).all()


def shapes(rows, n, tokens, width=16):
    spec = jax.ShapeDtypeStruct
    params = {"table": spec((rows, width), jnp.float32), "out": spec((width,), jnp.float32)}
    return params, spec((n, tokens), jnp.int32)


@pytest.mark.parametrize("microbatch_size", [None, 32])
@pytest.mark.parametrize("losses", [row, bag])
def test_a_million_rows_are_held_twice_as_mean_and_spread(losses, microbatch_size):
    compiled = _moments.lower(losses, *shapes(1_000_000, 2048, 16), microbatch_size).compile().memory_analysis()
    table = 64_000_000
    assert compiled.output_size_in_bytes < 2.1 * table
    assert compiled.temp_size_in_bytes < table / 3  # of the batch, and a count of every row


def test_a_bag_is_read_and_written_a_few_times_as_often_as_by_its_gradient():
    params, tokens = shapes(50_000, 2048, 16)
    gradient = jax.jit(jax.grad(lambda p, t: bag(p, t).mean())).lower(params, tokens).compile()
    moments = _moments.lower(bag, params, tokens, None).compile()
    accessed = (one.cost_analysis()["bytes accessed"] for one in (moments, gradient))
    assert next(accessed) < 6 * next(accessed)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("losses", [row, bag, tied])
def test_blocks_hold_what_is_planned(losses, tokens):
    """The batch is so large that it is cut."""
    rows = 2000 if losses is tied else 50_000
    params, x = shapes(rows, 1, tokens, width=32)
    planned = _example_bytes(
        FactoredModel(losses, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params), x)
    )
    n = 3 * BLOCK_BYTES // planned
    compiled = _moments.lower(losses, params, jax.ShapeDtypeStruct((n, tokens), jnp.int32), None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < BLOCK_BYTES + 3 * 4 * 33 * rows


@pytest.mark.parametrize("rows", [9, 2**31 - 1])
def test_order_of_rows(rows):
    """Sorted with one key of 32 bits, and with two."""
    index = np.random.default_rng(0).integers(0, rows, size=(4, 2, 11))
    index[..., 7] = index[..., 2]
    order = np.asarray(_order(jnp.asarray(index, jnp.int32), rows))
    np.testing.assert_array_equal(np.take_along_axis(index, order, -1), np.sort(index, -1))
    np.testing.assert_array_equal(np.sort(order, -1), np.broadcast_to(np.arange(11), order.shape))
