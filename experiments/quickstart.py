"""A report on a real training run: digits, a Flax MLP, gradient flow to interpolation.

Claim: along a real, far from lazy run of a finite network the theory's identities hold to discretisation error, and
the training displacement determines the test displacement. The figure it answers: the paper's coupling figure, with
correlation 0.991 and relative error 0.165 where the theorem is exact. Controls: (I7) must fail for a non-quadratic
loss; corrupted labels show what becomes of noise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from rich.console import Console

from entk import empirical_ntk
from experiments._digits import digits
from experiments._mlp import MLP
from experiments._results import ROOT, machine, write_json, write_row
from gramian import (
    AdaptiveStep,
    Checkpoint,
    OutputLoss,
    Report,
    TraceShare,
    analyze,
    plots,
    softmax_cross_entropy,
    squared_loss,
)

# Accepted steps of the default run, for the estimate of its duration: they go like rtol^(-1/3).
STEPS_AT_1E4 = 50

PICTURES = (
    plots.spectrum,
    plots.residual_by_direction,
    plots.cells,
    plots.test_displacement,
    plots.kernel_drift,
    plots.kernel_surface,
    plots.loss,
)


@dataclass(frozen=True)
class Quickstart:
    """Settings of the main job.

    Attributes:
      loss: squared loss on odd/even as -1/+1, or softmax cross-entropy on the ten digits.
      label_noise: share of training labels replaced by another class.
      num_train: training points; by default 200 (squared, N = 200) or 40 (softmax, N = 400).
      num_test: test points; by default 1,500 (squared) or 100 (softmax, M = 1,000).
      width: of the two hidden layers.
      t1: training time of the flow.
      rtol: relative local error of the integrator.
      channel_share: share of the trace of W_S that the signal channel holds.
      seed: of split, corruption and initialisation.
      float32: single precision; the default is double.
      smoke: a tiny problem, in seconds, to see that everything runs.
      out: folder for figures and numbers; by default results/quickstart or results/quickstart-softmax.
      fresh: forget the checkpoint of an interrupted run.
      readme: write this run's row into README.md.
    """

    loss: Literal["squared", "softmax"] = "squared"
    label_noise: float = 0.1
    num_train: int | None = None
    num_test: int | None = None
    width: int = 256
    t1: float = 100.0
    rtol: float = 1e-4
    channel_share: float = 0.95
    seed: int = 0
    float32: bool = False
    smoke: bool = False
    out: Path | None = None
    fresh: bool = False
    readme: bool = False


class Problem(NamedTuple):
    """The quickstart's model on its data, as `analyze` takes it."""

    apply_fn: Any
    params: Any
    x_s: jax.Array
    loss: OutputLoss
    x_q: jax.Array
    clean_loss: OutputLoss
    test_loss: OutputLoss
    description: str


def problem(settings: Quickstart) -> Problem:
    """Data, model and losses of these settings."""
    squared, smoke = settings.loss == "squared", settings.smoke
    dtype = jnp.dtype("float32" if settings.float32 else "float64")
    num_train = settings.num_train or ((20 if squared else 8) if smoke else (200 if squared else 40))
    num_test = settings.num_test or (30 if smoke else 1500 if squared else 100)
    width = 16 if smoke else settings.width
    sizes = (64, width, width, 1 if squared else 10)
    data = digits(num_train, num_test, odd_even=squared, label_noise=settings.label_noise, seed=settings.seed)
    graph, params = nnx.split(MLP(sizes, dtype=dtype, rngs=nnx.Rngs(settings.seed)))

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    def loss(classes):
        return squared_loss(jnp.asarray(2.0 * classes - 1, dtype)) if squared else softmax_cross_entropy(classes)

    description = (
        f"MLP {'-'.join(map(str, sizes))} (p = {num_params(params):,}), {dtype.name}, on {num_train} digits with "
        f"{settings.label_noise:.0%} of the labels corrupted, and {num_test} test points"
    )
    return Problem(
        apply_fn,
        params,
        jnp.asarray(data.x_s, dtype),
        loss(data.noisy_s),
        jnp.asarray(data.x_q, dtype),
        clean_loss=loss(data.clean_s),
        test_loss=loss(data.clean_q),
        description=description,
    )


