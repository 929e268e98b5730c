"""Pytrees of arrays in files: states that a backward sweep comes back to, and sweeps that are finished."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


def write_tree(path: Path, tree: PyTree) -> None:
    """Writes the file whole or not at all. Leaves are kept as bytes: files know nothing of bfloat16."""
    leaves = [np.frombuffer(np.asarray(leaf).tobytes(), np.uint8) for leaf in jax.tree.leaves(jax.device_get(tree))]
    digest = np.frombuffer(_digest(leaves), np.uint8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, digest, *leaves, allow_pickle=False)
    partial.replace(path)


def read_tree(path: Path, template: PyTree) -> PyTree:
    """The tree in the structure, shapes and dtypes of `template`; ValueError where it is another or damaged."""
    leaves, structure = jax.tree.flatten(template)
    try:
        with np.load(path, allow_pickle=False) as file:
            digest, *found = (file[name] for name in file.files)
    except Exception as error:  # zipfile and NumPy raise what they like
        raise ValueError(f"{path} cannot be read ({type(error).__name__}).") from error
    sizes = [np.prod(leaf.shape, dtype=int) * leaf.dtype.itemsize for leaf in leaves]
    if digest.tobytes() != _digest(found) or sizes != [one.size for one in found]:
        raise ValueError(f"{path} holds something else than was written there.")
    arrays = [one.view(leaf.dtype).reshape(leaf.shape) for one, leaf in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def _digest(leaves: list[np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(leaf.tobytes())
    return digest.digest()
