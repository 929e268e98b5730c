"""What an empirical NTK costs: entk against plain JAX, neural-tangents and torch.func.

Claim: the default strategy of `entk.empirical_ntk` forms the full kernel over outputs in less time than every public
way to form it, on each network of the benchmark. A ratio below 1 in its table refutes that. Measured: seconds and peak
memory of one call on one core in float32, compilation not counted. Controls: all contenders get the same weights and
inputs, and their kernels are compared; each library counts with its fastest implementation; each contender runs in a
process of its own, and rounds of one call each are paired, their order rotated.

Further parts: the share of the machine's peak that this reaches, its growth with n, c, width and T, the largest kernel
in a given memory, and the cost of gradient moments in units of one batch gradient.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import psutil
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments._results import ROOT, machine, write_json, write_readme
from experiments.benchmarks import _ntk_report as report
from experiments.benchmarks._ntk_measure import Bench, measure, median_seconds
from experiments.benchmarks._ntk_models import Network, cnn, mlp, resnet, rnn, transformer
from experiments.benchmarks._ntk_workers import (
    KERNELS,
    LARGEST,
    MATMUL,
    MOMENTS,
    PEERS,
    PLAN,
    RESERVE,
    Contender,
    Stopped,
    all_cores,
    default_folder,
    is_set_up,
    set_up,
)

Part = Literal["peak", "models", "moments", "growth", "largest"]
Name = Literal["mlp", "cnn", "transformer", "resnet", "rnn"]

NETWORKS: dict[Name, Network] = {
    "mlp": mlp(128, (784, 512, 512, 10)),
    "cnn": cnn(64),
    "transformer": transformer(64),
    "resnet": resnet(64),
    "rnn": rnn(128),
}
TINY: dict[Name, Network] = {
    "mlp": mlp(6, (20, 16, 16, 3)),
    "cnn": cnn(3, side=8, channels=(4, 8, 8), outputs=3),
    "transformer": transformer(3, length=5, width=16, vocabulary=7),
    "resnet": resnet(3, side=8, channels=(8, 16, 16), outputs=3),
    "rnn": rnn(3, length=6, width=8, inputs=4, outputs=3),
}
MOMENTS_OF: tuple[Name, ...] = ("mlp", "cnn")

# What grows, its values, and the network of each value.
GROWTH: dict[str, tuple[tuple[int, ...], Callable[[int], Network]]] = {
    "examples n": ((16, 32, 64, 128, 256, 512, 1024), lambda n: mlp(n, (256, 256, 256, 10))),
    "outputs c": ((1, 4, 16, 64, 256), lambda c: mlp(32, (256, 256, 256, c))),
    "width": ((64, 128, 256, 512, 1024, 2048), lambda width: mlp(32, (256, width, width, 10))),
    "length T": ((4, 8, 16, 32, 64), lambda length: transformer(16, length, width=64, vocabulary=16)),
}
TINY_GROWTH: dict[str, tuple[tuple[int, ...], Callable[[int], Network]]] = {
    "examples n": ((2, 4), lambda n: mlp(n, (4, 4, 2))),
}
POINT_LIMIT = 10.0  # seconds of one call: a point of the growth that would pass it is not measured

# Minutes of a full part where one core multiplies matrices at 100 GFLOP/s, for the estimate beforehand.
MINUTES: dict[Part, float] = {"peak": 1, "models": 40, "moments": 3, "growth": 12, "largest": 4}


@dataclass(frozen=True)
class NtkBenchmark:
    """Settings of the benchmark.

    Attributes:
      parts: what to measure. Everything measured is kept in `out` at once, and not measured again.
      networks: of the parts `models` (all of them) and `moments` (mlp and cnn).
      repeats: paired rounds, at least; one where a round takes over two minutes.
      limit: seconds a call may take; a first call, which compiles, may take 90 s more.
      memory: GiB a process may hold; by default all that is available at the start but half a GiB.
      largest: GiB that the largest kernel may take with all it needs.
      seed: of weights and inputs.
      setup_peers: first install neural-tangents and PyTorch with pip, each into an environment of its own. Where pip's
        PyTorch is a build for CUDA, PIP_EXTRA_INDEX_URL with the index of its CPU builds saves several GiB.
      peers: folder of these environments; by default ~/.cache/entk-benchmarks. Libraries not set up are left out.
      smoke: tiny networks, to see that everything runs.
      out: folder for figures and numbers; by default results/benchmark-ntk.
      fresh: forget what `out` holds and measure everything anew.
      readme: write the table into README.md.
    """

    parts: tuple[Part, ...] = ("peak", "models", "moments", "growth", "largest")
    networks: tuple[Name, ...] = ("mlp", "cnn", "transformer", "resnet", "rnn")
    repeats: int = 3
    limit: float = 240.0
    memory: float | None = None
    largest: float = 20.0
    seed: int = 0
    setup_peers: bool = False
    peers: Path | None = None
    smoke: bool = False
    out: Path | None = None
    fresh: bool = False
    readme: bool = False


def main(settings: Annotated[NtkBenchmark, tyro.conf.arg(name="")] = NtkBenchmark()) -> None:
    """Seconds and memory of an empirical NTK, against neural-tangents, torch.func and plain JAX."""
    if settings.readme and (settings.smoke or settings.out):
        raise ValueError(
            "README.md shows the full run in results/benchmark-ntk: pass --readme without --smoke and --out."
        )
    jax.config.update("jax_platforms", "cpu")  # the machine's facts are those of the workers
    console = Console()
    if not console.is_terminal:
        console = Console(width=118)  # tables in a log file are not squeezed into 80 columns
    folder = (settings.peers or default_folder()).absolute()
    if settings.setup_peers:
        for peer in PEERS:
            set_up(peer, folder, console)
    missing = [peer for peer in PEERS if not is_set_up(peer, folder)]
    if missing:
        console.print(f"Left out: {', '.join(missing)}. With --setup-peers pip installs them in {folder}.")
    path = (settings.out or ROOT / "results" / f"benchmark-ntk{'-smoke' * settings.smoke}") / "results.json"
    done = _resume(path, settings)
    if not settings.smoke:
        console.print(_estimate(settings, done))
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as work, Progress(*columns, console=console) as progress:
        jobs = list(_jobs(settings, [c for c in KERNELS if c.peer not in missing], done))
        bar = progress.add_task("", total=len(jobs))
        bench = Bench(
            folder=folder,
            work=Path(work),
            keep=lambda: write_json(path, done),
            say=console.print,
            status=lambda status: progress.update(bar, description=status),
            sources=_digest(),
            limit=settings.limit,
            memory=settings.memory * 2**30 if settings.memory else psutil.virtual_memory().available - RESERVE,
            cores=all_cores()[-1:],
            repeats=settings.repeats,
            seed=settings.seed,
        )
        for title, job in jobs:
            console.print(title)
            try:
                job(bench)
            except Stopped as stopped:
                console.print(f"  {escape(str(stopped))}")
            bench.keep()
            progress.advance(bar)
    for table in report.tables(done):
        console.print(table)
    console.print(report.remarks(done))
    report.figures(done, path.parent)
    console.print(f"Figures and numbers are in {path.parent}.")
    if settings.readme:
        write_readme("benchmark-ntk", report.markdown(done))
    wrong = report.wrong_results(done)
    if wrong:
        raise SystemExit("WRONG RESULTS, compared with the first contender's: " + "; ".join(wrong))


def _resume(path: Path, settings: NtkBenchmark) -> dict[str, Any]:
    """What `path` holds, when it was measured here and in the same way."""
    key = {name: getattr(settings, name) for name in ("repeats", "limit", "memory", "largest", "seed", "smoke")}
    here = {**machine(), "cpu": _cpu(), "memory_gib": round(psutil.virtual_memory().total / 2**30)}
    if path.exists() and not settings.fresh:
        done = json.loads(path.read_text())
        if done["settings"] != key or done["machine"] != here:
            raise ValueError(
                f"{path} holds measurements with {done['settings']} on {done['machine']}, but this run has {key} on "
                f"{here}: pass --fresh to replace them, or --out for another folder."
            )
        return done
    claim = "entk's default strategy is the fastest way to the full empirical NTK on every network"
    parts = {"peak": {}, "models": {}, "moments": {}, "growth": {}, "largest": {}}
    return {"claim": claim, "settings": key, "machine": here, **parts}


def _jobs(
    settings: NtkBenchmark, kernels: list[Contender], done: dict[str, Any]
) -> Iterator[tuple[str, Callable[[Bench], None]]]:
    """Every measurement of the chosen parts with its title, in the order in which they are made."""
    networks = TINY if settings.smoke else NETWORKS
    if "peak" in settings.parts:
        yield "peak: one matrix product", partial(_peak, done["peak"], 256 if settings.smoke else 4096)
    if "models" in settings.parts:
        for name in settings.networks:
            record = done["models"].setdefault(name, {})
            yield f"models: {networks[name].title}", partial(_model, networks[name], kernels, record)
    if "moments" in settings.parts:
        for name in settings.networks:
            if name in MOMENTS_OF:
                network = networks[name]._replace(n=4 if settings.smoke else 256)
                record = done["moments"].setdefault(name, {})
                yield f"moments: {network.title}", partial(_measure, network, MOMENTS, record)
    if "growth" in settings.parts:
        for what, (values, network) in (TINY_GROWTH if settings.smoke else GROWTH).items():
            points = done["growth"].setdefault(what, {})
            for value in values:
                yield f"growth: {what} = {value}", partial(_point, network(value), points, value)
    if "largest" in settings.parts:
        budget = 2.0**24 if settings.smoke else settings.largest * 2**30
        yield "largest: kernel of an MLP", partial(_largest, done["largest"], networks["mlp"], budget)


def _measure(network: Network, contenders, record: dict[str, Any], bench: Bench) -> None:
    measure(bench, network, contenders, record)


def _model(network: Network, contenders, record: dict[str, Any], bench: Bench) -> None:
    """A measurement, and what entk planned to spend on it."""
    measure(bench, network, contenders, record)
    if "plan" not in record:
        worker = bench.start(PLAN, bench.spec(network))
        record["plan"] = worker.facts
        worker.close()


def _point(network: Network, points: dict[str, Any], value: int, bench: Bench) -> None:
    """One value of one panel, for those who would not take too long if their time grew with its square."""
    last = max((int(known) for known in points if int(known) < value), default=None)

    def in_time(contender: Contender) -> bool:
        seconds = 0.0 if last is None else median_seconds(points[str(last)], contender.name)
        return seconds is not None and seconds * (value / (last or value)) ** 2 <= POINT_LIMIT

    contenders = [contender for contender in KERNELS[:2] if in_time(contender)]
    if contenders:
        measure(bench, network, contenders, points.setdefault(str(value), {}))


def _peak(record: dict[str, Any], size: int, bench: Bench) -> None:
    """Operations a second of a square matrix product, on one core and on all."""
    for name, cores in (("one core", bench.cores), ("all cores", all_cores())):
        if name in record:
            continue
        worker = bench.start(MATMUL, {"size": size}, cores)
        try:
            seconds = [worker.call(bench.limit)["seconds"] for _ in range(6)][1:]  # the first one compiles
        finally:
            worker.close()
        rate = worker.facts["operations"] / min(seconds)
        record[name] = {"cores": len(cores), "size": size, "seconds": seconds, "operations_per_second": rate}
        bench.say(f"  {name}: {rate / 1e9:.1f} GFLOP/s")


def _largest(record: dict[str, Any], network: Network, budget: float, bench: Bench) -> None:
    """One kernel, as large as the budget allows, on all cores; the only call, so it compiles as well."""
    if "seconds" in record:
        return
    c = network.sizes["widths"][-1]
    record |= {"title": network.title, "c": c, "stopped": []}
    budget = min(budget, psutil.virtual_memory().available - 2 * RESERVE)
    for share in (1.0, 0.8, 0.6, 0.45):  # what the plan does not foresee may end the first tries
        allowed = share * budget
        bench.status(f"largest kernel in {allowed / 2**30:.1f} GiB")
        network = network._replace(n=math.isqrt(int(allowed) // 4) // c)  # of which the kernel alone fills it
        try:
            run = _one_call(bench, {**bench.spec(network), "budget": allowed}, budget + RESERVE)
        except Stopped as stopped:
            record["stopped"].append({"budget_bytes": allowed, "reason": str(stopped)})
            bench.say(f"  {allowed / 2**30:.1f} GiB: {escape(str(stopped))}")
            continue
        held = run["bytes_before"] + run["peak_bytes"]  # by the whole process: that is what has to fit
        record |= {"budget_bytes": budget, "held_bytes": held, **run}
        bench.say(f"  N = {run['n'] * c:,}: {run['seconds']:.3g} s, {held / 2**30:.3g} GiB")
        return


def _one_call(bench: Bench, spec: dict[str, Any], memory: float) -> dict[str, Any]:
    worker = bench.start(LARGEST, spec, all_cores(), memory)
    try:
        return {**worker.facts, **worker.call(10 * bench.limit)}
    finally:
        worker.close()


def _estimate(settings: NtkBenchmark, done: dict[str, Any]) -> str:
    rate = done["peak"].get("one core", {}).get("operations_per_second", 100e9)
    minutes = sum(MINUTES[part] for part in settings.parts) * 100e9 / rate
    return (
        f"This takes about {minutes:.0f} minutes here when nothing is measured yet. It can be stopped at any moment: "
        "the same command goes on from there."
    )


def _digest() -> str:
    """Of the code under test: measurements begun before a change of it are begun anew."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "entk").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
