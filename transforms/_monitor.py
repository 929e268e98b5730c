"""What the gate of one step did, leaf by leaf: the scalars that `gate_report` shows."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from transforms import _null_distribution, _validation
from transforms._estimators.base import Moments
from transforms._masks import Mask, capped
from transforms._reductions import Pooled
from transforms._thresholds import Level


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a gate's state keeps for `gate_report`: eight numbers a leaf, twelve with those of the step, and its name.

    Args:
      sample: coordinates of each leaf, evenly spread, that they are taken from, >= 1; larger leaves are extrapolated.
        None takes all of them, which is exact and costs several passes over the leaf.
      every: steps between summaries, >= 1; the first step has one.
      of_step: whether to summarize the step of `inner` too. A compiled optimizer step then has to store the ungated
        update, which it otherwise need not: up to twice its time on a CPU.

    Raises:
      TypeError, ValueError: sample or every not an integer, or below 1.

    Cost: with the defaults a few microseconds a leaf and step.

    Source: Litman & Guo, arXiv:2605.01172; theory (9).

    >>> exact = Summary(sample=None, every=1, of_step=True)
    """

    sample: int | None = 1024
    every: int = 10
    of_step: bool = False

    def __post_init__(self):
        if self.sample is not None:
            _validation.check_integer_at_least("sample", self.sample, 1, "None takes every coordinate")
        _validation.check_integer_at_least("every", self.every, 1, "1 summarizes every step")

    def take(self, update: jax.Array, mean: jax.Array, variance: jax.Array, pooled: Pooled) -> "Sample":
        """The coordinates of a leaf to be summarized, whose ungated update is `update`."""

        shape, size = mean.shape, mean.size
        strides = [1] * mean.ndim
        if self.sample is not None and size > self.sample:
            strides = _strides(mean, math.ceil((size / self.sample) ** (1 / mean.ndim)))

        def part(leaf: jax.Array) -> jax.Array:
            if leaf.ndim == 0 or set(strides) == {1}:
                return leaf
            return jnp.broadcast_to(leaf, shape)[tuple(slice(None, None, stride) for stride in strides)]

        step = part(update).astype(mean.dtype) if self.of_step else None
        return Sample(size, step, part(mean), part(variance), Pooled(*map(part, pooled)))


def _strides(leaf: jax.Array, stride: int) -> list[int]:
    """`stride` along every axis; under explicit sharding the next smaller one that takes as many from each device."""
    sharding = jax.typeof(leaf).sharding
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    found = []
    for size, names in zip(leaf.shape, spec, strict=True):
        names = names if isinstance(names, tuple) else (names,)
        on_one = size // math.prod(sharding.mesh.shape[name] for name in names if isinstance(name, str))
        shared = any(isinstance(name, str) for name in names)
        found.append(max(s for s in range(1, stride + 1) if on_one % s == 0) if shared else stride)
    return found


class Sample(NamedTuple):
    """Some coordinates of a leaf, before it is decided whether they are summarized."""

    leaf_size: int
    update: jax.Array | None
    mean: jax.Array
    variance: jax.Array
    pooled: Pooled


class LeafSummary(NamedTuple):
    """Scalars of one leaf at one step. A gate's state holds them as rows of one array: `LeafSummary(*row)`.

    Attributes:
      size: coordinates.
      num_open: coordinates with q >= 1/2.
      sum_openness: Σ q.
      decrease: Σ q (m̂² - Var m̂), equation (9) with M = diag(q): the estimated first-order decrease of the population
        risk by the gated gradient step -η q ⊙ m̂, in units of the loss per unit of η.
      ungated_decrease: the same with q = 1.
      noise_boundary: the F = t² above which q >= 1/2, as far as the mask tells; averaged over the leaf's blocks.
      dof: degrees of freedom of the noise.
      num_together: independent coordinates a block is worth, averaged over the leaf's blocks.
      step_decrease: Σ -q u (m̂ - Var m̂/m̂), equation (9) with M = -q u/m̂ for the gated step q ⊙ u of `inner`, in units of
        the loss. It holds where M does not depend on this batch (Adam with its own m, SGD with the batch's own mean);
        elsewhere it is an approximation. Rows end before it, and it is NaN here, without `Summary(of_step=True)`.
      ungated_step_decrease: the same with q = 1.
      squared_norm: Σ (q u)², squared length of the gated step.
      ungated_squared_norm: Σ u².
    """

    size: ArrayLike
    num_open: ArrayLike
    sum_openness: ArrayLike
    decrease: ArrayLike
    ungated_decrease: ArrayLike
    noise_boundary: ArrayLike
    dof: ArrayLike
    num_together: ArrayLike
    step_decrease: ArrayLike = float("nan")
    ungated_step_decrease: ArrayLike = float("nan")
    squared_norm: ArrayLike = float("nan")
    ungated_squared_norm: ArrayLike = float("nan")


