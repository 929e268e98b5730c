"""Ways to contract two factored Jacobians to a block of the kernel, and what each costs.

With J_i[a] = Σ_r Δ_i[a, r] ⊗ A_i[r], the block of examples i and j is
    K[a, b] = Σ_{r,s} (A_i[r] · A_j[s]) (Δ_i[a, r] · Δ_j[b, s]).
`JacobianBlocks` sums over positions first, `PositionPairs` over inputs and outputs first. Which is cheaper depends on
the sizes alone: with R positions, D inputs, H outputs of the product and c of the model, c²DH products a pair of
examples against R²D + cR²H + c²RH, or D + c²H where there is one position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from entk._precision import row_products
from entk._structured.factors import Factors, Part
from entk._structured.products import Lookup
from entk._types import PyTree

CACHED_NUMBERS = 2**19  # 2 MiB of float32


@dataclass(frozen=True)
class Cost:
    """Multiply-adds and sizes of one way, per part.

    Attributes:
      example: multiply-adds to prepare one example.
      pair: multiply-adds for one pair of examples.
      stored: numbers kept for one example.
      tile: numbers held for one pair of examples while it is contracted.
    """

    example: int
    pair: int
    stored: int
    tile: int


class Contraction(Protocol):
    """How the factors of one part become a block of K."""

    def cost(self, part: Part, num_outputs: int) -> Cost: ...

    def is_tiled(self, part: Part) -> bool:
        """Whether `block` works in small tiles of its own, rather than by products of whole matrices."""
        ...

    def prepare(self, part: Part, factors: Any) -> PyTree:
        """What is kept of one example."""
        ...

    def block(self, part: Part, rows: PyTree, columns: PyTree, precision: lax.PrecisionLike) -> Array:
        """The part's (n₁·c, n₂·c) block of K from n₁ and n₂ prepared examples."""
        ...


def numbers_seen(part: Part) -> tuple[int, ...]:
    """Numbers kept of an activation at one position, per entry of `part.sizes`: of a row of a table its index alone."""
    first, *rest = (sizes.inputs for sizes in part.sizes)
    return (1 if all(isinstance(use, Lookup) for use in part.uses) else first, *rest)


@dataclass(frozen=True)
class JacobianBlocks:
    """Forms the leaf's block of the Jacobian and multiplies it with that of the other examples.

    Args: none.

    Returns:
      A contraction for `Structured(contractions=...)`.

    Raises: nothing.

    Cost: with the leaf's size s = D·H, c·R·s multiply-adds an example and c²·s a pair; c·s numbers an example.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import JacobianBlocks, Structured, plan
      >>> chosen = plan(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((4, 3)))
      >>> forced = Structured(contractions=(JacobianBlocks(),))
      >>> chosen.operations, plan(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((4, 3)), strategy=forced).operations
      (220, 576)
    """

    def cost(self, part, num_outputs):
        c, size = num_outputs, part.num_params
        forming = sum(c * math.prod(sizes) for sizes in part.sizes)
        return Cost(forming, c * c * size, c * size, c * c)

    def is_tiled(self, part):
        return False

    def prepare(self, part, factors):
        if not part.uses:
            return (factors,)
        straight, mirrored = factors
        block = _outer(straight, part.sizes[0].inputs)
        if mirrored is not None:
            block = block + jnp.swapaxes(_outer(mirrored, part.sizes[1].inputs), -1, -2)
        block = block.reshape(block.shape[0], -1)
        return (block, straight.cotangent.sum((1, 2))) if part.has_bias else (block,)

    def block(self, part, rows, columns, precision):
        flat = [
            row_products(row.reshape(-1, row.shape[-1]), column.reshape(-1, column.shape[-1]), precision)
            for row, column in zip(rows, columns, strict=True)
        ]
        return sum(flat[1:], flat[0])


