"""How long a flow takes: exponential midpoint against general-purpose solvers and plain gradient descent.

Claim: the exponential midpoint's cost follows the drift of the kernel, that of an explicit method t·λ_max, so that the
gap grows with t. Measured: seconds and steps to reach t with at most 1e-3 relative error in the test outputs, on the
quickstart problem, parameters only, all methods on the same machine. Each method's own tolerance is swept,
loosest first, and its cheapest run that is exact enough counts; compilation does not. The truth is Tsit5 at rtol 1e-6;
that methods of other kinds come to within the target of it is the check on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from entk import empirical_ntk
from experiments._results import ROOT, machine, write_json, write_readme
from experiments.quickstart import Problem, Quickstart, problem
from gramian import AdaptiveStep, gradient_flow

TARGET = 1e-3


@dataclass(frozen=True)
class FlowBenchmark:
    """Settings of the benchmark.

    Attributes:
      times: training times to reach.
      limit: seconds after which a single run of a method is given up, judged from its cost at the time before.
      seed: of the quickstart problem.
      smoke: a tiny problem, in seconds, to see that everything runs.
      out: folder for figure and numbers. Finished runs found there are not repeated.
      readme: write the table into README.md.
    """

    times: tuple[float, ...] = (10.0, 100.0, 1000.0)
    limit: float = 120.0
    seed: int = 0
    smoke: bool = False
    out: Path | None = None
    readme: bool = False


@dataclass(frozen=True)
class Method:
    """A way to reach t: `run(problem, t, knob)` returns test outputs and steps; knobs go from loose to tight."""

    name: str
    run: Callable[[Problem, float, float], tuple[np.ndarray, int]]
    knobs: tuple[float, ...]


def main(settings: Annotated[FlowBenchmark, tyro.conf.arg(name="")] = FlowBenchmark()) -> None:
    """Seconds to reach training time t with 1e-3 relative error in the test outputs."""
    jax.config.update("jax_enable_x64", True)
    console = Console()
    name = "benchmark-flow" + ("-smoke" if settings.smoke else "")
    path = (settings.out or ROOT / "results" / name) / "benchmark.json"
    setting = Quickstart(seed=settings.seed, smoke=settings.smoke)
    case = problem(setting)
    times = (1.0, 3.0) if settings.smoke else settings.times
    done = _resume(path, settings, times)
    for t in times:
        truth = None
        for method in METHODS:
            if f"{method.name} {t:g}" in done["runs"]:
                continue
            if truth is None:
                console.print(f"truth at t = {t:g}")
                truth, _ = _tsit5(case, t, 1e-6)
            console.print(f"{method.name} to t = {t:g}")
            done["runs"][f"{method.name} {t:g}"] = _cheapest(method, case, t, truth, settings.limit, done, times)
            write_json(path, done)
    console.print(_table(done, times))
    _figure(done, times, path.with_name("benchmark.png"))
    console.print(f"Figure and numbers are in {path.parent}.")
    if settings.readme:
        write_readme("benchmark-flow", _markdown(done, times))


def _resume(path: Path, settings: FlowBenchmark, times) -> dict[str, Any]:
    key = {"times": list(times), "seed": settings.seed, "smoke": settings.smoke, "limit": settings.limit}
    if path.exists():
        done = json.loads(path.read_text())
        if done["settings"] == key and done["machine"] == machine():
            return done
    return {"target": TARGET, "settings": key, "machine": machine(), "runs": {}}


def _midpoint(case: Problem, t: float, rtol: float):
    flow = gradient_flow(case.apply_fn, case.params, case.x_s, case.loss, t1=t, controller=AdaptiveStep(rtol))
    return _test_outputs(case, flow.params), flow.num_steps


def _diffrax(solver, case: Problem, t: float, rtol: float):
    params, steps = _solve(solver, case.apply_fn, case.params, case.x_s, case.loss, t, rtol)
    return _test_outputs(case, params), int(steps)


@partial(jax.jit, static_argnums=(0, 1))
def _solve(solver, apply_fn, params, x_s, loss, t, rtol):
    def velocity(_, params, __):
        return jax.tree.map(jnp.negative, jax.grad(lambda params: loss.value(apply_fn(params, x_s)))(params))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),  # pyright: ignore[reportArgumentType]
        solver,
        0.0,
        t,
        dt0=None,
        y0=params,
        # A run that has left the flow shrinks its steps for ever: it fails instead.
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=1e-2 * rtol, dtmin=1e-7 * t, force_dtmin=False),
        max_steps=200_000,
    )
    return jax.tree.map(lambda leaf: leaf[-1], solution.ys), solution.stats["num_accepted_steps"]


def _tsit5(case: Problem, t: float, rtol: float):
    return _diffrax(diffrax.Tsit5(), case, t, rtol)


def _kvaerno5(case: Problem, t: float, rtol: float):
    # A dense Jacobian of the parameters' equation would take p² numbers, 51 GiB here: GMRES forms none.
    linear_solver = lineax.GMRES(rtol=1e-2, atol=1e-2 * rtol)
    finder = optimistix.Newton(rtol=rtol, atol=1e-2 * rtol, linear_solver=linear_solver)
    return _diffrax(diffrax.Kvaerno5(root_finder=finder), case, t, rtol)


def _gradient_descent(case: Problem, t: float, fraction: float):
    rate = float(jnp.linalg.eigvalsh(empirical_ntk(case.apply_fn, case.params, case.x_s)).max()) / len(case.x_s)
    steps = int(np.ceil(t * rate / (2 * fraction)))
    return _test_outputs(case, _descend(case.apply_fn, case.params, case.x_s, case.loss, t / steps, steps)), steps


@partial(jax.jit, static_argnums=0)
def _descend(apply_fn, params, x_s, loss, dt, steps):
    def objective(params):
        return loss.value(apply_fn(params, x_s))

    def step(_, params):
        return jax.tree.map(lambda w, g: w - dt * g, params, jax.grad(objective)(params))

    return jax.lax.fori_loop(0, steps, step, params)


def _test_outputs(case: Problem, params) -> np.ndarray:
    return np.asarray(case.apply_fn(params, case.x_q))


METHODS = (
    Method("exponential midpoint", _midpoint, (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)),
    Method("Tsit5", _tsit5, (1e-3, 1e-4, 1e-5)),
    Method("Kvaerno5", _kvaerno5, (1e-3, 1e-4, 1e-5)),
    # Step as a fraction of the largest stable one at the start; the kernel grows on the way.
    Method("gradient descent", _gradient_descent, (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)),
)


def _cheapest(method: Method, case: Problem, t: float, truth, limit: float, done, times) -> dict[str, Any]:
    """The loosest knob whose error is at most the target, and all that was tried."""
    before = max((s for s in times if s < t), default=None)
    earlier = done["runs"].get(f"{method.name} {before:g}", {}) if before else {}
    if "given_up" in earlier or earlier.get("seconds", 0) * t / (before or t) > 10 * limit:
        return {"given_up": f"too slow at t = {before:g}"}
    tried = []
    for knob in method.knobs:
        try:
            method.run(case, t * 1e-6, knob)  # compiles
            start = time.perf_counter()
            outputs, steps = method.run(case, t, knob)
            seconds = time.perf_counter() - start
        except Exception as error:  # A solver that breaks down is a result; the others still have to run.
            said = next(iter(str(error).splitlines()), "")
            tried.append({"knob": knob, "failed": f"{type(error).__name__}: {said[:120]}"})
            continue
        error = float(np.linalg.norm(outputs - truth) / np.linalg.norm(truth))
        tried.append({"knob": knob, "seconds": seconds, "steps": steps, "error": error if np.isfinite(error) else None})
        if error <= TARGET:
            return {**tried[-1], "tried": tried}
        if seconds > limit:
            return {"given_up": f"{seconds:.0f} s and error {error:.1e}", "tried": tried}
    return {"given_up": "no setting was exact enough", "tried": tried}


def _cell(run: dict[str, Any] | None, fastest: float) -> str:
    if run is None or "seconds" not in run:
        return "-" if run is None else f"not reached ({run['given_up']})"
    return f"{run['seconds']:.1f} s, {run['steps']:,} steps ({run['seconds'] / fastest:.1f}x)"


def _rows(done: dict[str, Any], times) -> list[list[str]]:
    """One row a method, one column a time; ratios to the exponential midpoint."""
    base = [done["runs"].get(f"{METHODS[0].name} {t:g}", {}).get("seconds", float("nan")) for t in times]
    return [
        [method.name, *(_cell(done["runs"].get(f"{method.name} {t:g}"), b) for t, b in zip(times, base, strict=True))]
        for method in METHODS
    ]


def _table(done: dict[str, Any], times) -> Table:
    table = Table(title=f"Seconds to reach t at {TARGET:g} relative error in the test outputs", title_justify="left")
    for column in ("method", *(f"t = {t:g}" for t in times)):
        table.add_column(column)
    for row in _rows(done, times):
        table.add_row(*row)
    return table


def _markdown(done: dict[str, Any], times) -> str:
    where = done["machine"]
    lines = [
        f"Seconds to reach t with {TARGET:g} relative error in the test outputs; {where['cores']} cores, "
        f"JAX {where['jax']}, float64, compilation not counted, ratio to the exponential midpoint in brackets.",
        "",
        "| method | " + " | ".join(f"t = {t:g}" for t in times) + " |",
        "|---" * (len(times) + 1) + "|",
        *("| " + " | ".join(row) + " |" for row in _rows(done, times)),
    ]
    return "\n".join(lines) + "\n"


def _figure(done: dict[str, Any], times, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for method, marker in zip(METHODS, "osD^", strict=True):
        runs = [(t, done["runs"].get(f"{method.name} {t:g}", {})) for t in times]
        points = [(t, run["seconds"]) for t, run in runs if "seconds" in run]
        if points:
            ax.loglog(*zip(*points, strict=True), marker=marker, label=method.name)
    ax.set_xlabel("training time t of the flow")
    ax.set_ylabel("wall time in seconds")
    ax.set_title(f"Time to reach t at {TARGET:g} relative error in the test outputs")
    ax.legend()
    figure.savefig(path, dpi=150)
