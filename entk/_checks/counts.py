"""Sizes and numbers of things: positive integers."""

from __future__ import annotations

import numbers
from typing import Any


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Returns `value` as a Python integer; NumPy's integers are taken, booleans and floats are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")
    return int(value)


def check_microbatch_size(microbatch_size: int | None) -> int | None:
    """Returns `microbatch_size` as a Python integer; NumPy's integers are taken, booleans and floats are not."""
    if microbatch_size is None:
        return None
    if isinstance(microbatch_size, bool) or not isinstance(microbatch_size, numbers.Integral) or microbatch_size < 1:
        raise ValueError(f"microbatch_size={microbatch_size!r} must be a positive integer, or None for one batch.")
    return int(microbatch_size)
