"""Linear and logistic regression with few true weights: which coordinates carry signal is known, the risk exact.

For x ~ N(0, I) the mean gradient of a linear model is w − w*, and its excess test MSE |w − w*|². `sparse` is snr-grad's
own benchmark, with every optimizer tuned.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np
import optax

from experiments.gate._arms import Setting
from experiments.gate._sweep import TINY, Learner, Plan, Problem
from transforms import finite_data_alpha

DECAYS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
Kind = Literal["linear", "logistic"]


def truth(dimension: int, support: int, scale: float, seed: int) -> np.ndarray:
    """True weights: `support` of them ~ scale · N(0, 1), the others zero."""
    rng = np.random.default_rng(seed)
    weights = np.zeros(dimension, np.float32)
    weights[rng.permutation(dimension)[:support]] = scale * rng.standard_normal(support)
    return weights


def sample(kind: Kind, rng: np.random.Generator, size: tuple[int, ...], weights: np.ndarray, noise: float) -> Any:
    """(x, y) with x ~ N(0, I); y = x @ w* + noise, or classes with the odds of the logistic model."""
    x = rng.standard_normal((*size, len(weights)), np.float32)
    scores = x @ weights
    if kind == "linear":
        return x, scores + np.float32(noise) * rng.standard_normal(size, np.float32)
    return x, (rng.random(size) < 1 / (1 + np.exp(-scores))).astype(np.float32)


def losses_of(kind: Kind, params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    scores = x @ params
    return (scores - y) ** 2 / 2 if kind == "linear" else optax.sigmoid_binary_cross_entropy(scores, y)


def regression(
    name: str,
    title: str,
    plan: Plan,
    *,
    kind: Kind = "linear",
    dimension: int,
    support: int,
    scale: float,
    noise: float,
    num_train: int | None,
    num_validation: int,
    redraw: bool,
    batch_size: int = 32,
    checkpoints: int = 20,
) -> Problem:
    """Batches drawn with replacement from `num_train` examples, or fresh ones (None).

    The true weights are the same for every seed unless `redraw`; the data are always the seed's own.
    """

    def data(seed: int) -> dict[str, Any]:
        rng, weights = np.random.default_rng([0, seed]), truth(dimension, support, scale, seed if redraw else 0)
        made = {"truth": weights, "validation": sample(kind, rng, (num_validation,), weights, noise)}
        if num_train:
            made["train"] = sample(kind, rng, (num_train,), weights, noise)
        if kind == "logistic":  # has no closed form of the risk
            made["test"] = sample(kind, rng, (20_000,), weights, noise)
        return made

    def stream(seed: int) -> Any:
        rng, size = np.random.default_rng([1, seed]), (plan.num_steps, batch_size)
        if num_train:
            return rng.integers(0, num_train, size)
        return sample(kind, rng, size, truth(dimension, support, scale, seed if redraw else 0), noise)

    def batch(data: Any, item: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[item], data["train"]) if num_train else item

    def evaluate(params: jax.Array, data: Any) -> dict[str, jax.Array]:
        def loss(params, part):
            return losses_of(kind, params, *data[part]).mean()

        if kind == "linear":
            test = ((params - data["truth"]) ** 2).sum()
            return {"validation": 2 * loss(params, "validation") - noise**2, "test": test}
        return {
            "validation": loss(params, "validation"),
            "test": loss(params, "test") - loss(data["truth"], "test"),
        }

    alpha = float(finite_data_alpha(batch_size, num_train)) if num_train else 0.0
    return Problem(
        name=name,
        title=title,
        metric="excess test MSE" if kind == "linear" else "excess test loss (nats)",
        learner=Learner(
            batch,
            lambda params, batch: losses_of(kind, params, *batch),
            evaluate,
            Setting(plan.num_steps, data_noise=alpha),
            checkpoints,
        ),
        plan=plan,
        init=lambda seed: np.zeros(dimension, np.float32),
        data=data,
        stream=stream,
        settings={
            "kind": kind,
            "dimension": dimension,
            "support": support,
            "scale": scale,
            "noise": noise,
            "batch_size": batch_size,
            "num_train": num_train,
            "num_validation": num_validation,
            "redraw": redraw,
        },
    )


def sparse(smoke: bool) -> list[Problem]:
    """snr-grad's benchmark: 5 of 200 weights true, 100 noisy examples, 5,000 steps."""
    plan = TINY if smoke else Plan(5000, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), DECAYS)
    common: dict[str, Any] = {"dimension": 200, "support": 5, "scale": 3.0, "noise": 3.0}
    made = []
    for redraw in (False, True)[smoke:]:
        made.append(
            regression(
                f"sparse-{'redrawn' if redraw else 'fixed'}",
                f"5 of 200 weights, {'redrawn for each seed' if redraw else 'the same for all seeds'}",
                plan,
                num_train=100,
                num_validation=100,
                redraw=redraw,
                checkpoints=2 if smoke else 50,
                **common,
            )
        )
    return made


def synthetic(smoke: bool) -> list[Problem]:
    """Linear and logistic regression, 10 of 100 weights true, fresh batches and 300 examples."""
    plan = TINY if smoke else Plan(1000, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), DECAYS)
    kinds: tuple[tuple[Kind, float], ...] = (("linear", 2.0), ("logistic", 0.0))
    made = []
    for kind, noise in kinds[:1] if smoke else kinds:
        for num_train in (None, 300):
            made.append(
                regression(
                    f"{kind}-{'replayed' if num_train else 'fresh'}",
                    f"{kind}, {f'n = {num_train}' if num_train else 'fresh batches'}",
                    plan,
                    kind=kind,
                    dimension=100,
                    support=10,
                    scale=0.5,
                    noise=noise,
                    num_train=num_train,
                    num_validation=300,
                    redraw=True,
                    checkpoints=2 if smoke else 20,
                )
            )
    return made
