"""The benchmark's networks in plain JAX: `FAMILIES[family](**sizes)` is an `apply_fn(params, x)`.

Written for the JAX of neural-tangents (0.4.25) and the newest alike. Padding is one pixel on every side, as PyTorch's
`padding=1`: XLA's SAME puts the single pixel of a stride of two on one side, which no PyTorch convolution does.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def mlp(widths):
    def apply(w, x):
        for i in range(len(widths) - 2):
            x = jnp.maximum(_dense(w, f"dense{i}", x), 0)
        return _dense(w, f"dense{len(widths) - 2}", x)

    return apply


def cnn(side, channels, strides, outputs):
    def apply(w, x):
        for i, stride in enumerate(strides):
            x = jnp.maximum(_conv(x, w[f"conv{i}_w"], stride) + w[f"conv{i}_b"], 0)
        return _dense(w, "head", x.reshape(x.shape[0], -1))

    return apply


def transformer(layers, width, heads, length, vocabulary):
    def attend(w, i, h):
        n, t, _ = h.shape
        q, k, v = jnp.split(_dense(w, f"qkv{i}", h), 3, axis=-1)
        q, k, v = (a.reshape(n, t, heads, width // heads) for a in (q, k, v))
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(width // heads)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        weights = weights / weights.sum(-1, keepdims=True)
        return _dense(w, f"mix{i}", jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, t, width))

    def apply(w, x):
        h = w["token"][x] + w["position"]
        for i in range(layers):
            h = h + attend(w, i, _norm(w, f"norm_a{i}", h))
            h = h + _dense(w, f"down{i}", _gelu(_dense(w, f"up{i}", _norm(w, f"norm_b{i}", h))))
        return _dense(w, "head", _norm(w, "norm", h[:, -1]))

    return apply


def resnet(side, channels, groups, outputs):
    def norm(w, name, x):
        n, height, width, channel = x.shape
        x = x.reshape(n, height, width, groups, channel // groups)
        x = _standardize(x, (1, 2, 4)).reshape(n, height, width, channel)
        return x * w[f"{name}_scale"] + w[f"{name}_b"]

    def apply(w, x):
        x = jnp.maximum(norm(w, "stem", _conv(x, w["stem_w"], 1)), 0)
        for i in range(len(channels)):
            stride = 1 if i == 0 else 2
            y = jnp.maximum(norm(w, f"first{i}", _conv(x, w[f"first{i}_w"], stride)), 0)
            y = norm(w, f"second{i}", _conv(y, w[f"second{i}_w"], 1))
            x = jnp.maximum(y + (x if i == 0 else _conv(x, w[f"skip{i}_w"], stride)), 0)
        return _dense(w, "head", x.mean((1, 2)))

    return apply


def rnn(inputs, width, length, outputs):
    def apply(w, x):
        def step(h, driven_t):
            return jnp.tanh(driven_t + _dense(w, "hidden", h)), None

        driven = (x @ w["in_w"]).swapaxes(0, 1)  # all steps at once: only the recurrence has to wait
        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], width), x.dtype), driven)
        return _dense(w, "head", h)

    return apply


FAMILIES = {"mlp": mlp, "cnn": cnn, "transformer": transformer, "resnet": resnet, "rnn": rnn}


def _dense(w, name, x):
    return x @ w[f"{name}_w"] + w[f"{name}_b"]


def _conv(x, filters, stride):
    pad = filters.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, filters, (stride, stride), [(pad, pad), (pad, pad)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _standardize(x, axes):
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axes, keepdims=True) + 1e-5)


def _norm(w, name, x):
    return _standardize(x, (-1,)) * w[f"{name}_scale"] + w[f"{name}_b"]


def _gelu(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
