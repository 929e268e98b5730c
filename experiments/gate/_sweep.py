"""A sweep: learning rate and weight decay chosen for each arm alike, then reported on other seeds.

One compiled run serves every learning rate, weight decay and seed of an arm, and every problem of its learner; runs
follow one another. (One `vmap` over all of them is slower here: the batched products of small networks leave the cache,
and cost more than the calls they save.)
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from entk import gradient_moments
from experiments.gate._arms import Arm, Hyper, Setting
from transforms import LeafSummary, PopriskGateState

DIVERGED = 1e9  # stands for a metric that is not finite: JSON has no infinity
STOPS = ("early", "end")


@dataclass(frozen=True, eq=False)
class Learner:
    """What is compiled: problems that differ in their data alone share it.

    Attributes:
      batch: `(data, item) -> batch`, with one item of the problem's stream.
      losses: `(params, batch) -> (b,)`, one loss an example.
      evaluate: `(params, data) -> {"validation": , "test": , ...}`, lower is better.
      setting: what all arms are given.
      checkpoints: how often a run is judged, evenly, the last time at its end.
    """

    batch: Callable[[Any, Any], Any]
    losses: Callable[[Any, Any], jax.Array]
    evaluate: Callable[[Any, Any], dict[str, jax.Array]]
    setting: Setting
    checkpoints: int


@dataclass(frozen=True)
class Plan:
    """How hard a problem is searched. Reported seeds and those of the search are different ones."""

    num_steps: int
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    tune_seeds: tuple[int, ...] = (100, 101, 102)
    seeds: tuple[int, ...] = tuple(range(10))

    @property
    def grid(self) -> list[tuple[float, float]]:
        return list(itertools.product(self.learning_rates, self.weight_decays))


TINY = Plan(20, (3e-3,), (0.1,), tune_seeds=(100,), seeds=(0, 1))


@dataclass(frozen=True)
class Problem:
    """What is learned.

    Attributes:
      name, title: in files; in figures.
      metric: what "test" is, with its unit.
      init, data: parameters and arrays of a seed.
      stream: what the steps of a seed's run draw: a tree whose leaves have num_steps rows.
      settings: what else decides the outcome, for the files.
    """

    name: str
    title: str
    metric: str
    learner: Learner
    plan: Plan
    init: Callable[[int], Any]
    data: Callable[[int], Any]
    stream: Callable[[int], Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def replayed(self) -> bool:
        """Whether batches are redrawn from a fixed set."""
        return self.learner.setting.data_noise > 0

    def described(self) -> dict[str, Any]:
        """Everything that decides an outcome, as JSON."""
        return {
            **self.settings,
            **vars(self.plan),
            "checkpoints": self.learner.checkpoints,
            **self.learner.setting._asdict(),
        }


def measure(problem: Problem, arm: Arm, tick: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """The arm's choice of hyper-parameters, and its runs with them on the reported seeds.

    Chosen twice, by the validation metric's mean over seeds: with early stopping, where each run counts at the
    checkpoint at which its own validation metric is lowest, and at the end of training.

    Args:
      tick: told after every run how many are done.

    Returns:
      A dict ready for JSON: for "early" and "end" the choice, the validation metric of the whole grid, every metric on
      each reported seed, and the mean test curve; seconds.
    """
    start, plan = time.perf_counter(), problem.plan
    tuned = [[run(problem, arm, *hyper, seed, tick)["validation"] for seed in plan.tune_seeds] for hyper in plan.grid]
    validation = np.asarray(tuned)  # (hyper-parameters, seed, checkpoint)
    scores = {"early": validation.min(-1).mean(1), "end": validation[..., -1].mean(1)}
    chosen = {stop: plan.grid[int(score.argmin())] for stop, score in scores.items()}
    final = {hyper: [run(problem, arm, *hyper, seed, tick) for seed in plan.seeds] for hyper in set(chosen.values())}
    result: dict[str, Any] = {}
    for stop, hyper in chosen.items():
        runs = final[hyper]
        at = [int(one["validation"].argmin()) if stop == "early" else len(one["validation"]) - 1 for one in runs]
        result[stop] = {
            "learning_rate": hyper[0],
            "weight_decay": hyper[1],
            "at_border": at_border(plan, hyper),
            "grid": scores[stop].tolist(),
            "steps": [(k + 1) * plan.num_steps // problem.learner.checkpoints for k in at],
            **{name: [float(one[name][k]) for one, k in zip(runs, at, strict=True)] for name in runs[0]},
            "curve": np.mean([one["test"] for one in runs], 0).tolist(),
        }
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def at_border(plan: Plan, hyper: tuple[float, float]) -> list[str]:
    """Which choices lie on the edge of their grid, where a value outside might be better still (0 is no edge)."""
    edges = []
    for name, values, value in zip(("lr", "wd"), (plan.learning_rates, plan.weight_decays), hyper, strict=True):
        if len(values) > 1 and value and value in (min(values), max(values)):
            edges.append(name)
    return edges


def run(
    problem: Problem,
    arm: Arm,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """Metrics of one run at its checkpoints."""
    hyper = Hyper(np.float32(learning_rate), np.float32(weight_decay), np.uint32(seed))
    found = compiled(problem.learner, arm)(hyper, problem.init(seed), *drawn(problem, seed))
    tick(1)
    return {name: np.nan_to_num(values, nan=DIVERGED, posinf=DIVERGED) for name, values in found.items()}


_DRAWN: dict[Any, Any] = {}


def drawn(problem: Problem, seed: int) -> tuple[Any, Any]:
    """Data and stream of a seed, on the device; the last 64 are kept, for the next arm."""
    key = problem.name, json_key(problem.described()), seed
    if key not in _DRAWN:
        if len(_DRAWN) >= 64:
            _DRAWN.pop(next(iter(_DRAWN)))
        checkpoints = problem.learner.checkpoints
        stream = jax.tree.map(lambda leaf: leaf.reshape(checkpoints, -1, *leaf.shape[1:]), problem.stream(seed))
        _DRAWN[key] = jax.device_put((problem.data(seed), stream))
    return _DRAWN[key]


def json_key(settings: dict[str, Any]) -> str:
    return repr(sorted(settings.items()))


@functools.lru_cache(maxsize=4)
def compiled(learner: Learner, arm: Arm) -> Callable:
    """`(hyper, params, data, stream) -> metrics`, each of shape (checkpoints,)."""

    @jax.jit
    def train(hyper, params, data, stream):
        optimizer = optax.with_extra_args_support(arm.build(hyper, learner.setting))

        def step(carry, item):
            params, state = carry
            grads, extra = gradient(learner.losses, params, learner.batch(data, item), arm.exact)
            updates, state = optimizer.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        def to_checkpoint(carry, items):
            carry, _ = jax.lax.scan(step, carry, items)
            return carry, {**learner.evaluate(carry[0], data), **openness(carry[1])}

        params = jax.tree.map(jnp.asarray, params)
        return jax.lax.scan(to_checkpoint, (params, optimizer.init(params)), stream)[1]

    return train


def openness(state: Any) -> dict[str, jax.Array]:
    """Mean q of the last step, where the optimizer has a gate."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, PopriskGateState))
    summaries = [node.summary for node in nodes if isinstance(node, PopriskGateState)]
    rows = [rows for rows in summaries if rows is not None]
    if not rows:
        return {}
    gates = LeafSummary(*jnp.concatenate(rows).T)
    return {"open": jnp.sum(jnp.asarray(gates.sum_openness)) / jnp.sum(jnp.asarray(gates.size))}


def gradient(losses: Callable, params: Any, batch: Any, exact: bool) -> tuple[Any, dict[str, Any]]:
    """The batch gradient, and, for an exact gate, the moments it takes as extra arguments."""
    if not exact:
        return jax.grad(lambda params: losses(params, batch).mean())(params), {}
    moments = gradient_moments(losses, params, batch)
    return moments.mean_grads, moments._asdict()
