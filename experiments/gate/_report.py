"""Tables and figures of a task's results."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from experiments.gate._arms import ARMS
from experiments.gate._statistics import compare, compare_steps, interval

COLORS = {
    "plain": "#000000",
    "published": "#D55E00",
    "step": "#0072B2",
    "before": "#009E73",
    "around": "#56B4E9",
    "control": "#8A8A8A",
    "other": "#CC79A7",
}
FAMILIES = {
    "plain": "AdamW",
    "published": "published gates",
    "step": "gate on the step",
    "before": "gate before Adam",
    "around": "gate around AdamW",
    "control": "controls",
    "other": "Grokfast",
}
GREY = "#6E6E6E"
# README's columns: the same few arms in every row.
SHOWN = {
    "adamw-linear": "AdamW, rate falling to 0",
    "paper": "Algorithm 1",
    "popriskmin": "popriskmin",
    "hard-z1": "on the step, hard, z = 1",
    "hard-z2": "on the step, hard, z = 2",
    "exact-hard-z1": "on the step, exact moments, hard, z = 1",
    "before-snr-a1": "before Adam, snr, α = 1",
    "random-hard-z2": "control: random mask as open as hard, z = 2",
    "norm-hard-z2": "control: step norm of hard, z = 2",
}
GROKKING_SHOWN = {"random-hard-z2": "random-before-snr-a1", "norm-hard-z2": "norm-before-snr-a1"}
MARKS = {"better": "**{}**", "worse": "_{}_", "same": "{}", "open": "{}"}


def number(value: float) -> str:
    """Three digits."""
    return "diverged" if abs(value) > 1e8 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(result: dict[str, Any]) -> Table:
    """A task's outcome for the terminal."""
    made = Table(title=result["title"], title_justify="left", caption=f"Claim: {result['claim']}.")
    headers, rows = _rows(result)
    for header in headers:
        made.add_column(header)
    for row in rows:
        made.add_row(*row)
    return made