def _outer(factors: Factors, inputs: int) -> Array:
    """Σ_r Δ[a, g, r, h] A[g, r, d] as (c, g, h, d)."""
    activation, cotangent = factors
    dtype = jnp.promote_types(cotangent.dtype, jnp.float32)
    if jnp.issubdtype(activation.dtype, jnp.integer):
        c, groups, _, outputs = cotangent.shape
        empty = jnp.zeros((groups, inputs, c, outputs), dtype)
        rows = jnp.arange(groups)[:, None]
        inside = jnp.where(activation < 0, inputs, activation)  # a negative index would count from the end
        table = empty.at[rows, inside].add(cotangent.transpose(1, 2, 0, 3), mode="drop")
        return table.transpose(2, 0, 3, 1)
    if jax.default_backend() == "cpu":  # which multiplies in float32 anyway, and has no code for some bfloat16 products
        activation, cotangent = activation.astype(dtype), cotangent.astype(dtype)
    outer = jnp.einsum(
        "grah,grd->gahd",
        cotangent.transpose(1, 2, 0, 3),  # copies whole rows; left to the product, it would copy entry by entry
        activation,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    return jnp.swapaxes(outer, 0, 1)


@dataclass(frozen=True)
class PositionPairs:
    """Multiplies activations and cotangents at every pair of positions; the Jacobian is never formed.

    Args: none.

    Returns:
      A contraction for `Structured(contractions=...)`.

    Raises: nothing.

    Cost: R²D + cR²H + c²RH multiply-adds a pair of examples, D = 1 for rows taken by index; D + c²H for one position,
    also where the cotangents of all other positions turn out to be zero (a next-token model's last block). R·(D + c·H)
    numbers an example.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import PositionPairs, plan
      >>> plan(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((4, 3))).leaves[0].contraction == PositionPairs()
      True
    """

    def cost(self, part, num_outputs):
        c = num_outputs
        pair = stored = tile = 0
        seen = numbers_seen(part)
        for (groups, positions, _, outputs), inputs in zip(part.sizes, seen, strict=True):
            if positions == 1:
                pair += groups * (inputs + c * c * outputs)
                tile += 2 * c * c
            else:
                pair += groups * positions * (positions * (inputs + c * outputs) + c * c * outputs)
                tile += c * c
            stored += groups * positions * (inputs + c * outputs)
        if part.mirrored:
            (groups, r, _, outputs), (_, s, _, _) = part.sizes
            pair += 2 * groups * c * r * s * (seen[0] + outputs + c)
            tile += 2 * c * r * s
        return Cost(0, pair, stored, tile)

    def is_tiled(self, part):
        return bool(part.mirrored) or part.sizes[0].positions > 1

    def prepare(self, part, factors):
        return [
            None if one is None else Factors(one.activation, one.cotangent.transpose(1, 2, 0, 3)) for one in factors
        ]

    def block(self, part, rows, columns, precision):
        def of_group(rows, columns):
            (row, row_mirrored), (column, column_mirrored) = rows, columns
            total = _pairs(row, column, part.has_bias, precision)
            if part.mirrored:
                total += _pairs(row_mirrored, column_mirrored, False, precision)
                total += _cross(row, column_mirrored, precision) + _cross(column, row_mirrored, precision).T
            return total

        groups = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (rows, columns))
        first = of_group(*jax.tree.map(lambda leaf: leaf[0], groups))
        if part.sizes[0].groups == 1:
            return first
        rest = jax.tree.map(lambda leaf: leaf[1:], groups)
        return lax.scan(lambda total, group: (total + of_group(*group), None), first, rest)[0]


def _pairs(rows: Factors, columns: Factors, bias: bool, precision: lax.PrecisionLike) -> Array:
    """Σ_{r,s} (A_i[r]·A_j[s] + bias) (Δ_i[a,r]·Δ_j[b,s]): activations (n, R, inputs), cotangents (n, R, c, outputs)."""
    (n1, r1, c, outputs), (n2, r2) = rows.cotangent.shape, columns.cotangent.shape[:2]
    dtype = jnp.promote_types(rows.cotangent.dtype, jnp.float32)
    if r1 == r2 == 1:
        seen = _gram(rows.activation[:, 0], columns.activation[:, 0], dtype, precision) + bias
        pulled = row_products(rows.cotangent.reshape(-1, outputs), columns.cotangent.reshape(-1, outputs), precision)
        return (pulled.reshape(n1, c, n2, c) * seen[:, None, :, None]).reshape(n1 * c, n2 * c)

    def single(rows, columns):
        return _pairs(_only_position(rows), _only_position(columns), bias, precision)

    def every(rows, columns):
        return _position_pairs(rows, columns, bias, precision)

    return lax.cond(_at_one_position(rows) & _at_one_position(columns), single, every, rows, columns)


def _at_one_position(factors: Factors) -> Array:
    """Whether every example has cotangents at one position at most, as in the last block of a next-token model."""
    used = (factors.cotangent != 0).any((2, 3))
    return (used.sum(1) <= 1).all()


def _only_position(factors: Factors) -> Factors:
    index = (factors.cotangent != 0).any((2, 3)).argmax(1)
    return Factors(*(jax.vmap(lambda array, k: array[k][None])(array, index) for array in factors))


