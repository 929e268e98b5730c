"""What a sweep says of a recorded run, against what the run did: identities, coupling, losses (theory §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gramian._account import rounding_of
from gramian._losses import OutputLoss
from gramian._problem import KernelSource
from gramian._reading.coupling import correlation, ratio
from gramian._reading.identities import Identity, bounded, judge
from gramian._report.flow import Risk
from gramian._run.path import RealizedPath, Sweep
from gramian._run.step import rows

PyTree = Any


@dataclass(frozen=True)
class MotionCoupling:
    """How far a channel's training displacements determine its test displacements: A = G Ψ (D Ψ)⁺ (theory I9).

    Attributes:
      rank: of Ψ, the directions used; N where the operators are dense.
      correlation: of A (U_S(T) − U_S(s)) with the observed test displacement, in [−1, 1]; nan where one is constant.
      relative_error: of the two; nan where no test point moved.
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
        if not np.isfinite(self.losses[1]) or not all(np.isfinite(moved).all() for moved in (self.moved, self.moved_q)):
            raise FloatingPointError(
                f"outputs or loss are not finite after the last step, {run.num_steps}, of the run in {run.directory}: "
                f"the loss is {self.losses[1]}. Record it again with fewer batches, or with a lower learning rate."
            )

    @property
    def forced(self) -> tuple[float, float]:
        def share(sums, moved):
            part = np.linalg.norm(np.asarray(sums[-1], np.float64))
            return ratio(part, np.linalg.norm(moved)) if part > 0 else 0.0

        return share(self.sums.moved, self.moved), share(self.sums.moved_q, self.moved_q)

    def path_identities(self, finer: Sweep) -> list[Identity]:
        """(I1)-(I4), with ten times the effect of one more Gauss point for their tolerance, and rounding."""
        run, floor = self.path.recording, 1e4 * float(jnp.finfo(self.path.dtype).eps) * np.sqrt(len(self.g))
        source = KernelSource(run.apply_fn, run.x_s, self.path.x_q)
        off = rounding_of(source, run.loss, (run.params, self.sweep.shared.state.params), run.num_steps)
        drop = self.losses[0] - self.losses[1]
        rows = [
            ("(I1)", "g(T) = P g(s)", self.g_last, self.g, off.grad),
            ("(I2)", "Φ(s) − Φ(T) = gᵀ W g", drop, drop, off.loss),
            ("(I3)", "U_S(T) − U_S(s) = −D g", self.moved, self.moved, off.outputs_s),
            ("(I4)", "U_Q(T) − U_Q(s) = −G g", self.moved_q, self.moved_q, off.outputs_q),
        ]
        found = []
        for (name, statement, expected, scale, rounding), ours, theirs in zip(
            rows, predictions(self.sweep), predictions(finer), strict=True
        ):
            if not np.size(expected):
                continue
            missed, size = float(np.linalg.norm(ours - expected)), float(np.linalg.norm(scale))
            discretised = 10 * float(np.linalg.norm(ours - theirs))
            allowed = {"tolerance": floor, "rounding": rounding, "estimate": discretised}
            found.append(judge(name, statement, missed, size, **allowed, remedy="raise quadrature"))
        return found

    def invisibility(self, seen: np.ndarray, motion: np.ndarray) -> Identity:
        statement, eps = "‖G ψ‖² ≤ (Σ λ_max(J̄_Q N J̄_Qᵀ)) ψᵀ V ψ", float(jnp.finfo(self.path.dtype).eps)
        allowed = float(self.sums.visibility) * np.asarray(motion, np.float64)
        seen = np.sum(np.asarray(seen, np.float64) ** 2, axis=0)
        return bounded("(I6′)", statement, seen, allowed, eps, f"over {len(allowed)} eigenvectors of V")

    def coupling(self, moved: np.ndarray, moved_q: np.ndarray) -> MotionCoupling:
        predicted = moved_q @ (np.linalg.pinv(np.asarray(moved, np.float64), rcond=1e-12) @ self.moved)
        return MotionCoupling(
            rank=moved.shape[1],
            correlation=correlation(predicted, self.moved_q),
            relative_error=ratio(np.linalg.norm(predicted - self.moved_q), np.linalg.norm(self.moved_q)),
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
