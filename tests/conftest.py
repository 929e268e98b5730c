"""Settings of the whole test session.

Programs are compiled fast rather than well, also in processes that tests start: most of them run once, on a handful of
numbers. Tests of something that has to work just as a user runs it start a process with `users_environment`.

float64 is on everywhere (`jax_enable_x64`), because identities are asserted in it; a test of a float32 path passes
float32 arrays. Figures are drawn without a screen. Hypothesis draws the same examples on every run in CI and never
fails a test for being slow: the first call compiles.
"""

import os
import subprocess
import sys
from pathlib import Path

# XLA reads its flags when its backend starts. The fusion emitters take half of all compilation time.
FAST = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
FOUND = "ENTK_TESTS_XLA_FLAGS"  # what the first process found, for the workers that it starts


def known(flags: list[str]) -> list[str]:
    """Those that the installed jaxlib knows: it aborts the process at one that it does not, and they come and go."""

    def starts(some: list[str]) -> bool:
        environment = {**os.environ, "XLA_FLAGS": " ".join(some), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    return flags if starts(flags) else [flag for flag in flags if starts([flag])]


OWN_FLAGS = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in FAST]
os.environ.setdefault(FOUND, " ".join(known(FAST)))
os.environ |= {"XLA_FLAGS": " ".join([*OWN_FLAGS, os.environ[FOUND]]), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

import hypothesis  # noqa: E402
import jax  # noqa: E402
import matplotlib  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="module", autouse=True)
def bounded_mappings():
    """Forgets compiled programs before Linux refuses more: each maps memory of its own, and 65,530 maps are the limit.

    Past it the process dies in the next compilation.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def users_environment():
    """The environment without what makes compilation fast here."""
    environment = {**os.environ, "XLA_FLAGS": " ".join(OWN_FLAGS)}
    del environment["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    return environment
