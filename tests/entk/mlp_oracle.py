"""A tanh network three times: in JAX for the library, in NumPy, and its Jacobian derived by hand."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

Params = dict[str, np.ndarray]


def init(seed: int, inputs: int = 3, width: int = 4, outputs: int = 2) -> Params:
    """float64 parameters; the keys are named so that their sorted order is not the order of use."""
    rng = np.random.default_rng(seed)
    return {
        "w_in": rng.normal(size=(inputs, width)),
        "b_in": rng.normal(size=width),
        "w_out": rng.normal(size=(width, outputs)),
        "b_out": rng.normal(size=outputs),
    }


def batch(seed: int, examples: int, inputs: int = 3) -> np.ndarray:
    return np.random.default_rng(seed + 1000).normal(size=(examples, inputs))


def apply_fn(params: dict[str, Array], x: Array) -> Array:
    return jnp.tanh(x @ params["w_in"] + params["b_in"]) @ params["w_out"] + params["b_out"]


def forward(params: Params, x: np.ndarray) -> np.ndarray:
    return np.tanh(x @ params["w_in"] + params["b_in"]) @ params["w_out"] + params["b_out"]


def jacobian_by_hand(params: Params, x: np.ndarray) -> np.ndarray:
    """(n, c, p), the parameter arrays in sorted order of their keys, each flattened by rows."""
    hidden = np.tanh(x @ params["w_in"] + params["b_in"])
    n, c = len(x), params["w_out"].shape[1]
    b_in = (1 - hidden[:, None, :] ** 2) * params["w_out"].T  # (n, c, width)
    b_out = np.broadcast_to(np.eye(c), (n, c, c))
    w_in = x[:, None, :, None] * b_in[:, :, None, :]  # (n, c, inputs, width)
    w_out = hidden[:, None, :, None] * np.eye(c)[:, None, :]  # (n, c, width, c)
    return np.concatenate([block.reshape(n, c, -1) for block in (b_in, b_out, w_in, w_out)], axis=2)


def kernel_by_hand(params: Params, x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    rows, columns = jacobian_by_hand(params, x1), jacobian_by_hand(params, x2)
    return rows.reshape(-1, rows.shape[2]) @ columns.reshape(-1, rows.shape[2]).T


def wavy_fn(params: dict[str, Array], x: Array) -> Array:
    """The sine of the network's outputs.

    The blocks of the network's own kernel are symmetric, K[ia, jb] = K[ib, ja], and cannot tell a from b; these are
    not.
    """
    return jnp.sin(apply_fn(params, x))


def wavy_jacobian_by_hand(params: Params, x: np.ndarray) -> np.ndarray:
    return np.cos(forward(params, x))[:, :, None] * jacobian_by_hand(params, x)


def wavy_kernel_by_hand(params: Params, x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    rows, columns = np.cos(forward(params, x1)).ravel(), np.cos(forward(params, x2)).ravel()
    return rows[:, None] * kernel_by_hand(params, x1, x2) * columns


def complex_step_jacobian(function: Callable[[np.ndarray], np.ndarray], flat: np.ndarray) -> np.ndarray:
    """d function / d flat by ``Im f(w + i h e_j) / h``: no subtraction, so exact to rounding."""
    step = 1e-30
    columns = [np.imag(function(flat + 1j * step * unit)) / step for unit in np.eye(len(flat))]
    return np.stack(columns, axis=-1)


def assert_close(actual: ArrayLike, expected: ArrayLike, tolerance: float = 1e-12) -> None:
    """Largest difference against the largest entry expected; shapes equal, nothing NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-300)
    assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"
