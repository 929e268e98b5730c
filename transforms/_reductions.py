"""Reductions: which coordinates are decided on together (theory §7.3).

A reduction averages squared mean and noise over blocks of coordinates; every coordinate of a block gets the same q.
Where each scalar's statistic is noisy but a block shares its signal, the block knows more.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class Pooled(NamedTuple):
    """What a mask sees of a leaf, broadcastable to its shape.

    Attributes:
      signal: mean of m̂² over the block.
      noise: mean of the noise over the block, in the same unit.
      num_together: independent coordinates that the block is worth, (Σ noise)² / Σ noise² of the estimates; the gate
        corrects it for their degrees of freedom.
    """

    signal: jax.Array
    noise: jax.Array
    num_together: jax.Array


class Reduction(Protocol):
    """Anything with `pool(signal, noise) -> tree of Pooled`, for two trees like the gradients."""

    def pool(self, signal: optax.Updates, noise: optax.Updates, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class PerScalar:
    """Every coordinate is decided on by itself.

    >>> PerScalar().pool(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0])).signal
    Array([1., 3.], dtype=float32)
    """

    def pool(self, signal: optax.Updates, noise: optax.Updates, /) -> Any:
        """`Pooled` at each leaf."""
        return jax.tree.map(lambda s, n: Pooled(s, n, jnp.ones([], n.dtype)), signal, noise)


@dataclasses.dataclass(frozen=True)
class PerRow:
    """One decision for every index along an axis: one output unit of a Flax kernel with the default axis, the last.

    Leaves of one axis or none (biases, scales) are decided on coordinate by coordinate.

    Args:
      axis: the axis that is kept; leaves must have it.

    >>> PerRow().pool(jnp.array([[1.0, 3.0], [3.0, 5.0]]), jnp.ones((2, 2))).signal
    Array([[2., 4.]], dtype=float32)
    """

    axis: int = -1

    def pool(self, signal: optax.Updates, noise: optax.Updates, /) -> Any:
        """`Pooled` at each leaf."""

        def of_leaf(s: jax.Array, n: jax.Array) -> Pooled:
            if n.ndim < 2:
                return Pooled(s, n, jnp.ones([], n.dtype))
            others = tuple(axis for axis in range(n.ndim) if axis != self.axis % n.ndim)
            return _block(s, n, others)

        return jax.tree.map(of_leaf, signal, noise)


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One decision a leaf.

    >>> PerTensor().pool(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0]))
    Pooled(signal=Array([2.], dtype=float32), noise=Array([2.], dtype=float32), num_together=Array([2.], dtype=float32))
    """

    def pool(self, signal: optax.Updates, noise: optax.Updates, /) -> Any:
        """`Pooled` at each leaf."""
        return jax.tree.map(lambda s, n: _block(s, n, tuple(range(n.ndim))), signal, noise)


@dataclasses.dataclass(frozen=True)
class ByLabel:
    """One decision for all leaves of one label.

    Args:
      labels: a tree of labels like the parameters (or a prefix of one), or a function from such a tree to one, as
        `optax.multi_transform` takes them.

    >>> ones = {"embed": jnp.ones(3), "head": jnp.ones(2)}
    >>> pooled = ByLabel({"embed": "all", "head": "all"}).pool({"embed": jnp.zeros(3), "head": jnp.full(2, 5.0)}, ones)
    >>> print(pooled["head"].signal)
    2.0
    """

    labels: Any | Callable[[optax.Updates], Any]

    def pool(self, signal: optax.Updates, noise: optax.Updates, /) -> Any:
        """`Pooled` at each leaf."""
        labels = self.labels(noise) if callable(self.labels) else self.labels
        leaves, treedef = jax.tree.flatten(noise)
        signals = treedef.flatten_up_to(signal)
        names = jax.tree.leaves(jax.tree.broadcast(labels, noise))
        members = {name: [i for i, other in enumerate(names) if other == name] for name in names}

        def of_label(indices: list[int]) -> Pooled:
            dtype = max((leaves[i].dtype for i in indices), key=lambda dtype: jnp.finfo(dtype).bits)

            def all_of(of: Callable[[jax.Array], jax.Array], tree: list[jax.Array]) -> jax.Array:
                return jnp.stack([of(tree[i]).astype(dtype) for i in indices])

            size = max(sum(leaves[i].size for i in indices), 1)
            peak = all_of(lambda noise: jnp.max(noise, initial=0), leaves).max()
            total = all_of(lambda noise: jnp.sum(_relative(noise, peak)), leaves).sum()
            squares = all_of(lambda noise: jnp.sum(_relative(noise, peak) ** 2), leaves).sum()
            return Pooled(all_of(jnp.sum, signals).sum() / size, peak * (total / size), _count(total, squares))

        pooled = {name: of_label(indices) for name, indices in members.items()}
        return jax.tree.unflatten(treedef, [pooled[name] for name in names])


def debiased(num_together: ArrayLike, dof: ArrayLike) -> jax.Array:
    """`Pooled.num_together` without the unevenness that comes of estimating each noise with a few degrees of freedom.

    E (Σ ŝ)² = (Σ σ²)² + 2/dof Σ σ⁴ and E Σ ŝ² = (1 + 2/dof) Σ σ⁴.
    """
    num_together = jnp.asarray(num_together)
    return num_together + (num_together - 1) * 2 / jnp.maximum(jnp.asarray(dof, num_together.dtype), 1)


def _block(signal: jax.Array, noise: jax.Array, axes: tuple[int, ...]) -> Pooled:
    size = max(math.prod(noise.shape[axis] for axis in axes), 1)
    peak = jnp.max(noise, axes, keepdims=True, initial=0)
    total = jnp.sum(_relative(noise, peak), axes, keepdims=True)
    count = _count(total, jnp.sum(_relative(noise, peak) ** 2, axes, keepdims=True))
    return Pooled(jnp.sum(signal, axes, keepdims=True) / size, peak * (total / size), count)


def _relative(noise: jax.Array, peak: jax.Array) -> jax.Array:
    """noise / peak, whose sums do not overflow and whose squares do not underflow as those of a squared gradient do."""
    return noise / jnp.where(peak > 0, peak, 1).astype(noise.dtype)


def _count(total: jax.Array, squares: jax.Array) -> jax.Array:
    """(Σ noise)² / Σ noise², and 1 for a block without noise."""
    return jnp.where(squares > 0, total**2 / jnp.where(squares > 0, squares, 1), 1)
