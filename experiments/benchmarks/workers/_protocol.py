"""What every worker does: load its arrays, then time one call for every line on standard input.

A worker is a script of its own, for its own environment: it needs numpy and its framework, nothing of this repository
but the files beside it. It gets one JSON argument:

  arrays: .npz file of weights by name and inputs "x".
  family, sizes: the network.
  variant: which way to compute.
  cores: the cores it may use.

It says {"ready": ...} on standard output, then answers each line {"save": path or null} with the seconds that one call
took and the memory it needed. Import this module before anything heavy: it pins the process.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

spec: dict[str, Any] = json.loads(sys.argv[1])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, spec["cores"])  # before any library counts the cores for its threads

import numpy as np  # noqa: E402  (its threads are counted on import, too)

# Libraries that print must not print into the answers.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def load() -> dict[str, np.ndarray]:
    """Weights by name and inputs "x"."""
    with np.load(spec["arrays"]) as arrays:
        return dict(arrays)


def serve(call: Callable[[], Any], to_numpy: Callable[[Any], np.ndarray], **facts: Any) -> None:
    """Answers requests until standard input closes; `call` returns when its result is there."""
    before = _resident("VmRSS")
    _say({"ready": {**facts, "python": sys.version.split()[0], "bytes_before": before}})
    for line in sys.stdin:
        request = json.loads(line)
        _trim()
        _reset_peak()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "peak_bytes": _resident("VmHWM") - before, "maxrss_bytes": _maxrss()}
        if request["save"]:
            np.save(request["save"], to_numpy(result))
        del result
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    _answers.write(json.dumps(answer) + "\n")
    _answers.flush()


def _resident(field: str) -> int:
    """Resident bytes now (VmRSS) or at the highest since `_reset_peak` (VmHWM).

    Linux keeps the same number as ru_maxrss, but that one cannot be reset and starts at what the parent process held.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return _maxrss()
    (kibibytes,) = re.findall(rf"{field}:\s+(\d+) kB", status.read_text())
    return int(kibibytes) * 1024


def _maxrss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")


def _trim() -> None:
    """Gives freed memory back, so that a call's peak does not hold what an earlier one left in the allocator."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
