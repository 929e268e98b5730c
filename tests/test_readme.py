"""README's example runs as typed, and the numbers in README are those its scripts wrote."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL_MODEL = """
import jax
import jax.numpy as jnp
import optax

def apply_fn(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]

keys = jax.random.split(jax.random.key(0), 4)
params = {"in": jax.random.normal(keys[0], (3, 4)), "out": jax.random.normal(keys[1], (4, 1)) / 2}
x, y = jax.random.normal(keys[2], (130, 3)), jax.random.normal(keys[3], (130, 1))
"""


def test_the_example_runs_as_typed(tmp_path, users_environment):
    (example,) = re.findall(r"## Example\n\n```python\n(.*?)```", README, re.DOTALL)
    command = [sys.executable, "-c", example]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=users_environment)
    assert result.returncode == 0, result.stderr
    assert "Identities" in result.stdout
    assert "NO" not in result.stdout  # an identity that does not hold
    assert (tmp_path / "report.png").exists()


def test_the_tour_of_kernels_runs_as_typed(tmp_path):
    (tour,) = re.findall(r"## Kernels of any size\n.*?```python\n(.*?)```", README, re.DOTALL)
    model = """
import jax
import jax.numpy as jnp
import numpy as np

def apply_fn(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]

params = {"in": jnp.ones((3, 4)) / 3, "out": jnp.ones((4, 1))}
x, y = jnp.arange(60.0).reshape(20, 3) / 60, jnp.ones((20, 1))
"""
    result = subprocess.run([sys.executable, "-c", model + tour], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "PositionPairs" in result.stdout
    assert (tmp_path / "kernel.dat").stat().st_size == 20 * 20 * 4


def test_the_account_of_a_real_run_is_given_as_typed(tmp_path):
    (recorded,) = re.findall(r"## The run you actually did\n.*?```python\n(.*?)```", README, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", SMALL_MODEL + "from gramian import squared_loss\n" + recorded],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "moved by weight decay" in result.stdout
    assert "NO" not in result.stdout
    assert (tmp_path / "run").is_dir()


def test_the_gate_is_audited_used_and_reported_as_typed(tmp_path):
    (gate,) = re.findall(r"## The gate\n.*?```python\n(.*?)```", README, re.DOTALL)
    result = subprocess.run([sys.executable, "-c", SMALL_MODEL + gate], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for shown in ("gain on unseen examples", "Population-risk gate, step 50", "Population-risk gate, step 1 "):
        assert shown in result.stdout


def test_the_results_table_is_the_one_the_scripts_wrote():
    table = README.split("<!-- results -->\n")[1].split("<!-- /results -->")[0]
    rows = [path.read_text() for path in sorted((ROOT / "results").rglob("row.md"))]
    assert rows
    assert table == "| experiment | setting | outcome | cost |\n|---|---|---|---|\n" + "".join(rows)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`((?:notebooks|locks|results)/[\w./]*)`", README):
        assert (ROOT / target).exists(), target
