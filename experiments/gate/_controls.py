"""Controls: what a gate does besides selecting coordinates, done without selecting, and an older filter of gradients.

A gate with q < 1 shrinks the step, and hides coordinates from it; both are known to help on their own. So each control
runs the gate beside itself, on its own path, and takes from it a single number a step (theory §7.3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transforms import poprisk_gate


def openness(**gate: Any) -> optax.GradientTransformationExtraArgs:
    """q itself as the update: a gate around ones."""
    return poprisk_gate(optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates)), **gate, summary=None)


class NormOfState(NamedTuple):
    """States of the transformation whose direction is taken, and of the one whose norm is."""

    inner: Any
    other: Any


def norm_of(
    inner: optax.GradientTransformation, other: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The direction of `inner` with the norm of `other`, which runs beside it on the same gradients."""
    inner, other = optax.with_extra_args_support(inner), optax.with_extra_args_support(other)

    def init(params):
        return NormOfState(inner.init(params), other.init(params))

    def update(updates, state, params=None, **extra_args):
        beside, other_state = other.update(updates, state.other, params, **extra_args)
        direction, inner_state = inner.update(updates, state.inner, params, **extra_args)
        norm = optax.tree.norm(direction)
        scale = optax.tree.norm(beside) / jnp.where(norm > 0, norm, 1)
        return optax.tree.scale(scale, direction), NormOfState(inner_state, other_state)

    return optax.GradientTransformationExtraArgs(init, update)


class RandomMaskState(NamedTuple):
    """States of the transformation and of the gate beside it, and the source of randomness."""

    inner: Any
    gate: Any
    key: jax.Array


def random_mask(inner: optax.GradientTransformation, seed: Any, **gate: Any) -> optax.GradientTransformationExtraArgs:
    """`inner` on coordinates drawn anew each step, as many as a gate would open: each with probability mean(q)."""
    inner, beside = optax.with_extra_args_support(inner), openness(**gate)

    def init(params):
        return RandomMaskState(inner.init(params), beside.init(params), jax.random.key(seed))

    def update(updates, state, params=None, **extra_args):
        q, gate_state = beside.update(updates, state.gate, params, **extra_args)
        share = optax.tree.sum(q) / optax.tree.size(q)
        key, drawn = jax.random.split(state.key)
        mask = optax.tree.random_like(drawn, q, lambda key, shape, dtype: jax.random.bernoulli(key, share, shape))
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        updates = jax.tree.map(lambda open, update: jnp.where(open, update, 0), mask, updates)
        return updates, RandomMaskState(inner_state, gate_state, key)

    return optax.GradientTransformationExtraArgs(init, update)


def grokfast_ema(decay: Any = 0.98, gain: Any = 2.0) -> optax.GradientTransformation:
    """Grokfast-EMA (Lee et al. 2024, their defaults): g + gain · ema(g), the average starting at the first g."""

    def init(params):
        return jnp.zeros((), bool), jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        del params
        started, average = state
        average = jax.tree.map(lambda a, g: jnp.where(started, decay * a + (1 - decay) * g, g), average, updates)
        return jax.tree.map(lambda g, a: g + gain * a, updates, average), (jnp.ones((), bool), average)

    return optax.GradientTransformation(init, update)
