"""A convolution whose input gradient is a plain convolution, too.

JAX transposes a convolution into one of a dilated cotangent with a reversed kernel. XLA's CPU compiler multiplies the
dilation's zeros; and inside a loop it does not reverse the kernel beforehand, and falls back to code that is 70 times
slower. Here the kernel is reversed explicitly, and with stride s the s^d phases of the input's pixels are channels of
one dense convolution.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def convolution(eqn: Any, x: Array, kernel: Array) -> Array:
    """The equation's conv_general_dilated, with a reverse-mode rule of its own; there is none for forward mode."""
    params = eqn.params
    dilated = any(step != 1 for step in (*params["lhs_dilation"], *params["rhs_dilation"]))
    cropped = any(pad < 0 for pads in params["padding"] for pad in pads)
    if dilated or cropped or params["batch_group_count"] != 1:
        return eqn.primitive.bind(x, kernel, **params)

    @jax.custom_vjp
    def convolve(x, kernel):
        return eqn.primitive.bind(x, kernel, **params)

    def forward(x, kernel):
        return eqn.primitive.bind(x, kernel, **params), (x, kernel)

    def backward(operands, cotangent):
        x, kernel = operands
        _, pull = jax.vjp(lambda kernel: eqn.primitive.bind(x, kernel, **params), kernel)
        return _input_gradient(params, kernel, cotangent, x.shape).astype(x.dtype), *pull(cotangent)

    convolve.defvjp(forward, backward)
    return convolve(x, kernel)


def _input_gradient(params: dict[str, Any], kernel: Array, cotangent: Array, shape: tuple[int, ...]) -> Array:
    """dx[i] = Σ_k dy[(i + pad − k) / s] w[k] over the k for which the division is exact.

    With i + pad = s q + r and k = s j + r this is Σ_j dy[q − j] w[s j + r] for every phase r.
    """
    numbers, strides, groups = params["dimension_numbers"], params["window_strides"], params["feature_group_count"]
    rank = len(strides)
    space, each = range(rank), range(1, 1 + rank)
    kernel = kernel.transpose([*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]])
    cotangent = cotangent.transpose([numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]])
    sizes = [shape[axis] for axis in numbers.lhs_spec[2:]]
    channels, features = kernel.shape[rank], kernel.shape[rank + 1] // groups  # of one group

    taps = [-(-kernel.shape[k] // strides[k]) for k in space]
    kernel = jnp.pad(kernel, [*((0, taps[k] * strides[k] - kernel.shape[k]) for k in space), (0, 0), (0, 0)])
    split = [size for pair in zip(taps, strides, strict=True) for size in pair]
    kernel = jnp.flip(kernel.reshape(*split, channels, groups, features), range(0, 2 * rank, 2))
    order = [*range(0, 2 * rank, 2), 2 * rank + 2, 2 * rank + 1, *range(1, 2 * rank, 2), 2 * rank]
    kernel = kernel.transpose(order).reshape(*taps, features, groups * math.prod(strides) * channels)
    kernel = lax.optimization_barrier(kernel)  # else the compiler moves the reversal into the convolution again

    lows = [low for low, _ in params["padding"]]
    first = [lows[k] // strides[k] for k in space]
    stop = [-(-(lows[k] + sizes[k]) // strides[k]) for k in space]
    phases = lax.conv_general_dilated(
        cotangent,
        kernel,
        (1,) * rank,
        [(taps[k] - 1 - first[k], stop[k] - cotangent.shape[1 + k]) for k in space],
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, rank + 1, *each), (rank + 1, rank, *space), (0, rank + 1, *each)
        ),
        feature_group_count=groups,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    n, *counts, _ = phases.shape
    phases = phases.reshape(n, *counts, groups, *strides, channels)
    order = [0, *(axis for k in space for axis in (1 + k, 2 + rank + k)), 1 + rank, 2 + 2 * rank]
    dx = phases.transpose(order).reshape(n, *(counts[k] * strides[k] for k in space), groups * channels)
    start = [lows[k] - first[k] * strides[k] for k in space]
    dx = lax.slice(dx, [0, *start, 0], [n, *(start[k] + sizes[k] for k in space), groups * channels])
    places = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    return dx.transpose([places.index(axis) for axis in range(rank + 2)])