_NUM_OF_STEP = len(LeafSummary._field_defaults)


def no_summary(params: optax.Params, summary: Summary) -> tuple[jax.Array, jax.Array]:
    """Rows of zeros, one a leaf, and the leaves' names as rows of UTF-8 bytes: no step was taken yet.

    Arrays of their own rather than a tree like params: `optax.tree_utils.tree_map_params` takes such a tree for
    parameters, and places it like them.
    """
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".").encode() for path, _ in jax.tree.leaves_with_path(params)
    ]
    text = np.zeros((len(names), max(map(len, names), default=0)), np.uint8)
    for row, name in zip(text, names, strict=True):
        row[: len(name)] = np.frombuffer(name, np.uint8)
    width = len(LeafSummary._fields) - (0 if summary.of_step else _NUM_OF_STEP)
    return jnp.zeros((len(names), width), jnp.float32), jnp.asarray(text)


def leaf_names(text: np.ndarray) -> list[str]:
    """The names that `no_summary` wrote down."""
    return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(text, np.uint8)]


def summary_of(
    sample: Sample, openness: Callable[[Pooled], jax.Array], level: Level, mask: Mask, moments: Moments
) -> jax.Array:
    """The row of one leaf.

    q is computed anew on the sample: a second reader of the whole q would make a compiled step store it.
    """
    mean, update = sample.mean, sample.update
    # Kept so small that neither infinite noise nor a sum over the leaf makes inf - inf.
    most = float(jnp.finfo(mean.dtype).max) / 8 / max(sample.leaf_size, 1)
    q = jnp.broadcast_to(openness(sample.pooled), mean.shape)
    noise = jnp.asarray(moments.noise_ratio, mean.dtype) * sample.variance
    decrease = jnp.minimum(mean**2, most) - jnp.minimum(noise, most)
    scale = sample.leaf_size / max(mean.size, 1)
    scalars = [
        sample.leaf_size,
        scale * jnp.sum(q >= 0.5, dtype=q.dtype),
        scale * jnp.sum(q),
        scale * jnp.sum(q * decrease),
        scale * jnp.sum(decrease),
        _noise_boundary(mask, level, sample.pooled, moments),
        moments.dof,
        jnp.mean(sample.pooled.num_together),
    ]
    if update is not None:
        step_decrease = jnp.clip(-update * (decrease / jnp.where(mean == 0, 1, mean)), -most, most)
        step_decrease = jnp.where(mean == 0, 0, step_decrease)
        scalars += [scale * jnp.sum(x) for x in (q * step_decrease, step_decrease, (q * update) ** 2, update**2)]
    return jnp.stack([jnp.asarray(scalar, jnp.float32) for scalar in scalars])


def _noise_boundary(mask: Mask, level: Level, blocks: Pooled, moments: Moments) -> jax.Array:
    """The F above which the mask is half open: infinite where it nowhere is, by bisection of a logarithm."""
    dtype = blocks.noise.dtype
    tau = jnp.mean(capped(jnp.asarray(level.tau(blocks.num_together), dtype)))
    least, most = (float(x) for x in (jnp.finfo(dtype).tiny, jnp.finfo(dtype).max / 1e8))
    noise = jnp.clip(jnp.mean(jnp.minimum(blocks.noise, most / max(blocks.noise.size, 1))), least, most)

    def is_open(log_ratio: jax.Array) -> jax.Array:
        return mask.openness(jnp.exp(log_ratio) * noise, noise, tau) >= 0.5

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        opened = is_open(middle)
        return jnp.where(opened, low, middle), jnp.where(opened, middle, high)

    start = jnp.full_like(noise, -15.0), jnp.full_like(noise, 15.0)
    low, high = jax.lax.fori_loop(0, 24, halve, start)
    ratio = jnp.where(is_open(start[0]), 0.0, jnp.where(is_open(start[1]), jnp.exp((low + high) / 2), jnp.inf))
    in_units = jnp.asarray(level.unit, dtype) / jnp.asarray(moments.noise_ratio, dtype)
    return _null_distribution.f_value(ratio * in_units, moments.overlap)
