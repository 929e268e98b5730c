"""What every kernel asks of its arguments, checked before memory is spent."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from entk._batching import one_row
from entk._checks.arguments import check_arguments, check_params, num_examples
from entk._checks.independence import check_independent
from entk._checks.misuse import check_function, explain_call, first_line, shapes
from entk._checks.passed import kind, passed, remember
from entk._tracing.pinned import Pinned, pin
from entk._types import ApplyFn, PyTree


class OutputSpec(NamedTuple):
    """Static facts of `apply_fn` on one batch."""

    num_examples: int
    num_outputs: int  # of one example, trailing axes multiplied
    dtype: jnp.dtype


def pin_model(
    apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None = None, *, names: tuple[str, str] = ("x1", "x2")
) -> Pinned:
    """`apply_fn` as it is now, traced on one example; its arguments are checked first (see `entk._tracing.pinned`)."""
    if isinstance(apply_fn, Pinned):
        return apply_fn
    check_function(apply_fn, "apply_fn")
    try:
        check_arguments(params, x1, names[0])
        if x2 is not None:
            check_arguments(params, x2, names[1])
        model = pin(apply_fn, (params, one_row(x1)))
    except Exception as error:
        explain_call(apply_fn, params, x1, names[0], error)
        raise
    if x2 is None or kind(x2, 1) == kind(x1, 1):
        return model
    try:
        return pin(apply_fn, (params, one_row(x1)), (params, one_row(x2)))
    except Exception as error:
        raise ValueError(
            f"apply_fn takes examples of {names[0]}, {shapes(x1)}, and fails on those of {names[1]}, {shapes(x2)} "
            f"({type(error).__name__}: {first_line(error)}). Both must be inputs of the same model: the same features, "
            "in the same places."
        ) from error


def check_apply(apply_fn: ApplyFn, params: PyTree, x: PyTree, name: str = "x") -> OutputSpec:
    """Checks `apply_fn` against the contract: one row of outputs an example, of any trailing shape, and of its own.

    All of it is checked by tracing, except what takes values: that a row changes with its own example only.
    """
    model = pin_model(apply_fn, params, x, names=(name, ""))
    check_arguments(params, x, name)
    found = "outputs", model, kind(params), kind(x)
    spec = passed(found)
    if spec is None:
        spec = _check_outputs(model, params, x, name)
        if not model.is_traced:
            remember(found, spec)
    check_independent(model, params, x, name)
    return spec


def _check_outputs(apply_fn: ApplyFn, params: PyTree, x: PyTree, name: str) -> OutputSpec:
    """Shapes and dtypes of the outputs of the batch, and of one example."""
    dtype, n = check_params(params), num_examples(x, name)
    out = jax.eval_shape(apply_fn, params, x)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(
            f"apply_fn must return one array of shape (n, c) or (n,); got {jax.tree.structure(out)}. "
            "Return the outputs alone, e.g. out[0]."
        )
    if out.shape[:1] != (n,):
        raise ValueError(
            f"apply_fn({name}) has shape {out.shape}, but must be ({n}, c) or ({n},): one row of outputs, of any "
            f"trailing shape, for each of the {n} examples. Reshape inside apply_fn, e.g. out.reshape(len(x), -1)."
        )
    if out.dtype != dtype:
        raise TypeError(
            f"apply_fn({name}) has dtype {out.dtype} and params {dtype}, but both must be floating point of one dtype. "
            f"Cast inside apply_fn, e.g. out.astype(jnp.{dtype})."
        )
    row = out.shape[1:]
    num_outputs = math.prod(row)
    if num_outputs == 0:
        raise ValueError(f"apply_fn({name}) has shape {out.shape}: zero outputs an example; it must have at least one.")
    # Outputs like a Gram matrix (n, n) have the right shape and still mix examples: one example alone gives it away.
    alone = jax.eval_shape(apply_fn, params, one_row(x))
    if alone.shape not in ((1, *row), tuple(size for size in row if size != 1)):  # the latter from jnp.squeeze
        raise ValueError(
            f"apply_fn gives {num_outputs} outputs an example on the {n} examples of {name} and {alone.shape} on one "
            "example: it must treat examples independently. Remove what mixes the rows of the batch."
        )
    return OutputSpec(n, num_outputs, out.dtype)


def check_apply_pair(apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None) -> tuple[OutputSpec, OutputSpec]:
    """`check_apply` of the rows x1 and the columns x2 (None means x1) of one kernel."""
    model = pin_model(apply_fn, params, x1, x2)
    spec1 = check_apply(model, params, x1, "x1")
    spec2 = spec1 if x2 is None else check_apply(model, params, x2, "x2")
    if spec1.num_outputs != spec2.num_outputs:
        raise ValueError(
            f"x1 has {spec1.num_outputs} outputs an example and x2 {spec2.num_outputs}, but one kernel needs the same "
            "number: pass inputs of one kind."
        )
    return spec1, spec2
