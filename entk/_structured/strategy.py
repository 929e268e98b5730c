"""The fast kernel: factors of every example, contracted part by part in blocks that keep to a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from entk._batching import map_examples
from entk._checks.apply import OutputSpec
from entk._checks.memory import check_fits
from entk._precision import PRECISION, free_promotion
from entk._structured.contractions import CACHED_NUMBERS, Contraction, Cost, JacobianBlocks, PositionPairs, numbers_seen
from entk._structured.factors import FactoredModel, Factors, Part
from entk._structured.products import Sizes
from entk._types import ApplyFn, PyTree

CHUNK_BYTES = 2**26  # of examples differentiated at once: more is no faster
SMALLEST_TILE = 160  # rows of K: smaller matrices are multiplied more slowly than one triangle saves
LARGEST_TILE = 640  # larger ones leave the cache between the products of one tile: half the speed at N = 10,000
SLICE_NUMBERS = 4096  # of one row of a Jacobian formed in slices: below, adding to K costs as much as multiplying
TILES = 8  # a side of the triangle where the size of tiles allows it; (1 + 1/8)/2 of K is computed


class Choice(NamedTuple):
    """What was chosen for one part, and what it costs an example and a pair of examples.

    Of a choice in several slices, the factors are kept (`cost.stored`), and its Jacobian is formed slice by slice.
    """

    part: Part
    contraction: Contraction
    cost: Cost
    slices: int = 1


class Layout(NamedTuple):
    """How the work is cut.

    Attributes:
      rows, columns: examples of x1 and of x2 in one block of K.
      chunk: examples differentiated at once.
      triangle: all of a symmetric K is one block, of which one triangle is computed.
    """

    rows: int
    columns: int
    chunk: int
    triangle: bool


@dataclass(frozen=True)
class Structured:
    """Contracts activations and cotangents of the products that use each parameter; the default strategy.

    For every leaf the cheapest of `contractions` by its count of multiply-adds; leaves whose use is not understood are
    differentiated by autodiff and contracted as Jacobian blocks. `plan` says what was chosen.

    Args:
      workspace_bytes: memory to use besides the kernel itself; blocks of examples are made so small that it suffices.
        A fixed number, not what happens to be free: equal calls do equal work in equal order.
      contractions: ways to choose from, for leaves whose uses were found.
      precision: of the contraction's products, as `jax.lax.Precision`. Lower ones (`"tensorfloat32"`) are faster on
        accelerators; K is then symmetric and positive semi-definite to fewer digits.

    Returns:
      A strategy for `empirical_ntk`.

    Raises:
      TypeError, ValueError: a workspace that is not a whole number, no contractions.
      MemoryError: from `empirical_ntk`, where one example needs more than the workspace.

    Cost: see `plan`. In blocks, the examples of the columns are differentiated anew for every block of rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import PositionPairs, Structured, empirical_ntk
      >>> frugal = Structured(workspace_bytes=2**20, contractions=(PositionPairs(),))
      >>> empirical_ntk(lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), strategy=frugal)
      Array([[1., 0.],
             [0., 1.]], dtype=float64)
    """

    workspace_bytes: int = 2**31
    contractions: tuple[Contraction, ...] = (PositionPairs(), JacobianBlocks())
    precision: Any = PRECISION

    def __post_init__(self):
        if isinstance(self.workspace_bytes, bool) or not isinstance(self.workspace_bytes, int):
            raise TypeError(f"workspace_bytes={self.workspace_bytes!r} must be a whole number of bytes, e.g. 2**31.")
        if not self.contractions:
            raise ValueError("contractions=() leaves nothing to choose from; pass JacobianBlocks(), PositionPairs().")

    def check(self, params: PyTree, spec1: OutputSpec, spec2: OutputSpec, symmetric: bool) -> None:
        """Refuses a kernel that would not fit; its workspace is checked when its blocks are laid out."""
        rows, columns = (spec.num_examples * spec.num_outputs for spec in (spec1, spec2))

        def bytes_of(n):
            return n * spec1.num_outputs * (n * spec1.num_outputs if symmetric else columns) * itemsize

        itemsize = max(spec1.dtype.itemsize, 4)
        check_fits(
            rows * columns * itemsize,
            f"the {rows} x {columns} kernel in {np.dtype(f'f{itemsize}')}",
            "Take it in blocks with NtkBlocks, or use NtkOperator, which never forms it.",
            count=spec1.num_examples,
            bytes_of=bytes_of,
            unit="examples" if symmetric else "examples of x1",
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
        longest = max(n1, n2)
        sizes = sorted({-(-longest // parts) for parts in range(1, longest + 1)}, reverse=True)
        for size in sizes:
            layout = Layout(min(size, n1), min(size, n2), 1, symmetric and size >= n1)
            if workspace(model, choices, layout) <= self.workspace_bytes:
                break
        else:
            raise MemoryError(
                f"one example needs {workspace(model, choices, Layout(1, 1, 1, False)):,} bytes of workspace, but "
                f"workspace_bytes={self.workspace_bytes:,}. Pass a larger workspace_bytes, or use NtkOperator, which "
                "forms no kernel."
            )
        of_example = example_bytes(model, in_slices(choices, model.num_outputs) if layout.triangle else choices)
        left = min(self.workspace_bytes - workspace(model, choices, layout) + of_example, CHUNK_BYTES)
        return layout._replace(chunk=_whole_chunks(layout.rows, max(1, left // of_example)))

    def kernel(self, apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None) -> Array:
        """K of shape (n₁·c, n₂·c); the arguments have been checked."""
        with free_promotion():
            return _kernel(self, apply_fn, params, x1, x2)


def example_bytes(model: FactoredModel, choices: list[Choice]) -> int:
    """What differentiating one example holds: its forward pass, c cotangents of it, and their factors twice."""
    c, size = model.num_outputs, model.dtype.itemsize
    pulled = sum(sizes.groups * sizes.positions * sizes.outputs for choice in choices for sizes in choice.part.sizes)
    stored = sum(choice.cost.stored for choice in choices)
    return model.residual_bytes + c * (3 * model.largest_bytes + pulled * size) + 2 * stored * size


def workspace(model: FactoredModel, choices: list[Choice], layout: Layout) -> int:
    """Bytes held beside K: what is kept of the examples of a block, its copies while it is cut, tiles, one chunk."""
    size = model.dtype.itemsize
    choices = in_slices(choices, model.num_outputs) if layout.triangle else choices
    stored = sum(choice.cost.stored for choice in choices) * size
    tile = 2 * max(choice.cost.tile for choice in choices) * max(size, 4)
    rows, columns = layout.rows, layout.columns
    if layout.triangle:  # all examples; a slice of them, and the copies of one pair of tiles
        rows = columns = tile_size(layout.rows, model.num_outputs)
        whole = sum(choice.cost.stored for choice in choices if choice.slices == 1)
        slices = [
            model.num_outputs * choice.part.num_params // choice.slices for choice in choices if choice.slices > 1
        ]
        of_slice = max(slices, default=0) * max(size, 4)
        copies = max(whole * size * 2 * (rows + columns), of_slice * (layout.rows + 2 * (rows + columns)))
        held = layout.rows * stored + copies + rows * columns * tile
    else:
        held = 2 * (rows + columns) * stored + rows * columns * tile
    pairs = rows * columns
    scratch = max(
        min(CACHED_NUMBERS, pairs * sizes.positions * model.num_outputs * sizes.outputs)
        for choice in choices
        for sizes in (choice.part.sizes if choice.contraction.is_tiled(choice.part) else (Sizes(0, 0, 0, 0),))
    )
    return held + 2 * scratch * max(size, 4) + layout.chunk * example_bytes(model, choices)


def in_slices(choices: list[Choice], num_outputs: int) -> list[Choice]:
    """The choices for one triangle, with factors kept in place of Jacobian blocks that are larger.

    The Jacobian of every output of a product can be formed and multiplied for itself; so it is, a slice of them for all
    examples at a time.
    """

    def sliced(choice: Choice) -> Choice:
        part = choice.part
        if not isinstance(choice.contraction, JacobianBlocks) or not part.uses or part.mirrored:
            return choice
        groups, positions, _, outputs = part.sizes[0]
        slices = max(
            k for k in range(1, outputs + 1) if k == 1 or (outputs % k == 0 and part.num_params >= k * SLICE_NUMBERS)
        )
        factors = groups * positions * (numbers_seen(part)[0] + num_outputs * outputs)
        if factors + choice.cost.stored // slices >= choice.cost.stored:
            return choice
        return choice._replace(cost=replace(choice.cost, stored=factors), slices=slices)

    return [sliced(choice) for choice in choices]


def tile_size(n: int, num_outputs: int) -> int:
    """Examples in a tile of the triangle."""
    rows = n * num_outputs
    tiles = max(min(TILES, rows // SMALLEST_TILE), -(-rows // LARGEST_TILE))
    return -(-n // min(n, tiles))


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
    rows, columns, chunk, triangle = strategy.layout(models[0], choices, n1, n2, symmetric)
    c = models[0].num_outputs

    def prepare(model, x):
        return map_examples(lambda x_i: prepare_example(model, choices, x_i), x, chunk)

    def block(left, right):
        return contract(choices, left, right, strategy.precision)

    dtype = jnp.promote_types(models[0].dtype, jnp.float32)
    if triangle:
        choices = in_slices(choices, c)
        return _one_triangle(choices, prepare(models[0], x1), n1, c, dtype, strategy.precision)
    if rows == n1 and columns == n2:
        return block(prepare(models[0], x1), prepare(models[1], x2))

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

    kernel = jnp.zeros((n1 * c, n2 * c), dtype)
    return lax.scan(fill_row, kernel, jnp.arange(-(-n1 // rows)))[0]


def prepare_example(model: FactoredModel, choices: list[Choice], x_i: PyTree) -> list[PyTree]:
    """What every chosen contraction keeps of one example."""
    factors = model.factors(x_i)
    return [
        choice.contraction.prepare(choice.part, one) if choice.slices == 1 else one[0]
        for choice, one in zip(choices, factors, strict=True)
    ]


def contract(choices: Sequence[Choice], left: Sequence[PyTree], right: Sequence[PyTree], precision: Any) -> Array:
    """The sum of all parts over the prepared examples of rows and columns."""
    blocks = [
        choice.contraction.block(choice.part, rows, columns, precision)
        for choice, rows, columns in zip(choices, left, right, strict=True)
    ]
    return sum(blocks[1:], blocks[0])


def _one_triangle(choices: list[Choice], prepared: list[PyTree], n: int, c: int, dtype: Any, precision: Any) -> Array:
    """K of n prepared examples with itself: tiles on and below the diagonal, and their transposes.

    A loop over pairs of tiles holds the copies of one pair at a time. What is formed in slices is added first.
    """
    size = tile_size(n, c)
    first = [k * size for k in range(-(-n // size))]
    starts = [min(k, n - size) for k in first]  # the last tile overlaps the one before
    pairs = jnp.array(
        [
            (starts[row], starts[column], first[row], first[column])
            for row in range(len(starts))
            for column in range(row + 1)
        ]
    )

    is_sum = any(choice.slices > 1 for choice in choices)

    def add(choices, prepared, is_last):
        def fill(kernel, pair):
            row, column, new_row, new_column = pair
            left, right = (
                jax.tree.map(lambda leaf, k=k: lax.dynamic_slice_in_dim(leaf, k, size), prepared) for k in (row, column)
            )
            values = contract(choices, left, right, precision) if choices else jnp.zeros((size * c, size * c), dtype)
            if is_sum:
                if starts != first:  # entries of the overlap have been added before
                    places = jnp.arange(size * c)
                    is_new = (places >= (new_row - row) * c)[:, None] & (places >= (new_column - column) * c)
                    values = jnp.where(is_new, values, 0)
                values += lax.dynamic_slice(kernel, (row * c, column * c), values.shape)
            kernel = lax.dynamic_update_slice(kernel, values, (row * c, column * c))
            if is_last:
                kernel = lax.dynamic_update_slice(kernel, values.T, (column * c, row * c))
            return kernel, None

        return lambda kernel: lax.scan(fill, kernel, pairs)[0]

    kernel = jnp.zeros((n * c, n * c), dtype)
    for choice, factors in zip(choices, prepared, strict=True):
        if choice.slices > 1:
            kernel = _add_slices(choice, factors, kernel, add)
    whole = [k for k, choice in enumerate(choices) if choice.slices == 1]
    return add([choices[k] for k in whole], [prepared[k] for k in whole], True)(kernel)


def _add_slices(choice: Choice, factors: Factors, kernel: Array, add: Callable[..., Callable[[Array], Array]]) -> Array:
    """K and the part's block of it, the Jacobian formed a slice of the product's outputs at a time."""
    width = choice.part.sizes[0].outputs // choice.slices

    def fill(kernel, start):
        some = factors._replace(cotangent=lax.dynamic_slice_in_dim(factors.cotangent, start, width, -1))
        formed = jax.vmap(lambda one: choice.contraction.prepare(choice.part, (one, None)))(some)
        return add([choice], [formed], False)(kernel), None

    return lax.scan(fill, kernel, width * jnp.arange(choice.slices))[0]
