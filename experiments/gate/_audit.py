"""One step at a time: does the predicted decrease of the population risk, theory (9), come true on held-out data?

For a step −M ḡ with a diagonal M that does not see its own batch, (9) predicts Σ_k M_k (ḡ_k² − Σ_kk/(b−1)) from the
batch alone. Realized is the fall of a held-out loss that nothing else sees: exact for linear regression, that of 10,000
examples elsewhere. M is Adam's, rate / (√v̂ + eps), with v of the steps before; b1 = 0, since (9) speaks of the batch's
own gradient. Beside it, from the same point, a step along m̂, predicted by Σ_k M_k (m̂_k² − c ŝ_k) from the streaming
moments. On replayed data the correction adds b/(n−b) of the variance to what is subtracted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from entk import gradient_moments
from experiments.gate._images import dense_init, mlp
from experiments.gate._regression import losses_of, sample, truth
from transforms import finite_data_alpha

B1, B2, RHO, EPS = 0.9, 0.999, 0.99, 1e-8
BURN_IN = 30


@dataclass(frozen=True)
class AuditProblem:
    """A stream of batches and a held-out loss.

    Attributes:
      title: for tables and figures.
      losses: `(params, batch) -> (b,)`.
      params: where training begins.
      draw: `(rng, size) -> (x, y)` of that leading shape.
      held_out: `(params, test) -> loss`, the population's or that of `num_test` examples.
      rate: of the optimizer.
      num_examples: of which batches are redrawn with replacement; None for fresh ones.
    """

    title: str
    losses: Callable[[Any, Any], jax.Array]
    params: Any
    draw: Callable[[Any, tuple[int, ...]], Any]
    held_out: Callable[[Any, Any], jax.Array]
    rate: float = 1e-3
    num_examples: int | None = None
    num_steps: int = 1000
    num_test: int = 10_000
    batch_size: int = 32


def regression(kind: Literal["linear", "logistic"], seed: int) -> AuditProblem:
    """10 of 50 weights true; the linear model's risk is exact."""
    weights, noise = truth(50, 10, 0.5, seed), 2.0 if kind == "linear" else 0.0

    def held_out(params, test):
        if kind == "linear":
            return ((params - weights) ** 2).sum() / 2
        return losses_of(kind, params, *test).mean()

    return AuditProblem(
        f"{kind} regression",
        lambda params, batch: losses_of(kind, params, *batch),
        np.zeros(50, np.float32),
        lambda rng, size: sample(kind, rng, size, weights, noise),
        held_out,
    )


def network(seed: int) -> AuditProblem:
    """A network 20-32-1 that learns the noisy outputs of another, 20-8-1."""
    target, params = dense_init(seed + 1000, ((20, 8), (8, 1))), dense_init(seed, ((20, 32), (32, 1)))

    def draw(rng, size):
        x = rng.standard_normal((*size, 20), np.float32)
        clean = np.maximum(x @ target[0]["w"], 0) @ target[1]["w"]
        return x, clean[..., 0] + rng.standard_normal(size, np.float32)

    def losses(params, batch):
        return (mlp(params, batch[0])[:, 0] - batch[1]) ** 2 / 2

    return AuditProblem(
        "MLP 20-32-1, squared loss", losses, params, draw, lambda params, test: losses(params, test).mean()
    )


PROBLEMS = {
    "linear": lambda seed: regression("linear", seed),
    "logistic": lambda seed: regression("logistic", seed),
    "network": network,
}


class Steps(NamedTuple):
    """One number a step: what was predicted, and what came of it, for the step along ḡ and for the one along m̂."""

    batch: jax.Array
    batch_corrected: jax.Array
    realized: jax.Array
    first_order: jax.Array
    ema: jax.Array
    ema_corrected: jax.Array
    ema_realized: jax.Array
    ema_first_order: jax.Array


