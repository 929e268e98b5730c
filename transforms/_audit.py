"""`gate_audit`: whether a gate could help, measured on the user's own batches before any training."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table
from rich.text import Text

from transforms import _null_distribution, _validation
from transforms._adamw import poprisk_adamw
from transforms._estimators.adam import adam_statistic
from transforms._estimators.averages import compute_dtype
from transforms._report import GateReport, Shown, gate_report, gates_of
from transforms._thresholds import finite_data_alpha


@dataclasses.dataclass(frozen=True, repr=False)
class GateAudit(Shown):
    """What a gate would do at these parameters; its text and its HTML are tables and a verdict.

    Attributes:
      gain: how much faster the gated step lowers the loss of unseen examples than the plain one, per unit of step
        length and to first order: 0.1 is 10 % faster.
      gain_interval: 95 % interval of `gain`, by Student's t over the splits of the data.
      plain_slope, gated_slope: the decrease of the unseen loss per unit of step length, in units of the loss over those
        of the parameters.
      plain_interval: 95 % interval of `plain_slope`. Where it includes 0 the gain is a ratio to nothing, as the verdict
        says.
      signal_to_noise: Σ μ² / Σ σ² of one batch's gradient, over all coordinates.
      report: what the gate did in the last split, by layer.
      num_splits: random halvings of the data.
      verdict: the above in words.
    """

    gain: float
    gain_interval: tuple[float, float]
    plain_slope: float
    plain_interval: tuple[float, float]
    gated_slope: float
    signal_to_noise: float
    report: GateReport
    num_splits: int
    verdict: str

    def shown(self) -> list[Any]:
        """Two tables and the verdict."""
        table = Table(title="Audit of a gate", title_justify="left")
        table.add_column("quantity")
        table.add_column("value", justify="right")
        low, high = self.gain_interval
        least, most = self.plain_interval
        rows = [
            ("gain on unseen examples at equal step length", f"{100 * self.gain:+.1f} %"),
            (f"95 % interval over {self.num_splits} splits", f"{100 * low:+.1f} % to {100 * high:+.1f} %"),
            ("decrease of the unseen loss per unit of step length, plain", f"{self.plain_slope:.3g}"),
            ("95 % interval", f"{least:.3g} to {most:.3g}"),
            ("the same, gated", f"{self.gated_slope:.3g}"),
            (
                "signal-to-noise of one batch's gradient: squared length of the mean over the variance",
                f"{self.signal_to_noise:.3g}",
            ),
        ]
        for row in rows:
            table.add_row(*row)
        return [table, *self.report.shown(), Text(self.verdict, style="bold")]


def gate_audit(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: optax.Params,
    data: Any,
    *,
    batch_size: int,
    gated: optax.GradientTransformation | None = None,
    plain: optax.GradientTransformation | None = None,
    unseen: Any = None,
    num_batches: int = 50,
    num_splits: int = 8,
    seed: int = 0,
) -> GateAudit:
    """Measure, before training, whether a gate would make steps generalize better.

    The data are halved at random. With the parameters held still, batches from one half are fed to both optimizers,
    `gated` and `plain`; then the gradient ḡ' of the other half, which neither has seen, weighs their steps u:

        slope(u) = -⟨ḡ', u⟩ / ‖u‖,   gain = slope(gated)/slope(plain) - 1,

    over `num_splits` halvings. The gain is a first-order statement about these parameters: early in training gradients
    stand out of the noise and a gate has little to do. Audit again with parameters from a run, with `unseen` examples
    that the run did not train on, where overfitting is the question.

    Args:
      loss_fn: pure function `(params, batch) -> losses`, one an example or their mean.
      params: pytree of real floating-point arrays.
      data: pytree of arrays with n rows, e.g. `(x, y)`.
      batch_size: examples in a batch, b >= 1, with 2 b <= n/2, so that batches differ.
      gated: an optimizer with a gate; None for `poprisk_adamw(1e-3, weight_decay=0)` that knows its batches to be drawn
        from n/2 examples.
      plain: what it is compared with; None for `optax.adam(1e-3)`.
      unseen: pytree like `data` whose gradient weighs the steps; None takes the other half.
      num_batches: batches fed to the optimizers in each split, >= 2. A streaming statistic needs some tens.
      num_splits: halvings, >= 2.
      seed: of halvings and batches.

    Returns:
      A `GateAudit`; printed, or shown in Jupyter, it is two tables and a verdict.

    Raises:
      ValueError: too few examples for the batch size, arrays of different lengths, numbers out of range.
      TypeError: optimizers of the wrong kind.

    Not supported: losses that need a random key; gates with `batch_statistic`, whose moments the audit does not take.

    Errors: splits share examples, so the interval is somewhat too narrow where n is small. It is conditional on params.

    Cost: num_splits (num_batches + n/2 examples' gradient). Memory of a batch's gradient, and eleven copies of params
    with the default optimizers: params, gradient and mean gradient, five of the optimizers' states, and in the last
    step of a split two steps and an intermediate result. Other optimizers hold their own states instead of the five.

    Source: Litman & Guo, arXiv:2605.01172; theory (9) and §7.3, with unseen examples in place of left-out ones.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(400, 50)).astype(np.float32)
    >>> y = x[:, 0] + rng.normal(size=400).astype(np.float32)  # one coordinate of fifty matters
    >>> def loss_fn(w, batch):
    ...     inputs, targets = batch
    ...     return (inputs @ w - targets) ** 2
    >>> audit = gate_audit(loss_fn, jnp.zeros(50), (x, y), batch_size=20)
    >>> audit.gain_interval[0] > 0
    True
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_batches", num_batches, 2),
        ("num_splits", num_splits, 2),
    ):
        _validation.check_integer_at_least(name, value, least)
    n = _num_rows("data", data)
    if 4 * batch_size > n:
        raise ValueError(
            f"data has {n} examples, too few for batches of {batch_size}: half of them stays unseen, and the other "
            f"half has to hold two batches. Use batch_size <= {n // 4}, or more data."
        )
    if gated is None:
        redrawn = finite_data_alpha(batch_size, n // 2)
        gated = poprisk_adamw(1e-3, weight_decay=0.0, statistic=adam_statistic(data_noise=redrawn))
    plain = optax.adam(1e-3) if plain is None else plain
    for name, transformation in (("gated", gated), ("plain", plain)):
        _validation.check_transformation(name, transformation)
    held_out = data if unseen is None else unseen
    num_unseen = _num_rows("unseen", held_out)
    rng = np.random.default_rng(seed)
    optimizers = {"plain": plain, "gated": gated}

    watch, propose, add_gradient = _programs(loss_fn, optimizers)
    slopes, ratios, report = [], [], None
    for _ in range(num_splits):
        order = rng.permutation(n)
        states, spread = {name: tx.init(params) for name, tx in optimizers.items()}, _no_spread(params)
        *batches, last = _batches(rng, order[: n // 2], batch_size, num_batches)
        for rows in batches:
            states, spread = watch(params, states, spread, _take(data, rows))
        updates, gates, spread = propose(params, states, spread, _take(data, last))
        report = gate_report(gates)
        ratios.append(_signal_to_noise(spread, batch_size / (n // 2)))
        del states, spread  # the other half's gradient takes their place
        rest = order[n // 2 :] if unseen is None else np.arange(num_unseen)
        truth = jax.tree.map(jnp.zeros_like, params)
        for start in range(0, len(rest), batch_size):
            rows = rest[start : start + batch_size]
            share = jnp.asarray(len(rows) / len(rest), jnp.float32)
            truth = add_gradient(params, truth, _take(held_out, rows), share)
        slopes.append([_slope(truth, updates[name]) for name in optimizers])
        del truth, updates
    assert report is not None  # num_splits >= 2
    return _judge(np.array(slopes), float(np.mean(ratios)), report)


def _programs(loss_fn: Callable[[Any, Any], jax.Array], optimizers: dict[str, Any]) -> tuple[Callable, ...]:
    """Compiled: optimizers watch a batch; they propose steps for the last one; a batch's gradient is added to a sum.

    params are an argument: what a compiled function closes over becomes a part of it, a copy each.
    """

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda params: jnp.mean(loss_fn(params, batch)))(params)

    def advanced(params: Any, states: Any, spread: _Spread, batch: Any) -> tuple[Any, Any, _Spread]:
        grads = gradient(params, batch)
        both = {name: tx.update(grads, states[name], params) for name, tx in optimizers.items()}
        updates, states = ({name: pair[i] for name, pair in both.items()} for i in range(2))
        return updates, states, _joined(spread, grads)

    def watch(*inputs: Any) -> tuple[Any, _Spread]:
        return advanced(*inputs)[1:]  # steps that nobody takes are not computed

    def propose(*inputs: Any) -> tuple[Any, Any, _Spread]:
        updates, states, spread = advanced(*inputs)
        return updates, gates_of(states["gated"]), spread

    def add_gradient(params: Any, total: Any, batch: Any, share: jax.Array) -> Any:
        return jax.tree.map(lambda t, g: (t + share * g).astype(t.dtype), total, gradient(params, batch))

    return (
        jax.jit(watch, donate_argnums=(1, 2)),
        jax.jit(propose, donate_argnums=2),
        jax.jit(add_gradient, donate_argnums=1),
    )


def _num_rows(name: str, data: Any) -> int:
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{name} must be arrays with one row an example, got lengths {sorted(sizes)}: pass e.g. (x, y)."
        )
    return sizes.pop()


def _batches(rng: np.random.Generator, rows: np.ndarray, batch_size: int, num_batches: int) -> list[np.ndarray]:
    """Rows of batches without replacement, shuffled anew in each pass."""
    found: list[np.ndarray] = []
    while len(found) < num_batches:
        order = rng.permutation(rows)
        found += [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    return found[:num_batches]


def _take(data: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], data)


def _slope(truth: Any, update: Any) -> float:
    length = float(_dot(update, update)) ** 0.5
    return -float(_dot(truth, update)) / length if length > 0 else 0.0


@jax.jit
def _dot(one: Any, other: Any) -> jax.Array:
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return jnp.stack([jnp.vdot(a, b, preferred_element_type=jnp.float32) for a, b in pairs]).sum()


class _Spread(NamedTuple):
    """Mean of a stream of gradients, and the sum over coordinates of their squared deviations from it (Welford)."""

    num_grads: jax.Array
    mean: Any
    squares: jax.Array


def _no_spread(params: Any) -> _Spread:
    mean = jax.tree.map(lambda p: jnp.zeros_like(p, compute_dtype(p)), params)
    return _Spread(jnp.zeros([], jnp.float32), mean, jnp.zeros([], jnp.float32))


def _joined(spread: _Spread, grads: Any) -> _Spread:
    count = spread.num_grads + 1
    shift = jax.tree.map(lambda g, m: g.astype(m.dtype) - m, grads, spread.mean)
    mean = jax.tree.map(lambda m, d: m + d / count.astype(m.dtype), spread.mean, shift)
    # g - mean = (1 - 1/count) (g - old mean): with the new mean alone, the compiled step needs no copy of the old one.
    left = jax.tree.map(lambda g, m: g.astype(m.dtype) - m, grads, mean)
    more = sum(jnp.sum(d**2).astype(jnp.float32) for d in jax.tree.leaves(left))
    return _Spread(count, mean, spread.squares + more * count / jnp.maximum(count - 1, 1))


def _signal_to_noise(spread: _Spread, batch_share: float) -> float:
    """Σ μ² / Σ σ² of a batch that holds this share of the examples seen.

    Batches without replacement differ by σ² (1 - share); their mean varies by σ²/count until all examples were seen,
    and by σ² share from then on. That is no signal.
    """
    count = float(spread.num_grads)
    variance = float(spread.squares) / (count - 1) / (1 - batch_share)
    signal = float(_dot(spread.mean, spread.mean)) - variance * max(1 / count, batch_share)
    return max(signal, 0.0) / variance if variance > 0 else math.inf


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Of their mean, 95 %, by Student's t."""
    quantile = float(_null_distribution.threshold_for(0.05, len(values) - 1)) ** 0.5  # of |t|
    margin = quantile * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - margin), float(values.mean() + margin)


def _judge(slopes: np.ndarray, signal_to_noise: float, report: GateReport) -> GateAudit:
    plain, gated = slopes.mean(0)
    gains = (slopes[:, 1] - slopes[:, 0]) / plain if plain > 0 else np.full(len(slopes), np.nan)
    plain_interval, (low, high) = _interval(slopes[:, 0]), _interval(gains)
    if not plain_interval[0] > 0:
        least, most = plain_interval
        verdict = (
            "The plain step itself is not seen to lower the loss of unseen examples here: its slope is "
            f"{plain:.2g}, 95 % interval {least:.2g} to {most:.2g}, so there is nothing to compare with. Audit with "
            "more examples, a larger num_batches or a larger num_splits."
        )
    elif low > 0:
        verdict = (
            f"The gate can help here: at equal step length the unseen loss falls {100 * gains.mean():.1f} % faster."
        )
    elif high < 0:
        verdict = (
            f"The gate would harm here: at equal step length the unseen loss falls {-100 * gains.mean():.1f} % less."
        )
    else:
        verdict = "No difference can be seen here between gated and plain steps of equal length."
    return GateAudit(
        gain=float(gains.mean()),
        gain_interval=(low, high),
        plain_slope=float(plain),
        plain_interval=plain_interval,
        gated_slope=float(gated),
        signal_to_noise=signal_to_noise,
        report=report,
        num_splits=len(slopes),
        verdict=verdict,
    )
