"""`gate_report`: what a gate did lately, from the optimizer's state alone."""

import dataclasses
import io
import sys
from typing import Any

import jax
import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from transforms import _null_distribution
from transforms._gate import PopriskGateState
from transforms._monitor import LeafSummary, leaf_names

# Where a gate can hardly do anything, in shares of coordinates.
_NEARLY_ALL, _NEARLY_NONE, _PURE_NOISE_OPEN = 0.95, 0.02, 0.8


class Shown:
    """Something whose tables and remarks are its text and its HTML."""

    def shown(self) -> list[Any]:
        raise AssertionError("a report has tables")

    def __rich__(self) -> Group:
        return Group(*self.shown())

    def __repr__(self) -> str:
        # Printed where not every character exists (a log in ASCII, a Windows code page), it has simpler lines and "?".
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return self._render(encoding).export_text().encode(encoding, "replace").decode(encoding)

    def _repr_html_(self) -> str:
        return self._render("utf-8").export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _render(self, encoding: str) -> Console:
        file = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
        console = Console(record=True, width=118, file=file, force_jupyter=False)
        console.print(self)
        return console


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What the gate did to one leaf, or to all of them.

    Attributes:
      name: path of the leaf in the parameters, "all" for the sum.
      size: coordinates.
      open_fraction: share with q >= 1/2.
      openness: mean q.
      noise_open_fraction: share that would have q >= 1/2 if gradients were pure Gaussian noise.
      decrease, ungated_decrease: estimated first-order decrease of the population risk by a gradient step, equation
        (9), per unit of learning rate, with and without the gate.
      step_decrease, ungated_step_decrease: the same of the inner optimizer's step, in units of the loss; NaN without
        `Summary(of_step=True)`.
      step_norm, ungated_step_norm: lengths of these steps; NaN likewise.
    """

    name: str
    size: int
    open_fraction: float
    openness: float
    noise_open_fraction: float
    decrease: float
    ungated_decrease: float
    step_decrease: float
    ungated_step_decrease: float
    step_norm: float
    ungated_step_norm: float


@dataclasses.dataclass(frozen=True, repr=False)
class GateReport(Shown):
    """What a gate did at a step; its text and its HTML are a table.

    Attributes:
      step: steps taken until the state was read. The summaries are those of the last multiple of `Summary.every`.
      layers: a `LayerReport` for each leaf.
      total: the same over all leaves.
      warnings: what a user should know: a gate that can do nothing, or shuts nearly everything.
    """

    step: int
    layers: tuple[LayerReport, ...]
    total: LayerReport
    warnings: tuple[str, ...]

    def shown(self) -> list[Any]:
        """The table, and a line for each warning."""
        table = Table(title=f"Population-risk gate, step {self.step:,}", title_justify="left")
        of_step = np.isfinite(self.total.step_norm)
        columns = ["", "size", "open", "mean q", "open on noise", "risk decrease", "ungated"]
        for column in columns + (["of the step", "ungated", "step length"] if of_step else []):
            table.add_column(column, justify="right" if column else "left")
        for row in (*self.layers, self.total):
            cells = [
                row.name,
                f"{row.size:,}",
                *(f"{100 * share:.1f} %" for share in (row.open_fraction, row.openness, row.noise_open_fraction)),
                *(f"{value:.2e}" for value in (row.decrease, row.ungated_decrease)),
            ]
            if of_step:
                ratio = row.step_norm / row.ungated_step_norm if row.ungated_step_norm else float("nan")
                cells += [f"{row.step_decrease:.2e}", f"{row.ungated_step_decrease:.2e}", f"{ratio:.2f}x"]
            table.add_row(*cells, style="bold" if row is self.total else None)
        return [table, *(Text(f"Warning: {warning}", style="yellow") for warning in self.warnings)]


def gate_report(state: Any) -> GateReport:
    """What the gate in an optimizer's state did lately, layer by layer.

    The share of coordinates open, what it would be on pure noise, and the estimated decrease of the population risk,

        ⟨M, A⟩ = Σ_k M_k (m̂_k² - Var m̂_k)     (9)

    with M = q for the gated gradient step and M = 1 for the ungated one. A decrease that is larger without the gate is
    no fault: steps are shorter with it.

    Args:
      state: any optax state with one or more gates in it (a chain's, `multi_transform`'s, a TrainState's `opt_state`).

    Returns:
      A `GateReport`; printed, or shown in Jupyter, it is a table.

    Raises:
      ValueError: no gate in the state, no step taken yet, summaries switched off, or a state of several runs at once.

    Errors: leaves of more than `Summary.sample` coordinates are extrapolated from an evenly spread sample: shares to
    about 1.5 percentage points with 1,024 of them.

    Cost: a few scalars from the device.

    Source: Litman & Guo, arXiv:2605.01172; theory (9) and §7.3.

    >>> import jax, jax.numpy as jnp, optax
    >>> from transforms import HardMask, gate_report, poprisk_gate
    >>> tx = optax.chain(poprisk_gate(mask=HardMask()), optax.adam(1e-3))
    >>> params = {"w": jnp.zeros(500)}
    >>> state = tx.init(params)
    >>> update = jax.jit(tx.update)
    >>> for key in jax.random.split(jax.random.key(0), 101):
    ...     _, state = update({"w": jax.random.normal(key, (500,))}, state, params)
    >>> report = gate_report(state)
    >>> print(f"{report.total.open_fraction:.2f} open, {report.total.noise_open_fraction:.2f} expected on noise")
    0.33 open, 0.32 expected on noise
    """
    gates = gates_of(state)
    if not gates:
        raise ValueError(
            f"No gate in this state, a {type(state).__name__}: pass the state of an optimizer that contains "
            "poprisk_gate or poprisk_adamw."
        )
    steps = [np.asarray(gate.step) for gate in gates]
    if any(step.ndim for step in steps):
        shape = next(step.shape for step in steps if step.ndim)
        raise ValueError(f"This state holds runs of shape {shape}: take one, jax.tree.map(lambda x: x[0], state).")
    if all(gate.summary is None for gate in gates):
        raise ValueError("This gate keeps no summary (summary=None): build it with summary=Summary().")
    if not max(steps):
        raise ValueError("The gate has not taken a step yet: there is nothing to report.")
    rows = []
    for gate in gates:
        if gate.summary is not None:
            summary, names = jax.device_get((gate.summary, gate.leaf_names))
            rows += [(name, LeafSummary(*row)) for name, row in zip(leaf_names(names), summary, strict=True)]
    layers = tuple(_layer(name or "parameters", [leaf]) for name, leaf in rows)
    total = _layer("all", [leaf for _, leaf in rows])
    return GateReport(int(max(steps)), layers, total, _warnings(total))


def gates_of(state: Any) -> list[PopriskGateState]:
    """What `gate_report` reads of a state: its gates, without what they estimate and wrap."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, PopriskGateState))
    gates = [node for node in nodes if isinstance(node, PopriskGateState)]
    return [gate._replace(statistic_state=None, inner_state=None) for gate in gates]


def _layer(name: str, leaves: list[LeafSummary]) -> LayerReport:
    def total(field: str) -> float:
        return float(sum(np.float64(getattr(leaf, field)) for leaf in leaves))

    size = total("size")
    shares = [_null_distribution.share_above(leaf.noise_boundary, leaf.dof, leaf.num_together) for leaf in leaves]
    open_on_noise = sum(float(share * leaf.size) for share, leaf in zip(shares, leaves, strict=True))
    return LayerReport(
        name=name,
        size=int(size),
        open_fraction=total("num_open") / max(size, 1),
        openness=total("sum_openness") / max(size, 1),
        noise_open_fraction=open_on_noise / max(size, 1),
        decrease=total("decrease"),
        ungated_decrease=total("ungated_decrease"),
        step_decrease=total("step_decrease"),
        ungated_step_decrease=total("ungated_step_decrease"),
        step_norm=total("squared_norm") ** 0.5,
        ungated_step_norm=total("ungated_squared_norm") ** 0.5,
    )


def _warnings(total: LayerReport) -> tuple[str, ...]:
    found = []
    if total.noise_open_fraction > _PURE_NOISE_OPEN:
        found.append(
            f"{100 * total.noise_open_fraction:.0f} % of pure noise would pass: this gate can hardly do anything. Use "
            "TStatistic(z) with a larger z, or OpenShare."
        )
    elif total.openness > _NEARLY_ALL:
        found.append(
            f"{100 * total.openness:.0f} % open: nearly every coordinate stands out of the noise here, and the gate "
            "does next to nothing."
        )
    if total.openness < _NEARLY_NONE:
        found.append(
            f"{100 * total.openness:.1f} % open: the gate shuts nearly everything. Use a smaller z, larger batches, or "
            "a reduction over blocks."
        )
    return tuple(found)
