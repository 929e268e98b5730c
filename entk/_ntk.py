"""The empirical neural tangent kernel, contracted leaf by leaf from per-example Jacobians.

This is the simple implementation: it stays as the oracle for every faster one.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from entk._checks import ApplyFn, PyTree, check_apply_pair, check_fits, check_microbatch_size, num_params
from entk._jacobian import PRECISION, example_jacobian, map_examples


def empirical_ntk(
    apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None = None, *, microbatch_size: int | None = None
) -> Float[Array, "n1c n2c"]:
    """Empirical neural tangent kernel K = J₁ J₂ᵀ, the full matrix over outputs (theory §1).

    K_SS is `empirical_ntk(apply_fn, params, x_s)`, K_QS is `empirical_ntk(apply_fn, params, x_q, x_s)`.

    Args:
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)` that treats examples independently; static, so define it
        once.
      params: pytree of floating-point arrays of one dtype.
      x1: inputs of the rows, n₁ examples.
      x2: inputs of the columns, n₂ examples; None means x1.
      microbatch_size: examples of x1 and of x2 whose Jacobians are held at once; None holds both Jacobians whole. With
        it the Jacobian of x1 is formed anew for every block of x2.

    Returns:
      Array of shape (n₁·c, n₂·c), example-major: row i·c + a belongs to output a of example i. No hidden
      normalisation, not traced over outputs. Symmetric positive semi-definite for x2=None, up to rounding.

    Raises:
      TypeError, ValueError: as `jacobian`; also when x1 and x2 differ in their number of outputs.
      MemoryError: the Jacobians held at once would not fit; nothing has been allocated then.

    Cost: 2·n₁c·n₂c·p operations; (n₁ + n₂)·c·p numbers (n₁·c·p for x2=None), with microbatch_size b 2·b·c·p, and twice
    the kernel. Products run at full precision unless `jax.default_matmul_precision` says otherwise.

    Source: Jacot, Gabriel & Hongler, "Neural Tangent Kernel", arXiv:1806.07572.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import empirical_ntk
      >>> linear = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> empirical_ntk(linear, jnp.ones(2), x)
      Array([[ 5., 11.],
             [11., 25.]], dtype=float64)
    """
    microbatch_size = check_microbatch_size(microbatch_size)
    spec1, spec2 = check_apply_pair(apply_fn, params, x1, x2)
    c, p, n1, n2 = spec1.num_outputs, num_params(params), spec1.num_examples, spec2.num_examples
    b1, b2 = min(microbatch_size or n1, n1), min(microbatch_size or n2, n2)
    held = n1 if x2 is None and b1 == n1 else b1 + b2
    entries = held * c * p + 2 * n1 * n2 * c**2  # the kernel twice: once as blocks, or once as the sum so far
    check_fits(
        entries * spec1.dtype.itemsize,
        f"holding {held} x {c} x {p:,} Jacobian rows and two copies of the {n1 * c} x {n2 * c} kernel in {spec1.dtype}",
        "Pass a smaller microbatch_size, or use ntk_vector_product, which forms neither.",
    )
    return _empirical_ntk(apply_fn, params, x1, x2, microbatch_size)


@partial(jax.jit, static_argnums=(0, 4))
def _empirical_ntk(apply_fn, params, x1, x2, microbatch_size):
    n1 = jax.tree.leaves(x1)[0].shape[0]
    if x2 is None and (microbatch_size is None or microbatch_size >= n1):
        jac = jax.vmap(lambda x_i: example_jacobian(apply_fn, params, x_i))(x1)
        rows = [leaf.reshape(n1 * leaf.shape[1], leaf.shape[2]) for leaf in jac]
        return sum(jnp.matmul(leaf, leaf.T, precision=PRECISION) for leaf in rows)

    def column(x_j):
        jac_j = example_jacobian(apply_fn, params, x_j)

        def block(x_i):
            jac_i = example_jacobian(apply_fn, params, x_i)
            return sum(jnp.matmul(a, b.T, precision=PRECISION) for a, b in zip(jac_i, jac_j, strict=True))

        return map_examples(block, x1, microbatch_size)

    blocks = map_examples(column, x1 if x2 is None else x2, microbatch_size)  # (n2, n1, c, c)
    n2, n1, c, _ = blocks.shape
    return blocks.transpose(1, 2, 0, 3).reshape(n1 * c, n2 * c)
