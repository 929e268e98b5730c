"""What the algorithms of `entk` ask of a linear operator, and how they multiply with it."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.tree_util import Partial

from entk._tracing.pinned import pin


class LinearOperator(Protocol):
    """Anything with `shape` and `mv`, for vectors (N,) and blocks (N, r); `dtype` is read too where there is one.

    An operator that is a pytree, as `NtkOperator` is, compiles once for all operators of its structure; another object
    compiles once an object, and anew where what `mv` computes has changed.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    def mv(self, vector: Any, /) -> Any: ...


def check_operator(operator: LinearOperator) -> tuple[int, jnp.dtype]:
    """The size N and the dtype of a square operator; anything else is refused."""
    if not callable(getattr(operator, "mv", None)) or not hasattr(operator, "shape"):
        raise TypeError(
            f"operator of type {type(operator).__name__} must have mv and shape, like NtkOperator. Wrap a matrix k as "
            "types.SimpleNamespace(mv=lambda v: k @ v, shape=k.shape, dtype=k.dtype)."
        )
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(
            f"operator has shape {shape}, but must be square, symmetric and positive semi-definite with at least one "
            "row: K_SS is NtkOperator(apply_fn, params, x_s), without x2."
        )
    dtype = jnp.dtype(getattr(operator, "dtype", jnp.result_type(float)))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"operator has dtype {dtype}, but must be real floating point: cast it.")
    return shape[0], dtype


def check_key(key: Any) -> None:
    """Refuses what is not one random key of `jax.random.key`."""
    if not jnp.issubdtype(getattr(key, "dtype", jnp.uint32), jax.dtypes.prng_key) or jnp.shape(key) != ():
        raise TypeError(f"key={key!r} must be one random key: pass jax.random.key(0), or one of jax.random.split(...).")


def matvec_of(operator: LinearOperator) -> Partial:
    """`operator.mv` as a pytree: the operator's arrays as data where it is a pytree, itself as static data if not."""
    leaves = jax.tree.leaves(operator)
    if not leaves or leaves[0] is not operator:
        return Partial(_mv, operator)
    size, dtype = check_operator(operator)
    return Partial(pin(operator.mv, (jax.ShapeDtypeStruct((size,), dtype),), derived=None))


def _mv(operator, vector):
    return operator.mv(vector)


@custom_vmap
def product(matvec: Partial, vector: Any) -> Any:
    """`matvec(vector)`, which `vmap` over vectors turns into one product with a block: the operator's own batching."""
    return matvec(vector)


@product.def_vmap
def _(axis_size, in_batched, matvec, vector):
    matvec_batched, vector_batched = in_batched
    if any(jax.tree.leaves(matvec_batched)):  # an ensemble of operators
        leaves, treedef = jax.tree.flatten(matvec)
        axes = [0 if batched else None for batched in jax.tree.leaves(matvec_batched)]

        def one(leaves, vector):
            return treedef.unflatten(leaves)(vector)

        return jax.vmap(one, in_axes=(axes, 0 if vector_batched else None))(leaves, vector), True
    return matvec(vector.T).T, True
