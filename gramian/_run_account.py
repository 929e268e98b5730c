"""What a sweep says of a recorded run, against what the run did: identities, coupling, losses (theory §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gramian._identities import Identity
from gramian._losses import OutputLoss
from gramian._realized import RealizedPath, Sweep
from gramian._realized_step import rows
from gramian._report import Risk

PyTree = Any


@dataclass(frozen=True)
class MotionCoupling:
    """How far a channel's training displacements determine its test displacements: A = G Ψ (D Ψ)⁺ (theory I9).

    Attributes:
      rank: of Ψ, the directions used; N where the operators are dense.
      correlation: of A (U_S(T) − U_S(s)) with the observed test displacement.
      relative_error: of the two.
      predicted, observed: test displacements, (M,).
    """

    rank: int
    correlation: float
    relative_error: float
    predicted: np.ndarray
    observed: np.ndarray


def outputs_of(path: RealizedPath, params: PyTree) -> tuple[Array, Array]:
    """Training and test outputs, (0, c) without test points."""
    run = path.recording
    u_s = rows(run.apply_fn, params, run.x_s)
    return u_s, u_s[:0] if path.x_q is None else rows(run.apply_fn, params, path.x_q)


def predictions(sweep: Sweep) -> list[np.ndarray]:
    """What the first probe, g, and the forced part say of g(T), the loss drop, and both displacements."""
    gramian = np.asarray(sweep.sums.gramian, np.float64)
    found = [np.asarray(sweep.probes.psi[0] + sweep.shared.forced.psi[0], np.float64)]
    found.append(gramian[0, 0] + 2 * gramian[0, -1] + gramian[-1, -1])
    found += [np.asarray(one[0] + one[-1], np.float64) for one in (sweep.sums.moved, sweep.sums.moved_q)]
    return found


class RunAccount:
    """The run's first and last outputs, beside what the sweep of g (its first probe) and the forced part say."""

    def __init__(self, path: RealizedPath, sweep: Sweep, first: tuple[Array, Array], g: np.ndarray):
        run = path.recording
        last = outputs_of(path, sweep.shared.state.params)
        self.path, self.sweep, self.sums = path, sweep, sweep.sums
        self.first, self.last, self.g = first, last, g
        self.moved, self.moved_q = (np.asarray(b - a, np.float64).reshape(-1) for a, b in zip(first, last, strict=True))
        self.g_last = np.asarray(run.loss.grad(last[0]), np.float64)
        self.losses = tuple(float(run.loss.value(u)) for u in (first[0], last[0]))

    @property
    def forced(self) -> tuple[float, float]:
        def share(sums, moved):
            return float(np.linalg.norm(sums[-1]) / max(np.linalg.norm(moved), np.finfo(float).tiny))

        return share(self.sums.moved, self.moved), share(self.sums.moved_q, self.moved_q)

    def path_identities(self, finer: Sweep) -> list[Identity]:
        """(I1)-(I4), with ten times the effect of one more Gauss point for their tolerance."""
        floor = 1e4 * float(jnp.finfo(self.path.dtype).eps) * np.sqrt(len(self.g))
        statements = {
            "(I1)": ("g(T) = P g(s)", self.g_last, self.g),
            "(I2)": ("Φ(s) − Φ(T) = gᵀ W g", self.losses[0] - self.losses[1], self.losses[0] - self.losses[1]),
            "(I3)": ("U_S(T) − U_S(s) = −D g", self.moved, self.moved),
            "(I4)": ("U_Q(T) − U_Q(s) = −G g", self.moved_q, self.moved_q),
        }
        found = []
        for (name, (statement, expected, scale)), ours, theirs in zip(
            statements.items(), predictions(self.sweep), predictions(finer), strict=True
        ):
            if not np.size(expected):
                continue
            size = max(float(np.linalg.norm(scale)), np.finfo(float).tiny)
            residual = float(np.linalg.norm(ours - expected)) / size
            tolerance = max(floor, 10 * float(np.linalg.norm(ours - theirs)) / size)
            found.append(Identity(name, statement, residual, float(tolerance), bool(residual <= tolerance)))
        return found

    def invisibility(self, seen: np.ndarray, motion: np.ndarray) -> Identity:
        bound = float(self.sums.visibility)
        allowed = bound * np.asarray(motion, np.float64)
        floor = 100 * float(jnp.finfo(self.path.dtype).eps) * allowed.max()
        ratio = float((np.sum(np.asarray(seen, np.float64) ** 2, axis=0) / np.maximum(allowed, floor)).max())
        return Identity(
            "(I6′)",
            "‖G ψ‖² ≤ (Σ λ_max(J̄_Q N J̄_Qᵀ)) ψᵀ V ψ",
            max(0.0, ratio - 1),
            0.0,
            ratio <= 1,
            f"largest ratio {ratio:.2g} over {len(allowed)} eigenvectors of V",
        )

    def coupling(self, moved: np.ndarray, moved_q: np.ndarray) -> MotionCoupling:
        predicted = moved_q @ (np.linalg.pinv(np.asarray(moved, np.float64), rcond=1e-12) @ self.moved)
        x, y = predicted - predicted.mean(), self.moved_q - self.moved_q.mean()
        size = np.linalg.norm(x) * np.linalg.norm(y)
        return MotionCoupling(
            rank=moved.shape[1],
            correlation=float(x @ y / size) if size > 0 else float("nan"),
            relative_error=float(np.linalg.norm(predicted - self.moved_q) / np.linalg.norm(self.moved_q)),
            predicted=predicted,
            observed=self.moved_q,
        )

    def train_risk(self) -> Risk:
        start, end = self.losses
        return Risk(start, end, start - float(predictions(self.sweep)[1]))

    def test_risk(self, loss: OutputLoss) -> Risk:
        start, end = self.first[1], self.last[1]
        predicted = start + predictions(self.sweep)[3].reshape(start.shape).astype(start.dtype)
        return Risk(*(float(loss.value(u)) for u in (start, end, predicted)))
