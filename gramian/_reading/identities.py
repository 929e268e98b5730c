"""The identities (I1)-(I9), evaluated on a finished run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np

from entk import kernel_drift
from gramian._account import SAFETY, rounding_of
from gramian._checks import check_real
from gramian._flow.flow import Flow
from gramian._flow.observables import DoublingGramian, TestKernelTop
from gramian._reading.coupling import Coupling, coupling


@dataclass(frozen=True)
class Identity:
    """One statement of the theory about one run.

    Attributes:
      name: its number, (I1) to (I9).
      statement: the equation.
      residual: by how much it is missed, relative; None where it was not evaluated, or nothing moved.
      tolerance: what `holds` compares the residual with; None where the statement is reported, not asserted.
      holds: residual ≤ tolerance (for a negative control: residual ≥ tolerance); None where nothing is asserted: what
        moved is within rounding, say.
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


def judge(
    name: str,
    statement: str,
    missed: float,
    size: float,
    *,
    tolerance: float,
    rounding: float = 0.0,
    estimate: float = 0.0,
    remedy: str = "lower rtol",
    note: str = "",
) -> Identity:
    """The verdict on a quantity of the given size that is missed by so much.

    Allowed are `tolerance` · size, or what the steps' own error estimates add up to if that is more, and on top of
    either what rounding makes of the numbers that were subtracted. A statement that misses more is broken, whatever its
    size. One that would hold for a prediction of zero as well says nothing: it gets no verdict.
    """
    aim = tolerance * size + rounding
    allowed = aim if missed <= aim else max(aim, estimate + rounding)
    if size == 0:
        if missed <= allowed:
            return Identity(name, statement, None, None, None, "nothing moved")
        return Identity(name, statement, float("inf"), tolerance, False, f"missed by {missed:.2g} where nothing moved")
    residual, holds = float(missed / size), bool(missed <= allowed)
    if holds and allowed >= size:
        rounds = rounding >= max(tolerance * size, estimate)
        why = "rounding may be" if rounds else f"{remedy}, errors of the steps may be"
        note = f"no verdict: {why} {allowed / size:.1g} times what moved"
        return Identity(name, statement, residual, None, None, note)
    return Identity(name, statement, residual, float(allowed / size), holds, note)


