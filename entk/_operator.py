"""Products with the empirical NTK that never form it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from entk._checks import ApplyFn, PyTree, check_apply_pair, check_microbatch_size
from entk._jacobian import map_examples, model_precision, sum_blocks


def ntk_vector_product(
    apply_fn: ApplyFn,
    params: PyTree,
    vector: Float[Array | np.ndarray, "n2c ..."],
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    microbatch_size: int | None = None,
) -> Float[Array, "n1c ..."]:
    """K v = J₁ (J₂ᵀ v) by one vector-Jacobian and one Jacobian-vector product, K never formed (theory §4).

    Args:
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)`; static, so define it once.
      params: pytree of floating-point arrays of one dtype.
      vector: shape (n₂·c,), or (n₂·c, r) for r vectors at once, in the order of `empirical_ntk`'s columns and in the
        dtype of params.
      x1: inputs of the rows, n₁ examples.
      x2: inputs of the columns, n₂ examples; None means x1.
      microbatch_size: examples whose activations are held at once; a remainder is allowed. None holds all.

    Returns:
      K v of shape (n₁·c,) or (n₁·c, r).

    Raises:
      TypeError, ValueError: as `empirical_ntk`; also a vector of the wrong length, rank or dtype.

    Cost: about four forward passes a vector; r copies of params, and of the activations of x1 and x2 or of
    microbatch_size examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import ntk_vector_product
      >>> linear = lambda w, x: x @ w
      >>> ntk_vector_product(linear, jnp.ones(2), jnp.array([1.0, -1.0]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array([ -6., -14.], dtype=float64)
    """
    check_microbatch_size(microbatch_size)
    _, spec = check_apply_pair(apply_fn, params, x1, x2)
    rows = spec.num_examples * spec.num_outputs
    vector = jnp.asarray(vector)
    if vector.ndim not in (1, 2) or vector.shape[0] != rows:
        raise ValueError(
            f"vector has shape {vector.shape}, but must be ({rows},) or ({rows}, r): one row a column of K."
        )
    if vector.dtype != spec.dtype:
        raise TypeError(f"vector has dtype {vector.dtype} and the outputs {spec.dtype}; cast the vector.")
    return _ntk_vector_product(apply_fn, params, vector, x1, x2, microbatch_size)


@partial(jax.jit, static_argnums=(0, 5))
def _ntk_vector_product(apply_fn, params, vector, x1, x2, microbatch_size):
    x2 = x1 if x2 is None else x2
    n2 = jax.tree.leaves(x2)[0].shape[0]

    def pull(x, v):
        out, vjp = jax.vjp(lambda params: apply_fn(params, x), params)
        return vjp(v.reshape(out.shape))[0]

    def push(x_i, tangent):
        x = jax.tree.map(lambda leaf: leaf[None], x_i)
        return jax.jvp(lambda params: apply_fn(params, x).reshape(-1), (params,), (tangent,))[1]

    def product(v):
        pulled = sum_blocks(pull, (x2, v.reshape(n2, -1)), microbatch_size)
        return map_examples(lambda x_i: push(x_i, pulled), x1, microbatch_size).reshape(-1)

    with model_precision():
        return product(vector) if vector.ndim == 1 else jax.vmap(product, in_axes=1, out_axes=1)(vector)
