"""Frozen dataclasses of numbers and schedules that are pytrees of their numbers."""

import dataclasses
from typing import Any, TypeVar

import jax
from jax.typing import ArrayLike

_T = TypeVar("_T")


def pytree(cls: type[_T]) -> type[_T]:
    """Register a dataclass as a pytree: numbers are leaves, schedules (callables) part of its structure.

    So an object can be an argument of a jitted function or be swept with `jax.vmap` without being recompiled for each
    value.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]

    def flatten_with_keys(instance: _T):
        values = {name: getattr(instance, name) for name in names}
        schedules = tuple((name, value) for name, value in values.items() if callable(value))
        leaves = [(jax.tree_util.GetAttrKey(name), value) for name, value in values.items() if not callable(value)]
        return leaves, schedules

    def unflatten(schedules, children) -> _T:
        # JAX rebuilds nodes around placeholders, which the range checks of a constructor would refuse.
        instance = object.__new__(cls)
        scheduled = dict(schedules)
        numbers = iter(children)
        for name in names:
            object.__setattr__(instance, name, scheduled[name] if name in scheduled else next(numbers))
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def at_step(value: Any, step: ArrayLike) -> Any:
    """A field's value at a step: that of a schedule, or the number itself."""
    return value(step) if callable(value) else value
