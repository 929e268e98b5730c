"""Coupling: the linear map from the training displacement to the test displacement (I9)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gramian._flow.flow import Flow


@dataclass(frozen=True)
class Coupling:
    """How far the training displacement determines the test displacement (theory I9).

    Attributes:
      matrix: A, (M, N).
      predicted: A (U_S(T) − U_S(s)), from the observed training displacement, (M,).
      observed: U_Q(T) − U_Q(s), (M,).
      correlation: of predicted and observed, in [−1, 1]; nan where one of them is constant.
      relative_error: ‖predicted − observed‖ / ‖observed‖; nan where nothing moved.
      unexplained: ‖(G − A D) W^{+1/2}‖_F / ‖G W^{+1/2}‖_F, the part of the transfer that no linear predictor from the
        training displacement explains; 0 to rounding for the squared loss.
      residual: for the squared loss ‖G − A D‖_F / ‖G‖_F; else by how much (G − A D) W⁺ (G − A D)ᵀ misses R⊥R⊥ᵀ,
        relative to the transfer.
    """

    matrix: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    correlation: float
    relative_error: float
    unexplained: float
    residual: float


def coupling(flow: Flow) -> Coupling:
    """The best linear predictor of the test displacement, A = G D⁺ or A = G W⁺Dᵀ (D W⁺ Dᵀ)⁺ (theory I9).

    For the squared loss G = A D holds exactly, so the test displacement is A times the training displacement. For
    another convex loss, (G − A D) W⁺ (G − A D)ᵀ = R⊥R⊥ᵀ is what no linear predictor explains, where R = G W^{+1/2} and
    R⊥ is R on the kernel of S = D W^{+1/2}.

    Args:
      flow: a finished flow with test points.

    Returns:
      A `Coupling`.

    Raises:
      ValueError: a flow without test points.

    Cost: singular value decompositions of N × N matrices, O(N³ + M·N²).

    Source: Litman & Guo, arXiv:2605.01172, Theorems 5.1 and E.3.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import coupling, gradient_flow, squared_loss
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> flow = gradient_flow(lambda w, x: x @ w, jnp.zeros(2), x, squared_loss(jnp.array([1.0, 3.0])), x + 1, t1=5.0)
      >>> bool(coupling(flow).relative_error < 1e-12)
      True
    """
    _, w, d, g = (np.asarray(operator, np.float64) for operator in flow.require_operators())
    if g.shape[0] == 0:
        raise ValueError("the flow has no test points; pass x_q to gradient_flow.")
    eps = float(np.finfo(np.asarray(flow.operators.gramian).dtype).eps)
    root = _inverse_root(w, eps)
    r, s = g @ root, d @ root
    if flow.loss.isotropic:
        a = g @ np.linalg.pinv(d, rcond=len(d) * eps)
        residual = ratio(np.linalg.norm(g - a @ d), np.linalg.norm(g))
    else:
        a = r @ np.linalg.pinv(s, rcond=len(d) * eps)
        missed = _gram_distance((g - a @ d) @ root, r @ _null_space(s, len(d) * eps))
        residual = ratio(missed, np.linalg.norm(r) ** 2)
    ends = (flow.outputs(params) for params in (flow.params0, flow.params))
    (u0, q0), (u1, q1) = ([np.asarray(one, np.float64) for one in end] for end in ends)
    predicted, observed = a @ (u1 - u0), q1 - q0
    return Coupling(
        matrix=a,
        predicted=predicted,
        observed=observed,
        correlation=correlation(predicted, observed),
        relative_error=ratio(np.linalg.norm(predicted - observed), np.linalg.norm(observed)),
        unexplained=ratio(np.linalg.norm(r - a @ s), np.linalg.norm(r)),
        residual=residual,
    )


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation, in [−1, 1]; nan where one side is constant, to the rounding of its mean."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    sides = []
    for side in (x, y):
        centred, size = side - side.mean(), np.linalg.norm(side)
        spread = np.linalg.norm(centred)
        if not spread > len(side) * np.finfo(float).eps * size:
            return float("nan")
        sides.append(centred / spread)
    return float(np.clip(sides[0] @ sides[1], -1, 1))


def ratio(part: float | np.floating, whole: float | np.floating) -> float:
    """part / whole; nan where there is no whole."""
    return float(part / whole) if whole != 0 else float("nan")


def _null_space(s, rcond):
    _, values, rows = np.linalg.svd(s)
    return rows[np.sum(values > rcond * values.max(initial=0)) :].T


def _gram_distance(x, y):
    """‖x xᵀ − y yᵀ‖_F without forming either."""
    triangle = np.asarray(np.linalg.qr(np.hstack([x, y]), mode="r"))
    x, y = np.split(triangle, [x.shape[1]], axis=1)
    return np.linalg.norm(x @ x.T - y @ y.T)


def _inverse_root(w, eps):
    """W^{+1/2}."""
    values, vectors = np.linalg.eigh(w)
    kept = values > len(w) * eps * values.max()
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
