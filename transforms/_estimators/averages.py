"""Moving averages of trees: bias-corrected, in at least float32, rounded stochastically where stored in bfloat16."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from transforms import _validation


def zeros_like(params: optax.Params, dtype: DTypeLike | None) -> optax.Updates:
    """Zeros of the parameters' shapes, in `dtype` or in at least float32."""
    _validation.check_float_leaves(params)
    # The explicit dtype keeps a Python scalar from starting a weakly typed state that its first update would retype.
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=compute_dtype(p) if dtype is None else dtype), params)


def squared_deviations(grads: Any, old_mean: Any, new_mean: Any, variance: Any, b1: ArrayLike) -> Any:
    """(g - m)², m before this step, capped so that no average of such squares overflows where variance is kept."""

    def of_leaf(grad: ArrayLike, old: jax.Array, new: jax.Array, variance: jax.Array) -> jax.Array:
        dtype = compute_dtype(grad, old, variance)
        mean, scale = old, jnp.ones([], dtype)
        # g - m' = b1 (g - m): with the new m alone, a compiled step need not keep a copy of the old one. Not where that
        # difference is mostly rounding.
        if old.dtype == dtype and _validation.is_known(b1, lambda b1: b1 >= 0.1):
            mean, scale = new, 1 / jnp.asarray(b1, dtype) ** 2
        square = scale * jnp.square(jnp.asarray(grad, dtype) - mean.astype(dtype))
        return jnp.minimum(square, float(jnp.finfo(compute_dtype(variance)).max) / 4)

    return jax.tree.map(of_leaf, grads, old_mean, new_mean, variance)


def ema(values: Any, averages: Any, decay: ArrayLike, step: jax.Array, where: Any) -> tuple[Any, Any]:
    """One step of an exponential moving average over a tree: (raw, as stored; bias-corrected, to be used).

    Where `where` (a tree, or one boolean) is false the average stays as it was. The corrected average is taken from
    what is stored; written so, a compiled step reads each old average once and updates it in place.
    """

    def raw(value: ArrayLike, average: jax.Array, moves: jax.Array) -> jax.Array:
        dtype = compute_dtype(value, average)
        old, average = safe_decay(decay, dtype), average.astype(dtype)
        return jnp.where(moves, old * average + (1 - old) * jnp.asarray(value, dtype), average)

    def corrected(stored: jax.Array, value: ArrayLike) -> jax.Array:
        dtype = compute_dtype(stored, value)
        return stored.astype(dtype) * (1 / one_minus_power(safe_decay(decay, dtype), step))

    raws = jax.tree.map(raw, values, averages, jax.tree.broadcast(where, averages))
    stored = rounded_like(raws, averages, step)
    return stored, jax.tree.map(corrected, stored, values)


def rounded_like(values: Any, like: Any, step: jax.Array) -> Any:
    """`values` in the dtypes of `like`; what becomes bfloat16 is rounded stochastically."""
    leaves, treedef = jax.tree.flatten(values)
    dtypes = [leaf.dtype for leaf in treedef.flatten_up_to(like)]

    def rounded(number: int, value: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return stochastically_rounded(value, step, number) if dtype == jnp.bfloat16 else value.astype(dtype)

    return treedef.unflatten([rounded(i, *pair) for i, pair in enumerate(zip(leaves, dtypes, strict=True))])


def stochastically_rounded(value: jax.Array, step: jax.Array, salt: int) -> jax.Array:
    """Finite numbers in bfloat16, rounded up or down at random so that the mean over steps is the number itself.

    A float32 is a bfloat16 and 16 more bits: 16 random bits are added to those before they are cut off. They are a hash
    of the coordinate's index and of the step, which needs no key and is the same however the array is sharded.
    """
    index = jnp.full(value.shape, jnp.uint32(salt * 0x632BE5AB & 0xFFFFFFFF))
    for axis, multiplier in zip(range(value.ndim), itertools.cycle((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)), strict=False):
        index += jax.lax.broadcasted_iota(jnp.uint32, value.shape, axis) * jnp.uint32(multiplier)
    bits = _mixed(index ^ _mixed(step.astype(jnp.uint32) * jnp.uint32(0x27D4EB2F)))
    largest = float(jnp.finfo(jnp.bfloat16).max)  # what is between it and infinity must not be rounded up
    exact = jax.lax.bitcast_convert_type(jnp.clip(value, -largest, largest).astype(jnp.float32), jnp.uint32)
    cut = (exact + (bits >> 16)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)


def _mixed(bits: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit of the argument (the last rounds of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def safe_decay(decay: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """`decay` in `dtype`, in [0, 1) even where it was traced and could not be checked: no average stands still."""
    return jnp.clip(jnp.asarray(decay, dtype), 0, 1 - float(jnp.finfo(jnp.float32).epsneg))


def one_minus_power(decay: jax.Array, step: ArrayLike) -> jax.Array:
    """1 - decay^step, to the last digits of the dtype also where the power is nearly 1."""
    count = jnp.asarray(step).astype(decay.dtype)
    # A zero decay has no logarithm; its power is 1 at step 0 and zero from then on.
    return jnp.where(decay > 0, -jnp.expm1(count * jnp.log(jnp.where(decay > 0, decay, 1))), jnp.minimum(count, 1))


def sum_of_squared_weights(decay: ArrayLike, step: ArrayLike) -> jax.Array:
    """Σ w_i² of a bias-corrected moving average after `step` values: Var m̂ in units of one value's variance."""
    decay = safe_decay(decay, float)
    total = one_minus_power(decay, step)
    return (1 - decay) / (1 + decay) * (2 - total) / total


def compute_dtype(*arrays: ArrayLike) -> jnp.dtype:
    """At least float32, and no narrower than any of the arrays."""
    # Not jnp.result_type of all of them, which refuses float8, and every mixture under strict promotion.
    dtypes = [jnp.dtype(jnp.float32), *map(jnp.result_type, arrays)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
