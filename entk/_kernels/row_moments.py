"""Moments of the gradients in a table of which every example takes a few rows.

An example's gradient is zero in all rows but those. Each row therefore keeps its number of examples and their spread,
updated in place where a block of examples takes rows; the examples that do not take a row enter at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from entk._structured.products import Sizes


class RowMoments(NamedTuple):
    """Of n examples, as far as they have been added.

    Attributes:
      counts: (all groups' rows,) integers, the examples that take a row.
      mean: (all groups' rows, outputs), Σ g / n.
      spread: Σ (g − m)² over the examples that take a row, m their own mean: mean · n / counts.
    """

    counts: Array
    mean: Array
    spread: Array


def no_examples(sizes: Sizes, dtype: Any) -> RowMoments:
    """Where the sums begin."""
    rows = sizes.groups * sizes.inputs
    zeros = jnp.zeros((rows, sizes.outputs), dtype)
    return RowMoments(jnp.zeros(rows, jnp.int32), zeros, zeros)


def add_examples(moments: RowMoments, index: Array, cotangent: Array, n: int) -> RowMoments:
    """Adds a block of the n examples.

    Deviations are taken from the mean of the examples before the block, in a row without any from that of the block:
    no square of a mean is subtracted from a sum of squares.

    Args:
      moments: of the examples before.
      index: (block, groups, positions) rows, -1 for none.
      cotangent: (block, groups, positions, outputs).
      n: examples of all blocks.
    """
    counts, mean, spread = moments
    groups = index.shape[1]
    rows = len(counts) // groups
    if index.shape[-1] > 1:
        index, cotangent = _sum_repeated(index, cotangent, rows)
    gradient = cotangent.astype(mean.dtype).reshape(-1, mean.shape[-1])
    first = rows * jnp.arange(groups, dtype=index.dtype)[:, None]
    at = jnp.where(index < 0, len(counts), first + index).reshape(-1)  # past the end: dropped

    def take(table: Array) -> Array:
        return table.at[at].get(mode="clip")  # what stands in place of a dropped row is dropped with it

    before = take(counts)[:, None].astype(mean.dtype)
    counts = counts.at[at].add(1, mode="drop")
    after = take(counts)[:, None].astype(mean.dtype)
    known = jnp.where(before == 0, after, before)  # examples that the mean is of before deviations are taken
    mean = mean.at[at].add(jnp.where(before == 0, gradient / n, 0), mode="drop")
    deviation = gradient - take(mean) * (n / jnp.maximum(known, 1))
    mean = mean.at[at].add(jnp.where(before == 0, deviation, gradient) / n, mode="drop")
    spread = spread.at[at].add(deviation * (gradient - take(mean) * (n / jnp.maximum(after, 1))), mode="drop")
    return RowMoments(counts, mean, spread)


def over_all(moments: RowMoments, n: int) -> tuple[Array, Array]:
    """(ḡ, Σ (g_i − ḡ)²) over all n examples: zeros for those that do not take a row."""
    count = moments.counts[:, None].astype(moments.mean.dtype)
    of_zeros = (n - count) * (n / jnp.maximum(count, 1))
    return moments.mean, jnp.maximum(moments.spread, 0) + of_zeros * moments.mean**2


def _sum_repeated(index: Array, cotangent: Array, rows: int) -> tuple[Array, Array]:
    """Cotangents of a row that an example takes several times, summed; a row stands once, with -1 in other places."""
    n, groups, positions = index.shape
    order = _order(index + 1, rows + 1)
    index = jnp.take_along_axis(index, order, -1)
    cotangent = jnp.take_along_axis(cotangent, order[..., None], -2)
    is_first = jnp.diff(index, prepend=-2, axis=-1) != 0
    first = lax.cummax(jnp.where(is_first, jnp.arange(positions, dtype=jnp.int32), 0), 2)
    total = jnp.zeros(cotangent.shape, jnp.promote_types(cotangent.dtype, jnp.float32))
    total = total.at[jnp.arange(n)[:, None, None], jnp.arange(groups)[:, None], first].add(cotangent)
    return jnp.where(is_first, index, -1), total


def _order(index: Array, rows: int) -> Array:
    """argsort of numbers below `rows` along the last axis.

    One key of number and position, where it fits into 32 bits, is sorted five times as fast as one with a payload.
    """
    positions = index.shape[-1]
    if rows * positions > 2**32:
        return jnp.argsort(index, -1)
    place = jnp.arange(positions, dtype=jnp.uint32)
    keys = jnp.sort(index.astype(jnp.uint32) * jnp.uint32(positions) + place, -1, stable=False)
    return (keys % jnp.uint32(positions)).astype(jnp.int32)
