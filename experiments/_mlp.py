"""The multilayer perceptron of the experiments, in Flax NNX."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """Dense layers of the given sizes with tanh between them."""

    def __init__(self, sizes: tuple[int, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(a, b, dtype=dtype, param_dtype=dtype, rngs=rngs) for a, b in pairs])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.tanh(layer(x))
        return self.layers[-1](x)
