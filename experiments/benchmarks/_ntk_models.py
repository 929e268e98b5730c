"""The networks of the kernel benchmark: their shapes, and their weights and inputs, made once for all contenders."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


class Network(NamedTuple):
    """A network and the inputs its kernel is asked for.

    Attributes:
      title: what a table calls it.
      family: which function of the workers' `jax_models` and `torch_models` it is.
      sizes: that function's settings.
      n: examples.
    """

    title: str
    family: str
    sizes: dict[str, Any]
    n: int


def mlp(n: int, widths: tuple[int, ...]) -> Network:
    return Network(f"MLP {'-'.join(map(str, widths))}", "mlp", {"widths": list(widths)}, n)


def cnn(n: int, side: int = 32, channels: tuple[int, ...] = (32, 64, 64), outputs: int = 10) -> Network:
    sizes = {"side": side, "channels": list(channels), "strides": [1, 2, 2], "outputs": outputs}
    return Network(f"CNN {'/'.join(map(str, channels))}", "cnn", sizes, n)


def transformer(n: int, length: int = 16, width: int = 128, heads: int = 4, vocabulary: int = 64) -> Network:
    sizes = {"layers": 2, "width": width, "heads": heads, "length": length, "vocabulary": vocabulary}
    return Network(f"Transformer d={width}, T={length}", "transformer", sizes, n)


def resnet(n: int, side: int = 32, channels: tuple[int, ...] = (16, 32, 64), outputs: int = 10) -> Network:
    sizes = {"side": side, "channels": list(channels), "groups": 8, "outputs": outputs}
    return Network(f"ResNet with GroupNorm {'/'.join(map(str, channels))}", "resnet", sizes, n)


def rnn(n: int, length: int = 32, width: int = 256, inputs: int = 32, outputs: int = 10) -> Network:
    sizes = {"inputs": inputs, "width": width, "length": length, "outputs": outputs}
    return Network(f"RNN {width}, T={length}", "rnn", sizes, n)


def arrays(network: Network, seed: int) -> dict[str, np.ndarray]:
    """Weights by name, and the inputs as "x": float32, and tokens as int32."""
    rng = np.random.default_rng(seed)
    weights = {name: _draw(rng, name, shape) for name, shape in _shapes(network)}
    return {**weights, "x": _inputs(rng, network)}


def num_outputs(network: Network) -> int:
    """The c of N = n·c."""
    sizes = network.sizes
    return {"mlp": lambda: sizes["widths"][-1], "transformer": lambda: sizes["vocabulary"]}.get(
        network.family, lambda: sizes["outputs"]
    )()


def num_params(network: Network) -> int:
    return sum(int(np.prod(shape)) for _, shape in _shapes(network))


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """He's scale for matrices and filters (`..._w`); scales around 1, biases around 0, none of them at rest there."""
    if name.endswith("_w"):
        return _normal(rng, shape, np.sqrt(2 / np.prod(shape[:-1])))
    return _normal(rng, shape, 0.1) + np.float32(name.endswith("_scale"))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def _inputs(rng: np.random.Generator, network: Network) -> np.ndarray:
    sizes, n = network.sizes, network.n
    if network.family == "transformer":
        return rng.integers(sizes["vocabulary"], size=(n, sizes["length"]), dtype=np.int32)
    shape = {
        "mlp": lambda: (sizes["widths"][0],),
        "rnn": lambda: (sizes["length"], sizes["inputs"]),
    }.get(network.family, lambda: (sizes["side"], sizes["side"], 3))()
    return rng.standard_normal((n, *shape), np.float32)


def _shapes(network: Network) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer, "resnet": _resnet, "rnn": _rnn}[network.family](
        **network.sizes
    )


def _dense(name: str, inputs: int, outputs: int):
    yield f"{name}_w", (inputs, outputs)
    yield f"{name}_b", (outputs,)


def _norm(name: str, width: int):
    yield f"{name}_scale", (width,)
    yield f"{name}_b", (width,)


def _mlp(widths):
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        yield from _dense(f"dense{i}", inputs, outputs)


def _cnn(side, channels, strides, outputs):
    inputs = 3
    for i, (channel, stride) in enumerate(zip(channels, strides, strict=True)):
        yield f"conv{i}_w", (3, 3, inputs, channel)
        yield f"conv{i}_b", (channel,)
        inputs, side = channel, -(-side // stride)
    yield from _dense("head", side * side * inputs, outputs)


def _transformer(layers, width, heads, length, vocabulary):
    yield "token", (vocabulary, width)
    yield "position", (length, width)
    for i in range(layers):
        yield from _norm(f"norm_a{i}", width)
        yield from _dense(f"qkv{i}", width, 3 * width)
        yield from _dense(f"mix{i}", width, width)
        yield from _norm(f"norm_b{i}", width)
        yield from _dense(f"up{i}", width, 4 * width)
        yield from _dense(f"down{i}", 4 * width, width)
    yield from _norm("norm", width)
    yield from _dense("head", width, vocabulary)


def _resnet(side, channels, groups, outputs):
    yield "stem_w", (3, 3, 3, channels[0])
    yield from _norm("stem", channels[0])
    inputs = channels[0]
    for i, channel in enumerate(channels):
        yield f"first{i}_w", (3, 3, inputs, channel)
        yield from _norm(f"first{i}", channel)
        yield f"second{i}_w", (3, 3, channel, channel)
        yield from _norm(f"second{i}", channel)
        if i > 0:
            yield f"skip{i}_w", (1, 1, inputs, channel)
        inputs = channel
    yield from _dense("head", inputs, outputs)


def _rnn(inputs, width, length, outputs):
    yield "in_w", (inputs, width)
    yield from _dense("hidden", width, width)
    yield from _dense("head", width, outputs)
