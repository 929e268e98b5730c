"""What the operators of a real run cost: recording, sweeps, and the top of W for 17,970 outputs.

Claim: training with the recorder takes at most 1.1 times what it takes without; a sweep's time grows linearly in steps
and probes; the 16 leading eigenpairs of W for all 1,797 digits and ten classes, p ≥ 200,000 and 300 Adam steps take
less than 20 minutes and 6 GiB on two cores.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

from experiments._digits import digits
from experiments._results import ROOT, machine, write_json, write_readme
from gramian import (
    RealizedOperator,
    RealizedPath,
    Recorder,
    minibatches,
    record_training,
    ritz_pairs,
    softmax_cross_entropy,
)
from gramian._run.training import TrainState, train
from gramian.plots.style import BLUE, RED

Part = Literal["recording", "growth", "scale"]
RANK = 16


@dataclass(frozen=True)
class RealizedBenchmark:
    """Settings.

    Attributes:
      parts: what to measure; everything measured is kept in `out` at once, and not measured again.
      repeats: paired rounds of the recording part.
      smoke: tiny networks, to see that everything runs.
      out: folder; by default results/benchmark-realized.
      fresh: forget what `out` holds.
      readme: write the table into README.md.
    """

    parts: tuple[Part, ...] = ("recording", "growth", "scale")
    repeats: int = 5
    smoke: bool = False
    out: Path | None = None
    fresh: bool = False
    readme: bool = False


@dataclass(frozen=True)
class Case:
    """A run to measure: digits, an MLP 64-width-width-10 in float32, Adam, batches of 128."""

    examples: int
    width: int
    steps: int
    probes: int


BASE = Case(examples=600, width=128, steps=64, probes=8)
GROWTH = {
    "steps": [16, 32, 64, 128],
    "probes": [1, 2, 4, 8, 16],
    "examples": [150, 300, 600, 1200],
    "width": [32, 64, 128, 256],
}
RECORDED = Case(examples=1797, width=420, steps=3000, probes=0)
SCALE = Case(examples=1797, width=420, steps=300, probes=RANK + 4)
TINY = Case(examples=20, width=8, steps=6, probes=2)
TINY_GROWTH = {"steps": [4, 8]}


def main(settings: Annotated[RealizedBenchmark, tyro.conf.arg(name="")] = RealizedBenchmark()) -> None:
    """Time and memory of recording a run and of sweeping over it."""
    if settings.readme and (settings.smoke or settings.out):
        raise ValueError("README.md shows the full run: pass --readme without --smoke and --out.")
    console = Console()
    if not console.is_terminal:
        console = Console(width=118)
    path = (settings.out or ROOT / "results" / f"benchmark-realized{'-smoke' * settings.smoke}") / "results.json"
    done = json.loads(path.read_text()) if path.exists() and not settings.fresh else {"recording": {}, "growth": {}}
    done |= {"settings": {"repeats": settings.repeats, "smoke": settings.smoke}, "machine": machine()}
    if not settings.smoke:
        console.print("About 15 minutes on two cores when nothing is measured yet.")
    parts: dict[Part, Callable] = {"recording": _recording, "growth": _growth, "scale": _scale}
    for part in settings.parts:
        parts[part](settings, done, lambda: write_json(path, done), console)
    console.print(_table(done))
    if done["growth"]:
        _figure(done).savefig(path.parent / "growth.png")
    console.print(f"Numbers are in {path.parent}.")
    if settings.readme:
        write_readme("benchmark-realized", _markdown(done))


def _problem(case: Case):
    data = digits(min(case.examples, 1796), 1, odd_even=False, label_noise=0.1, seed=0)
    x, y = np.concatenate([data.x_s, data.x_q]), np.concatenate([data.noisy_s, data.clean_q])
    x, y = jnp.asarray(x[: case.examples], jnp.float32), jnp.asarray(y[: case.examples])
    sizes, keys = (64, case.width, case.width, 10), jax.random.split(jax.random.key(0), 3)
    params = {
        f"w{k}": jax.random.normal(keys[k], (sizes[k], sizes[k + 1]), jnp.float32) / sizes[k] ** 0.5 for k in range(3)
    }
    params |= {f"b{k}": jnp.zeros(sizes[k + 1], jnp.float32) for k in range(3)}
    batch = min(128, case.examples // 2)
    batches = minibatches(len(x), batch, -(-case.steps // (len(x) // batch)))[: case.steps]
    return params, x, softmax_cross_entropy(y), batches


def _mlp(params, x):
    for k in range(3):
        x = x @ params[f"w{k}"] + params[f"b{k}"]
        x = jnp.tanh(x) if k < 2 else x
    return x


OPTIMIZER = optax.adam(1e-3)


def _num_params(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _recorded(case: Case, folder: str, every: int = 8):
    params, x, loss, batches = _problem(case)
    return record_training(_mlp, params, x, loss, OPTIMIZER, batches, Recorder(folder, every=every))[1]


def _recording(settings: RealizedBenchmark, done: dict[str, Any], keep: Callable, console: Console) -> None:
    case = TINY if settings.smoke else RECORDED
    for every in (16, 64):
        if str(every) not in done["recording"]:
            done["recording"][str(every)] = _paired(settings, case, every)
            keep()
            console.print(f"recording every {every} steps: {done['recording'][str(every)]['ratio']:.2f} times training")


def _paired(settings: RealizedBenchmark, case: Case, every: int) -> dict[str, Any]:
    """The same jitted steps with and without a recorder, in turn; both block at the end of every round."""
    params, x, loss, batches = _problem(case)
    rounds = {"without": [], "with": []}
    for k in range(settings.repeats + 1):  # the first one compiles
        for name in ("without", "with") if k % 2 else ("with", "without"):
            with tempfile.TemporaryDirectory() as folder:
                recorder = Recorder(folder, every=every)
                start = time.perf_counter()
                state = TrainState(params, OPTIMIZER.init(params))
                if name == "with":
                    recorder.start(*state)
                for first in range(0, len(batches), every):
                    some = batches[first : first + every]
                    state, _ = train(_mlp, OPTIMIZER, loss, x, state, jnp.asarray(some))
                    if name == "with":
                        recorder.update(some, *state)
                if name == "with":
                    recorder.close(*state)
                jax.block_until_ready(state)
                if k:
                    rounds[name].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(rounds["with"], rounds["without"], strict=True))
    return {**rounds, "ratio": ratio, "steps": len(batches), "num_params": _num_params(params)}


def _growth(settings: RealizedBenchmark, done: dict[str, Any], keep: Callable, console: Console) -> None:
    """Seconds of a forward sweep and of a product with W, one quantity at a time."""
    base = TINY if settings.smoke else BASE
    for what, values in (TINY_GROWTH if settings.smoke else GROWTH).items():
        points = done["growth"].setdefault(what, {})
        for value in values:
            if str(value) in points:
                continue
            case = Case(**{**vars(base), what: value})
            with tempfile.TemporaryDirectory() as folder:
                path = RealizedPath(_recorded(case, folder), None, 1)
                psi = np.random.default_rng(0).standard_normal((case.probes, path.sizes[0]))
                sweep = _seconds(lambda path=path, psi=psi: path.forward(psi).probes.psi)
                product = _seconds(lambda path=path, psi=psi: path.backward(psi, of="gramian"))
            points[str(value)] = {"sweep": sweep, "product": product}
            keep()
            console.print(f"growth, {what} = {value}: sweep {sweep:.3g} s, product with W {product:.3g} s")


def _seconds(call: Callable) -> float:
    jax.block_until_ready(call())  # compiles
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _scale(settings: RealizedBenchmark, done: dict[str, Any], keep: Callable, console: Console) -> None:
    """The leading eigenpairs of W, compilation counted."""
    if "scale" in done:
        return
    case, rank = (TINY, 1) if settings.smoke else (SCALE, RANK)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = _recorded(case, folder)
        trained = time.perf_counter()
        path = RealizedPath(run, None, 1, progress=console.is_terminal)
        pairs = ritz_pairs(RealizedOperator(path, "gramian"), rank, block_size=case.probes, num_products=2)
        seconds = time.perf_counter() - trained
    done["scale"] = {
        **vars(case),
        "num_outputs": path.sizes[0],
        "num_params": _num_params(run.params),
        "training_seconds": trained - start,
        "seconds": seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "eigenvalues": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "lowest": pairs.lowest,
    }
    keep()
    console.print(f"scale: {rank} eigenpairs of W at N = {path.sizes[0]:,} in {seconds:.0f} s")


def _rows(done: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for every, record in done["recording"].items():
        found.append(
            (
                f"training with its state kept every {every} steps, against without",
                f"MLP, p = {record['num_params']:,}, {record['steps']} Adam steps, {len(record['with'])} paired rounds",
                f"{record['ratio']:.2f}x (goal 1.1x)",
            )
        )
    for what, points in done["growth"].items():
        (low, first), *_, (high, last) = points.items()
        power = {
            name: np.log(last[name] / first[name]) / np.log(float(high) / float(low)) for name in ("sweep", "product")
        }
        found.append(
            (
                f"growth with {what}",
                f"{low} to {high}",
                f"sweep ∝ {what}^{power['sweep']:.2f}, product with W ∝ {what}^{power['product']:.2f}",
            )
        )
    if "scale" in done:
        one = done["scale"]
        worst = max(r / v for r, v in zip(one["residuals"], one["eigenvalues"], strict=True))
        found.append(
            (
                f"top {len(one['eigenvalues'])} eigenpairs of W",
                f"N = {one['num_outputs']:,}, p = {one['num_params']:,}, {one['steps']} Adam steps, 1 Gauss point",
                f"{one['seconds'] / 60:.1f} min, {one['peak_gib']:.1f} GiB; residuals ≤ {worst:.1%} of the eigenvalue",
            )
        )
    return found


def _table(done: dict[str, Any]) -> Table:
    table = Table(title="Cost of a recorded run", title_justify="left")
    for column in ("what", "setting", "cost"):
        table.add_column(column)
    for row in _rows(done):
        table.add_row(*row)
    return table


def _markdown(done: dict[str, Any]) -> str:
    head = f"{done['machine']['cores']} cores, JAX {done['machine']['jax']}, float32.\n\n"
    return (
        head + "| what | setting | cost |\n|---|---|---|\n" + "".join(f"| {' | '.join(row)} |\n" for row in _rows(done))
    )


def _figure(done: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 3.6), layout="constrained", dpi=110)
    axes = np.atleast_1d(figure.subplots(1, len(done["growth"]), sharey=True))
    for ax, (what, points) in zip(axes, done["growth"].items(), strict=True):
        values = [float(value) for value in points]
        for name, style, color in (("sweep", "o-", BLUE), ("product", "s--", RED)):
            label = "forward sweep" if name == "sweep" else "product with W"
            ax.loglog(values, [point[name] for point in points.values()], style, color=color, label=label)
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
        ax.set(xlabel=what)
    axes[0].set(ylabel="seconds")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].legend(frameon=False)
    figure.suptitle("Growth of an analysis, one quantity at a time", x=0.01, ha="left", fontweight="bold")
    return figure
