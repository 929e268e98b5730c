"""What a gate costs: optimizer steps in paired rounds against `optax.adamw`, a whole training step, and the state.

Claim: an optimizer step of `poprisk_adamw` takes at most 1.15 times that of `optax.adamw`, a whole training step at
most 1.02 times; the exact statistic costs what the gradient moments cost. Steps are jitted, donate their state and end
with the new parameters; one round runs every form once, in an order that alternates, and ratios are taken round by
round, so that what else the machine does hits all of them. On CPUs seconds are those of the processor, of all cores.

A step that is bound by memory, as on large models, cannot reach the first goal with s in float32: AdamW reads the
gradient and reads and writes w, m and v, 7 arrays of the parameters' size, and s, read and written, makes 9: 1.29 times
the traffic; 8, or 1.14 times, with s in bfloat16, and 7 with `adam_moments_statistic`. That is where a compiler writes
several results from one loop. XLA for CPUs writes each result in a loop of its own: AdamW then moves 10 arrays (m and v
3 each, w 4), the gate with s 15, with s in bfloat16 13.5.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console
from rich.table import Table

from entk import gradient_moments
from experiments._results import ROOT, machine, write_json, write_readme
from transforms import (
    adam_moments_statistic,
    adam_statistic,
    batch_statistic,
    ema_statistic,
    poprisk_adamw,
    poprisk_gate,
)

GOALS = {"optimizer": 1.15, "training": 1.02}
RATE = 1e-3
BASE = "optax.adamw"


@dataclass(frozen=True)
class GateBenchmark:
    """Settings.

    Attributes:
      sizes: parameters of the optimizer steps.
      rounds: paired rounds of each comparison; a third of them above 10 million parameters.
      smoke: tiny arrays, to see that everything runs.
      out: folder; by default results/benchmark-gate.
      readme: write the table into README.md.
    """

    sizes: tuple[int, ...] = (1_000_000, 50_000_000)
    rounds: int = 15
    smoke: bool = False
    out: Path | None = None
    readme: bool = False


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The forms that are compared; the first is what the others are compared with."""
    return {
        BASE: optax.adamw(RATE),
        "poprisk_adamw": poprisk_adamw(RATE),
        "poprisk_adamw, s in bfloat16": poprisk_adamw(RATE, statistic=adam_statistic(state_dtype=jnp.bfloat16)),
        "poprisk_adamw, adam_moments_statistic, b1 = b2": poprisk_adamw(
            RATE, 0.9, 0.9, statistic=adam_moments_statistic()
        ),
        "poprisk_gate(optax.adamw)": poprisk_gate(optax.adamw(RATE)),
        "poprisk_gate(optax.adamw), statistic in bfloat16": poprisk_gate(
            optax.adamw(RATE), statistic=ema_statistic(state_dtype=jnp.bfloat16)
        ),
        "chain(poprisk_gate(), optax.adamw)": optax.chain(poprisk_gate(), optax.adamw(RATE)),
    }


def main(settings: Annotated[GateBenchmark, tyro.conf.arg(name="")] = GateBenchmark()) -> None:
    """Cost of a gate: optimizer step, whole training step, exact statistic, state."""
    if settings.readme and (settings.smoke or settings.out):
        raise ValueError("README.md shows the full run: pass --readme without --smoke and --out.")
    console = Console()
    if not console.is_terminal:
        console = Console(width=118)
    path = (settings.out or ROOT / "results" / f"benchmark-gate{'-smoke' * settings.smoke}") / "results.json"
    sizes, rounds = ((300, 1_000), 2) if settings.smoke else (settings.sizes, settings.rounds)
    if not settings.smoke:
        console.print("About 3 minutes on one core.")
    done: dict[str, Any] = {
        "settings": {"sizes": list(sizes), "rounds": rounds, "smoke": settings.smoke},
        "machine": machine(),
        "goals": GOALS,
        "arrays": {name: arrays(tx) for name, tx in optimizers().items()},
        "optimizer": {},
    }
    for size in sizes:
        few = rounds if size <= 10_000_000 else max(2, rounds // 3)
        done["optimizer"][str(size)] = _optimizer_steps(size, few)
        write_json(path, done)
        console.print(f"optimizer steps at {size:,} parameters measured")
    done["training"] = _training_steps(rounds, settings.smoke)
    write_json(path, done)
    table = Table(title="Cost of a gate", title_justify="left")
    for column in ("what", "setting", "cost"):
        table.add_column(column)
    for row in _rows(done):
        table.add_row(*row)
    console.print(table)
    console.print(f"Numbers are in {path.parent}.")
    if settings.readme:
        write_readme("benchmark-gate", _markdown(done))


def arrays(tx: optax.GradientTransformation) -> float:
    """Memory of the parameters' size in the state, in float32 arrays: one in bfloat16 is half."""
    shape = (7, 11)
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, jnp.zeros(shape, jnp.float32)))
    return sum(leaf.dtype.itemsize / 4 for leaf in leaves if leaf.shape == shape)


