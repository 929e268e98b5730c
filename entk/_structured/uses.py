"""Where a model uses its parameters: the products that consume each one, found in the jaxpr of one example.

Parameters are followed through what only rearranges them (reshape, transpose, cast, scaling by a constant) and into
nested jit, remat and scan. Everything else that takes a parameter makes it `opaque`, with the reason; such a parameter
is differentiated by autodiff.

Source: jaxprs are read as in JAX's documentation, "Writing custom Jaxpr interpreters".
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp

from entk._structured.products import SLICES, Conv, Dot, Lookup, Shape, Sizes, Spread, Use, View, is_factored_in
from entk._tracing.jaxpr import CALLS, PARAMETERS, Scan, Unread, called, is_literal, opened, parameters, scanned

SMALLEST, LARGEST = 2.0**-32, 2.0**32  # of constant factors: 0·∞, and squares that overflow, are left to autodiff


@dataclass
class Scope:
    """What was found in one jaxpr: uses and nested scopes by the number of their equation.

    `scan` is the loop that the jaxpr is the body of, if any.
    """

    jaxpr: Any
    consts: list[Any]
    scan: Scan | None = None
    uses: dict[int, Use] = field(default_factory=dict)
    inner: dict[int, Scope] = field(default_factory=dict)

    def indices(self) -> set[int]:
        """Numbers of the uses in this scope and in the nested ones."""
        own = {use.index for use in self.uses.values()}
        return own.union(*(scope.indices() for scope in self.inner.values()))


class Uses:
    """All uses of the parameters of one model.

    Attributes:
      scope: the model's jaxpr, annotated.
      uses: every product found, by its number.
      biases: leaf of a bias → numbers of the uses to whose results it is added, one entry an addition.
      opaque: leaf → why it has to be differentiated by autodiff.
    """

    def __init__(self, closed: Any, num_leaves: int):
        self.uses: list[Use] = []
        self.biases: dict[int, list[int]] = {}
        self.opaque: dict[int, str] = {}
        views = {}
        for leaf, var in enumerate(opened(closed).jaxpr.invars[:num_leaves]):
            shape = tuple(var.aval.shape)
            views[var] = View(leaf, (), shape, tuple(range(len(shape))))
        self.scope, outputs, _ = self._walk(opened(closed), views, ())
        for output in outputs:
            self._give_up(output, "is an output itself")

    def _give_up(self, value: View | Spread | None, reason: str) -> None:
        if value is not None:
            self.opaque.setdefault((value.view if isinstance(value, Spread) else value).leaf, reason)

    def _walk(self, nested, views, loops, scan=None) -> tuple[Scope, list[Any], list[Any]]:
        """Annotates one jaxpr; `views` says what its variables are. Returns which outputs are views or uses' results.

        A use's result counts as such while nothing else reads it: a bias added to it then has the same cotangent.
        """
        jaxpr, consts = nested
        scope, results = Scope(jaxpr, consts, scan), {}
        operands_read = [var for eqn in jaxpr.eqns for var in eqn.invars] + list(jaxpr.outvars)
        once = Counter(var for var in operands_read if not is_literal(var))
        for number, eqn in enumerate(jaxpr.eqns):
            operands = [None if is_literal(var) else views.get(var) for var in eqn.invars]
            try:
                reason = self._annotate(number, eqn, operands, scope, views, results, once, loops)
            except Exception as error:  # of whatever kind: jaxprs change from one release of JAX to the next
                what = str(error) if isinstance(error, Unread) else repr(error)
                reason = f"is consumed by {eqn.primitive.name}, which cannot be read: {what}"
            for operand in operands if reason else ():
                self._give_up(operand, reason)
        outputs = [None if is_literal(var) else var for var in jaxpr.outvars]
        return scope, [views.get(var) for var in outputs], [results.get(var) for var in outputs]

    def _annotate(self, number, eqn, operands, scope, views, results, once, loops) -> str:
        """Notes what one equation makes of the views among its operands; else returns why they are given up."""
        name = eqn.primitive.name
        if name == "transpose" and (moved := _moved_result(eqn, results)) and once[eqn.outvars[0]] == 1:
            results[eqn.outvars[0]] = moved
        if not any(operands):
            return ""
        if name in CALLS:
            inner = called(eqn)
            known = {var: view for var, view in zip(inner.jaxpr.invars, operands, strict=True) if view is not None}
            scope.inner[number], outputs, made = self._walk(inner, known, loops)
            views.update((var, view) for var, view in zip(eqn.outvars, outputs, strict=True) if view is not None)
            results.update((var, use) for var, use in zip(eqn.outvars, made, strict=True) if use and once[var] == 1)
            return ""
        if name not in PARAMETERS:
            return f"is consumed by {name}"
        parameters(eqn)  # raises where the rules below would read an equation that they do not know
        if name == "scan":
            scope.inner[number] = self._scan(scanned(eqn), operands, loops)
        elif (view := _rearranged(eqn, operands)) is not None:
            views[eqn.outvars[0]] = view
        elif (use := _product(eqn, operands, loops, len(self.uses))) is not None:
            self.uses.append(use)
            scope.uses[number] = use
            if once[eqn.outvars[0]] == 1:
                results[eqn.outvars[0]] = use, tuple(range(len(use.shape)))
        elif name == "add" and (use := _bias_of(eqn, operands, results)) is not None:
            bias = next(operand for operand in operands if operand is not None)
            self.biases.setdefault((bias.view if isinstance(bias, Spread) else bias).leaf, []).append(use.index)
        else:
            return f"is consumed by {name}"
        return ""

    def _scan(self, scan: Scan, operands, loops) -> Scope:
        views, depth = {}, len(loops)
        for position, (var, view) in enumerate(zip(scan.body.jaxpr.invars, operands, strict=True)):
            if view is None:
                continue
            if isinstance(view, Spread) or scan.num_consts <= position < scan.num_consts + scan.num_carry:
                self._give_up(view, "is carried by a scan")
            elif position < scan.num_consts:
                views[var] = view
            else:
                sliced = view.rearranged(SLICES, view.shape[1:])
                views[var] = replace(sliced, stacked=view.stacked | {depth})
        scope, outputs, _ = self._walk(scan.body, views, (*loops, scan.length), scan)
        for output in outputs:
            self._give_up(output, "is returned by a scan")
        return scope


def _moved_result(eqn: Any, results: dict[Any, tuple[Use, Shape]]) -> tuple[Use, Shape] | None:
    """A use's result whose axes an equation permutes."""
    if is_literal(eqn.invars[0]) or eqn.invars[0] not in results:
        return None
    use, order = results[eqn.invars[0]]
    return use, tuple(order[axis] for axis in parameters(eqn)["permutation"])


