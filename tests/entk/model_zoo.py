"""Small models that use their parameters in every way that a kernel has to get right.

`ZOO` lists `Model(name, build)`, and `build(dtype)` gives `(apply_fn, params, x1, x2)`: at most 2000 parameters, 5
outputs an example, 3 examples and 4 others, always the same numbers. dtype is float32 or float64; a few models call
routines that know no other.

Outputs are mostly the sine of what the model would give. A network with one hidden layer has a kernel whose blocks are
symmetric, K[ia, jb] = K[ib, ja], and exchanged outputs would pass unseen.
"""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

NUM_X1, NUM_X2 = 3, 4


@dataclass(frozen=True)
class Model:
    name: str
    build: Callable[..., tuple[Callable[[Any, Any], Any], Any, Any, Any]]


ZOO: list[Model] = []


class Draw:
    """Random numbers of one dtype, the same for the same seed."""

    def __init__(self, dtype, seed):
        self.dtype, self.rng = dtype, np.random.default_rng(seed)

    def __call__(self, *shape):
        """Weights that keep a signal at about its size; the last axis is the output."""
        return self.array(self.rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1]))))

    def array(self, values):
        return np.asarray(values, self.dtype)

    def like(self, tree):
        """Weights in place of what a library initialises, which is often zero."""
        return jax.tree.map(lambda leaf: self(*leaf.shape), tree)

    def inputs(self, *row):
        return self.array(self.rng.normal(size=(NUM_X1 + NUM_X2, *row)))

    def tokens(self, vocabulary, length):
        """Sequences in which one token comes twice, none a permutation of another."""
        sequences = {}
        while len(sequences) < NUM_X1 + NUM_X2:
            tokens = self.rng.permutation(vocabulary)[:length]
            tokens[-1] = tokens[0]
            sequences[tuple(sorted(tokens))] = tokens
        return np.stack(list(sequences.values())).astype(np.int32)


def zoo(function):
    """Adds `function(draw) -> (apply_fn, params, x)`, x the examples of x1 and those of x2."""

    def build(dtype=jnp.float64):
        apply_fn, params, x = function(Draw(dtype, zlib.crc32(function.__name__.encode())))
        x1, x2 = (jax.tree.map(lambda leaf, part=part: leaf[part], x) for part in PARTS)
        return apply_fn, *jax.tree.map(jnp.asarray, (params, x1, x2))

    ZOO.append(Model(function.__name__, build))
    return function


PARTS = (slice(None, NUM_X1), slice(NUM_X1, None))


# --------------------------------------------------------------------------------------------------------------- dense


def dense_params(draw, *sizes):
    return [{"w": draw(m, n), "b": draw(n)} for m, n in itertools.pairwise(sizes)]


def dense(activation, params, x):
    for layer in params[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@zoo
def mlp_relu(draw):
    return partial(dense, jax.nn.relu), dense_params(draw, 4, 8, 6, 3), draw.inputs(4)


@zoo
def mlp_tanh(draw):
    return lambda p, x: jnp.sin(dense(jnp.tanh, p, x)), dense_params(draw, 4, 6, 5, 2), draw.inputs(4)


@zoo
def linear_without_bias(draw):
    return lambda w, x: jnp.sin(x @ w), draw(4, 3), draw.inputs(4)


@zoo
def one_output_without_an_axis(draw):
    return lambda p, x: dense(jnp.tanh, p, x)[:, 0], dense_params(draw, 4, 6, 1), draw.inputs(4)


@zoo
def outputs_of_trailing_shape(draw):
    return lambda p, x: jnp.sin(dense(jnp.tanh, p, x)).reshape(-1, 2, 2), dense_params(draw, 3, 5, 4), draw.inputs(3)


@zoo
def transposed_kernels(draw):
    def apply_fn(p, x):
        return jnp.sin(jnp.tanh(x @ p["first"].T) @ p["second"].T)

    return apply_fn, {"first": draw(6, 4), "second": draw(3, 6)}, draw.inputs(4)


@zoo
def kernel_on_the_left(draw):
    def apply_fn(p, x):
        return jnp.sin(jnp.einsum("oh,nh->no", p["out"], jnp.tanh(p["w"] @ x.T + p["b"][:, None]).T))

    return apply_fn, {"w": draw(6, 4), "b": draw(6), "out": draw(3, 6)}, draw.inputs(4)


@zoo
def tied_weight(draw):
    """An autoencoder: one weight, used twice as it is and twice transposed."""

    def apply_fn(p, x):
        hidden = jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T)
        return jnp.sin(jnp.tanh(hidden @ p["w"]) @ p["w"].T)

    return apply_fn, {"w": draw(4, 6), "b": draw(6)}, draw.inputs(4)


