"""The fast kernel: factors of every example, contracted part by part in blocks that keep to a budget of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from entk._checks import ApplyFn, OutputSpec, PyTree, check_fits
from entk._contractions import Contraction, Cost, JacobianBlocks, PositionPairs
from entk._factors import FactoredModel, Part
from entk._jacobian import PRECISION, map_examples

CACHED_BYTES = 2**25
SMALLEST_TRIANGLE = 256  # rows of K below which halving a diagonal block costs more than it saves


class Choice(NamedTuple):
    """What was chosen for one part, and what it costs an example and a pair of examples."""

    part: Part
    contraction: Contraction
    cost: Cost


class Layout(NamedTuple):
    """How the work is cut: examples of x1 and of x2 a block of K, and examples differentiated at once."""

    rows: int
    columns: int
    chunk: int


@dataclass(frozen=True)
class Structured:
    """Contracts activations and cotangents of the products that use each parameter; the default strategy.

    For every leaf the cheapest of `contractions` by its count of multiply-adds; leaves whose use is not understood are
    differentiated by autodiff and contracted as Jacobian blocks. `plan` says what was chosen.

    Attributes:
      workspace_bytes: memory to use besides the kernel itself; blocks of examples are made so small that it suffices.
        A fixed number, not what happens to be free: equal calls do equal work in equal order.
      contractions: ways to choose from, for leaves whose uses were found.
      precision: of the contraction's products, as `jax.lax.Precision`. Lower ones (`"tensorfloat32"`) are faster on
        accelerators; K is then symmetric and positive semi-definite to fewer digits.
    """

    workspace_bytes: int = 2**30
    contractions: tuple[Contraction, ...] = (PositionPairs(), JacobianBlocks())
    precision: Any = PRECISION

    def __post_init__(self):
        if isinstance(self.workspace_bytes, bool) or not isinstance(self.workspace_bytes, int):
            raise TypeError(f"workspace_bytes={self.workspace_bytes!r} must be a whole number of bytes, e.g. 2**30.")
        if not self.contractions:
            raise ValueError("contractions=() leaves nothing to choose from; pass JacobianBlocks(), PositionPairs().")

    def check(self, params: PyTree, spec1: OutputSpec, spec2: OutputSpec, symmetric: bool) -> None:
        """Refuses a kernel that would not fit; its workspace is checked when its blocks are laid out."""
        rows, columns = (spec.num_examples * spec.num_outputs for spec in (spec1, spec2))
        check_fits(
            rows * columns * max(spec1.dtype.itemsize, 4),
            f"the {rows} x {columns} kernel in {spec1.dtype}",
            "Take it in blocks with NtkBlocks, or use NtkOperator, which never forms it.",
        )

    def choose(self, model: FactoredModel, n1: int, n2: int) -> list[Choice]:
        """The cheapest contraction of every part for n1 by n2 examples."""
        choices = []
        for part in model.parts:
            ways = self.contractions if part.uses else (JacobianBlocks(),)
            costs = [(way, way.cost(part, model.num_outputs)) for way in ways]
            chosen = min(costs, key=lambda pair: pair[1].example * (n1 + n2) + pair[1].pair * n1 * n2)
            choices.append(Choice(part, *chosen))
        return choices

    def layout(self, model: FactoredModel, choices: list[Choice], n1: int, n2: int, symmetric: bool) -> Layout:
        """The largest blocks that keep to the workspace."""
        c = model.num_outputs
        size = model.dtype.itemsize
        stored = sum(choice.cost.stored for choice in choices) * size
        tile = max(choice.cost.tile for choice in choices) * max(size, 4)
        captured = sum(
            math.prod(one[:2]) * one[3] if one else 0
            for choice in choices
            for one in (choice.part.sizes, choice.part.mirrored_sizes)
        )
        of_example = model.residual_bytes + c * (3 * model.largest_bytes + captured * size) + 2 * stored

        def needed(rows: int, columns: int) -> int:
            held = rows if symmetric and rows == n1 else rows + columns
            whole_pairs = rows * columns // (2 if symmetric and rows == n1 else 1)
            return held * stored + whole_pairs * tile + of_example

        rows, columns = n1, n2
        while needed(rows, columns) > self.workspace_bytes and (rows > 1 or columns > 1):
            rows, columns = -(-rows // 2) if rows >= columns else rows, -(-columns // 2) if columns >= rows else columns
        if needed(rows, columns) > self.workspace_bytes:
            raise MemoryError(
                f"one example needs {needed(1, 1):,} bytes of workspace, but workspace_bytes={self.workspace_bytes:,}. "
                "Pass a larger workspace_bytes, or use ntk_vector_product, which forms no kernel."
            )
        left = self.workspace_bytes - needed(rows, columns) + of_example
        if jax.default_backend() == "cpu":
            left = min(left, CACHED_BYTES)  # intermediate results that leave the cache cost a fifth more time
        return Layout(rows, columns, _whole_chunks(rows, max(1, left // of_example)))

    def kernel(self, apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None) -> Array:
        """K of shape (n₁·c, n₂·c); the arguments have been checked."""
        return _kernel(self, apply_fn, params, x1, x2)


def _whole_chunks(total: int, most: int) -> int:
    """A chunk of at most `most`, one that divides `total` where there is one above half of it."""
    if most >= total:
        return total
    return next((size for size in range(most, most // 2, -1) if total % size == 0), most)


def matched(apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None) -> tuple[FactoredModel, FactoredModel]:
    """The model on inputs like x1 and like x2, divided into the same parts."""
    model1 = FactoredModel(apply_fn, params, x1)
    if x2 is None or _shapes(x1) == _shapes(x2):
        return model1, model1
    model2 = FactoredModel(apply_fn, params, x2)
    if [part.layouts for part in model1.parts] == [part.layouts for part in model2.parts]:
        return model1, model2
    return FactoredModel(apply_fn, params, x1, factor=False), FactoredModel(apply_fn, params, x2, factor=False)


def _shapes(x: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(x)
    return treedef, [(jnp.shape(leaf)[1:], jnp.result_type(leaf)) for leaf in leaves]


@partial(jax.jit, static_argnums=(0, 1))
def _kernel(strategy: Structured, apply_fn, params, x1, x2):
    symmetric = x2 is None
    models = matched(apply_fn, params, x1, x2)
    x2 = x1 if symmetric else x2
    n1, n2 = (jax.tree.leaves(x)[0].shape[0] for x in (x1, x2))
    choices = strategy.choose(models[0], n1, n2)
    rows, columns, chunk = strategy.layout(models[0], choices, n1, n2, symmetric)
    c = models[0].num_outputs

    def prepare(model, x):
        return map_examples(lambda x_i: prepare_example(model, choices, x_i), x, chunk)

    def block(left, right):
        return contract(choices, left, right, strategy.precision)

    if rows == n1 and columns == n2:
        left = prepare(models[0], x1)
        return _one_triangle(block, left, n1, c) if symmetric else block(left, prepare(models[1], x2))

    def some(x, start, size):
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), x)

    def fill_row(kernel, row):
        start1 = jnp.minimum(row * rows, n1 - rows)
        left = prepare(models[0], some(x1, start1, rows))

        def fill(column, kernel):
            start2 = jnp.minimum(column * columns, n2 - columns)
            values = block(left, prepare(models[1], some(x2, start2, columns)))
            kernel = lax.dynamic_update_slice(kernel, values, (start1 * c, start2 * c))
            return lax.dynamic_update_slice(kernel, values.T, (start2 * c, start1 * c)) if symmetric else kernel

        return lax.fori_loop(0, row + 1 if symmetric else -(-n2 // columns), fill, kernel), None

    dtype = jnp.promote_types(models[0].dtype, jnp.float32)
    kernel = jnp.zeros((n1 * c, n2 * c), dtype)
    return lax.scan(fill_row, kernel, jnp.arange(-(-n1 // rows)))[0]


def prepare_example(model: FactoredModel, choices: list[Choice], x_i: PyTree) -> list[PyTree]:
    """What every chosen contraction keeps of one example."""
    factors = model.factors(x_i)
    return [
        choice.contraction.prepare(choice.part, one) for choice, one in zip(choices, factors, strict=True)
    ]  # fmt: skip


def contract(choices: list[Choice], left: list[PyTree], right: list[PyTree], precision: Any) -> Array:
    """The sum of all parts over the prepared examples of rows and columns."""
    blocks = [
        choice.contraction.block(choice.part, rows, columns, precision)
        for choice, rows, columns in zip(choices, left, right, strict=True)
    ]
    return sum(blocks[1:], blocks[0])


def _one_triangle(block, prepared: list[PyTree], n: int, c: int) -> Array:
    """K of n prepared examples with itself: blocks on and below the diagonal, and their transposes."""

    def take(start, stop):
        return jax.tree.map(lambda leaf: leaf[start:stop], prepared)

    smallest = max(SMALLEST_TRIANGLE, n * c // 8)

    def fill(kernel, start, stop):
        if (stop - start) * c <= smallest or stop - start == 1:
            return kernel.at[start * c : stop * c, start * c : stop * c].set(
                block(take(start, stop), take(start, stop))
            )
        middle = (start + stop) // 2
        kernel = fill(fill(kernel, start, middle), middle, stop)
        below = block(take(middle, stop), take(start, middle))
        kernel = kernel.at[middle * c : stop * c, start * c : middle * c].set(below)
        return kernel.at[start * c : middle * c, middle * c : stop * c].set(below.T)

    dtype = jax.eval_shape(lambda: block(take(0, 1), take(0, 1))).dtype
    return fill(jnp.zeros((n * c, n * c), dtype), 0, n)
