"""What a strategy is: a way to compute a kernel, checked before it allocates."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array

from entk._checks.apply import OutputSpec
from entk._types import ApplyFn, PyTree


class Strategy(Protocol):
    """How a kernel is computed: `Structured` or `FullJacobian`. Hashable, so that it is compiled for once."""

    def check(self, params: PyTree, spec1: OutputSpec, spec2: OutputSpec, symmetric: bool) -> None:
        """Refuses what would not fit, before anything is allocated."""
        ...

    def kernel(self, apply_fn: ApplyFn, params: PyTree, x1: PyTree, x2: PyTree | None) -> Array:
        """K of shape (n₁·c, n₂·c); the arguments have been checked."""
        ...
