"""The pictures of the theory, one function each, and all of them on one page.

Every picture is `name(report, ax=None) -> Axes`: it draws on the axes it is given, or on a figure of its own, which is
the result's `.figure`. Figures are made without pyplot: nothing pops up, nothing stays open, and no setting of
matplotlib is changed. In Jupyter, end a cell with `plots.spectrum(report).figure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from mpl_toolkits.mplot3d.axes3d import Axes3D

from gramian._flow.observables import Dissipation, KernelEvolution
from gramian.plots.style import (
    BLUE,
    GREY,
    NOTE,
    PALE_BLUE,
    PALE_RED,
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
from gramian.plots.surface import draw_sheet, kernel_changes

if TYPE_CHECKING:
    from gramian._report.flow import Report
    from gramian._report.run import TrainingReport

LEAST = 1e3  # roundings that an axis spans at least: a kernel that stands still is drawn still


def overview(report: Report) -> Figure:
    """Draws all seven pictures on one page (theory §§2, 6).

    Args:
      report: of a finished run.

    Returns:
      A matplotlib `Figure`, landscape; `figure.savefig("report.png")` writes it.

    Raises:
      Nothing: what a report has no numbers for is said in its place.

    Cost: seconds; one symmetric eigenproblem, O(N³).

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import analyze, plots, squared_loss
      >>> x, y = jnp.eye(3), jnp.array([1.0, -1.0, 1.0])
      >>> report = analyze(lambda w, x: jnp.tanh(x @ w), jnp.zeros(3), x, squared_loss(y), x + 0.1, t1=20.0)
      >>> [ax.get_title(loc="left") for ax in plots.overview(report).axes[:2]]
      ['Loss and its dissipation', 'Spectrum of the Gramian $W_S$']
    """
    flow = report.flow
    m, n = report.test_transfer.shape
    with rc_context(STYLE):
        figure = Page(figsize=(15, 10), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        upper, lower = figure.add_gridspec(2, 1)
        top, bottom = upper.subgridspec(1, 4), lower.subgridspec(1, 4, width_ratios=(4, 0.3, 3.2, 5))
        for column, draw in enumerate((loss, spectrum, residual_by_direction, kernel_drift)):
            draw(report, figure.add_subplot(top[column]))
        kernel_surface(report, figure.add_subplot(bottom[0], projection="3d"))
        test_displacement(report, figure.add_subplot(bottom[2]))
        cells(report, figure.add_subplot(bottom[3]))
        figure.suptitle(
            f"Gradient flow, {flow.loss.name} loss: N = {n} training and M = {m} test outputs, "
            f"t = {flow.t0:g} to {flow.t1:g} in {flow.num_steps} steps",
            fontsize=12,
            fontweight="bold",
        )
        figure.draw_without_rendering()  # the layout settles at the second drawing: this is the first
    return figure


def spectrum(report: Report, ax: Axes | None = None) -> Axes:
    """Draws the eigenvalues of W_S, the signal channel and, for the squared loss, their ceiling n/2 (theory §6, I7).

    Args:
      report: of a finished run.
      ax: where to draw; None makes a figure.

    Returns:
      The axes. What is below rounding (N·ε·λ₁) is not the run's, and marked so.

    Raises:
      Nothing.
    """
    channel = report.channel
    values = np.asarray(channel.eigenvalues)
    with canvas(ax) as ax:
        ax.plot(count(values), values, color=BLUE, label="eigenvalues", **marks(values))
        if report.flow.loss.isotropic:
            ceiling = report.flow.loss.targets.shape[0] / 2
            ax.axhline(ceiling, color=RED, ls="--", lw=1.2, label=f"ceiling n/2 = {ceiling:g}", zorder=1)
        log_y(ax, values)
        rounding_floor(ax, values, len(values) * np.finfo(values.dtype).eps * values.max())
        channel_band(ax, channel, len(values), "$W_S$", f"\n{channel.rule}")
        title_of(ax, "Spectrum of the Gramian $W_S$")
        ax.set_ylabel("eigenvalue of $W_S$ (time × kernel)")
        legend_below(ax)
    return ax


def residual_by_direction(report: Report, ax: Axes | None = None) -> Axes:
    """Draws the output gradient along every eigenvector of W_S, |ψ_jᵀ g|, at the start and at the end (theory §6).

    Under the squared loss n·g is the residual u − y: what has been fitted is what has fallen. Where eigenvalues are
    equal (saturated at n/2, say) the eigenvectors are any basis of their span: single points mean nothing there, their
    level does.

    Args:
      report: of a finished run.
      ax: where to draw; None makes a figure.

    Returns:
      The axes.

    Raises:
      Nothing.
    """
    flow, vectors = report.flow, report.channel.vectors
    g0, g1 = (np.asarray(flow.output_grad(w)) for w in (flow.params0, flow.params))
    start, end = (np.abs(vectors.T @ g) for g in (g0, g1))
    with canvas(ax) as ax:
        look = marks(start)
        ax.plot(count(start), start, color=GREY, mfc="white", label=f"start, t = {flow.t0:g}", **look)
        ax.plot(count(end), end, color=BLUE, label=f"end, t = {flow.t1:g}", **look)
        log_y(ax, np.concatenate([start, end]))
        rounding_floor(ax, end, float(np.finfo(g0.dtype).eps * np.linalg.norm(g0)))
        channel_band(ax, report.channel, len(start), "$W_S$")
        title_of(ax, "Residual by direction")
        ax.set_ylabel(r"output gradient $|\psi_j^T g|$ (loss per output)")
        legend_below(ax)
    return ax


def cells(report: Report | TrainingReport, ax: Axes | None = None) -> Axes:
    """Draws signal and noise in channel and reservoir: what each has of g, of the loss, of the test motion (theory §6).

    Shares are of squares, so parts that are not orthogonal interact: the grey bar holds the cross terms, may be
    negative, and makes each group of shares add up to 100 %. The last group is no share: it is ‖P v‖/‖v‖.

    Args:
      report: of a finished run; without `clean_loss` everything is signal.
      ax: where to draw; None makes a figure.

    Returns:
      The axes.

    Raises:
      Nothing.
    """
    looks: dict[tuple[str, str], dict[str, Any]] = {
        ("signal", "channel"): {"color": BLUE},
        ("signal", "reservoir"): {"color": PALE_BLUE, "hatch": "///", "edgecolor": BLUE},
        ("noise", "channel"): {"color": RED},
        ("noise", "reservoir"): {"color": PALE_RED, "hatch": "///", "edgecolor": RED},
        ("interaction", "all"): {"color": GREY},
    }
    groups = ["of the output\ngradient, ‖g‖²", "of the loss\ndissipated", "of the test\nmotion, ‖Gg‖²"]
    groups += ["left at the end,\n‖Pv‖ / ‖v‖"]
    width = 0.86 / len(report.cells)
    with canvas(ax, (8, 4.5)) as ax:
        for i, cell in enumerate(report.cells):
            heights = 100 * np.array(cell[2:])
            places = np.arange(4) + (i - (len(report.cells) - 1) / 2) * width
            name = "interaction (cross terms)" if cell.part == "interaction" else f"{cell.part}, {cell.space}"
            ax.bar(places, heights, 0.92 * width, label=name, **looks[cell.part, cell.space])
            for x, height in zip(places, heights, strict=True):
                height = 0.0 if abs(height) < 0.05 else height  # what would print as −0.0
                empty = x > 2.5 and cell.part != "interaction" and not np.isfinite(height)
                if np.isfinite(height) or empty:
                    ax.annotate(
                        "–" if empty else _percent(height),
                        (x, 0 if empty else height),
                        xytext=(0, -2 if height < 0 else 2),
                        textcoords="offset points",
                        ha="center",
                        va="top" if height < 0 else "bottom",
                        fontsize=NOTE - 0.5,
                    )
        if report.coupling is None:
            ax.text(2, 2, "no test\npoints", ha="center", va="bottom", color=GREY, fontsize=NOTE)
        ax.axhline(0, color="black", lw=0.8)
        ax.axvline(2.5, color=GREY, lw=0.8, ls=":")
        ax.set_xticks(range(4), groups)
        ax.tick_params(axis="x", length=0)
        ax.set_xlim(-0.5, 3.5)
        ax.margins(y=0.1)
        title_of(ax, "Signal and noise, channel and reservoir")
        ax.set_xlabel("share of the whole; right of the dotted line: fraction of each part")
        ax.set_ylabel("percent")
        legend_below(ax, columns=3, below=50)
    return ax


def test_displacement(report: Report | TrainingReport, ax: Axes | None = None) -> Axes:  # noqa: PT028
    """Draws the test displacement that the training displacement predicts, A ΔU_S, against the observed one (I9).

    Under the squared loss all points lie on the line, up to the discretisation of the flow.

    Args:
      report: of a finished run. Without test points the axes say so.
      ax: where to draw; None makes a figure.

    Returns:
      The axes.

    Raises:
      Nothing.
    """
    coupled = report.coupling
    with canvas(ax, (5, 4.6)) as ax:
        title_of(ax, "Test displacement")
        ax.set_xlabel(r"observed, $\Delta U_Q$ (outputs)")
        ax.set_ylabel(r"predicted, $A\,\Delta U_S$ (outputs)")
        if coupled is None:
            return empty(ax, "no test points:\npass x_q")
        low, high = _span(coupled.observed, coupled.predicted)
        ax.plot([low, high], [low, high], color=GREY, lw=1, label="predicted = observed", zorder=1)
        ax.scatter(
            coupled.observed,
            coupled.predicted,
            s=14,
            color=BLUE,
            alpha=0.6,
            linewidths=0,
            label=f"test outputs ({len(coupled.observed)})",
        )
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        correlation = f"correlation {coupled.correlation:.6f}\n" if np.isfinite(coupled.correlation) else ""
        error = f"relative error {coupled.relative_error:.2g}" if np.isfinite(coupled.relative_error) else "no motion"
        text = correlation + error
        ax.text(
            0.03,
            0.97,
            text,
            transform=ax.transAxes,
            va="top",
            fontsize=NOTE,
            bbox={"fc": "white", "ec": "none", "alpha": 0.7},
        )
        legend_below(ax)
    return ax


test_displacement.__test__ = False  # not a test, whatever its name suggests to pytest  # pyright: ignore


def kernel_drift(report: Report, ax: Axes | None = None) -> Axes:
    """Draws how far K_SS has moved from its start and its effective rank, step by step (theory §2).

    Args:
      report: of a finished run.
      ax: where to draw; None makes a figure.

    Returns:
      The axes of the drift; those of the rank are its twin. A step has one kernel: curves are stairs.

    Raises:
      Nothing.
    """
    flow = report.flow
    evolution = flow.recorded(KernelEvolution)
    edges = np.concatenate([[0.0], flow.history["t"] - flow.t0])
    with canvas(ax) as ax:
        right = ax.twinx()
        for side, values, color, style in (
            (ax, evolution.drift, BLUE, "-"),
            (right, evolution.effective_rank, RED, "--"),
        ):
            side.stairs(values, edges, baseline=None, color=color, lw=1.8, ls=style)
            side.tick_params(axis="y", colors=color)
            side.yaxis.set_major_formatter("{x:.3g}")
            highest = float(values[np.isfinite(values)].max(initial=0))
            side.set_ylim(0, max(1.1 * highest, LEAST * np.finfo(values.dtype).eps))
        right.spines["right"].set(visible=True, color=RED)
        ax.spines["left"].set_color(BLUE)
        if not np.isfinite(evolution.effective_rank).any():
            ax.text(0.5, 0.5, "the kernel is zero", transform=ax.transAxes, ha="center", color=GREY)
        title_of(ax, "Kernel drift and effective rank")
        ax.set_ylabel(r"drift $\|K - K(t_0)\|_2 / \|K(t_0)\|_2$ (solid)", color=BLUE)
        right.set_ylabel(r"effective rank $\mathrm{tr}(K)^2 / \mathrm{tr}(K^2)$ (dashed)", color=RED)
        _times(ax, report)
    return ax


def loss(report: Report, ax: Axes | None = None) -> Axes:
    """Draws the training loss and what the Gramian predicts of it, Φ(t0) − g(t0)ᵀ W_S(t) g(t0) (theory I2).

    Args:
      report: of a finished run.
      ax: where to draw; None makes a figure.

    Returns:
      The axes. Their legend has the largest difference of the two, relative to Φ(t0).

    Raises:
      Nothing.
    """
    flow, start = report.flow, report.train_risk.start
    observed = np.asarray(flow.history["loss"])
    predicted = start - np.asarray(flow.recorded(Dissipation))
    elapsed = flow.history["t"] - flow.t0
    with canvas(ax) as ax:
        draw_losses(ax, elapsed, observed, predicted, start, (r"\Phi(t_0)", "W_S(t)"))
        _times(ax, report)
        legend_below(ax)
    return ax


def kernel_surface(report: Report, ax: Axes | None = None) -> Axes:
    """Draws the kernel's evolution as a shaded surface over its first eigen-directions (theory §2, "surface picture").

    With H = I − 11ᵀ/N the kernel is centred and normalised, C = HKH / ‖HKH‖_F; the surface is
    v_iᵀ (C(t) − C(t0)) v_j in the top eigenvectors v of C(t0), at most 24, each turned so that −g(t0) has no negative
    part along it. A lazy run is a flat sheet.

    Args:
      report: of a finished run.
      ax: 3-D axes for the kernel at the end; None makes a figure, which has the kernels on the way as well.

    Returns:
      The axes of the kernel at the end.

    Raises:
      TypeError: axes that are not 3-D.
    """
    if ax is not None and not isinstance(ax, Axes3D):
        raise TypeError("kernel_surface needs 3-D axes: make them by figure.add_subplot(projection='3d').")
    times, changes = [t for t, _ in report.kernels], kernel_changes(report)
    on_the_way = range(1, len(changes) - 1)
    with rc_context(STYLE):
        small: list[Any] = []
        if ax is None:
            figure = Page(figsize=(10, 5.5), layout="constrained")
            grid = figure.add_gridspec(max(1, len(on_the_way)), 5)
            ax = figure.add_subplot(grid[:, :3], projection="3d")
            small = [figure.add_subplot(grid[i - 1, 3:], projection="3d") for i in on_the_way]
        assert isinstance(ax, Axes3D)
        least = LEAST * np.finfo(report.kernels[0][1].dtype).eps
        largest = max(least, *(float(np.abs(change).max()) for change in changes))
        for i, axes in ((len(changes) - 1, ax), *zip(on_the_way, small, strict=False)):
            draw_sheet(axes, changes[i], largest, brief=axes is not ax)
            title_of(axes, f"Change of the kernel until t = {times[i]:g}", y=0.97)
    return ax


def _span(*values: np.ndarray) -> tuple[float, float]:
    low, high = (float(f([f(v) for v in values])) for f in (np.min, np.max))
    size = max(abs(low), abs(high)) or 1.0
    pad = 0.06 * (high - low) if high - low > 1e-6 * size else 0.1 * size
    return low - pad, high + pad


def _times(ax: Axes, report: Report) -> None:
    flow = report.flow
    first = float(flow.history["t"][0] - flow.t0)
    ax.set_xscale("log")
    ax.set_xlim(first / 2, (flow.t1 - flow.t0) * 1.1)
    ax.set_xlabel("time t of gradient flow" if flow.t0 == 0 else f"time of gradient flow since {flow.t0:g}")


def _percent(share: float) -> str:
    text = f"{share:.0f}" if abs(share) >= 99.95 else f"{share:.1f}"
    return text.replace("-", "−")
