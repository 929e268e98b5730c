"""The lock files satisfy pyproject, agree with each other, name no index, and leave jaxlib 0.10.2 out."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {"quickstart": ["build", "experiments"], "test": ["tests"]}  # lock file: the dependency groups it holds
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def lines_of(lock: str) -> list[str]:
    text = (ROOT / "locks" / f"{lock}.txt").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins_of(lock: str, python: str) -> dict[str, str]:
    """Name and version of every pin that holds on Linux under this Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    requirements = [Requirement(line.split(" --hash")[0]) for line in lines_of(lock)]
    held = [pin for pin in requirements if pin.marker is None or pin.marker.evaluate(environment)]
    assert len({pin.name for pin in held}) == len(held)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in held}


def requirements_of(lock: str) -> list[Requirement]:
    def members(group: str) -> list[str]:
        entries = PYPROJECT["dependency-groups"][group]
        return [r for e in entries for r in (members(e["include-group"]) if isinstance(e, dict) else [e])]

    groups = [line for group in LOCKS[lock] for line in members(group)]
    return [Requirement(line) for line in PYPROJECT["project"]["dependencies"] + groups]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_lock_satisfies_pyproject(lock, python):
    pins = pins_of(lock, python)
    for requirement in requirements_of(lock):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_is_exact_and_hashed_and_names_no_place(lock):
    for line in lines_of(lock):
        assert "==" in line
        assert "--hash=sha256:" in line
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    assert not any(word in text for word in ("://", " @ ", "-index", "find-links", "file:"))


@pytest.mark.parametrize("python", PYTHONS)
def test_quickstart_lock_is_part_of_the_test_lock(python):
    assert pins_of("quickstart", python).items() <= pins_of("test", python).items()


@pytest.mark.parametrize("lock", LOCKS)
def test_python_311_stays_on_the_sound_jaxlib_and_newer_pythons_move_on(lock):
    assert pins_of(lock, "3.11")["jaxlib"] == "0.10.1"
    assert all(pins_of(lock, python)["jaxlib"] != "0.10.2" for python in PYTHONS)
    assert pins_of(lock, "3.12")["jax"].startswith("0.12.")
