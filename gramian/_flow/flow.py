"""Gradient flow from t0 to t1, with its operators and its history."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from entk import Structured
from entk.internal import Strategy, check_count
from gramian._checks import check_kind, check_problem, check_times
from gramian._flow.controllers import AdaptiveStep, Controller
from gramian._flow.integrator import FlowState, Integrator
from gramian._flow.observables import Observable
from gramian._flow.steppers import ExponentialMidpoint, Stepper
from gramian._losses import OutputLoss
from gramian._operators import Operators
from gramian._pinning import pinned_problem
from gramian._problem import KernelSource
from gramian._storage.checkpoint import Checkpoint
from gramian._storage.interrupts import answer, interruptible
from gramian._storage.progress import Progress

PyTree = Any


@dataclass(frozen=True)
class Flow:
    """A finished flow: where it started, where it ended, its operators, its history.

    Attributes:
      source, loss: the model on its points, and the training loss.
      t0, t1: start and end, in units of training time.
      params0, params: parameters at t0 and t1.
      operators: P, W_S, D and G from t0 to t1; None only from `reference_flow(..., operators=False)`.
      history: arrays over the accepted steps: `t` and `h` (units of time), `loss`, `error` (multiple of the allowed
        local error) and one entry an observable.
      observed: final states of the observables, by name.
      observables: what was recorded, by name; `recorded` and `final` find it by kind.
      saved_params: parameters at the times of `save_at`, in their order.
      num_steps, num_rejected: accepted and rejected trial steps.
      tolerance: relative residual that the run's step-size control allows in the identities; None if it promises none.
      missed: local errors of u_S, U_Q and g as the steps themselves estimated them, root mean squares in their units,
        added up; (3,), zeros where none were estimated.
    """

    source: KernelSource
    loss: OutputLoss
    t0: float
    t1: float
    params0: PyTree
    params: PyTree
    operators: Operators
    history: dict[str, Any]
    observed: dict[str, PyTree]
    observables: Mapping[str, Observable]
    saved_params: tuple[PyTree, ...]
    num_steps: int
    num_rejected: int
    tolerance: float | None
    missed: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def recorded(self, kind: type) -> Any:
        """Values over the steps of the observable of this class; None if it was not recorded."""
        return next((self.history[name] for name, o in self.observables.items() if isinstance(o, kind)), None)

    def final(self, kind: type) -> Any:
        """Final state of the observable of this class; None if it was not recorded."""
        return next((self.observed[name] for name, o in self.observables.items() if isinstance(o, kind)), None)

    def require_operators(self) -> Operators:
        """The operators, or an error that says how to get them."""
        if self.operators is None:
            raise ValueError("this flow accumulated no operators; run it with operators=True, or use gradient_flow.")
        return self.operators

    def outputs(self, params: PyTree) -> tuple[Float[Array, " N"], Float[Array, " M"]]:
        """Stacked training and test outputs u_S(w), U_Q(w) at any parameters."""
        u_s, u_q = self.source.outputs(params)
        return u_s.reshape(-1), u_q.reshape(-1)

    def output_grad(self, params: PyTree) -> Float[Array, " N"]:
        """g = ∇Φ_S at the training outputs of any parameters."""
        return self.loss.grad(self.source.outputs(params)[0])


@interruptible(lambda: "Interrupted before the first step; the same call begins anew.")
def gradient_flow(
    apply_fn: Any,
    params: PyTree,
    x_s: PyTree,
    loss: OutputLoss,
    x_q: PyTree | None = None,
    *,
    t0: float = 0.0,
    t1: float,
    stepper: Stepper = ExponentialMidpoint(),
    controller: Controller = AdaptiveStep(),
    observables: Mapping[str, Observable] | None = None,
    save_at: tuple[float, ...] = (),
    strategy: Strategy = Structured(),
    max_num_steps: int = 10_000,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> Flow:
    """Integrates ẇ = −J_Sᵀ∇Φ_S(u) from t0 to t1 and accumulates P, W_S, D and G (theory §2, equations 1-8, and §5).

    Steps are exponential: over each the kernel stands still and the output-space equation is solved exactly, so that
    their number follows the drift of the kernel and not t·λ_max.

    Args:
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)` that treats examples independently. It is compiled in:
        define it once, outside of loops. The flow, and what is asked of it later, is that of the function as it is now;
        this holds for the loss and observables of your own, too.
      params: pytree of floating-point arrays of one dtype, p scalars: w(t0).
      x_s: training inputs, n examples.
      loss: convex loss of the outputs, e.g. `squared_loss(y_s)`.
      x_q: test inputs, m examples; None leaves G empty.
      t0, t1: training time, t1 > t0. For SGD it corresponds to learning rate × steps.
      stepper: `ExponentialMidpoint()` (order 2) or `ExponentialEuler()` (order 1).
      controller: `AdaptiveStep(rtol, atol)` or `ConstantStep(dt)`.
      observables: what to record at every step, by name, e.g. `{"kernel": KernelEvolution()}`.
      save_at: times in (t0, t1] at which to keep the parameters; steps end there.
      strategy: how kernels are computed, and in how much memory, as in `entk.empirical_ntk`.
      max_num_steps: a flow that takes more accepted steps is stopped with an error.
      checkpoint: where to save the state as the run goes; a run that was killed goes on from there, bit for bit.
      progress: draws a progress bar.

    Returns:
      A `Flow`.

    Raises:
      TypeError, ValueError: outputs, labels, dtypes or times that break the rules above, NaN or infinite data, a loss
        that is not convex.
      MemoryError: Jacobian and operators would not fit; nothing has been allocated then.
      RuntimeError: more than max_num_steps.
      FloatingPointError: no step, however short, is good enough; kernels or operators that are not finite; the time
        and the size of what is left say where.
      OSError: a checkpoint's folder that cannot be written to or read; what was saved stays.

    Not supported: preconditioned, stochastic or momentum dynamics; N so large that N × N matrices do not fit.

    Cost: a step of the midpoint method takes two kernels K_SS, one K_QS and about 30·N³ operations; memory is one
    Jacobian and some 12 matrices of N × N.

    Source: Litman & Guo, arXiv:2605.01172; exponential integrators: Hochbruck & Ostermann, Acta Numerica 19 (2010).

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import gradient_flow, squared_loss
      >>> loss = squared_loss(jnp.array([1.0, -1.0]))
      >>> flow = gradient_flow(lambda w, x: x @ w, jnp.zeros(2), jnp.eye(2), loss, t1=2.0)
      >>> flow.params.round(6)
      Array([ 0.632121, -0.632121], dtype=float64)
    """
    source = KernelSource(apply_fn, x_s, x_q, strategy)
    t0, t1, save_at = check_times(t0, t1, save_at)
    _check_parts(stepper, controller, observables, checkpoint)
    max_num_steps = check_count("max_num_steps", max_num_steps)
    check_problem(source, loss, params)
    source, loss = pinned_problem(source, loss, params)
    params = jax.tree.map(jnp.asarray, params)
    integrator = Integrator(source, loss, stepper, controller, dict(observables or {}))
    infos: list = []
    saved: list = []
    stops = [*sorted(save_at), t1]

    def how_to_go_on() -> str:
        reached = f"Interrupted at t = {infos[-1].t if infos else t0:.3g} of {t1:.3g}."
        if checkpoint is None:
            return f"{reached} Nothing was kept: with checkpoint=Checkpoint(folder) the same call goes on from there."
        return f"{reached} Saved in {checkpoint.directory}; the same call goes on from there."

    def save(*, force: bool) -> None:
        if checkpoint is not None and infos:
            checkpoint.save(state, infos, saved, force=force)

    with (
        interruptible(how_to_go_on),
        contextlib.closing(checkpoint) if checkpoint else contextlib.nullcontext(),
        Progress(t0, t1, enabled=progress) as bar,
    ):
        state = integrator.init(params, t0)
        if checkpoint is not None:
            state, infos, saved = checkpoint.restore(integrator, state, t1, save_at)
        while state.t < t1:
            answer(lambda: save(force=True))
            if state.num_steps >= max_num_steps:
                raise RuntimeError(
                    f"the flow is at t={state.t:.6g} of {t1:.6g} after max_num_steps={max_num_steps} steps. Raise "
                    "max_num_steps, or rtol."
                )
            t_end = next(stop for stop in stops if stop > state.t)
            state, info = integrator.update(state, t_end)
            infos.append(info)
            if state.t == t_end and t_end in save_at:
                saved.append(state.params)
            bar.update(state.t, info.loss, state.num_steps)
            save(force=state.t >= t1)
    saved_at = dict(zip(sorted(set(save_at)), saved, strict=True))
    return _finish(integrator, params, state, infos, [saved_at[t] for t in save_at], t0)


def _check_parts(stepper, controller, observables, checkpoint) -> None:
    check_kind("stepper", stepper, ("init", "step"), "ExponentialMidpoint() or ExponentialEuler()")
    check_kind("controller", controller, ("init", "update", "scale", "tolerance"), "AdaptiveStep() or ConstantStep(dt)")
    if not isinstance(observables or {}, Mapping):
        raise TypeError(f"observables={observables!r} must be a dict of names, e.g. {{'kernel': KernelEvolution()}}.")
    for name, one in (observables or {}).items():
        check_kind(f"observables[{name!r}]", one, ("init", "update"), "an observable, e.g. KernelEvolution()")
    taken = {"t", "h", "loss", "error"} & set(observables or {})
    if taken:
        raise ValueError(f"observables must not be called {sorted(taken)}: the history has entries of that name.")
    if checkpoint is not None:
        check_kind("checkpoint", checkpoint, ("restore", "save"), "Checkpoint(directory)")


def _finish(integrator: Integrator, params0: PyTree, state: FlowState, infos, saved, t0: float) -> Flow:
    stacked = jax.tree.map(lambda *values: np.stack(values), *infos)
    return Flow(
        source=integrator.source,
        loss=integrator.loss,
        t0=t0,
        t1=state.t,
        params0=params0,
        params=state.params,
        operators=state.operators,
        history={"t": stacked.t, "h": stacked.h, "loss": stacked.loss, "error": stacked.error, **stacked.observed},
        observed=state.observed,
        observables=integrator.observables,
        saved_params=tuple(saved),
        num_steps=state.num_steps,
        num_rejected=state.num_rejected,
        tolerance=attainable(integrator.controller.tolerance(state.num_steps), state.outputs_s),
        missed=np.asarray(state.missed, np.float64),
    )


def attainable(aim: float | None, outputs_s: Array) -> float | None:
    """The residual to expect of the identities: no better than the arithmetic they are computed in."""
    if aim is None:
        return None
    return max(aim, 1e4 * float(jnp.finfo(outputs_s.dtype).eps) * math.sqrt(outputs_s.size))
