"""In which order the eigen-directions of the initial kernel are learnt (theory §6, "implicit bias")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gramian._flow.flow import Flow
from gramian._flow.observables import ChannelFill


@dataclass(frozen=True)
class FillOrder:
    """When each eigen-direction of K_SS(t0) filled half of what it holds in the end.

    Attributes:
      eigenvalues: of K_SS(t0), descending, (N,).
      half_times: first time at which v_iᵀ W_S v_i reaches half its final value, (N,), in units of time; nan for
        directions that stay empty.
      correlation: Spearman's rank correlation of −eigenvalues and half_times over the others: 1 when the channel fills
        from the top eigenvalue down, nan where all are equal.
    """

    eigenvalues: np.ndarray
    half_times: np.ndarray
    correlation: float


def fill_order(flow: Flow) -> FillOrder:
    """The order in which the signal channel fills: implicit bias says from the top eigenvalue of the kernel down.

    Args:
      flow: a finished flow that recorded `ChannelFill()`.

    Returns:
      A `FillOrder`.

    Raises:
      ValueError: the flow did not record `ChannelFill()`.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import ChannelFill, fill_order, gradient_flow, squared_loss
      >>> x = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> loss = squared_loss(jnp.ones(3))
      >>> flow = gradient_flow(lambda w, x: x @ w, jnp.zeros(3), x, loss, t1=9.0, observables={"fill": ChannelFill()})
      >>> round(fill_order(flow).correlation, 6)
      1.0
    """
    from scipy.stats import spearmanr  # a third of the time that the package takes to import

    filled = flow.recorded(ChannelFill)
    if filled is None:
        raise ValueError("the flow has no record of the channel's filling; pass observables={'fill': ChannelFill()}.")
    values = np.linalg.eigvalsh(np.asarray(flow.source.k_ss(flow.params0)))[::-1]
    times = np.concatenate([[flow.t0], flow.history["t"]])
    held = np.vstack([np.zeros(len(values)), filled])
    half_times = np.array([_crossing(times, column, column[-1] / 2) if column[-1] > 0 else np.nan for column in held.T])
    filling = np.isfinite(half_times)
    of, when = values[filling], half_times[filling]
    # A rank correlation needs two different values on either side.
    ordered = filling.any() and np.ptp(of) > 0 and np.ptp(when) > 0
    correlation = np.clip(spearmanr(-of, when)[0], -1, 1) if ordered else np.nan  # pyright: ignore
    return FillOrder(values, half_times, float(correlation))


def _crossing(times, values, level):
    """First time at which the piecewise linear curve reaches the level."""
    i = int(np.argmax(values >= level))
    t, v = times[i - 1 : i + 1], values[i - 1 : i + 1]
    return t[0] + (level - v[0]) / (v[1] - v[0]) * (t[1] - t[0])
