"""What all pictures share: colours, style, a figure of their own, legends, logarithmic axes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

if TYPE_CHECKING:
    from gramian._reading.channel import Channel

# Okabe and Ito's palette, told apart by every kind of colour vision; styles and hatches say the same once more.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#6E6E6E"
PALE_BLUE, PALE_RED, BAND = "#A6CEE8", "#F7C3A0", "#E6EEF4"
STYLE: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
}
NOTE = 8  # size of text inside axes
MANY = 100  # directions from which on markers shrink, and a small channel is drawn on a logarithmic axis


class Page(Figure):
    """A figure that Jupyter shows whether or not pyplot was ever imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


@contextmanager
def canvas(ax: Axes | None, size: tuple[float, float] = (6, 4.5)) -> Iterator[Axes]:
    """The axes to draw on, with the package's style in force while they are drawn."""
    with rc_context(STYLE):
        yield Page(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def title_of(ax: Axes, title: str, y: float | None = None) -> None:
    ax.set_title(title, loc="left", y=y)


def legend_below(ax: Axes, columns: int = 1, below: float = 36) -> None:
    """The legend under the axes, where it hides nothing; `below` in points leaves room for labels."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    under = ax.transAxes + ScaledTranslation(0, -below / 72, figure.dpi_scale_trans)
    ax.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=under, ncols=columns, borderaxespad=0, frameon=False
    )


def say(ax: Axes, text: str) -> None:
    """A line of text in the legend."""
    ax.plot([], [], ls="none", label=text)


def log_y(ax: Axes, values: np.ndarray) -> None:
    drawn = values[values > 0]
    if not drawn.size:  # nothing to draw, and a logarithmic axis would warn
        ax.set_ylim(0.1, 1)
        return
    low, high = drawn.min() / 2, 2 * drawn.max()
    if np.floor(np.log10(high)) <= np.ceil(np.log10(low)):  # fewer than two powers of ten to label
        low, high = 10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high))
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(low, high)


def rounding_floor(ax: Axes, values: np.ndarray, rounding: float, name: str = "below rounding") -> None:
    """A grey floor under which values of a logarithmic axis are only rounding, if there are such values."""
    below, lost = int(np.sum(values < rounding)), int(np.sum(values <= 0))
    text = f"{name}: {below}" + (f"\n({lost} not positive, not drawn)" if lost else "")
    if below > lost:
        low, high = ax.get_ylim()
        low = min(low, rounding / 10)
        ax.axhspan(low, rounding, color="#DDDDDD", zorder=0.5, label=text)
        ax.set_ylim(low, high)
    elif lost:
        say(ax, text)


def empty(ax: Axes, text: str) -> Axes:
    """Axes that say why they are empty."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)
    ax.set(xticks=[], yticks=[])
    return ax


def count(values: np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)


def marks(values: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "ms": 3 if len(values) > MANY else 4, "ls": "none"}


def channel_band(ax: Axes, channel: Channel, n: int, operator: str, rule: str = "") -> None:
    """Directions 1 to n along the abscissa, those of the signal channel shaded."""
    rank = channel.rank
    ax.axvspan(0.5, rank + 0.5, color=BAND, zorder=0, label=f"signal channel, rank {rank} of {n}{rule}")
    if n > MANY and 10 * rank < n:  # else the channel would be a thin line
        ax.set_xscale("log")
        ax.set_xlim(0.8, 1.1 * n)
    else:
        ax.set_xlim(0.5 - 0.015 * n, 0.5 + 1.015 * n)
        ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True).tick_values(1, n)
        ax.set_xticks([tick for tick in ticks if 1 <= tick <= n])
    ax.set_xlabel(f"eigen-direction j of {operator}, largest first")


def draw_losses(
    ax: Axes, x: np.ndarray, observed: np.ndarray, predicted: np.ndarray, start: float, names: tuple[str, str]
) -> None:
    """A training loss and what the Gramian predicts of it; `names` are those of the first loss and of the Gramian."""
    first, gramian = names
    missed = float(np.abs(observed - predicted).max())
    ax.plot(x, observed, color=BLUE, lw=2.8, label=r"training loss $\Phi$")
    ax.plot(x, predicted, color=RED, lw=1.4, ls="--", label=rf"predicted, ${first} - g^T {gramian}\,g$")
    ax.axhline(start, color="black", lw=1, ls=":", label=rf"at the start, ${first}$ = {start:.3g}")
    label = rf"largest difference, {missed / start:.1e} ${first}$" if start > 0 else f"largest difference, {missed:.1e}"
    if observed.min() < 0.05 * start:
        if missed > observed.min() / 2:
            ax.axhline(missed, color=GREY, lw=1, ls="-.", label=label)
        else:
            say(ax, label)
        log_y(ax, np.concatenate([observed, predicted]))
        # Of a difference of two numbers of the size of `start`, one of which is a sum.
        rounding_floor(ax, predicted, 10 * np.finfo(observed.dtype).eps * start, "predictions below rounding")
    else:
        say(ax, label)
        ax.set_ylim(0, 1.05 * max(start, float(observed.max())) or 1.0)
    title_of(ax, "Loss and its dissipation")
    ax.set_ylabel("training loss (mean over examples)")