def num_params(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main(settings: Annotated[Quickstart, tyro.conf.arg(name="")] = Quickstart()) -> None:
    """Trains a Flax MLP on digits by gradient flow and reports on it; writes figures and JSON."""
    jax.config.update("jax_enable_x64", not settings.float32)
    console = Console()
    if not console.is_terminal:
        console = Console(width=118)  # tables in a log file are not squeezed into 80 columns
    name = "quickstart" + ("" if settings.loss == "squared" else "-softmax") + ("-smoke" if settings.smoke else "")
    out = settings.out or ROOT / "results" / name
    case = problem(settings)
    console.print(f"{case.description}.")
    if not settings.smoke:
        console.print(f"This takes about {_estimate(settings, case):.0f} s here.")
    checkpoint = Checkpoint(out / "checkpoint")
    if settings.fresh:
        checkpoint.remove()
    resumed = Path(checkpoint.directory).exists()
    start = time.perf_counter()
    report = analyze(
        case.apply_fn,
        case.params,
        case.x_s,
        case.loss,
        case.x_q,
        t1=settings.t1,
        clean_loss=case.clean_loss,
        test_loss=case.test_loss,
        rule=TraceShare(settings.channel_share),
        controller=AdaptiveStep(settings.rtol),
        checkpoint=checkpoint,
        progress=True,
    )
    seconds = time.perf_counter() - start
    console.print(report)
    summary = _write(report, settings, out, None if resumed else round(seconds, 1))
    checkpoint.remove()  # everything it held is written now
    console.print(
        f"{seconds:.0f} s{' since the interruption' if resumed else ''}. Figures and numbers are in {out}: "
        "overview.png first, report.json for the numbers."
    )
    if settings.readme:
        write_row(name, _row(summary))


def _estimate(settings: Quickstart, case: Problem) -> float:
    """Seconds for the default number of steps, from one kernel of each kind (the first call of each compiles)."""

    def seconds(*points):
        def kernel():
            k = empirical_ntk(case.apply_fn, case.params, *points)
            k.block_until_ready()

        kernel()
        start = time.perf_counter()
        kernel()
        return time.perf_counter() - start

    steps = STEPS_AT_1E4 * (settings.rtol / 1e-4) ** (-1 / 3)
    return 20 + steps * (2 * seconds(case.x_s) + seconds(case.x_q, case.x_s))


def _write(report: Report, settings: Quickstart, out: Path, seconds: float | None) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    for draw in PICTURES:
        figure = draw(report).get_figure(root=True)
        assert figure is not None  # a picture drawn alone has a figure of its own
        figure.savefig(out / f"{draw.__name__}.png")
    report.plot(path=out / "overview.png")
    chosen = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    summary = {
        "claim": "the identities hold along a real run, and A carries the training displacement to the test points",
        "settings": chosen,
        "num_params": num_params(report.flow.params),
        "seconds": seconds,
        "machine": machine(),
        **report.as_dict(),
    }
    write_json(out / "report.json", summary)
    return summary


def _row(summary: dict) -> tuple[str, ...]:
    path = max(row["residual"] for row in summary["identities"] if row["name"] in ("(I1)", "(I2)", "(I3)", "(I4)"))
    coupled = summary["coupling"]
    return (
        f"`quickstart`, {summary['loss']} loss",
        f"digits, N = {summary['num_train_outputs']}, p = {summary['num_params']:,}, t = {summary['t1']:g}, one seed",
        f"(I1)-(I4) ≤ {path:.1e} at rtol {summary['settings']['rtol']:g}; kernel drift {summary['drift']:.2f}; "
        f"predicted against observed test displacement: correlation {coupled['correlation']:.8f}, relative error "
        f"{coupled['relative_error']:.1e} (paper: 0.991, 0.165)",
        f"{summary['num_steps']} steps, {summary['seconds'] or '?'} s on {summary['machine']['cores']} cores",
    )
