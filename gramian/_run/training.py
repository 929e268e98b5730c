"""The steps of a training run: mini-batches, gradients, updates."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from entk.internal import check_apply, check_count, model_precision
from gramian._checks import check_all_move, check_finite, check_kind, check_order
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
    """The state after steps on `batches`, or on those of `span = (first, last)`, and whether their losses were finite.

    One program serves all spans, so that where a run is cut leaves no trace in its bits.
    """
    first, last = (0, len(batches)) if span is None else span
    return _train(apply_fn, optimizer, loss, x_s, state, batches, extra_args, np.int32(first), np.int32(last))


@partial(jax.jit, static_argnums=(0, 1, 6))
def _train(apply_fn, optimizer, loss, x_s, state, batches, extra_args, first, last):
    def step(k, carried):
        state, finite = carried
        state, value = one_step(apply_fn, optimizer, loss, x_s, state, batches[k], extra_args)
        return state, finite & jnp.isfinite(value)

    return jax.lax.fori_loop(first, last, step, (state, jnp.ones((), bool)))


@partial(jax.jit, static_argnums=(0, 1, 6))
def finite_steps(apply_fn, optimizer, loss, x_s, state, batches, extra_args=None):
    """For every step, whether its batch's loss is finite before it, and the state after it."""
    before = finite_leaves(state)

    def step(state, batch):
        state, value = one_step(apply_fn, optimizer, loss, x_s, state, batch, extra_args)
        return state, (jnp.isfinite(value), ~(before & ~finite_leaves(state)).any())

    return jax.lax.scan(step, state, batches)[1]


def one_step(apply_fn, optimizer, loss, x_s, state, batch, extra_args):
    """The state after a step, and the loss of its batch before."""
    params, opt_state = state
    grads, _, value = batch_gradient(apply_fn, loss, x_s, params, batch)
    extras = extra_args(params, batch) if extra_args else {}
    updates, opt_state = optax.with_extra_args_support(optimizer).update(grads, opt_state, params, **extras)
    return TrainState(optax.apply_updates(params, updates), opt_state), value


@jax.jit
def finite_leaves(state: TrainState) -> Array:
    """For every leaf, whether all of it is finite."""
    leaves = map(jnp.asarray, jax.tree.leaves(state))
    inexact = [(leaf, jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves]
    return jnp.stack([jnp.isfinite(leaf).all() if given else jnp.ones((), bool) for leaf, given in inexact])


def names_of_lost(before: Array, state: TrainState) -> str:
    """The leaves that are finite no more, by name; what was infinite before, a plateau's best loss, may stay so."""
    gone = np.flatnonzero(np.asarray(before) & ~np.asarray(finite_leaves(state)))
    named = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)] if len(gone) else []
    names = [jax.tree_util.keystr(named[k]).lstrip(".") for k in gone]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def batch_gradient(apply_fn, loss, x_s, params, batch):
    """The gradient of the mean loss of a batch, the batch outputs' pullback, which it came from, and that loss."""
    x, targets = (jax.tree.map(lambda leaf: leaf[batch], tree) for tree in (x_s, loss.targets))

    def outputs(params):
        with model_precision():
            out = apply_fn(params, x)
        return out.reshape(out.shape[0], -1)

    out, pull = jax.vjp(outputs, params)
    values, slopes = jax.vmap(jax.value_and_grad(loss.example_loss))(out, targets)
    return pull(slopes / len(batch))[0], pull, jnp.mean(values)


def check_training(apply_fn, params, x_s, loss) -> int:
    check_order(loss, x_s)
    spec = check_apply(apply_fn, params, x_s, "x_s")
    check_all_move(apply_fn, params, x_s)
    check_targets(loss, *spec)
    if jnp.finfo(spec.dtype).bits < 32:
        raise TypeError(
            f"params and outputs have dtype {spec.dtype}, in which a run could not be told from its rounding: "
            "keep params in float32, and cast inside apply_fn to compute in less, as mixed precision does."
        )
    for name, tree in (("params", params), ("x_s", x_s)):
        check_finite(tree, name)
    return spec.num_examples


def check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, OutputLoss):
        raise TypeError("optimizer is an OutputLoss: the order is apply_fn, params, x_s, loss, optimizer. Swap them.")
    check_kind("optimizer", optimizer, ("init", "update"), "an optax transformation, e.g. optax.adam(1e-3)")