@zoo
def the_same_layer_at_every_depth(draw):
    def apply_fn(p, x):
        for _ in range(4):
            x = x + jnp.tanh(x @ p["w"] + p["b"])
        return jnp.sin(x[:, :3])

    return apply_fn, {"w": draw(5, 5), "b": draw(5)}, draw.inputs(5)


@zoo
def gated_linear_unit(draw):
    def apply_fn(p, x):
        return jnp.sin((x @ p["value"]) * jax.nn.sigmoid(x @ p["gate"]) @ p["out"])

    return apply_fn, {"value": draw(4, 6), "gate": draw(4, 6), "out": draw(6, 3)}, draw.inputs(4)


@zoo
def a_layer_over_positions_and_channels(draw):
    """A mixer: one weight contracts positions, another one channels; both are shared along the other axis."""

    def apply_fn(p, x):
        x = x + jnp.einsum("npc,pq->nqc", jnp.tanh(x), p["positions"])
        x = x + jnp.tanh(x) @ p["channels"]
        return jnp.sin(x.mean(1) @ p["out"])

    return apply_fn, {"positions": draw(5, 5), "channels": draw(4, 4), "out": draw(4, 3)}, draw.inputs(5, 4)


@zoo
def pytree_inputs(draw):
    def apply_fn(p, x):
        return jnp.sin(dense(jnp.tanh, p, jnp.concatenate([x["a"], x["b"][0].reshape(-1, 4)], axis=1)))

    return apply_fn, dense_params(draw, 7, 5, 2), {"a": draw.inputs(3), "b": (draw.inputs(2, 2),)}


@zoo
def written_for_one_example(draw):
    def apply_fn(p, x):
        return jax.vmap(lambda x_i: jnp.sin(dense(jnp.tanh, p, x_i)))(x)

    return apply_fn, dense_params(draw, 4, 5, 3), draw.inputs(4)


@zoo
def a_loop_over_examples(draw):
    def apply_fn(p, x):
        return lax.map(lambda x_i: jnp.sin(dense(jnp.tanh, p, x_i)), x)

    return apply_fn, dense_params(draw, 4, 5, 3), draw.inputs(4)


# --------------------------------------------------------------------------------------------------------- convolutions


def conv(x, w, stride=1, padding="SAME", **options):
    axes = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}[x.ndim]
    return lax.conv_general_dilated(x, w, (stride,) * (x.ndim - 2), padding, dimension_numbers=axes, **options)


def pooled(p, hidden):
    return jnp.sin(jnp.tanh(hidden).reshape(len(hidden), -1, hidden.shape[-1]).mean(1) @ p["out"])


@zoo
def cnn_same(draw):
    def apply_fn(p, x):
        hidden = jax.nn.relu(conv(x, p["first"]) + p["bias"])
        return jnp.sin(conv(hidden, p["second"]).reshape(len(x), -1) @ p["out"])

    params = {"first": draw(3, 3, 2, 4), "bias": draw(4), "second": draw(2, 2, 4, 2), "out": draw(32, 3)}
    return apply_fn, params, draw.inputs(4, 4, 2)


@zoo
def cnn_stride_2(draw):
    def apply_fn(p, x):
        return pooled(p, conv(jnp.tanh(conv(x, p["first"], stride=2)), p["second"], stride=2, padding="VALID"))

    return apply_fn, {"first": draw(3, 3, 2, 4), "second": draw(2, 2, 4, 3), "out": draw(3, 3)}, draw.inputs(7, 6, 2)


@zoo
def cnn_valid_dilated(draw):
    def apply_fn(p, x):
        hidden = jnp.tanh(conv(x, p["first"], padding="VALID", rhs_dilation=(2, 1)))
        return pooled(p, conv(hidden, p["second"], padding=((1, 0), (0, 2)), rhs_dilation=(1, 2)))

    return apply_fn, {"first": draw(2, 3, 2, 4), "second": draw(2, 2, 4, 3), "out": draw(3, 2)}, draw.inputs(6, 5, 2)


@zoo
def cnn_transposed(draw):
    def apply_fn(p, x):
        up = lax.conv_transpose(x, p["up"], (2, 2), "SAME")
        return pooled(p, conv(jnp.tanh(up), p["down"], stride=2))

    return apply_fn, {"up": draw(3, 3, 2, 4), "down": draw(3, 3, 4, 3), "out": draw(3, 3)}, draw.inputs(3, 3, 2)


