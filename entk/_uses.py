"""Where a model uses its parameters: the products that consume each one, found in the jaxpr of one example.

A product y = W x is worth finding because its part of the Jacobian factors: the derivative of an output in W is the
outer product of the output's cotangent at y with x. Parameters are followed through what only rearranges them
(reshape, transpose, cast, scaling by a constant) and into nested jit, remat and scan. Everything else that takes a
parameter makes it `opaque`, with the reason; such a parameter is differentiated by autodiff.

Source: jaxprs are read as in JAX's documentation, "Writing custom Jaxpr interpreters".
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Shape = tuple[int, ...]
SAME_ENTRIES = ("reshape", "squeeze", "rev", "copy")  # the same entries in another shape or order
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


@dataclass(frozen=True)
class View:
    """A parameter leaf, rearranged: an isometry of the leaf, times `scale`.

    Attributes:
      leaf: index of the parameter leaf.
      steps: what happened to it, as far as it is not a permutation of axes; two views with equal steps have the same
        entries in the same places of their base.
      base: shape after `steps`.
      order: axis k of the view is axis order[k] of the base.
      stacked: depths of the scans that take it apart along its first axis, one slice an iteration.
      scale: constant it is multiplied by.
    """

    leaf: int
    steps: tuple[Any, ...]
    base: Shape
    order: Shape
    stacked: frozenset[int] = frozenset()
    scale: float = 1.0

    @property
    def shape(self) -> Shape:
        return tuple(self.base[axis] for axis in self.order)

    def rearranged(self, step: Any, shape: Shape) -> View:
        return replace(self, steps=(*self.steps, (self.order, step)), base=shape, order=tuple(range(len(shape))))


@dataclass(frozen=True)
class Spread:
    """A leaf broadcast to `shape`, axis k of the view to axis dims[k]: what a bias is before it is added."""

    view: View
    shape: Shape
    dims: Shape


@dataclass(frozen=True)
class Use:
    """One product that consumes a parameter, y = A-side ⊗ W; see `Dot`, `Conv`, `Lookup` for the layouts.

    Per example and iteration of the scans around it, `activation(operands)` has shape (groups, positions, inputs) and
    `cotangent(delta)` turns the cotangent of y, with any leading axes, into (..., groups, positions, outputs).

    Attributes:
      index: number of this use in the model.
      view: the parameter as the product sees it.
      side: which operand is the parameter.
      shape, dtype: of y.
      loops: lengths of the scans around it, outermost first.
      layout: how the axes of the view's base are divided; uses of equal steps and layout differ in positions only.
      sizes: (groups, positions, inputs, outputs) within one iteration.
    """

    index: int
    view: View
    side: int
    shape: Shape
    dtype: jnp.dtype
    loops: Shape
    layout: tuple[Any, ...]
    sizes: tuple[int, int, int, int]

    def activation(self, operands: list[Array]) -> Array:
        raise AssertionError("a use is a Dot, a Conv or a Lookup")

    def cotangent(self, delta: Array) -> Array:
        raise AssertionError("a use is a Dot, a Conv or a Lookup")

    @property
    def total(self) -> tuple[int, int, int, int]:
        """(groups, positions, inputs, outputs) of one example, scans included."""
        groups, positions, inputs, outputs = self.sizes
        for depth, length in enumerate(self.loops):
            if depth in self.view.stacked:
                groups *= length
            else:
                positions *= length
        return groups, positions, inputs, outputs

    def merge_loops(self, array: Array, lead: int, tail: int) -> Array:
        """(lead axes, *loops, groups, positions, tail axes) → (lead axes, all groups, all positions, tail axes)."""
        depth = len(self.loops)
        outer = [lead + k for k in range(depth) if k in self.view.stacked]
        inner = [lead + k for k in range(depth) if k not in self.view.stacked]
        first = lead + depth
        order = [*range(lead), *outer, first, *inner, *range(first + 1, first + 2 + tail)]
        groups, positions = self.total[:2]
        shape = (*array.shape[:lead], groups, positions, *array.shape[first + 2 :])
        return array.transpose(order).reshape(shape)


@dataclass(frozen=True)
class Dot(Use):
    """dot_general: batch axes are groups, free axes of the activation positions, contracted axes inputs."""

    activation_order: Shape = ()
    cotangent_order: Shape = ()

    def activation(self, operands):
        groups, positions, inputs, _ = self.sizes
        return operands[1 - self.side].transpose(self.activation_order).reshape(groups, positions, inputs)

    def cotangent(self, delta):
        lead = delta.ndim - len(self.shape)
        groups, positions, _, outputs = self.sizes
        order = [*range(lead), *(lead + axis for axis in self.cotangent_order)]
        return delta.transpose(order).reshape(*delta.shape[:lead], groups, positions, outputs)


@dataclass(frozen=True)
class Conv(Use):
    """conv_general_dilated: patches of the input are the activation, output pixels the positions."""

    params: dict[str, Any] = field(default_factory=dict, compare=False)
    kernel: Shape = ()

    def activation(self, operands):
        groups, positions, inputs, _ = self.sizes
        numbers = self.params["dimension_numbers"]
        x = operands[0].transpose(numbers.lhs_spec)  # (batch, features, *space)
        pads = [(0, 0, 0), (0, 0, 0)]
        pads += [
            (*pad, step - 1) for pad, step in zip(self.params["padding"], self.params["lhs_dilation"], strict=True)
        ]
        x = lax.pad(x, jnp.zeros((), x.dtype), pads)
        strides, dilation = self.params["window_strides"], self.params["rhs_dilation"]
        pixels = tuple(self.shape[axis] for axis in numbers.out_spec[2:])
        patches = []
        for offset in _grid(self.kernel):
            start = [at * step for at, step in zip(offset, dilation, strict=True)]
            stop = [at + (count - 1) * stride + 1 for at, count, stride in zip(start, pixels, strides, strict=True)]
            patches.append(lax.slice(x, [0, 0, *start], [*x.shape[:2], *stop], [1, 1, *strides]))
        stacked = jnp.stack(patches, axis=2)  # (batch, features, offsets, *pixels)
        stacked = stacked.reshape(x.shape[0], groups, inputs, -1)  # features of a group, then offsets
        return stacked.transpose(1, 0, 3, 2).reshape(groups, positions, inputs)

    def cotangent(self, delta):
        lead = delta.ndim - len(self.shape)
        groups, positions, _, outputs = self.sizes
        batch, features, *space = self.params["dimension_numbers"].out_spec
        delta = delta.transpose([*range(lead), *(lead + axis for axis in (features, batch, *space))])
        delta = delta.reshape(*delta.shape[:lead], groups, outputs, positions)
        return jnp.swapaxes(delta, -1, -2)


@dataclass(frozen=True)
class Lookup(Use):
    """Rows of a table taken by index: the activation is one-hot and kept as its index, -1 for none of the rows."""

    mode: Any = None

    def activation(self, operands):
        rows = self.sizes[2]
        index = operands[1].reshape(1, -1)
        if self.mode == lax.GatherScatterMode.FILL_OR_DROP:
            return jnp.where((index >= 0) & (index < rows), index, -1).astype(jnp.int32)
        return jnp.clip(index, 0, rows - 1).astype(jnp.int32)

    def cotangent(self, delta):
        lead = delta.ndim - len(self.shape)
        groups, positions, _, outputs = self.sizes
        return delta.reshape(*delta.shape[:lead], groups, positions, outputs)


@dataclass
class Scope:
    """What was found in one jaxpr: uses and nested scopes by the number of their equation."""

    jaxpr: Any
    consts: list[Any]
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
        for leaf, var in enumerate(closed.jaxpr.invars[:num_leaves]):
            shape = tuple(var.aval.shape)
            views[var] = View(leaf, (), shape, tuple(range(len(shape))))
        self.scope, outputs, _ = self._walk(closed.jaxpr, closed.consts, views, ())
        for output in outputs:
            self._give_up(output, "is an output itself")

    def _give_up(self, value: View | Spread | None, reason: str) -> None:
        if value is not None:
            self.opaque.setdefault((value.view if isinstance(value, Spread) else value).leaf, reason)

    def _walk(self, jaxpr, consts, views, loops) -> tuple[Scope, list[Any], list[Any]]:
        """Annotates one jaxpr; `views` says what its variables are. Returns which outputs are views or uses' results.

        A use's result counts as such while nothing else reads it: a bias added to it then has the same cotangent.
        """
        scope, results = Scope(jaxpr, consts), {}
        operands_read = [var for eqn in jaxpr.eqns for var in eqn.invars] + list(jaxpr.outvars)
        once = Counter(var for var in operands_read if not hasattr(var, "val"))
        for number, eqn in enumerate(jaxpr.eqns):
            operands = [None if hasattr(var, "val") else views.get(var) for var in eqn.invars]
            if not any(operands):
                continue
            name = eqn.primitive.name
            if name in INLINED:
                inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
                inner, inner_consts = getattr(inner, "jaxpr", inner), list(getattr(inner, "consts", []))
                known = {var: view for var, view in zip(inner.invars, operands, strict=True) if view is not None}
                scope.inner[number], outputs, made = self._walk(inner, inner_consts, known, loops)
                views.update((var, view) for var, view in zip(eqn.outvars, outputs, strict=True) if view is not None)
                results.update((var, use) for var, use in zip(eqn.outvars, made, strict=True) if use and once[var] == 1)
            elif name == "scan":
                scope.inner[number] = self._scan(eqn, operands, loops)
            elif (view := _rearranged(eqn, operands)) is not None:
                views[eqn.outvars[0]] = view
            elif (use := _product(eqn, operands, loops, len(self.uses))) is not None:
                self.uses.append(use)
                scope.uses[number] = use
                if once[eqn.outvars[0]] == 1:
                    results[eqn.outvars[0]] = use
            elif name == "add" and (use := _bias_of(eqn, operands, results)) is not None:
                bias = next(operand for operand in operands if operand is not None)
                self.biases.setdefault((bias.view if isinstance(bias, Spread) else bias).leaf, []).append(use.index)
            else:
                for operand in operands:
                    self._give_up(operand, f"is consumed by {name}")
        outputs = [None if hasattr(var, "val") else var for var in jaxpr.outvars]
        return scope, [views.get(var) for var in outputs], [results.get(var) for var in outputs]

    def _scan(self, eqn, operands, loops) -> Scope:
        closed, depth = eqn.params["jaxpr"], len(loops)
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        views = {}
        for position, (var, view) in enumerate(zip(closed.jaxpr.invars, operands, strict=True)):
            if view is None:
                continue
            if isinstance(view, Spread) or num_consts <= position < num_consts + num_carry:
                self._give_up(view, "is carried by a scan")
            elif position < num_consts:
                views[var] = view
            else:
                sliced = view.rearranged("slices", view.shape[1:])
                views[var] = replace(sliced, stacked=view.stacked | {depth})
        scope, outputs, _ = self._walk(closed.jaxpr, list(closed.consts), views, (*loops, eqn.params["length"]))
        for output in outputs:
            self._give_up(output, "is returned by a scan")
        return scope


def _rearranged(eqn: Any, operands: list[Any]) -> View | Spread | None:
    """The view an equation makes of a view, or None when it is none."""
    name, view = eqn.primitive.name, operands[0]
    out = eqn.outvars[0].aval
    if name in ("mul", "div") and len(operands) == 2:
        side = 0 if operands[0] is not None else 1
        view, other = operands[side], eqn.invars[1 - side]
        constant = getattr(other, "val", None)
        if not isinstance(view, View) or constant is None or jnp.ndim(constant) or (name == "div" and side == 1):
            return None
        factor = float(constant)
        return replace(view, scale=view.scale * (factor if name == "mul" else 1 / factor))
    if not isinstance(view, View) or any(operand is not None for operand in operands[1:]):
        return None
    if name == "neg":
        return replace(view, scale=-view.scale)
    if name == "convert_element_type" and jnp.issubdtype(out.dtype, jnp.floating):
        return view
    if name == "transpose":
        return replace(view, order=tuple(view.order[axis] for axis in eqn.params["permutation"]))
    if name in SAME_ENTRIES and math.prod(out.shape) == math.prod(view.shape):
        return view.rearranged((name, eqn.params.get("dimensions")), tuple(out.shape))
    if name == "broadcast_in_dim":
        if math.prod(out.shape) == math.prod(view.shape):
            return view.rearranged("reshape", tuple(out.shape))
        return Spread(view, tuple(out.shape), tuple(eqn.params["broadcast_dimensions"]))
    return None


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
        sizes=(
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
        sizes=(groups, positions, inputs * math.prod(kernel), features // groups),
        params=dict(eqn.params),
        kernel=tuple(kernel),
    )


def _lookup(eqn, view, side, common) -> Use | None:
    """Only whole rows along the first axis, the rows' axes last in the result: table[tokens]."""
    numbers = eqn.params["dimension_numbers"]
    rank, out_rank = len(view.shape), len(common["shape"])
    rows_last = tuple(range(out_rank - rank + 1, out_rank))
    whole_rows = (
        side == 0
        and tuple(eqn.params["slice_sizes"]) == (1, *view.shape[1:])
        and tuple(numbers.offset_dims) == rows_last
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
    )
    if not whole_rows or view.order != tuple(range(rank)):
        return None
    outputs = math.prod(view.shape[1:])
    positions = math.prod(common["shape"]) // max(outputs, 1)
    return Lookup(
        **common,
        layout=((), (0,), tuple(range(1, rank))),
        sizes=(1, positions, view.shape[0], outputs),
        mode=eqn.params["mode"],
    )


