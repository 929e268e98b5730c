"""Where results go: a folder an experiment, and a row in README's table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare timings."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "backend": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(path)


def write_row(name: str, cells: tuple[str, ...]) -> None:
    """Keeps an experiment's row for README's table, and writes the table anew from all rows kept in results/."""
    path = ROOT / "results" / name / "row.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"| {' | '.join(cells)} |\n")
    rows = [row.read_text() for row in sorted((ROOT / "results").rglob("row.md"))]
    write_readme("results", "| experiment | setting | outcome | cost |\n|---|---|---|---|\n" + "".join(rows))


def write_readme(name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in README.md."""
    path = ROOT / "README.md"
    readme = path.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in readme or end not in readme:
        raise ValueError(f"README.md has no place for {name}: it needs the lines {start.strip()!r} and {end!r}.")
    before, rest = readme.split(start)
    path.write_text(before + start + text + end + rest.split(end, 1)[1])