def _rows(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    if result["kind"] == "audit":
        return ("problem", *AUDIT_HEADERS), [(name, *_audit_cells(entry)) for name, entry in result["problems"].items()]
    if result["kind"] == "grokking":
        found = compare_steps(result["arms"])
        rows = [
            (
                ARMS[arm].title,
                f"{one['mean']:,.0f} ({one['low']:,.0f} to {one['high']:,.0f})",
                f"{one['factor']:.2f} ({one['factor_low']:.2f} to {one['factor_high']:.2f})",
                f"{one['reached']} of {one['runs']}",
                f"{result['arms'][arm]['learning_rate']:g}, {result['arms'][arm]['weight_decay']:g}",
            )
            for arm, one in found.items()
        ]
        return ("arm", "steps to 95 %", "times AdamW's", "reached", "lr, wd"), rows
    rows = []
    for entry in result["problems"].values():
        early, end = (compare(entry["arms"], stop) for stop in ("early", "end"))
        for arm, one in early.items():
            chosen, last = entry["arms"][arm]["early"], end[arm]
            rows.append(
                (
                    entry["settings"]["title"],
                    ARMS[arm].title,
                    f"{number(one['mean'])} ± {number(one['half'])}",
                    f"{number(one['difference'])} ± {number(one['difference_half'])} {one['verdict']}",
                    f"{number(last['mean'])} ± {number(last['half'])}",
                    f"{chosen['learning_rate']:g}, {chosen['weight_decay']:g}{'*' * bool(chosen['at_border'])}",
                )
            )
    return ("problem", "arm", "test, stopped early", "less AdamW's", "test, at the end", "lr, wd (* edge)"), rows


AUDIT_HEADERS = (
    "(9), one batch",
    "(9), mean of 25 batches",
    "streaming, one step",
    "streaming, second half of the run",
    "streaming: Σ predicted, Σ realized",
    "with the finite-data correction",
)


def _audit_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Correlations of predicted and realized decrease, and sums over the run; mean over seeds ± 95 %."""

    def mean(predictor, key):
        value, half = interval([seed[predictor][key] for seed in entry["seeds"]])
        return f"{value:.2f} ± {half:.2f}"

    corrected = f"{mean('ema, corrected', 'correlation')}; {mean('ema, corrected', 'predicted_sum')}"
    return (
        mean("batch", "correlation"),
        mean("batch", "correlation_of_blocks"),
        mean("ema", "correlation"),
        mean("ema", "correlation_second_half"),
        f"{mean('ema', 'predicted_sum')}, {mean('ema', 'realized_sum')}",
        "–" if entry["num_examples"] is None else corrected,
    )


def markdown(results: list[dict[str, Any]]) -> str:
    """README's tables, of the tasks that are measured."""
    rows = [row for result in results if result["kind"] != "audit" for row in _judged(result)]
    text = ""
    if rows:
        text += (
            "Test metric, lower is better; in brackets the difference from AdamW on the same seeds with its 95 % "
            "interval (for grokking the factor); **bold** where the interval says better, _italic_ where it says "
            "worse. Learning rate and weight decay of every arm were chosen from the same grid by validation data, on "
            "other seeds, and every run was stopped early where its own validation metric was lowest. Controls of "
            "grokking are those of the gate before Adam.\n\n"
            f"| problem | seeds | AdamW | {' | '.join(SHOWN.values())} |\n|{'---|' * (3 + len(SHOWN))}\n"
        )
        for name, seeds, plain, cells in rows:
            shown = [MARKS[cells[arm][0]].format(cells[arm][1]) if arm in cells else "–" for arm in SHOWN]
            text += f"| {name} | {seeds} | {plain} | {' | '.join(shown)} |\n"
        counts = []
        for arm in SHOWN:
            verdicts = [cells[arm][0] for *_, cells in rows if arm in cells]
            counts.append(f"{verdicts.count('better')} / {verdicts.count('open')} / {verdicts.count('worse')}")
        text += f"| problems better / undecided / worse than AdamW | | | {' | '.join(counts)} |\n"
    for result in results:
        if "detection" in result:
            text += _detection_table(result["detection"])
        if result["kind"] == "audit":
            text += _audit_table(result)
    return text


def _judged(result: dict[str, Any]) -> list[tuple[str, int, str, dict[str, tuple[str, str]]]]:
    """A task's rows: problem, seeds, AdamW's metric, and of every arm shown its verdict and cell."""
    if result["kind"] == "grokking":
        found = compare_steps(result["arms"])
        cells = {}
        for arm in SHOWN:
            one = found.get(GROKKING_SHOWN.get(arm, arm))
            if one:
                failed = one["runs"] - one["reached"]
                factor = f"×{one['factor']:.2f}, {one['factor_low']:.2f} to {one['factor_high']:.2f}"
                late = f", {failed} not by the cap" if failed else ""
                cells[arm] = one["verdict"], f"{one['mean']:,.0f} ({factor}{late})"
        plain = found["adamw"]
        name = f"{result['title']}: steps to 95 % held-out accuracy, cap {result['settings']['cap']:,}"
        return [(name, plain["runs"], f"{plain['mean']:,.0f}", cells)]
    rows = []
    for entry in result["problems"].values():
        found, settings = compare(entry["arms"], "early"), entry["settings"]
        cells = {
            arm: (
                found[arm]["verdict"],
                f"{number(found[arm]['mean'])} "
                f"({round(found[arm]['difference'], 6):+.2g} ± {found[arm]['difference_half']:.2g})",
            )
            for arm in SHOWN
            if arm in found
        }
        plain = f"{number(found['adamw']['mean'])} ± {number(found['adamw']['half'])}"
        name = f"{result['title']}: {settings['title']}; {settings['metric']}"
        rows.append((name, len(settings["seeds"]), plain, cells))
    return rows


def _detection_table(detection: dict[str, Any]) -> str:
    text = (
        "\nOpened coordinates where the signal is known (10 of 100 weights, "
        f"{detection['batches']} batches, {detection['seeds']} seeds):\n\n"
        "| data | statistic and threshold | recall | precision | noise opened |\n|---|---|---|---|---|\n"
    )
    for data, cases in detection["data"].items():
        for name, case in cases.items():
            for k, level in enumerate(case["level"]):
                if len(case["level"]) > 1 and level not in (1.0, 2.0, 3.0):
                    continue
                which = f"{name}, z = {level:g}" if len(case["level"]) > 1 else name
                precision = case["precision"][k]
                text += (
                    f"| {data} | {which} | {case['recall'][k]:.1%} | "
                    f"{'–' if precision is None else f'{precision:.1%}'} | {case['noise_open'][k]:.2%} |\n"
                )
    return text


def _audit_table(result: dict[str, Any]) -> str:
    steps = next(iter(result["problems"].values()))["num_steps"]
    text = (
        "\nDecrease of the held-out loss in one step: correlation of what is predicted beforehand and what comes true, "
        f"over {steps:,} steps, mean over seeds ± 95 %; the last columns hold sums over the run. By (9) from one "
        "batch for a step along its gradient; from the streaming moments for a step along Adam's mean.\n\n"
        f"| problem | {' | '.join(AUDIT_HEADERS)} |\n|{'---|' * (1 + len(AUDIT_HEADERS))}\n"
    )
    for name, entry in result["problems"].items():
        text += f"| {name} | {' | '.join(_audit_cells(entry))} |\n"
    return text


def figure(result: dict[str, Any]) -> Figure:
    if result["kind"] == "audit":
        return _audit_figure(result)
    if result["kind"] == "grokking":
        return _grokking_figure(result)
    return _sweep_figure(result)


def _sweep_figure(result: dict[str, Any]) -> Figure:
    """Each arm's test metric with its interval, stopped early (filled) and at the end (hollow)."""
    problems = list(result["problems"].values())
    arms = [arm for arm in ARMS if any(arm in entry["arms"] for entry in problems)]
    extra = "detection" in result
    figure = Figure(
        figsize=(4.2 + 2.9 * (len(problems) + extra), 1.9 + 0.27 * len(arms)), layout="constrained", dpi=110
    )
    axes = np.atleast_1d(figure.subplots(1, len(problems) + extra))
    for ax, entry in zip(axes, problems, strict=False):
        early, end = (compare(entry["arms"], stop) for stop in ("early", "end"))
        for k, arm in enumerate(reversed(arms)):
            if arm not in early:
                continue
            color = COLORS[ARMS[arm].family]
            for found, fill, shift in ((early, color, 0.14), (end, "white", -0.14)):
                one = found[arm]
                ax.errorbar(
                    one["mean"], k + shift, xerr=one["half"], fmt="o", ms=4.5, color=color, mfc=fill, capsize=2, lw=1
                )
        ax.axvline(early["adamw"]["mean"], color=GREY, lw=0.8, ls="--", zorder=0)
        ax.set(xlabel=entry["settings"]["metric"], title=entry["settings"]["title"], ylim=(-0.7, len(arms) - 0.3))
        ax.title.set_size(9)
        means = [one["mean"] for one in early.values()]
        if min(means) > 0 and max(means) > 2.5 * min(means):
            ax.set_xscale("log")
            ratio = max(means) / min(means)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 5 else (1, 3)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(
            range(len(arms)), [ARMS[arm].title for arm in reversed(arms)] if ax is axes[0] else [""] * len(arms)
        )
        ax.grid(axis="y", color="#EEEEEE")
        ax.set_axisbelow(True)
    if extra:
        _detection_axes(axes[-1], result["detection"])
    figure.suptitle(
        f"{result['title']}\nmean and 95 % interval; filled: stopped early, hollow: at the end; dashed: AdamW",
        x=0.01,
        ha="left",
        fontsize=10,
        fontweight="bold",
    )
    return figure


def _detection_axes(ax: Any, detection: dict[str, Any]) -> None:
    """Share of noise opened against share of signal opened, by threshold."""
    styles = {"streaming": "#0072B2", "exact batch": "#009E73"}
    for name, color in styles.items():
        case = detection["data"]["fresh"][name]
        noise, recall = 100 * np.asarray(case["noise_open"]), 100 * np.asarray(case["recall"])
        ax.plot(noise, recall, "o-", ms=4, color=color, label=name)
        for level in (1.0, 2.0, 3.0):
            k = case["level"].index(level)
            ax.annotate(f"z = {level:g}", (noise[k], recall[k]), textcoords="offset points", xytext=(5, -9), fontsize=7)
    paper = detection["data"]["fresh"]["Algorithm 1, α = 1"]
    ax.plot(100 * paper["noise_open"][0], 100 * paper["recall"][0], "s", color="#D55E00", label="Algorithm 1, α = 1")
    ax.set(xlabel="noise coordinates opened (%)", ylabel="signal coordinates opened (%)", ylim=(0, 103))
    ax.set_title("Opened coordinates, linear, fresh, w = 0", size=9)
    ax.legend(frameon=False, fontsize=7, loc="lower right")


def _grokking_figure(result: dict[str, Any]) -> Figure:
    """Steps of every seed, and mean held-out accuracy on the way."""
    found, every = compare_steps(result["arms"]), result["settings"]["every"]
    order = sorted(found, key=lambda arm: -found[arm]["mean"])
    figure = Figure(figsize=(13, 1.8 + 0.3 * len(order)), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    for k, arm in enumerate(order):
        one, cell, color = found[arm], result["arms"][arm], COLORS[ARMS[arm].family]
        for steps, reached in zip(cell["steps"], cell["reached"], strict=True):
            left.plot(steps, k, "o" if reached else "x", ms=4, color=color, alpha=0.5)
        low, high = max(one["low"], 1), one["high"]
        left.plot([low, high], [k, k], color=color, lw=1.2)
        left.plot(one["mean"], k, "|", ms=14, mew=2, color=color)
    left.axvline(found["adamw"]["mean"], color=GREY, lw=0.8, ls="--", zorder=0)
    titles = [
        f"{ARMS[arm].title} (lr {result['arms'][arm]['learning_rate']:g}, wd {result['arms'][arm]['weight_decay']:g})"
        for arm in order
    ]
    left.set_yticks(range(len(order)), titles)
    left.set(xscale="log", xlabel="steps to 95 % held-out accuracy", title="Seeds; bars: mean, 95 %; ×: not by the cap")
    left.title.set_size(9)
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    for arm in [arm for arm in ("adamw", "before-snr-a1", "grokfast", "hard-z2", "paper", "hard-z1") if arm in found]:
        runs = result["arms"][arm]["accuracies"]
        length = max(map(len, runs))
        padded = np.mean([run + [run[-1]] * (length - len(run)) for run in runs], 0)
        style = {"adamw": "-", "hard-z1": ":"}.get(arm, "-")
        right.plot(
            every * np.arange(1, length + 1), 100 * padded, style, color=COLORS[ARMS[arm].family], label=ARMS[arm].title
        )
    right.axhline(95, color=GREY, lw=0.8, ls="--", zorder=0)
    right.set(xscale="log", xlabel="steps", ylabel="held-out accuracy (%), mean over seeds")
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(result["title"], x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _audit_figure(result: dict[str, Any]) -> Figure:
    """Predicted against realized decrease of every step of the first seed."""
    names = list(result["problems"])
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.8 * columns, 0.6 + 2.9 * rows), layout="constrained", dpi=110)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for ax, name in zip(axes, names, strict=False):
        entry = result["problems"][name]
        titles = []
        for predictor, realized, color, label in (
            ("batch", "realized", "#E69F00", "(9), one batch"),
            ("ema", "ema_realized", "#0072B2", "streaming"),
        ):
            pair = [1e3 * np.asarray(entry["steps"][key]) for key in (predictor, realized)]
            ax.plot(*pair, ".", ms=2, color=color, alpha=0.5, label=label)
            correlation = interval([seed[predictor]["correlation"] for seed in entry["seeds"]])[0]
            titles.append(f"{label.split(',')[0]} {correlation:.2f}")
        low, high = np.percentile(pair, [0.2, 99.8])
        ax.plot([low, high], [low, high], color=GREY, lw=0.8)
        margin = 0.1 * (high - low)
        ax.set(xlim=(low - 3 * margin, high + 3 * margin), ylim=(low - margin, high + margin))
        ax.set_title(f"{name}\ncorrelation: {', '.join(titles)}", size=8)
    for k, ax in enumerate(axes):
        if k >= len(names) - columns:
            ax.set_xlabel("predicted decrease (10⁻³)")
        if k % columns == 0:
            ax.set_ylabel("realized decrease (10⁻³)")
    axes[0].legend(frameon=False, fontsize=7, markerscale=4)
    figure.suptitle(
        "Decrease of the held-out loss in one step, predicted and realized; grey: equal; points far off are cut",
        x=0.01,
        ha="left",
        fontsize=10,
        fontweight="bold",
    )
    return figure
