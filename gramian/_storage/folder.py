"""Whose folder it is: a folder that is written to is marked as ours, and locked by the process that writes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import weakref
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

MARKER, LOCK = "gramian.json", "gramian.lock"
FORMAT = 1  # of everything in such folders
ASIDE = "aside"  # the folder for what cannot be used, and is kept
SAVE = re.compile(r"(\d{8,})\.save")


class Folder:
    """A folder that holds one thing of ours: a recording, a flow checkpoint, sweeps.

    A file in it, `gramian.json`, says what. A writer claims the folder before it writes: an absent or an empty one is
    marked, one that holds something else is refused. The claim is a lock of the operating system, which goes with the
    process, however it ends. Readers check the mark, and neither lock nor write.

    Args:
      directory: the folder; "~" is the home folder, a relative path is of the working directory now.
      kind: what it is to hold.

    Raises:
      TypeError, ValueError: no path.
    """

    def __init__(self, directory: str | os.PathLike[str], kind: str):
        self.path, self.kind = absolute(directory), kind
        self._unlock: weakref.finalize | None = None

    def __enter__(self) -> Folder:
        self.claim()
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def claim(self) -> None:
        """Makes the folder ours to write to, until `release`; another writer's claim is refused meanwhile.

        Raises:
          ValueError: it holds other files, another kind or another format.
          RuntimeError: it is being written.
          OSError: it cannot be written to.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file or a broken link. Give the {self.kind} a folder of its own.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            marked = self._check_mark()  # before anything is written
            self._unlock = weakref.finalize(self, _unlock, _lock(self.path, self.kind))
            if not marked and not self._check_mark():
                partial = self.path / f"{MARKER}.partial"
                partial.write_text(f"{mark_of(self.kind)}\n")
                partial.replace(self.path / MARKER)
        except OSError as error:
            self.release()
            raise OSError(
                error.errno, f"a {self.kind} cannot be written to {self.path} ({error.strerror or error})"
            ) from error
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives the claim back."""
        if self._unlock is not None:
            self._unlock()

    def remove(self) -> None:
        """Removes what is ours; the folder too, if that was all. One that is not ours is refused as by `claim`."""
        if not self.path.exists():
            return
        with self:
            self.clear()
            for path in (*(path for _, path in self.saves()), self.path / MARKER):
                path.unlink()
        (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):  # it holds something else
            self.path.rmdir()

    def check(self) -> None:
        """For readers: that the folder holds what it is said to hold.

        Raises:
          FileNotFoundError: there is no such folder.
          ValueError: it holds something else.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path}, and so no {self.kind} to read.")
        if not self._check_mark():
            raise ValueError(f"{self.path} holds no {self.kind}.")

    def saves(self) -> list[tuple[int, Path]]:
        """Complete saves by their number, in order."""
        found = ((SAVE.fullmatch(path.name), path) for path in self.path.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match and path.is_file())

    def clear(self) -> None:
        """Removes what a kill left of a save."""
        for path in self.path.glob("*.save.partial"):
            if SAVE.fullmatch(path.stem):
                path.unlink()

    def save_path(self, number: int) -> Path:
        """Where the save of this number stands."""
        return self.path / f"{number:08d}.save"

    def set_aside(self, path: Path) -> Path:
        """Moves a file or folder that cannot be used out of the way, and keeps it; says where to."""
        aside = self.path / ASIDE
        aside.mkdir(exist_ok=True)
        names = (f"{path.name}{f'.{k}' if k else ''}" for k in range(10**6))
        return path.rename(next(aside / name for name in names if not (aside / name).exists()))

    def _check_mark(self) -> bool:
        """Whether the folder is marked as holding this kind; False if it is empty, an error in every other case."""
        own = f"Nothing was touched. Give the {self.kind} a folder of its own, which does not exist yet or is empty."
        try:
            mark = json.loads((self.path / MARKER).read_text())
            kind, version = mark["kind"], mark["format"]
        except FileNotFoundError:
            passing = {LOCK, f"{MARKER}.partial"}  # what a kill leaves of a claim that had just begun
            others = sorted(path.name for path in self.path.iterdir() if path.name not in passing)
            if others and all(SAVE.fullmatch(name) or name == ASIDE for name in others):
                raise ValueError(
                    f"{self.path} holds saves, and no {MARKER} that says of what. If they are a {self.kind}, write "
                    f"{mark_of(self.kind)} into that file and start again. {own}"
                ) from None
            if others:
                shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
                raise ValueError(f"{self.path} holds files that gramian did not write ({shown}). {own}") from None
            return False
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path / MARKER} is damaged, and nothing was touched. If the folder holds a {self.kind}, write "
                f"{mark_of(self.kind)} into that file and start again."
            ) from error
        if kind != self.kind:
            raise ValueError(f"{self.path} holds a {kind}, not a {self.kind}. {own}")
        if version != FORMAT:
            raise ValueError(
                f"{self.path} holds a {kind} of format {version}, and this version of gramian knows format {FORMAT} "
                f"alone. {own}"
            )
        return True


def mark_of(kind: str) -> str:
    """What the marker of such a folder says."""
    return json.dumps({"kind": kind, "format": FORMAT})


def absolute(directory: str | os.PathLike[str]) -> Path:
    """The folder meant, whatever the working directory will be."""
    try:
        name = os.fsdecode(os.fspath(directory))
    except TypeError:
        raise TypeError(f"directory={directory!r} is a {type(directory).__name__}, but must be a path.") from None
    if not name.strip():
        raise ValueError(f"directory={name!r} names no folder; give one of its own, e.g. 'run'.")
    return Path(name).expanduser().absolute()


# The lock lies far behind the end of the file: Windows lets nobody read what is locked, and the file says who holds it.
_FAR = 2**30
_held: set[int] = set()


def _lock(folder: Path, kind: str) -> int:
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise RuntimeError(
            f"{folder} is being written by {_name(holder)}. Wait until it ends or closes what it writes, or give this "
            f"{kind} a folder of its own."
        ) from None
    except OSError as error:  # a file system without locks
        print(f"{folder} cannot be locked ({error.strerror}): see to it that nothing else writes there.")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
    _held.add(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def _leave_to_parent() -> None:
    for descriptor in list(_held):
        _unlock(descriptor)


if hasattr(os, "register_at_fork"):  # a child that outlives its parent must not hold on to its folder
    os.register_at_fork(after_in_child=_leave_to_parent)


def _name(holder: str) -> str:
    process, _, host = holder.partition(" ")
    if process == str(os.getpid()) and host == socket.gethostname():
        return f"this very process ({process})"
    return f"process {process} on {host}" if process else "another process"
