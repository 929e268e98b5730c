"""How a step of the flow is taken: exponential Euler and exponential midpoint (theory §5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from entk.internal import check_count
from gramian._flow.phi import FrozenKernel, displacement, freeze, integral
from gramian._losses import OutputLoss, block_product
from gramian._problem import KernelSource

PyTree = Any


class KernelPoint(NamedTuple):
    """A parameter vector and the frozen kernel there."""

    params: PyTree
    frozen: FrozenKernel


class Step(NamedTuple):
    """A trial step of length h from `params`.

    Attributes:
      params: parameters at its end.
      outputs_s, outputs_q: outputs there, (n, c) and (m, c).
      point: where the kernel of this step was frozen. The operators of the step are those of this kernel.
      carry: the stepper's kernel for the next step.
      error_s, error_q, error_g: estimated local errors of the training outputs, the test outputs and the output
        gradient, root mean squares in their units.
    """

    params: PyTree
    outputs_s: Float[Array, "n c"]
    outputs_q: Float[Array, "m c"]
    point: KernelPoint
    carry: KernelPoint
    error_s: Float[Array, ""]
    error_q: Float[Array, ""]
    error_g: Float[Array, ""]


class Stepper(Protocol):
    """A one-step method for the flow. `order` is p in a global error of O(hᵖ)."""

    order: ClassVar[int]

    def init(self, source: KernelSource, loss: OutputLoss, params: PyTree) -> KernelPoint: ...

    def step(
        self, source: KernelSource, loss: OutputLoss, params: PyTree, carry: KernelPoint, h: Float[Array, ""]
    ) -> Step: ...


@dataclass(frozen=True)
class ExponentialEuler:
    """Exponential Euler: w⁺ = w − J_Sᵀ hφ₁(−hBK) g with the kernel frozen at w. Order 1 (theory §5).

    Exact for a model linear in its parameters under the squared loss, whatever h. One kernel evaluation a step. Its
    error estimate is the defect u(w⁺) − u(w) − JΔw, which is what the model's curvature adds to the step.

    Example:
      >>> from gramian import ExponentialEuler
      >>> ExponentialEuler().order
      1
    """

    order: ClassVar[int] = 1

    def init(self, source: KernelSource, loss: OutputLoss, params: PyTree) -> KernelPoint:
        return kernel_at(source, loss, params)

    def step(self, source, loss, params, carry, h) -> Step:
        end = _move(source, loss, params, carry, h)
        u_s, u_q = source.outputs(end)
        errors = _defect(source, loss, params, end, carry, h)
        return Step(end, u_s, u_q, carry, kernel_at(source, loss, end), *errors)


@dataclass(frozen=True)
class ExponentialMidpoint:
    """Exponential midpoint: w⁺ = w − J̄ᵀ hφ₁(−hB̄K̄) g with the kernel frozen half-way. Order 2 (theory §5).

    The mid point is that of the chord, (w + w⁺)/2, found by `iterations` fixed-point passes from an exponential Euler
    step with the kernel of the step before. Two passes cost two kernel evaluations a step, as a half step by
    exponential Euler would, and put J̄ where the chord's own average of J is met to third order, which is what the
    identities (I1)-(I4) ask for. Exact for a linear model under the squared loss, whatever h.

    Its error estimate is the larger of the defect u(w⁺) − u(w) − J̄Δw, by which the operators miss this step, and of
    the distance between the last two passes, which follows the error of the step itself. Both are O(h³).

    Args:
      iterations: passes, at least 2 (the estimate needs two of them).

    Raises:
      ValueError: iterations < 2.

    Example:
      >>> from gramian import ExponentialMidpoint
      >>> ExponentialMidpoint().order
      2
    """

    iterations: int = 2
    order: ClassVar[int] = 2

    def __post_init__(self):
        object.__setattr__(self, "iterations", check_count("iterations", self.iterations, 2))

    def init(self, source: KernelSource, loss: OutputLoss, params: PyTree) -> KernelPoint:
        return kernel_at(source, loss, params)

    def step(self, source, loss, params, carry, h) -> Step:
        def passes(_, trial):
            end, _, _ = trial
            middle = jax.tree.map(lambda a, b: a + (b - a) / 2, params, end)
            point = kernel_at(source, loss, middle)
            return _move(source, loss, params, point, h), end, point

        guess = _move(source, loss, params, carry, h)
        end, previous, point = jax.lax.fori_loop(0, self.iterations, passes, (guess, guess, carry))
        u_s, u_q = source.outputs(end)
        v_s, v_q = source.outputs(previous)
        moved = rms(u_s - v_s), rms(u_q - v_q), rms(loss.grad(u_s) - loss.grad(v_s))
        errors = jax.tree.map(jnp.maximum, _defect(source, loss, params, end, point, h), moved)
        return Step(end, u_s, u_q, point, point, *errors)


def kernel_at(source: KernelSource, loss: OutputLoss, params: PyTree) -> KernelPoint:
    """K_SS and B at `params`, diagonalised together."""
    u_s, _ = source.outputs(params)
    return KernelPoint(params, freeze(source.k_ss(params), loss.hessian(u_s), loss.isotropic))


def rms(x: Array) -> Array:
    """Root mean square; 0 for an empty array."""
    return jnp.sqrt(jnp.sum(x**2) / max(x.size, 1))


def _move(source, loss, params, point, h):
    """w − J̄ᵀ hφ₁(−hB̄K̄) g, with J̄, K̄, B̄ of `point`."""
    u_s, _ = source.outputs(params)
    drive = integral(point.frozen, h, loss.grad(u_s))
    return jax.tree.map(jnp.subtract, params, source.pull(point.params, drive))


def _defect(source, loss, start, end, point, h):
    """By how much a step misses its own frozen-kernel account of u_S, u_Q and g."""
    (u_s, u_q), (v_s, v_q) = source.outputs(start), source.outputs(end)
    linear_s, linear_q = source.push(point.params, jax.tree.map(jnp.subtract, end, start))
    g = loss.grad(u_s)
    linear_g = -block_product(point.frozen.hessian, displacement(point.frozen, h, g))
    return rms(v_s - u_s - linear_s), rms(v_q - u_q - linear_q), rms(loss.grad(v_s) - g - linear_g)
