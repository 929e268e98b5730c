"""Arrays in files: written whole or not at all, and never taken for what they are not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gramian._storage.folder import Folder
from gramian._storage.trees import as_bytes

PyTree = Any
DIGEST = hashlib.sha256().digest_size


class Damaged(ValueError):
    """A file whose contents are proven not to be what was written there. A disk that fails to read proves nothing."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} {reason}")
        self.path, self.reason = path, reason


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name: `.npy` records one after the other, the names first, then the SHA-256 of all of it.

    The file appears whole or not at all, whatever ends the process; a disk that is full leaves nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    names = np.frombuffer(json.dumps(list(arrays)).encode(), np.uint8)
    try:
        with partial.open("wb") as file:
            hashed = _Hashed(file)
            for array in (names, *arrays.values()):
                np.save(hashed, array, allow_pickle=False)
            file.write(hashed.hash.digest())
            file.flush()
            os.fsync(file.fileno())  # a name must not stand for contents that a power cut can still take
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote; `Damaged` where it is proven to be something else, OSError as the disk raises it."""
    content = path.read_bytes()
    if hashlib.sha256(memoryview(content)[:-DIGEST]).digest() != content[-DIGEST:]:
        raise Damaged(path, "does not match its checksum")
    stream = io.BytesIO(content)
    names = json.loads(np.load(stream, allow_pickle=False).tobytes())
    return {name: np.load(stream, allow_pickle=False) for name in names}


def read_save(path: Path) -> tuple[dict[str, np.ndarray] | None, str]:
    """A save, or None and how it is damaged; OSError where the disk does not give it, which proves nothing."""
    try:
        return read_arrays(path), ""
    except Damaged as damaged:
        return None, damaged.reason
    except OSError as error:
        raise OSError(
            error.errno, f"{path} cannot be read now ({error.strerror}). Nothing was changed: try again"
        ) from error


def write_tree(path: Path, tree: PyTree, what: str = "") -> None:
    """Writes the leaves of a pytree, as bytes: files know nothing of bfloat16; `what` says what it is."""
    leaves = jax.tree.leaves(jax.device_get(tree))
    write_arrays(path, {f"what {what}": np.zeros(0)} | {f"{i:04d}": as_bytes(leaf) for i, leaf in enumerate(leaves)})


def read_tree(path: Path, template: PyTree, what: str = "") -> PyTree:
    """The tree in the structure, shapes and dtypes of `template`; `Damaged` where it is another, or is missing."""
    leaves, structure = jax.tree.flatten(template)
    try:
        (told, _), *named = read_arrays(path).items()
    except FileNotFoundError:
        raise Damaged(path, "is missing") from None
    found = [array for _, array in named]
    sizes = [np.prod(leaf.shape, dtype=int) * leaf.dtype.itemsize for leaf in leaves]
    if told != f"what {what}" or sizes != [one.size for one in found]:
        raise Damaged(path, "holds something else than is looked for")
    arrays = [one.view(leaf.dtype).reshape(leaf.shape) for one, leaf in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


class Trail:
    """Where a long computation has got to, kept now and then: killed, the same one goes on from there.

    Args:
      store: the claimed folder; None keeps nothing.
      name: of the computation, and of the folder in `store` that its files are in.
      every_seconds: least time between two keeps.
    """

    FILES = re.compile(r"(forward|backward|\d+)\.save(\.partial)?")

    def __init__(self, store: Folder | None, name: str, every_seconds: float):
        self._store, self.name, self._every, self._last = store, name, every_seconds, time.monotonic()
        self.folder = None if store is None else store.path / name

    def path(self, name: str) -> Path:
        """The file of this name."""
        return (self.folder or Path()) / f"{name}.save"

    def last(self, name: str, start: PyTree) -> PyTree:
        """What was kept last under this name, or `start`, whose structure it has."""
        path = self.path(name)
        if self._store is None or not path.exists():
            return start
        try:
            return read_tree(path, start, f"{self.name}/{name}")
        except Damaged as damaged:
            print(f"{damaged}; it is kept as {self._store.set_aside(path)}, and computed again.")
            return start

    def keep(self, name: str, tree: PyTree, *, force: bool = False) -> bool:
        """Keeps `tree` if it is time, or `force` is set; says whether it did."""
        if self.folder is None or not (force or time.monotonic() - self._last >= self._every):
            return False
        write_tree(self.path(name), tree, f"{self.name}/{name}")
        self._last = time.monotonic()
        return True

    def remove(self) -> None:
        """Forgets everything, once the result is kept elsewhere; a file of another name stays, and its folder."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if self.FILES.fullmatch(path.name):
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class _Hashed:
    """A file to write to, and the hash of what was written."""

    def __init__(self, file):
        self._file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)
