"""How far rounding alone moves what a run is judged by: its outputs, output gradient and loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gramian._losses import OutputLoss
from gramian._problem import KernelSource

PyTree = Any
PROBES = 8  # random signs; their mean square is what counts
SAFETY = 2.0  # evaluations round inside of the model too, more than once


class Rounding(NamedTuple):
    """What the last digit is worth: norms of u_S, U_Q and g, and the loss itself."""

    outputs_s: float
    outputs_q: float
    grad: float
    loss: float


def rounding_of(source: KernelSource, loss: OutputLoss, ends: tuple[PyTree, PyTree], num_steps: int) -> Rounding:
    """How far outputs, output gradient and loss are off at the ends of a run of `num_steps` rounded steps.

    Measured: parameters and outputs are moved by one unit in the last place each, at random. So it knows of the sizes
    that are subtracted in a displacement or a drop of the loss, of logits far from zero, of parameters so large that a
    step is lost in them. Errors of steps add up like a random walk.

    Cost: 16 evaluations of the model.
    """
    squares = np.zeros(4)
    for params in ends:
        base, moved = jax.device_get(_measure(source, loss, params))
        for k, (start, one) in enumerate(zip(base, moved, strict=True)):
            away = np.asarray(one, np.float64) - np.asarray(start, np.float64)
            squares[k] += np.sum(away**2) / PROBES
        squares[3] += (float(jnp.finfo(base[0].dtype).eps) * float(base[3])) ** 2
    return Rounding(*(SAFETY * np.sqrt((1 + num_steps) * squares)).tolist())


@jax.jit
def _measure(source, loss, params):
    def shaken(leaf, key):
        ulp = jax.random.rademacher(key, leaf.shape, leaf.dtype) * jnp.finfo(leaf.dtype).eps
        return leaf * (1 + ulp)

    def evaluate(u_s, u_q):
        return u_s, u_q, loss.grad(u_s), loss.value(u_s)

    def probe(key):
        leaves, structure = jax.tree.flatten(params)
        key_s, key_q, *keys = jax.random.split(key, 2 + len(leaves))
        u_s, u_q = source.outputs(jax.tree.unflatten(structure, list(map(shaken, leaves, keys))))
        return evaluate(shaken(u_s, key_s), shaken(u_q, key_q))

    return evaluate(*source.outputs(params)), jax.lax.map(probe, jax.random.split(jax.random.key(0), PROBES))
