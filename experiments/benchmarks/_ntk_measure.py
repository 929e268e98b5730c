"""How contenders are timed against each other: alone first, then in rounds, each kept as soon as it is there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from experiments.benchmarks._ntk_models import Network, arrays, num_outputs, num_params
from experiments.benchmarks._ntk_workers import COMPILE_LIMIT, Contender, Stopped, Worker

# Of the largest entry, by which a result may differ from the first contender's. Roundings differ by 1e-6; but one ReLU
# whose input they put on the other side of zero moves an example's whole row: by 3e-4 in the ResNet.
TOLERANCE = 1e-3
ROUNDS_BUDGET = 30.0  # seconds of rounds after which no more than the asked number are run
MAX_ROUNDS = 10
LONG_ROUND = 120.0  # seconds after which a single round has to do
SLOWER_VARIANT = 3.0  # times its family's fastest so far, after which a variant is given up
LEAST_LIMIT = 5.0  # seconds that every variant gets


@dataclass
class Bench:
    """What all measurements of a run share.

    Attributes:
      folder: of the peers' environments.
      work: scratch folder for weights and results.
      keep: writes all that has been measured so far.
      say: prints what has been measured.
      status: shows what is being measured.
      sources: digest of the code under test; a case begun with other code is begun anew.
      limit: seconds a call may take.
      memory: bytes a worker may hold.
      cores: the cores a worker is pinned to.
      repeats: rounds at least.
      seed: of weights and inputs.
      alive: the workers that wait for the next round.
    """

    folder: Path
    work: Path
    keep: Callable[[], None]
    say: Callable[[str], None]
    status: Callable[[str], None]
    sources: str
    limit: float
    memory: float
    cores: list[int]
    repeats: int
    seed: int
    alive: dict[str, Worker] = field(default_factory=dict)

    def spec(self, network: Network) -> dict[str, Any]:
        """Writes weights and inputs for the workers, and says where they are."""
        path = self.work / "arrays.npz"
        np.savez(path, allow_pickle=False, **arrays(network, self.seed))
        return {"arrays": str(path), "family": network.family, "sizes": network.sizes}

    def start(
        self,
        contender: Contender,
        spec: dict[str, Any],
        cores: list[int] | None = None,
        memory: float | None = None,
    ) -> Worker:
        return Worker(contender, spec, self.folder, cores or self.cores, memory or self.memory)

    def close(self) -> None:
        while self.alive:
            self.alive.popitem()[1].close()


def measure(bench: Bench, network: Network, contenders: Sequence[Contender], record: dict[str, Any]) -> None:
    """Fills `record` with each contender alone and with paired rounds of the fastest of each family.

    Alone means a fresh process: a first call that compiles, then one for memory, for the comparison with the first
    contender's result and for the choice within a family. The chosen processes stay, and are called in turn, the
    order rotated from round to round. What `record` holds already is not measured again.
    """
    if record.get("sources") != bench.sources and _another_round(record.get("rounds", []), bench.repeats):
        record.clear()
    if not record:
        record |= {"title": network.title, "n": network.n, "c": num_outputs(network), "p": num_params(network)}
        record |= {"sources": bench.sources, "alone": {}, "rounds": []}
    missing = [contender for contender in contenders if contender.name not in record["alone"]]
    chosen = _chosen(record, contenders)
    if not missing and (not chosen or not _another_round(record["rounds"], bench.repeats)):
        other = "" if record["sources"] == bench.sources else ", with other sources of entk: --fresh measures anew"
        bench.say(f"  measured before{other}")
        return
    spec = bench.spec(network)
    try:
        if missing:
            _alone(bench, spec, contenders, missing, record)
            record["rounds"] = []
            bench.keep()
        _rounds(bench, spec, _chosen(record, contenders), record)
    finally:
        bench.close()


def families(contenders: Sequence[Contender]) -> list[str]:
    """Each family once, in order."""
    return list(dict.fromkeys(contender.family for contender in contenders))


def fastest(record: dict[str, Any], family: str, contenders: Sequence[Contender]) -> Contender | None:
    """The variant of a family that was fastest alone, of those that finished with the right result."""
    done = [c for c in contenders if c.family == family and "seconds" in record["alone"].get(c.name, {})]
    done = [c for c in done if not is_wrong(record["alone"][c.name])]
    return min(done, key=lambda c: record["alone"][c.name]["seconds"], default=None)


def is_wrong(run: dict[str, Any]) -> bool:
    """Whether the comparison failed; a result without numbers has the error None."""
    return "error" in run and (run["error"] is None or run["error"] > TOLERANCE)


def median_seconds(record: dict[str, Any], name: str) -> float | None:
    """Of a contender's calls in the rounds; None when it took part in none."""
    timed = [run[name] for run in record.get("rounds", ()) if name in run]
    return statistics.median(timed) if timed else None


