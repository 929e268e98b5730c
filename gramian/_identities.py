"""The identities (I1)-(I9), evaluated on a finished run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np

from entk import kernel_drift
from gramian._coupling import Coupling, coupling
from gramian._flow import Flow
from gramian._observables import DoublingGramian, TestKernelTop


@dataclass(frozen=True)
class Identity:
    """One statement of the theory about one run.

    Attributes:
      name: its number, (I1) to (I9).
      statement: the equation.
      residual: by how much it is missed, relative; None where it was not evaluated.
      tolerance: what `holds` compares the residual with; None where the statement is reported, not asserted.
      holds: residual ≤ tolerance (for a negative control: residual ≥ tolerance); None where nothing is asserted.
      note: what a reader should know.
    """

    name: str
    statement: str
    residual: float | None
    tolerance: float | None
    holds: bool | None
    note: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def identities(
    flow: Flow, *, tolerance: float | None = None, num_directions: int = 1000, coupled: Coupling | None = None
) -> tuple[Identity, ...]:
    """Evaluates (I1)-(I9) on a finished flow (theory §2, "Identities").

    Args:
      flow: a finished flow. (I5) needs `DoublingGramian()` among its observables, (I6) `TestKernelTop()`.
      tolerance: relative residual allowed in (I1)-(I4), which hold up to the discretisation of the flow. None takes
        what the step-size control allowed in all: num_steps · rtol under `AdaptiveStep`. (I3) and (I4) are allowed as
        many times more as D and G amplify an error of g.
      num_directions: random directions, besides all eigenvectors of W_S, on which (I6) is tried.
      coupled: the flow's `coupling`, if it is at hand already.

    Returns:
      One `Identity` a statement.

    Raises:
      ValueError: no tolerance given for a flow whose controller promises none (`ConstantStep`).

    Cost: O(N³ + M·N²), and one K_QS for (I8).

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import gradient_flow, identities, squared_loss
      >>> loss = squared_loss(jnp.array([1.0, -1.0]))
      >>> x_q = jnp.array([[1.0, 0.5]])
      >>> flow = gradient_flow(lambda w, x: x @ w, jnp.zeros(2), jnp.eye(2), loss, x_q, t1=1.0)
      >>> [row.name for row in identities(flow) if row.holds]
      ['(I1)', '(I2)', '(I3)', '(I4)', '(I7)', '(I8)', '(I9)']
    """
    tolerance = flow.tolerance if tolerance is None else tolerance
    if tolerance is None:
        raise ValueError("this flow's controller promises no tolerance; pass tolerance=..., the residual you allow.")
    run = _Run(flow)
    rows = [*_path(run, tolerance), _energies(run), _squared(run), _frozen_kernel(run, tolerance)]
    if run.has_test:
        rows += [_invisibility(run, num_directions), _coupling(run, coupled)]
    return tuple(sorted(rows, key=lambda row: row.name))


class _Run:
    """A flow as NumPy arrays in float64, and the rounding level of its own arithmetic."""

    def __init__(self, flow: Flow):
        self.flow = flow
        self.p, self.w, self.d, self.g_q = (np.asarray(operator, np.float64) for operator in flow.require_operators())
        (u0, q0), (u1, q1) = flow.outputs(flow.params0), flow.outputs(flow.params)
        self.moved_s, self.moved_q = np.asarray(u1 - u0, np.float64), np.asarray(q1 - q0, np.float64)
        self.g0 = np.asarray(flow.output_grad(flow.params0), np.float64)
        self.g1 = np.asarray(flow.output_grad(flow.params), np.float64)
        loss0, loss1 = (flow.loss.value(flow.source.outputs(w)[0]) for w in (flow.params0, flow.params))
        self.loss_drop = float(loss0) - float(loss1)
        self.n = flow.loss.targets.shape[0]
        self.size = len(self.g0)
        self.eps = float(jnp.finfo(u0.dtype).eps)
        self.has_test = len(self.g_q) > 0

    def conditioning(self, operator: np.ndarray) -> float:
        """How much larger a relative error of g, in a random direction, comes out of `operator` than it went in.

        About 1 for the squared loss. A fitted softmax has a small B, so that an error of g is not worked off and moves
        the outputs for the rest of the run.
        """
        typical = np.linalg.norm(operator) / np.sqrt(self.size) * np.linalg.norm(self.g0)
        answer = np.linalg.norm(operator @ self.g0)
        return float(typical / answer) if answer > 0 else 1.0

    @property
    def rounding(self) -> float:
        """Tolerance for what holds to rounding: 1e-10 in float64, 7e-5 in float32."""
        return 2.7 * self.eps ** (2 / 3)

    @property
    def half_precision(self) -> float:
        """Tolerance for what two algorithms of finite accuracy agree on: 1.5e-8 in float64, 3e-4 in float32."""
        return self.eps**0.5


def _path(run: _Run, tolerance: float) -> list[Identity]:
    def row(name, statement, missed, size, operator=None):
        # What does not move at all is accounted for if nothing is predicted either.
        moved = np.linalg.norm(size) or np.sqrt(run.eps)
        residual = float(np.linalg.norm(missed) / moved)
        factor = 1.0 if operator is None else max(1.0, run.conditioning(operator))
        note = f"the run amplifies errors of g {factor:.2g} times" if factor > 1.5 else ""
        return Identity(name, statement, residual, factor * tolerance, residual <= factor * tolerance, note)

    rows = [
        row("(I1)", "g(T) = P g(s)", run.g1 - run.p @ run.g0, run.g0),
        row("(I2)", "Φ(s) − Φ(T) = gᵀ W_S g", run.loss_drop - run.g0 @ run.w @ run.g0, run.loss_drop),
        row("(I3)", "U_S(T) − U_S(s) = −D g", run.moved_s + run.d @ run.g0, run.moved_s, run.d),
    ]
    if run.has_test:
        rows.append(row("(I4)", "U_Q(T) − U_Q(s) = −G g", run.moved_q + run.g_q @ run.g0, run.moved_q, run.g_q))
    return rows


def _energies(run: _Run) -> Identity:
    name, statement = "(I5)", "λ_j(W_S) = ∫ ‖J_Sᵀ P ψ_j‖² dτ"
    state = run.flow.final(DoublingGramian)
    if state is None:
        return Identity(name, statement, None, None, None, "not evaluated: record DoublingGramian()")
    values, vectors = np.linalg.eigh(run.w)
    energies = np.sum(vectors * (np.asarray(state[1], np.float64) @ vectors), axis=0)
    residual = float(np.abs(values - energies).max() / values.max())
    tolerance = run.half_precision
    return Identity(
        name, statement, residual, tolerance, residual <= tolerance, "energies by scaling and squaring, all j"
    )


def _invisibility(run: _Run, num_directions: int) -> Identity:
    name, statement = "(I6)", "‖G ψ‖² ≤ (∫ λ_max(K_QQ) dτ) ψᵀ W_S ψ"
    top = run.flow.recorded(TestKernelTop)
    if top is None:
        return Identity(name, statement, None, None, None, "not evaluated: record TestKernelTop()")
    bound = float(np.sum(top * run.flow.history["h"]))
    values, vectors = np.linalg.eigh(run.w)
    directions = np.random.default_rng(0).standard_normal((run.size, num_directions))
    seen = np.concatenate([np.sum((run.g_q @ v) ** 2, axis=0) for v in (vectors, directions)])
    allowed = bound * np.concatenate([values, np.sum(directions * (run.w @ directions), axis=0)])
    # Where ψ is invisible to rounding both sides are noise: compare with the rounding of the largest.
    floor = 100 * run.eps * allowed.max()
    ratio = float((seen / np.maximum(allowed, floor)).max())
    return Identity(
        name,
        statement,
        max(0.0, ratio - 1),
        0.0,
        ratio <= 1,
        f"largest ratio {ratio:.2g} over {run.size} eigenvectors and {num_directions} random directions",
    )


def _squared(run: _Run) -> Identity:
    missed_w = np.linalg.norm(run.w - run.n / 2 * (np.eye(run.size) - run.p.T @ run.p)) / np.linalg.norm(run.w)
    if not run.flow.loss.isotropic:
        residual, tolerance = float(missed_w), 1e-2
        note = f"negative control: must fail for {run.flow.loss.name}"
        return Identity("(I7)", "W_S ≠ (n/2)(I − PᵀP)", residual, tolerance, residual >= tolerance, note)
    missed_d = np.linalg.norm(run.d - run.n * (np.eye(run.size) - run.p)) / np.linalg.norm(run.d)
    values = np.linalg.eigvalsh(run.w)
    outside = max(-values[0], values[-1] - run.n / 2, 0.0) / (run.n / 2)
    residual, tolerance = float(max(missed_w, missed_d, outside)), run.rounding
    statement = "D = n(I − P), W_S = (n/2)(I − PᵀP)"
    return Identity("(I7)", statement, residual, tolerance, residual <= tolerance, "spectrum of W_S within [0, n/2]")


def _frozen_kernel(run: _Run, tolerance: float) -> Identity:
    name, flow = "(I8)", run.flow
    statement = "kernel still: P = exp(−K t/n), G = n K_QS K_SS⁺ (I − P)"
    if not flow.loss.isotropic:
        return Identity(name, statement, None, None, None, "for the squared loss only")
    k0, k1 = (np.asarray(flow.source.k_ss(w), np.float64) for w in (flow.params0, flow.params))
    values, vectors = np.linalg.eigh(k0)
    values = np.maximum(values, 0)
    decay = np.exp(-values * (flow.t1 - flow.t0) / run.n)
    residual = np.linalg.norm(run.p - (vectors * decay) @ vectors.T) / np.sqrt(run.size)
    if run.has_test:
        kept = values > run.size * run.eps * values.max()
        pull = (vectors[:, kept] * ((1 - decay[kept]) / values[kept])) @ vectors[:, kept].T
        transfer = run.n * np.asarray(flow.source.k_qs(flow.params0), np.float64) @ pull
        residual = max(residual, np.linalg.norm(run.g_q - transfer) / np.linalg.norm(run.g_q))
    drift = float(kernel_drift(jnp.asarray(k1), jnp.asarray(k0)))
    if drift > 0.01 * tolerance:
        return Identity(
            name, statement, float(residual), None, None, f"kernel drift {drift:.2g}: the lazy theory's miss"
        )
    return Identity(name, statement, float(residual), tolerance, bool(residual <= tolerance))


def _coupling(run: _Run, coupled: Coupling | None) -> Identity:
    coupled = coupled or coupling(run.flow)
    if run.flow.loss.isotropic:
        statement, tolerance = "G = A D, A = G D⁺", run.rounding
    else:
        statement, tolerance = "(G−AD) W⁺ (G−AD)ᵀ = R⊥R⊥ᵀ", run.half_precision
    note = f"predicted against observed test displacement: correlation {coupled.correlation:.6f}"
    return Identity("(I9)", statement, coupled.residual, tolerance, coupled.residual <= tolerance, note)
