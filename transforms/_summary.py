"""What the gate of one step did, leaf by leaf: the scalars that `gate_report` shows."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from transforms import _null, _validation
from transforms._masks import Mask
from transforms._reductions import Pooled
from transforms._statistic import Moments
from transforms._thresholds import Level


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a gate's state keeps for `gate_report`: twelve numbers a leaf.

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

        def part(leaf: jax.Array) -> jax.Array:
            if self.sample is None or size <= self.sample or leaf.ndim == 0:
                return leaf
            step = math.ceil((size / self.sample) ** (1 / len(shape)))
            return jnp.broadcast_to(leaf, shape)[(slice(None, None, step),) * len(shape)]

        update = part(update) if self.of_step else jnp.full([], jnp.nan, mean.dtype)
        return Sample(size, update, part(mean), part(variance), Pooled(*map(part, pooled)))


class Sample(NamedTuple):
    """Some coordinates of a leaf, before it is decided whether they are summarized."""

    leaf_size: int
    update: jax.Array
    mean: jax.Array
    variance: jax.Array
    pooled: Pooled


class LeafSummary(NamedTuple):
    """Scalars of one leaf at one step. A gate's state holds them packed in one array: `LeafSummary(*array)`.

    Attributes:
      size: coordinates.
      num_open: coordinates with q >= 1/2.
      sum_openness: Σ q.
      decrease: Σ q (m̂² - Var m̂), equation (9) with M = diag(q): the estimated first-order decrease of the population
        risk by the gated gradient step -η q ⊙ m̂, in units of the loss per unit of η.
      ungated_decrease: the same with q = 1.
      step_decrease: Σ -q u (m̂ - Var m̂/m̂), equation (9) with M = -q u/m̂ for the gated step q ⊙ u of `inner`, in units of
        the loss. It holds where M does not depend on this batch (Adam with its own m, SGD with the batch's own mean);
        elsewhere it is an approximation. NaN without `Summary(of_step=True)`, like the next three.
      ungated_step_decrease: the same with q = 1.
      squared_norm: Σ (q u)², squared length of the gated step.
      ungated_squared_norm: Σ u².
      noise_boundary: the F = t² above which q >= 1/2, as far as the mask tells; averaged over the leaf's blocks.
      dof: degrees of freedom of the noise.
      num_together: independent coordinates a block is worth, averaged over the leaf's blocks.
    """

    size: ArrayLike
    num_open: ArrayLike
    sum_openness: ArrayLike
    decrease: ArrayLike
    ungated_decrease: ArrayLike
    step_decrease: ArrayLike
    ungated_step_decrease: ArrayLike
    squared_norm: ArrayLike
    ungated_squared_norm: ArrayLike
    noise_boundary: ArrayLike
    dof: ArrayLike
    num_together: ArrayLike


def no_summary(params: optax.Params) -> Any:
    """A tree like params with a `LeafSummary` of zeros at each leaf: no step was taken yet."""

    def of_leaf(leaf: ArrayLike) -> jax.Array:
        zeros = LeafSummary(*(0.0 for _ in LeafSummary._fields))
        return _packed(zeros._replace(size=jnp.size(leaf)))

    return jax.tree.map(of_leaf, params)


def _packed(summary: LeafSummary) -> jax.Array:
    """One array of its scalars: a leaf in a state's tree, where a NamedTuple would not survive `nnx.Optimizer`."""
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in summary])


def summary_of(
    sample: Sample, openness: Callable[[Pooled], jax.Array], level: Level, mask: Mask, moments: Moments
) -> jax.Array:
    """The summary of one leaf.

    q is computed anew on the sample: a second reader of the whole q would make a compiled step store it.
    """
    mean, update = sample.mean, sample.update.astype(sample.mean.dtype)
    q = jnp.broadcast_to(openness(sample.pooled), mean.shape)
    noise = moments.noise_ratio * sample.variance
    decrease = mean**2 - noise
    step_decrease = -update * decrease / jnp.where(mean == 0, jnp.inf, mean)
    scale = sample.leaf_size / max(mean.size, 1)
    scalars = {
        "size": sample.leaf_size,
        "num_open": scale * jnp.sum(q >= 0.5),
        "sum_openness": scale * jnp.sum(q),
        "decrease": scale * jnp.sum(q * decrease),
        "ungated_decrease": scale * jnp.sum(decrease),
        "step_decrease": scale * jnp.sum(q * step_decrease),
        "ungated_step_decrease": scale * jnp.sum(step_decrease),
        "squared_norm": scale * jnp.sum((q * update) ** 2),
        "ungated_squared_norm": scale * jnp.sum(update**2),
        "noise_boundary": _noise_boundary(mask, level, sample.pooled, moments),
        "dof": moments.dof,
        "num_together": jnp.mean(sample.pooled.num_together),
    }
    return _packed(LeafSummary(**scalars))


def _noise_boundary(mask: Mask, level: Level, blocks: Pooled, moments: Moments) -> jax.Array:
    """The F above which the mask is half open: infinite where it nowhere is, by bisection of a logarithm."""
    tau, noise = jnp.mean(level.tau(blocks.num_together)), jnp.mean(blocks.noise)
    noise = jnp.maximum(noise, jnp.finfo(noise.dtype).tiny)

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
    return _null.f_value(ratio * level.unit / moments.noise_ratio, moments.overlap)