def _bias_of(eqn: Any, operands: list[Any], results: dict[Any, Use]) -> Use | None:
    """The use to whose result this addition adds a leaf, the same at every position; None when it does not."""
    if sum(operand is not None for operand in operands) != 1:
        return None
    side = 0 if operands[0] is not None else 1
    bias, other = operands[side], eqn.invars[1 - side]
    use = None if hasattr(other, "val") else results.get(other)
    if use is None or isinstance(use, Lookup) or tuple(eqn.outvars[0].aval.shape) != use.shape:
        return None
    view, shape, dims = (
        (bias.view, bias.shape, bias.dims) if isinstance(bias, Spread) else (bias, bias.shape, range(len(bias.shape)))
    )
    fits = all(size in (1, whole) for size, whole in zip(shape, use.shape, strict=True))
    if view.scale != 1.0 or view.stacked or view.order != tuple(range(len(view.order))) or use.sizes[0] != 1:
        return None
    wide = [dim for dim, size in zip(dims, view.shape, strict=True) if size > 1]
    if isinstance(use, Conv):
        outputs = [use.params["dimension_numbers"].out_spec[1]]
    else:
        outputs = list(use.cotangent_order[len(use.cotangent_order) - len(use.layout[2]) :])  # pyright: ignore[reportAttributeAccessIssue]
    outputs = [axis for axis in outputs if use.shape[axis] > 1]
    same_size = math.prod(view.shape) == use.sizes[3]
    return use if fits and same_size and wide == outputs else None


def _grid(shape: Shape) -> list[Shape]:
    """All indices of an array of this shape, the last axis fastest."""
    grid: list[Shape] = [()]
    for size in shape:
        grid = [(*index, k) for index in grid for k in range(size)]
    return grid


def find_uses(function: Any, leaves: list[Any], x_i: Any) -> Uses:
    """Traces `function(leaves, x_i)` and finds every use of the leaves."""
    return Uses(jax.make_jaxpr(function)(leaves, x_i), len(leaves))
