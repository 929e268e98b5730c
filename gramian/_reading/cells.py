"""Four cells: signal and noise, in the channel and in the reservoir (theory §6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from gramian._flow.flow import Flow
from gramian._losses import OutputLoss, check_loss
from gramian._reading.channel import Channel


class Cell(NamedTuple):
    """One part of the output gradient g(s), in one space.

    Attributes:
      part: "signal" or "noise"; "interaction" for what the four cells do not add up to by themselves.
      space: "channel" or "reservoir"; "all" for the interaction.
      gradient: ‖v‖² / ‖g(s)‖², its share of the initial output gradient.
      dissipated: vᵀW_S v / gᵀW_S g, its share of the loss that training dissipates.
      test_motion: ‖G v‖² / ‖G g‖², its share of the squared test displacement; nan without test points.
      left: ‖P v‖ / ‖v‖, the fraction of it that is left at the end; nan for the interaction or an empty cell.
    """

    part: str
    space: str
    gradient: float
    dissipated: float
    test_motion: float
    left: float


def four_cells(flow: Flow, channel: Channel, clean_loss: OutputLoss | None = None) -> tuple[Cell, ...]:
    """Splits g(s) into signal and noise, and each into channel and reservoir (theory §6).

    With clean targets the signal is the output gradient of the clean loss and the noise what the labels' corruption
    adds: g = g_clean + (g − g_clean). Shares are quadratic, so parts that are not orthogonal interact: the last row
    holds the cross terms, and each column of shares adds up to 1.

    Args:
      flow: a finished flow.
      channel: the split of its W_S.
      clean_loss: the same loss with uncorrupted targets. None takes all of g for signal: two cells.

    Returns:
      The cells, the interaction last.

    Raises:
      ValueError: a clean loss of another kind, or for another number of examples.

    Cost: O(N² + M·N).

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import four_cells, gradient_flow, signal_channel, squared_loss
      >>> y, clean = jnp.array([1.0, -1.0]), jnp.array([1.0, 1.0])
      >>> flow = gradient_flow(lambda w, x: x @ w, jnp.zeros(2), jnp.eye(2), squared_loss(y), t1=1.0)
      >>> cells = four_cells(flow, signal_channel(flow.operators.gramian), squared_loss(clean))
      >>> [f"{cell.part} {cell.space}" for cell in cells]
      ['signal channel', 'signal reservoir', 'noise channel', 'noise reservoir', 'interaction all']
    """
    g = np.asarray(flow.output_grad(flow.params0))
    parts = {"signal": g}
    if clean_loss is not None:
        check_clean(clean_loss, flow.loss)
        signal = np.asarray(clean_loss.grad(flow.source.outputs(flow.params0)[0]))
        parts = {"signal": signal, "noise": g - signal}
    p, w, _, transfer = (np.asarray(operator) for operator in flow.require_operators())
    return cells_of(parts, channel, lambda v: (p @ v, np.sum(v * (w @ v), axis=0), transfer @ v))


def check_clean(clean_loss: OutputLoss, loss: OutputLoss) -> None:
    """Signal and noise add up to g only where both losses are one but for their targets."""
    check_loss(clean_loss, "clean_loss")
    if clean_loss.name != loss.name or clean_loss.targets.shape != loss.targets.shape:
        raise ValueError(
            f"clean_loss is {clean_loss.name} with targets {clean_loss.targets.shape}, but the run's loss is "
            f"{loss.name} with targets {loss.targets.shape}; build both alike."
        )


def cells_of(
    parts: Mapping[str, np.ndarray],
    channel: Channel,
    respond: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[Cell, ...]:
    """The cells of parts that add up to g; `respond(V)` gives P V, the diagonal of VᵀW V, and G V for columns V."""
    named = [
        (part, space, project(vector))
        for part, vector in parts.items()
        for space, project in (("channel", channel.signal), ("reservoir", channel.reservoir))
    ]
    whole = np.sum(list(parts.values()), axis=0)
    vectors = np.stack([whole, *(vector for *_, vector in named)], axis=1)
    propagated, dissipated, moved = respond(vectors)
    energies = np.stack([np.sum(vectors**2, axis=0), dissipated, np.sum(moved**2, axis=0)])
    total = np.where(energies[:, 0] == 0, np.nan, energies[:, 0])
    cells = []
    for k, (part, space, vector) in enumerate(named, start=1):
        size = np.linalg.norm(vector)
        left = np.linalg.norm(propagated[:, k]) / size if size > 1e-14 * np.linalg.norm(whole) else np.nan
        gradient, energy, motion = map(float, energies[:, k] / total)
        cells.append(Cell(part, space, gradient, energy, motion, float(left)))
    rest = 1 - np.sum([cell[2:5] for cell in cells], axis=0)
    gradient, energy, motion = map(float, rest)
    return (*cells, Cell("interaction", "all", gradient, energy, motion, float("nan")))
