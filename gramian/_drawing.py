"""What all pictures share: colours, style, a figure of their own, legends, logarithmic axes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

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
    low, high = (drawn.min() / 2, 2 * drawn.max()) if drawn.size else (0.1, 1.0)
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