def _position_pairs(rows: Factors, columns: Factors, bias: bool, precision: lax.PrecisionLike) -> Array:
    """`_pairs` at many positions."""
    (n1, r1, c, outputs), (n2, r2) = rows.cotangent.shape, columns.cotangent.shape[:2]
    dtype = jnp.promote_types(rows.cotangent.dtype, jnp.float32)
    # A tile of t1 rows and t2 columns multiplies `width` of the outputs at a time, so that what stands between its two
    # products stays in the cache; larger tiles run at half the speed on a CPU.
    limit = CACHED_NUMBERS if jax.default_backend() == "cpu" else 64 * CACHED_NUMBERS
    width = _even(outputs, 128)
    t1 = _even(n1, max(1, min(16, limit // (r1 * c * width))))
    t2 = max(1, min(n2, limit // (t1 * r1 * c * width)))
    pulled1, pulled2 = (_pad(_pad(one.cotangent, 3, width), 0, size) for one, size in ((rows, t1), (columns, 1)))
    pulled1 = pulled1.reshape(-1, t1 * r1, *pulled1.shape[2:])
    pulled1, pulled2 = (jnp.moveaxis(one.reshape(*one.shape[:3], -1, width), 3, 0) for one in (pulled1, pulled2))
    seen1 = _pad(rows.activation, 0, t1)
    seen1 = seen1.reshape(-1, t1 * r1, *seen1.shape[2:])

    def some_outputs(pulled):
        pulled1, pulled2 = pulled

        def of_rows(row):
            seen_i, pulled_i = row

            def of_column(column):
                seen_j, pulled_j = column
                seen = _gram(seen_i, seen_j, dtype, precision) + bias  # (t1·R, R)
                right = row_products(seen, pulled_j.reshape(r2, -1).T, precision).reshape(t1 * r1, c, width)
                blocks = jnp.einsum(
                    "xah,xbh->xab", pulled_i, right, precision=precision, preferred_element_type=right.dtype
                )
                return blocks.reshape(t1, r1, c, c).sum(1)

            return lax.map(of_column, (columns.activation, pulled2), batch_size=t2)  # (n2, t1, c, c)

        return lax.map(of_rows, (seen1, pulled1))  # (n1 / t1, n2, t1, c, c)

    first = some_outputs((pulled1[0], pulled2[0]))
    rest = pulled1[1:], pulled2[1:]
    blocks, _ = lax.scan(lambda total, pulled: (total + some_outputs(pulled), None), first, rest)
    return blocks.transpose(0, 2, 3, 1, 4).reshape(-1, n2 * c)[: n1 * c]


def _cross(straight: Factors, mirrored: Factors, precision: lax.PrecisionLike) -> Array:
    """Σ_{r,s} (Δ_i[a,r]·A'_j[s]) (A_i[r]·Δ'_j[b,s]): one leaf used as it stands (i) and transposed (j)."""
    n1, n2 = len(straight.cotangent), len(mirrored.cotangent)
    c = straight.cotangent.shape[2]

    def of_row(row):
        left = _contract(row.cotangent, mirrored.activation, precision)  # (R, c, n2, S)
        right = _contract(mirrored.cotangent, row.activation, precision)  # (n2, S, c, R)
        return jnp.einsum("rajs,jsbr->ajb", left, right, precision=precision, preferred_element_type=left.dtype)

    return lax.map(of_row, straight).reshape(n1 * c, n2 * c)


def _contract(cotangent: Array, activation: Array, precision: lax.PrecisionLike) -> Array:
    """Inner products along the last axes of both; an index takes its entry."""
    if jnp.issubdtype(activation.dtype, jnp.integer):
        inside = jnp.where(activation < 0, cotangent.shape[-1], activation)
        return jnp.take(cotangent, inside, axis=-1, mode="fill", fill_value=0)
    dtype = jnp.promote_types(cotangent.dtype, jnp.float32)
    return jnp.tensordot(cotangent, activation, axes=(-1, -1), precision=precision, preferred_element_type=dtype)


def _gram(rows: Array, columns: Array, dtype: jnp.dtype, precision: lax.PrecisionLike) -> Array:
    """A_i·A_j for (m, inputs) and (n, inputs) activations; indices are equal or not."""
    if jnp.issubdtype(rows.dtype, jnp.integer):
        return ((rows[:, None] == columns) & (columns >= 0)).astype(dtype)
    return row_products(rows, columns, precision).astype(dtype)


def _even(total: int, most: int) -> int:
    """The size of equal parts of at most `most`, the last one smaller at worst."""
    return -(-total // -(-total // most))


def _pad(array: Array, axis: int, multiple: int) -> Array:
    """Zeros at the end of an axis, up to a multiple."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if k == axis else 0) for k in range(array.ndim)]) if missing else array
