"""When a step is accepted and how long the next one is (theory §5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gramian._checks import check_real


class Decision(NamedTuple):
    """Whether a trial step stands, and the length of the next trial."""

    accept: bool
    h: float


class Controller(Protocol):
    """A step-size rule: pure functions of numbers on the host."""

    def init(self, fastest_rate: float) -> float:
        """Length of the first trial step; `fastest_rate` is the largest eigenvalue of B K_SS at the start."""
        ...

    def update(self, h: float, scaled_error: float, order: int) -> Decision: ...

    def tolerance(self, num_steps: int) -> float | None:
        """Relative residual that the identities may have after so many steps; None if the rule promises none."""
        ...

    def scale(self, error: float, size: float) -> float:
        """A local error as a multiple of the allowed one, for a quantity of root mean square `size`."""
        ...


@dataclass(frozen=True)
class AdaptiveStep:
    """Local error control: a step stands if its estimated error is at most atol + rtol · size.

    The error is a root mean square over the outputs, and `size` that of the outputs themselves, taken separately for
    training outputs, test outputs and output gradient (the last against its value at the start). For a stepper of
    order p the error of a step is O(hᵖ⁺¹), so h goes like rtol^(1/(p+1)). The identities may be missed by what the
    steps were allowed to miss in all, num_steps · rtol, which goes like rtol^(p/(p+1)).

    Args:
      rtol: relative local error, without unit, > 0.
      atol: absolute local error, in units of the outputs, ≥ 0.
      first_step: length of the first trial step in units of time; None takes the reciprocal of the flow's fastest rate.

    Raises:
      TypeError, ValueError: rtol ≤ 0, atol < 0, first_step ≤ 0, or values that are not finite numbers.

    Example:
      >>> from gramian import AdaptiveStep
      >>> AdaptiveStep(rtol=1e-6).update(h=1.0, scaled_error=8.0, order=2)
      Decision(accept=False, h=0.45)
    """

    rtol: float = 1e-4
    atol: float = 0.0
    first_step: float | None = None

    def __post_init__(self):
        for name in ("rtol", "atol", *(() if self.first_step is None else ("first_step",))):
            object.__setattr__(self, name, check_real(name, getattr(self, name)))
        _require(math.isfinite(self.rtol) and self.rtol > 0, f"rtol={self.rtol!r} must be positive and finite")
        _require(math.isfinite(self.atol) and self.atol >= 0, f"atol={self.atol!r} must be finite and not negative")
        _require(
            self.first_step is None or (math.isfinite(self.first_step) and self.first_step > 0),
            f"first_step={self.first_step!r} must be positive and finite, or None",
        )

    def init(self, fastest_rate: float) -> float:
        return self.first_step or 1.0 / max(fastest_rate, 1e-30)

    def update(self, h: float, scaled_error: float, order: int) -> Decision:
        # 0.9 is the customary safety factor; the limits keep one bad estimate from ruining the next step.
        factor = 4.0 if scaled_error == 0 else min(4.0, max(0.2, 0.9 * scaled_error ** (-1 / (order + 1))))
        return Decision(scaled_error <= 1, h * factor)

    def tolerance(self, num_steps: int) -> float | None:
        return num_steps * self.rtol

    def scale(self, error: float, size: float) -> float:
        allowed = self.atol + self.rtol * size
        return error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)


@dataclass(frozen=True)
class ConstantStep:
    """Steps of one length, whatever their error: for order-of-convergence studies.

    Args:
      dt: length of a step in units of time, > 0. The last step is shortened to end at t1.

    Raises:
      TypeError, ValueError: dt is not a positive and finite number.

    Example:
      >>> from gramian import ConstantStep
      >>> ConstantStep(0.1).update(h=0.1, scaled_error=0.0, order=2)
      Decision(accept=True, h=0.1)
    """

    dt: float

    def __post_init__(self):
        object.__setattr__(self, "dt", check_real("dt", self.dt))
        _require(math.isfinite(self.dt) and self.dt > 0, f"dt={self.dt!r} must be positive and finite")

    def init(self, fastest_rate: float) -> float:
        return self.dt

    def update(self, h: float, scaled_error: float, order: int) -> Decision:
        return Decision(True, self.dt)

    def tolerance(self, num_steps: int) -> float | None:
        return None

    def scale(self, error: float, size: float) -> float:
        return error / size if size != 0 else 0.0  # a size that is NaN makes the error NaN


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message + ".")
