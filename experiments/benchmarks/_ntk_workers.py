"""The benchmark's workers as processes: their environments, their limits, and what they are asked."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console

from experiments._results import ROOT

SCRIPTS = Path(__file__).parent / "workers"
PEERS = ("neural-tangents", "torch")  # each has its pins in workers/NAME.txt and gets an environment of its own
START_LIMIT = 120.0  # seconds to import a framework and load the weights
COMPILE_LIMIT = 90.0  # seconds that a first call may take on top of the limit of a call
RESERVE = 2**29  # bytes that have to stay available, so that nothing else on the machine is pushed out


class Stopped(Exception):
    """Why a worker gave no answer: over its time, over its memory, or an error of its own."""


class Contender(NamedTuple):
    """One way to compute something.

    Attributes:
      family: the column it belongs to; the fastest variant of a family counts.
      variant: what the worker script calls it.
      script: file name in workers/.
      peer: the environment it runs in; None is this one.
    """

    family: str
    variant: str
    script: str
    peer: str | None = None

    @property
    def name(self) -> str:
        return self.family if self.family == self.variant else f"{self.family}, {self.variant}"


KERNELS = (
    Contender("entk", "entk", "jax_kernels.py"),
    Contender("jacrev + matmul", "jacrev + matmul", "jax_kernels.py"),
    *(
        Contender("neural-tangents", variant, "jax_kernels.py", "neural-tangents")
        for variant in ("structured derivatives", "jacobian contraction", "NTK-vector products", "auto")
    ),
    *(
        Contender("torch.func", variant, "torch_kernels.py", "torch")
        for variant in ("jacobian contraction", "NTK-vector products")
    ),
)
MOMENTS = tuple(Contender(name, name, "jax_parts.py") for name in ("batch gradient", "gradient_moments", "vmap(grad)"))
MATMUL, PLAN, LARGEST = (Contender(name, name, "jax_parts.py") for name in ("matmul", "plan", "largest"))


def default_folder() -> Path:
    """Where peers' environments are kept from run to run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entk-benchmarks"


def is_set_up(peer: str, folder: Path) -> bool:
    """Whether the environment holds what the pins ask for now."""
    stamp = folder / peer / "installed.txt"
    return stamp.exists() and stamp.read_text() == _pins(peer).read_text()


def set_up(peer: str, folder: Path, console: Console) -> None:
    """Makes the environment of a peer and installs its pins into it."""
    if is_set_up(peer, folder):
        console.print(f"{peer} is set up in {folder / peer}.")
        return
    python = next(
        (p for p in (sys.executable, *map(shutil.which, ("python3.12", "python3.11"))) if p and _fits(p)), None
    )
    if python is None:
        raise RuntimeError(
            f"This is Python {sys.version.split()[0]}, but neural-tangents' JAX has wheels for 3.11 and 3.12 alone, "
            "and neither python3.12 nor python3.11 is on PATH: install one of them and try again."
        )
    console.print(f"Setting up {peer} in {folder / peer} (a few minutes, one or two GiB).")
    if Path(python) == Path(sys.executable):
        venv.create(folder / peer, with_pip=True, clear=True)
    else:
        subprocess.run([python, "-m", "venv", "--clear", str(folder / peer)], check=True)
    pip = [str(_python(peer, folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--requirement", str(_pins(peer))], check=True)
    shutil.copy(_pins(peer), folder / peer / "installed.txt")


def version(peer: str) -> str:
    """The pinned release of a peer: its environment holds what its pins say."""
    return _pins(peer).read_text().split()[0].split("==")[1]


def all_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Worker:
    """A running worker. `facts` is what it said of itself when it was ready.

    Args:
      contender: what it computes.
      spec: the arrays, family and sizes of a network, as workers/_protocol.py reads them.
      folder: of the peers' environments.
      cores: the cores it may use; its thread pools get as many threads.
      memory: bytes it may hold.

    Raises:
      Stopped: it did not get ready.
    """

    def __init__(self, contender: Contender, spec: dict[str, Any], folder: Path, cores: list[int], memory: float):
        python = sys.executable if contender.peer is None else _python(contender.peer, folder)
        argument = json.dumps({**spec, "variant": contender.variant, "cores": cores})
        self._memory = memory
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        self._process = subprocess.Popen(
            [str(python), str(SCRIPTS / contender.script), argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(len(cores), ours=contender.peer is None),
            text=True,
        )
        _first_to_go(self._process.pid)
        self.facts: dict[str, Any] = self._answer(START_LIMIT)["ready"]

    def call(self, limit: float, save: Path | None = None) -> dict[str, Any]:
        """Seconds and bytes of one call; the result goes to `save`, off the clock. Raises Stopped."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"save": save and str(save)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and the answer says why
        return self._answer(limit)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + limit
        while not select.select([self._process.stdout], [], [], 0.1)[0]:
            self._check(end, limit)
        line = self._process.stdout.readline()
        if not line:
            self._stop(self._last_words())
        return json.loads(line)

    def _check(self, end: float, limit: float) -> None:
        try:
            held = psutil.Process(self._process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            return
        if held > self._memory:
            self._stop(f"over {self._memory / 2**30:.1f} GiB")
        if psutil.virtual_memory().available < RESERVE:
            self._stop(f"out of memory, at {held / 2**30:.1f} GiB")
        if time.monotonic() > end:
            self._stop(f"over {limit:.0f} s")

    def _stop(self, reason: str) -> None:
        self.close()
        raise Stopped(reason)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        if code < 0:
            return f"killed by signal {-code}"
        return (errors or lines or [f"ended with status {code}"])[-1][:200]


def _environment(threads: int, *, ours: bool) -> dict[str, str]:
    """The caller's environment less what would change how a worker computes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "PYTHON"))}
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
    kept |= dict.fromkeys(pools, str(threads))
    kept |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if threads == 1:
        kept["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if ours:
        kept["PYTHONPATH"] = str(ROOT)
    return kept


def _first_to_go(pid: int) -> None:
    """When memory runs out all the same, Linux ends the worker, and nothing else."""
    score = Path(f"/proc/{pid}/oom_score_adj")
    if score.exists():
        score.write_text("1000")


def _pins(peer: str) -> Path:
    return SCRIPTS / f"{peer}.txt"


def _python(peer: str, folder: Path) -> Path:
    return folder / peer / "bin" / "python"


def _fits(python: str) -> bool:
    code = "import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))"
    return subprocess.run([python, "-c", code], check=False).returncode == 0
