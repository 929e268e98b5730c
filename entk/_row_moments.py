"""Moments of the gradients in a table of which every example takes a few rows.

An example's gradient is zero in all rows but those, so each row keeps the count, the mean and Σ (g − mean)² of the
examples that take it. All three are updated in place, and the examples that do not take a row enter at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from entk._products import Sizes


class RowMoments(NamedTuple):
    """Of the examples that take a row, for every row.

    Attributes:
      count: (groups, rows) integers.
      mean: (groups, rows, outputs), their mean gradient.
      spread: Σ (g − mean)² over them.
    """

    count: Array
    mean: Array
    spread: Array


def no_examples(sizes: Sizes, dtype: Any) -> RowMoments:
    """Where the sums begin."""
    table = (sizes.groups, sizes.inputs)
    zeros = jnp.zeros((*table, sizes.outputs), dtype)
    return RowMoments(jnp.zeros(table, jnp.int32), zeros, zeros)


def add_examples(moments: RowMoments, index: Array, cotangent: Array) -> RowMoments:
    """With n more examples.

    Rows that are new take the block's mean first, and deviations are from the mean so far: no squares of means are
    subtracted from sums of squares.

    Args:
      moments: so far.
      index: (n, groups, positions) rows, -1 for none.
      cotangent: (n, groups, positions, outputs).
    """
    count, mean, spread = moments
    groups, rows = count.shape
    index = jnp.where(index < 0, rows, index)  # past the end: dropped
    if index.shape[-1] > 1:
        index, cotangent = _sum_repeated(index, cotangent, rows)
    gradient = cotangent.astype(mean.dtype)
    at = jnp.arange(groups)[:, None], index

    def take(table: Array) -> Array:
        return table.at[at].get(mode="clip")  # what it gives for a dropped entry is dropped, too

    before = take(count)
    count = count.at[at].add(1, mode="drop")
    share = 1 / take(count).astype(mean.dtype)[..., None]
    mean = mean.at[at].add(jnp.where(before[..., None] == 0, gradient * share, 0), mode="drop")
    deviation = gradient - take(mean)
    mean = mean.at[at].add(deviation * share, mode="drop")
    spread = spread.at[at].add(deviation * (gradient - take(mean)), mode="drop")
    return RowMoments(count, mean, spread)


def over_all(moments: RowMoments, n: int) -> tuple[Array, Array]:
    """(ḡ, Σ (g_i − ḡ)²) over n examples, those that do not take a row included, whose gradient there is zero."""
    count, mean, spread = moments.count[..., None], moments.mean, moments.spread
    share = count / jnp.asarray(n, mean.dtype)
    return share * mean, jnp.maximum(spread, 0) + share * (n - count) * mean**2


def _sum_repeated(index: Array, cotangent: Array, rows: int) -> tuple[Array, Array]:
    """Cotangents of a row that an example takes several times, summed; a row stands once, in place of others `rows`."""
    n, groups, positions = index.shape
    order = _order(index, rows)
    index = jnp.take_along_axis(index, order, -1)
    cotangent = jnp.take_along_axis(cotangent, order[..., None], -2)
    is_first = jnp.diff(index, prepend=-1, axis=-1) != 0
    place = jnp.arange(positions, dtype=jnp.int32)
    first = lax.cummax(jnp.where(is_first, place, 0), 2)
    total = jnp.zeros(cotangent.shape, jnp.promote_types(cotangent.dtype, jnp.float32))
    total = total.at[jnp.arange(n)[:, None, None], jnp.arange(groups)[:, None], first].add(cotangent)
    return jnp.where(is_first, index, rows), total


def _order(index: Array, rows: int) -> Array:
    """argsort along the last axis. One key for index and position, where it fits, sorts five times as fast as two."""
    positions = index.shape[-1]
    if (rows + 1) * positions > 2**32:
        return jnp.argsort(index, -1)
    place = jnp.arange(positions, dtype=jnp.uint32)
    keys = jnp.sort(index.astype(jnp.uint32) * jnp.uint32(positions) + place, -1, stable=False)
    return (keys % jnp.uint32(positions)).astype(jnp.int32)
