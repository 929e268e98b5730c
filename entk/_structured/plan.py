"""What a kernel will cost, and how each parameter will be contracted, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from rich.table import Table

from entk._checks.apply import check_apply_pair, pin_model
from entk._precision import free_promotion
from entk._structured.contractions import Contraction
from entk._structured.strategy import Structured, in_slices, matched, workspace
from entk._text import as_text
from entk._types import ApplyFn, PyTree


@dataclass(frozen=True)
class LeafPlan:
    """One row of a plan.

    Attributes:
      names: the leaf's place in params, and that of the bias that is contracted with it.
      num_params: scalars in them.
      positions: times the leaf is used an example (pixels, tokens, iterations of a scan), 0 for autodiff.
      contraction: what was chosen.
      reason: why the leaf is left to autodiff, empty where its uses were found.
      operations: floating-point operations, a multiply-add counting two.
      bytes: what is kept of all examples of one block.
    """

    names: tuple[str, ...]
    num_params: int
    positions: int
    contraction: Contraction
    reason: str
    operations: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """How a kernel will be computed; printed as a table.

    Attributes:
      leaves: one row a parameter leaf, or a leaf and its bias.
      shape: of the kernel.
      operations: of the contractions; differentiating the examples comes on top.
      bytes: of the kernel and the workspace together.
      rows, columns: examples of x1 and x2 in one block of the kernel.
      chunk: examples differentiated at once.
      triangle: one triangle of a symmetric kernel is computed in one piece.
    """

    leaves: tuple[LeafPlan, ...]
    shape: tuple[int, int]
    operations: int
    bytes: int
    rows: int
    columns: int
    chunk: int
    triangle: bool

    def __rich__(self) -> Table:
        title = (
            f"K of shape {self.shape[0]:,} x {self.shape[1]:,}: {self.operations / 1e9:,.3g} GFLOP, "
            f"{self.bytes / 2**20:,.4g} MiB; blocks of {self.rows} x {self.columns} examples, "
            f"{self.chunk} differentiated at once"
        )
        table = Table(title=title, title_justify="left")
        for column in ("parameters", "scalars", "positions", "contraction", "GFLOP", "MiB", "why"):
            table.add_column(column, justify="left" if column in ("parameters", "contraction", "why") else "right")
        for leaf in self.leaves:
            why = f"by autodiff: {leaf.reason}" if leaf.reason else "fewest operations"
            table.add_row(
                " ".join(leaf.names), f"{leaf.num_params:,}", str(leaf.positions) if leaf.positions else "-",
                type(leaf.contraction).__name__, f"{leaf.operations / 1e9:,.3g}", f"{leaf.bytes / 2**20:,.3g}", why,
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        return as_text(self, width=140)


def plan(
    apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None = None, *, strategy: Structured | None = None
) -> Plan:
    """What `empirical_ntk` with the same arguments would do; nothing is computed.

    Args:
      apply_fn, params, x1, x2: as for `empirical_ntk`.
      strategy: a `Structured`; None is the default one.

    Returns:
      The contraction chosen for every parameter leaf, with operations and bytes.

    Raises:
      TypeError, ValueError, MemoryError: as `empirical_ntk`.

    Cost: one trace of apply_fn.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import plan
      >>> dense = lambda params, x: x @ params["w"] + params["b"]
      >>> chosen = plan(dense, {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}, jnp.ones((10, 8)))
      >>> chosen.shape, chosen.operations
      ((40, 40), 7920)
      >>> chosen.leaves[0].names, type(chosen.leaves[0].contraction).__name__
      (("['w']", "['b']"), 'PositionPairs')
    """
    strategy = strategy or Structured()
    apply_fn = pin_model(apply_fn, params, x1, x2)
    spec1, spec2 = check_apply_pair(apply_fn, params, x1, x2)
    strategy.check(params, spec1, spec2, x2 is None)
    n1, n2, c = spec1.num_examples, spec2.num_examples, spec1.num_outputs
    with free_promotion():
        models = matched(apply_fn, params, x1, x2)
        choices = strategy.choose(models[0], n1, n2)
        layout = strategy.layout(models[0], choices, n1, n2, x2 is None)
        choices = in_slices(choices, c) if layout.triangle else choices
    pairs = n1 * (n1 + 1) // 2 if x2 is None else n1 * n2
    held = n1 if layout.triangle else layout.rows + layout.columns
    size = max(models[0].dtype.itemsize, 4)
    names = _names(params)
    leaves = tuple(
        LeafPlan(
            tuple(names[leaf] for leaf in choice.part.leaves),
            choice.part.num_params,
            sum(sizes.positions for sizes in choice.part.sizes),
            choice.contraction,
            choice.part.reason,
            2 * (choice.cost.pair * pairs + choice.cost.example * (n1 if x2 is None else n1 + n2)),
            choice.cost.stored * held * size,
        )
        for choice in choices
    )
    shape = (n1 * c, n2 * c)
    needed = shape[0] * shape[1] * size + workspace(models[0], choices, layout)
    return Plan(leaves, shape, sum(leaf.operations for leaf in leaves), needed, *layout)


def _names(params: PyTree) -> list[str]:
    return [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
