"""What a function computes, as a digest: two functions of the same digest are the same program."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from entk.internal import is_jaxpr, is_literal, opened
from gramian._storage.trees import as_array, characters, digest

PyTree = Any
# Where an object happens to lie in memory, and colours of a terminal, say nothing of the program.
NOISE = re.compile(r"0x[0-9a-f]+|\x1b\[[0-9;]*m")


class Program(str):
    """A digest, of a function."""


def program(function: Callable, *args: PyTree) -> Program:
    """A digest of the function's jaxpr at arguments of these shapes and dtypes, with all constants in it.

    Versions of JAX write jaxprs in their own ways: the digest begins with the version.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    hashed = hashlib.sha256(text((jax.tree.structure(args), jax.tree.structure(out))).encode())
    _add(hashed, closed)
    return Program(f"jax {jax.__version__} {hashed.hexdigest()}")


def text(value: Any) -> str:
    """`repr`, the same in every process."""
    return NOISE.sub("", repr(value))


def differing(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Names whose digests differ; programs that other versions of JAX wrote are not compared, which is printed."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    incomparable = [name for name in names if _version(old.get(name, "")) != _version(new.get(name, ""))]
    if incomparable := [name for name in incomparable if name in old and name in new]:
        was = _version(old[incomparable[0]])
        print(f"{', '.join(incomparable)} cannot be compared: the run began with {was}, this is {jax.__version__}.")
    return [name for name in names if name not in incomparable]


def _version(told: str) -> str:
    return told.rpartition(" ")[0]


def digests(named: Mapping[str, Any]) -> dict[str, str]:
    """Of programs, strings and pytrees of arrays, by name."""
    return {
        name: str(value) if isinstance(value, Program) else digest(_numbers(value)) for name, value in named.items()
    }


def _numbers(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: characters(leaf) if isinstance(leaf, str) else leaf, tree)


def _add(hashed, value: Any) -> None:
    """Jaxprs by their equations: their text shortens arrays, and shares what the caches happen to share."""
    if is_jaxpr(value):
        jaxpr, consts = opened(value)
        _add(hashed, consts)
        numbers: dict[Any, int] = {}

        def name(variable):
            if is_literal(variable):
                _add(hashed, variable.val)
            else:
                hashed.update(f"v{numbers.setdefault(variable, len(numbers))}".encode())
            hashed.update(f":{variable.aval}".encode())

        for variable in (*jaxpr.constvars, *jaxpr.invars):
            name(variable)
        for equation in jaxpr.eqns:
            hashed.update(f"\n{equation.primitive}".encode())
            _add(hashed, dict(equation.params))
            for variable in (*equation.invars, *equation.outvars):
                name(variable)
        for variable in jaxpr.outvars:
            name(variable)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hashed.update(f"{key}=".encode())
            _add(hashed, value[key])
    elif isinstance(value, (tuple, list)):
        hashed.update(f"{type(value).__name__} {len(value)}".encode())
        for one in value:
            _add(hashed, one)
    elif isinstance(value, (set, frozenset)):
        _add(hashed, sorted(map(text, value)))
    elif isinstance(value, (jax.Array, np.ndarray, np.generic)) or hasattr(value, "__array__"):
        array = as_array(value)
        hashed.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    else:
        hashed.update(text(value).encode())
