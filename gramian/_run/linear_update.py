"""An optimizer's realized step as a linear map of the gradients: its coefficients frozen at what they were (theory §3).

The step of SGD, momentum, Adam and their kin is linear in the history of gradients once learning rates, clipping
factors, masks and preconditioners are held at their realized values. Which values those are is read off the jaxpr of
the optax transformation: what is added and scaled stays a map of the gradients; what is computed from them in other
ways (second moments, norms, masks) is a coefficient.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from entk.internal import CALLS, CUSTOM_DERIVATIVES, Pinned, bind, called, fingerprint, is_literal, opened

PyTree = Any
ExtraArgs = Callable[[PyTree, Array], dict[str, Any]]
UNARY = ("neg", "convert_element_type", "copy", "reduce_precision", "reshape", "squeeze")


class Kind(IntEnum):
    """How a value of the update depends on the gradients of this step and of those before it."""

    FORCED = 0  # not at all: parameters, counts, schedules
    LINEAR = 1  # linearly, plus something forced
    FROZEN = 2  # in another way: a coefficient


class Value(NamedTuple):
    """A realized value and, where it is linear, what the linear map has in its place."""

    realized: Any
    kind: Kind = Kind.FORCED
    linear: Any = None
    reason: str = ""  # the operation that made it FROZEN


class FrozenUpdate:
    """`tx.update`, and the map of gradients that it leaves when its coefficients are frozen.

    The map takes a gradient and a `history`, the linear values among the optimizer's state (momentum, Adam's first
    moment), and gives an update and the history after it, coordinate by coordinate.

    Args:
      tx: optax transformation.
      params: parameters, or their shapes.
      extra_args: `(params, batch) -> dict`, what `tx.update` takes beside gradients, state and parameters; batch are
        the indices of the step's examples. Whatever it computes is a coefficient.
      batch: indices of a step, or their shape; where there are extra_args.

    Raises:
      TypeError: an optimizer that needs extra arguments, and none are given.
      ValueError: an optimizer whose step is not linear in the gradients, coordinate by coordinate, given its realized
        state: Lion's sign, Muon's orthogonalisation. The message names it and the operation.
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: PyTree, extra_args: ExtraArgs | None = None, batch: Any = None
    ):
        given, tx = tx, optax.with_extra_args_support(tx)
        spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
        state = jax.eval_shape(tx.init, spec)
        self._extra_args = extra_args
        arrays, self._rebuild = _extras_of(extra_args, spec, batch)

        def step(grads, state, params, arrays):
            return tx.update(grads, state, params, **self._rebuild(arrays))

        try:
            closed, out = jax.make_jaxpr(step, return_shape=True)(spec, state, spec, arrays)
        except TypeError as error:
            raise TypeError(
                f"{_names(tx)} cannot be called with gradients, state, parameters and the extra arguments "
                f"{sorted(self._rebuild(arrays))} ({error}). Give what it needs by extra_args(params, batch) -> dict."
            ) from error
        if jax.tree.structure(out[1]) != jax.tree.structure(state):
            raise ValueError(f"{_names(tx)} changes the structure of its state; it cannot be replayed.")
        self._closed = closed
        self._same = given, extra_args, fingerprint(closed), jax.tree.structure(spec), (*jax.tree.leaves(spec), *arrays)
        self._params_tree, self._state_tree = jax.tree.structure(spec), jax.tree.structure(state)
        self._num_params = self._params_tree.num_leaves
        self._state_kinds = [Kind.FORCED] * self._state_tree.num_leaves
        while True:  # a moment is forced at the start, and a map of the gradients from the first step on
            outputs = self._kinds(spec, state, arrays)
            after = outputs[self._num_params :]
            joined = [max(old, new.kind) for old, new in zip(self._state_kinds, after, strict=True)]
            if joined == self._state_kinds:
                break
            self._state_kinds = joined
        refused = [value.reason for value in outputs[: self._num_params] if value.kind == Kind.FROZEN]
        if refused:
            for link in _links(given):  # one that is refused by itself is the one to name
                with contextlib.suppress(TypeError):
                    FrozenUpdate(link, params, extra_args, batch)
            raise ValueError(
                f"{_names(tx)} cannot be analysed: given its realized state, its step is not linear in the gradients "
                f"because of {refused[0]!r}. SGD, momentum, Nesterov, Adam, AdamW, RMSProp, clipping by norm, "
                "schedules and poprisk_gate are supported: use one of them, or train without recording."
            )

    def __eq__(self, other):
        """Of the same transformation for the same parameters: programs compiled for one serve the other."""
        return isinstance(other, FrozenUpdate) and self._same == other._same

    def __hash__(self):
        return hash(self._same)

    @property
    def num_history(self) -> int:
        """Copies of the parameters that the history of one probe takes: 1 for momentum and Adam, 0 for plain SGD."""
        return -(-self._state_kinds.count(Kind.LINEAR) // max(1, self._num_params))

    def init_history(self, state: PyTree, *, forced: bool = False) -> list[Array]:
        """The history at the start: zeros, or with `forced` what the state holds."""
        leaves = jax.tree.leaves(state)
        chosen = [leaf for leaf, kind in zip(leaves, self._state_kinds, strict=True) if kind == Kind.LINEAR]
        return chosen if forced else [jnp.zeros_like(leaf) for leaf in chosen]

    def extras(self, params: PyTree, batch: Any) -> list[Array]:
        """The arrays among the extra arguments of a step, as `__call__` takes them."""
        return _arrays_among(self._extra_args(params, batch)) if self._extra_args else []

    def __call__(
        self,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        linear_grads: PyTree,
        history: list[Array],
        extras: Sequence[Array] = (),
        *,
        forced=False,
    ) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, list[Array]]]:
        """One step: ((updates, state) as realized, (updates, history) of the linear map).

        With `forced`, what does not depend on gradients (weight decay) takes part in the linear map.
        """
        outputs = self._run(grads, state, params, linear_grads, history, extras, forced)
        updates, after = outputs[: self._num_params], outputs[self._num_params :]
        realized = (
            jax.tree.unflatten(self._params_tree, [value.realized for value in updates]),
            jax.tree.unflatten(self._state_tree, [value.realized for value in after]),
        )
        kept = [v for v, kind in zip(after, self._state_kinds, strict=True) if kind == Kind.LINEAR]
        linear = jax.tree.unflatten(self._params_tree, [_linear(value, forced) for value in updates])
        return realized, (linear, [_linear(value, forced) for value in kept])

    def _run(self, grads, state, params, linear_grads, history, extras, forced) -> list[Value]:
        left = iter(history)
        inputs = [
            *(Value(g, Kind.LINEAR, d) for g, d in zip(*map(jax.tree.leaves, (grads, linear_grads)), strict=True)),
            *(
                Value(leaf, kind, next(left) if kind == Kind.LINEAR else None)
                for leaf, kind in zip(jax.tree.leaves(state), self._state_kinds, strict=True)
            ),
            *map(Value, jax.tree.leaves(params)),
            *(Value(one, Kind.FROZEN, reason="an extra argument of update") for one in extras),
        ]
        return _evaluate(*opened(self._closed), inputs, forced)

    def _kinds(self, spec, state, arrays) -> list[Value]:
        found: list[Value] = []

        def run(grads, state, params, arrays):
            found[:] = self._run(grads, state, params, grads, self.init_history(state), arrays, False)

        jax.eval_shape(run, spec, state, spec, arrays)
        return found


