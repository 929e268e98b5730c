"""Tables, sentences and figures of the kernel benchmark, all made of its results.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from experiments.benchmarks._ntk_measure import families, fastest, is_wrong, median_seconds, ratio
from experiments.benchmarks._ntk_workers import KERNELS, MOMENTS, Contender, version

# Okabe and Ito's palette, told apart by every kind of colour vision; hatches and markers say the same once more.
STYLES = (("#0072B2", "", "o"), ("#6E6E6E", "///", "s"), ("#D55E00", "...", "D"), ("#E69F00", "xxx", "^"))
GIB = 2**30


def tables(done: dict[str, Any]) -> list[Table]:
    """For a terminal: kernels, then moments, those of them that were measured."""
    found = []
    for title, (header, rows) in (
        ("One full kernel: seconds and peak memory (ratio of seconds to entk's)", _kernels(done)),
        ("Gradient moments: seconds and peak memory as multiples of one batch gradient's", _moments(done)),
    ):
        if rows:
            table = Table(title=title, title_justify="left")
            for column in header:
                table.add_column(column)
            for row in rows:
                table.add_row(*row)
            found.append(table)
    return found


def markdown(done: dict[str, Any]) -> str:
    """For README.md."""
    where, repeats = done["machine"], done["settings"]["repeats"]
    blocks = [
        f"Seconds and peak memory of one full kernel over outputs, on one core of {where['cpu']}, float32, with JAX "
        f"{where['jax']}{_peers(done)}. Compilation not counted; median of {repeats} or more paired rounds, ratio to "
        "entk's seconds in brackets; of each library the fastest of its implementations."
    ]
    header, rows = _kernels(done)
    blocks.append(_markdown_table(header, rows))
    header, rows = _moments(done)
    if rows:
        blocks.append(
            "Gradient moments of a batch, as multiples of the seconds and memory of one plain batch gradient:"
        )
        blocks.append(_markdown_table(header, rows))
    figures = [("seconds and memory", "kernels.png", done["models"]), ("growth", "growth.png", done["growth"])]
    links = [f"[{said}](results/benchmark-ntk/{name})" for said, name, measured in figures if measured]
    blocks += [remarks(done), f"Figures: {', '.join(links)}." if links else ""]
    return "\n\n".join(block for block in blocks if block) + "\n"


def remarks(done: dict[str, Any]) -> str:
    """The share of the peak, and the largest kernel, as sentences."""
    said = []
    peak = done["peak"].get("one core")
    shares = list(_shares(done)) if peak else []
    if shares:
        listed = ", ".join(f"{title} {share:.0%}" for title, share in shares)
        rate = peak["operations_per_second"] / 1e9
        said.append(
            f"Share that entk reaches of the {rate:.0f} GFLOP/s of a large matrix product, counting the contractions' "
            f"operations and not the differentiation: {listed}."
        )
    big = done["largest"]
    if "seconds" in big:
        said.append(
            f"Largest kernel within {big['budget_bytes'] / GIB:.1f} GiB: N = n·c = {big['n'] * big['c']:,} "
            f"({big['title']}), {_number(big['seconds'])} s on {done['machine']['cores']} cores with compilation, the "
            f"process holding {big['held_bytes'] / GIB:.1f} GiB."
        )
    return " ".join(said)


def wrong_results(done: dict[str, Any]) -> list[str]:
    """Whoever got another result than the first contender."""
    return [
        f"{name} on {record['title']} (error {run['error']})"
        for record in _records(done)
        for name, run in record.get("alone", {}).items()
        if is_wrong(run)
    ]


def figures(done: dict[str, Any], folder: Path) -> None:
    """kernels.png and growth.png, where there is something to draw."""
    records = [record for record in done["models"].values() if record.get("rounds")]
    if records:
        figure = Figure(figsize=(9, 7), layout="constrained")
        above, below = figure.subplots(2)
        _bars(above, records, lambda record, c: median_seconds(record, c.name), "seconds of one kernel (log axis)")
        _bars(below, records, _peak_gib, "peak memory of one kernel in GiB (log axis)")
        above.legend(ncols=len(STYLES), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        figure.savefig(folder / "kernels.png", dpi=150)
    panels = {what: points for what, points in done["growth"].items() if points}
    if panels:
        figure = Figure(figsize=(9, 7), layout="constrained")
        for ax, (what, points) in zip(figure.subplots(2, 2).flat, panels.items(), strict=False):
            _growth(ax, what, points)
        figure.savefig(folder / "growth.png", dpi=150)


def _peers(done: dict[str, Any]) -> str:
    """The releases of the libraries that took part."""
    runs = {name: run for record in done["models"].values() for name, run in record.get("alone", {}).items()}
    tangents = next(
        (run["jax"] for name, run in runs.items() if name.startswith("neural-tangents") and "jax" in run), ""
    )
    torch = next((run["torch"] for run in runs.values() if "torch" in run), "")
    said = f"; neural-tangents {version('neural-tangents')} with JAX {tangents}" if tangents else ""
    return said + (f"; PyTorch {torch}" if torch else "")


def _kernels(done: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a network, one column a family, and the geometric means of the ratios."""
    names = families(KERNELS)
    records = [record for record in done["models"].values() if record.get("alone")]
    if not records:
        return [], []
    rows = [[_network(record), *(_kernel_cell(record, family) for family in names)] for record in records]
    return ["network", *names], [*rows, ["geometric mean of the ratios", *(_mean_cell(records, f) for f in names)]]


