"""The products a parameter takes part in, and how their operands and cotangents are laid out to be contracted.

A product y = W x is worth knowing because its part of the Jacobian factors: the derivative of an output in W is the
outer product of the output's cotangent at y with x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Shape = tuple[int, ...]
SLICES = "slices"  # one slice along the first axis for every iteration of a scan


def is_factored_in(dtype: jnp.dtype) -> bool:
    """Whether products of this dtype are factored: shorter floats do not promote, and complex ones have two parts."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def _promoted(x: Array, dtype: jnp.dtype) -> Array:
    """What a product made of an operand that is not floating itself: bytes of an image, counts, masks."""
    return x if is_factored_in(x.dtype) else x.astype(dtype)


@dataclass(frozen=True)
class View:
    """A parameter leaf, rearranged: an isometry of the leaf, times `scale`.

    Attributes:
      leaf: index of the parameter leaf.
      steps: what happened to it beside permutations of axes, as (order before, what, shape after): None for a reshape,
        the axes of a reversal, or SLICES. Two views with equal steps have the same entries in the same places of their
        base.
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
        return replace(self, steps=(*self.steps, (self.order, step, shape)), base=shape, order=tuple(range(len(shape))))

    def apply(self, leaf: Array, last: Callable[[Array], Array]) -> Array:
        """`last` of the base that the steps make of a leaf; of every slice where scans take it apart."""

        def run(array, steps):
            if not steps:
                return last(array)
            (order, step, shape), *rest = steps
            array = array.transpose(order)
            if step == SLICES:
                return jax.vmap(lambda one: run(one, rest))(array)
            return run(lax.rev(array, step) if isinstance(step, tuple) else array.reshape(shape), rest)

        return run(leaf, self.steps)


@dataclass(frozen=True)
class Spread:
    """A leaf broadcast to `shape`, axis k of the view to axis dims[k]: what a bias is before it is added."""

    view: View
    shape: Shape
    dims: Shape


class Sizes(NamedTuple):
    """Of a product: y has shape (groups, positions, outputs), its weight (groups, inputs, outputs)."""

    groups: int
    positions: int
    inputs: int
    outputs: int


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
      sizes: within one iteration.
    """

    index: int
    view: View
    side: int
    shape: Shape
    dtype: jnp.dtype
    loops: Shape
    layout: tuple[Any, ...]
    sizes: Sizes

    def activation(self, operands: list[Array]) -> Array:
        raise AssertionError("a use is a Dot, a Conv or a Lookup")

    def cotangent(self, delta: Array) -> Array:
        raise AssertionError("a use is a Dot, a Conv or a Lookup")

    def weight(self, base: Array) -> Array:
        """The view's base as (groups, inputs, outputs)."""
        raise AssertionError("a use is a Dot, a Conv or a Lookup")

    def to_leaf(self, weights: Array, leaf: Array) -> Array:
        """An array over (all groups, inputs, outputs) in the places that the leaf's entries have; not scaled."""

        def arranged(leaf):
            return self.view.apply(leaf, self.weight).reshape(weights.shape)

        (placed,) = jax.linear_transpose(arranged, jax.ShapeDtypeStruct(leaf.shape, weights.dtype))(weights)
        return placed

    @property
    def total(self) -> Sizes:
        """Of one example, scans included."""
        groups, positions, inputs, outputs = self.sizes
        for depth, length in enumerate(self.loops):
            if depth in self.view.stacked:
                groups *= length
            else:
                positions *= length
        return Sizes(groups, positions, inputs, outputs)

    def merge_loops(self, array: Array, lead: int, tail: int) -> Array:
        """(lead axes, *loops, groups, positions, tail axes) → (lead axes, all groups, all positions, tail axes)."""
        depth = len(self.loops)
        outer = [lead + k for k in range(depth) if k in self.view.stacked]
        inner = [lead + k for k in range(depth) if k not in self.view.stacked]
        first = lead + depth
        order = [*range(lead), *outer, first, *inner, *range(first + 1, first + 2 + tail)]
        groups, positions, *_ = self.total
        shape = (*array.shape[:lead], groups, positions, *array.shape[first + 2 :])
        return array.transpose(order).reshape(shape)


