"""What is measured already: one JSON file a finished cell, so that a killed run loses none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments._results import write_json


class Store:
    """Cells by name; a cell counts only if it was measured under the same settings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, name: str, settings: dict[str, Any]) -> bool:
        return self._kept(name, settings) is not None

    def get(self, name: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell `name`, measured now unless it is kept. `settings` is everything that decides its outcome."""
        cell = self._kept(name, settings)
        if cell is None:
            cell = measure()
            write_json(self._path(name), {"settings": settings, "cell": cell})
        return cell

    def _kept(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        path = self._path(name)
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] == json.loads(json.dumps(settings)):
                return kept["cell"]
        return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