def _kernel_cell(record: dict[str, Any], family: str) -> str:
    best = fastest(record, family, KERNELS)
    if best is None:
        return _why_not(record, family)
    seconds, times = median_seconds(record, best.name), ratio(record, best.name, KERNELS[0].name)
    if seconds is None:
        return "not timed yet"
    gib = record["alone"][best.name]["peak_bytes"] / GIB
    variant = f", {best.variant}" if best.variant != best.family else ""
    return f"{_number(seconds)} s" + (f" ({_number(times)}x)" if times else "") + f", {_number(gib)} GiB{variant}"


def _why_not(record: dict[str, Any], family: str) -> str:
    runs = [run for c in KERNELS if c.family == family and (run := record["alone"].get(c.name))]
    reasons = ["wrong result" if is_wrong(run) else run["stopped"] for run in runs if is_wrong(run) or "stopped" in run]
    return "; ".join(dict.fromkeys(reasons)) or "-"


def _mean_cell(records: Sequence[dict[str, Any]], family: str) -> str:
    best = [(record, fastest(record, family, KERNELS)) for record in records]
    ratios = [times for record, c in best if c is not None and (times := ratio(record, c.name, KERNELS[0].name))]
    if not ratios:
        return "-"
    mean = statistics.geometric_mean(ratios)
    return f"{_number(mean)}x" + (f" ({len(ratios)} of {len(records)})" if len(ratios) < len(records) else "")


