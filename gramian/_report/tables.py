"""Reports as tables: in a terminal, in Jupyter, as text."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from entk.internal import as_text
from gramian._reading.cells import Cell
from gramian._reading.identities import Identity

WIDTH = 118


class Shown:
    """Something whose tables are its text and its HTML."""

    def tables(self) -> list[Table]:
        raise AssertionError("a report has tables")

    def __rich__(self) -> Group:
        return Group(*self.tables())

    def __repr__(self) -> str:
        return as_text(self, WIDTH)

    def _repr_html_(self) -> str:
        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def summary_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("quantity")
    table.add_column("value")
    for row in rows:
        table.add_row(*row)
    return table


def identity_table(identities: Iterable[Identity]) -> Table:
    table = Table(title="Identities", title_justify="left")
    for column in ("", "statement", "residual", "tolerance", "holds", "note"):
        table.add_column(column, justify="right" if column in ("residual", "tolerance") else "left")
    for row in identities:
        verdict = {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "-"}[row.holds]
        table.add_row(row.name, row.statement, _number(row.residual), _number(row.tolerance), verdict, row.note)
    return table


def cell_table(cells: Iterable[Cell]) -> Table:
    table = Table(title="Four cells: shares of the first output gradient g and of what it does", title_justify="left")
    for column in ("part", "space", "of ‖g‖²", "of dissipated loss", "of test motion", "left at the end"):
        table.add_column(column, justify="left" if column in ("part", "space") else "right")
    for cell in cells:
        table.add_row(cell.part, cell.space, *map(_percent, cell[2:]))
    return table


def plain(value: Any) -> Any:
    """Python values, ready for JSON; nan becomes None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) or (hasattr(value, "ndim") and value.ndim > 0):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def rounded(value: float, form: str) -> str:
    """A number as text; a dash where there is none."""
    return f"{float(value):{form}}" if math.isfinite(value) else "-"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f} %".replace("-0.0 %", "0.0 %")


def check_figure_path(path: Any) -> Path | None:
    """A file that matplotlib will be able to write, found out before minutes are spent on drawing it."""
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} is a {type(path).__name__}, but must name a file, e.g. 'report.png'.")
    from matplotlib.backend_bases import FigureCanvasBase

    file, known = Path(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"path={str(path)!r} ends in {file.suffix!r}, but must end in one of {', '.join(known)}.")
    if file.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder, but must name a file in it.")
    if not file.parent.is_dir():
        raise ValueError(f"path={str(path)!r} lies in a folder that does not exist: make {str(file.parent)!r} first.")
    return file
