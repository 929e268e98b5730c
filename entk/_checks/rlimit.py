"""Memory that the limits of this process leave: `ulimit -v` and `ulimit -d`, which batch systems set for their jobs."""

from __future__ import annotations

import math

import psutil

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None


def rlimit_headroom() -> float:
    """Bytes that the stricter of RLIMIT_AS and RLIMIT_DATA still allows; infinity where neither is set."""
    if resource is None:
        return math.inf
    used, headroom = None, math.inf
    for name, taken in (("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit == resource.RLIM_INFINITY or limit < 0:
            continue
        used = used or psutil.Process().memory_info()
        headroom = min(headroom, max(0, limit - getattr(used, taken, 0)))  # data: told by Linux alone
    return headroom