@dataclass(frozen=True)
class Dot(Use):
    """dot_general: batch axes are groups, free axes of the activation positions, contracted axes inputs."""

    activation_order: Shape = ()
    cotangent_order: Shape = ()

    def activation(self, operands):
        groups, positions, inputs, _ = self.sizes
        x = _promoted(operands[1 - self.side], self.dtype)
        return x.transpose(self.activation_order).reshape(groups, positions, inputs)

    def cotangent(self, delta):
        return _arranged(delta, self)

    def weight(self, base):
        groups, _, inputs, outputs = self.sizes
        return base.transpose([axis for role in self.layout for axis in role]).reshape(groups, inputs, outputs)


def _arranged(delta: Array, use: Dot | Lookup) -> Array:
    lead = delta.ndim - len(use.shape)
    groups, positions, _, outputs = use.sizes
    order = [*range(lead), *(lead + axis for axis in use.cotangent_order)]
    return delta.transpose(order).reshape(*delta.shape[:lead], groups, positions, outputs)


@dataclass(frozen=True)
class Conv(Use):
    """conv_general_dilated: patches of the input are the activation, output pixels the positions."""

    params: dict[str, Any] = field(default_factory=dict, compare=False)
    kernel: Shape = ()

    def activation(self, operands):
        groups, positions, inputs, _ = self.sizes
        batch, features, *space = self.params["dimension_numbers"].lhs_spec
        x = _promoted(operands[0], self.dtype).transpose([batch, *space, features])
        inner = [step - 1 for step in self.params["lhs_dilation"]]
        pads = [(low, high, step) for (low, high), step in zip(self.params["padding"], inner, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
        strides, dilation = self.params["window_strides"], self.params["rhs_dilation"]
        pixels = [self.shape[axis] for axis in self.params["dimension_numbers"].out_spec[2:]]
        patches = []
        for offset in _grid(self.kernel):
            start = [at * step for at, step in zip(offset, dilation, strict=True)]
            stop = [at + (count - 1) * stride + 1 for at, count, stride in zip(start, pixels, strides, strict=True)]
            patches.append(lax.slice(x, [0, *start, 0], [x.shape[0], *stop, x.shape[-1]], [1, *strides, 1]))
        stacked = jnp.stack(patches, axis=-2).reshape(positions, len(patches), groups, -1)
        return jnp.moveaxis(stacked, 2, 0).reshape(groups, positions, inputs)

    def cotangent(self, delta):
        lead = delta.ndim - len(self.shape)
        groups, positions, _, outputs = self.sizes
        batch, features, *space = self.params["dimension_numbers"].out_spec
        delta = delta.transpose([*range(lead), *(lead + axis for axis in (batch, *space, features))])
        return jnp.moveaxis(delta.reshape(*delta.shape[:lead], positions, groups, outputs), -2, lead)

    def weight(self, base):
        groups, _, inputs, outputs = self.sizes
        features, channels, *space = self.layout[2]
        filters = base.transpose([features, *space, channels]).reshape(groups, outputs, inputs)
        return jnp.swapaxes(filters, -1, -2)


@dataclass(frozen=True)
class Lookup(Use):
    """Rows of a table taken by index: the activation is one-hot and kept as its index, -1 for none of the rows.

    An index outside the table is moved to its nearest row by CLIP, and has no derivative in the other modes.
    """

    CLIP: ClassVar[Any] = lax.GatherScatterMode.CLIP
    MODES: ClassVar[tuple[Any, ...]] = (
        CLIP, lax.GatherScatterMode.FILL_OR_DROP, lax.GatherScatterMode.PROMISE_IN_BOUNDS
    )  # fmt: skip

    cotangent_order: Shape = ()
    mode: Any = None

    def activation(self, operands):
        index = operands[1].reshape(1, -1)
        # In the index's own dtype, which may not reach the last row, or even be able to say how many there are.
        last = min(self.sizes.inputs - 1, int(jnp.iinfo(index.dtype).max))
        inside = jnp.clip(index, 0, last)
        taken = inside.astype(jnp.int32)
        return taken if self.mode == self.CLIP else jnp.where(index == inside, taken, -1)

    def cotangent(self, delta):
        return _arranged(delta, self)

    def weight(self, base):
        order = [axis for role in self.layout for axis in role]
        return base.transpose(order).reshape(1, self.sizes.inputs, self.sizes.outputs)


def _grid(shape: Shape) -> list[Shape]:
    """All indices of an array of this shape, the last axis fastest."""
    grid: list[Shape] = [()]
    for size in shape:
        grid = [(*index, k) for index in grid for k in range(size)]
    return grid
