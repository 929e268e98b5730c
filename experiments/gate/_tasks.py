"""The tasks: which arms meet which problems, as cells that are measured and kept one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.gate import _audit, _detection, _grokking, _sweep
from experiments.gate._arms import ARMS
from experiments.gate._grokking import Grokking
from experiments.gate._images import digits_cnn, digits_mlp, mnist
from experiments.gate._regression import sparse, synthetic
from experiments.gate._sweep import Problem
from experiments.gate._text import text

Name = Literal["sparse", "synthetic", "audit", "digits", "grokking", "cnn", "mnist", "text", "grokking-25"]
Tick = Callable[[int], None]


class Cell(NamedTuple):
    """What is measured at once: its name below the task's, what decides its outcome, how, and in how many ticks."""

    name: str
    settings: dict[str, Any]
    measure: Callable[[Tick], dict[str, Any]]
    ticks: int


@dataclass(frozen=True)
class Task:
    """A question and the cells that answer it.

    Attributes:
      title, claim: for figures and files; a claim may fail.
      kind: of its cells' results: "sweep", "grokking" or "audit".
      cells: `(smoke) -> cells`.
      minutes: on one core, about.
    """

    title: str
    claim: str
    kind: Literal["sweep", "grokking", "audit"]
    cells: Callable[[bool], list[Cell]]
    minutes: float


IMAGE_ARMS = (
    "adamw",
    "adamw-linear",
    "paper",
    "paper-finite",
    "popriskmin",
    "hard-z1",
    "hard-z2",
    "snr-z1",
    "exact-hard-z1",
    "exact-snr-z1",
    "before-hard-z1",
    "before-snr-a1",
    "around-snr-z1",
    "norm-hard-z2",
    "random-hard-z2",
)
FEW_ARMS = ("adamw", "paper", "popriskmin", "hard-z1", "hard-z2", "before-snr-a1", "random-hard-z2")
GROKKING_ARMS = (
    "adamw",
    "before-snr-a1",
    "grokfast",
    "hard-z2",
    "paper",
    "popriskmin",
    "random-before-snr-a1",
    "norm-before-snr-a1",
)
FEW_GROKKING_ARMS = GROKKING_ARMS[:4]
SMOKE_ARMS = ("adamw", "hard-z1", "exact-hard-z1")


def _sweeps(problems: Callable[[bool], list[Problem]], names: tuple[str, ...], smoke: bool) -> list[Cell]:
    cells = []
    # Arm by arm, so that problems of one learner follow one another and share its compiled run.
    for name in SMOKE_ARMS if smoke else names:
        for problem in problems(smoke):
            if ARMS[name].replayed and not problem.replayed:
                continue
            plan = problem.plan
            ticks = len(plan.grid) * len(plan.tune_seeds) + 2 * len(plan.seeds)
            measure = partial(_sweep.measure, problem, ARMS[name])
            settings = {**problem.described(), "title": problem.title, "metric": problem.metric}
            cells.append(Cell(f"{problem.name}/{name}", settings, measure, ticks))
    return cells


def _synthetic(smoke: bool) -> list[Cell]:
    detection = Cell("detection", {"smoke": smoke}, lambda _: _detection.detect(smoke), 1)
    return [detection, *_sweeps(synthetic, _all_arms(), smoke)]


def _all_arms() -> tuple[str, ...]:
    """Those that are not about grokking alone."""
    return tuple(name for name in ARMS if name not in ("grokfast", "norm-before-snr-a1", "around-snr-a1"))


def _grokkings(share: float, names: tuple[str, ...], smoke: bool) -> list[Cell]:
    settings = Grokking(share)
    if smoke:
        settings = dataclasses.replace(
            settings,
            learning_rates=(1e-2,),
            weight_decays=(1.0,),
            search_cap=4,
            cap=4,
            every=2,
            tune_seeds=(100,),
            seeds=(0, 1),
            num_held_out=20,
            embedding=4,
            hidden=4,
            batch_size=8,
        )
    total = len(settings.grid) * len(settings.tune_seeds) * settings.search_cap + len(settings.seeds) * settings.cap
    return [
        Cell(name, dataclasses.asdict(settings), partial(_grokking.measure, settings, ARMS[name]), total)
        for name in (SMOKE_ARMS[:2] if smoke else names)
    ]