def _moments(done: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    records = [record for record in done["moments"].values() if record.get("rounds")]
    rows = [[_network(record), *(_moments_cell(record, contender) for contender in MOMENTS)] for record in records]
    return ["network", *(contender.name for contender in MOMENTS)], rows


def _moments_cell(record: dict[str, Any], contender: Contender) -> str:
    unit, run = record["alone"][MOMENTS[0].name], record["alone"].get(contender.name, {})
    seconds = median_seconds(record, contender.name)
    if seconds is None:
        return run.get("stopped", "-")
    if contender == MOMENTS[0]:
        return f"{_number(seconds)} s, {_number(run['peak_bytes'] / GIB)} GiB"
    times = ratio(record, contender.name, MOMENTS[0].name) or math.nan
    return f"{_number(times)}x seconds, {_number(run['peak_bytes'] / unit['peak_bytes'])}x memory"


def _shares(done: dict[str, Any]) -> Iterator[tuple[str, float]]:
    rate = done["peak"]["one core"]["operations_per_second"]
    name = KERNELS[0].name
    for record in done["models"].values():
        operations = record.get("plan", {}).get("operations")
        seconds = median_seconds(record, name)
        if operations and seconds:
            yield record["title"], operations / seconds / rate


def _records(done: dict[str, Any]) -> list[dict[str, Any]]:
    points = [point for panel in done["growth"].values() for point in panel.values()]
    return [*done["models"].values(), *done["moments"].values(), *points]


def _network(record: dict[str, Any]) -> str:
    return f"{record['title']}, n = {record['n']}, c = {record['c']}, p = {record['p']:,}"


def _number(value: float) -> str:
    """Three significant digits, and no exponents."""
    value = float(f"{value:.3g}")
    magnitude = math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{max(0, 2 - magnitude)}f}"


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _peak_gib(record: dict[str, Any], contender: Contender) -> float:
    return record["alone"][contender.name]["peak_bytes"] / GIB


def _bars(ax: Axes, records, height, label: str) -> None:
    """One group of bars a network, one bar a family; the height of its fastest variant."""
    names = families(KERNELS)
    width = 0.8 / len(names)
    for i, (family, (color, hatch, _)) in enumerate(zip(names, STYLES, strict=True)):
        best = [fastest(record, family, KERNELS) for record in records]
        heights = [(c and height(record, c)) or math.nan for record, c in zip(records, best, strict=True)]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(records))]
        bars = ax.bar(places, heights, width, color=color, hatch=hatch, edgecolor="white", label=family)
        ax.bar_label(bars, ["" if math.isnan(value) else _number(value) for value in heights], fontsize=7)
        for place, value, record in zip(places, heights, records, strict=True):
            if math.isnan(value) and any(c.name in record["alone"] for c in KERNELS if c.family == family):
                across = ax.get_xaxis_transform()
                ax.text(place, 0.02, "not finished", rotation=90, ha="center", fontsize=7, transform=across)
    ax.set_yscale("log")
    titles = [record["title"].replace(" ", "\n", 1) for record in records]
    sizes = [f"n = {record['n']}, N = {record['n'] * record['c']:,}" for record in records]
    ax.set_xticks(range(len(records)), [f"{t}\n{n}" for t, n in zip(titles, sizes, strict=True)], fontsize=8)
    ax.set_ylabel(label)
    ax.margins(y=0.12)


def _growth(ax: Axes, what: str, points: dict[str, Any]) -> None:
    for contender, (color, _, marker) in zip(KERNELS[:2], STYLES, strict=False):
        timed = [(int(v), s) for v, point in points.items() if (s := median_seconds(point, contender.name))]
        if timed:
            ax.loglog(*zip(*timed, strict=True), color=color, marker=marker, label=contender.name + _slope(timed))
    values = [int(value) for value in points]
    ax.set_xticks(values, [f"{value}" for value in values])
    ax.minorticks_off()
    ax.set_xlabel(what)
    ax.set_ylabel("seconds of one kernel")
    ax.set_title(_panel_title(points), fontsize=9)
    ax.margins(y=0.25)  # room for the legend above the curves
    ax.legend(fontsize=8, loc="upper left", frameon=False)


def _slope(timed: list[tuple[int, float]]) -> str:
    """The exponent between the two largest sizes, where fixed costs weigh least."""
    if len(timed) < 2:
        return ""
    (x1, s1), (x2, s2) = timed[-2:]
    return f", slope {math.log(s2 / s1) / math.log(x2 / x1):.1f} at the end"


def _panel_title(points: dict[str, Any]) -> str:
    """The first and the last network, as far as they differ."""

    def said(point):
        return f"{point['title']}, n = {point['n']}"

    first, last = next(iter(points.values())), list(points.values())[-1]
    return said(first) if said(first) == said(last) else f"{said(first)}\nto {said(last)}"
