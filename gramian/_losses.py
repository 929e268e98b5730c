"""Convex losses of the outputs, with their exact gradient g and Hessian B (theory §1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from entk.internal import matmul

ExampleLoss = Callable[[Array, Array], Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["targets"],
    meta_fields=["example_loss", "name", "isotropic"],
)
@dataclass(frozen=True)
class OutputLoss:
    """Φ(u) = (1/n) Σᵢ ℓ(uᵢ, targetᵢ), a convex loss of the stacked outputs, mean over examples (theory §1).

    Build one with `squared_loss`, `logistic_loss`, `softmax_cross_entropy` or `convex_loss`. It is a pytree: jitted
    functions take it as an argument.

    Attributes:
      targets: one row an example.
      example_loss: ℓ(outputs (c,), target) -> scalar.
      name: what tables and figures call it.
      isotropic: B is the same multiple of the identity everywhere, as for the squared loss.
    """

    targets: Array
    example_loss: ExampleLoss = field(repr=False)
    name: str
    isotropic: bool = False

    def value(self, outputs: Float[Array, "n c"]) -> Float[Array, ""]:
        """Φ(u), a scalar."""
        return jnp.mean(jax.vmap(self.example_loss)(outputs, self.targets))

    def grad(self, outputs: Float[Array, "n c"]) -> Float[Array, " N"]:
        """g = ∇Φ(u), stacked example-major."""
        return jax.vmap(jax.grad(self.example_loss))(outputs, self.targets).reshape(-1) / outputs.shape[0]

    def hessian(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c c"]:
        """The diagonal blocks of B = ∇²Φ(u), one an example; everything else of B is zero."""
        block = _EXACT_HESSIANS.get(self.example_loss) or jax.hessian(self.example_loss)
        return jax.vmap(block)(outputs, self.targets) / outputs.shape[0]

    def curvature(self, outputs: Float[Array, "n c"]) -> Float[Array, ""]:
        """The largest entry of B, here or at outputs of zero: the size against which B may cancel, a scalar.

        A fitted softmax has blocks of 1e-12 which a loss written by hand computes from numbers of the size of 1.
        """
        here, at_zero = (jnp.abs(self.hessian(u)).max() for u in (outputs, jnp.zeros_like(outputs)))
        return jnp.maximum(here, jnp.where(jnp.isfinite(at_zero), at_zero, 0))


def block_product(blocks: Float[Array, "n c c"], matrix: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    """B v for a block-diagonal B: (n, c, c) blocks against (N,) or (N, r)."""
    n, c, _ = blocks.shape
    stacked = matrix.reshape(n, c, -1)
    return matmul(blocks, stacked).reshape(matrix.shape)


def squared_loss(y: Float[Array, "n ..."]) -> OutputLoss:
    """Squared loss Φ = ‖u − y‖²/(2n): g = (u − y)/n, B = I/n (theory §1).

    Args:
      y: real targets, (n,) or (n, c), in the dtype of the outputs.

    Returns:
      An `OutputLoss`.

    Raises:
      TypeError: targets that are not floating-point numbers. ValueError: targets that are not (n,) or (n, c), or not
        finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import squared_loss
      >>> loss = squared_loss(jnp.array([1.0, -1.0]))
      >>> loss.grad(jnp.array([[3.0], [0.0]]))
      Array([1. , 0.5], dtype=float64)
    """
    return OutputLoss(_as_rows(_real_targets(y, "y")), _squared, "squared", isotropic=True)


def _squared(outputs, target):
    return 0.5 * jnp.sum((outputs - target) ** 2)


def logistic_loss(y: Float[Array, " n"]) -> OutputLoss:
    """Logistic loss Φ = (1/n) Σ log(1 + exp(−yᵢuᵢ)) for labels ±1 and one output an example.

    g = −yσ(−yu)/n and B = σ(u)σ(−u)/n, exact and without overflow at any margin.

    Args:
      y: labels −1.0 or 1.0, (n,) or (n, 1), in the dtype of the outputs.

    Returns:
      An `OutputLoss`.

    Raises:
      TypeError: integer labels. ValueError: labels other than ±1, or of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import logistic_loss
      >>> logistic_loss(jnp.array([1.0])).hessian(jnp.zeros((1, 1)))
      Array([[[0.25]]], dtype=float64)
    """
    y = _as_rows(_real_targets(y, "y", "labels of 0 and 1 are mapped by 2.0 * y - 1"))
    if y.shape[1] != 1:
        raise ValueError(
            f"y has shape {y.shape}, but logistic_loss has one output an example: pass labels of shape (n,)."
        )
    if not bool(jnp.all(jnp.abs(y) == 1)):
        raise ValueError(f"y holds {jnp.unique(y)[:5]}, but must hold only -1 and 1: map 0/1 labels by 2 * y - 1.")
    return OutputLoss(y, _logistic, "logistic")


def _logistic(outputs, target):
    return jnp.sum(_softplus(-target * outputs))


# jax.nn.softplus differentiates to 1 - σ, which cancels: at a margin of -30 its second derivative is 1 % off.
@jax.custom_jvp
def _softplus(z):
    return jax.nn.softplus(z)


@jax.custom_jvp
def _sigmoid(z):
    return jax.nn.sigmoid(z)


_softplus.defjvps(lambda tangent, _, z: tangent * _sigmoid(z))
_sigmoid.defjvps(lambda tangent, _, z: tangent * _sigmoid(z) * _sigmoid(-z))


def softmax_cross_entropy(labels: Array) -> OutputLoss:
    """Softmax cross-entropy Φ = −(1/n) Σᵢ log softmax(uᵢ)[labelᵢ], for c ≥ 2 outputs an example.

    g = (π − y)/n and blocks B = (diag π − ππᵀ)/n with π = softmax(u); each block is singular along (1, ..., 1).

    Args:
      labels: integer classes, (n,), or target probabilities, (n, c), in the dtype of the outputs.

    Returns:
      An `OutputLoss`.

    Raises:
      TypeError: labels that are neither integers nor floating-point numbers.
      ValueError: negative classes, probabilities that are negative or do not add up to 1, another shape: integers
        (n, c), as one-hot rows are, and classes as floating-point numbers are not guessed at.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import softmax_cross_entropy
      >>> softmax_cross_entropy(jnp.array([1])).grad(jnp.zeros((1, 2)))
      Array([ 0.5, -0.5], dtype=float64)
    """
    given = _as_array(labels, "labels")
    if np.issubdtype(given.dtype, np.integer):
        if given.ndim != 1:
            raise ValueError(
                f"labels has shape {given.shape} and dtype {given.dtype}; integer classes must have shape (n,): "
                + _class_remedy(given)
            )
        if not given.size:
            raise ValueError("labels is empty; it needs one class for each example.")
        for extreme in (given.min(), given.max()):
            if not 0 <= extreme <= np.iinfo(np.int32).max:
                raise ValueError(
                    f"labels holds {extreme}; classes are counted from 0. Take examples that have no class out of the "
                    "inputs and the labels."
                )
        return OutputLoss(jnp.asarray(given, jnp.int32), _softmax_class, "softmax cross-entropy")
    if given.dtype == bool or given.ndim != 2:
        raise (TypeError if given.dtype == bool else ValueError)(
            f"labels has shape {given.shape} and dtype {given.dtype}; pass integers (n,) or probabilities (n, c): "
            "classes by labels.astype(int), probabilities in the dtype of the outputs."
        )
    rows = _real_targets(given, "labels")
    sums = rows.sum(1)
    if not bool(jnp.all(rows >= 0)) or not bool(jnp.allclose(sums, 1.0, atol=1e-5)):
        raise ValueError(
            "each row of labels must be a probability vector, non-negative and adding up to 1, but entries go from "
            f"{float(rows.min()):.4g} to {float(rows.max()):.4g} and rows add up to {float(sums.min()):.6g} to "
            f"{float(sums.max()):.6g}. Divide each row by its sum, or pass classes as integers (n,)."
        )
    return OutputLoss(rows, _softmax_probabilities, "softmax cross-entropy")


def _class_remedy(labels: np.ndarray) -> str:
    if labels.ndim == 2 and labels.shape[1] == 1:
        return "pass labels[:, 0]."
    if labels.ndim == 2 and labels.min() >= 0 and (labels.sum(1) == 1).all():
        return "its rows are one-hot; pass labels.argmax(1), or labels.astype(float) as probabilities."
    return "pass one class an example, or probabilities (n, c) as floating-point numbers."


def _softmax_class(outputs, label):
    return jax.nn.logsumexp(outputs) - outputs[label]


def _softmax_probabilities(outputs, probabilities):
    return jax.nn.logsumexp(outputs) * jnp.sum(probabilities) - jnp.vdot(probabilities, outputs)


def _class_hessian(outputs, label):
    """diag π − ππᵀ with 1 − π_i as the sum of the others: a fitted example keeps its small curvature, never below 0."""
    pi = jax.nn.softmax(outputs)
    pairs = jnp.outer(pi, pi) * (1 - jnp.eye(len(pi), dtype=pi.dtype))
    return jnp.diag(pairs.sum(1)) - pairs


def _probabilities_hessian(outputs, probabilities):
    return jnp.sum(probabilities) * _class_hessian(outputs, probabilities)


_EXACT_HESSIANS = {_softmax_class: _class_hessian, _softmax_probabilities: _probabilities_hessian}


def convex_loss(example_loss: ExampleLoss, targets: Array) -> OutputLoss:
    """Any convex, twice differentiable loss of the outputs: Φ = (1/n) Σᵢ ℓ(uᵢ, targetᵢ), g and B by autodiff.

    Args:
      example_loss: pure function ℓ(outputs (c,), target) -> scalar, convex in its outputs; static, so define it once.
      targets: one row an example.

    Returns:
      An `OutputLoss`. Convexity is checked where B is used: a negative eigenvalue is refused there.

    Raises:
      TypeError: an example_loss that is not a function. ValueError: targets without a leading axis, or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import convex_loss
      >>> loss = convex_loss(lambda u, y: jnp.sum(jnp.cosh(u - y)), jnp.zeros((1, 1)))
      >>> loss.hessian(jnp.zeros((1, 1)))
      Array([[[1.]]], dtype=float64)
    """
    if not callable(example_loss):
        raise TypeError(
            f"example_loss is a {type(example_loss).__name__}, but must be a function of (outputs (c,), target): "
            "convex_loss(example_loss, targets)."
        )
    rows = _as_array(targets, "targets")
    if rows.ndim == 0:
        raise ValueError(f"targets is a scalar, {rows}; it needs a leading axis of examples.")
    _check_finite(rows, "targets")
    return OutputLoss(jnp.asarray(rows), example_loss, getattr(example_loss, "__name__", "convex"))


def _as_rows(y):
    return y[:, None] if y.ndim == 1 else y


def _as_array(values, name) -> np.ndarray:
    """As NumPy holds it: JAX without 64-bit types would cut integers silently."""
    if callable(values) or isinstance(values, OutputLoss):
        raise TypeError(f"{name} is a {type(values).__name__}, but must be an array with one row an example.")
    array = np.asarray(values)
    if array.dtype.kind in "OUSMmV" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}, but must hold numbers; encode them first.")
    return array


def _real_targets(y, name, remedy=""):
    y = _as_array(y, name)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        cast = f"cast it, e.g. {name}.astype(float)" + (f"; {remedy}." if remedy else ".")
        raise TypeError(f"{name} has dtype {y.dtype}, but real targets are needed; {cast}")
    if y.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {y.shape}, but must be (n,) or (n, c).")
    _check_finite(y, name)
    return jnp.asarray(y)


def _check_finite(y, name):
    finite = jnp.isfinite(jnp.asarray(y)) if jnp.issubdtype(y.dtype, jnp.inexact) else jnp.ones(1, bool)
    if not bool(finite.all()):
        where = ", ".join(map(str, np.unique(np.argwhere(~np.asarray(finite))[:, 0])[:5]))
        raise ValueError(
            f"{name} holds {int(jnp.sum(~finite))} NaN or infinite values, the first in rows {where}; remove or repair "
            "those examples."
        )


def check_loss(loss: Any, name: str = "loss") -> None:
    """Refuses what is no `OutputLoss`, and says what it seems to be."""
    if isinstance(loss, OutputLoss):
        return
    if hasattr(loss, "init") and hasattr(loss, "update"):
        said = "; it looks like an optimizer, which comes after the loss."
    elif callable(loss):
        said = "; a loss holds its targets, so wrap the function: convex_loss(function, targets)."
    else:
        said = "; build it with squared_loss(y) or another gramian loss."
    raise TypeError(f"{name} is a {type(loss).__name__}{said}")


def check_targets(loss: OutputLoss, n: int, c: int, dtype, inputs: str = "x_s", name: str = "loss") -> None:
    """Refuses targets that do not match outputs of shape (n, c) at `inputs`."""
    check_loss(loss, name)
    targets, said = loss.targets, "the loss" if name == "loss" else name
    if targets.shape[0] != n:
        raise ValueError(
            f"{said} has targets for {targets.shape[0]} examples and {inputs} holds {n}; they must match: pass the "
            f"targets of {inputs}."
        )
    if jnp.issubdtype(targets.dtype, jnp.floating) and targets.dtype != dtype:
        raise TypeError(
            f"{said} has targets of dtype {targets.dtype} and the outputs {dtype}; cast the targets, e.g. "
            f"y.astype(jnp.{dtype})."
        )
    if loss.example_loss is _softmax_class:
        if c < 2:
            raise ValueError(f"softmax_cross_entropy needs at least 2 outputs an example, got {c}; use logistic_loss.")
        if int(targets.max()) >= c:
            raise ValueError(
                f"{'labels' if name == 'loss' else f'{name}: labels'} holds class {int(targets.max())}, but apply_fn "
                f"has {c} outputs: 0..{c - 1}. Count classes from 0, or widen the last layer."
            )
    elif loss.example_loss in (_squared, _logistic, _softmax_probabilities) and targets.shape[1:] != (c,):
        raise ValueError(
            f"{said} has targets of shape {targets.shape}, but the outputs have shape ({n}, {c}) at {inputs}; pass one "
            "target for each output."
        )
    value = jax.eval_shape(
        loss.example_loss, jax.ShapeDtypeStruct((c,), dtype), jax.ShapeDtypeStruct(targets.shape[1:], targets.dtype)
    )
    if getattr(value, "shape", None) != ():
        raise ValueError(
            f"example_loss returns {value} for one example, but must return a scalar, e.g. by jnp.sum over its outputs."
        )
    if value.dtype != dtype:
        raise TypeError(
            f"example_loss returns {value.dtype} for outputs of {dtype}; cast its constants and targets so that the "
            "dtype of the outputs is kept."
        )
