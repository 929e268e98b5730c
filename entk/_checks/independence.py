"""Examples must not see each other: a model that mixes them has no per-example Jacobian.

Batch normalisation in training mode has outputs of the right shape and still mixes, so the model is run. Two checks:

Once, one example of the batch is exchanged for another one. It is the same program, so the outputs of the others are
equal to the last bit where they see nothing of it, and no tolerance has to be chosen.

At every call, the outputs of the batch are compared with those of each example alone, which are what kernels
differentiate. This finds what depends on the place in the batch as well, such as dropout with one key for all of it.
Rounding differs between the two: the tolerance is the root of the dtype's resolution and, for outputs that lose more to
cancellation, what moving every input by one rounding does to them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from entk._batching import map_examples, one_row
from entk._checks.passed import kind, passed, remember
from entk._parameters import differentiable
from entk._precision import model_precision
from entk._tracing.jaxpr import intermediate_bytes
from entk._tracing.pinned import Pinned, is_at_hand, pin
from entk._types import PyTree

SHIFT = 2.0**-10  # of every parameter, in its own unit
NUM_CANDIDATES = 8  # examples looked at for one that differs from the first
WHOLE_BYTES = 2**28  # of intermediate results of the whole batch; of a larger one the first rows are compared
NUM_ROUNDINGS = 8  # draws of the inputs, each moved by one rounding
NOWHERE = 2**31 - 1  # a row that no batch has


def check_independent(
    apply_fn: Callable[[PyTree, PyTree], Any], params: PyTree, x: PyTree, name: str, *, is_mean: bool = False
) -> None:
    """Raises ValueError where the outputs of an example change with the others of its batch, or with its place there.

    This needs values: nothing is checked while `params`, `x` or what apply_fn closes over is traced, on arrays of other
    processes or with explicit shardings. Of a batch whose intermediate results exceed about 256 MiB the first rows are
    compared, as a batch of their own; one example of integers, of which no other one can be made up, is not.

    Args:
      apply_fn: function of `params` and a batch, its outputs one row an example.
      name: of x in messages.
      is_mean: apply_fn returns a scalar, which must be the mean over examples.

    Cost: the outputs of the batch and of every example alone. Once for every function, closure and kind of arguments:
    one compilation, and a few runs more.
    """
    if isinstance(apply_fn, Pinned) and apply_fn.is_traced:
        return
    if not all(map(_may_be_run, jax.tree.leaves((params, x)))) or not is_at_hand(_control()):
        return
    apply_fn = pin(apply_fn, (params, one_row(x)))
    params, x = _in_one_place((params, x))
    one_kind, whole = (apply_fn, kind(params), kind(x, 1)), (apply_fn, kind(params), kind(x))
    if not is_mean and not passed(one_kind):
        change = _largest_change(apply_fn, params, x)
        if change is not None and change > 0:
            raise ValueError(
                f"apply_fn's output for one example of {name} changes when another example of the batch changes, by "
                f"{change:.2g}: it must treat examples independently. For batch statistics choose the evaluation mode: "
                "model.eval() before flax.nnx.split, use_running_average=True in flax.linen. For anything else apply "
                "the model to one example at a time, by jax.vmap inside apply_fn."
            )
        if change is not None:
            remember(one_kind)
    size = passed(whole)
    for is_shifted in (False, True) if size is None else (False,):
        size = size or _num_compared(apply_fn, params, x)
        _check_rows(apply_fn, params, x, size, is_shifted, name, is_mean)
    remember(whole, size)


def _may_be_run(leaf: Any) -> bool:
    """Values at hand, and not on a mesh of explicit axes, on which a model of one example need not be defined."""
    if not is_at_hand(leaf):
        return False
    sharding = getattr(leaf, "sharding", None)
    return not (isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types)


def _control(is_shifted: bool = False, place: int = NOWHERE, source: int = 0) -> jax.Array:
    """What distinguishes one run from another, on the device."""
    return jax.device_put(np.array([is_shifted, place, source], np.int32))


@partial(jax.jit, static_argnums=(0, 1))
def _together_and_alone(apply_fn, size, params, x, control):
    """Outputs of the first `size` examples as one batch, and of each as a batch of one; rows, flattened.

    With `control` = (is_shifted, place, source): at shifted parameters, and with example `source` in `place`.
    """
    is_shifted, place, source = control
    params = jax.tree.map(lambda leaf: leaf if _is_key(leaf) else jnp.asarray(leaf), params)
    params = jax.lax.cond(is_shifted, _shifted, lambda params: params, params)
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf[:size]).at[place].set(leaf[source], mode="drop"), x)

    def one(x_i):
        return jnp.ravel(apply_fn(params, jax.tree.map(lambda leaf: leaf[None], x_i)))

    with model_precision():
        together = apply_fn(params, x)
        alone = map_examples(one, x, None)
    return together.reshape(size if together.ndim else 1, -1), alone


def _outputs(apply_fn: Pinned, size: int, params: PyTree, x: PyTree, *control: Any) -> tuple[np.ndarray, np.ndarray]:
    with jax.debug_nans(False), jax.debug_infs(False):
        together, alone = jax.device_get(_together_and_alone(apply_fn, size, params, x, _control(*control)))
    wide = np.promote_types(together.dtype, np.float32)
    return together.astype(wide), alone.astype(wide)


def _in_one_place(tree: PyTree) -> PyTree:
    """For one program: arrays that are committed to different devices are taken to the host."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.committed]
    if len({frozenset(leaf.sharding.device_set) for leaf in arrays}) <= 1:
        return tree
    return jax.tree.map(lambda leaf: leaf if _is_key(leaf) else jax.device_get(leaf), tree)