def _rearranged(eqn: Any, operands: list[Any]) -> View | Spread | None:
    """The view an equation makes of a view, or None when it is none."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name in ("mul", "div") and len(operands) == 2:
        return _scaled(eqn, operands)
    view = operands[0]
    if not isinstance(view, View) or any(operand is not None for operand in operands[1:]):
        return None
    if name == "neg":
        return replace(view, scale=-view.scale)
    if name == "convert_element_type":
        return view if is_factored_in(out.dtype) else None
    if name == "transpose":
        return replace(view, order=tuple(view.order[axis] for axis in eqn.params["permutation"]))
    if name == "rev":
        return view.rearranged(tuple(eqn.params["dimensions"]), tuple(out.shape))
    if name in ("squeeze", "copy") or (name == "reshape" and eqn.params["dimensions"] is None):
        return view.rearranged(None, tuple(out.shape))
    if name == "broadcast_in_dim":
        if math.prod(out.shape) == math.prod(view.shape):
            return view.rearranged(None, tuple(out.shape))
        return Spread(view, tuple(out.shape), tuple(eqn.params["broadcast_dimensions"]))
    return None


def _scaled(eqn: Any, operands: list[Any]) -> View | None:
    """A view times a constant, or divided by one."""
    side = 0 if operands[0] is not None else 1
    view, other = operands[side], eqn.invars[1 - side]
    by_division = eqn.primitive.name == "div"
    if not isinstance(view, View) or not is_literal(other) or jnp.ndim(other.val) or (by_division and side == 1):
        return None
    factor = float(other.val)
    scale = view.scale * (1 / factor if by_division and factor else factor)
    return replace(view, scale=scale) if SMALLEST <= abs(scale) <= LARGEST else None


def _product(eqn: Any, operands: list[Any], loops: Shape, index: int) -> Use | None:
    """The use that an equation makes of the one view among its operands, or None."""
    if sum(operand is not None for operand in operands) != 1:
        return None
    side = next(k for k, operand in enumerate(operands) if operand is not None)
    view = operands[side]
    make = {"dot_general": _dot, "conv_general_dilated": _conv, "gather": _lookup}.get(eqn.primitive.name)
    if not isinstance(view, View) or make is None:
        return None
    out = eqn.outvars[0].aval
    if not is_factored_in(out.dtype):
        return None
    common = {
        "index": index, "view": view, "side": side, "shape": tuple(out.shape), "dtype": out.dtype, "loops": loops
    }  # fmt: skip
    return make(eqn, view, side, common)


def _dot(eqn, view, side, common) -> Use:
    (contracted, batched) = eqn.params["dimension_numbers"]
    w_in, x_in = contracted[side], contracted[1 - side]
    w_batch, x_batch = batched[side], batched[1 - side]
    x_shape = eqn.invars[1 - side].aval.shape
    w_free = [axis for axis in range(len(view.shape)) if axis not in (*w_in, *w_batch)]
    x_free = [axis for axis in range(len(x_shape)) if axis not in (*x_in, *x_batch)]
    # In the order of the base's axes, so that equal layouts mean equal places.
    groups = sorted(range(len(w_batch)), key=lambda k: view.order[w_batch[k]])
    inputs = sorted(range(len(w_in)), key=lambda k: view.order[w_in[k]])
    outputs = sorted(range(len(w_free)), key=lambda k: view.order[w_free[k]])
    first_x = len(w_batch) + (0 if side == 1 else len(w_free))
    first_w = len(w_batch) + (len(x_free) if side == 1 else 0)
    return Dot(
        **common,
        layout=(
            tuple(view.order[w_batch[k]] for k in groups),
            tuple(view.order[w_in[k]] for k in inputs),
            tuple(view.order[w_free[k]] for k in outputs),
        ),
        sizes=Sizes(
            math.prod(view.shape[axis] for axis in w_batch),
            math.prod(x_shape[axis] for axis in x_free),
            math.prod(view.shape[axis] for axis in w_in),
            math.prod(view.shape[axis] for axis in w_free),
        ),
        activation_order=(*(x_batch[k] for k in groups), *x_free, *(x_in[k] for k in inputs)),
        cotangent_order=(
            *groups, *(first_x + k for k in range(len(x_free))), *(first_w + k for k in outputs)
        ),
    )  # fmt: skip


def _conv(eqn, view, side, common) -> Use | None:
    if side != 1 or eqn.params["batch_group_count"] != 1:
        return None
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    features, inputs, *kernel = (view.shape[axis] for axis in numbers.rhs_spec)
    out = common["shape"]
    positions = math.prod(out) // features
    return Conv(
        **common,
        layout=("conv", groups, tuple(view.order[axis] for axis in numbers.rhs_spec)),
        sizes=Sizes(groups, positions, inputs * math.prod(kernel), features // groups),
        params=dict(eqn.params),
        kernel=tuple(kernel),
    )


def _lookup(eqn, view, side, common) -> Use | None:
    """Whole rows along one axis, as table[tokens] and jnp.take(table, tokens, axis)."""
    numbers, rank = eqn.params["dimension_numbers"], len(view.shape)
    if side != 0 or len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.collapsed_slice_dims
    whole_rows = tuple(1 if k == axis else size for k, size in enumerate(view.shape))
    if tuple(numbers.start_index_map) != (axis,) or tuple(eqn.params["slice_sizes"]) != whole_rows:
        return None
    if eqn.params["mode"] not in Lookup.MODES:
        return None
    kept = [k for k in range(rank) if k != axis]
    offsets = sorted(range(rank - 1), key=lambda k: view.order[kept[k]])
    places = [k for k in range(len(common["shape"])) if k not in numbers.offset_dims]
    return Lookup(
        **common,
        layout=((), (view.order[axis],), tuple(view.order[kept[k]] for k in offsets)),
        sizes=Sizes(
            1,
            math.prod(common["shape"][k] for k in places),
            view.shape[axis],
            math.prod(view.shape[k] for k in kept),
        ),
        cotangent_order=(*places, *(numbers.offset_dims[k] for k in offsets)),
        mode=eqn.params["mode"],
    )


def _bias_of(eqn: Any, operands: list[Any], results: dict[Any, tuple[Use, Shape]]) -> Use | None:
    """The use to whose result this addition adds a leaf, the same at every position; None when it does not.

    `results` says which variables are results of uses, and how their axes have been permuted since.
    """
    if sum(operand is not None for operand in operands) != 1:
        return None
    side = 0 if operands[0] is not None else 1
    bias, other = operands[side], eqn.invars[1 - side]
    use, order = (None, ()) if hasattr(other, "val") else results.get(other, (None, ()))
    result = tuple(eqn.outvars[0].aval.shape)
    if use is None or isinstance(use, Lookup) or result != tuple(use.shape[axis] for axis in order):
        return None
    view, shape, dims = (
        (bias.view, bias.shape, bias.dims) if isinstance(bias, Spread) else (bias, bias.shape, range(len(bias.shape)))
    )
    # JAX adds a scalar to every entry, and repeats an axis of one.
    fits = not shape or all(size in (1, whole) for size, whole in zip(shape, result, strict=True))
    if view.scale != 1.0 or view.stacked or view.order != tuple(range(len(view.order))) or use.total.groups != 1:
        return None
    wide = [dim for dim, size in zip(dims, view.shape, strict=True) if size > 1]
    if isinstance(use, Conv):
        outputs = [use.params["dimension_numbers"].out_spec[1]]
    else:
        outputs = list(use.cotangent_order[len(use.cotangent_order) - len(use.layout[2]) :])  # pyright: ignore[reportAttributeAccessIssue]
    outputs = [order.index(axis) for axis in outputs if use.shape[axis] > 1]
    same_size = math.prod(view.shape) == use.sizes.outputs
    return use if fits and same_size and wide == outputs else None
