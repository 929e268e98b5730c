"""Convex losses of the outputs, with their exact gradient g and Hessian B (theory §1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
        return jax.vmap(jax.hessian(self.example_loss))(outputs, self.targets) / outputs.shape[0]


def block_product(blocks: Float[Array, "n c c"], matrix: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    """B v for a block-diagonal B: (n, c, c) blocks against (N,) or (N, r)."""
    n, c, _ = blocks.shape
    stacked = matrix.reshape(n, c, -1)
    return jnp.matmul(blocks, stacked, precision=jax.lax.Precision.HIGHEST).reshape(matrix.shape)


def squared_loss(y: Float[Array, "n ..."]) -> OutputLoss:
    """Squared loss Φ = ‖u − y‖²/(2n): g = (u − y)/n, B = I/n (theory §1).

    Args:
      y: real targets, (n,) or (n, c), in the dtype of the outputs.

    Returns:
      An `OutputLoss`.

    Raises:
      TypeError: integer targets. ValueError: targets that are not (n,) or (n, c), or not finite.

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
    y = _as_rows(_real_targets(y, "y"))
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
      ValueError: negative classes, probabilities that are negative or do not add up to 1, another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import softmax_cross_entropy
      >>> softmax_cross_entropy(jnp.array([1])).grad(jnp.zeros((1, 2)))
      Array([ 0.5, -0.5], dtype=float64)
    """
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.ndim != 1:
            raise ValueError(f"labels has shape {labels.shape}; integer classes must have shape (n,).")
        if bool(jnp.any(labels < 0)):
            raise ValueError(f"labels holds {int(labels.min())}; classes are counted from 0.")
        return OutputLoss(labels, _softmax_class, "softmax cross-entropy")
    labels = _real_targets(labels, "labels")
    if labels.ndim != 2:
        raise ValueError(
            f"labels has shape {labels.shape} and dtype {labels.dtype}; pass integers (n,) or probabilities (n, c)."
        )
    if not bool(jnp.all(labels >= 0)) or not bool(jnp.allclose(labels.sum(1), 1.0, atol=1e-5)):
        raise ValueError("each row of labels must be a probability vector: non-negative and adding up to 1.")
    return OutputLoss(labels, _softmax_probabilities, "softmax cross-entropy")


def _softmax_class(outputs, label):
    return jax.nn.logsumexp(outputs) - outputs[label]


def _softmax_probabilities(outputs, probabilities):
    return jax.nn.logsumexp(outputs) * jnp.sum(probabilities) - jnp.vdot(probabilities, outputs)


def convex_loss(example_loss: ExampleLoss, targets: Array) -> OutputLoss:
    """Any convex, twice differentiable loss of the outputs: Φ = (1/n) Σᵢ ℓ(uᵢ, targetᵢ), g and B by autodiff.

    Args:
      example_loss: pure function ℓ(outputs (c,), target) -> scalar, convex in its outputs; static, so define it once.
      targets: one row an example.

    Returns:
      An `OutputLoss`. Convexity is checked where B is used: a negative eigenvalue is refused there.

    Raises:
      ValueError: targets without a leading axis, or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import convex_loss
      >>> loss = convex_loss(lambda u, y: jnp.sum(jnp.cosh(u - y)), jnp.zeros((1, 1)))
      >>> loss.hessian(jnp.zeros((1, 1)))
      Array([[[1.]]], dtype=float64)
    """
    targets = jnp.asarray(targets)
    if targets.ndim == 0:
        raise ValueError("targets is a scalar; it needs a leading axis of examples.")
    _check_finite(targets, "targets")
    return OutputLoss(targets, example_loss, getattr(example_loss, "__name__", "convex"))


def _as_rows(y):
    return y[:, None] if y.ndim == 1 else y


def _real_targets(y, name):
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {y.dtype}, but real targets are needed; cast it, e.g. {name}.astype(float).")
    if y.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {y.shape}, but must be (n,) or (n, c).")
    _check_finite(y, name)
    return y


def _check_finite(y, name):
    if jnp.issubdtype(y.dtype, jnp.inexact) and not bool(jnp.all(jnp.isfinite(y))):
        bad = int(jnp.sum(~jnp.isfinite(y)))
        raise ValueError(f"{name} holds {bad} NaN or infinite values; remove or repair those examples.")


def check_targets(loss: OutputLoss, n: int, c: int, dtype) -> None:
    """Refuses targets that do not match outputs of shape (n, c)."""
    targets = loss.targets
    if targets.shape[0] != n:
        raise ValueError(f"the loss has targets for {targets.shape[0]} examples and x_s holds {n}; they must match.")
    if jnp.issubdtype(targets.dtype, jnp.floating) and targets.dtype != dtype:
        raise TypeError(f"the loss has targets of dtype {targets.dtype} and the outputs {dtype}; cast the targets.")
    if loss.example_loss is _softmax_class:
        if c < 2:
            raise ValueError(f"softmax_cross_entropy needs at least 2 outputs an example, got {c}; use logistic_loss.")
        if int(targets.max()) >= c:
            raise ValueError(f"labels holds class {int(targets.max())}, but apply_fn has {c} outputs: 0..{c - 1}.")
    elif loss.example_loss in (_squared, _logistic, _softmax_probabilities) and targets.shape[1:] != (c,):
        raise ValueError(f"the loss has targets of shape {targets.shape}, but the outputs have shape ({n}, {c}).")
    value = jax.eval_shape(
        loss.example_loss, jax.ShapeDtypeStruct((c,), dtype), jax.ShapeDtypeStruct(targets.shape[1:], targets.dtype)
    )
    if getattr(value, "shape", None) != ():
        raise ValueError(f"example_loss returns {value} for one example, but must return a scalar.")
