"""Models put together at random from all that the search for uses knows, against Jacobians multiplied in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import entk._structured.contractions as contractions
from entk import JacobianBlocks, PositionPairs, Structured, empirical_ntk, jacobian
from tests.entk.mlp_oracle import assert_close

WIDTH, LENGTH = 3, 3
PAIRS, BLOCKS = Structured(contractions=(PositionPairs(),)), Structured(contractions=(JacobianBlocks(),))

# A layer is (name of its product, scale of its weight, bias: none, its own, or one that several layers share).
LAYERS = st.tuples(
    st.sampled_from(["dense", "transposed", "tied", "stacked scan", "shared scan", "heads", "once", "remat"]),
    st.sampled_from([1.0, 0.5, -2.0]),
    st.sampled_from(["none", "own", "shared"]),
)


def build(layers, seed):
    """(apply_fn, params) on inputs (n, LENGTH, WIDTH)."""
    rng = np.random.default_rng(seed)
    params = {"tied": rng.normal(size=(WIDTH, WIDTH)) / 2, "shared bias": rng.normal(size=WIDTH) / 2}
    for k, (kind, _, bias) in enumerate(layers):
        shape = {"stacked scan": (2, WIDTH, WIDTH), "heads": (WIDTH, 1, WIDTH)}.get(kind, (WIDTH, WIDTH))
        params[f"w{k}"] = rng.normal(size=shape) / 2
        if bias == "own":
            params[f"b{k}"] = rng.normal(size=(2, WIDTH) if kind == "stacked scan" else WIDTH) / 2

    def layer(params, hidden, k):
        kind, scale, bias = layers[k]
        w = scale * params["tied" if kind == "tied" else f"w{k}"]
        b = {"none": 0.0, "own": params.get(f"b{k}"), "shared": params["shared bias"]}[bias]
        if kind == "transposed":
            return jnp.tanh(hidden @ w.T + b)
        if kind == "stacked scan":
            return jax.lax.scan(
                lambda h, slices: (jnp.tanh(h @ slices[0] + (slices[1] if bias == "own" else b)), None),
                hidden,
                (w, b if bias == "own" else jnp.zeros((2, 1))),
            )[0]
        if kind == "shared scan":
            return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w + b), None), hidden, length=2)[0]
        if kind == "heads":
            return jnp.tanh(jnp.einsum("ntd,dge->ntge", hidden, w)[:, :, 0] + b)
        if kind == "once":
            return hidden + jnp.tanh(hidden.mean(1) @ w + b)[:, None]
        if kind == "remat":
            return jax.checkpoint(lambda h: jnp.tanh(h @ w + b))(hidden)
        return jnp.tanh(hidden @ w + b)

    def apply_fn(params, x):
        for k in range(len(layers)):
            x = layer(params, x, k)
        return jnp.sin(x[:, -1] @ params["tied"].T)

    return apply_fn, params


@settings(max_examples=12)
@given(layers=st.lists(LAYERS, min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_any_combination(layers, seed):
    apply_fn, params = build(layers, seed)
    x = np.random.default_rng(seed + 1).normal(size=(3, LENGTH, WIDTH))
    jac = np.asarray(jacobian(apply_fn, params, x)).reshape(3 * WIDTH, -1)
    for strategy in (Structured(), PAIRS, BLOCKS):
        assert_close(empirical_ntk(apply_fn, params, x, strategy=strategy), jac @ jac.T, 1e-10)


def next_token(params, x):
    """Outputs at the last position, or at one that the example itself says."""
    hidden = jnp.tanh(x["tokens"] @ params["first"])
    hidden = hidden + hidden.mean(1, keepdims=True)
    hidden = jnp.take_along_axis(jnp.tanh(hidden @ params["last"] + params["bias"]), x["at"][:, None, None], axis=1)
    return hidden[:, 0] ** 2


def test_where_one_position_has_cotangents_only_that_one_is_multiplied(monkeypatch):
    """The product over all pairs of positions is spoiled: the last layer does not notice, the first one does."""
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(3, 4)), "last": rng.normal(size=(4, 5)), "bias": rng.normal(size=5)}
    x = {"tokens": rng.normal(size=(6, 7, 3)), "at": rng.integers(0, 7, 6)}
    jac = np.asarray(jacobian(next_token, params, x)).reshape(30, -1)
    assert_close(empirical_ntk(next_token, params, x, strategy=PAIRS), jac @ jac.T, 1e-10)

    def kernel(names):
        def apply_fn(chosen, x):
            return next_token({**params, **chosen}, x)

        return np.asarray(empirical_ntk(apply_fn, {name: params[name] for name in names}, x, strategy=PAIRS))

    last = jac[:, :5], jac[:, 17:]  # in the order of names: bias, first, last
    rows = np.concatenate(last, axis=1)
    monkeypatch.setattr(contractions, "_position_pairs", lambda rows, *_: jnp.full((30, 30), jnp.nan))
    assert_close(kernel(["bias", "last"]), rows @ rows.T, 1e-10)
    assert np.isnan(kernel(["first"])).all()
