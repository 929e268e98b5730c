"""A small Transformer that learns the next character of Python's own manual, which every Python carries."""

from __future__ import annotations

import pydoc_data.topics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.gate._arms import Setting
from experiments.gate._sweep import TINY, Learner, Plan, Problem
from transforms import finite_data_alpha

LENGTH, WIDTH, HEADS, LAYERS = 32, 32, 2, 2


def characters() -> tuple[np.ndarray, int]:
    """The manual's topics as numbers of characters, and how many characters there are."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    alphabet, numbers = np.unique(list(text), return_inverse=True)
    return numbers.astype(np.int32), len(alphabet)


def init(seed: int, vocabulary: int) -> dict[str, Any]:
    rng = np.random.default_rng([2, seed])

    def matrix(a, b, scale=1.0):
        return np.float32(scale / a**0.5) * rng.standard_normal((a, b), np.float32)

    layers = {
        "qkv": np.stack([matrix(WIDTH, 3 * WIDTH) for _ in range(LAYERS)]),
        "mix": np.stack([matrix(WIDTH, WIDTH, 0.5) for _ in range(LAYERS)]),
        "up": np.stack([matrix(WIDTH, 4 * WIDTH) for _ in range(LAYERS)]),
        "down": np.stack([matrix(4 * WIDTH, WIDTH, 0.5) for _ in range(LAYERS)]),
        "norms": np.ones((LAYERS, 2, WIDTH), np.float32),
    }
    return {
        "characters": np.float32(0.5) * rng.standard_normal((vocabulary, WIDTH), np.float32),
        "places": np.float32(0.1) * rng.standard_normal((LENGTH, WIDTH), np.float32),
        "layers": layers,
        "norm": np.ones(WIDTH, np.float32),
        "out": matrix(WIDTH, vocabulary, 0.5),
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    """(n, LENGTH) characters -> (n, LENGTH, vocabulary); each place sees those before it."""
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))

    def norm(x, scale):
        return scale * x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    h = params["characters"][x] + params["places"]
    for k in range(LAYERS):
        layer = jax.tree.map(lambda leaf, k=k: leaf[k], params["layers"])
        qkv = (norm(h, layer["norms"][0]) @ layer["qkv"]).reshape(*x.shape, 3, HEADS, WIDTH // HEADS)
        q, key, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("nihd,njhd->nhij", q, key) / (WIDTH // HEADS) ** 0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), -1)
        h = h + jnp.einsum("nhij,njhd->nihd", weights, v).reshape(h.shape) @ layer["mix"]
        h = h + jax.nn.gelu(norm(h, layer["norms"][1]) @ layer["up"]) @ layer["down"]
    return norm(h, params["norm"]) @ params["out"]


def text(smoke: bool) -> list[Problem]:
    """Trained on 30,000 characters, five times over, judged on later parts of the manual."""
    numbers, vocabulary = characters()
    num_train, batch_size, held_out = (2000, 4, 4) if smoke else (30_000, 16, 100)
    plan = TINY if smoke else Plan(300, (3e-3, 1e-2), (0.01, 1.0), (100,), (0, 1, 2, 3, 4))

    def losses(params: Any, batch: jax.Array) -> jax.Array:
        given, asked = batch[:, :-1], batch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, given), asked).mean(-1)

    def data(seed: int) -> dict[str, np.ndarray]:
        """Another stretch of the manual for each seed; validation and test begin after it."""
        rng = np.random.default_rng([0, seed])
        start = int(rng.integers(0, len(numbers)))
        rolled = np.roll(numbers, -start)
        ahead = rng.integers(0, (len(numbers) - num_train) // 2 - LENGTH - 1, (2, held_out))
        pieces = {"train": rolled[:num_train]}
        for k, part in enumerate(("validation", "test")):
            first = num_train + k * ((len(numbers) - num_train) // 2) + ahead[k]
            pieces[part] = rolled[first[:, None] + np.arange(LENGTH + 1)]
        return pieces

    def stream(seed: int) -> np.ndarray:
        rng = np.random.default_rng([1, seed])
        return rng.integers(0, num_train - LENGTH - 1, (plan.num_steps, batch_size))

    def batch(data: Any, starts: jax.Array) -> jax.Array:
        return data["train"][starts[:, None] + jnp.arange(LENGTH + 1)]

    def evaluate(params: Any, data: Any) -> dict[str, jax.Array]:
        return {part: losses(params, data[part]).mean() for part in ("validation", "test")}

    alpha = float(finite_data_alpha(batch_size, num_train // LENGTH))
    learner = Learner(batch, losses, evaluate, Setting(plan.num_steps, data_noise=alpha), 2 if smoke else 10)
    return [
        Problem(
            name="text-transformer",
            title=f"{num_train:,} characters of Python's manual",
            metric="held-out loss (nats a character)",
            learner=learner,
            plan=plan,
            init=lambda seed: init(seed, vocabulary),
            data=data,
            stream=stream,
            settings={
                "python": f"{sys.version_info.major}.{sys.version_info.minor}",
                "characters": len(numbers),
                "vocabulary": vocabulary,
                "num_train": num_train,
                "batch_size": batch_size,
                "sizes": [LENGTH, WIDTH, HEADS, LAYERS],
                "held_out": held_out,
            },
        )
    ]
