"""The theory's account of one training run: everything at once, as an object that shows itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from entk import Structured, kernel_drift
from entk.internal import Strategy, check_apply
from gramian._checks import check_kind, check_order, check_test_inputs, check_times
from gramian._flow.controllers import AdaptiveStep, Controller
from gramian._flow.flow import Flow, gradient_flow
from gramian._flow.observables import (
    ChannelFill,
    Dissipation,
    DoublingGramian,
    KernelEvolution,
    Observable,
    TestKernelTop,
)
from gramian._flow.steppers import ExponentialMidpoint, Stepper
from gramian._losses import OutputLoss, check_loss, check_targets
from gramian._reading.cells import Cell, check_clean, four_cells
from gramian._reading.channel import Channel, ChannelRule, TraceShare, signal_channel
from gramian._reading.coupling import Coupling, coupling
from gramian._reading.fill import FillOrder, fill_order
from gramian._reading.identities import Identity, identities
from gramian._report.tables import Shown, cell_table, check_figure_path, identity_table, plain, rounded, summary_table
from gramian._storage.checkpoint import Checkpoint
from gramian._storage.interrupts import interruptible

PyTree = Any


@dataclass(frozen=True, repr=False)
class Risk:
    """A loss at the start and the end of a run, and at the end as the operators predict it.

    Attributes:
      start, end: Φ at t0 and t1.
      predicted: at t1, from the start and the operators alone: the training loss by gᵀW_S g, the test loss at
        U_Q(t0) − G g.
    """

    start: float
    end: float
    predicted: float

    def __str__(self) -> str:
        return f"{self.start:.4g} to {self.end:.4g}; predicted by the operators {self.predicted:.4g}"


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What went into the signal channel, what sits in the reservoir, what of it test points see, and how exactly.

    Printed, it is a table; in Jupyter, an HTML one; `plot()` draws it. Built by `analyze`.

    Attributes:
      flow: the run itself.
      channel: signal channel and reservoir.
      cells: signal and noise in channel and reservoir.
      identities: (I1)-(I9) with residual, tolerance and verdict.
      coupling: predicted and observed test displacement; None without test points.
      fill: in which order the channel filled.
      kernels: (time, K_SS) at the start, on the way and at the end.
      train_risk: the training loss.
      test_risk: the test loss; None without test targets.
    """

    flow: Flow
    channel: Channel
    cells: tuple[Cell, ...]
    identities: tuple[Identity, ...]
    coupling: Coupling | None
    fill: FillOrder
    kernels: tuple[tuple[float, np.ndarray], ...]
    train_risk: Risk
    test_risk: Risk | None

    @property
    def drift(self) -> float:
        """‖K(t1) − K(t0)‖₂ / ‖K(t0)‖₂; the record of `KernelEvolution` ends half a step earlier."""
        (_, start), *_, (_, end) = self.kernels
        return float(kernel_drift(jnp.asarray(end), jnp.asarray(start)))

    @property
    def stands_still(self) -> str:
        """Why the flow does not move the training outputs at all; empty where it does."""
        if not np.asarray(self.gramian).any():
            return "J_S is zero all along: no parameter moves a training output, so that channel and W_S are empty"
        if not np.asarray(self.flow.output_grad(self.flow.params0)).any():
            return "g is zero at the start: the labels are fitted, and there is nothing to learn"
        return ""

    @property
    def propagator(self):
        """P(t1, t0), (N, N)."""
        return self.flow.operators.propagator

    @property
    def gramian(self):
        """W_S, (N, N)."""
        return self.flow.operators.gramian

    @property
    def displacement(self):
        """D, (N, N)."""
        return self.flow.operators.displacement

    @property
    def test_transfer(self):
        """G, (M, N)."""
        return self.flow.operators.test_transfer

    def plot(self, *, path=None):
        """Draws the pictures of the theory on one page.

        Args:
          path: file to write the page to, e.g. "report.png"; None writes nothing.

        Returns:
          The matplotlib `Figure`. `gramian.plots` has each picture by itself.

        Raises:
          ValueError: a file that matplotlib cannot write, or a folder that does not exist; before anything is drawn.
        """
        from gramian import plots

        path = check_figure_path(path)
        figure = plots.overview(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def as_dict(self) -> dict[str, Any]:
        """The report's numbers as plain Python values, ready for JSON; nan becomes None."""
        evolution = self.flow.recorded(KernelEvolution)
        return plain(
            {
                "loss": self.flow.loss.name,
                "t0": self.flow.t0,
                "t1": self.flow.t1,
                "num_train_outputs": len(self.channel.eigenvalues),
                "num_test_outputs": self.test_transfer.shape[0],
                "num_steps": self.flow.num_steps,
                "num_rejected": self.flow.num_rejected,
                "identities": [row.as_dict() for row in self.identities],
                "channel": {"rank": self.channel.rank, "rule": repr(self.channel.rule)},
                "gramian_eigenvalues": self.channel.eigenvalues,
                "cells": [cell._asdict() for cell in self.cells],
                "kernel": {name: {"end": v[-1], "largest": v.max()} for name, v in evolution._asdict().items()},
                "drift": self.drift,
                "coupling": self.coupling
                and {
                    "correlation": self.coupling.correlation,
                    "relative_error": self.coupling.relative_error,
                    "unexplained": self.coupling.unexplained,
                },
                "fill_correlation": self.fill.correlation,
                "train_risk": vars(self.train_risk),
                "test_risk": self.test_risk and vars(self.test_risk),
            }
        )

    def tables(self) -> list[Table]:
        return [self._summary_table(), identity_table(self.identities), cell_table(self.cells)]

    def _summary_table(self) -> Table:
        flow, evolution = self.flow, self.flow.recorded(KernelEvolution)
        n, m = self.gramian.shape[0], self.test_transfer.shape[0]
        rows = [
            ("outputs", f"N = {n} training, M = {m} test"),
            ("steps", f"{flow.num_steps} accepted, {flow.num_rejected} rejected"),
            ("training loss", str(self.train_risk)),
        ]
        if self.test_risk is not None:
            rows.append(("test loss", str(self.test_risk)))
        if self.stands_still:
            rows.append(("nothing moves", self.stands_still))
        rows += [
            (
                "kernel drift",
                f"{rounded(self.drift, '.3g')} at the end, {rounded(max(self.drift, evolution.drift.max()), '.3g')} at "
                "most (relative, spectral norm)",
            ),
            (
                "kernel alignment with its start, targets",
                f"{rounded(evolution.alignment[-1], '.3f')}, {rounded(evolution.target_alignment[-1], '.3f')}",
            ),
            (
                "kernel effective rank",
                f"{rounded(evolution.effective_rank[0], '.3g')} to {rounded(evolution.effective_rank[-1], '.3g')}",
            ),
            ("signal channel", f"rank {self.channel.rank} of {n}, {self.channel.rule}"),
            (
                "channel fills from the top",
                f"rank correlation {rounded(self.fill.correlation, '.3f')} of eigenvalue order and half-time",
            ),
        ]
        if self.coupling is not None:
            rows.append(
                (
                    "test displacement from A",
                    f"correlation {rounded(self.coupling.correlation, '.8f')}, relative error "
                    f"{rounded(self.coupling.relative_error, '.2g')}",
                )
            )
        return summary_table(f"Training run: {flow.loss.name} loss, t = {flow.t0:g} to {flow.t1:g}", rows)


@interruptible(lambda: "Interrupted; with checkpoint=Checkpoint(folder) the same call takes the flow from there.")
def analyze(
    apply_fn: Any,
    params: PyTree,
    x_s: PyTree,
    loss: OutputLoss,
    x_q: PyTree | None = None,
    *,
    t0: float = 0.0,
    t1: float,
    clean_loss: OutputLoss | None = None,
    test_loss: OutputLoss | None = None,
    rule: ChannelRule = TraceShare(),
    stepper: Stepper = ExponentialMidpoint(),
    controller: Controller = AdaptiveStep(),
    observables: Mapping[str, Observable] | None = None,
    strategy: Strategy = Structured(),
    max_num_steps: int = 10_000,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> Report:
    """Trains by gradient flow and gives the theory's account of it (theory §§2, 5, 6).

    Args:
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)` that treats examples independently.
      params: pytree of floating-point arrays of one dtype: the start of the flow.
      x_s: training inputs, n examples.
      loss: convex loss of the training outputs, e.g. `squared_loss(y_s)`.
      x_q: test inputs, m examples; None leaves out what concerns test points.
      t0, t1: training time, t1 > t0.
      clean_loss: the same loss with uncorrupted targets; splits signal from noise in the four cells.
      test_loss: the same loss with the targets of x_q; adds the test loss to the report. Nothing else sees them.
      rule: where the signal channel ends, `TraceShare(share)` or `AboveThreshold(threshold)`.
      stepper, controller, strategy, max_num_steps, checkpoint, progress: as in `gradient_flow`. The controller
        must be adaptive: the identities are compared with its aim.
      observables: more to record; `report.flow.history` holds it.

    Returns:
      A `Report`.

    Raises:
      TypeError, ValueError, MemoryError, RuntimeError, FloatingPointError: as `gradient_flow`.

    Cost: that of the flow, and a few N × N eigenproblems.

    Source: Litman & Guo, arXiv:2605.01172.

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import analyze, squared_loss
      >>> x, y = jnp.eye(3), jnp.array([1.0, -1.0, 1.0])
      >>> report = analyze(lambda w, x: jnp.tanh(x @ w), jnp.zeros(3), x, squared_loss(y), x + 0.1, t1=20.0)
      >>> all(row.holds for row in report.identities if row.holds is not None)
      True
      >>> report.gramian.shape
      (3, 3)
    """
    t0, t1, _ = check_times(t0, t1)
    check_kind("rule", rule, ("rank",), "TraceShare(share) or AboveThreshold(threshold)")
    check_kind("controller", controller, ("init", "update", "scale", "tolerance"), "AdaptiveStep(rtol)")
    if controller.tolerance(1) is None:
        raise ValueError(f"{controller} promises no tolerance to judge the identities by; use AdaptiveStep(rtol).")
    check_companions(apply_fn, params, x_s, x_q, loss, clean_loss, test_loss)
    standard = {
        "evolution": KernelEvolution(),
        "fill": ChannelFill(),
        "dissipation": Dissipation(),
        "k_qq_top": TestKernelTop(),
        "doubling": DoublingGramian(),
    }
    snapshots = tuple(t0 + (t1 - t0) * share for share in (0.01, 0.1))
    flow = gradient_flow(
        apply_fn,
        params,
        x_s,
        loss,
        x_q,
        t0=t0,
        t1=t1,
        stepper=stepper,
        controller=controller,
        observables={**standard, **(observables or {})},
        save_at=snapshots,
        strategy=strategy,
        max_num_steps=max_num_steps,
        checkpoint=checkpoint,
        progress=progress,
    )
    channel = signal_channel(flow.operators.gramian, rule)
    coupled = None if x_q is None else coupling(flow)
    visited = zip((t0, *snapshots, t1), (flow.params0, *flow.saved_params, flow.params), strict=True)
    return Report(
        flow=flow,
        channel=channel,
        cells=four_cells(flow, channel, clean_loss),
        identities=identities(flow, coupled=coupled),
        coupling=coupled,
        fill=fill_order(flow),
        kernels=tuple((t, np.asarray(flow.source.k_ss(w))) for t, w in visited),
        train_risk=_train_risk(flow),
        test_risk=None if test_loss is None else _test_risk(flow, test_loss),
    )


def check_companions(apply_fn, params, x_s, x_q, loss, clean_loss, test_loss):
    """The losses that only a report uses, checked before the run instead of after it."""
    check_order(loss, x_s, x_q)
    if clean_loss is not None:
        check_targets(clean_loss, *check_apply(apply_fn, params, x_s, "x_s"), name="clean_loss")
        check_clean(clean_loss, loss)
    if test_loss is not None:
        check_loss(test_loss, "test_loss")
        if x_q is None:
            raise ValueError("test_loss needs the test inputs it belongs to; pass x_q.")
        check_targets(test_loss, *check_test_inputs(apply_fn, params, x_s, x_q), inputs="x_q", name="test_loss")


def _train_risk(flow: Flow) -> Risk:
    start, end = (float(flow.loss.value(flow.source.outputs(w)[0])) for w in (flow.params0, flow.params))
    g = flow.output_grad(flow.params0)
    return Risk(start, end, start - float(g @ flow.operators.gramian @ g))


def _test_risk(flow: Flow, test_loss: OutputLoss) -> Risk:
    start, end = (flow.source.outputs(w)[1] for w in (flow.params0, flow.params))
    moved = flow.operators.test_transfer @ flow.output_grad(flow.params0)
    predicted = start - moved.reshape(start.shape)
    return Risk(*(float(test_loss.value(u)) for u in (start, end, predicted)))
