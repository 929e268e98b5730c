"""Arguments of other kinds than those meant, told by name: models, tensors and tables of other libraries, exchanged
arguments.

No library is imported to recognise its objects: a type says which module it comes from.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from entk._batching import one_row
from entk._types import PyTree

REMEDIES = {
    "torch": "pass jnp.asarray(tensor.detach().cpu().numpy())",
    "tensorflow": "pass jnp.asarray(tensor.numpy())",
    "pandas": "pass jnp.asarray(frame.to_numpy(dtype='float32'))",
    "polars": "pass jnp.asarray(frame.to_numpy())",
    "pyarrow": "pass jnp.asarray(array.to_numpy())",
    "numpy.ma": "its mask would be dropped: pass array.filled(...), and the mask as a leaf of its own",
    "scipy.sparse": "pass jnp.asarray(matrix.toarray())",
}
MODULES = {  # a model of a library in the place of apply_fn: what to write instead
    "flax.nnx": (
        "graphdef, params, rest = flax.nnx.split(model, flax.nnx.Param, ...) and "
        "def apply_fn(params, x): return flax.nnx.merge(graphdef, params, rest)(x)"
    ),
    "flax.linen": "def apply_fn(params, x): return model.apply(params, x)",
    "torch": "a function of JAX arrays: parameters of torch are not differentiated by JAX",
    "haiku": "haiku.without_apply_rng(transformed).apply",
    "equinox": (
        "params, static = equinox.partition(model, equinox.is_inexact_array) and "
        "def apply_fn(params, x): return jax.vmap(equinox.combine(params, static))(x)"
    ),
}


def check_leaf(leaf: Any, where: str) -> None:
    """Refuses what is not an array of numbers or random keys."""
    if isinstance(leaf, (jax.Array, numbers.Number)) and not isinstance(leaf, np.generic):
        return
    for library, remedy in REMEDIES.items():
        if _comes_from(type(leaf), library):
            raise TypeError(f"{where} is a {_full_name(type(leaf))}, but must be an array of JAX or NumPy: {remedy}.")
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and not isinstance(leaf, numbers.Number):
        raise TypeError(
            f"{where} is {_short(leaf)}, not an array: split it off and close apply_fn over it, e.g. with "
            "equinox.partition or flax.nnx.split."
        )
    if getattr(dtype, "kind", "f") in "OSUMm":
        raise TypeError(
            f"{where} is an array of dtype {dtype}, but must hold numbers: encode text and categories as integers "
            "or one-hot rows, and turn arrays of arrays into one by jnp.stack."
        )


def check_function(function: Any, name: str) -> None:
    """Refuses what cannot be called as (params, x), or compared with itself at the next call."""
    for library, instead in MODULES.items():
        is_pair = library == "haiku" and isinstance(function, tuple)
        if not _comes_from(type(function), library) or not (is_pair or _is_model(function, library)):
            continue
        raise TypeError(
            f"{name} is a {_full_name(type(function))}, but must be a pure function (params, x) -> outputs. Pass "
            f"{instead}."
        )
    if not callable(function):
        hint = f"; pass its function apply as {name}" if isinstance(function, tuple) else ""
        raise TypeError(
            f"{name}={_short(function)} must be a function (params, x) -> outputs; it comes before params{hint}."
        )
    try:
        hash(function)
    except TypeError as error:
        raise TypeError(
            f"{name} of type {type(function).__name__} must be hashable, to be compiled once ({error}). "
            f"Pass a function defined once: def {name}(params, x): ..."
        ) from error
    names = _positional(function)
    if names is not None and "rng" in names[1:3]:
        raise TypeError(
            f"{name}({', '.join(names)}) takes a random key in the place of x, but must be a function (params, x) -> "
            "outputs. Pass haiku.without_apply_rng(transformed).apply, or close over the key: lambda params, x: "
            "apply(params, key, x)."
        )


def explain_call(function: Callable, params: PyTree, x: PyTree, name: str, error: Exception) -> None:
    """Raises what is known of a call that failed: arguments that are exchanged, a list of examples."""
    if all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(params)) and _works(function, x, params):
        raise TypeError(
            f"params and {name} seem to be exchanged: apply_fn works on ({name}, params) and not on (params, {name}). "
            f"Write (apply_fn, params, {name})."
        ) from error
    if type(error).__name__ == "TraceContextError" and _comes_from(type(error), "flax"):
        raise ValueError(
            "apply_fn writes into a model that it closes over (batch statistics, counts of random keys), but must be "
            "pure: choose the evaluation mode by model.eval() before flax.nnx.split(model, flax.nnx.Param, ...), or "
            f"merge a copy, flax.nnx.merge(graphdef, params, rest, copy=True) ({first_line(error)})."
        ) from error
    arrays = type(x) in (list, tuple) and all(hasattr(row, "dtype") for row in x)
    if arrays and len({row.shape for row in x}) == 1:
        stacked = jax.ShapeDtypeStruct((len(x), *x[0].shape), x[0].dtype)
        if _works(function, params, stacked):
            raise TypeError(
                f"{name} is a {type(x).__name__} of {len(x)} arrays, which is a pytree of {len(x)} inputs and not a "
                f"batch of {len(x)} examples: pass jnp.stack({name})."
            ) from error


def _works(function: Callable, params: PyTree, x: PyTree) -> bool:
    try:
        jax.eval_shape(lambda *args: function(*args), params, one_row(x))
    except Exception:  # of whatever kind: it is the user's function, on arguments it was not made for
        return False
    return True


def shapes(x: PyTree) -> str:
    """Shapes of one example."""
    return ", ".join(f"{jnp.result_type(leaf)}{jnp.shape(leaf)[1:]}" for leaf in jax.tree.leaves(x))


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _comes_from(kind: type, library: str) -> bool:
    return any(one.__module__ == library or one.__module__.startswith(f"{library}.") for one in kind.__mro__)


def _is_model(function: Any, library: str) -> bool:
    """Not each object of a library's types is a model: wrappers such as equinox.filter_jit's are functions."""
    if not any(one.__name__ == "Module" and _comes_from(one, library) for one in type(function).__mro__):
        return False
    return library != "equinox" or not _takes_two(function)


def _takes_two(function: Any) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def _positional(function: Any) -> list[str] | None:
    """Names of the positional parameters; None where there is no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]


def _full_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]} {kind.__qualname__}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