def _arrays_among(extras: PyTree) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(extras) if isinstance(leaf, jax.Array)]


def _extras_of(extra_args: ExtraArgs | None, params: PyTree, batch: Any) -> tuple[list[Any], Callable]:
    """Shapes of the arrays among the extra arguments, and what puts arrays in their places; numbers stay numbers."""
    seen: dict[str, Any] = {"extras": {}}

    def call(params, batch):
        seen["extras"] = extra_args(params, batch) if extra_args else {}
        return _arrays_among(seen["extras"])

    arrays = jax.eval_shape(call, params, batch)
    leaves, structure = jax.tree.flatten(seen["extras"])
    numbers = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]

    def rebuild(arrays):
        left = iter(arrays)
        return jax.tree.unflatten(structure, [next(left) if one is None else one for one in numbers])

    return arrays, rebuild


def _evaluate(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value], forced: bool) -> list[Value]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(Value, consts), *inputs], strict=True))

    def read(var):
        return Value(var.val) if is_literal(var) else values[var]

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        name = eqn.primitive.name
        if all(operand.kind != Kind.LINEAR for operand in operands):
            frozen = next((operand for operand in operands if operand.kind == Kind.FROZEN), Value(None))
            results = [
                Value(one, frozen.kind, reason=frozen.reason)
                for one in bind(eqn, [operand.realized for operand in operands])
            ]
        elif name in (*CALLS, *CUSTOM_DERIVATIVES):
            results = _evaluate(*called(eqn), operands, forced)
        elif name == "cond":
            results = _switch(eqn, operands, forced)
        else:
            results = [
                Value(one, Kind.FROZEN, reason=name) for one in bind(eqn, [operand.realized for operand in operands])
            ]
            if _is_linear(eqn, [operand.kind for operand in operands]):
                scales = name in ("mul", "div")  # the other operand is the coefficient, not a summand
                taken = [
                    operand.realized if scales and operand.kind != Kind.LINEAR else _linear(operand, forced)
                    for operand in operands
                ]
                if name == "select_n":
                    taken[0] = operands[0].realized
                (linear,) = bind(eqn, taken)
                results = [Value(results[0].realized, Kind.LINEAR, linear)]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _is_linear(eqn: Any, kinds: list[Kind]) -> bool:
    """Whether an operation on at least one linear value gives one, coordinate by coordinate."""
    name = eqn.primitive.name
    if name in UNARY:
        return jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    if name in ("add", "sub", "add_any"):
        return Kind.FROZEN not in kinds
    if name == "mul":
        return kinds.count(Kind.LINEAR) == 1
    if name == "div":
        return kinds[1] != Kind.LINEAR
    if name == "select_n":
        return kinds[0] != Kind.LINEAR and Kind.FROZEN not in kinds[1:]
    return name == "integer_pow" and eqn.params["y"] == 1


