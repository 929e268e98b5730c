"""The steps of a training run: mini-batches, gradients, updates."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from entk._checks import check_apply, check_count
from entk._jacobian import model_precision
from gramian._checks import check_all_move, check_finite
from gramian._losses import OutputLoss, check_targets

PyTree = Any


class TrainState(NamedTuple):
    """Parameters and optimizer state before a step."""

    params: PyTree
    opt_state: PyTree


def minibatches(n: int, batch_size: int, epochs: int, seed: int = 0, *, replace: bool = False) -> np.ndarray:
    """Indices of the mini-batches of `epochs` passes over n examples, (steps, batch_size).

    Without replacement every epoch is a new permutation, less the examples that fill no batch; with it, as many batches
    of independent draws.

    Args:
      n: examples.
      batch_size: b, examples a step, 1 ≤ b ≤ n.
      epochs: passes.
      seed: of the draws.
      replace: draw with replacement.

    Raises:
      ValueError: a batch larger than n, sizes that are not positive.

    Example:
      >>> from gramian import minibatches
      >>> minibatches(4, 2, 1).shape
      (2, 2)
    """
    n, batch_size, epochs = (check_count(*pair) for pair in (("n", n), ("batch_size", batch_size), ("epochs", epochs)))
    if batch_size > n:
        raise ValueError(f"batch_size={batch_size} exceeds the n={n} examples.")
    rng, a_pass = np.random.default_rng(seed), n // batch_size
    if replace:
        return rng.integers(0, n, (epochs * a_pass, batch_size), dtype=np.int32)
    passes = [rng.permutation(n)[: a_pass * batch_size].reshape(a_pass, batch_size) for _ in range(epochs)]
    return np.concatenate(passes).astype(np.int32)


def train(apply_fn, optimizer, loss, x_s, state, batches, extra_args=None, *, span=None):
    """The state after steps on `batches`, or on those of `span = (first, last)` alone.

    One program serves all spans, so that where a run is cut leaves no trace in its bits.
    """
    first, last = (0, len(batches)) if span is None else span
    return _train(apply_fn, optimizer, loss, x_s, state, batches, extra_args, np.int32(first), np.int32(last))


@partial(jax.jit, static_argnums=(0, 1, 6))
def _train(apply_fn, optimizer, loss, x_s, state, batches, extra_args, first, last):
    def step(k, state):
        params, opt_state = state
        batch = batches[k]
        grads = batch_gradient(apply_fn, loss, x_s, params, batch)[0]
        extras = extra_args(params, batch) if extra_args else {}
        updates, opt_state = optax.with_extra_args_support(optimizer).update(grads, opt_state, params, **extras)
        return TrainState(optax.apply_updates(params, updates), opt_state)

    return jax.lax.fori_loop(first, last, step, state)


def batch_gradient(apply_fn, loss, x_s, params, batch):
    """The gradient of the mean loss of a batch, and the batch outputs' pullback, which it came from."""
    x, targets = (jax.tree.map(lambda leaf: leaf[batch], tree) for tree in (x_s, loss.targets))

    def outputs(params):
        with model_precision():
            out = apply_fn(params, x)
        return out.reshape(out.shape[0], -1)

    out, pull = jax.vjp(outputs, params)
    return pull(jax.vmap(jax.grad(loss.example_loss))(out, targets) / len(batch))[0], pull


def check_training(apply_fn, params, x_s, loss) -> int:
    if not isinstance(loss, OutputLoss):
        raise TypeError(f"loss is a {type(loss).__name__}; build it with squared_loss(y) or another gramian loss.")
    spec = check_apply(apply_fn, params, x_s, "x_s")
    check_all_move(params)
    check_targets(loss, *spec)
    for name, tree in (("params", params), ("x_s", x_s)):
        check_finite(tree, name)
    return spec.num_examples