def _audits(smoke: bool) -> list[Cell]:
    cells = []
    seeds = (0, 1) if smoke else (0, 1, 2, 3, 4)
    for name, problem_of in _audit.PROBLEMS.items():
        if smoke and name != "linear":
            continue
        for batch_size, num_examples in ((32, None), (256, None), (1024, None), (32, 300), (256, 3000)):
            if smoke:
                batch_size, num_examples = 8, None if num_examples is None else 40
            sizes = {"batch_size": batch_size, "num_examples": num_examples, "num_steps": 50 if smoke else 1000}
            measure = partial(_audit_cell, problem_of, sizes, seeds)
            data = "fresh" if num_examples is None else f"n = {num_examples}"
            cells.append(Cell(f"{name}, {data}, b = {batch_size}", {**sizes, "seeds": seeds}, measure, len(seeds)))
    return cells


def _audit_cell(problem_of: Any, sizes: dict[str, Any], seeds: tuple[int, ...], tick: Tick) -> dict[str, Any]:
    found, first = [], None
    for seed in seeds:
        problem = dataclasses.replace(problem_of(seed), **sizes)
        steps = _audit.audit(problem, seed)
        first = first or {
            name: np.asarray(getattr(steps, name)).astype(float).round(9).tolist()
            for name in ("batch", "realized", "ema", "ema_realized")
        }
        found.append(_audit.summary(steps))
        tick(1)
    return {"title": problem_of(0).title, **sizes, "seeds": found, "steps": first}


TASKS: dict[Name, Task] = {
    "sparse": Task(
        "Sparse regression (snr-grad's benchmark)",
        "a gate that opens signal alone beats AdamW where few weights are true, every optimizer tuned",
        "sweep",
        lambda smoke: _sweeps(sparse, _all_arms(), smoke),
        8,
    ),
    "synthetic": Task(
        "Regression with 10 true weights of 100",
        "thresholds open the share of pure-noise coordinates that they state; the gate lowers the excess risk",
        "sweep",
        _synthetic,
        8,
    ),
    "audit": Task(
        "Predicted and realized decrease of the population risk, step by step",
        "the decrease predicted from the batch alone, theory (9), correlates with the realized one by 0.9 and more",
        "audit",
        _audits,
        6,
    ),
    "digits": Task(
        "Digits with wrong labels, MLP 64-64-10",
        "the gate keeps a network from fitting wrong labels",
        "sweep",
        lambda smoke: _sweeps(digits_mlp, IMAGE_ARMS, smoke),
        8,
    ),
    "grokking": Task(
        "Division modulo 97, 40 % of the table",
        "the gate before AdamW needs fewer steps to 95 % held-out accuracy than AdamW, both tuned",
        "grokking",
        lambda smoke: _grokkings(0.4, GROKKING_ARMS, smoke),
        6,
    ),
    "cnn": Task(
        "Digits with wrong labels, two convolutions",
        "the gate keeps a network from fitting wrong labels",
        "sweep",
        lambda smoke: _sweeps(digits_cnn, FEW_ARMS, smoke),
        3,
    ),
    "mnist": Task(
        "MNIST with wrong labels, MLP 784-32-10",
        "the gate keeps a network from fitting wrong labels",
        "sweep",
        lambda smoke: _sweeps(mnist, FEW_ARMS, smoke),
        3,
    ),
    "text": Task(
        "Characters of Python's manual, Transformer",
        "the gate lowers the held-out loss",
        "sweep",
        lambda smoke: _sweeps(text, FEW_ARMS, smoke),
        5,
    ),
    "grokking-25": Task(
        "Division modulo 97, 25 % of the table",
        "the gate before AdamW needs fewer steps to 95 % held-out accuracy than AdamW, both tuned",
        "grokking",
        lambda smoke: _grokkings(0.25, FEW_GROKKING_ARMS, smoke),
        8,
    ),
}