@zoo
def cnn_of_two_groups(draw):
    def apply_fn(p, x):
        return pooled(p, conv(jnp.tanh(conv(x, p["first"], feature_group_count=2)), p["second"]))

    return apply_fn, {"first": draw(3, 2, 2, 6), "second": draw(2, 2, 6, 3), "out": draw(3, 3)}, draw.inputs(4, 4, 4)


@zoo
def cnn_depthwise(draw):
    def apply_fn(p, x):
        hidden = jnp.tanh(conv(x, p["depth"], feature_group_count=3))
        return pooled(p, conv(hidden, p["point"]) + p["bias"])

    return (
        apply_fn,
        {"depth": draw(3, 3, 1, 6), "point": draw(1, 1, 6, 4), "bias": draw(4), "out": draw(4, 3)},
        draw.inputs(4, 4, 3),
    )


@zoo
def cnn_1d(draw):
    def apply_fn(p, x):
        return pooled(p, conv(jnp.tanh(conv(x, p["first"], stride=2)), p["second"], padding="VALID"))

    return apply_fn, {"first": draw(3, 3, 4), "second": draw(2, 4, 3), "out": draw(3, 2)}, draw.inputs(9, 3)


@zoo
def cnn_channels_first(draw):
    def apply_fn(p, x):
        axes = ("NCHW", "OIHW", "NCHW")
        hidden = jnp.tanh(lax.conv_general_dilated(x, p["first"], (1, 2), "SAME", dimension_numbers=axes))
        hidden = lax.conv_general_dilated(hidden, p["second"], (1, 1), "VALID", dimension_numbers=axes)
        return pooled(p, jnp.moveaxis(hidden, 1, -1))

    return apply_fn, {"first": draw(4, 2, 3, 2), "second": draw(3, 4, 2, 2), "out": draw(3, 3)}, draw.inputs(2, 4, 5)


