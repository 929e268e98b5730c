"""Grokking: a · b⁻¹ mod 97 from a part of the table; counted are the steps to 95 % accuracy on the rest.

Learning rate and weight decay are searched for each arm over the same grid, by the steps of three other seeds together.
As a search can only lose once it takes longer than the arm's best so far, it is stopped there: the choice is the same
as without. A run that does not get there within the cap counts with the cap, which favours arms that fail.

The grid is narrow because a first, wider one (learning rates 3e-3 to 1e-1, weight decays 0.3 to 3) found AdamW fastest
inside of it; at the learning rates usual for this task, 1e-3 and below, every arm is far slower. Its weight decays suit
AdamW and gates before it: a decay outside a gate that shrinks the step outweighs the step, so that the failure of gates
on the step is one under the decays that grokking wants at this speed, not at every decay.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.gate._arms import Arm, Hyper, Setting
from transforms import finite_data_alpha

MODULUS, GOAL = 97, 0.95


@dataclass(frozen=True)
class Grokking:
    """Settings.

    Attributes:
      share: of the table, that is trained on.
      embedding, hidden: sizes of the network, 2 × embedding - hidden - 97.
      learning_rates, weight_decays: the grid, in the order in which it is searched.
      cap: steps after which a run counts as failed.
      every: steps between two looks at the held-out accuracy.
      num_held_out: how many of the other entries are looked at.
    """

    share: float
    embedding: int = 64
    hidden: int = 128
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (3e-2, 1e-2, 1e-1)
    weight_decays: tuple[float, ...] = (1.0, 0.5)
    search_cap: int = 1000
    cap: int = 2000
    every: int = 10
    num_held_out: int = 500
    tune_seeds: tuple[int, ...] = (100, 101, 102)
    seeds: tuple[int, ...] = tuple(range(8))
    b2: float = 0.98

    @property
    def num_train(self) -> int:
        return int(self.share * MODULUS * (MODULUS - 1))

    @property
    def grid(self) -> list[tuple[float, float]]:
        return list(itertools.product(self.learning_rates, self.weight_decays))


def table(settings: Grokking, seed: int) -> tuple[Any, Any]:
    """(pairs, results) to train on, and held out."""
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(MODULUS), np.arange(1, MODULUS), indexing="ij"))
    inverse = np.array([pow(k, -1, MODULUS) if k else 0 for k in range(MODULUS)])
    order = np.random.default_rng([0, seed]).permutation(len(a))
    x, y = np.stack([a, b], 1)[order], (a * inverse[b] % MODULUS)[order]
    n, m = settings.num_train, settings.num_train + settings.num_held_out
    return (x[:n], y[:n]), (x[n:m], y[n:m])


def init(settings: Grokking, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([2, seed])
    e, h = settings.embedding, settings.hidden
    return {
        "a": rng.standard_normal((MODULUS, e), np.float32),
        "b": rng.standard_normal((MODULUS, e), np.float32),
        "in": rng.standard_normal((2 * e, h), np.float32) / np.float32((2 * e) ** 0.5),
        "bias": np.zeros(h, np.float32),
        "out": rng.standard_normal((h, MODULUS), np.float32) / np.float32(h**0.5),
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    both = jnp.concatenate([params["a"][x[:, 0]], params["b"][x[:, 1]]], 1)
    return jax.nn.relu(both @ params["in"] + params["bias"]) @ params["out"]


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


@functools.lru_cache(maxsize=4)
def compiled(settings: Grokking, arm: Arm) -> tuple[Callable, Callable]:
    """`begin(hyper, params) -> state`, and `advance(hyper, params, state, rows, train, held_out)`."""
    alpha = float(finite_data_alpha(settings.batch_size, settings.num_train))
    setting = Setting(settings.cap, settings.b2, alpha)

    @jax.jit
    def begin(hyper, params):
        return arm.build(hyper, setting).init(params)

    @jax.jit
    def advance(hyper, params, state, rows, train, held_out):
        optimizer = arm.build(hyper, setting)

        def step(carry, row):
            params, state = carry
            grads = jax.grad(loss)(params, train[0][row], train[1][row])
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, state), rows)
        return params, state, (logits(params, held_out[0]).argmax(-1) == held_out[1]).mean()

    return begin, advance


def steps_to_goal(
    settings: Grokking, arm: Arm, hyper: tuple[float, float], seed: int, cap: int, tick: Callable[[int], None]
) -> tuple[int, list[float]]:
    """Steps until 95 % of the held-out entries are right, at most `cap`; and the accuracies on the way."""
    begin, advance = compiled(settings, arm)
    swept = Hyper(np.float32(hyper[0]), np.float32(hyper[1]), np.uint32(seed))
    train, held_out = jax.device_put(table(settings, seed))
    params, rng = jax.device_put(init(settings, seed)), np.random.default_rng([1, seed])
    state, accuracies = begin(swept, params), []
    while len(accuracies) * settings.every < cap:
        rows = rng.integers(0, settings.num_train, (settings.every, settings.batch_size))
        params, state, accuracy = advance(swept, params, state, rows, train, held_out)
        accuracies.append(round(float(accuracy), 3))
        tick(settings.every)
        if accuracies[-1] >= GOAL:
            break
    return len(accuracies) * settings.every, accuracies


def measure(settings: Grokking, arm: Arm, tick: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """The arm's best learning rate and weight decay, and its steps with them on the reported seeds."""
    start = time.perf_counter()
    most = settings.search_cap * len(settings.tune_seeds)
    best, chosen, closest, searched = most, settings.grid[0], -1.0, {}
    for hyper in settings.grid:
        total, reached = 0, []
        for seed in settings.tune_seeds:
            if total < best:
                cap = min(settings.search_cap, best - total)
                steps, accuracies = steps_to_goal(settings, arm, hyper, seed, cap, tick)
                total += steps
                reached.append(accuracies[-1])
        searched[f"lr {hyper[0]:g}, wd {hyper[1]:g}"] = {"steps": total, "accuracy": min(reached)}
        # While none has taken fewer steps than the cap allows, the most accurate one leads.
        if total < best or (best == most and min(reached) > closest):
            chosen, closest, best = hyper, min(reached), min(total, best)
    runs = [steps_to_goal(settings, arm, chosen, seed, settings.cap, tick) for seed in settings.seeds]
    return {
        "learning_rate": chosen[0],
        "weight_decay": chosen[1],
        "searched": searched,
        "steps": [steps for steps, _ in runs],
        "reached": [accuracies[-1] >= GOAL for _, accuracies in runs],
        "accuracies": [accuracies for _, accuracies in runs],
        "seconds": round(time.perf_counter() - start, 1),
    }
