"""What this project knows of jaxprs: the names in them, how a call and a scan are read, how an equation is run again.

JAX promises none of it. Written for JAX 0.10.0, 0.10.2, 0.11.2 and 0.12.0. In 0.10 a scan counts its constants and
carries by `num_consts` and `num_carry`, and a nested jaxpr is a `ClosedJaxpr` around a `Jaxpr`; since 0.11 a scan has
`ft_in` and `ft_out` instead, and a nested jaxpr is one object. Whatever is not as it was in these releases raises
`Unread`, and the parameters of the model that it concerns are differentiated by autodiff, which reads no jaxpr.

Source: JAX's documentation, "Writing custom Jaxpr interpreters".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# They run their jaxpr as it stands; what else they are told is how to compile it and what to recompute.
CALLS = ("jit", "closed_call", "remat2")
# These do as well, but have derivatives of their own.
CUSTOM_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")

# Parameters by primitive: those that are read, and those that do not change what the others mean.
PARAMETERS = {
    "add": ("", ""),
    "broadcast_in_dim": ("shape broadcast_dimensions", "sharding"),
    "conv_general_dilated": (
        "window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count batch_group_count",
        "precision preferred_element_type out_sharding",
    ),
    "convert_element_type": ("new_dtype", "weak_type sharding"),
    "copy": ("", ""),
    "div": ("", ""),
    "dot_general": ("dimension_numbers", "precision preferred_element_type out_sharding"),
    "gather": ("dimension_numbers slice_sizes mode", "unique_indices indices_are_sorted fill_value"),
    "mul": ("", "out_dtype"),
    "neg": ("", ""),
    "reshape": ("new_sizes dimensions", "sharding"),
    "rev": ("dimensions", ""),
    "scan": ("jaxpr length reverse unroll", "num_consts num_carry ft_in ft_out"),
    "squeeze": ("dimensions", ""),
    "transpose": ("permutation", ""),
}


class Unread(Exception):
    """An equation that is not as it was in the releases of JAX that this file was written for."""


class Nested(NamedTuple):
    """A jaxpr inside an equation, and the values of its constants."""

    jaxpr: Any
    consts: list[Any]


class Scan(NamedTuple):
    """A scan. Its operands are constants, carries and slices; its results carries and stacked slices."""

    body: Nested
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def is_literal(var: Any) -> bool:
    """Whether an operand is a number written into the equation, `var.val`, rather than a variable."""
    return hasattr(var, "val")


def parameters(eqn: Any) -> dict[str, Any]:
    """The parameters of an equation, all of them known."""
    name = eqn.primitive.name
    if name not in PARAMETERS:
        raise Unread(f"{name} is not known")
    needed, others = (set(names.split()) for names in PARAMETERS[name])
    if missing := needed - eqn.params.keys():
        raise Unread(f"{name} has no {', '.join(sorted(missing))}")
    if unknown := eqn.params.keys() - needed - others:
        raise Unread(f"{name} has {', '.join(sorted(unknown))}, which is not known")
    return eqn.params


def opened(value: Any) -> Nested:
    """A nested jaxpr, closed over its constants or not."""
    jaxpr = getattr(value, "jaxpr", value)
    return Nested(jaxpr, list(getattr(value, "consts", ())))


def called(eqn: Any) -> Nested:
    """The jaxpr that a call runs on its operands, under whatever name it is kept."""
    name = eqn.primitive.name
    found = [value for value in eqn.params.values() if is_jaxpr(value)]
    if len(found) != 1:
        raise Unread(f"{name} holds {len(found)} jaxprs")
    nested = opened(found[0])
    if _shapes(nested.jaxpr.invars) != _shapes(eqn.invars) or _shapes(nested.jaxpr.outvars) != _shapes(eqn.outvars):
        raise Unread(f"{name} passes on other operands than its own")
    return nested


def scanned(eqn: Any) -> Scan:
    """A scan, divided by the ranks of its operands inside and outside: slices alone lose an axis, results gain it."""
    params = parameters(eqn)
    body, length = opened(params["jaxpr"]), params["length"]
    outside, inside = (_shapes(vars) for vars in (eqn.invars, body.jaxpr.invars))
    results, inside_results = (_shapes(vars) for vars in (eqn.outvars, body.jaxpr.outvars))
    num_sliced = sum(len(outer) > len(inner) for outer, inner in zip(outside, inside, strict=True))
    num_carry = sum(len(outer) == len(inner) for outer, inner in zip(results, inside_results, strict=True))
    num_kept = len(outside) - num_sliced
    scan = Scan(body, num_kept - num_carry, num_carry, length, params["reverse"], params["unroll"])
    slices, stacked = inside[num_kept:], inside_results[num_carry:]
    if (
        outside != [*inside[:num_kept], *((length, *shape) for shape in slices)]
        or results != [*inside_results[:num_carry], *((length, *shape) for shape in stacked)]
        or inside[scan.num_consts : num_kept] != inside_results[:num_carry]
    ):
        raise Unread("scan has operands of other shapes than constants, carries and slices")
    return scan


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation as it stands, with its own derivatives and under the settings of its tracing."""
    with getattr(getattr(eqn, "ctx", None), "manager", contextlib.nullcontext()):
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def intermediate_bytes(jaxpr: Any) -> tuple[int, int]:
    """Bytes of all intermediate results of a jaxpr, and of the largest one; a loop of unknown length counts once."""
    total = largest = 0
    for eqn in jaxpr.eqns:
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for nested in _nested(eqn):
            some, most = intermediate_bytes(nested.jaxpr)
            total, largest = total + times * some, max(largest, most)
        sizes = [
            math.prod(var.aval.shape) * var.aval.dtype.itemsize
            for var in eqn.outvars
            if hasattr(var.aval, "shape") and hasattr(var.aval.dtype, "itemsize")
        ]
        total, largest = total + sum(sizes), max([largest, *sizes])
    return total, largest


def _nested(eqn: Any) -> Iterator[Nested]:
    for value in eqn.params.values():
        yield from (opened(one) for one in (value if isinstance(value, tuple) else (value,)) if is_jaxpr(one))


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr, closed over its constants or not."""
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(getattr(var.aval, "shape", ())) for var in variables]