def _optimizer_steps(size: int, rounds: int) -> dict[str, Any]:
    """Parameters in ten matrices of equal size, as of a deep network."""
    width = max(1, round((size / 10) ** 0.5))
    keys = jax.random.split(jax.random.key(0), 10)
    grads = [1e-3 * jax.random.normal(key, (width, width), jnp.float32) for key in keys]

    def step(tx):
        def advance(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(advance, donate_argnums=(0, 1))

    def start(tx):
        params = [jnp.ones_like(grad) for grad in grads]
        return params, tx.init(params)

    forms = {name: (step(tx), lambda tx=tx: start(tx), (grads,)) for name, tx in optimizers().items()}
    # A step of a million parameters takes a millisecond or two: several make one measurement.
    return _paired(forms, rounds, repeats=max(1, min(20, 20_000_000 // size)), one_at_a_time=size > 10_000_000)


def _training_steps(rounds: int, smoke: bool) -> dict[str, Any]:
    """An MLP 784-1024-1024-10 on batches of 512, with the gate, and with the exact statistic of each batch."""
    sizes, batch_size = ((8, 16, 16, 10), 4) if smoke else ((784, 1024, 1024, 10), 512)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    initial = [
        {
            "w": jax.random.normal(next(keys), (i, o), jnp.float32) / i**0.5,
            "b": jnp.zeros(o, jnp.float32),
        }
        for i, o in itertools.pairwise(sizes)
    ]
    x = jax.random.normal(next(keys), (batch_size, sizes[0]), jnp.float32)
    y = jax.random.randint(next(keys), (batch_size,), 0, sizes[-1])

    def losses(params, batch):
        hidden = batch[0]
        for layer in params[:-1]:
            hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"])
        outputs = hidden @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch[1])

    def plain(tx):
        def advance(params, state, batch):
            grads = jax.grad(lambda params: losses(params, batch).mean())(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(advance, donate_argnums=(0, 1))

    def exact(tx):
        def advance(params, state, batch):
            moments = gradient_moments(losses, params, batch)
            updates, state = tx.update(moments.mean_grads, state, params, **moments._asdict())
            return optax.apply_updates(params, updates), state

        return jax.jit(advance, donate_argnums=(0, 1))

    def start(tx):
        params = jax.tree.map(jnp.copy, initial)
        return params, tx.init(params)

    names = (BASE, "poprisk_adamw", "poprisk_adamw, s in bfloat16", "poprisk_adamw, adam_moments_statistic, b1 = b2")
    forms: dict[str, Any] = {name: (plain(tx), tx) for name, tx in optimizers().items() if name in names}
    tx = poprisk_adamw(RATE, statistic=batch_statistic())
    forms["poprisk_adamw, batch_statistic, moments of every example"] = exact(tx), tx
    model = f"MLP {'-'.join(map(str, sizes))}, batch {batch_size}"
    forms = {name: (step, lambda tx=tx: start(tx), ((x, y),)) for name, (step, tx) in forms.items()}
    return {"model": model, **_paired(forms, rounds)}


def _paired(
    forms: dict[str, tuple[Callable, Callable, tuple]], rounds: int, repeats: int = 1, one_at_a_time: bool = False
) -> dict[str, Any]:
    """Seconds a step of every form in every round, and the median over rounds of its ratio to the first form's.

    States are kept between rounds, or (one_at_a_time) built anew for each measurement, where all of them would not fit.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    kept = {} if one_at_a_time else {name: _warm(form) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds):
        for name in list(forms) if number % 2 else list(forms)[::-1]:
            step, _, inputs = forms[name]
            carry = _warm(forms[name]) if one_at_a_time else kept[name]
            start = clock()
            for _ in range(repeats):
                carry = step(*carry, *inputs)
            jax.block_until_ready(carry)
            seconds[name].append((clock() - start) / repeats)
            if not one_at_a_time:
                kept[name] = carry
    first = seconds[next(iter(forms))]
    ratios = {name: [a / b for a, b in zip(times, first, strict=True)] for name, times in seconds.items()}
    return {
        "seconds": seconds,
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
    }


def _warm(form: tuple[Callable, Callable, tuple]) -> Any:
    """A state after two steps: compiled, and every page of it written once. The first step makes a summary."""
    step, start, inputs = form
    carry = start()
    for _ in range(2):
        carry = step(*carry, *inputs)
    return jax.block_until_ready(carry)


def _rows(done: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for size, record in done["optimizer"].items():
        for name, more in done["arrays"].items():
            cost = f"{_cell(record, name, 'optimizer')}, {more:g} arrays of state"
            rows.append((name, f"optimizer step, {int(size):,} parameters", cost))
    record = done["training"]
    for name in record["ratio"]:
        goal = None if "moments of every" in name else "training"
        rows.append((name, f"training step, {record['model']}", _cell(record, name, goal)))
    return rows


def _cell(record: dict[str, Any], name: str, goal: str | None) -> str:
    milliseconds = 1e3 * statistics.median(record["seconds"][name])
    if name == BASE:
        return f"{milliseconds:.2f} ms"
    low, high = record["quartiles"][name]
    wanted = f"; goal {GOALS[goal]}x" if goal else ""
    return f"{record['ratio'][name]:.2f}x ({low:.2f} to {high:.2f}{wanted})"


def _markdown(done: dict[str, Any]) -> str:
    where = done["machine"]
    cores = f"{where['cores']} core{'s' * (where['cores'] > 1)}"
    head = (
        f"Median of {done['settings']['rounds']} paired rounds (a third of them above 10 million parameters), as a "
        f"ratio to `optax.adamw` with quartiles; {cores}, JAX {where['jax']}, float32. Where one loop writes several "
        "results, AdamW moves 7 arrays of the parameters' size, the gate with s in float32 9 (1.29x), in bfloat16 8 "
        "(1.14x); XLA for CPUs writes each result in a loop of its own, 10, 15 and 13.5.\n\n"
    )
    rows = "".join(f"| {' | '.join((f'`{name}`', *cells))} |\n" for name, *cells in _rows(done))
    return head + "| optimizer | what | cost |\n|---|---|---|\n" + rows
