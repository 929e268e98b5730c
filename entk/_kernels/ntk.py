"""The empirical neural tangent kernel."""

from __future__ import annotations

from jaxtyping import Array, Float

from entk._checks.apply import check_apply_pair, pin_model
from entk._kernels.sharded import place_of_rows, sharded_ntk
from entk._kernels.strategy import Strategy
from entk._structured.strategy import Structured
from entk._types import ApplyFn, PyTree


def empirical_ntk(
    apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None = None, *, strategy: Strategy = Structured()
) -> Float[Array, "n1c n2c"]:
    """Empirical neural tangent kernel K = J₁ J₂ᵀ, the full matrix over outputs (theory §1).

    K_SS is `empirical_ntk(apply_fn, params, x_s)`, K_QS is `empirical_ntk(apply_fn, params, x_q, x_s)`.

    Args:
      apply_fn: pure function `(params, x) -> (n, ...)` that treats examples independently; c outputs an example, of any
        shape, flattened by rows. It is compiled once for what it closes over: define it once, and where a flag, an
        array or statistics that it reads have changed, it is compiled anew.
      params: pytree whose floating-point leaves, p scalars in all, share one dtype; other leaves are constants.
      x1: inputs of the rows, n₁ examples.
      x2: inputs of the columns, n₂ examples; None means x1, and then one triangle is computed.
      strategy: how. `Structured()` contracts the activations and cotangents of the products in which each parameter
        takes part, or Jacobian blocks where those are cheaper, within a budget of memory; `plan` shows its choices.
        `FullJacobian()` is the simple way.

    Returns:
      Array of shape (n₁·c, n₂·c), example-major: row i·c + a belongs to output a of example i. No hidden
      normalisation, not traced over outputs. Symmetric positive semi-definite for x2=None, up to rounding. In the dtype
      of params, or float32 where that is shorter. Sharded examples give sharded rows, see `sharded_ntk`.

    Raises:
      TypeError, ValueError: as `jacobian`; also when x1 and x2 differ in their features or their number of outputs, or
        x2 is sharded by examples and x1 is not.
      MemoryError: K would not fit, or one example exceeds the strategy's budget; nothing has been allocated then.

    Not supported: models that mix examples; what is looked for, and when, is told in `jacobian`.

    Cost: see `plan`; at most 2·n₁c·n₂c·p operations and the strategy's `workspace_bytes` beside the kernel. Products
    run at full precision: the model's unless `jax.default_matmul_precision` says otherwise, the contraction's unless
    the strategy does.

    Source: Jacot, Gabriel & Hongler, "Neural Tangent Kernel", arXiv:1806.07572; structured contraction after Novak,
    Sohl-Dickstein & Schoenholz, "Fast Finite Width Neural Tangent Kernel", arXiv:2206.08720.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import empirical_ntk
      >>> linear = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> empirical_ntk(linear, jnp.ones(2), x)
      Array([[ 5., 11.],
             [11., 25.]], dtype=float64)
    """
    place = place_of_rows(x1, x2)
    if place:
        return sharded_ntk(apply_fn, params, x1, x2, mesh=place.mesh, axis=place.axes, strategy=strategy)
    apply_fn = pin_model(apply_fn, params, x1, x2)
    spec1, spec2 = check_apply_pair(apply_fn, params, x1, x2)
    strategy.check(params, spec1, spec2, x2 is None)
    return strategy.kernel(apply_fn, params, x1, x2)
