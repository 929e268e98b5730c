"""A user's function as it is now: what it closes over may change between two calls, and a program compiled before knows
nothing of that.

`jax.jit` compares static functions by identity. A model that reads a dictionary of batch statistics, a flag, an
attribute of an object or a NumPy array is the same function after these have changed, and the old program, with the old
values in it, would be used again. So every entry traces the function afresh, which compiles nothing, and hands on a
`Pinned` function: equal to an earlier one only if both trace to the same program with the same constants.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from entk._parameters import differentiable

COMPARED_BYTES = 2**26  # of two arrays that are not one object; larger ones count as different
# Of where a trace is made and where its arrays are to be, which no value depends on; `policy` is what remat keeps.
PLACES = {
    "ctx_mesh",
    "sharding",
    "out_sharding",
    "in_shardings",
    "out_shardings",
    "in_layouts",
    "out_layouts",
    "policy",
}
PLAIN = (bool, int, str, tuple, type(None))  # what a primitive with custom rules has beside its rules and its jaxpr
JAX_FOLDER = os.path.dirname(jax.__file__)


class Pinned:
    """A function and its fingerprint, hashable: the static argument of every jitted function that calls it.

    Attributes:
      function: the user's function.
      is_traced: it closes over values of a trace under way. It is then equal to nothing but itself.
    """

    def __init__(self, function: Callable, trace: Callable[[], tuple], of: Hashable):
        self.function = self.__wrapped__ = function
        self.__name__ = _name(function)
        self._trace = trace
        self._is_held = False
        self._key, self.is_traced = trace()
        self._of = of
        self._hash = hash((of, self._key))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function; one that is kept is called when a new program is traced, and must be what it was."""
        if self._is_held and not self.is_traced and not self._is_unchanged():
            raise RuntimeError(
                f"{self.__name__} has changed since it was handed over: what it closes over (a flag, statistics, an "
                "attribute, an array) is not what it was, and a program that is needed now has not been compiled "
                "before. Make the operator, flow or recording anew."
            )
        return self.function(*args, **kwargs)

    def held(self) -> Pinned:
        """For objects that outlive the call: the same function, which refuses to be traced once it has changed."""
        if self._is_held:
            return self
        kept = object.__new__(Pinned)
        kept.__dict__.update(self.__dict__, _is_held=True)
        return kept

    def _is_unchanged(self) -> bool:
        now = self._trace()[0]
        # A function that never traces to the same program twice, a new callback each time, cannot be compared.
        return now == self._key or now != self._trace()[0]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Pinned) or self._hash != other._hash:
            return False
        return self._of == other._of and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Pinned({_name(self.function)})"


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


def pullback(function: Callable) -> Callable:
    """The derivative that kernels take, for `pin`: rules of `jax.custom_vjp` and `jax.custom_jvp` show in it."""

    def pulled(*args):
        leaves, rebuild = differentiable(args)
        out, pull = jax.vjp(lambda leaves: function(*rebuild(leaves)), leaves)
        return pull(jax.tree.map(jnp.ones_like, out))

    return pulled


def pin(
    function: Callable,
    *arguments: tuple,
    of: Hashable = None,
    by: Callable[[Callable], Callable] = lambda function: function,
    derived: Callable[[Callable], Callable] | None = pullback,
) -> Pinned:
    """The function as it is now.

    Args:
      function: hashable, pure apart from what it reads when it is traced. What JAX itself keeps by the identity of a
        function inside of it stays as JAX has it: programs of `jax.jit`, bodies of loops defined outside.
      *arguments: sets of arguments, arrays or their shapes and dtypes, to trace it with.
      of: what stands for the function in comparisons; itself where none is given.
      by: from the function to the one that takes these arguments, by position.
      derived: its derivative, traced only where the function has custom rules that are not JAX's own; None for a
        function that is not differentiated.

    Returns:
      A `Pinned` function; one that is pinned already, as it is.

    Cost: one trace for each set of arguments, and one of the derivative.

    Example:
      >>> import jax.numpy as jnp
      >>> settings = {"scale": 2.0}
      >>> def model(w, x):
      ...     return settings["scale"] * (x @ w)
      >>> before, same = (pin(model, (jnp.ones(3), jnp.ones((1, 3)))) for _ in range(2))
      >>> settings["scale"] = 3.0
      >>> after = pin(model, (jnp.ones(3), jnp.ones((1, 3))))
      >>> before == same, before == after
      (True, False)
    """
    if isinstance(function, Pinned):
        return function
    specs = jax.tree.map(spec_of, arguments)
    return Pinned(function, lambda: _fingerprint(by(function), specs, derived), function if of is None else of)


def spec_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf; its sharding only where it is part of its type."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    kind = jax.typeof(leaf)
    sharding = getattr(kind, "sharding", None)
    is_explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return jax.ShapeDtypeStruct(
        kind.shape, kind.dtype, sharding=sharding if is_explicit else None, weak_type=getattr(kind, "weak_type", False)
    )


def is_at_hand(leaf: Any) -> bool:
    """Whether this process can read the values now."""
    if not isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.ShapeDtypeStruct)
    try:
        return leaf.is_fully_addressable
    except jax.errors.ConcretizationTypeError:  # traced
        return False