def ratio(record: dict[str, Any], name: str, base: str) -> float | None:
    """Median over the rounds of a contender's seconds, relative to another's of the same round."""
    paired = [timed[name] / timed[base] for timed in record["rounds"] if name in timed and base in timed]
    return statistics.median(paired) if paired else None


def _chosen(record: dict[str, Any], contenders: Sequence[Contender]) -> list[Contender]:
    best = [fastest(record, family, contenders) for family in families(contenders)]
    return [contender for contender in best if contender is not None]


def _alone(bench: Bench, spec, contenders: Sequence[Contender], missing: Sequence[Contender], record) -> None:
    reference = bench.work / "reference.npy"
    reference.unlink(missing_ok=True)
    first = contenders[0]
    if first not in missing and "seconds" in record["alone"][first.name]:
        _qualify(bench, spec, first, reference)  # its result is gone, and the others are compared with it
    for contender in missing:
        path = reference if contender == first else bench.work / "result.npy"
        bench.status(f"{contender.name}, alone")
        run = _qualify(bench, spec, contender, path, _limit(bench, record, contender, contenders))
        if contender != first and "seconds" in run and reference.exists():
            run["error"] = _difference(path, reference)
        record["alone"][contender.name] = run
        bench.keep()
        bench.say(f"  {contender.name}, alone: {_said(run)}")
        chosen = [c.name for c in _chosen(record, contenders)]
        for name in [name for name in bench.alive if name not in chosen]:
            bench.alive.pop(name).close()


def _limit(bench: Bench, record, contender: Contender, contenders: Sequence[Contender]) -> float:
    """Seconds for a call; less where the family has a variant which this one then cannot beat."""
    best = fastest(record, contender.family, contenders)
    if best is None:
        return bench.limit
    return min(bench.limit, max(SLOWER_VARIANT * record["alone"][best.name]["seconds"], LEAST_LIMIT))


def _qualify(bench: Bench, spec, contender: Contender, path: Path, limit: float | None = None) -> dict[str, Any]:
    limit = limit or bench.limit
    try:
        worker = bench.start(contender, spec)
        bench.alive[contender.name] = worker
        first = worker.call(limit + COMPILE_LIMIT)
        second = worker.call(limit, save=path)
    except Stopped as stopped:
        bench.alive.pop(contender.name, None)
        return {"stopped": str(stopped)}
    return {
        "first_seconds": first["seconds"],
        "seconds": second["seconds"],
        "peak_bytes": second["peak_bytes"],
        "first_peak_bytes": first["peak_bytes"],
        "maxrss_bytes": second["maxrss_bytes"],
        **worker.facts,
    }


def _difference(path: Path, reference: Path) -> float | None:
    """Largest difference relative to the largest entry; None where there is no such number."""
    result, expected = np.load(path), np.load(reference)
    if result.shape != expected.shape:
        return None
    error = float(np.abs(result - expected).max() / np.abs(expected).max())
    return error if np.isfinite(error) else None


def _rounds(bench: Bench, spec, chosen: list[Contender], record) -> None:
    for contender in chosen:
        if contender.name not in bench.alive:
            bench.status(f"{contender.name}, warming up")
            _qualify(bench, spec, contender, bench.work / "result.npy")
    chosen = [contender for contender in chosen if contender.name in bench.alive]
    timed = record["rounds"]
    while chosen and _another_round(timed, bench.repeats):
        turn = len(timed) % len(chosen)
        run = {}
        for contender in chosen[turn:] + chosen[:turn]:
            bench.status(f"{contender.name}, round {len(timed) + 1}")
            try:
                run[contender.name] = bench.alive[contender.name].call(bench.limit)["seconds"]
            except Stopped as stopped:
                bench.alive.pop(contender.name)
                record["alone"][contender.name]["stopped_in_rounds"] = str(stopped)
        chosen = [contender for contender in chosen if contender.name in bench.alive]
        timed.append(run)
        bench.keep()
    medians = {contender.name: median_seconds(record, contender.name) for contender in chosen}
    listed = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in medians.items())
    bench.say(f"  median of {len(timed)} rounds: {listed}")


def _another_round(timed: list[dict[str, float]], repeats: int) -> bool:
    if not timed or len(timed) < repeats:
        return not timed or _spent(timed) < LONG_ROUND
    return len(timed) < MAX_ROUNDS and _spent(timed) < ROUNDS_BUDGET


def _spent(timed: list[dict[str, float]]) -> float:
    return sum(sum(run.values()) for run in timed)


def _said(run: dict[str, Any]) -> str:
    if "stopped" in run:
        return escape(run["stopped"])
    wrong = f" [red]WRONG RESULT (error {run['error']})[/red]" if is_wrong(run) else ""
    return f"{run['seconds']:.3g} s ({run['first_seconds']:.3g} s at first), {run['peak_bytes'] / 2**30:.3g} GiB{wrong}"