# ---------------------------------------------------------------------------------------------------- the whole batch


def _check_rows(
    apply_fn: Pinned, params: PyTree, x: PyTree, size: int, is_shifted: bool, name: str, is_mean: bool
) -> None:
    """Refuses rows that are not what each example gives alone."""
    if size < 2:
        return

    def outputs(params, x):
        together, alone = _outputs(apply_fn, size, params, x, is_shifted)
        return together, alone.mean(0, keepdims=True) if is_mean else alone

    together, alone = outputs(params, x)
    if (together == alone).all():
        return
    away = _away(together, alone)
    eps = float(jnp.finfo(_dtype(params)).eps)
    with np.errstate(invalid="ignore"):
        sizes = np.maximum(np.abs(together), np.abs(alone))
        scale = np.where(np.isfinite(sizes), sizes, 0).max(0)
    allowed = max(eps**0.5, size * eps if is_mean else 0) * scale
    if (away <= allowed).all():
        return
    moved = [_away(outputs(*_rounded((params, x), seed))[1], alone) for seed in range(NUM_ROUNDINGS)]
    allowed = np.maximum(allowed, 8 * np.max(moved, (0, 1)))
    if (away <= allowed).all():
        return
    row, output = np.unravel_index(np.argmax(np.where(away > allowed, away, -1)), away.shape)
    found = f"{together[row, output]:.6g}", f"{alone[row, output]:.6g}"
    where = f" at parameters moved by {SHIFT:.1g}" if is_shifted else ""
    if is_mean:
        raise ValueError(
            f"loss_fn gives {found[0]} on {size} examples together and {found[1]} on average on each of them alone"
            f"{where} (rounding explains {allowed[output]:.2g}): a scalar loss must be the mean over examples that do "
            "not see each other. No sum; no mean over tokens of all sequences together, which weighs examples by what "
            "else is in the batch; no batch statistics. Return one loss an example, (n,), weighted as it should count."
        )
    raise ValueError(
        f"output {output} of example {row} of {name} is {found[0]} in a batch of {size} and {found[1]} alone{where} "
        f"(rounding explains {allowed[output]:.2g}): it must treat examples independently, wherever they are in the "
        "batch. Dropout and other noise with one key for the batch: choose the evaluation mode (deterministic=True, "
        "model.eval(), inference mode), or make the keys a leaf of x, one an example. Anything else that depends on "
        "the place, such as jnp.arange(len(x)): make it a leaf of x."
    )