def identities(
    flow: Flow, *, tolerance: float | None = None, num_directions: int = 1000, coupled: Coupling | None = None
) -> tuple[Identity, ...]:
    """Evaluates (I1)-(I9) on a finished flow (theory §2, "Identities").

    Args:
      flow: a finished flow. (I5) needs `DoublingGramian()` among its observables, (I6) `TestKernelTop()`.
      tolerance: relative residual allowed in (I1)-(I4), which hold up to the discretisation of the flow. None takes
        what the step-size control allowed in all, num_steps · rtol under `AdaptiveStep`, or what the steps estimated
        their errors at, where these add up to more beside what moved: for outputs far from zero, or where D and G
        amplify errors of g. Rounding of what is subtracted comes on top of either.
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
    estimates = np.zeros(3) if tolerance is not None else flow.missed
    tolerance = flow.tolerance if tolerance is None else check_real("tolerance", tolerance)
    if tolerance is None:
        raise ValueError("this flow's controller promises no tolerance; pass tolerance=..., the residual you allow.")
    run = _Run(flow)
    rows = [*_path(run, tolerance, estimates), _energies(run), _squared(run), _frozen_kernel(run, tolerance)]
    if run.has_test:
        rows += [_invisibility(run, num_directions), _coupling(run, coupled)]
    return tuple(sorted(rows, key=lambda row: row.name))


class _Run:
    """A flow as NumPy arrays in float64, and the rounding level of its own arithmetic."""

    def __init__(self, flow: Flow):
        self.flow = flow
        self.p, self.w, self.d, self.g_q = (np.asarray(operator, np.float64) for operator in flow.require_operators())
        (u0, q0), (u1, q1) = flow.outputs(flow.params0), flow.outputs(flow.params)
        self.moved_s, self.moved_q = (
            np.asarray(b, np.float64) - np.asarray(a, np.float64) for a, b in ((u0, u1), (q0, q1))
        )
        self.g0 = np.asarray(flow.output_grad(flow.params0), np.float64)
        self.g1 = np.asarray(flow.output_grad(flow.params), np.float64)
        loss0, loss1 = (flow.loss.value(flow.source.outputs(w)[0]) for w in (flow.params0, flow.params))
        self.loss_drop = float(loss0) - float(loss1)
        self.n = flow.loss.targets.shape[0]
        self.size = len(self.g0)
        self.eps = float(jnp.finfo(u0.dtype).eps)
        self.has_test = len(self.g_q) > 0
        self.off = rounding_of(flow.source, flow.loss, (flow.params0, flow.params), flow.num_steps)

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

    @property
    def identity(self) -> float:
        """Rounding of I − P and I − PᵀP, whose operators lose all digits when P has hardly left I."""
        return SAFETY * self.eps * self.size**0.5 * (1 + self.flow.num_steps) ** 0.5


def _path(run: _Run, tolerance: float, estimates: np.ndarray) -> list[Identity]:
    off, (error_s, error_q, error_g) = run.off, estimates

    def row(name, statement, missed, size, operator, rounding, error):
        """An operator takes errors of g into what it predicts, in a typical direction by ‖operator‖_F / √N."""
        spread = np.linalg.norm(operator) / np.sqrt(run.size)
        factor = 1.0 if operator is run.p or operator.ndim < 2 else max(1.0, run.conditioning(operator))
        return judge(
            name,
            statement,
            float(np.linalg.norm(missed)),
            float(np.linalg.norm(size)),
            tolerance=tolerance if estimates.any() else factor * tolerance,
            rounding=rounding + spread * off.grad,
            estimate=error + spread * np.sqrt(run.size) * error_g,
            note=f"the run amplifies errors of g {factor:.2g} times" if factor > 1.5 else "",
        )

    drop, pulled = run.loss_drop, run.w @ run.g0
    size_s, size_q = np.sqrt(len(run.moved_s)), np.sqrt(len(run.moved_q))
    rows = [
        row("(I1)", "g(T) = P g(s)", run.g1 - run.p @ run.g0, run.g0, run.p, off.grad, 0.0),
        row(
            "(I2)",
            "Φ(s) − Φ(T) = gᵀ W_S g",
            drop - run.g0 @ pulled,
            drop,
            2 * np.sqrt(run.size) * pulled,
            off.loss,
            np.linalg.norm(run.g0) * size_s * error_s,
        ),
        row(
            "(I3)",
            "U_S(T) − U_S(s) = −D g",
            run.moved_s + run.d @ run.g0,
            run.moved_s,
            run.d,
            off.outputs_s,
            size_s * error_s,
        ),
    ]
    if run.has_test:
        missed = run.moved_q + run.g_q @ run.g0
        rows.append(
            row("(I4)", "U_Q(T) − U_Q(s) = −G g", missed, run.moved_q, run.g_q, off.outputs_q, size_q * error_q)
        )
    return rows


def _energies(run: _Run) -> Identity:
    name, statement = "(I5)", "λ_j(W_S) = ∫ ‖J_Sᵀ P ψ_j‖² dτ"
    state = run.flow.final(DoublingGramian)
    if state is None:
        return Identity(name, statement, None, None, None, "not evaluated: record DoublingGramian()")
    values, vectors = np.linalg.eigh(run.w)
    energies = np.sum(vectors * (np.asarray(state[1], np.float64) @ vectors), axis=0)
    missed, size = float(np.abs(values - energies).max()), float(np.abs(values).max())
    return judge(
        name, statement, missed, size, tolerance=run.half_precision, note="energies by scaling and squaring, all j"
    )


def _invisibility(run: _Run, num_directions: int) -> Identity:
    name, statement = "(I6)", "‖G ψ‖² ≤ (∫ λ_max(K_QQ) dτ) ψᵀ W_S ψ"
    top = run.flow.recorded(TestKernelTop)
    if top is None:
        return Identity(name, statement, None, None, None, "not evaluated: record TestKernelTop()")
    bound = float(np.sum(np.asarray(top, np.float64) * run.flow.history["h"]))
    values, vectors = np.linalg.eigh(run.w)
    directions = np.random.default_rng(0).standard_normal((run.size, num_directions))
    seen = np.concatenate([np.sum((run.g_q @ v) ** 2, axis=0) for v in (vectors, directions)])
    allowed = bound * np.concatenate([values, np.sum(directions * (run.w @ directions), axis=0)])
    tried = f"over {run.size} eigenvectors and {num_directions} random directions"
    return bounded(name, statement, seen, allowed, run.eps, tried)


def bounded(name: str, statement: str, seen: np.ndarray, allowed: np.ndarray, eps: float, tried: str) -> Identity:
    """The verdict on `seen` ≤ `allowed` in every direction; both sides may be equal, so that rounding has a say."""
    largest = float(allowed.max())
    if largest <= 0 and not seen.any():
        return Identity(name, statement, None, None, None, "nothing moved")
    # Where ψ is invisible to rounding both sides are noise: compare with the rounding of the largest.
    floor = max(100 * eps * largest, np.finfo(float).tiny)
    ratio, tolerance = float((seen / np.maximum(allowed, floor)).max()), 2.7 * eps ** (2 / 3)
    note = f"largest ratio {ratio:.2g} {tried}"
    return Identity(name, statement, max(0.0, ratio - 1), tolerance, bool(ratio <= 1 + tolerance), note)


def _squared(run: _Run) -> Identity:
    size_w, size_d = np.linalg.norm(run.w), np.linalg.norm(run.d)
    missed_w = float(np.linalg.norm(run.w - run.n / 2 * (np.eye(run.size) - run.p.T @ run.p)))
    rounding = run.n * run.identity
    if not run.flow.loss.isotropic:
        return _squared_control(run, missed_w, float(size_w), rounding)
    missed_d = float(np.linalg.norm(run.d - run.n * (np.eye(run.size) - run.p)))
    values = np.linalg.eigvalsh(run.w)
    below, above = max(0.0, -values[0]), max(0.0, values[-1] - run.n / 2)
    statement, note = "D = n(I − P), W_S = (n/2)(I − PᵀP)", "spectrum of W_S within [0, n/2]"
    rows = [
        judge("(I7)", statement, missed, float(size), tolerance=run.rounding, rounding=floor, note=note)
        for missed, size, floor in (
            (missed_w, size_w, rounding),
            (missed_d, size_d, rounding),
            (below, values[-1], 0.0),
            (above, run.n / 2, 0.0),
        )
    ]
    # The worst of the four: a broken one, else one without a verdict, else the one nearest to its tolerance.
    return min(rows, key=lambda row: (row.holds is not False, row.holds is not None, -(row.residual or 0.0)))


def _squared_control(run: _Run, missed: float, size: float, rounding: float) -> Identity:
    """The form of the squared loss must fail for another, wherever P has left I by more than rounding."""
    statement, least = "W_S ≠ (n/2)(I − PᵀP)", 1e-2
    outputs = [run.flow.source.outputs(w)[0] for w in (run.flow.params0, run.flow.params)]
    blocks = np.stack([np.asarray(run.flow.loss.hessian(u), np.float64) * run.n for u in outputs])
    if size == 0:
        return Identity("(I7)", statement, None, None, None, "nothing moved")
    if np.abs(blocks - np.eye(blocks.shape[-1])).max() <= run.half_precision:
        note = "no control: B = I/n at both ends, so that the loss is squared where the run went"
        return Identity("(I7)", statement, missed / size, None, None, note)
    tolerance = least + rounding / size
    if missed < tolerance * size and rounding >= least * size:
        note = f"no verdict: rounding of I − PᵀP may be {rounding / size:.1g} times W_S"
        return Identity("(I7)", statement, missed / size, None, None, note)
    note = f"negative control: must fail for {run.flow.loss.name}"
    return Identity("(I7)", statement, missed / size, tolerance, missed >= tolerance * size, note)


def _frozen_kernel(run: _Run, tolerance: float) -> Identity:
    name, flow = "(I8)", run.flow
    statement = "kernel still: P = exp(−K t/n), G = n K_QS K_SS⁺ (I − P)"
    if not flow.loss.isotropic:
        return Identity(name, statement, None, None, None, "for the squared loss only")
    k0, k1 = (np.asarray(flow.source.k_ss(w), np.float64) for w in (flow.params0, flow.params))
    values, vectors = np.linalg.eigh(k0)
    rates = np.maximum(values, 0) * (flow.t1 - flow.t0) / run.n
    missed = np.linalg.norm(run.p - (vectors * np.exp(-rates)) @ vectors.T) / np.sqrt(run.size)
    if run.has_test and (size := np.linalg.norm(run.g_q)) > 0:
        # n K⁺ (I − P) = t φ₁(−K t/n), which needs no cut through the small eigenvalues.
        phi = np.where(rates > 0, -np.expm1(-rates) / np.where(rates > 0, rates, 1), 1)
        pull = (vectors * ((flow.t1 - flow.t0) * phi)) @ vectors.T
        transfer = np.asarray(flow.source.k_qs(flow.params0), np.float64) @ pull
        missed = max(missed, np.linalg.norm(run.g_q - transfer) / size)
    largest = float(rates.max())
    drift = 0.0 if not k1.any() and not k0.any() else float(kernel_drift(jnp.asarray(k1), jnp.asarray(k0)))
    if drift > 0.01 * tolerance:
        return Identity(name, statement, float(missed), None, None, f"kernel drift {drift:.2g}: the lazy theory's miss")
    # Eigenvalues are right to rounding of the largest, and t/n of them stands in the exponent.
    rounding = SAFETY * run.eps * np.sqrt(run.size) * largest
    if not largest:
        return Identity(name, statement, None, None, None, "nothing moved")
    return judge(name, statement, float(missed), 1.0, tolerance=tolerance, rounding=rounding)


def _coupling(run: _Run, coupled: Coupling | None) -> Identity:
    coupled = coupled or coupling(run.flow)
    squared = run.flow.loss.isotropic
    statement = "G = A D, A = G D⁺" if squared else "(G−AD) W⁺ (G−AD)ᵀ = R⊥R⊥ᵀ"
    if not run.g_q.any():
        return Identity("(I9)", statement, None, None, None, "no test point moved")
    enlarged, unresolved = _resolved(run)
    tolerance = max(run.rounding, enlarged) if squared else run.half_precision
    if coupled.residual > tolerance and unresolved:
        note = f"no verdict: D has no digits left along {unresolved} of {run.size} directions, which (I6) bounds"
        return Identity("(I9)", statement, coupled.residual, None, None, note)
    noise = np.linalg.norm(run.moved_q) <= run.off.outputs_q
    said = (
        "within rounding" if noise or not np.isfinite(coupled.correlation) else f"correlation {coupled.correlation:.6f}"
    )
    note = f"predicted against observed test displacement: {said}"
    return judge("(I9)", statement, coupled.residual, 1.0, tolerance=tolerance, note=note)


def _resolved(run: _Run) -> tuple[float, int]:
    """How far G D⁺ D is off G in this arithmetic, relative to G, and along how many directions D has no digits left.

    D⁺ enlarges rounding along small singular values. Eigenvalues of K_SS are right to rounding of the largest, and D
    holds them times t.
    """
    flow, size = run.flow, np.linalg.norm(run.g_q)
    _, values, rows = np.linalg.svd(run.d)
    kernel = max(float(np.linalg.norm(flow.source.k_ss(w))) for w in (flow.params0, flow.params))
    resolved = values > run.size * run.eps * max(values[0], (flow.t1 - flow.t0) * kernel)
    seen = np.linalg.norm(run.g_q @ rows[resolved].T, axis=0) / values[resolved]
    enlarged = np.sqrt(run.size) * np.finfo(float).eps * values[0] * np.linalg.norm(seen)
    return float(enlarged / size), int(np.sum(~resolved))
