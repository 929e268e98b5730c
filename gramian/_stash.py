"""Pytrees of arrays in files: states that a backward sweep comes back to, sweeps that are finished or under way."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


class Damaged(ValueError):
    """A file that does not hold what was written there."""


def write_tree(path: Path, tree: PyTree) -> None:
    """Writes the file whole or not at all. Leaves are kept as bytes: files know nothing of bfloat16."""
    leaves = [np.frombuffer(np.asarray(leaf).tobytes(), np.uint8) for leaf in jax.tree.leaves(jax.device_get(tree))]
    digest = np.frombuffer(_digest(leaves), np.uint8)
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        np.savez(file, digest, *leaves, allow_pickle=False)
    partial.replace(path)


def read_tree(path: Path, template: PyTree) -> PyTree:
    """The tree in the structure, shapes and dtypes of `template`; `Damaged` where it holds something else."""
    leaves, structure = jax.tree.flatten(template)
    try:
        with np.load(path, allow_pickle=False) as file:
            digest, *found = (file[name] for name in file.files)
    except Exception as error:  # zipfile and NumPy raise what they like
        raise Damaged(f"{path} cannot be read ({type(error).__name__}).") from error
    sizes = [np.prod(leaf.shape, dtype=int) * leaf.dtype.itemsize for leaf in leaves]
    if digest.tobytes() != _digest(found) or sizes != [one.size for one in found]:
        raise Damaged(f"{path} holds something else than was written there.")
    arrays = [one.view(leaf.dtype).reshape(leaf.shape) for one, leaf in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


class Trail:
    """Where a long computation has got to, kept now and then: killed, the same one goes on from there.

    Args:
      folder: of its own; None keeps nothing.
      every_seconds: least time between two keeps of a name.
    """

    def __init__(self, folder: Path | None, every_seconds: float):
        self.folder, self._every, self._last = folder, every_seconds, time.monotonic()

    def last(self, name: str, start: PyTree) -> PyTree:
        """What was kept last under this name, or `start`, whose structure it has."""
        if self.folder is None or not (path := self.folder / f"{name}.npz").exists():
            return start
        try:
            return read_tree(path, start)
        except Damaged as damaged:
            print(f"{damaged} It is computed again.")
            return start

    def keep(self, name: str, tree: PyTree, *, force: bool = False) -> bool:
        """Keeps `tree` if it is time, or `force` is set; says whether it did."""
        if self.folder is None or not (force or time.monotonic() - self._last >= self._every):
            return False
        write_tree(self.folder / f"{name}.npz", tree)
        self._last = time.monotonic()
        return True

    def remove(self) -> None:
        """Forgets everything, once the result is kept elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _digest(leaves: list[np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(leaf.tobytes())
    return digest.digest()
