"""One accepted step of the flow: trial, decision, accumulation, observation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gramian._flow.controllers import AdaptiveStep, Controller
from gramian._flow.observables import Observable
from gramian._flow.phi import FrozenKernel
from gramian._flow.steppers import ExponentialMidpoint, KernelPoint, Step, Stepper, rms
from gramian._losses import OutputLoss, block_product
from gramian._operators import Operators, init_operators, update_operators
from gramian._pinning import pinned_observable, pinned_problem
from gramian._problem import KernelSource

PyTree = Any
ROUNDINGS = 20  # of the outputs in one estimate of an error of g


class FlowState(NamedTuple):
    """Everything a flow needs to go on from time t; a pytree of arrays.

    Attributes:
      t: training time reached.
      h: length of the next trial step.
      params: w(t).
      outputs_s, outputs_q: u(t) and U_Q(t), (n, c) and (m, c).
      grad_scale: root mean square of g at the start, the size that errors of g are measured against.
      carry: the stepper's kernel for the next trial.
      operators: P, W_S, D and G from the start to t.
      observed: states of the observables, by name.
      num_steps, num_rejected: accepted and rejected trials so far.
      missed: estimated local errors of u_S, U_Q and g, root mean squares in their units, added up over the steps; (3,).
    """

    t: float
    h: float
    params: PyTree
    outputs_s: Float[Array, "n c"]
    outputs_q: Float[Array, "m c"]
    grad_scale: float
    carry: KernelPoint
    operators: Operators
    observed: dict[str, PyTree]
    num_steps: int
    num_rejected: int
    missed: Array


class StepInfo(NamedTuple):
    """What one accepted step has to report.

    Attributes:
      t: time at its end.
      h: its length.
      loss: Φ_S at its end.
      error: its estimated local error as a multiple of the allowed one (of the size of the outputs under
        `ConstantStep`).
      observed: values of the observables, by name.
    """

    t: float
    h: float
    loss: float
    error: float
    observed: dict[str, Any]


@dataclass(frozen=True)
class Integrator:
    """The (init, update) pair behind `gradient_flow`, for loops of one's own.

    Args:
      source: where outputs and kernels come from.
      loss: the convex training loss of the outputs.
      stepper: how a step is taken.
      controller: when it stands, and how long the next one is.
      observables: what to record along the way, by name.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import Integrator, KernelSource, squared_loss
      >>> source = KernelSource(lambda w, x: x @ w, jnp.eye(2))
      >>> flow = Integrator(source, squared_loss(jnp.array([1.0, -1.0])))
      >>> state = flow.init(jnp.zeros(2))
      >>> state, info = flow.update(state, t_end=2.0)
      >>> state.operators.propagator.round(6)
      Array([[0.367879, 0.      ],
             [0.      , 0.367879]], dtype=float64)
    """

    source: KernelSource
    loss: OutputLoss
    stepper: Stepper = ExponentialMidpoint()
    controller: Controller = AdaptiveStep()
    observables: Mapping[str, Observable] = field(default_factory=dict)

    def init(self, params: PyTree, t0: float = 0.0) -> FlowState:
        """The state of a flow that starts at `params` at time t0.

        Raises:
          FloatingPointError: a kernel or a Hessian that is not finite there.
        """
        self = self._pinned(params)
        carry = _init_point(self.stepper, self.source, self.loss, params)
        if not np.isfinite(jax.device_get(carry.frozen.rates)).all():
            raise FloatingPointError(
                f"B K_SS is not finite at the start, t={t0:.6g}, although the outputs are: {_infinite(carry.frozen)}. "
                "Check apply_fn and the loss for derivatives that are infinite or overflow there, as those of sqrt, "
                "abs(x)**a, norm at 0, or scale them down."
            )
        u_s, u_q = self.source.outputs(params)
        observed = {
            name: observable.init(self.source, self.loss, carry) for name, observable in self.observables.items()
        }
        return FlowState(
            t=float(t0),
            h=self.controller.init(float(carry.frozen.rates.max())),
            params=params,
            outputs_s=u_s,
            outputs_q=u_q,
            grad_scale=float(rms(self.loss.grad(u_s))),
            carry=carry,
            operators=init_operators(u_s.size, u_q.size, u_s.dtype),
            observed=observed,
            num_steps=0,
            num_rejected=0,
            missed=jnp.zeros(3, u_s.dtype),
        )

    def update(self, state: FlowState, t_end: float) -> tuple[FlowState, StepInfo]:
        """One accepted step, not beyond t_end.

        Raises:
          FloatingPointError: outputs that are not finite at a step that cannot be shortened any more; operators that
            are not finite.
          ValueError: a negative eigenvalue of B (the loss is not convex).
        """
        self = self._pinned(state.params, state)
        rejected = state.num_rejected
        h = state.h
        while True:
            left = t_end - state.t
            # A step that would leave less than a rounding error to go ends at t_end.
            last = h >= left * (1 - 1e-12)
            length = left if last else h
            step = _trial(self.stepper, self.source, self.loss, state.params, state.carry, jnp.asarray(length))
            error = self._scaled_error(state, step, length)
            accept, proposed = self.controller.update(length, error, self.stepper.order)
            if accept and np.isfinite(error):
                break
            h = proposed if np.isfinite(error) else length / 5
            rejected += 1
            if not h > 1e-14 * max(abs(state.t), t_end - state.t):
                raise FloatingPointError(
                    f"no step from t={state.t:.6g} meets the tolerance, down to length {h:.3g}: "
                    f"{_reason(step, error)}. Up to there the training loss is "
                    f"{float(self.loss.value(state.outputs_s)):.4g}, the largest output "
                    f"{float(jnp.abs(state.outputs_s).max()):.4g}. Check apply_fn for kinks and overflow, or raise "
                    "rtol."
                )
        # Only now: a trial that is too long may look where the path never goes.
        _check_convex(self.loss, step, state.t)
        operators, observed, values, finite = _accept(
            tuple(self.observables.items()), self.source, self.loss, state, step, jnp.asarray(length)
        )
        if not finite:
            raise FloatingPointError(
                f"the operators are not finite after the step from t={state.t:.6g} to {state.t + length:.6g}, although "
                "the outputs are: K_SS or K_QS holds NaN or infinite values. Check apply_fn for derivatives that are "
                "infinite or overflow at x_s and x_q."
            )
        t = t_end if last else state.t + length
        new = FlowState(
            t=t,
            # What is left of a shortened last step says nothing about the length of the next one.
            h=max(h, proposed) if last else proposed,
            params=step.params,
            outputs_s=step.outputs_s,
            outputs_q=step.outputs_q,
            grad_scale=state.grad_scale,
            carry=step.carry,
            operators=operators,
            observed=observed,
            num_steps=state.num_steps + 1,
            num_rejected=rejected,
            missed=state.missed + jnp.stack([step.error_s, step.error_q, step.error_g]),
        )
        return new, StepInfo(t, length, float(self.loss.value(step.outputs_s)), error, jax.device_get(values))

    def _pinned(self, params: PyTree, state: FlowState | None = None) -> Integrator:
        """With its functions as they are when a flow begins; observables take a state to be traced with."""
        known = self.__dict__.get("_as_begun")
        if state is None or known is None:
            source, loss = pinned_problem(self.source, self.loss, params)
            known = Integrator(source, loss, self.stepper, self.controller, self.observables)
            object.__setattr__(self, "_as_begun", known)
        if state is None or "_is_observed" in known.__dict__:
            return known
        arguments = known.source, state.carry, state.operators, jnp.asarray(state.h, state.outputs_s.dtype)
        observables = {
            name: pinned_observable(observable, state.observed[name], *arguments)
            for name, observable in self.observables.items()
        }
        known = replace(known, observables=observables)
        known.__dict__["_is_observed"] = True
        object.__setattr__(self, "_as_begun", known)
        return known

    def _scaled_error(self, state, step, length):
        errors, sizes = jax.device_get(_error_scales(state.outputs_s, state.outputs_q, step))
        scaled = [
            self.controller.scale(float(e), float(s)) for e, s in zip(errors, (*sizes, state.grad_scale), strict=True)
        ]
        return float(np.max(scaled))  # unlike max(), it never passes over a NaN


@partial(jax.jit, static_argnums=0)
def _init_point(stepper, source, loss, params):
    return stepper.init(source, loss, params)


@partial(jax.jit, static_argnums=0)
def _trial(stepper, source, loss, params, carry, h):
    return stepper.step(source, loss, params, carry, h.astype(carry.frozen.rates.dtype))


@jax.jit
def _error_scales(u_s, u_q, step):
    sizes = [jnp.maximum(rms(a), rms(b)) for a, b in ((u_s, step.outputs_s), (u_q, step.outputs_q))]
    # Labels may be fitted to the last digit: what rounding of the outputs makes of g is no error of the step.
    noise = (
        ROUNDINGS * jnp.finfo(u_s.dtype).eps * rms(block_product(step.point.frozen.hessian, jnp.abs(u_s).reshape(-1)))
    )
    return (step.error_s, step.error_q, jnp.maximum(step.error_g - noise, 0)), sizes


def _infinite(frozen: FrozenKernel) -> str:
    """Which of K_SS and B holds what."""
    counts = [(name, int(jnp.sum(~jnp.isfinite(one)))) for name, one in (("K_SS", frozen.k_ss), ("B", frozen.hessian))]
    found = [f"{name} holds {bad} NaN or infinite values" for name, bad in counts if bad]
    return " and ".join(found) or "their product overflows"


def _reason(step: Step, error: float) -> str:
    if np.isfinite(error):
        return "the outputs jump or are not finite there"
    broken = [
        name
        for name, one in (("training", step.outputs_s), ("test", step.outputs_q))
        if not bool(jnp.isfinite(one).all())
    ]
    return f"the {' and '.join(broken)} outputs are not finite there" if broken else "the kernels are not finite there"


def _check_convex(loss: OutputLoss, step: Step, t: float) -> None:
    lowest, allowed = map(float, jax.device_get(_lowest_rate(loss, step)))
    if lowest < -allowed:
        raise ValueError(
            f"the loss is not convex: B K_SS has the eigenvalue {lowest:.3g} in the step from t={t:.6g}, but B must be "
            "positive semi-definite along the whole path. Use a loss that is convex in the outputs."
        )


@jax.jit
def _lowest_rate(loss, step):
    """The smallest eigenvalue of B K_SS, and how far below zero rounding takes it: that of B's own arithmetic too."""
    frozen = step.point.frozen
    size = loss.curvature(step.outputs_s) * jnp.linalg.norm(frozen.k_ss)
    return frozen.rates.min(), 1e3 * jnp.finfo(frozen.rates.dtype).eps * size


@partial(jax.jit, static_argnums=0)
def _accept(observables, source, loss, state, step, h):
    h = h.astype(step.outputs_s.dtype)
    operators = update_operators(state.operators, step.point.frozen, source.k_qs(step.point.params), h)
    observed, values = {}, {}
    for name, observable in observables:
        observed[name], values[name] = observable.update(state.observed[name], source, step.point, operators, h)
    finite = jnp.stack([jnp.isfinite(one).all() for one in operators]).all()
    return operators, observed, values, finite
