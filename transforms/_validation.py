"""Checks of what a caller passes: each error names the value, the rule it breaks and the way out."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_nonnegative(name: str, value: Any, remedy: str) -> None:
    """Raise unless `value` is a finite real number >= 0 (or traced, hence unknown here)."""
    _check_number(name, value, lambda x: (x >= 0) & np.isfinite(x), "a finite number >= 0", remedy)


def check_nonnegative_or_schedule(name: str, value: Any, remedy: str) -> None:
    """Raise unless `value` is a schedule or a finite real number >= 0."""
    if not callable(value):
        check_nonnegative(name, value, remedy)


def check_share(name: str, value: Any) -> None:
    """Raise unless `value` is a real number in [0, 1]."""
    _check_number(name, value, lambda x: (x >= 0) & (x <= 1), "in [0, 1]", "0.05 stands for 5 %")


def check_sample_size(value: Any) -> None:
    """Raise unless `value` is at least 2 (or traced, hence unknown here)."""
    remedy = (
        "the variance within a batch of one is not defined; use larger batches, or ema_statistic(), which compares "
        "batches with each other"
    )
    _check_number("sample_size", value, lambda x: x >= 2, ">= 2", remedy)


def check_decay(name: str, value: Any) -> None:
    """Raise unless `value` can be the decay of a moving average in float32: a real number in [0, 1) also there."""
    remedy = "0 keeps the last step only, 0.9 and 0.99 average over about 10 and 100 steps"
    _check_number(name, value, lambda x: (x >= 0) & (x < 1), "in [0, 1)", remedy)
    rule = "in [0, 1) once it is rounded to float32, where an average with a decay of 1 would never move"
    _check_number(name, value, lambda x: x.astype(np.float32) < 1, rule, "0.9999999 is about the largest")


def is_known(value: Any, holds: Callable[[np.ndarray], Any]) -> bool:
    """Whether `holds(value)`, of a number rather than of a traced one, which may turn out to be anything."""
    try:
        return bool(np.all(holds(np.asarray(value))))
    except jax.errors.TracerArrayConversionError:
        return False


def _check_number(name: str, value: Any, holds: Callable[[np.ndarray], Any], rule: str, remedy: str) -> None:
    try:
        number = np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return  # Under jit or vmap the value is not known yet, so there is nothing to compare.
    if not (jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)):
        raise TypeError(
            f"{name} must be a real number or an array of real numbers, got {value!r}. Schedules go in through "
            "optax.inject_hyperparams around a function that builds the optimizer."
        )
    if not np.all(holds(number.astype(np.float64))):
        raise ValueError(f"{name} must be {rule}, got {value!r}: {remedy}.")


def check_transformation(name: str, value: Any) -> None:
    """Raise unless `value` is an optax gradient transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation such as optax.adam(1e-3), got {value!r}. Call the "
            "factory first (optax.adam(1e-3), not optax.adam), and pass statistic= and mask= by keyword."
        )


def check_integer_at_least(name: str, value: Any, least: int, remedy: str = "pass a larger one") -> None:
    """Raise unless `value` is an integer >= least."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}: {remedy}.") from None
    if number < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}: {remedy}.")


def check_method(name: str, value: Any, method: str, examples: str) -> None:
    """Raise unless `value` is an object (not a class) with the method."""
    # The class HardMask has the method too, so an uncalled factory needs its own test.
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise TypeError(
            f"{name} must be an object with a method {method}, such as {examples}, got {value!r}. A tree or function "
            "that selects parameters belongs in optax.masked or in weight_decay_mask."
        )


def check_state_dtype(name: str, value: Any) -> None:
    """Raise unless moving averages can be kept in `value`: None, bfloat16, float32 or float64."""
    if value is None:
        return
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(
            f"{name} must be jnp.float32, jnp.float64 or jnp.bfloat16, got {value!r}: averages of small gradients "
            "underflow, or stop moving, in other dtypes. None is at least float32."
        )


def check_float_leaves(params: optax.Params) -> None:
    """Raise unless every leaf of `params` is real floating-point: a variance of anything else is not defined here."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"params{jax.tree_util.keystr(path)}"
        try:
            dtype = jnp.result_type(leaf)
        except (TypeError, ValueError):
            raise TypeError(
                f"The gate needs arrays as parameters, got {_kind(leaf)} at {where}. Of an Equinox module pass the "
                "arrays alone, tx.init(eqx.filter(model, eqx.is_inexact_array)), of other objects their pytree of JAX "
                "or NumPy arrays."
            ) from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"The gate needs real floating-point parameters, got {dtype} at {where}. Keep such leaves out with "
                "optax.masked or optax.partition (of an Equinox module: eqx.filter(model, eqx.is_inexact_array)); wrap "
                "complex ones with optax.contrib.split_real_and_imaginary."
            )


def _kind(value: Any) -> str:
    """What a value is, in words: a function by its name, anything else by its type."""
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
