"""The theory's account of a recorded run: of SGD, momentum, Adam, with its mini-batches (theory §3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from entk.internal import SpectralDensity, check_count
from gramian._checks import check_kind
from gramian._krylov import ritz_pairs, spectrum_of
from gramian._losses import OutputLoss
from gramian._reading.cells import Cell, cells_of
from gramian._reading.channel import Channel, ChannelRule, TraceShare
from gramian._reading.identities import Identity
from gramian._report.flow import Risk, check_companions
from gramian._report.tables import Shown, cell_table, check_figure_path, identity_table, plain, rounded, summary_table
from gramian._run.account import MotionCoupling, RunAccount, outputs_of
from gramian._run.path import RealizedOperator, RealizedPath, Sweep, dense_operators
from gramian._run.recording import Recording
from gramian._storage.interrupts import interruptible

PyTree = Any
DENSE_OUTPUTS = 600  # N up to which the operators are formed


@dataclass(frozen=True, repr=False)
class TrainingReport(Shown):
    """What a real run moved, what it could not move, what of it test points see, and how exactly.

    Printed, it is a table; in Jupyter, an HTML one; `plot()` draws it. Built by `analyze_training`.

    Attributes:
      path: the run; `RealizedOperator(path, name)` gives its operators.
      operators: P, W, V, D, G as matrices by name; None where N is large.
      channel: signal channel and reservoir of the motion Gramian V.
      gramian_eigenvalues: of W, descending; the largest ones alone where N is large.
      densities: of all eigenvalues of V and of W: exact where the operators are dense, block Lanczos quadrature from
        the products that gave the eigenpairs where N is large.
      residuals: ‖V v − λ v‖ of the channel's eigenpairs; zeros where the operators are dense.
      seen: ‖G v‖² for the same eigenvectors; (I6′) bounds it by visibility · λ. None without test points.
      visibility: Σ λ_max(J̄_Q N J̄_Qᵀ).
      negative_share: −λ_min(W) / λ_max(W): how far W is from positive semi-definite; channels may be ranked by W only
        where it is small. 0 where W has nothing below zero, 1 where it has nothing above.
      forced: norms of the displacement that is not linear in gradients (weight decay), relative to the whole one: at
        training and at test points.
      identities: (I1)-(I4) and (I6′).
      cells: signal and noise in channel and reservoir.
      coupling: None without test points.
      train_risk, test_risk: the losses; test_risk is None without test targets.
      losses: training loss before every step and at the end, (steps + 1,).
      predicted: the same from the operators, Φ(s) − gᵀ W_k g with W up to step k.
      replay: largest relative distance between a recorded state and the same one computed again.
    """

    path: RealizedPath
    operators: dict[str, np.ndarray] | None
    channel: Channel
    gramian_eigenvalues: np.ndarray
    densities: tuple[SpectralDensity, SpectralDensity]
    residuals: np.ndarray
    seen: np.ndarray | None
    visibility: float
    negative_share: float
    forced: tuple[float, float]
    identities: tuple[Identity, ...]
    cells: tuple[Cell, ...]
    coupling: MotionCoupling | None
    train_risk: Risk
    test_risk: Risk | None
    losses: np.ndarray
    predicted: np.ndarray
    replay: float

    @property
    def channel_reached(self) -> bool:
        """Whether the rule ended the channel, and not the number of eigenpairs that are known."""
        known = len(self.channel.eigenvalues)
        return self.channel.rank < known or known == self.path.sizes[0]

    @property
    def channel_estimate(self) -> int:
        """The channel's rank by its rule; where that is more than is known, by the estimate of all eigenvalues of V."""
        if self.channel_reached:
            return self.channel.rank
        places, nodes = spectrum_of(self.densities[0])
        every = np.interp(np.arange(1, self.path.sizes[0] + 1), places, nodes)
        return self.channel.rule.rank(np.maximum(every, 0))

    def plot(self, *, path=None):
        """Draws the pictures of a recorded run on one page.

        Args:
          path: file to write the page to, e.g. "report.png"; None writes nothing.

        Returns:
          The matplotlib `Figure`. `gramian.plots.run` has each picture by itself.

        Raises:
          ValueError: a file that matplotlib cannot write, or a folder that does not exist; before anything is drawn.
        """
        from gramian.plots import run as training_plots

        path = check_figure_path(path)
        figure = training_plots.overview(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def as_dict(self) -> dict[str, Any]:
        """The report's numbers as plain Python values, ready for JSON; nan becomes None."""
        num_train, num_test = self.path.sizes
        return plain(
            {
                "loss": self.path.recording.loss.name,
                "num_steps": self.path.recording.num_steps,
                "num_train_outputs": num_train,
                "num_test_outputs": num_test,
                "quadrature": self.path.quadrature,
                "identities": [row.as_dict() for row in self.identities],
                "channel": {
                    "rank": self.channel.rank,
                    "rule": repr(self.channel.rule),
                    "estimate": self.channel_estimate,
                },
                "motion_eigenvalues": self.channel.eigenvalues,
                "gramian_eigenvalues": self.gramian_eigenvalues,
                "effective_ranks": {
                    name: one.effective_rank()._asdict()
                    for name, one in zip(("motion", "gramian"), self.densities, strict=True)
                },
                "residuals": self.residuals,
                "seen": self.seen,
                "visibility": self.visibility,
                "negative_share": self.negative_share,
                "forced": self.forced,
                "cells": [cell._asdict() for cell in self.cells],
                "coupling": self.coupling
                and {name: getattr(self.coupling, name) for name in ("rank", "correlation", "relative_error")},
                "train_risk": vars(self.train_risk),
                "test_risk": self.test_risk and vars(self.test_risk),
                "losses": self.losses,
                "predicted_losses": self.predicted,
                "replay": self.replay,
            }
        )

    def tables(self) -> list[Table]:
        run, (num_train, num_test) = self.path.recording, self.path.sizes
        sampled = len(self.channel.eigenvalues) < num_train
        known = f", {len(self.channel.eigenvalues)} eigenpairs known" if sampled else ""
        if not self.channel_reached:
            known += f" and all taken, of about {self.channel_estimate}: raise rank"
        effective = [
            rounded(float(value), ".4g") + (f" ± {float(error):.2g}" if sampled else "")
            for value, error in (one.effective_rank() for one in self.densities)
        ]
        rows = [
            ("outputs", f"N = {num_train} training, M = {num_test} test"),
            ("steps", f"{run.num_steps}, averaged at {self.path.quadrature} Gauss points"),
            ("training loss", str(self.train_risk)),
        ]
        if self.test_risk is not None:
            rows.append(("test loss", str(self.test_risk)))
        if not np.any(self.channel.eigenvalues):
            rows.append(("nothing moves", "no gradient moved a parameter on the way: V, W and the channel are empty"))
        rows += [
            ("signal channel", f"rank {self.channel.rank} of {num_train}, {self.channel.rule}{known}"),
            ("effective rank tr()²/tr(()²) of V, W", ", ".join(effective)),
            ("W below zero", f"{rounded(100 * self.negative_share, '.2g')} % of its largest eigenvalue"),
            (
                "moved by weight decay",
                f"{rounded(100 * self.forced[0], '.2g')} % (training), {rounded(100 * self.forced[1], '.2g')} % (test)",
            ),
        ]
        if self.coupling is not None:
            rows.append(
                (
                    f"test displacement from A, rank {self.coupling.rank}",
                    f"correlation {rounded(self.coupling.correlation, '.6f')}, relative error "
                    f"{rounded(self.coupling.relative_error, '.2g')}",
                )
            )
        title = f"Recorded run: {run.loss.name} loss, {run.num_steps} steps"
        return [summary_table(title, rows), identity_table(self.identities), cell_table(self.cells)]


@interruptible(lambda: "Interrupted; with store=folder the same call takes finished sweeps from there.")
def analyze_training(
    recording: Recording,
    x_q: PyTree | None = None,
    *,
    quadrature: int = 2,
    rank: int = 16,
    num_products: int = 2,
    dense: bool | None = None,
    rule: ChannelRule = TraceShare(),
    clean_loss: OutputLoss | None = None,
    test_loss: OutputLoss | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    progress: bool = False,
) -> TrainingReport:
    """Gives the theory's account of a run as it was: its optimizer, its batches, its finite steps (theory §3).

    The signal channel is that of the motion Gramian V: directions that never moved the parameters cannot be seen at
    test (I6′). Where N is large, `rank` top eigenpairs of V and W are computed without forming either.

    Args:
      recording: a recorded run.
      x_q: test inputs, m examples; None leaves out what concerns test points.
      quadrature: Gauss points of the averages along each step; (I1)-(I4) hold to their error.
      rank: eigenpairs where the operators are not formed.
      num_products: products with a block of rank + 4 probes for these, 2 or more; their residuals fall with each.
      dense: form the operators; None does for N ≤ 600.
      rule: where the channel ends.
      clean_loss: the same loss with uncorrupted targets; splits signal from noise in the four cells.
      test_loss: the same loss with the targets of x_q; adds the test loss. Nothing else sees them.
      seed: of random probes.
      store: folder for sweeps; a killed analysis that is run again goes on from there and ends with the same bits.
      progress: draws progress bars.

    Returns:
      A `TrainingReport`.

    Raises:
      TypeError, ValueError: an optimizer that is not linear in the gradients given its realized state, a recording
        whose steps cannot be computed again, targets that do not fit.
      FloatingPointError: the step at which the run, or an operator of it, leaves the finite numbers.
      MemoryError: dense operators that would not fit.

    Cost: sweeps over the run, each quadrature · (number of probes) products with J on all points a step. Dense: one
    with N probes. Else 3·num_products for V and for W with rank + 4 probes, and one with rank. Then one with 5, and
    one with a single probe and one Gauss point more, which the tolerances come from.

    Source: Litman & Guo, arXiv:2605.01172, extended to realized steps.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> from gramian import Recorder, analyze_training, minibatches, record_training, squared_loss
      >>> x, loss = jnp.eye(3), squared_loss(jnp.array([1.0, -1.0, 0.5]))
      >>> model = lambda w, x: jnp.tanh(x @ w)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _, run = record_training(
      ...         model, jnp.zeros(3), x, loss, optax.adam(0.1), minibatches(3, 2, 20), Recorder(folder)
      ...     )
      ...     report = analyze_training(run, x + 0.1, quadrature=4)
      >>> all(row.holds for row in report.identities)
      True
    """
    if not isinstance(recording, Recording):
        raise TypeError(
            f"recording={recording!r} must be a Recording: record_training returns one, and Recording(directory, ...) "
            "opens one."
        )
    check_kind("rule", rule, ("rank",), "TraceShare(share) or AboveThreshold(threshold)")
    rank, num_products = check_count("rank", rank), check_count("num_products", num_products)
    seed = check_count("seed", seed, 0)
    problem = recording.apply_fn, recording.params, recording.x_s, x_q, recording.loss
    check_companions(*problem, clean_loss, test_loss)
    path = RealizedPath(recording, x_q, quadrature, store, progress)
    dense = path.sizes[0] <= DENSE_OUTPUTS if dense is None else dense
    first = outputs_of(path, recording.params)
    g = np.asarray(recording.loss.grad(first[0]), np.float64)
    known = _formed(path) if dense else _sampled(path, rank, num_products, seed)
    channel = Channel(known.values, known.vectors, rule.rank(np.maximum(known.values, 0), known.trace), rule)
    parts = {"signal": g}
    if clean_loss is not None:
        signal = np.asarray(clean_loss.grad(first[0]), np.float64)
        parts = {"signal": signal, "noise": g - signal}
    swept: list[Sweep] = []

    def respond(columns):
        swept.append(path.forward(columns.T))
        one = swept[-1]
        energies = np.diagonal(np.asarray(one.sums.gramian, np.float64))[:-1]
        return np.asarray(one.probes.psi).T, energies, -np.asarray(one.sums.moved_q[:-1]).T

    cells = cells_of(parts, channel, respond)
    run = RunAccount(path, swept[0], first, g)
    identities = run.path_identities(RealizedPath(recording, x_q, quadrature + 1, store, progress).forward(g[None]))
    coupled = None
    if x_q is not None:
        identities.append(run.invisibility(known.moved_q, known.values))
        taken = max(1, channel.rank)
        coupled = run.coupling(known.moved[:, :taken], known.moved_q[:, :taken])
    return TrainingReport(
        path=path,
        operators=known.operators,
        channel=channel,
        gramian_eigenvalues=known.gramian_values,
        densities=known.densities,
        residuals=known.residuals,
        seen=None if x_q is None else np.sum(known.moved_q**2, axis=0),
        visibility=float(swept[0].sums.visibility),
        negative_share=_negative_share(known.lowest, float(known.gramian_values[0])),
        forced=run.forced,
        identities=tuple(identities),
        cells=cells,
        coupling=coupled,
        train_risk=run.train_risk(),
        test_risk=None if test_loss is None else run.test_risk(test_loss),
        losses=np.append(swept[0].course.loss, run.losses[1]),
        predicted=run.losses[0] - np.cumsum(np.append(0, swept[0].course.dissipated[:, 0])),
        replay=max(sweep.replay for sweep in swept),
    )


class _Known(NamedTuple):
    """Eigenpairs of V with their residuals, tr V where not all are known, D and G on them; eigenvalues of W."""

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    trace: float | None
    moved: np.ndarray
    moved_q: np.ndarray
    gramian_values: np.ndarray
    lowest: float
    densities: tuple[SpectralDensity, SpectralDensity]
    operators: dict[str, np.ndarray] | None


def _formed(path: RealizedPath) -> _Known:
    operators = {name: np.asarray(one, np.float64) for name, one in dense_operators(path).items()}
    values, vectors = np.linalg.eigh(operators["motion"])
    values, vectors = values[::-1], vectors[:, ::-1]
    gramian_values = np.linalg.eigvalsh(operators["gramian"])[::-1]
    moved, moved_q = operators["displacement"] @ vectors, operators["test_transfer"] @ vectors
    size, zeros = len(values), np.zeros(len(values))
    equal = jnp.full((1, size), 1 / size)
    motion, gramian = (SpectralDensity(jnp.asarray(one)[None], equal, size) for one in (values, gramian_values))
    lowest = float(gramian_values[-1])
    return _Known(values, vectors, zeros, None, moved, moved_q, gramian_values, lowest, (motion, gramian), operators)


def _sampled(path: RealizedPath, rank: int, num_products: int, seed: int) -> _Known:
    motion, gramian = (
        ritz_pairs(RealizedOperator(path, name), rank, num_products=num_products, seed=seed)
        for name in ("motion", "gramian")
    )
    sums = path.forward(motion.vectors.T).sums
    moved, moved_q = (-np.asarray(one[:rank], np.float64).T for one in (sums.moved, sums.moved_q))
    trace, densities = float(motion.density.trace_of().value), (motion.density, gramian.density)
    return _Known(*motion[:3], trace, moved, moved_q, gramian.values, gramian.lowest, densities, None)


def _negative_share(lowest: float, highest: float) -> float:
    if lowest >= 0:
        return 0.0
    return -lowest / highest if highest > 0 else 1.0
