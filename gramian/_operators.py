"""The propagator, the dissipation Gramian, the displacement and the test transfer, accumulated step by step."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from entk.internal import matmul
from gramian._flow.phi import FrozenKernel, integral, phi1, scale_rows
from gramian._losses import block_product


class Operators(NamedTuple):
    """The four operators of one stretch of training, from time s to T (theory §2, equations 5-8).

    Attributes:
      propagator: P(T, s), ∂P = −B K_SS P from P(s, s) = I: g(T) = P g(s). No unit.
      gramian: W_S = ∫ Pᵀ K_SS P dτ, symmetric positive semi-definite: gᵀ W_S g is the loss that g dissipates.
      displacement: D = ∫ K_SS P dτ: the training outputs move by −D g(s).
      test_transfer: G = ∫ K_QS P dτ: the test outputs move by −G g(s). Shape (0, N) without test points.
    """

    propagator: Float[Array, "N N"]
    gramian: Float[Array, "N N"]
    displacement: Float[Array, "N N"]
    test_transfer: Float[Array, "M N"]


def init_operators(num_train_outputs: int, num_test_outputs: int, dtype) -> Operators:
    """P = I and W_S = D = G = 0: the operators of no training at all.

    Args:
      num_train_outputs: N = n·c.
      num_test_outputs: M = m·c.
      dtype: floating dtype of the outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import init_operators
      >>> init_operators(2, 3, jnp.float32).test_transfer.shape
      (3, 2)
    """
    square = jnp.zeros((num_train_outputs, num_train_outputs), dtype)
    transfer = jnp.zeros((num_test_outputs, num_train_outputs), dtype)
    return Operators(jnp.eye(num_train_outputs, dtype=dtype), square, square, transfer)


def update_operators(operators: Operators, frozen: FrozenKernel, k_qs: Array, h: Array) -> Operators:
    """Adds a step of length h over which K_SS, K_QS and B stand still; exact for such a step.

    With K = F Fᵀ, Fᵀ B F = diag(γ) and the incoming propagator P:

        W_S += Pᵀ F hφ₁(−2hγ) Fᵀ P,   R = F hφ₁(−hγ) Fᵀ P,   D += R,   P −= B R,
        G += K_QS ∫ P dτ.

    P and D take the same increment R, so D = n(I − P) holds to rounding for the squared loss.

    Args:
      operators: those of the path so far.
      frozen: kernel and Hessian of this step, from `freeze`.
      k_qs: test-train kernel of this step, (M, N).
      h: length of the step, in units of training time.

    Returns:
      The operators of the longer path.

    Cost: about 10·N³ + 2·M·N² operations.
    """
    p, w, d, g = operators
    modes = matmul(frozen.factor.T, p)
    dissipated = matmul(modes.T, scale_rows(h * phi1(-2 * h * frozen.rates), modes))
    moved = matmul(frozen.factor, scale_rows(h * phi1(-h * frozen.rates), modes))
    return Operators(
        propagator=p - block_product(frozen.hessian, moved),
        gramian=w + (dissipated + dissipated.T) / 2,
        displacement=d + moved,
        test_transfer=g + matmul(k_qs, integral(frozen, h, p)),
    )
