"""Which coordinates a hard gate opens, where it is known which carry signal.

At the start of a linear regression (w = 0) the mean gradient is −w*: signal on 10 of 100 coordinates, none on the
others. The gate watches 200 batches there without a step being taken. Opened signal coordinates are its recall; what
share of the opened ones carry signal, its precision; what share of the others is opened is promised by the threshold.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from entk import gradient_moments
from experiments.gate._controls import openness
from experiments.gate._regression import losses_of, sample, truth
from transforms import Alpha, HardMask, TStatistic, batch_statistic, ema_statistic, finite_data_alpha

DIMENSION, SUPPORT, BATCH, NOISE = 100, 10, 32, 2.0
LEVELS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def detect(smoke: bool) -> dict[str, Any]:
    """Precision, recall and share of noise opened, by data, statistic and threshold."""
    seeds, steps = (2, 20) if smoke else (100, 200)
    found: dict[str, Any] = {}
    for num_train in (None, 300):
        alpha = float(finite_data_alpha(BATCH, num_train)) if num_train else 0.0
        cases: dict[str, Any] = {"streaming": (partial(ema_statistic, data_noise=alpha), TStatistic, LEVELS)}
        if num_train:
            cases["streaming, data noise ignored"] = ema_statistic, TStatistic, LEVELS
        cases["exact batch"] = batch_statistic, TStatistic, LEVELS
        cases["Algorithm 1, α = 1"] = ema_statistic, Alpha, (1.0,)
        if num_train:
            cases["Algorithm 1, α = b/(n−b)"] = ema_statistic, Alpha, (alpha,)
        found["replayed" if num_train else "fresh"] = {
            name: _case(statistic, threshold, levels, num_train, seeds, steps)
            for name, (statistic, threshold, levels) in cases.items()
        }
    return {"seeds": seeds, "batches": steps, "data": found}


def _case(statistic: Any, threshold: Any, levels: tuple[float, ...], num_train: int | None, seeds: int, steps: int):
    def opened(stream, train, level) -> Any:
        gate = openness(statistic=statistic(), threshold=threshold(level), mask=HardMask())
        params = jnp.zeros(DIMENSION)

        def step(state, item):
            batch = item if train is None else jax.tree.map(lambda leaf: leaf[item], train)
            moments = gradient_moments(_losses, params, batch)
            q, state = gate.update(moments.mean_grads, state, params, **moments._asdict())
            return state, q

        q: Any = jax.lax.scan(step, gate.init(params), stream)[1]
        return q[-1]

    run = jax.jit(jax.vmap(opened, (None, None, 0)))
    open_, signal = [], []
    for seed in range(seeds):
        rng, weights = np.random.default_rng([6, seed]), truth(DIMENSION, SUPPORT, 0.5, seed)
        if num_train is None:
            train, stream = None, sample("linear", rng, (steps, BATCH), weights, NOISE)
        else:
            train = sample("linear", rng, (num_train,), weights, NOISE)
            stream = rng.integers(0, num_train, (steps, BATCH))
        open_.append(np.asarray(run(stream, train, jnp.asarray(levels))) > 0)
        signal.append(weights != 0)
    opens, signals = np.stack(open_, 1), np.stack(signal)  # (level, seed, coordinate), (seed, coordinate)
    hits, opened_count = (opens & signals).sum((1, 2)), opens.sum((1, 2))
    return {
        "level": list(levels),
        "precision": [float(h / n) if n else None for h, n in zip(hits, opened_count, strict=True)],
        "recall": (hits / signals.sum()).tolist(),
        "noise_open": ((opens & ~signals).sum((1, 2)) / (~signals).sum()).tolist(),
    }


def _losses(params: Any, batch: Any) -> jax.Array:
    return losses_of("linear", params, *batch)
