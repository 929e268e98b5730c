"""What every kernel asks of its arguments, checked on shapes and dtypes before any memory is spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil

PyTree = Any
ApplyFn = Callable[[PyTree, PyTree], jax.Array]


class OutputSpec(NamedTuple):
    """Static facts of `apply_fn` on one batch."""

    num_examples: int
    num_outputs: int
    dtype: jnp.dtype


def num_params(params: PyTree) -> int:
    """Number of scalars in `params` (the p of the Jacobian's shape)."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


def check_params(params: PyTree) -> jnp.dtype:
    """Returns the one floating dtype of `params`; anything else is refused."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params has no leaves; pass the pytree of arrays that apply_fn differentiates.")
    dtypes = {}
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype}, but every parameter must be real floating "
                "point: keep integer, boolean or complex leaves out of params by closing apply_fn over them."
            )
        dtypes.setdefault(dtype, jax.tree_util.keystr(path))
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} (params{path})" for dtype, path in dtypes.items())
        raise TypeError(f"params mixes dtypes: {found}. Cast them to one, e.g. jax.tree.map(jnp.float32, params).")
    return next(iter(dtypes))


def num_examples(x: PyTree, name: str) -> int:
    """The common leading dimension of the leaves of a batch."""
    leaves = jax.tree.leaves(x)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(f"{name} must be an array, or a pytree of arrays, with a leading axis of examples; got {x!r}.")
    sizes = {jnp.shape(leaf)[0] for leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(f"the leaves of {name} disagree on the number of examples: {sorted(sizes)}.")
    (n,) = sizes
    if n == 0:
        raise ValueError(f"{name} holds zero examples; pass at least one.")
    return n


def check_apply(apply_fn: ApplyFn, params: PyTree, x: PyTree, name: str = "x") -> OutputSpec:
    """Traces `apply_fn` (nothing is computed) and checks its outputs against the contract `(n, c)` or `(n,)`."""
    dtype = check_params(params)
    n = num_examples(x, name)
    for leaf in jax.tree.leaves(x):
        x_dtype = jnp.result_type(leaf)
        if jnp.issubdtype(x_dtype, jnp.floating) and x_dtype != dtype:
            raise TypeError(
                f"{name} has dtype {x_dtype} and params {dtype}: mixed dtypes would be promoted silently. "
                f"Cast one of them, e.g. {name}.astype(jnp.{dtype})."
            )
    out = jax.eval_shape(apply_fn, params, x)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(f"apply_fn must return one array of shape (n, c) or (n,); got {jax.tree.structure(out)}.")
    if len(out.shape) not in (1, 2) or out.shape[0] != n:
        raise ValueError(
            f"apply_fn({name}) has shape {out.shape}, but must be ({n}, c) or ({n},): one row of outputs for each of "
            f"the {n} examples. Reshape inside apply_fn, e.g. out.reshape(len(x), -1)."
        )
    if out.dtype != dtype:
        raise TypeError(
            f"apply_fn returns {out.dtype} for params of dtype {dtype}; both must be floating point of one dtype."
        )
    num_outputs = out.shape[1] if len(out.shape) == 2 else 1
    if num_outputs == 0:
        raise ValueError(f"apply_fn({name}) has shape {out.shape}: zero outputs an example; it must have at least one.")
    return OutputSpec(n, num_outputs, out.dtype)


def check_microbatch_size(microbatch_size: int | None) -> None:
    if microbatch_size is not None and (not isinstance(microbatch_size, int) or microbatch_size < 1):
        raise ValueError(f"microbatch_size={microbatch_size!r} must be a positive integer, or None for one batch.")


def available_bytes() -> int:
    """Memory that the default device can still give, in bytes."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return psutil.virtual_memory().available


def check_fits(num_bytes: int, what: str, remedy: str) -> None:
    """Refuses an allocation that is larger than the memory at hand, before it is made."""
    available = available_bytes()
    if num_bytes > available:
        raise MemoryError(
            f"{what} takes {num_bytes / 2**30:,.1f} GiB and {available / 2**30:,.1f} GiB are available. {remedy}"
        )