def _linear(value: Value, forced: bool) -> Any:
    """What the linear map has in place of a value that is not frozen."""
    if value.kind == Kind.LINEAR:
        return value.linear
    return value.realized if forced else jnp.zeros_like(value.realized)


def _switch(eqn: Any, operands: list[Value], forced: bool) -> list[Value]:
    """A branch that the realized values choose."""
    index, *rest = operands
    kinds: list[list[Value]] = []

    def run(branch, values):
        results = _evaluate(*opened(branch), values, forced)
        kinds.append(results)
        return results

    arrays = [(value.realized, value.linear) for value in rest]
    rebuild = [(value.kind, value.reason) for value in rest]

    def values_of(arrays):
        return [
            Value(realized, kind, linear, reason)
            for (realized, linear), (kind, reason) in zip(arrays, rebuild, strict=True)
        ]

    for branch in eqn.params["branches"]:
        jax.eval_shape(lambda arrays, branch=branch: [v.realized for v in run(branch, values_of(arrays))], arrays)
    joined = [max(column, key=lambda value: value.kind) for column in zip(*kinds, strict=True)]

    def taken(branch):
        def of(arrays):
            results = _evaluate(*opened(branch), values_of(arrays), forced)
            return [
                (value.realized, _linear(value, forced) if kind.kind == Kind.LINEAR else None)
                for value, kind in zip(results, joined, strict=True)
            ]

        return of

    results = lax.switch(index.realized, [taken(branch) for branch in eqn.params["branches"]], arrays)
    return [
        Value(realized, kind.kind, linear, kind.reason)
        for (realized, linear), kind in zip(results, joined, strict=True)
    ]


def _links(tx: Any) -> list[optax.GradientTransformation]:
    """The transformations that a chain, a named chain or a partition holds in its functions; none for anything else."""
    held: dict[str, Any] = {}
    for function in (tx.init, tx.update):
        function = function.function if isinstance(function, Pinned) else function
        if inspect.isfunction(function):
            held |= inspect.getclosurevars(function).nonlocals
    inits, updates, parts = held.get("init_fns", ()), held.get("update_fns", ()), held.get("transforms", ())
    if inits and updates:
        return [optax.GradientTransformation(*pair) for pair in zip(inits, updates, strict=True)]
    links = parts.values() if isinstance(parts, dict) else [one[-1] for one in parts if isinstance(one, tuple)]
    return [link for link in links if hasattr(link, "update")]


def _names(tx: Any) -> str:
    """The names of the transformations in a chain, as far as their functions tell."""
    found: list[str] = []

    def visit(function, depth):
        function = function.function if isinstance(function, Pinned) else function
        name, contents = getattr(function, "__qualname__", ""), []
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                contents.append(cell.cell_contents)
        for content in contents:
            for item in content if isinstance(content, (tuple, list)) else (content,):
                item = getattr(item, "update", item)
                if callable(item) and hasattr(item, "__closure__") and depth < 6:
                    visit(item, depth + 1)
        link = name.split(".")[0]
        if "update" in name and link not in {"chain", "with_extra_args_support", "named_chain", *found}:
            found.append(link)

    visit(tx.update, 0)
    return ", ".join(found) or "This optimizer"
