"""The simple kernel: per-example Jacobians by autodiff, multiplied leaf by leaf. The oracle for every faster one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from entk._batching import map_examples
from entk._checks.apply import OutputSpec
from entk._checks.counts import check_microbatch_size
from entk._checks.memory import check_fits
from entk._kernels.jacobian import example_jacobian
from entk._parameters import num_params
from entk._precision import free_promotion, row_products
from entk._types import ApplyFn, PyTree


@dataclass(frozen=True)
class FullJacobian:
    """`vmap(jacrev)` and a product a leaf: the simple strategy, on any model that autodiff takes.

    Args:
      microbatch_size: examples of x1 and of x2 whose Jacobians are held at once; the Jacobian of x1 is then formed anew
        for every block of x2. None holds both Jacobians whole.

    Returns:
      A strategy for `empirical_ntk`.

    Raises:
      ValueError: a microbatch_size that is not a positive integer.
      MemoryError: from `empirical_ntk`, where the Jacobians held at once would not fit.

    Cost: 2·n₁c·n₂c·p operations; (n₁ + n₂)·c·p numbers (n₁·c·p for x2=None), with microbatch_size b 2·b·c·p, and twice
    the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import FullJacobian, empirical_ntk
      >>> empirical_ntk(lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), strategy=FullJacobian(microbatch_size=1))
      Array([[1., 0.],
             [0., 1.]], dtype=float64)
    """

    microbatch_size: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "microbatch_size", check_microbatch_size(self.microbatch_size))

    def check(self, params: PyTree, spec1: OutputSpec, spec2: OutputSpec, symmetric: bool) -> None:
        """Refuses what would not fit."""
        c, p, n1, n2 = spec1.num_outputs, num_params(params), spec1.num_examples, spec2.num_examples

        def rows_of(n1, n2):
            b1, b2 = min(self.microbatch_size or n1, n1), min(self.microbatch_size or n2, n2)
            return n1 if symmetric and b1 == n1 else b1 + b2

        def bytes_of(n1):
            m = n1 if symmetric else n2
            # The kernel twice: once as blocks, or once as the sum so far.
            return (rows_of(n1, m) * c * p + 2 * n1 * m * c**2) * spec1.dtype.itemsize

        held = rows_of(n1, n2)
        check_fits(
            bytes_of(n1),
            f"holding {held} x {c} x {p:,} Jacobian rows and two copies of the {n1 * c} x {n2 * c} kernel in "
            f"{spec1.dtype}",
            "Pass a smaller microbatch_size, or use ntk_vector_product, which forms neither.",
            count=n1,
            bytes_of=bytes_of,
            unit="examples" if symmetric else "examples of x1",
        )

    def kernel(self, apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None) -> Array:
        """K of shape (n₁·c, n₂·c); the arguments have been checked."""
        with free_promotion():
            return _kernel(apply_fn, params, x1, x2, self.microbatch_size)


@partial(jax.jit, static_argnums=(0, 4))
def _kernel(apply_fn, params, x1, x2, microbatch_size):
    n1 = jax.tree.leaves(x1)[0].shape[0]
    if x2 is None and (microbatch_size is None or microbatch_size >= n1):
        jac = map_examples(lambda x_i: example_jacobian(apply_fn, params, x_i), x1, None)
        rows = [leaf.reshape(n1 * leaf.shape[1], leaf.shape[2]) for leaf in jac]
        return sum(row_products(leaf, leaf) for leaf in rows)

    def column(x_j):
        jac_j = example_jacobian(apply_fn, params, x_j)

        def block(x_i):
            jac_i = example_jacobian(apply_fn, params, x_i)
            return sum(row_products(a, b) for a, b in zip(jac_i, jac_j, strict=True))

        return map_examples(block, x1, microbatch_size)

    blocks = map_examples(column, x1 if x2 is None else x2, microbatch_size)  # (n2, n1, c, c)
    n2, n1, c, _ = blocks.shape
    return jnp.asarray(blocks.transpose(1, 2, 0, 3).reshape(n1 * c, n2 * c))
