"""A kernel in blocks, for one that does not fit in memory: each block is computed when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from entk._checks.apply import check_apply_pair, pin_model
from entk._checks.counts import check_count
from entk._structured.strategy import Structured
from entk._types import ApplyFn, PyTree


class NtkBlock(NamedTuple):
    """One block of a kernel: `kernel[rows, columns]` equals `values`.

    Attributes:
      rows, columns: slices of the kernel's rows and columns, outputs counted, example-major.
      values: the block.
    """

    rows: slice
    columns: slice
    values: Array


class NtkBlocks(Sequence):
    """K = J₁ J₂ᵀ as a sequence of blocks, computed one at a time; of a symmetric one, those on and below the diagonal.

    A sequence: its length is the number of blocks, and `blocks[k]` computes block k alone, so a loop can be cut short
    and taken up again anywhere.

    Args:
      apply_fn, params, x1, x2: as for `empirical_ntk`; of all blocks, apply_fn as it is now, as in `NtkOperator`.
      block_size: examples of x1 and of x2 in one block, c·block_size rows and columns; smaller at the end.
      strategy: how each block is computed, as for `empirical_ntk`.

    Returns:
      A sequence of `NtkBlock(rows, columns, values)` with the kernel's `shape` and `dtype`, and `write_to(out)`.

    Raises:
      TypeError, ValueError: as `empirical_ntk`; a block_size that is not positive.
      MemoryError: a block would not fit.

    Cost: that of `empirical_ntk`, and every example is differentiated once for each block that it takes part in.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from entk import NtkBlocks
      >>> blocks = NtkBlocks(lambda w, x: x @ w, jnp.ones(2), jnp.arange(10.0).reshape(5, 2), block_size=2)
      >>> len(blocks), blocks.shape
      (6, (5, 5))
      >>> kernel = blocks.write_to(np.empty(blocks.shape))  # or np.memmap(path, blocks.dtype, "w+", shape=blocks.shape)
      >>> float(kernel[4, 0]), float(kernel[0, 4])
      (9.0, 9.0)
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        params: PyTree,
        x1: PyTree,
        x2: PyTree | None = None,
        *,
        block_size: int = 512,
        strategy: Any = None,
    ):
        block_size = check_count("block_size", block_size)
        apply_fn = pin_model(apply_fn, params, x1, x2).held()
        spec1, spec2 = check_apply_pair(apply_fn, params, x1, x2)
        self._arguments = apply_fn, params, x1, x2
        self._strategy = strategy or Structured()
        self._num_outputs = spec1.num_outputs
        size1, size2 = (spec._replace(num_examples=min(block_size, spec.num_examples)) for spec in (spec1, spec2))
        self._strategy.check(params, size1, size2, False)
        starts1, starts2 = (range(0, spec.num_examples, block_size) for spec in (spec1, spec2))
        self._places = [(i, j) for i in starts1 for j in starts2 if x2 is not None or j <= i]
        self._block_size = block_size
        self.shape = spec1.num_examples * spec1.num_outputs, spec2.num_examples * spec2.num_outputs
        self.dtype = np.promote_types(spec1.dtype, jnp.float32)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, k):
        if isinstance(k, slice):
            raise TypeError("NtkBlocks takes one index at a time: each block is computed when it is asked for.")
        i, j = self._places[k]
        apply_fn, params, x1, x2 = self._arguments
        rows, columns = (
            jax.tree.map(lambda leaf, at=at: leaf[at : at + self._block_size], x)
            for x, at in ((x1, i), (x1 if x2 is None else x2, j))
        )
        values = self._strategy.kernel(apply_fn, params, rows, None if x2 is None and i == j else columns)
        n1, n2 = values.shape
        start1, start2 = i * self._num_outputs, j * self._num_outputs
        return NtkBlock(slice(start1, start1 + n1), slice(start2, start2 + n2), values)

    def write_to(self, out: Any, start: int = 0) -> Any:
        """Fills `out[rows, columns]` with every block from number `start` on, both triangles; returns `out`.

        Args:
          out: anything with the kernel's shape that takes slices: a NumPy array, `np.memmap`, an HDF5 or Zarr array.
          start: block to begin with, for a run that was cut short: blocks before it are in `out` already.
        """
        if tuple(out.shape) != self.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}, but must be {self.shape}, the shape of the kernel.")
        symmetric = self._arguments[3] is None
        for k in range(start, len(self)):
            rows, columns, values = self[k]
            out[rows, columns] = np.asarray(values)
            if symmetric and rows != columns:
                out[columns, rows] = np.asarray(values).T
        return out
