"""Per-example Jacobians of the outputs in the parameters."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from entk._batching import map_examples
from entk._checks.apply import check_apply, pin_model
from entk._checks.counts import check_microbatch_size
from entk._checks.memory import check_fits
from entk._parameters import differentiable, num_params
from entk._precision import free_promotion, model_precision
from entk._types import ApplyFn, PyTree


def example_jacobian(apply_fn: ApplyFn, params: PyTree, x_i: PyTree) -> list[Array]:
    """Jacobian of one example as one `(c, leaf size)` block a floating parameter leaf, in `ravel_pytree` order."""
    leaves, rebuild = differentiable(params)

    def outputs(leaves):
        return apply_fn(rebuild(leaves), jax.tree.map(lambda leaf: leaf[None], x_i)).reshape(-1)

    with model_precision():
        out, pull = jax.vjp(outputs, leaves)
        (jac,) = map_examples(pull, jnp.eye(out.size, dtype=out.dtype), None)
    return [leaf.reshape(leaf.shape[0], -1) for leaf in jac]


def jacobian(
    apply_fn: ApplyFn, params: PyTree, x: PyTree, *, microbatch_size: int | None = None
) -> Float[Array, "n c p"]:
    """Per-example Jacobian J[i, a] = ∂ apply_fn(w, x)[i, a] / ∂w (theory §1).

    Args:
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)` that treats examples independently; outputs of any
        trailing shape are flattened by rows. It is compiled once for what it closes over: define it once, a new lambda
        at every call compiles anew, and so does one that reads what has changed (a flag, an array, statistics).
      params: pytree whose floating-point leaves, p scalars in all, share one dtype. Integers, booleans and random keys
        are constants without columns. `jax.lax.stop_gradient` inside apply_fn freezes a parameter (columns of zeros),
        closing over it takes it out.
      x: inputs, an array or a pytree of arrays with n rows.
      microbatch_size: examples differentiated at once; a remainder is allowed. None takes all n.

    Returns:
      Array of shape (n, c, p), parameters flattened in `jax.flatten_util.ravel_pytree` order. Unit: output per unit of
      parameter.

    Raises:
      TypeError, ValueError: outputs without a row for each example, outputs of an example that change with another
        one or with its place in the batch, mixed or complex dtypes, zero examples, objects of other libraries.
      MemoryError: the Jacobian would not fit; nothing has been allocated then.

    Not supported: models that mix examples, such as batch normalisation in training mode, or that tell them apart by
    their place, such as dropout with one key; complex parameters. The former are looked for at every call, by comparing
    the outputs of the batch with those of each example alone, where values are at hand: not while JAX traces (inside
    `jax.jit`, `jax.vmap`, ...). Of a batch whose intermediate results exceed about 256 MiB its first rows are compared.

    Cost: one trace and two evaluations of apply_fn, and c vector-Jacobian products per example. 2·n·c·p numbers while
    the blocks of the parameter arrays are joined, of which n·c·p stay; with a microbatch_size b that divides n,
    (n + 2·b)·c·p. Products run at full precision unless `jax.default_matmul_precision` says otherwise.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import jacobian
      >>> linear = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> jacobian(linear, jnp.ones((2, 1)), x)[:, 0]
      Array([[1., 2.],
             [3., 4.]], dtype=float64)
    """
    microbatch_size = check_microbatch_size(microbatch_size)
    apply_fn = pin_model(apply_fn, params, x, names=("x", ""))
    spec = check_apply(apply_fn, params, x)
    shape = (spec.num_examples, spec.num_outputs, num_params(params))
    n, c, p = shape

    def bytes_of(n):
        b = microbatch_size or n
        held = n + 2 * b if b < n and n % b == 0 else 2 * n
        return held * c * p * spec.dtype.itemsize

    check_fits(
        bytes_of(n),
        f"forming the {n} x {c} x {p:,} {spec.dtype} Jacobian (of {n * c * p * spec.dtype.itemsize / 2**30:,.1f} GiB)",
        "Use empirical_ntk, which never holds all of it, or ntk_vector_product, which holds none of it.",
        count=n,
        bytes_of=bytes_of,
    )
    with free_promotion():
        return _jacobian(apply_fn, params, x, microbatch_size)


@partial(jax.jit, static_argnums=(0, 3))
def _jacobian(apply_fn, params, x, microbatch_size):
    def rows(x_i):
        return jnp.concatenate(example_jacobian(apply_fn, params, x_i), axis=1)

    return map_examples(rows, x, microbatch_size)
