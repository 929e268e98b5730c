"""Functions of one example applied to the rows of a batch, some rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from entk._types import PyTree


def map_examples(function: Callable[[Any], Any], x: PyTree, microbatch_size: int | None) -> PyTree:
    """`vmap` over the rows of x, at most `microbatch_size` of them at a time.

    Where JAX cannot batch the function, as with `jax.lax.ragged_dot`, callbacks without a `vmap_method` and ordered
    ones, the rows are taken one after another.
    """
    n = jax.tree.leaves(x)[0].shape[0]

    def together(x):
        if microbatch_size is None or microbatch_size >= n:
            return jax.vmap(function)(x)
        return jax.lax.map(function, x, batch_size=microbatch_size)

    with contextlib.suppress(NotImplementedError, ValueError):
        return jax.jit(together, inline=True)(x)  # traced apart: an attempt that fails leaves nothing behind
    return jax.lax.map(function, x)


def sum_blocks(function: Callable[..., Any], batch: tuple[PyTree, ...], microbatch_size: int | None) -> PyTree:
    """Sum of `function(*block)` over blocks of at most `microbatch_size` examples, one block held at a time."""
    n = jax.tree.leaves(batch)[0].shape[0]
    size = min(microbatch_size or n, n)
    whole = n // size * size
    blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, size, *leaf.shape[1:]), batch)

    def add(total, block):
        return jax.tree.map(jnp.add, total, function(*block)), None

    total = function(*jax.tree.map(lambda leaf: leaf[0], blocks))
    if whole > size:
        total, _ = jax.lax.scan(add, total, jax.tree.map(lambda leaf: leaf[1:], blocks))
    return add(total, jax.tree.map(lambda leaf: leaf[whole:], batch))[0] if whole < n else total


def one_row(x: PyTree) -> PyTree:
    """Shapes and dtypes of a batch of one example."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)[1:]), jnp.result_type(leaf)), x)