def _num_compared(apply_fn: Pinned, params: PyTree, x: PyTree) -> int:
    """Examples that may be run as one batch."""
    n = jnp.shape(jax.tree.leaves(x)[0])[0]
    closed = jax.make_jaxpr(lambda *args: apply_fn(*args))(params, one_row(x))
    return min(n, max(2, WHOLE_BYTES // (4 * intermediate_bytes(closed.jaxpr)[1] + 1)))


def _rounded(tree: PyTree, seed: int) -> PyTree:
    """Every floating-point entry moved by one rounding, up or down."""
    leaves, rebuild = differentiable(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return rebuild([
        leaf + leaf * jnp.finfo(leaf.dtype).eps * jax.random.rademacher(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(map(jnp.asarray, leaves), keys, strict=True)
    ])  # fmt: skip


def _dtype(params: PyTree) -> Any:
    return jnp.result_type(differentiable(params)[0][0])


# ------------------------------------------------------------------------------------------------ another example


def _largest_change(apply_fn, params: PyTree, x: PyTree) -> float | None:
    """Of the outputs of an example when another one of its batch is exchanged; None where that cannot be seen."""
    try:
        batch, places = _exchanges(x)
        if not places:
            return None
        apply_fn = pin(apply_fn, (params, one_row(batch)))
        if apply_fn.is_traced:
            return None
        size = _num_compared(apply_fn, params, batch)
        if jax.eval_shape(apply_fn, params, batch).shape[:1] != (jnp.shape(jax.tree.leaves(batch)[0])[0],):
            return None
    except Exception:  # of whatever kind: models of 1 and n examples may not take 2
        return None
    largest = 0.0
    # A last layer of zeros, as networks are often initialised, hides the layers before it: hence the shift.
    for is_shifted in (False, True):
        before = _outputs(apply_fn, size, params, batch, is_shifted)[0]
        for place, source in places:
            place = min(place, size - 1)
            after = _outputs(apply_fn, size, params, batch, is_shifted, place, source)[0]
            change = _distance(*(np.delete(one, place, axis=0) for one in (before, after)))
            if change > 0:
                # Sums in random order (scatter on a GPU) do not reproduce themselves either, and prove nothing.
                again = [_outputs(apply_fn, size, params, batch, is_shifted)[0] for _ in range(4)]
                noise = max(_distance(before, run) for run in again)
                largest = max(largest, change if change > 16 * noise else 0.0)
    return largest


def _exchanges(x: PyTree) -> tuple[PyTree, list[tuple[int, int]]]:
    """A batch, and (place, source): the first example for one that differs from it, and the last one likewise.

    The batch is x, or made up of two examples where the first ones of x are all alike; or there is none.
    """

    def example(i):
        return jax.tree.map(lambda leaf: _fetch(leaf, i), x)

    n, first = jnp.shape(jax.tree.leaves(x)[0])[0], example(0)
    for i in range(1, min(NUM_CANDIDATES, n)):
        if _differ(first, example(i)):
            return x, [(0, i), (n - 1, 0 if _differ(first, example(n - 1)) else i)]
    made_up = jax.tree.map(_moved, first)
    pair = [(0, 1), (1, 0)] if _differ(first, made_up) else []
    return jax.tree.map(_join, first, made_up), pair


def _fetch(leaf, i: int):
    """Row i on the host, free of device and sharding; of random keys, which have no values there, where it is."""
    if isinstance(leaf, np.ndarray):
        return leaf[i : i + 1]
    row = jax.lax.slice_in_dim(leaf, i, i + 1)  # leaf[i : i + 1] would move i to the device
    return row if _is_key(leaf) else np.asarray(jax.device_get(row))


def _is_key(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


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


def _shifted(params: PyTree) -> PyTree:
    """`params` with SHIFT · cos(1), SHIFT · cos(2), ... added to every floating-point leaf."""

    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Of the parameters, or the compiler would evaluate the wave beforehand, slowly where p is large.
        start = 1 + 0 * jnp.nan_to_num(leaf.ravel()[:1]).astype(jnp.float32)
        wave = jnp.cos(start + jax.lax.iota(jnp.float32, leaf.size))
        return leaf + (np.float32(SHIFT) * wave).astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(moved, params)


def _distance(a, b) -> float:
    """Largest difference."""
    return float(_away(a, b).max(initial=0.0))


def _away(a, b) -> np.ndarray:
    """Entry by entry |a − b|; equal entries, NaN and infinity among them, have none."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    return np.where(np.isnan(difference), np.inf, difference)
