"""The benchmark's networks in plain PyTorch: `FAMILIES[family](**sizes)` is a function of one example.

`prepare(family, arrays)` lays weights and inputs out as PyTorch keeps them (channels first, matrices as `F.linear`
takes them), before any clock runs. The kernel does not depend on the order of the parameters.
"""

from __future__ import annotations

import math

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]


def prepare(family, sizes, arrays):
    """Weights by name and the batch of inputs, as tensors."""
    weights = {name: array for name, array in arrays.items() if name != "x"}
    x = arrays["x"]
    if family == "cnn":
        side = math.isqrt(len(weights["head_w"]) // sizes["channels"][-1])
        head = weights["head_w"].reshape(side, side, sizes["channels"][-1], -1)
        weights["head_w"] = head.transpose(2, 0, 1, 3).reshape(-1, head.shape[-1])
    for name, array in weights.items():
        if name.endswith("_w"):
            weights[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    if family in ("cnn", "resnet"):
        x = x.transpose(0, 3, 1, 2)
    x = x.astype(np.int64) if x.dtype == np.int32 else x
    return {name: _tensor(array) for name, array in weights.items()}, _tensor(x)


def _tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def mlp(widths):
    def apply(w, x):
        for i in range(len(widths) - 2):
            x = F.relu(_dense(w, f"dense{i}", x))
        return _dense(w, f"dense{len(widths) - 2}", x)

    return apply


def cnn(side, channels, strides, outputs):
    def apply(w, x):
        x = x[None]
        for i, stride in enumerate(strides):
            x = F.relu(F.conv2d(x, w[f"conv{i}_w"], w[f"conv{i}_b"], stride=stride, padding=1))
        return _dense(w, "head", x.flatten())

    return apply


def transformer(layers, width, heads, length, vocabulary):
    def attend(w, i, h):
        t = h.shape[0]
        q, k, v = (a.reshape(t, heads, -1).transpose(0, 1) for a in _dense(w, f"qkv{i}", h).chunk(3, dim=-1))
        scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -1e9)
        return _dense(w, f"mix{i}", (scores.softmax(-1) @ v).transpose(0, 1).reshape(t, width))

    def norm(w, name, h):
        return F.layer_norm(h, (width,), w[f"{name}_scale"], w[f"{name}_b"])

    def apply(w, x):
        h = F.embedding(x, w["token"]) + w["position"]
        for i in range(layers):
            h = h + attend(w, i, norm(w, f"norm_a{i}", h))
            h = h + _dense(w, f"down{i}", F.gelu(_dense(w, f"up{i}", norm(w, f"norm_b{i}", h)), approximate="tanh"))
        return _dense(w, "head", norm(w, "norm", h[-1]))

    return apply


def resnet(side, channels, groups, outputs):
    def norm(w, name, x):
        return F.group_norm(x, groups, w[f"{name}_scale"], w[f"{name}_b"])

    def apply(w, x):
        x = F.relu(norm(w, "stem", F.conv2d(x[None], w["stem_w"], padding=1)))
        for i in range(len(channels)):
            stride = 1 if i == 0 else 2
            y = F.relu(norm(w, f"first{i}", F.conv2d(x, w[f"first{i}_w"], stride=stride, padding=1)))
            y = norm(w, f"second{i}", F.conv2d(y, w[f"second{i}_w"], padding=1))
            x = F.relu(y + (x if i == 0 else F.conv2d(x, w[f"skip{i}_w"], stride=stride)))
        return _dense(w, "head", x.mean((0, 2, 3)))

    return apply


def rnn(inputs, width, length, outputs):
    def apply(w, x):
        driven = F.linear(x, w["in_w"])  # all steps at once: only the recurrence has to wait
        h = torch.zeros(width)
        for t in range(length):
            h = torch.tanh(driven[t] + _dense(w, "hidden", h))
        return _dense(w, "head", h)

    return apply


FAMILIES = {"mlp": mlp, "cnn": cnn, "transformer": transformer, "resnet": resnet, "rnn": rnn}


def _dense(w, name, x):
    return F.linear(x, w[f"{name}_w"], w[f"{name}_b"])
