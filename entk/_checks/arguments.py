"""Parameters and batches: arrays of numbers, of one dtype, one row per example."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from entk._checks.misuse import check_leaf
from entk._checks.passed import kind, passed, remember
from entk._types import PyTree


def check_params(params: PyTree) -> jnp.dtype:
    """Returns the one dtype of the floating leaves of `params`; integers, booleans and random keys are constants."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params has no leaves; pass the pytree of arrays that apply_fn differentiates.")
    dtypes = {}
    for path, leaf in leaves:
        check_leaf(leaf, f"params{jax.tree_util.keystr(path)}")
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype}, but parameters must be real: keep real and "
                "imaginary part as two leaves, or close apply_fn over it."
            )
        if jnp.issubdtype(dtype, jnp.floating):
            dtypes.setdefault(dtype, jax.tree_util.keystr(path))
    if not dtypes:
        found = ", ".join(sorted({str(jnp.result_type(leaf)) for _, leaf in leaves}))
        raise ValueError(
            f"params has leaves of dtype {found} only, which are constants: at least one leaf must be floating point, "
            "e.g. jax.tree.map(jnp.float32, params)."
        )
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} (params{path})" for dtype, path in dtypes.items())
        raise TypeError(
            f"params mixes dtypes: {found}. Cast the floating-point leaves to one, e.g. jax.tree.map(jnp.float32, "
            "params)."
        )
    return next(iter(dtypes))


def num_examples(x: PyTree, name: str) -> int:
    """The common leading dimension of the leaves of a batch."""
    leaves = jax.tree_util.tree_leaves_with_path(x)
    if not leaves:
        raise ValueError(f"{name}={x!r} holds no arrays; pass an array, or a pytree of arrays, one row an example.")
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        check_leaf(leaf, where)
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{where}={leaf!r} is a scalar, but must have a leading axis of examples; nested lists are trees of "
                "scalars: pass jnp.asarray(...)."
            )
    sizes = {jnp.shape(leaf)[0] for _, leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(
            f"the leaves of {name} disagree on the number of examples: {sorted(sizes)}; every leaf needs one row for "
            "each example."
        )
    (n,) = sizes
    if n == 0:
        raise ValueError(f"{name} holds zero examples; pass at least one.")
    return n


def check_arguments(params: PyTree, x: PyTree, name: str) -> None:
    """Of one kind only once: what is asked of them is asked of shapes and dtypes."""
    try:
        found = "arguments", kind(params), kind(x)
        if passed(found):
            return
    except Exception:  # of whatever kind: leaves that are no arrays, which the following refuses by name
        found = None
    dtype = check_params(params)
    num_examples(x, name)
    for leaf in jax.tree.leaves(x):
        x_dtype = jnp.result_type(leaf)
        if jnp.issubdtype(x_dtype, jnp.floating) and x_dtype != dtype:
            raise TypeError(
                f"{name} has dtype {x_dtype} and params {dtype}: mixed dtypes would be promoted silently. "
                f"Cast one of them, e.g. {name}.astype(jnp.{dtype})."
            )
    if found is not None:
        remember(found)