def audit(problem: AuditProblem, seed: int) -> Steps:
    """Trains along M ḡ and predicts every step before it is taken."""
    rng, steps, size = np.random.default_rng([5, seed]), problem.num_steps, problem.batch_size
    test = problem.draw(rng, (problem.num_test,))
    if problem.num_examples is None:
        train, stream = None, problem.draw(rng, (BURN_IN + steps, size))
    else:
        train = problem.draw(rng, (problem.num_examples,))
        stream = rng.integers(0, problem.num_examples, (BURN_IN + steps, size))
    alpha = float(finite_data_alpha(size, problem.num_examples)) if problem.num_examples else 0.0
    smoothing = (1 - B1) / (1 + B1)

    def dot(*trees) -> Any:
        return optax.tree.sum(jax.tree.map(lambda *leaves: functools.reduce(jnp.multiply, leaves), *trees))

    def of_batch(params, item, train):
        batch = item if train is None else jax.tree.map(lambda leaf: leaf[item], train)
        moments = gradient_moments(problem.losses, params, batch)
        variance = optax.tree.scale(1 / (size * (size - 1)), moments.sum_sq_diff_grads)  # of ḡ: Σ/(b−1) of (9)
        return moments.mean_grads, variance

    def fall(params, direction, test):
        """Of the held-out loss for a step along −direction: whole, and its first-order part."""
        here, slope = jax.value_and_grad(problem.held_out)(params, test)
        there = problem.held_out(optax.tree.sub(params, direction), test)
        return here - there, dot(slope, direction)

    @jax.jit
    def run(params, train, stream, test):
        zeros = jax.tree.map(jnp.zeros_like, params)

        def step(carry, item, moves):
            params, v, m, s, count = carry
            grad, variance = of_batch(params, item, train)
            precondition = jax.tree.map(lambda v: problem.rate / (jnp.sqrt(v / (1 - B2 ** (count - 1))) + EPS), v)
            s = jax.tree.map(lambda s, m, g: RHO * s + (1 - RHO) * (g - m) ** 2, s, m, grad)
            m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, m, grad)
            v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g**2, v, grad)
            if not moves:
                return (params, v, m, s, count + 1), None
            m_hat, s_hat = optax.tree.scale(1 / (1 - B1**count), m), optax.tree.scale(1 / (1 - RHO**count), s)
            direction = jax.tree.map(jnp.multiply, precondition, grad)
            smooth = jax.tree.map(jnp.multiply, precondition, m_hat)
            square, smooth_square = dot(precondition, grad, grad), dot(precondition, m_hat, m_hat)
            noise, smooth_noise = dot(precondition, variance), dot(precondition, s_hat)
            found = Steps(
                square - noise,
                square - (1 + alpha) * noise,
                *fall(params, direction, test),
                smooth_square - smoothing * smooth_noise,
                smooth_square - (smoothing + alpha) * smooth_noise,
                *fall(params, smooth, test),
            )
            return (optax.tree.sub(params, direction), v, m, s, count + 1), found

        # The averages begin before the steps do: v of a single batch has coordinates near zero, and M enormous ones.
        before, after = (jax.tree.map(lambda leaf, part=part: leaf[part], stream) for part in (here, there))
        carry = params, zeros, zeros, zeros, jnp.ones((), jnp.float32)
        carry, _ = jax.lax.scan(functools.partial(step, moves=False), carry, before)
        return jax.lax.scan(functools.partial(step, moves=True), carry, after)[1]

    here, there = slice(BURN_IN), slice(BURN_IN, None)
    params = jax.tree.map(jnp.asarray, problem.params)
    return jax.tree.map(np.asarray, run(params, train, stream, test))


def summary(steps: Steps, block: int = 25) -> dict[str, Any]:
    """Correlations and sums of predicted and realized decrease, over the run, its second half and blocks of steps."""
    pairs = {
        "batch": (steps.batch, steps.realized, steps.first_order),
        "batch, corrected": (steps.batch_corrected, steps.realized, steps.first_order),
        "ema": (steps.ema, steps.ema_realized, steps.ema_first_order),
        "ema, corrected": (steps.ema_corrected, steps.ema_realized, steps.ema_first_order),
    }
    return {name: _compare(*pair, block) for name, pair in pairs.items()}


def _compare(predicted: Any, realized: Any, first_order: Any, block: int) -> dict[str, float]:
    half, whole = len(predicted) // 2, len(predicted) // block * block
    predicted, realized, first_order = (np.asarray(a, np.float64) for a in (predicted, realized, first_order))
    means = [a[:whole].reshape(-1, block).mean(1) for a in (predicted, realized)]
    return {
        "correlation": _correlation(predicted, realized),
        "correlation_first_order": _correlation(predicted, first_order),
        "correlation_second_half": _correlation(predicted[half:], realized[half:]),
        "correlation_of_blocks": _correlation(*means),
        "rank_correlation": _correlation(scipy.stats.rankdata(predicted), scipy.stats.rankdata(realized)),
        "predicted_sum": float(predicted.sum()),
        "realized_sum": float(realized.sum()),
        "first_order_sum": float(first_order.sum()),
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])
