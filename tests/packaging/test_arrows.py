"""Who may import whom: entk <- gramian, transforms alone, and nothing points back at what uses it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"entk", "gramian", "transforms", "experiments", "notebooks", "tests"}
MAY_IMPORT = {"entk": set(), "gramian": {"entk"}, "transforms": set(), "experiments": {"entk", "gramian", "transforms"}}
PACKAGES = ["entk", "gramian", "transforms"]
PRIVATE_JAX = ("jax._src", "jax.core", "jax.interpreters", "jax.extend", "jaxlib")


def modules_imported_by(source: str) -> set[str]:
    """Every absolute module that `source` imports, `from a import b` counted as both `a` and `a.b`."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def attributes_of_jax_in(source: str) -> set[str]:
    """Every dotted name below `jax` that `source` writes out, such as `jax.core.Tracer`."""
    dotted = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return {name for name in dotted if name.startswith("jax.")}


def sources_of(package: str) -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / package).rglob("*.py"))}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_between_our_packages(package):
    for path, source in sources_of(package).items():
        imported = {module.split(".")[0] for module in modules_imported_by(source)} & OURS
        assert imported <= MAY_IMPORT[package] | {package}, path


def test_transforms_needs_only_jax_optax_numpy_and_rich_for_its_tables():
    for path, source in sources_of("transforms").items():
        imported = {module.split(".")[0] for module in modules_imported_by(source)}
        assert imported - sys.stdlib_module_names <= {"transforms", "jax", "optax", "numpy", "rich"}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_only_public_jax(package):
    for path, source in sources_of(package).items():
        names = modules_imported_by(source) | attributes_of_jax_in(source)
        private = {name for name in names if any(f"{name}.".startswith(f"{module}.") for module in PRIVATE_JAX)}
        assert not private, path


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("import jax.core", "jax.core"),
        ("from jax import core", "jax.core"),
        ("from jax._src.config import State", "jax._src.config"),
        ("import jax\nprint(jax.core.Tracer)", "jax.core"),
    ],
)
def test_the_search_sees_every_way_to_reach_a_module(source, private):
    assert private in modules_imported_by(source) | attributes_of_jax_in(source)


def test_importing_the_packages_imports_nothing_heavy():
    heavy = {"diffrax", "equinox", "matplotlib", "scipy.stats"}
    program = f"import sys, entk, gramian, transforms; print(*sorted({heavy!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