@zoo
def cnn_with_max_pooling(draw):
    def apply_fn(p, x):
        hidden = lax.reduce_window(conv(x, p["w"]), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return pooled(p, hidden)

    return apply_fn, {"w": draw(3, 3, 2, 4), "out": draw(4, 3)}, draw.inputs(4, 4, 2)


@zoo
def locally_connected(draw):
    def apply_fn(p, x):
        patches = jnp.stack([x[:, i : i + 3] for i in range(4)], axis=1)
        return jnp.sin(jnp.tanh(jnp.einsum("npkc,pkcd->npd", patches, p["w"]) + p["b"]).mean(1) @ p["out"])

    return apply_fn, {"w": draw(4, 3, 2, 3), "b": draw(4, 3), "out": draw(3, 3)}, draw.inputs(6, 2)


# ------------------------------------------------------------------------------------------------------- normalisation


def normalised(x, axes):
    centred = x - x.mean(axes, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(axes, keepdims=True) + 1e-3)


@zoo
def layer_norm(draw):
    def apply_fn(p, x):
        hidden = normalised(x @ p["w"], -1) * p["scale"] + p["bias"]
        return jnp.sin(jnp.tanh(hidden) @ p["out"])

    return apply_fn, {"w": draw(4, 6), "scale": draw(6), "bias": draw(6), "out": draw(6, 3)}, draw.inputs(4)


@zoo
def rms_norm(draw):
    def apply_fn(p, x):
        hidden = x @ p["w"]
        hidden = hidden * lax.rsqrt((hidden**2).mean(-1, keepdims=True) + 1e-3) * (1 + p["scale"])
        return jnp.sin(jnp.tanh(hidden) @ p["out"])

    return apply_fn, {"w": draw(4, 6), "scale": draw(6), "out": draw(6, 3)}, draw.inputs(4)


@zoo
def group_norm(draw):
    def apply_fn(p, x):
        hidden = conv(x, p["w"])
        groups = normalised(hidden.reshape(*hidden.shape[:3], 2, 3), (1, 2, 4)).reshape(hidden.shape)
        return pooled(p, groups * p["scale"] + p["bias"])

    return apply_fn, {"w": draw(3, 3, 2, 6), "scale": draw(6), "bias": draw(6), "out": draw(6, 3)}, draw.inputs(4, 4, 2)


class NormedCNN(nnx.Module):
    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (3, 3), param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(4, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        hidden = jnp.tanh(self.norm(self.conv(x)))
        return jnp.sin(self.out(nnx.avg_pool(hidden, (2, 2), (2, 2)).mean((1, 2))))


@zoo
def batch_norm_in_evaluation_mode(draw):
    graphdef, params, statistics = nnx.split(nnx.eval_shape(lambda: NormedCNN(draw.dtype)), nnx.Param, nnx.BatchStat)
    statistics = jax.tree.map(lambda leaf: 1 + leaf**2, draw.like(statistics))
    return lambda p, x: nnx.merge(graphdef, p, statistics)(x), draw.like(params), draw.inputs(4, 4, 2)


# ----------------------------------------------------------------------------------------------- embeddings, attention


@zoo
def embedding_by_index(draw):
    def apply_fn(p, tokens):
        return jnp.sin(jnp.tanh(p["table"][tokens]).sum(1) @ p["out"])

    return apply_fn, {"table": draw(6, 4), "out": draw(4, 3)}, draw.tokens(6, 4)


@zoo
def embedding_by_take(draw):
    def apply_fn(p, tokens):
        hidden = jnp.take(p["table"], tokens, axis=1, mode="clip")  # (4, n, t): the vocabulary is the last axis
        return jnp.sin(jnp.tanh(hidden).sum(2).T @ p["out"])

    return apply_fn, {"table": draw(4, 6), "out": draw(4, 3)}, draw.tokens(6, 4)


@zoo
def embedding_by_one_hot(draw):
    def apply_fn(p, tokens):
        hidden = jax.nn.one_hot(tokens, 6, dtype=p["table"].dtype) @ p["table"]
        return jnp.sin(jnp.tanh(hidden).sum(1) @ p["out"])

    return apply_fn, {"table": draw(6, 4), "out": draw(4, 3)}, draw.tokens(6, 4)


def attend(q, k, v):
    """(n, t, d) each, causal."""
    scores = jnp.einsum("nqd,nkd->nqk", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    return jax.nn.softmax(jnp.where(np.tri(q.shape[1], dtype=bool), scores, -jnp.inf)) @ v


@zoo
def attention_with_tied_embeddings(draw):
    """Logits of the last token through the transposed table of the embedding."""

    def apply_fn(p, tokens):
        x = p["table"][tokens] + p["position"]
        x = x + attend(x @ p["q"], x @ p["k"], x @ p["v"]) @ p["o"]
        return normalised(x, -1)[:, -1] @ p["table"].T

    params = {"table": draw(5, 4), "position": draw(4, 4), **{name: draw(4, 4) for name in "qkvo"}}
    return apply_fn, params, draw.tokens(5, 4)


@zoo
def logits_of_every_token(draw):
    def apply_fn(p, tokens):
        x = normalised(p["table"][tokens] + p["position"], -1)
        return jnp.sin(attend(x @ p["q"], x @ p["k"], x @ p["v"])[:, 1:] @ p["out"])

    params = {"table": draw(5, 4), "position": draw(3, 4), "out": draw(4, 2), **{name: draw(4, 4) for name in "qkv"}}
    return apply_fn, params, draw.tokens(5, 3)


@zoo
def attention_heads_by_einsum(draw):
    """Kernels of shape (d, heads, head_dim) and (heads, head_dim, d)."""

    def apply_fn(p, x):
        q, k, v = (jnp.einsum("ntd,dhe->nhte", x, p[name]) + p["bias"][:, None] for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("nhqe,nhke->nhqk", q, k))
        return jnp.sin(jnp.einsum("nhke,hed->nkd", weights @ v, p["o"]).mean(1))

    params = {"bias": draw(2, 2), "o": draw(2, 2, 3), **{name: draw(4, 2, 2) for name in "qkv"}}
    return apply_fn, params, draw.inputs(3, 4)


@zoo
def fused_attention_split_by_weight(draw):
    def apply_fn(p, x):
        q, k, v = (x @ p["qkv"][:, i * 4 : (i + 1) * 4] for i in range(3))
        return jnp.sin(attend(q, k, v)[:, -1] @ p["out"])

    return apply_fn, {"qkv": draw(4, 12), "out": draw(4, 3)}, draw.inputs(3, 4)


@zoo
def fused_attention_split_by_activation(draw):
    def apply_fn(p, x):
        q, k, v = jnp.split(x @ p["qkv"] + p["bias"], 3, axis=-1)
        return jnp.sin(attend(q, k, v)[:, -1] @ p["out"])

    return apply_fn, {"qkv": draw(4, 12), "bias": draw(12), "out": draw(4, 3)}, draw.inputs(3, 4)


@zoo
def learned_queries(draw):
    """A parameter on both sides of a product: of queries with keys."""

    def apply_fn(p, x):
        weights = jax.nn.softmax(jnp.einsum("qd,ntd->nqt", p["queries"] @ p["q"], x @ p["k"]))
        return jnp.sin((weights @ x).reshape(len(x), -1) @ p["out"])

    return apply_fn, {"queries": draw(2, 3), "q": draw(3, 4), "k": draw(4, 4), "out": draw(8, 3)}, draw.inputs(3, 4)


class LinenBlock(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, tokens):
        layer = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Embed(6, 4, **layer)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, **layer)(nn.LayerNorm(**layer)(x))
        x = x + nn.Dense(4, **layer)(nn.gelu(nn.Dense(8, **layer)(nn.LayerNorm(**layer)(x))))
        return jnp.sin(nn.Dense(3, **layer)(x.mean(1)))


@zoo
def linen_transformer(draw):
    model, tokens = LinenBlock(draw.dtype), draw.tokens(6, 3)
    return model.apply, draw.like(jax.eval_shape(model.init, jax.random.key(0), tokens)), tokens


@zoo
def nnx_attention(draw):
    """Its softmax is taken in float32."""
    sizes = {"num_heads": 2, "in_features": 4, "qkv_features": 6, "out_features": 3}
    layer = {"dtype": draw.dtype, "param_dtype": draw.dtype, "decode": False}
    graphdef, params = nnx.split(nnx.eval_shape(lambda: nnx.MultiHeadAttention(**sizes, **layer, rngs=nnx.Rngs(0))))
    return lambda p, x: jnp.sin(nnx.merge(graphdef, p)(x).mean(1)), draw.like(params), draw.inputs(3, 4)


# ------------------------------------------------------------------------------------------- loops, branches, programs


@zoo
def recurrent(draw):
    """The weights are constants of the scan."""

    def apply_fn(p, x):
        def step(hidden, x_t):
            hidden = jnp.tanh(hidden @ p["hidden"] + x_t @ p["in"] + p["b"])
            return hidden, hidden

        start = jnp.broadcast_to(p["start"], (len(x), 5))
        return jnp.sin(lax.scan(step, start, x.swapaxes(0, 1))[1][1:].mean(0) @ p["out"])

    return (
        apply_fn,
        {"hidden": draw(5, 5), "in": draw(3, 5), "b": draw(5), "start": draw(5), "out": draw(5, 2)},
        draw.inputs(4, 3),
    )


@zoo
def recurrent_over_one_example(draw):
    """`jax.vmap` of a scan, which runs backwards in time."""

    def apply_fn(p, x):
        def step(hidden, x_t):
            return jnp.tanh(hidden @ p["hidden"] + x_t @ p["in"]), None

        return jax.vmap(lambda x_i: jnp.sin(lax.scan(step, jnp.zeros_like(p["hidden"][0]), x_i, reverse=True)[0]))(x)

    return apply_fn, {"hidden": draw(4, 4), "in": draw(3, 4)}, draw.inputs(4, 3)


@zoo
def linen_gru(draw):
    model = nn.RNN(nn.GRUCell(4, dtype=draw.dtype, param_dtype=draw.dtype))
    x = draw.inputs(3, 3)
    return (
        lambda p, x: jnp.sin(model.apply(p, x)[:, -1]),
        draw.like(jax.eval_shape(model.init, jax.random.key(0), x)),
        x,
    )


@zoo
def scanned_layers(draw):
    """The weights (L, d, d) of all layers, consumed one by one."""

    def apply_fn(p, x):
        def layer(x, layer):
            return x + jnp.tanh(x @ layer["w"] + layer["b"]), None

        return jnp.sin(lax.scan(layer, x, p["layers"])[0] @ p["out"])

    params = {"layers": {"w": draw(3, 4, 4), "b": draw(3, 4)}, "out": draw(4, 3)}
    return apply_fn, params, draw.inputs(4)


@zoo
def scanned_layers_recomputed(draw):
    def apply_fn(p, x):
        @jax.checkpoint
        def layer(x, w):
            return x + jnp.tanh(x @ w), x.mean(-1)

        last, means = lax.scan(layer, x, p["layers"], unroll=2)
        return jnp.sin(last @ p["out"]) + means.sum(0)[:, None]

    return apply_fn, {"layers": draw(3, 4, 4), "out": draw(4, 3)}, draw.inputs(4)


@zoo
def recomputed_block(draw):
    def apply_fn(p, x):
        block = jax.checkpoint(partial(dense, jnp.tanh))
        return jnp.sin(block(p["second"], jnp.tanh(block(p["first"], x))))

    return apply_fn, {"first": dense_params(draw, 4, 5, 4), "second": dense_params(draw, 4, 5, 3)}, draw.inputs(4)


@zoo
def nested_jit(draw):
    @jax.jit
    def layer(w, x):
        return jnp.tanh(jax.jit(jnp.matmul)(x, w))

    def apply_fn(p, x):
        return jnp.sin(jax.jit(layer)(p["second"], layer(p["first"], x)))

    return apply_fn, {"first": draw(4, 5), "second": draw(5, 3)}, draw.inputs(4)


@jax.custom_jvp
def soft_step(x):
    return jnp.logaddexp(x, 0)


soft_step.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))


