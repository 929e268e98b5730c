"""What has passed the checks: what is asked of a model once is not asked of it again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from entk._types import PyTree

MAX_PASSED = 256

_PASSED: dict[Hashable, Any] = {}  # models that have passed what is checked once, the one longest known first


def remember(key: Hashable, value: Any = True) -> None:
    """Keeps few models, as they may be large, and no refusals: what apply_fn closes over may be put right."""
    while len(_PASSED) >= MAX_PASSED:
        _PASSED.pop(next(iter(_PASSED)), None)
    _PASSED[key] = value


def passed(key: Hashable) -> Any:
    """What was remembered of a model, or None."""
    return _PASSED.get(key)


def kind(tree: PyTree, axis: int = 0) -> tuple:
    """Structure, dtypes, and shapes from `axis` on."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(
        (leaf.shape[axis:], leaf.dtype) if hasattr(leaf, "dtype") else (type(leaf), jnp.result_type(leaf))
        for leaf in leaves
    )
