"""The theory of runs as they are: digits, Adam and SGD with mini-batches, against gradient flow on the same data.

Claim: for the steps that a real optimizer took, P, W, D and G obey (I1)-(I4) to quadrature error, and what never moved
the parameters is invisible at test (I6′). Controls: gradient flow of the same network to the same training loss; the
share by which W falls below zero, where ranking by W would mislead; residuals of every eigenpair that is not computed
from the full matrix. Corrupted labels show what becomes of noise.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments._digits import digits
from experiments._mlp import MLP
from experiments._results import ROOT, machine, write_json, write_row
from gramian import (
    OutputLoss,
    Recorder,
    TrainingReport,
    analyze_training,
    minibatches,
    record_training,
    reference_flow,
    softmax_cross_entropy,
)
from gramian._realized_step import rows

Model = Literal["mlp", "cnn"]
Optimizer = Literal["adam", "sgd"]

OPTIMIZERS = {"adam": lambda rate: optax.adam(rate or 2e-3), "sgd": lambda rate: optax.sgd(rate or 0.2)}
BLUE, RED, GREY = "#0072B2", "#D55E00", "#6E6E6E"


class CNN(nnx.Module):
    """Two 3×3 convolutions, the second of stride 2, and a dense layer, tanh between them, on images of 8×8."""

    def __init__(self, channels: tuple[int, int], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        first, second = channels
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.first = nnx.Conv(1, first, (3, 3), **options)
        self.second = nnx.Conv(first, second, (3, 3), strides=2, **options)
        self.last = nnx.Linear(16 * second, 10, **options)

    def __call__(self, x):
        x = nnx.tanh(self.first(x.reshape(-1, 8, 8, 1)))
        return self.last(nnx.tanh(self.second(x)).reshape(len(x), -1))


@dataclass(frozen=True)
class Realized:
    """Settings.

    Attributes:
      models: networks to train, each with every optimizer.
      optimizers: adam (rate 2e-3), sgd (rate 0.2).
      rate: another learning rate for all of them.
      epochs, batch_size: of the run.
      label_noise: share of training labels replaced by another class.
      num_train: training points; all other digits are test points, so that all 1,797 are used.
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
    for model in settings.models:
        for optimizer in settings.optimizers:
            _case(settings, model, optimizer, folder / f"{model}-{optimizer}", console)


def _case(settings: Realized, model: Model, optimizer: Optimizer, out: Path, console: Console) -> None:
    smoke = settings.smoke
    num_train, width = (40, 8) if smoke else (settings.num_train, settings.width)
    epochs, batch_size = (2, 8) if smoke else (settings.epochs, settings.batch_size)
    data = digits(
        num_train,
        30 if smoke else 1797 - num_train,
        odd_even=False,
        label_noise=settings.label_noise,
        seed=settings.seed,
    )
    rngs = nnx.Rngs(settings.seed)
    if model == "mlp":
        network = MLP((64, width, width, 10), dtype=jnp.float64, rngs=rngs)
    else:
        network = CNN((max(1, width // 16), max(1, width // 8)), dtype=jnp.float64, rngs=rngs)
    graph, params = nnx.split(network)

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    x_s, x_q = jnp.asarray(data.x_s), jnp.asarray(data.x_q)
    loss, clean, test = (softmax_cross_entropy(jnp.asarray(y)) for y in (data.noisy_s, data.clean_s, data.clean_q))
    steps = epochs * (num_train // batch_size)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(
        f"{model} (p = {num_params:,}) with {optimizer}: {num_train} digits, {settings.label_noise:.0%} of the labels "
        f"corrupted, {steps} steps on batches of {batch_size}."
    )
    scratch = out / "unfinished"
    if settings.fresh:
        shutil.rmtree(scratch, ignore_errors=True)
    resumed, start = scratch.exists(), time.perf_counter()
    trained, run = record_training(
        apply_fn,
        params,
        x_s,
        loss,
        OPTIMIZERS[optimizer](settings.rate),
        minibatches(num_train, batch_size, epochs, settings.seed),
        Recorder(scratch / "run"),
    )
    recorded = time.perf_counter() - start
    report = analyze_training(
        run,
        x_q,
        quadrature=settings.quadrature,
        rank=2 if smoke else settings.rank,
        num_products=1 if smoke else settings.num_products,
        dense=False,
        clean_loss=clean,
        test_loss=test,
        store=scratch / "sweeps",
        progress=console.is_terminal,
    )
    flow = _flow(apply_fn, params, x_s, loss, report.train_risk.end)
    sides = {
        name: _side(apply_fn, params, end, x_q, test)
        for name, end in ((optimizer, trained), ("gradient flow", flow.params))
    }
    apart = _apart(apply_fn, params, trained, flow.params, x_q)
    seconds = time.perf_counter() - start
    console.print(report)
    console.print(_table(sides, apart, report, flow.t1))
    out.mkdir(parents=True, exist_ok=True)
    start_q, run_q, flow_q = (rows(apply_fn, w, x_q) for w in (params, trained, flow.params))
    _figure(report, run_q - start_q, flow_q - start_q).savefig(out / "report.png")
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
        **report.as_dict(),
    }
    write_json(out / "report.json", summary)
    shutil.rmtree(scratch)
    console.print(f"{seconds:.0f} s{' since the interruption' if resumed else ''}. Figure and numbers are in {out}.\n")
    if settings.readme:
        write_row(f"realized/{model}-{optimizer}", _row(summary))


def _flow(apply_fn: Any, params: Any, x_s: Any, loss: OutputLoss, target: float):
    """Gradient flow to the time at which its training loss is `target`."""
    t = 1.0
    while True:
        flow = reference_flow(apply_fn, params, x_s, loss, t1=t, rtol=1e-5, operators=False)
        losses = np.asarray(flow.history["loss"])
        if losses[-1] <= target or t > 1e5:
            break
        t *= 4
    reached = int(np.argmax(losses <= target)) if losses[-1] <= target else len(losses) - 1
    times = np.concatenate([[0.0], np.asarray(flow.history["t"])])
    before = float(losses[reached - 1]) if reached else float(loss.value(rows(apply_fn, params, x_s)))
    share = np.clip((before - target) / max(before - float(losses[reached]), 1e-300), 0.0, 1.0)
    t1 = float(times[reached] + share * (times[reached + 1] - times[reached]))
    return reference_flow(apply_fn, params, x_s, loss, t1=max(t1, 1e-3), rtol=1e-5, operators=False)


def _side(apply_fn: Any, start: Any, end: Any, x_q: Any, test: OutputLoss) -> dict[str, float]:
    outputs = rows(apply_fn, end, x_q)
    moved = jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (end, start)), strict=True)))
    return {
        "test_loss": float(test.value(outputs)),
        "test_accuracy": float((outputs.argmax(1) == test.targets).mean()),
        "distance_in_parameters": float(moved),
    }


