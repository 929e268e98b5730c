"""The pictures of a recorded run, one function each, and all of them on one page.

Every picture is `name(report, ax=None) -> Axes`, as in `gramian.plots`, which draws the four cells and the test
displacement of a recorded run too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from gramian import plots
from gramian._krylov import spectrum_of
from gramian.plots.style import (
    BLUE,
    GREY,
    NOTE,
    RED,
    STYLE,
    Page,
    canvas,
    channel_band,
    count,
    draw_losses,
    empty,
    legend_below,
    log_y,
    marks,
    rounding_floor,
    title_of,
)

if TYPE_CHECKING:
    from gramian._report.run import TrainingReport

__all__ = ["cells", "coupling", "identities", "invisibility", "loss", "overview", "spectra"]

PATH = ("(I1)", "(I2)", "(I3)", "(I4)")


def overview(report: TrainingReport) -> Figure:
    """Draws all six pictures of a recorded run on one page (theory §§3, 6).

    Args:
      report: of `analyze_training`.

    Returns:
      A matplotlib `Figure`, landscape; `figure.savefig("report.png")` writes it.

    Raises:
      Nothing: what a report has no numbers for is said in its place.

    Cost: seconds.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> from gramian import Recorder, analyze_training, minibatches, record_training, squared_loss
      >>> from gramian.plots import run as training_plots
      >>> from gramian.plots import run as training_plots
      >>> x, loss = jnp.eye(3), squared_loss(jnp.array([1.0, -1.0, 0.5]))
      >>> model = lambda w, x: jnp.tanh(x @ w)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _, run = record_training(
      ...         model, jnp.zeros(3), x, loss, optax.adam(0.1), minibatches(3, 2, 20), Recorder(folder)
      ...     )
      ...     figure = training_plots.overview(analyze_training(run, x + 0.1))
      >>> [ax.get_title(loc="left") for ax in figure.axes[:2]]
      ['Loss and its dissipation', 'Spectra of V and W']
    """
    run, (n, m) = report.path.recording, report.path.sizes
    with rc_context(STYLE):
        figure = Page(figsize=(15, 10), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        upper, lower = figure.add_gridspec(2, 1)
        top, bottom = upper.subgridspec(1, 3), lower.subgridspec(1, 3, width_ratios=(3, 3, 5))
        for column, draw in enumerate((loss, spectra, invisibility)):
            draw(report, figure.add_subplot(top[column]))
        for column, draw in enumerate((identities, coupling, cells)):
            draw(report, figure.add_subplot(bottom[column]))
        figure.suptitle(
            f"Recorded run, {run.loss.name} loss: N = {n} training and M = {m} test outputs, {run.num_steps} steps "
            f"averaged at {report.path.quadrature} Gauss points",
            fontsize=12,
            fontweight="bold",
        )
        figure.draw_without_rendering()  # the layout settles at the second drawing: this is the first
    return figure


def loss(report: TrainingReport, ax: Axes | None = None) -> Axes:
    """Draws the training loss and what W predicts of it, Φ(s) − gᵀ W_k g with W up to step k (theory I2).

    Args:
      report: of `analyze_training`.
      ax: where to draw; None makes a figure.

    Returns:
      The axes. Their legend has the largest difference of the two, relative to Φ(s).

    Raises:
      Nothing.
    """
    with canvas(ax) as ax:
        steps = np.arange(len(report.losses))
        draw_losses(ax, steps, report.losses, report.predicted, report.losses[0], (r"\Phi(s)", "W_k"))
        ax.set_xlabel("optimizer step k")
        ax.set_xlim(0, steps[-1])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(ax)
    return ax


def spectra(report: TrainingReport, ax: Axes | None = None) -> Axes:
    """Draws the eigenvalues of V and W, the negative ones of W as −λ, and the signal channel (theory §§3, 6).

    Where N is large only the largest are known one by one, with their residuals for error bars; the curves behind them
    are the whole spectra by block Lanczos quadrature.

    Args:
      report: of `analyze_training`.
      ax: where to draw; None makes a figure.

    Returns:
      The axes.

    Raises:
      Nothing.
    """
    channel, n = report.channel, report.path.sizes[0]
    values, others = channel.eigenvalues, report.gramian_eigenvalues
    formed = len(values) == n
    drawn = [values, np.abs(others)]
    with canvas(ax) as ax:
        for density, color, name in zip(report.densities, (BLUE, RED), "VW", strict=True):
            places, nodes = spectrum_of(density)
            if not formed:
                rank, error = density.effective_rank()
                label = f"all of {name}, estimated; effective rank {_rounded(float(rank), float(error))}"
                ax.plot(
                    places, np.where(nodes > 0, nodes, np.nan), color=color, marker=".", lw=1.2, alpha=0.6, label=label
                )
                drawn.append(nodes)
            if (nodes < 0).any() and name == "W":
                look = {**marks(nodes), "mfc": "white"} if formed else {"ls": ":", "lw": 1.5, "marker": "."}
                ax.plot(places, np.where(nodes < 0, -nodes, np.nan), color=color, label="W below zero, −λ", **look)
        look = marks(values)
        ax.plot(count(values), values, color=BLUE, label="motion Gramian V", **look)
        if not formed:
            ax.errorbar(count(values), values, report.residuals, color=BLUE, fmt="none")
        positive = np.where(others > 0, others, np.nan)
        ax.plot(count(others), positive, color=RED, label="dissipation Gramian W", **{**look, "marker": "s"})
        log_y(ax, np.concatenate(drawn))
        if formed:
            rounding_floor(ax, values, n * np.finfo(report.path.dtype).eps * values.max(), "V below rounding")
        ending = channel.rule if report.channel_reached else "the eigenpairs known, short of the rule"
        channel_band(ax, channel, n, "V or W", f"\n{ending}")
        title_of(ax, "Spectra of V and W")
        ax.set_ylabel("eigenvalue (time × kernel)")
        legend_below(ax)
    return ax


def invisibility(report: TrainingReport, ax: Axes | None = None) -> Axes:
    """Draws what test points see of every eigenvector of V, ‖G v‖², under its bound (theory I6′).

    Args:
      report: of `analyze_training`. Without test points the axes say so.
      ax: where to draw; None makes a figure.

    Returns:
      The axes. Points above the line would contradict the theory.

    Raises:
      Nothing.
    """
    channel, n = report.channel, report.path.sizes[0]
    with canvas(ax) as ax:
        title_of(ax, "What test points see of V's directions")
        ax.set_ylabel(r"test displacement $\|G v_j\|^2$ (outputs² per unit of $g$²)")
        if report.seen is None:
            ax.set_xlabel("eigen-direction j of V, largest first")
            return empty(ax, "no test points:\npass x_q")
        bound = report.visibility * np.maximum(channel.eigenvalues, 0)
        look = marks(bound)
        ax.plot(count(bound), bound, color=RED, label=r"bound, $\lambda_j \sum_k \lambda_{max}(\bar J_Q N \bar J_Q^T)$")
        ax.plot(count(bound), report.seen, color=BLUE, label=r"$\|G v_j\|^2$", **look)
        log_y(ax, np.concatenate([bound, report.seen]))
        rounding = len(bound) * np.finfo(report.path.dtype).eps * report.seen.max()
        rounding_floor(ax, report.seen, rounding)
        channel_band(ax, channel, len(bound), "V")
        known = "" if len(bound) == n else f"\n(the {len(bound)} largest of {n} are known)"
        ax.set_xlabel(f"eigen-direction j of V, largest first{known}")
        legend_below(ax, below=48 if known else 36)
    return ax


def identities(report: TrainingReport, ax: Axes | None = None) -> Axes:
    """Draws the residuals of (I1)-(I4) beside what the quadrature allows them (theory §3).

    Args:
      report: of `analyze_training`.
      ax: where to draw; None makes a figure.

    Returns:
      The axes. A filled circle right of its bar would be a broken identity, and is red.

    Raises:
      Nothing.
    """
    rows = [row for row in report.identities if row.name in PATH and row.tolerance is not None]
    places = np.arange(len(rows))[::-1]
    residuals, allowed = (np.array([getattr(row, name) for row in rows]) for name in ("residual", "tolerance"))
    least = float(np.finfo(report.path.dtype).eps)
    with canvas(ax) as ax:
        if not rows:
            return empty(ax, "no verdicts: nothing moved")
        ax.hlines(places, np.maximum(residuals, least), allowed, color=GREY, lw=1)
        ax.plot(
            allowed, places, "|", color="black", ms=14, mew=2, label="allowed: ten times one more Gauss point's effect"
        )
        for holds, color, label in ((True, BLUE, "residual"), (False, RED, "residual, too large")):
            chosen = [k for k, row in enumerate(rows) if bool(row.holds) is holds]
            if chosen:
                ax.plot(np.maximum(residuals[chosen], least), places[chosen], "o", color=color, label=label)
        ax.set_xscale("log")
        low, high = least / 3, 3 * float(np.append(allowed, residuals).max())
        ax.set(xlim=(low, max(high, 1e-2)), ylim=(-0.6, len(rows) - 0.4))
        ax.set_yticks(places, [f"{row.name}\n{_plain(row.statement)}" for row in rows], fontsize=NOTE)
        title_of(ax, "Identities of the realized steps")
        ax.set_xlabel("relative residual")
        ax.set_ylabel("identity")
        legend_below(ax)
    return ax


def coupling(report: TrainingReport, ax: Axes | None = None) -> Axes:
    """Draws the test displacement that the training displacement predicts through the channel (theory I9).

    A = G Ψ (D Ψ)⁺ with the channel Ψ: what a channel of few directions cannot predict lies off the line.

    Args:
      report: of `analyze_training`. Without test points the axes say so.
      ax: where to draw; None makes a figure.

    Returns:
      The axes.

    Raises:
      Nothing.
    """
    with canvas(ax, (5, 4.6)) as ax:
        if report.coupling is not None and not report.channel_reached:
            title_of(ax, "Test displacement")
            ax.set(xlabel=r"observed, $\Delta U_Q$ (outputs)", ylabel=r"predicted, $A\,\Delta U_S$ (outputs)")
            return empty(ax, _too_wide(report))
        plots.test_displacement(report, ax)
        if report.coupling is not None:
            title_of(ax, f"Test displacement from {report.coupling.rank} directions")
    return ax


def cells(report: TrainingReport, ax: Axes | None = None) -> Axes:
    """Draws the four cells as `plots.cells` does, if the channel is known (theory §6).

    Args:
      report: of `analyze_training`.
      ax: where to draw; None makes a figure.

    Returns:
      The axes.

    Raises:
      Nothing.
    """
    with canvas(ax, (8, 4.5)) as ax:
        if report.channel_reached:
            return plots.cells(report, ax)
        title_of(ax, "Signal and noise, channel and reservoir")
        ax.set(xlabel="share of the whole", ylabel="percent")
        return empty(ax, _too_wide(report))


def _too_wide(report: TrainingReport) -> str:
    return (
        f"The channel holds about {report.channel_estimate:,} directions\nby the estimate of all eigenvalues,\n"
        f"more than the {len(report.channel.eigenvalues)} known.\nRaise rank, or take fewer examples."
    )


def _rounded(value: float, error: float) -> str:
    return f"{value:,.0f} ± {error:,.0f}" if value >= 10 else f"{value:.2f} ± {error:.2f}"


def _plain(statement: str) -> str:
    return statement.replace(" = ", "\n= ")
