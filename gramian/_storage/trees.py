"""Pytrees as named leaves, which files hold, and a digest of them."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

PyTree = Any


def digest(tree: PyTree) -> str:
    """Of names, dtypes, shapes and bytes of all leaves."""
    hashed = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = as_array(leaf)
        hashed.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()


def characters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def flatten(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by position. Empty arrays are left out: they hold nothing."""
    leaves = enumerate(as_array(leaf) for leaf in jax.tree.leaves(tree))
    return {f"{i:04d}": leaf for i, leaf in leaves if leaf.size}


def unflatten(template: PyTree, leaves: dict[str, np.ndarray]) -> PyTree:
    """The leaves in the structure of `template`; Python numbers come back as Python numbers."""
    flat, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, [_like(old, leaves.get(f"{i:04d}", old)) for i, old in enumerate(flat)])


def pack(tree: PyTree) -> np.ndarray:
    """All leaves as one row of bytes."""
    return np.concatenate([np.zeros(0, np.uint8), *(as_bytes(leaf) for leaf in jax.tree.leaves(tree))])


def unpack(template: PyTree, row: np.ndarray) -> PyTree:
    """What `pack` packed, in the structure, shapes and dtypes of `template`; ValueError where it has another size."""
    flat, structure = jax.tree.flatten(template)
    arrays = [as_array(old) for old in flat]
    ends = np.cumsum([0, *(array.nbytes for array in arrays)])
    if ends[-1] != row.size:
        raise ValueError(f"it holds states of {row.size} bytes, this model and optimizer have {ends[-1]}")
    found = [
        _like(old, row[a:b].view(array.dtype).reshape(array.shape))
        for old, array, a, b in zip(flat, arrays, ends[:-1], ends[1:], strict=True)
    ]
    return jax.tree.unflatten(structure, found)


def as_bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(as_array(leaf)).reshape(-1).view(np.uint8)


def as_array(leaf: Any) -> np.ndarray:
    """A leaf's numbers; of a random key, those that it is made of."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(old, new):
    if _is_key(old):
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
    return type(old)(new) if isinstance(old, (int, float)) else jax.numpy.asarray(new)