def _apart(apply_fn: Any, start: Any, one: Any, other: Any, x_q: Any) -> float:
    """How far two test displacements are apart, relative to the first."""
    first, second, third = (np.asarray(rows(apply_fn, params, x_q)) for params in (start, one, other))
    return float(np.linalg.norm(third - second) / np.linalg.norm(second - first))


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


def _figure(report: TrainingReport, moved: Any, by_flow: Any) -> Figure:
    figure = Figure(figsize=(13, 4), layout="constrained", dpi=110)
    spectrum, cells, sides = figure.subplots(1, 3)
    count = np.arange(1, len(report.channel.eigenvalues) + 1)
    spectrum.errorbar(
        count,
        report.channel.eigenvalues,
        yerr=report.residuals,
        fmt="o",
        color=BLUE,
        label="motion Gramian V, ± residual",
    )
    spectrum.plot(count, report.gramian_eigenvalues[: len(count)], "s", color=RED, label="dissipation Gramian W")
    spectrum.xaxis.get_major_locator().set_params(integer=True)
    spectrum.set(xlabel="rank", ylabel="eigenvalue (time × kernel)", yscale="log", title="Top of the spectra")
    spectrum.legend(frameon=False)
    shown = [cell for cell in report.cells if cell.space != "all"]
    places = np.arange(len(shown))
    cells.barh(
        places + 0.2, [100 * cell.dissipated for cell in shown], 0.38, color=BLUE, label="of the dissipated loss"
    )
    cells.barh(places - 0.2, [100 * cell.test_motion for cell in shown], 0.38, color=RED, label="of the test motion")
    cells.set_yticks(places, [f"{cell.part},\n{cell.space}" for cell in shown])
    cells.set(xlabel="share (%); the interaction is not shown", title="Four cells")
    cells.axvline(0, color=GREY, lw=0.8)
    cells.legend(frameon=False)
    moved, by_flow = np.asarray(moved).ravel(), np.asarray(by_flow).ravel()
    bound = 1.05 * max(np.abs(moved).max(), np.abs(by_flow).max())
    sides.plot([-bound, bound], [-bound, bound], color=GREY, lw=0.8)
    sides.plot(moved, by_flow, ".", ms=2, color=BLUE)
    sides.set(
        xlabel="test displacement of the run", ylabel="of gradient flow", title="Run and flow at equal training loss"
    )
    return figure


def _row(summary: dict[str, Any]) -> tuple[str, ...]:
    path = max(row["residual"] for row in summary["identities"] if row["name"] in ("(I1)", "(I2)", "(I3)", "(I4)"))
    bound = next(row for row in summary["identities"] if row["name"] == "(I6′)")
    ours, flow = summary["sides"].values()
    return (
        f"`realized`, {summary['model']}, {summary['optimizer']}",
        f"digits, N = {summary['num_train_outputs']:,}, p = {summary['num_params']:,}, {summary['num_steps']} "
        "mini-batch steps, one seed",
        f"(I1)-(I4) ≤ {path:.1e} with {summary['settings']['quadrature']} Gauss points; (I6′) "
        f"{'holds' if bound['holds'] else 'FAILS'}; W down to −{100 * summary['negative_share']:.2g} % of its largest "
        f"eigenvalue; test loss {ours['test_loss']:.3g}, gradient flow at the same training loss "
        f"{flow['test_loss']:.3g}",
        f"{summary['seconds'] or '?'} s on {summary['machine']['cores']} cores",
    )
