"""Examples must not see each other: a model that mixes them has no per-example Jacobian.

Batch normalisation in training mode has outputs of the right shape and still mixes, so the model is run, on batches of
two examples that share one and differ in the other. It is the same program every time: the outputs of an example that
sees nothing of the other are equal to the last bit, and no tolerance has to be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

SHIFT = 2.0**-10  # of every parameter, in its own unit
NUM_CANDIDATES = 8  # examples looked at for one that differs from the first
MAX_PASSED = 128

_PASSED: dict[Hashable, None] = {}  # models whose examples are independent, the one longest known first


def check_independent(apply_fn: Callable[[PyTree, PyTree], Any], params: PyTree, x: PyTree, name: str) -> None:
    """Raises ValueError where the outputs of an example change with the other example of its batch.

    This needs values: nothing is checked while `params`, `x` or what apply_fn closes over is traced, on arrays of other
    processes, or where no two different examples can be had (one example of integers).

    Cost: one compilation and eight runs on two examples, once for every apply_fn and kind of `params` and `x`.
    """
    model = (apply_fn, _kind(params, 0), _kind(x, 1))
    if model in _PASSED or not all(is_at_hand(leaf) for leaf in jax.tree.leaves((params, x))):
        return
    change = _largest_change(apply_fn, params, x)
    if change is None:
        return
    if change > 0:
        raise ValueError(
            f"apply_fn's output for one example of {name} changes when another example of the batch changes, by "
            f"{change:.2g}: it must treat examples independently. For batch statistics choose the evaluation mode: "
            "model.eval() before flax.nnx.split, use_running_average=True in flax.linen. For anything else apply the "
            "model to one example at a time, by jax.vmap inside apply_fn."
        )
    _remember(model)


def _remember(model: Hashable) -> None:
    """Keeps few models, as they may be large, and no refusals: what apply_fn closes over may be put right."""
    while len(_PASSED) >= MAX_PASSED:
        _PASSED.pop(next(iter(_PASSED)), None)
    _PASSED[model] = None


def _kind(tree: PyTree, axis: int) -> tuple:
    """Structure, dtypes, and shapes from `axis` on."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((jnp.shape(leaf)[axis:], jnp.result_type(leaf)) for leaf in leaves)


def is_at_hand(leaf: Any) -> bool:
    """Whether this process can read the values now."""
    if not isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.ShapeDtypeStruct)
    try:
        return leaf.is_fully_addressable
    except jax.errors.ConcretizationTypeError:  # traced
        return False


def _largest_change(apply_fn, params: PyTree, x: PyTree) -> float | None:
    """Of an example's outputs when the other one of a batch of two is exchanged; None where that cannot be seen."""
    shifts = jax.device_put((np.float32(0), np.float32(SHIFT)))
    if not is_at_hand(shifts[0]):  # all that is computed now is traced
        return None
    try:
        pair = _two_examples(x)
        batches = [[jax.tree.map(_join, left, right) for right in pair] for left in pair]
        if not pair or jax.eval_shape(apply_fn, params, batches[0][0]).shape[:1] != (2,):
            return None
    except Exception:  # of whatever kind: explicit shardings are not sliced, models of 1 and n examples may not take 2
        return None

    # A new function and so a new program each time: what apply_fn closes over may have changed since a refusal.
    outputs = jax.jit(lambda params, batch, shift: apply_fn(_shifted(params, shift), batch))
    largest = 0.0
    with jax.debug_nans(False), jax.debug_infs(False):
        # A last layer of zeros, as networks are often initialised, hides the layers before it: hence the shift.
        for shift in shifts:
            out = [[outputs(params, batch, shift) for batch in row] for row in batches]
            if not is_at_hand(out[0][0]):  # apply_fn closes over something traced
                return None
            out = np.asarray(jax.device_get(out))  # (left example, right example, row, ...)
            # Row 0 holds the left example, row 1 the right one. A cumulative sum over the batch shows in row 1 alone.
            change = max(_distance(out[:, 0, 0], out[:, 1, 0]), _distance(out[0, :, 1], out[1, :, 1]))
            if change > 0:
                # Sums in random order (scatter on a GPU) do not reproduce themselves either, and prove nothing.
                again = [np.asarray(jax.device_get(outputs(params, batches[0][0], shift))) for _ in range(4)]
                noise = max(_distance(again[0], run) for run in again)
                largest = max(largest, change if change > 16 * noise else 0.0)
    return largest


def _two_examples(x: PyTree) -> tuple[PyTree, ...]:
    """The first example and one that differs from it: of x, or made up where the first ones are all alike; or none."""

    def example(i):
        return jax.tree.map(lambda leaf: _fetch(leaf, i), x)

    first = example(0)
    for i in range(1, min(NUM_CANDIDATES, jnp.shape(jax.tree.leaves(x)[0])[0])):
        other = example(i)
        if _differ(first, other):
            return first, other
    made_up = jax.tree.map(_moved, first)
    return (first, made_up) if _differ(first, made_up) else ()


def _fetch(leaf, i: int):
    """Row i on the host, free of device and sharding; of random keys, which have no values there, where it is."""
    if isinstance(leaf, np.ndarray):
        return leaf[i : i + 1]
    row = jax.lax.slice_in_dim(leaf, i, i + 1)  # leaf[i : i + 1] would move i to the device
    return row if _is_key(leaf) else np.asarray(jax.device_get(row))


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _join(left, right):
    return jnp.concatenate([left, right]) if _is_key(left) else jax.device_put(np.concatenate([left, right]))


def _differ(left: PyTree, right: PyTree) -> bool:
    def values(tree):
        return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]

    return any(
        np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in zip(values(left), values(right), strict=True)
    )


def _moved(leaf):
    """Another input of about the same size: floating point moves, in no direction that a normalisation would remove."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    wave = np.cos(np.arange(1.0, leaf.size + 1)).reshape(leaf.shape)
    return (leaf.astype(np.float64) / 2 + wave / 4).astype(leaf.dtype)


def _shifted(params: PyTree, shift):
    """`params` with `shift` · cos(...) added to every floating-point leaf; exactly `params` for shift 0."""

    def moved(leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        leaf = jnp.asarray(leaf)
        # The argument depends on `shift`, or the compiler would evaluate the wave beforehand, slowly where p is large.
        wave = jnp.cos((1 + jax.lax.iota(jnp.float32, leaf.size)) * shift / np.float32(SHIFT))
        return leaf + (shift * wave).astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(moved, params)


def _distance(a, b) -> float:
    """Largest difference; equal entries, NaN and infinity among them, have none."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))
