"""What a user receives: the wheel's contents, documented public names, README's commands and its quoted error."""

import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["entk", "gramian", "transforms"]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory) -> set[str]:
    """The paths inside a wheel built from a copy of this tree, `experiments` and `tests` included in the copy."""
    tree = tmp_path_factory.mktemp("tree") / "entk"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "results", "build", "*.egg-info", "__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tree / built.stdout.split()[-1]) as wheel:
        return set(wheel.namelist())


def test_wheel_holds_exactly_the_three_packages(wheel_files):
    top_level = {path.split("/")[0] for path in wheel_files if ".dist-info/" not in path}
    assert top_level == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_module_and_the_type_marker(wheel_files, package):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    assert modules | {f"{package}/py.typed"} == {path for path in wheel_files if path.startswith(f"{package}/")}


def test_wheel_holds_the_licence(wheel_files):
    assert any(path.endswith("licenses/LICENSE") for path in wheel_files)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_documented(package):
    module = importlib.import_module(package)
    assert module.__doc__
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{package}.{name}"


def test_readme_names_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`|=\S+ )make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"quickstart", "test"} <= named <= targets


def test_readme_quotes_the_error_of_a_clashing_transforms(tmp_path):
    (quoted,) = re.findall(r"`(ImportError: cannot import name .*?)\(…/transforms\.py\)`", README)
    (tmp_path / "transforms.py").write_text("")
    command = [sys.executable, "-c", "from transforms import poprisk_gate"]
    clash = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert clash.returncode == 1
    assert clash.stderr.splitlines()[-1] == f"{quoted}({tmp_path / 'transforms.py'})"


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    machine_path = re.compile(r"(?<![\w.])/(work|root|home|Users|opt)/")
    top_level = [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".git")]
    folders = ["entk", "gramian", "transforms", "experiments", "notebooks", "tests", "docs", "locks", ".ci", "results"]
    for path in top_level + [path for folder in folders for path in (ROOT / folder).rglob("*")]:
        if path.suffix in {"", ".py", ".md", ".toml", ".txt", ".cff", ".ipynb", ".json"} and path.is_file():
            assert not machine_path.search(path.read_text()), path