@zoo
def custom_jvp_activation(draw):
    return lambda p, x: jnp.sin(dense(soft_step, p, x)), dense_params(draw, 4, 5, 3), draw.inputs(4)


@jax.custom_vjp
def weighted(w, x):
    return jnp.tanh(x @ w)


def weighted_backwards(residuals, cotangent):
    w, x, out = residuals
    cotangent = cotangent * (1 - out**2)
    return x.T @ cotangent, cotangent @ w.T


def weighted_forwards(w, x):
    return weighted(w, x), (w, x, weighted(w, x))


weighted.defvjp(weighted_forwards, weighted_backwards)


@zoo
def custom_vjp_of_a_weight(draw):
    def apply_fn(p, x):
        return jnp.sin(weighted(p["second"], weighted(p["first"], x)))

    return apply_fn, {"first": draw(4, 5), "second": draw(5, 3)}, draw.inputs(4)


@zoo
def branch_by_the_input(draw):
    def apply_fn(p, x):
        def one(x_i):
            return lax.cond(x_i.sum() > 0, lambda: jnp.tanh(x_i @ p["w"]) @ p["up"], lambda: x_i @ p["w"] @ p["down"])

        return jnp.sin(jax.vmap(one)(x))

    return apply_fn, {"w": draw(4, 5), "up": draw(5, 3), "down": draw(5, 3)}, draw.inputs(4)


