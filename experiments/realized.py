"""The theory of runs as they are: digits, Adam and SGD with mini-batches, against gradient flow on the same data.

Claim: for the steps that a real optimizer took, P, W, D and G obey (I1)-(I4) to quadrature error, and what never moved
the parameters is invisible at test (I6′). Every network is trained twice: on 1,500 digits, where no operator is formed,
and on 40, where all are and those of the run stand beside those of gradient flow. Controls: gradient flow of the same
network to the same training loss; the share by which W falls below zero, where ranking by W would mislead; residuals of
every eigenpair that is not computed from the full matrix. Corrupted labels show what becomes of noise.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments._digits import digits
from experiments._mlp import MLP
from experiments._results import ROOT, machine, write_json, write_row
from gramian import (
    AdaptiveStep,
    OutputLoss,
    Recorder,
    Recording,
    Report,
    TrainingReport,
    analyze,
    analyze_training,
    minibatches,
    record_training,
    reference_flow,
    softmax_cross_entropy,
)
from gramian._run.step import rows
from gramian.plots.style import BLUE, GREY, RED, STYLE, Page, canvas, legend_below, log_y, title_of

Model = Literal["mlp", "cnn"]
Optimizer = Literal["adam", "sgd"]

OPTIMIZERS = {"adam": lambda rate: optax.adam(rate or 2e-3), "sgd": lambda rate: optax.sgd(rate or 0.2)}


class CNN(nnx.Module):
    """Two 3×3 convolutions, the second of stride 2, and a dense layer, tanh between them, on images of 8×8.

    Convolutions are products with patches: on a CPU, for many probes and in float64, ten times faster than XLA's own.
    """

    def __init__(self, channels: tuple[int, int], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        first, second = channels
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.first = nnx.Linear(9, first, **options)
        self.second = nnx.Linear(9 * first, second, **options)
        self.last = nnx.Linear(16 * second, 10, **options)

    def __call__(self, x):
        x = nnx.tanh(self.first(_patches(x.reshape(-1, 8, 8, 1), 1)))
        return self.last(nnx.tanh(self.second(_patches(x, 2))).reshape(len(x), -1))


def _patches(x: Any, stride: int) -> Any:
    """The 3×3 neighbourhoods of every pixel, or of every second: (n, h, w, c) to (n, h / stride, w / stride, 9c)."""
    size = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + size : stride, j : j + size : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


@dataclass(frozen=True)
class Realized:
    """Settings.

    Attributes:
      models: networks to train, each with every optimizer.
      optimizers: adam (rate 2e-3), sgd (rate 0.2).
      rate: another learning rate for all of them.
      epochs, batch_size: of the run; the CNN takes batches twice as large, for its steps cost ten times as much.
      label_noise: share of training labels replaced by another class.
      num_train: training points; all other digits are test points, so that all 1,797 are used.
      formed_train, formed_test, formed_batch: training points, test points and batch size of the second run, whose
        operators are formed.
      width: of the MLP's two hidden layers; the CNN has width / 16 and width / 8 channels.
      rank: eigenpairs of V and W.
      num_products: block products for them.
      quadrature: Gauss points along each step.
      seed: of split, corruption, initialisation and batches.
      smoke: a tiny problem, in seconds, to see that everything runs.
      out: folder; by default results/realized.
      fresh: forget recordings and finished sweeps of an interrupted run.
      readme: write the rows into README.md.
    """

    models: tuple[Model, ...] = ("mlp", "cnn")
    optimizers: tuple[Optimizer, ...] = ("adam", "sgd")
    rate: float | None = None
    epochs: int = 20
    batch_size: int = 250
    label_noise: float = 0.1
    num_train: int = 1500
    formed_train: int = 40
    formed_test: int = 100
    formed_batch: int = 8
    width: int = 64
    rank: int = 4
    num_products: int = 2
    quadrature: int = 2
    seed: int = 0
    smoke: bool = False
    out: Path | None = None
    fresh: bool = False
    readme: bool = False


def main(settings: Annotated[Realized, tyro.conf.arg(name="")] = Realized()) -> None:
    """P, W, D and G of real Adam and SGD runs on digits, beside gradient flow."""
    if settings.readme and (settings.smoke or settings.out):
        raise ValueError("README.md shows the full run in results/realized: pass --readme without --smoke and --out.")
    jax.config.update("jax_enable_x64", True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=118)
    folder = settings.out or ROOT / "results" / f"realized{'-smoke' * settings.smoke}"
    if not settings.smoke:
        console.print("About 25 minutes on one core with the default settings; it can be stopped at will and goes on.")
    folders: dict[tuple[Model, Optimizer], Path] = {
        (model, optimizer): folder / f"{model}-{optimizer}"
        for model in settings.models
        for optimizer in settings.optimizers
    }
    for (model, optimizer), out in folders.items():
        if settings.fresh or not _mark(out).exists():
            _case(settings, model, optimizer, out, console)
            _mark(out).touch()
    for out in folders.values():
        _mark(out).unlink()


def _mark(out: Path) -> Path:
    """Stands in the folder of a finished case until all are finished."""
    return out / "finished"


class Problem(NamedTuple):
    """A network on digits; `clean` is the loss of uncorrupted training labels, `test` that of the test labels."""

    apply_fn: Any
    params: Any
    x_s: Any
    x_q: Any
    loss: OutputLoss
    clean: OutputLoss
    test: OutputLoss


def _problem(settings: Realized, model: Model, num_train: int, num_test: int) -> Problem:
    data = digits(num_train, num_test, odd_even=False, label_noise=settings.label_noise, seed=settings.seed)
    rngs, width = nnx.Rngs(settings.seed), 8 if settings.smoke else settings.width
    if model == "mlp":
        network = MLP((64, width, width, 10), dtype=jnp.dtype("float64"), rngs=rngs)
    else:
        network = CNN((max(1, width // 16), max(1, width // 8)), dtype=jnp.dtype("float64"), rngs=rngs)
    graph, params = nnx.split(network)

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    losses = (softmax_cross_entropy(jnp.asarray(y)) for y in (data.noisy_s, data.clean_s, data.clean_q))
    return Problem(apply_fn, params, jnp.asarray(data.x_s), jnp.asarray(data.x_q), *losses)


def _case(settings: Realized, model: Model, optimizer: Optimizer, out: Path, console: Console) -> None:
    smoke, epochs = settings.smoke, 2 if settings.smoke else settings.epochs
    num_train, num_test = (40, 30) if smoke else (settings.num_train, 1797 - settings.num_train)
    formed_train, formed_test = (6, 4) if smoke else (settings.formed_train, settings.formed_test)
    case = _problem(settings, model, num_train, num_test)
    formed = _problem(settings, model, formed_train, formed_test)
    scratch = out / "unfinished"
    if settings.fresh:
        shutil.rmtree(scratch, ignore_errors=True)
    resumed, start = scratch.exists(), time.perf_counter()

    def record(case: Problem, batch_size: int, name: str) -> tuple[Any, Recording]:
        batches = minibatches(len(case.x_s), batch_size, epochs, settings.seed)
        recorder, tx = Recorder(scratch / name), OPTIMIZERS[optimizer](settings.rate)
        return record_training(case.apply_fn, case.params, case.x_s, case.loss, tx, batches, recorder)

    batch_size = 8 if smoke else settings.batch_size * (2 if model == "cnn" else 1)
    trained, run = record(case, batch_size, "run")
    _, small = record(formed, 2 if smoke else settings.formed_batch, "formed")
    recorded = time.perf_counter() - start
    num_params = sum(leaf.size for leaf in jax.tree.leaves(case.params))
    console.print(
        f"{model} (p = {num_params:,}) with {optimizer}: {num_train} and {formed_train} digits, "
        f"{settings.label_noise:.0%} of the labels corrupted, {run.num_steps} and {small.num_steps} steps."
    )
    analysis = partial(
        analyze_training, quadrature=settings.quadrature, store=scratch / "sweeps", progress=console.is_terminal
    )
    report = analysis(
        run,
        case.x_q,
        rank=2 if smoke else settings.rank,
        num_products=1 if smoke else settings.num_products,
        dense=False,
        clean_loss=case.clean,
        test_loss=case.test,
    )
    beside = analysis(small, formed.x_q, dense=True, clean_loss=formed.clean, test_loss=formed.test)
    flow = _flow(case, report.train_risk.end)
    ideal = analyze(
        formed.apply_fn,
        small.params,
        formed.x_s,
        formed.loss,
        formed.x_q,
        t1=_flow(formed, beside.train_risk.end).t1,
        controller=AdaptiveStep(1e-3),
        clean_loss=formed.clean,
        test_loss=formed.test,
    )
    sides = {name: _side(case, end) for name, end in ((optimizer, trained), ("gradient flow", flow.params))}
    start_q, run_q, flow_q = (np.asarray(rows(case.apply_fn, w, case.x_q)) for w in (case.params, trained, flow.params))
    apart = float(np.linalg.norm(flow_q - run_q) / np.linalg.norm(run_q - start_q))
    seconds = time.perf_counter() - start
    console.print(report)
    console.print(_table(sides, apart, report, flow.t1))
    console.print(beside)
    console.print(ideal)
    out.mkdir(parents=True, exist_ok=True)
    for name, one in (("report", report), ("formed-run", beside), ("formed-flow", ideal)):
        one.plot(path=out / f"{name}.png")
    _figure(optimizer, beside, ideal, run_q - start_q, flow_q - start_q).savefig(out / "sides.png")
    chosen = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    summary = {
        "claim": "(I1)-(I4) and (I6') hold for the realized steps of a real optimizer, to quadrature error",
        "settings": chosen,
        "model": model,
        "optimizer": optimizer,
        "num_params": num_params,
        "seconds": None if resumed else round(seconds, 1),
        "recording_seconds": None if resumed else round(recorded, 1),
        "machine": machine(),
        "flow": {"t": flow.t1, "distance_of_test_displacements": apart},
        "sides": sides,
        "formed": {"run": beside.as_dict(), "flow": ideal.as_dict()},
        **report.as_dict(),
    }
    write_json(out / "report.json", summary)
    shutil.rmtree(scratch)
    console.print(f"{seconds:.0f} s{' since the interruption' if resumed else ''}. Figures and numbers are in {out}.\n")
    if settings.readme:
        write_row(f"realized/{model}-{optimizer}", _row(summary))


def _flow(case: Problem, target: float):
    """Gradient flow to the time at which its training loss is `target`."""

    def flow_to(t: float):
        return reference_flow(case.apply_fn, case.params, case.x_s, case.loss, t1=t, rtol=1e-5, operators=False)

    t = 1.0
    while True:
        flow = flow_to(t)
        losses = np.asarray(flow.history["loss"])
        if losses[-1] <= target or t > 1e5:
            break
        t *= 4
    reached = int(np.argmax(losses <= target)) if losses[-1] <= target else len(losses) - 1
    times = np.concatenate([[0.0], np.asarray(flow.history["t"])])
    before = float(losses[reached - 1] if reached else case.loss.value(rows(case.apply_fn, case.params, case.x_s)))
    share = np.clip((before - target) / max(before - float(losses[reached]), 1e-300), 0.0, 1.0)
    return flow_to(max(float(times[reached] + share * (times[reached + 1] - times[reached])), 1e-3))


def _side(case: Problem, end: Any) -> dict[str, float]:
    outputs = rows(case.apply_fn, end, case.x_q)
    moved = sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (end, case.params)), strict=True))
    return {
        "test_loss": float(case.test.value(outputs)),
        "test_accuracy": float((outputs.argmax(1) == case.test.targets).mean()),
        "distance_in_parameters": float(jnp.sqrt(moved)),
    }


def _table(sides: dict[str, dict[str, float]], apart: float, report: TrainingReport, t: float) -> Table:
    table = Table(
        title=f"At the training loss {report.train_risk.end:.4g} (gradient flow: t = {t:.3g})", title_justify="left"
    )
    for column in ("", "test loss", "test accuracy", "‖w − w(0)‖"):
        table.add_column(column)
    for name, side in sides.items():
        table.add_row(
            name, f"{side['test_loss']:.4g}", f"{side['test_accuracy']:.1%}", f"{side['distance_in_parameters']:.3g}"
        )
    table.caption = f"test displacements {apart:.2g} apart, relative to the first"
    return table


def _figure(optimizer: str, run: TrainingReport, flow: Report, moved: np.ndarray, by_flow: np.ndarray) -> Figure:
    """The run, blue, beside gradient flow, red: spectra and cells where operators are formed, displacements of all."""
    with rc_context(STYLE):
        figure = Page(figsize=(15, 5), layout="constrained")
        spectrum, cells, sides = figure.subplots(1, 3, width_ratios=(4, 5, 4))
    _spectra(spectrum, optimizer, run, flow)
    _cells(cells, optimizer, run, flow)
    with canvas(sides) as ax:
        moved, by_flow = moved.ravel(), by_flow.ravel()
        bound = 1.05 * max(np.abs(moved).max(), np.abs(by_flow).max())
        ax.plot([-bound, bound], [-bound, bound], color=GREY, lw=0.8, label="equal")
        ax.plot(moved, by_flow, ".", ms=2, color=BLUE, label=f"test outputs ({len(moved):,})")
        ax.set(xlabel=f"by {optimizer}, $\\Delta U_Q$ (outputs)", ylabel="by gradient flow (outputs)", aspect="equal")
        title_of(ax, "Test displacement of the large run")
        legend_below(ax)
    figure.suptitle(f"{optimizer} and gradient flow at equal training loss", x=0.01, ha="left", fontweight="bold")
    return figure


def _spectra(ax: Axes, optimizer: str, run: TrainingReport, flow: Report) -> None:
    drawn = {
        f"motion Gramian V of {optimizer}": (run.channel.eigenvalues, BLUE, "-"),
        f"dissipation Gramian W of {optimizer}": (run.gramian_eigenvalues, BLUE, ":"),
        "$W_S$ of gradient flow": (flow.channel.eigenvalues, RED, "--"),
    }
    with canvas(ax):
        for name, (values, color, style) in drawn.items():
            places = np.arange(1, len(values) + 1)
            ax.plot(places, np.where(values > 0, values, np.nan), color=color, ls=style, lw=1.6, label=name)
        shown = np.concatenate([values for values, *_ in drawn.values()])
        log_y(ax, shown[shown > 1e-8 * shown.max()])
        ax.set(xlabel="eigen-direction j, largest first", ylabel="eigenvalue (time × kernel)")
        title_of(ax, f"Spectra, N = {len(run.channel.eigenvalues)}")
        legend_below(ax)


def _cells(ax: Axes, optimizer: str, run: TrainingReport, flow: Report) -> None:
    with canvas(ax):
        places = np.arange(len(run.cells))[::-1]
        columns = ("dissipated", "of the loss dissipated", ""), ("test_motion", "of the test motion", "////")
        for k, (field, name, hatch) in enumerate(columns):
            for side, (label, color, report) in enumerate(((optimizer, BLUE, run), ("gradient flow", RED, flow))):
                shares = [100 * getattr(cell, field) for cell in report.cells]
                shift = 0.3 - 0.4 * k - 0.2 * side
                face = "white" if hatch else color
                ax.barh(
                    places + shift, shares, 0.18, color=face, edgecolor=color, hatch=hatch, label=f"{label}, {name}"
                )
        ax.set_yticks(places, [f"{c.part},\n{c.space}" if c.space != "all" else c.part for c in run.cells])
        ax.axvline(0, color="black", lw=0.8)
        ax.set(xlabel="share (%)", ylabel="cell")
        title_of(ax, f"Four cells, channel of rank {run.channel.rank} (flow: {flow.channel.rank})")
        legend_below(ax, columns=2)


def _row(summary: dict[str, Any]) -> tuple[str, ...]:
    path = max(row["residual"] for row in summary["identities"] if row["name"] in ("(I1)", "(I2)", "(I3)", "(I4)"))
    ours, flow = summary["sides"].values()
    formed, points = summary["formed"]["run"], summary["settings"]["quadrature"]
    bounds = [row["holds"] for one in (summary, formed) for row in one["identities"] if row["name"] == "(I6′)"]
    cores, seconds = summary["machine"]["cores"], summary["seconds"]
    took = f"{seconds} s" if seconds else "stopped and resumed,"
    rank, share = summary["effective_ranks"]["motion"], 100 * formed["negative_share"]
    below = f"down to −{share:.2g} % of its largest eigenvalue" if share else "nowhere below zero"
    noise = {
        name: next(c for c in one["cells"] if (c["part"], c["space"]) == ("noise", "channel"))["test_motion"]
        for name, one in summary["formed"].items()
    }
    return (
        f"`realized`, {summary['model']}, {summary['optimizer']}",
        f"digits, N = {summary['num_train_outputs']:,}, p = {summary['num_params']:,}, {summary['num_steps']} "
        f"mini-batch steps; N = {formed['num_train_outputs']}, {formed['num_steps']} steps, operators formed; one seed",
        f"(I1)-(I4) ≤ {path:.1e} with {points} Gauss points; (I6′) {'holds' if all(bounds) else 'FAILS'}; effective "
        f"rank of V {rank['value']:,.0f} ± {rank['standard_error']:,.0f}, but 95 % of its trace takes about "
        f"{summary['channel']['estimate']:,} directions; test loss {ours['test_loss']:.3g}, gradient "
        f"flow at the same training loss {flow['test_loss']:.3g}. Formed: W "
        f"{below}; noise in the channel makes "
        f"{100 * noise['run']:.0f} % of the test motion, of gradient flow's {100 * noise['flow']:.0f} %",
        f"{took} on {cores} core{'s' * (cores != 1)}",
    )