def _is_traced(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return False
    try:
        return leaf.is_fully_addressable is None
    except jax.errors.ConcretizationTypeError:
        return True


# ------------------------------------------------------------------------------------------------------- fingerprints


def _fingerprint(function: Callable, arguments: tuple, derived: Callable | None) -> tuple[tuple, bool]:
    """What a function traces to, as a hashable value; whether it closes over traced values."""
    walk, keys = _Walk(), []
    with jax.default_matmul_precision("highest"):  # whatever the caller's is: it is no part of the function
        for args in arguments:
            # A new function each time: JAX keeps what it has traced by the identity of the function.
            keys.append(walk.closed(jax.make_jaxpr(lambda *args: function(*args))(*args)))
        if walk.has_custom_rules and derived is not None:
            try:
                for args in arguments:
                    keys.append(walk.closed(jax.make_jaxpr(derived(lambda *args: function(*args)))(*args)))
            except Exception:  # of whatever kind: it cannot be differentiated, and what needs the derivative says so
                keys.append(_Same(object()))
    return tuple(keys), walk.is_traced


def fingerprint(closed: Any) -> tuple:
    """A jaxpr and its constants as a hashable value: equal ones are the same program."""
    return _Walk().closed(closed)


class _Walk:
    """From jaxprs to hashable values: variables by their order, literals and constants by their values."""

    def __init__(self):
        self.has_custom_rules = False
        self.is_traced = False

    def closed(self, closed: Any) -> tuple:
        return self.jaxpr(closed.jaxpr), tuple(map(self.constant, closed.consts))

    def jaxpr(self, jaxpr: Any) -> tuple:
        numbers: dict[Any, int] = {}

        def read(var):
            if hasattr(var, "val"):
                return _kind(var.aval), self.constant(var.val)
            return numbers.setdefault(var, len(numbers))

        inputs = tuple((read(var), _kind(var.aval)) for var in (*jaxpr.constvars, *jaxpr.invars))
        equations = tuple(
            (eqn.primitive, tuple(map(read, eqn.invars)), tuple(map(read, eqn.outvars)), tuple(self.params(eqn)))
            for eqn in jaxpr.eqns
        )
        return inputs, equations, tuple(map(read, jaxpr.outvars))

    def params(self, eqn: Any) -> Iterator[tuple[str, Hashable]]:
        is_custom = eqn.primitive.name.startswith("custom_")
        for name, value in eqn.params.items():
            # Rules are new objects in every trace. Those of JAX's own functions do not change; others show when the
            # derivative is traced.
            if is_custom and not isinstance(value, PLAIN) and not hasattr(value, "jaxpr"):
                self.has_custom_rules |= not _is_of_jax(eqn.params.get("call_jaxpr"))
            elif name not in PLACES:
                yield name, self.value(value)

    def value(self, value: Any) -> Hashable:
        if hasattr(value, "jaxpr") and hasattr(value, "consts"):
            return self.closed(value)
        if hasattr(value, "eqns"):
            return self.jaxpr(value)
        if type(value) in (tuple, list):
            return tuple(map(self.value, value))
        if isinstance(value, dict):
            return tuple((name, self.value(one)) for name, one in value.items())
        if isinstance(value, (jax.Array, np.ndarray)):
            return self.constant(value)
        if type(value) is float:
            return value.hex()  # 0.0 equals -0.0, and NaN not itself
        try:
            hash(value)
        except TypeError:
            return _Same(value)
        return value

    def constant(self, value: Any) -> Hashable:
        if _is_traced(value):
            self.is_traced = True
            return _Same(object())
        if isinstance(value, jax.Array):
            return _Constant(value)
        array = np.asarray(value)
        # By contents, as they may be changed in place.
        contents = array.tobytes() if array.nbytes <= 64 else hashlib.sha256(array.tobytes()).digest()
        return array.shape, str(array.dtype), contents


def _kind(aval: Any) -> Hashable:
    """Shape and dtype of a variable; its sharding depends on where the trace is made."""
    if hasattr(aval, "shape") and hasattr(aval, "dtype"):
        return aval.shape, aval.dtype, getattr(aval, "weak_type", False)
    return aval


def _is_of_jax(closed: Any) -> bool:
    """Whether a function with custom rules is defined in JAX; what the trace knows of its place may be gone one day."""
    info = getattr(getattr(closed, "jaxpr", None), "debug_info", None)
    return JAX_FOLDER in str(getattr(info, "func_src_info", ""))


class _Same:
    """An object that is equal to itself alone, and is kept, so that its identity is not given to another one."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Constant:
    """An immutable array: equal if it is the same object or, where that costs little, has the same contents."""

    def __init__(self, array: jax.Array):
        self.array = array
        self._hash = hash((array.shape, array.dtype))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constant):
            return False
        a, b = self.array, other.array
        if a is b:
            return True
        if a.shape != b.shape or a.dtype != b.dtype or a.sharding != b.sharding:
            return False
        if a.is_deleted() or b.is_deleted() or not (a.is_fully_addressable and b.is_fully_addressable):
            return False
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if a.nbytes > COMPARED_BYTES:
            return False
        return np.asarray(jax.device_get(a)).tobytes() == np.asarray(jax.device_get(b)).tobytes()