@zoo
def branch_by_a_constant(draw):
    def apply_fn(p, x):
        branches = (lambda x: x, lambda x: jnp.tanh(x @ p["square"]), lambda x: x @ p["square"].T)
        return jnp.sin(lax.switch(p["which"], branches, x) @ p["out"])

    return apply_fn, {"square": draw(4, 4), "out": draw(4, 3), "which": 1}, draw.inputs(4)


@zoo
def loop_of_fixed_length(draw):
    def apply_fn(p, x):
        return jnp.sin(lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x @ p["w"]) / (i + 1), x) @ p["out"])

    return apply_fn, {"w": draw(4, 4), "out": draw(4, 3)}, draw.inputs(4)


@zoo
def weights_indexed_in_a_loop(draw):
    def apply_fn(p, x):
        return jnp.sin(lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x @ p["w"][i]), x)[:, :3])

    return apply_fn, {"w": draw(3, 4, 4)}, draw.inputs(4)


@zoo
def loop_of_unknown_length_over_inputs(draw):
    """Of a length that differs from example to example; no parameter enters, which no reverse mode would survive."""

    def apply_fn(p, x):
        shrunk = jax.vmap(lambda x_i: lax.while_loop(lambda x: (x**2).sum() > 1, lambda x: x / 2, x_i))(x)
        return jnp.sin(dense(jnp.tanh, p, shrunk))

    return apply_fn, dense_params(draw, 4, 5, 3), draw.inputs(4)


# ----------------------------------------------------------------------------------- parameters that are not plain uses


@zoo
def weight_normalised(draw):
    def apply_fn(p, x):
        w = p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True) * p["length"]
        return jnp.sin(jnp.tanh(x @ w) @ p["out"])

    return apply_fn, {"w": draw(4, 5), "length": draw(5), "out": draw(5, 3)}, draw.inputs(4)


@zoo
def weight_times_its_transpose(draw):
    return (
        lambda p, x: jnp.sin(x @ (p["w"] @ p["w"].T) @ p["out"]),
        {"w": draw(4, 5), "out": draw(4, 3)},
        draw.inputs(4),
    )


@zoo
def product_of_weights(draw):
    def apply_fn(p, x):
        return jnp.sin(x @ (p["w"] + p["left"] @ p["right"]))

    return apply_fn, {"w": draw(4, 3), "left": draw(4, 2), "right": draw(2, 3)}, draw.inputs(4)


@zoo
def symmetric_weight(draw):
    return lambda p, x: jnp.sin(jnp.tanh(x @ (p + p.T))[:, :3]), draw(4, 4), draw.inputs(4)


@zoo
def bilinear_form(draw):
    def apply_fn(p, x):
        return jnp.sin(jnp.einsum("ni,iok,nk->no", x, p["form"], x) @ p["out"])

    return apply_fn, {"form": draw(4, 3, 4), "out": draw(3, 3)}, draw.inputs(4)


