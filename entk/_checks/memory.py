"""What would not fit in memory is refused before it is allocated."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import jax
import psutil

from entk._checks.cgroup import cgroup_headroom
from entk._checks.rlimit import rlimit_headroom


def available_bytes() -> int:
    """Memory in bytes that this process's first device can still give; for a CPU, what the limits of containers and of
    the process leave."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return int(min(psutil.virtual_memory().available, cgroup_headroom(), rlimit_headroom()))


def check_fits(
    num_bytes: int,
    what: str,
    remedy: str,
    *,
    count: int = 0,
    bytes_of: Callable[[int], int] | None = None,
    unit: str = "examples",
) -> None:
    """Refuses an allocation that is larger than the memory at hand, before it is made.

    Args:
      num_bytes: what it takes.
      what: is allocated, for the message; "the 10 x 10 kernel".
      remedy: sentences that name the ways out.
      count, bytes_of, unit: of what there could be less, and what so many take: the message says how many would fit.

    Cost: reading some files of the operating system, about 0.1 ms.
    """
    available = available_bytes()
    if num_bytes > available:
        fitting = ""
        if bytes_of is not None:
            most = bisect.bisect_right(range(1, count), available, key=bytes_of)
            fitting = (
                f" {most:,} of the {count:,} {unit} would fit."
                if most
                else f" Not one of the {count:,} {unit} would fit."
            )
        raise MemoryError(
            f"{what} takes {num_bytes / 2**30:,.1f} GiB and {available / 2**30:,.1f} GiB are available.{fitting} "
            f"{remedy}"
        )
