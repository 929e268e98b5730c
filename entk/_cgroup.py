"""Memory that Linux control groups leave to this process: containers and batch systems limit it below the machine's."""

from __future__ import annotations

import math
from pathlib import Path

# Limit, use, and the part of the use that is file cache, which the kernel gives up before it refuses memory.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def cgroup_headroom(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that the strictest limit still allows; infinity where nothing is limited, or no file says so.

    Args:
      root: where control groups are mounted.
      membership: the groups of this process, one `hierarchy:controllers:path` a line.
    """
    headroom = math.inf
    lines = _read(membership).splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            mount, files = root, VERSION_2
        elif "memory" in controllers.split(","):
            mount, files = root / "memory", VERSION_1
        else:
            continue
        # The limits of all groups above hold too. In a container the path may be the host's, and only the mount exists.
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            headroom = min(headroom, _headroom(folder, *files))
            if folder == mount:
                break
    return headroom


def _headroom(folder: Path, limit: str, used: str, cache: str) -> float:
    try:
        allowed, taken = int(_read(folder / limit)), int(_read(folder / used))
    except ValueError:  # "max", or no such file
        return math.inf
    entries = (line.split() for line in _read(folder / "memory.stat").splitlines())
    return max(0, allowed - taken + sum(int(entry[1]) for entry in entries if entry[0] == cache))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