@zoo
def scalar_parameter(draw):
    def apply_fn(p, x):
        return p["scale"] * jnp.sin(x @ p["w"] / p["temperature"])

    return apply_fn, {"scale": draw(), "temperature": 2 + draw() ** 2, "w": draw(4, 3)}, draw.inputs(4)


@zoo
def unused_and_empty_parameters(draw):
    params = {"a": draw(3, 2), "layers": dense_params(draw, 4, 5, 3), "none": draw(0, 4), "z": draw()}
    return lambda p, x: jnp.sin(dense(jnp.tanh, p["layers"], x)), params, draw.inputs(4)


@zoo
def an_empty_layer(draw):
    def apply_fn(p, x):
        hidden = jnp.tanh(x @ p["w"]) + jnp.tanh(x @ p["first"]) @ p["second"]
        return jnp.sin(hidden @ p["out"])

    return apply_fn, {"first": draw(4, 0), "second": draw(0, 5), "w": draw(4, 5), "out": draw(5, 3)}, draw.inputs(4)


@zoo
def frozen_parameters(draw):
    """One of them whole, the other in one of its two uses."""

    def apply_fn(p, x):
        frozen = lax.stop_gradient(p["frozen"])
        return jnp.sin((jnp.tanh(x @ p["w"]) + lax.stop_gradient(x @ p["w"])) @ frozen)

    return apply_fn, {"frozen": draw(5, 3), "w": draw(4, 5)}, draw.inputs(4)


@zoo
def constants_among_parameters(draw):
    """Integers, booleans and a random key have no columns."""

    def apply_fn(p, x):
        hidden = jnp.where(p["mask"], jnp.tanh(x @ p["w"]), 0)[:, p["order"]]
        return jnp.sin(hidden @ p["out"]) + jax.random.normal(p["key"], (3,), hidden.dtype)

    params = {"w": draw(4, 5), "out": draw(5, 3), "order": np.array([3, 0, 4, 1, 0]), "key": jax.random.key(0)}
    return apply_fn, params | {"mask": np.array([True, True, False, True, True])}, draw.inputs(4)


@zoo
def mixture_of_experts(draw):
    """Every expert on every example: weights with a batch axis of their own."""

    def apply_fn(p, x):
        gates = jax.nn.softmax(x @ p["gate"])
        hidden = jnp.tanh(jnp.einsum("nd,edh->enh", x, p["up"]))
        return jnp.sin(jnp.einsum("ne,eno->no", gates, jnp.matmul(hidden, p["down"])))

    return apply_fn, {"gate": draw(4, 3), "up": draw(3, 4, 5), "down": draw(3, 5, 2)}, draw.inputs(4)


@zoo
def one_expert_by_token(draw):
    """Weights gathered by the input."""

    def apply_fn(p, tokens):
        x = p["table"][tokens].mean(1)
        return jnp.sin(jnp.einsum("nd,ndo->no", jnp.tanh(x), p["experts"][tokens[:, 0] % 3]))

    return apply_fn, {"table": draw(6, 4), "experts": draw(3, 4, 3)}, draw.tokens(6, 3)


@zoo
def hypernetwork(draw):
    """Weights computed from the input."""

    def apply_fn(p, x):
        w = jnp.tanh(x @ p["generator"]).reshape(-1, 4, 3)
        return jnp.sin((jnp.einsum("nd,ndo->no", x, w) + p["b"]) @ p["out"])

    return apply_fn, {"generator": draw(4, 12), "b": draw(3), "out": draw(3, 3)}, draw.inputs(4)


@zoo
def weight_cast(draw):
    """To float32 and back, where the parameters are float64."""

    def apply_fn(p, x):
        w = p["w"].astype(jnp.float32).astype(x.dtype)
        return jnp.sin(jnp.tanh(x @ w) @ p["out"])

    return apply_fn, {"w": draw(4, 5), "out": draw(5, 3)}, draw.inputs(4)


@zoo
def weight_through_bfloat16(draw):
    """Piecewise constant in the weight, with the derivative of what it rounds."""

    def apply_fn(p, x):
        w = p["w"].astype(jnp.bfloat16).astype(x.dtype)
        return jnp.sin(jnp.tanh(x @ w) @ p["out"])

    return apply_fn, {"w": draw(4, 5), "out": draw(5, 3)}, draw.inputs(4)


@zoo
def product_in_another_precision(draw):
    def apply_fn(p, x):
        wide = lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float64)
        return jnp.sin(jnp.tanh(wide.astype(x.dtype)) @ p["out"])

    return apply_fn, {"w": draw(4, 5), "out": draw(5, 3)}, draw.inputs(4)


