"""Signal channel and reservoir: the eigenspaces of the dissipation Gramian (theory §6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Array, Float

from gramian._checks import check_real


class ChannelRule(Protocol):
    """Where the channel ends: how many of the descending eigenvalues of W_S belong to it."""

    def rank(self, eigenvalues: np.ndarray, trace: float | None = None) -> int:
        """`trace` is that of the whole operator, where only its top eigenvalues are known."""
        ...


@dataclass(frozen=True)
class TraceShare:
    """The fewest top eigenvectors that hold `share` of the trace of W_S.

    Args:
      share: in (0, 1].

    Raises:
      TypeError, ValueError: share that is no number in (0, 1].

    Example:
      >>> import numpy as np
      >>> from gramian import TraceShare
      >>> TraceShare(0.8).rank(np.array([6.0, 3.0, 1.0]))
      2
    """

    share: float = 0.95

    def __post_init__(self):
        object.__setattr__(self, "share", check_real("share", self.share))
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1]: 0.95 keeps 95 % of the trace.")

    def rank(self, eigenvalues: np.ndarray, trace: float | None = None) -> int:
        held = np.cumsum(eigenvalues)
        wanted = self.share * (held[-1] if trace is None else trace)
        # At a full share rounding of the sum must not decide.
        return min(int(np.searchsorted(held, wanted * (1 - 1e-12))) + 1, len(held)) if held[-1] > 0 else 0


@dataclass(frozen=True)
class AboveThreshold:
    """The eigenvectors whose eigenvalue of W_S exceeds `threshold`, in units of time × kernel.

    Args:
      threshold: ≥ 0. Under the squared loss eigenvalues lie between 0 and n/2.

    Raises:
      TypeError, ValueError: a threshold that is no number, negative or NaN.

    Example:
      >>> import numpy as np
      >>> from gramian import AboveThreshold
      >>> AboveThreshold(2.0).rank(np.array([6.0, 3.0, 1.0]))
      2
    """

    threshold: float

    def __post_init__(self):
        object.__setattr__(self, "threshold", check_real("threshold", self.threshold))
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold} must not be negative.")

    def rank(self, eigenvalues: np.ndarray, trace: float | None = None) -> int:
        return int(np.sum(eigenvalues > self.threshold))


@dataclass(frozen=True)
class Channel:
    """The eigenvectors of W_S (of the motion Gramian V for a real run), split into signal channel and reservoir.

    The split is a convention: the spectrum is the result. The bound (I6) says what a soft reservoir still shows.

    Attributes:
      eigenvalues: descending, (N,); the largest ones alone where N is large.
      vectors: their eigenvectors in the columns, (N, N) or fewer.
      rank: dimension of the signal channel; its complement is the reservoir.
      rule: the rule that chose the rank.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    rank: int
    rule: ChannelRule

    def signal(self, v: np.ndarray) -> np.ndarray:
        """Orthogonal projection of (N,) or (N, r) onto the signal channel."""
        basis = self.vectors[:, : self.rank]
        return basis @ (basis.T @ v)

    def reservoir(self, v: np.ndarray) -> np.ndarray:
        """Orthogonal projection onto the reservoir."""
        return v - self.signal(v)


def signal_channel(gramian: Float[Array, "N N"], rule: ChannelRule = TraceShare()) -> Channel:
    """Splits output space by the eigenvalues of W_S: top ones span the signal channel, the rest the reservoir.

    Args:
      gramian: W_S, symmetric positive semi-definite, (N, N).
      rule: `TraceShare(share)` or `AboveThreshold(threshold)`.

    Returns:
      A `Channel`.

    Raises:
      ValueError: a matrix that is not square, symmetric and finite.

    Cost: one symmetric eigenproblem, O(N³).

    Example:
      >>> import numpy as np
      >>> from gramian import signal_channel
      >>> signal_channel(np.diag([1.0, 100.0])).rank
      1
    """
    w = np.asarray(gramian)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not np.isfinite(w).all():
        raise ValueError(f"gramian has shape {w.shape}; it must be a finite square matrix.")
    asymmetry = np.abs(w - w.T).max()
    if asymmetry > 1e-3 * np.abs(w).max():
        raise ValueError(f"gramian is off symmetry by {asymmetry:.3g}; pass W_S, e.g. flow.operators.gramian.")
    values, vectors = np.linalg.eigh((w + w.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    return Channel(values, vectors, rule.rank(np.maximum(values, 0)), rule)
