"""Scikit-learn's handwritten digits: real data that ships inside the package."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits


class Digits(NamedTuple):
    """Training points with clean and corrupted classes, and test points with clean ones."""

    x_s: np.ndarray
    clean_s: np.ndarray
    noisy_s: np.ndarray
    x_q: np.ndarray
    clean_q: np.ndarray


def digits(num_train: int, num_test: int, *, odd_even: bool, label_noise: float, seed: int) -> Digits:
    """A random split, pixels standardised by the training points, and a share of training labels corrupted.

    A pixel that hardly varies in training is divided by 1 of its 16 shades instead of its standard deviation.

    Args:
      num_train, num_test: sizes; together at most 1797.
      odd_even: labels 0 (even) and 1 (odd) instead of the ten digits.
      label_noise: share of training labels replaced by another class, exactly this share up to rounding.
      seed: of split and corruption.
    """
    x, y = (np.asarray(part) for part in load_digits(return_X_y=True))
    if num_train < 1 or num_test < 1 or num_train + num_test > len(y):
        raise ValueError(
            f"{num_train} training and {num_test} test points must be positive and at most {len(y)} in all."
        )
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise={label_noise} must lie in [0, 1].")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    train, test = order[:num_train], order[num_train : num_train + num_test]
    classes, count = (y % 2, 2) if odd_even else (y, 10)
    corrupted = rng.choice(num_train, round(label_noise * num_train), replace=False)
    noisy = classes[train].copy()
    noisy[corrupted] = (noisy[corrupted] + rng.integers(1, count, len(corrupted))) % count
    mean, scale = x[train].mean(0), np.maximum(x[train].std(0), 1.0)
    return Digits((x[train] - mean) / scale, classes[train], noisy, (x[test] - mean) / scale, classes[test])
