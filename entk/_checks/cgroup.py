"""Memory that Linux control groups leave to this process: containers and batch systems limit it below the machine's."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

# Limit, use, and the part of the use that is file cache, which the kernel gives up before it refuses memory.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
SECONDS = 0.02  # for which a reading holds: in this time a process fills some 100 MiB

_SEEN: dict[tuple[Path, Path], tuple[float, float]] = {}  # the last reading and its time


def cgroup_headroom(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that the strictest limit still allows; infinity where nothing is limited, or no file says so.

    Args:
      root: where control groups are mounted.
      membership: the groups of this process, one `hierarchy:controllers:path` a line.
    """
    now = time.monotonic()
    if (root, membership) in _SEEN and now - _SEEN[root, membership][0] < SECONDS:
        return _SEEN[root, membership][1]
    headroom = math.inf
    lines = _read(membership).splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            mount, files = f"{root}", VERSION_2
        elif "memory" in controllers.split(","):
            mount, files = f"{root}/memory", VERSION_1
        else:
            continue
        # The limits of all groups above hold too. In a container the path may be the host's, and only the mount exists.
        group = path.strip("/")
        while group:
            headroom = min(headroom, _headroom(f"{mount}/{group}", *files))
            group = group.rpartition("/")[0]
        headroom = min(headroom, _headroom(mount, *files))
    _SEEN.clear()
    _SEEN[root, membership] = now, headroom
    return headroom


def _headroom(folder: str, limit: str, used: str, cache: str) -> float:
    try:
        allowed = int(_read(f"{folder}/{limit}"))
        taken = int(_read(f"{folder}/{used}"))
    except ValueError:  # "max", or no such file
        return math.inf
    entries = (line.split() for line in _read(f"{folder}/memory.stat").splitlines() if line.startswith(cache))
    return max(0, allowed - taken + sum(int(entry[1]) for entry in entries if entry[0] == cache))


def _read(path: str | Path) -> str:
    """By the system's calls: this is read at every call of a kernel, and file objects take most of the time."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(file, 2**16).decode()
    except OSError:
        return ""
    finally:
        os.close(file)
