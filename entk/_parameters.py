"""Which leaves of a parameter pytree are parameters, and which are constants that travel with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from entk._types import PyTree


def differentiable(params: PyTree) -> tuple[list[Array], Callable[[Sequence[Any]], PyTree]]:
    """Splits the leaves that are differentiated from those that cannot be: integers, booleans, random keys.

    Returns:
      The real floating leaves in `ravel_pytree` order, and `rebuild(leaves)`, the pytree with other leaves in their
      place and the constants where they were.

    Example:
      >>> import jax.numpy as jnp
      >>> leaves, rebuild = differentiable({"step": 3, "w": jnp.ones(2)})
      >>> rebuild([2 * leaf for leaf in leaves])
      {'step': 3, 'w': Array([2., 2.], dtype=float64)}
    """
    leaves, treedef = jax.tree.flatten(params)
    chosen = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

    def rebuild(values: Sequence[Any]) -> PyTree:
        remaining = iter(values)
        merged = [next(remaining) if moves else leaf for leaf, moves in zip(leaves, chosen, strict=True)]
        return jax.tree.unflatten(treedef, merged)

    return [leaf for leaf, moves in zip(leaves, chosen, strict=True) if moves], rebuild


def num_params(params: PyTree) -> int:
    """Number of differentiable scalars in `params` (the p of the Jacobian's shape)."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in differentiable(params)[0])
