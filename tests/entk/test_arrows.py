"""Inside entk, who may import whom: folders one way, files in no circle; imports for types alone and inside functions
count."""

import ast
import graphlib
from pathlib import Path

import pytest

import entk

ROOT = Path(entk.__file__).parent
# Each room may import the files beside it and the rooms named here.
MAY_IMPORT = {
    "_tracing": set(),
    "_checks": {"_tracing"},
    "_structured": {"_tracing", "_checks"},
    "_kernels": {"_tracing", "_checks", "_structured"},
    "_spectra": {"_tracing", "_checks"},
}
SHARED = {"_types", "_parameters", "_precision", "_batching", "_text"}  # below all rooms
DOORS = {"__init__", "internal", "selftest", "_numerics_guard"}  # above them, or beside
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_by(path: Path) -> set[str]:
    """Files of entk, by their dotted names below it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "entk":
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}".split(".")[1:]
                # A name of a package is one of its files, or of what it defines.
                found.add(next((".".join(dotted[:k]) for k in (2, 1) if is_file(dotted[:k])), "__init__"))
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] or "__init__" for alias in node.names if alias.name[:4] == "entk"}
    return found


def is_file(parts: list[str]) -> bool:
    return ROOT.joinpath(*parts).with_suffix(".py").is_file()


def test_every_file_has_a_place():
    assert {name_of(path).split(".")[0] for path in FILES} == {*MAY_IMPORT, *SHARED, *DOORS}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms(room):
    allowed = {*SHARED, room, *MAY_IMPORT[room]}
    for path in (ROOT / room).glob("*.py"):
        assert {name.split(".")[0] for name in imported_by(path)} <= allowed, path


def test_what_is_shared_knows_no_room():
    for name in SHARED:
        assert imported_by(ROOT / f"{name}.py") <= SHARED, name


def test_no_circles_of_files():
    order = graphlib.TopologicalSorter({name_of(path): imported_by(path) for path in FILES})
    assert len([*order.static_order()]) == len(FILES)  # raises CycleError


def test_the_search_sees_every_way_to_import(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "import entk\nimport entk._text\nfrom entk import _types, trace\nif 0:\n    from entk._kernels.ntk import S\n"
        "def f():\n    from entk._checks import apply\n"
    )
    assert imported_by(path) == {"__init__", "_text", "_types", "_kernels.ntk", "_checks.apply"}
