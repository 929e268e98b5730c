"""A progress bar over training time."""

from __future__ import annotations

import math

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Context manager; draws nothing when not enabled.

    The bar is logarithmic in time, as steps are: they lengthen while the residual decays.
    """

    def __init__(self, t0: float, t1: float, *, enabled: bool):
        self._t0, self._t1, self._first = t0, t1, None
        self._bar = Bar(
            TextColumn("flow"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            disable=not enabled,
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        self._task = self._bar.add_task("flow", total=1.0, status="compiling")
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def update(self, t: float, loss: float, num_steps: int) -> None:
        if self._first is None:
            self._first = (t - self._t0) / 2
        span = math.log1p((self._t1 - self._t0) / self._first)
        done = math.log1p((t - self._t0) / self._first) / span
        status = f"t = {t:.3g} of {self._t1:.3g}, {num_steps} steps, loss {loss:.3g}"
        self._bar.update(self._task, completed=done, status=status)
