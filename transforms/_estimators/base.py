"""What an estimator is, a pair of functions, and what it gives: mean and variance of each gradient coordinate."""

from typing import Any, NamedTuple, Protocol

import optax
from jax.typing import ArrayLike


class Moments(NamedTuple):
    """Mean and variance of the gradient, coordinate by coordinate, and how they are to be compared.

    Attributes:
      mean: tree like the gradients; the estimate m̂ of the mean gradient, in units of the gradient.
      variance: tree like the gradients; the estimate ŝ of the variance of *one batch's* mean gradient, in units of
        the gradient squared. It is not the per-example variance.
      noise_ratio: c with Var m̂ = c E ŝ, so that t² = m̂²/(c ŝ).
      dof: degrees of freedom of ŝ.
      overlap: κ, how far m̂'s own noise enters ŝ: a share κ t² of it, so that t² <= 1/κ. It is zero for a variance about
        the very mean that is tested, as within a batch. On pure Gaussian noise (1 - κ) t² / (1 - κ t²) follows
        F(1, dof), up to the approximation by Satterthwaite's dof.
    """

    mean: optax.Updates
    variance: optax.Updates
    noise_ratio: ArrayLike = 1.0
    dof: ArrayLike = float("inf")
    overlap: ArrayLike = 0.0


class StatisticInitFn(Protocol):
    """`init(params) -> state`."""

    def __call__(self, params: optax.Params) -> Any: ...


class StatisticUpdateFn(Protocol):
    """`update(grads, state, params=None, **extra_args) -> (state, moments)`.

    Inside `poprisk_gate` the extra arguments are those of the optimizer's `update`, and `inner_state` and
    `new_inner_state`, the state of the wrapped optimizer before and after this step; inside `poprisk_adamw` also Adam's
    `b1` and `b2`. An implementation ignores what it does not need.
    """

    def __call__(
        self, grads: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Any, Moments]: ...


class Statistic(NamedTuple):
    """A pair of pure functions that turns a stream of gradients into `Moments`.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params=None, **extra_args) -> (state, moments)`.
    """

    init: StatisticInitFn
    update: StatisticUpdateFn