@zoo
def slices_of_a_weight(draw):
    """Overlapping, strided, reversed."""

    def apply_fn(p, x):
        hidden = jnp.tanh(x @ p["w"][:4]) + x[:, ::2] @ p["w"][2:4] + x[:, :3] @ p["w"][::-2]
        return jnp.sin(hidden @ p["w"].T[:, 1:4])

    return apply_fn, {"w": draw(5, 5)}, draw.inputs(4)


@zoo
def concatenated_weights(draw):
    def apply_fn(p, x):
        hidden = jnp.tanh(x @ jnp.concatenate([p["left"], p["right"]], axis=1))
        return jnp.sin(hidden @ jnp.stack([p["row"]] * 5) + jnp.pad(p["b"], (1, 0)))

    return apply_fn, {"left": draw(4, 2), "right": draw(4, 3), "row": draw(3), "b": draw(2)}, draw.inputs(4)


@zoo
def reshaped_weights(draw):
    """One flat vector of all parameters."""

    def apply_fn(p, x):
        first, second = p[:20].reshape(4, 5), p[20:].reshape(3, 5).T
        return jnp.sin(jnp.tanh(x @ first) @ second)

    return apply_fn, draw(35) / 2, draw.inputs(4)


@zoo
def weights_in_frequency(draw):
    """Complex numbers within, real ones outside."""

    def apply_fn(p, x):
        spectrum = jnp.fft.rfft(x, axis=1) * lax.complex(p["real"], p["imaginary"])[None]
        return jnp.sin(jnp.tanh(jnp.fft.irfft(spectrum, n=6, axis=1)).mean(1) @ p["out"])

    return apply_fn, {"real": draw(4, 3), "imaginary": draw(4, 3), "out": draw(3, 3)}, draw.inputs(6, 3)


@zoo
def implicit_layer(draw):
    def apply_fn(p, x):
        return jnp.sin(jnp.linalg.solve(3 * jnp.eye(4, dtype=x.dtype) + p["w"], x.T).T @ p["out"])

    return apply_fn, {"w": draw(4, 4), "out": draw(4, 3)}, draw.inputs(4)


@zoo
def sorted_activations(draw):
    def apply_fn(p, x):
        return jnp.sin(jnp.sort(x @ p["w"], axis=1) @ p["out"]) + lax.top_k(x @ p["w"], 2)[0][:, 1:]

    return apply_fn, {"w": draw(4, 5), "out": draw(5, 3)}, draw.inputs(4)


# -------------------------------------------------------------------------------------------------------- the libraries


class NNXConvNet(nnx.Module):
    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List(
            [nnx.Conv(m, n, (3, 3), strides=2, param_dtype=dtype, rngs=rngs) for m, n in [(2, 4), (4, 3)]]
        )
        self.norm = nnx.LayerNorm(3, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(3, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        for conv_layer in self.convs:
            x = nnx.gelu(conv_layer(x))
        return jnp.sin(self.out(self.norm(x.mean((1, 2)))))


@zoo
def nnx_cnn(draw):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: NNXConvNet(draw.dtype)))
    return lambda p, x: nnx.merge(graphdef, p)(x), draw.like(params), draw.inputs(5, 5, 2)


def equinox_model(draw, model):
    """`model()` is only traced: initialising it would take longer than the test."""
    params, static = eqx.partition(eqx.filter_eval_shape(model), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda p, x: jnp.sin(jax.vmap(eqx.combine(p, static))(x)), draw.like(params)


@zoo
def equinox_mlp(draw):
    def model():
        return eqx.nn.MLP(4, 3, 5, depth=2, activation=jnp.tanh, dtype=draw.dtype, key=jax.random.key(0))

    return *equinox_model(draw, model), draw.inputs(4)


@zoo
def equinox_conv(draw):
    def model():
        first, second = jax.random.split(jax.random.key(0))
        conv_layer = eqx.nn.Conv2d(2, 4, 3, stride=2, dtype=draw.dtype, key=first)
        out = eqx.nn.Linear(16, 3, dtype=draw.dtype, key=second)
        return eqx.nn.Sequential([conv_layer, eqx.nn.Lambda(jnp.tanh), eqx.nn.Lambda(jnp.ravel), out])

    return *equinox_model(draw, model), draw.inputs(2, 5, 5)


@zoo
def haiku_mlp(draw):
    model = hk.without_apply_rng(hk.transform(lambda x: jnp.sin(hk.nets.MLP([5, 4, 3], activation=jnp.tanh)(x))))
    x = draw.inputs(4)
    return model.apply, draw.like(jax.eval_shape(model.init, jax.random.key(0), x)), x
