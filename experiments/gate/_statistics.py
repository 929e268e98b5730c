"""Means over seeds, and differences from AdamW seed by seed, with 95 % intervals by Student's t."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats


def interval(values: Any) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (0 for a single value)."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), 0.0
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def compare(cells: dict[str, Any], stop: str) -> dict[str, Any]:
    """Every arm's test metric and its paired difference from AdamW; negative is better."""
    baseline = np.asarray(cells["adamw"][stop]["test"])
    found = {}
    for name, cell in cells.items():
        test = np.asarray(cell[stop]["test"])
        mean, half = interval(test)
        difference, spread = interval(test - baseline)
        found[name] = {
            "mean": mean,
            "half": half,
            "difference": difference,
            "difference_half": spread,
            "verdict": verdict(difference, spread),
        }
    return found


def compare_steps(cells: dict[str, Any]) -> dict[str, Any]:
    """Every arm's mean steps, and the factor against AdamW, paired by seed, from logarithms; below 1 is better."""
    baseline = np.log(cells["adamw"]["steps"])
    found = {}
    for name, cell in cells.items():
        steps = np.log(cell["steps"])
        mean, half = interval(steps)
        difference, spread = interval(steps - baseline)
        found[name] = {
            "mean": float(np.exp(mean)),
            "low": float(np.exp(mean - half)),
            "high": float(np.exp(mean + half)),
            "factor": float(np.exp(difference)),
            "factor_low": float(np.exp(difference - spread)),
            "factor_high": float(np.exp(difference + spread)),
            "reached": int(sum(cell["reached"])),
            "runs": len(steps),
            "verdict": verdict(difference, spread),
        }
    return found


def verdict(difference: float, half: float) -> str:
    """What the interval of a difference says: "better", "worse", "same" (identical), or "open"."""
    if difference == 0 and half == 0:
        return "same"
    return "better" if difference + half < 0 else "worse" if difference - half > 0 else "open"
