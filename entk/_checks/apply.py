"""What every kernel asks of its arguments, checked before memory is spent."""

from __future__ import annotations

import bisect
import math
import numbers
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil

from entk._checks.cgroup import cgroup_headroom
from entk._checks.independence import check_independent, kind, one_row, passed, remember
from entk._checks.misuse import check_function, check_leaf, explain_call, first_line, shapes
from entk._checks.rlimit import rlimit_headroom
from entk._parameters import differentiable
from entk._tracing.pinned import Pinned, pin

PyTree = Any
ApplyFn = Callable[[PyTree, PyTree], Any]  # one array; libraries type theirs loosely, so check_apply verifies it


_ARGUMENTS: dict[Hashable, Any] = {}  # kinds of params and x that have passed


class OutputSpec(NamedTuple):
    """Static facts of `apply_fn` on one batch."""

    num_examples: int
    num_outputs: int  # of one example, trailing axes multiplied
    dtype: jnp.dtype


def num_params(params: PyTree) -> int:
    """Number of differentiable scalars in `params` (the p of the Jacobian's shape)."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in differentiable(params)[0])


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


def pin_model(
    apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None = None, *, names: tuple[str, str] = ("x1", "x2")
) -> Pinned:
    """`apply_fn` as it is now, traced on one example; its arguments are checked first (see `entk._tracing.pinned`)."""
    if isinstance(apply_fn, Pinned):
        return apply_fn
    check_function(apply_fn, "apply_fn")
    try:
        _check_arguments(params, x1, names[0])
        if x2 is not None:
            _check_arguments(params, x2, names[1])
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


def _check_arguments(params: PyTree, x: PyTree, name: str) -> None:
    """Of one kind only once: what is asked of them is asked of shapes and dtypes."""
    try:
        found = kind(params), kind(x)
        if found in _ARGUMENTS:
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
        remember(found, among=_ARGUMENTS)


def check_apply(apply_fn: ApplyFn, params: PyTree, x: PyTree, name: str = "x") -> OutputSpec:
    """Checks `apply_fn` against the contract: one row of outputs an example, of any trailing shape, and of its own.

    All of it is checked by tracing, except what takes values: that a row changes with its own example only.
    """
    model = pin_model(apply_fn, params, x, names=(name, ""))
    _check_arguments(params, x, name)
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


def check_microbatch_size(microbatch_size: int | None) -> int | None:
    """Returns `microbatch_size` as a Python integer; NumPy's integers are taken, booleans and floats are not."""
    if microbatch_size is None:
        return None
    if isinstance(microbatch_size, bool) or not isinstance(microbatch_size, numbers.Integral) or microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size!r} must be a positive integer, or None for one batch.")
    return int(microbatch_size)


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Returns `value` as a Python integer; NumPy's integers are taken, booleans and floats are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")
    return int(value)


def available_bytes() -> int:
    """Memory in bytes that this process's first device can still give; for a CPU, what the limits of containers and of
    the process leave."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return int(min(psutil.virtual_memory().available, cgroup_headroom(), rlimit_headroom()))


def check_fits(
    num_bytes: int,
    what: str,
    remedy: str,
    *,
    count: int = 0,
    bytes_of: Callable[[int], int] | None = None,
    unit: str = "examples",
) -> None:
    """Refuses an allocation that is larger than the memory at hand, before it is made.

    Args:
      num_bytes: what it takes.
      what: is allocated, for the message; "the 10 x 10 kernel".
      remedy: sentences that name the ways out.
      count, bytes_of, unit: of what there could be less, and what so many take: the message says how many would fit.

    Cost: reading some files of the operating system, about 0.1 ms.
    """
    available = available_bytes()
    if num_bytes > available:
        fitting = ""
        if bytes_of is not None:
            most = bisect.bisect_right(range(1, count), available, key=bytes_of)
            fitting = (
                f" {most:,} of the {count:,} {unit} would fit."
                if most
                else f" Not one of the {count:,} {unit} would fit."
            )
        raise MemoryError(
            f"{what} takes {num_bytes / 2**30:,.1f} GiB and {available / 2**30:,.1f} GiB are available.{fitting} "
            f"{remedy}"
        )
