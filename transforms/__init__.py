"""Optax transformations that gate each coordinate of an update by an estimate of its effect on the population risk.

Two entry points: `poprisk_gate`, which gates any optax transformation, and `poprisk_adamw`, the paper's Algorithm 1.
What is measured (a `Statistic`), how it becomes an openness (a mask) and where it acts (`inner`) are separate objects.

Source: Litman & Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172.
"""

from transforms._adamw import poprisk_adamw
from transforms._gate import (
    PopriskGateState,
    poprisk_gate,
)
from transforms._masks import (
    HardMask,
    Mask,
    SnrMask,
    SoftMask,
    finite_data_alpha,
)
from transforms._statistic import (
    EmaStatisticState,
    Moments,
    Statistic,
    ema_statistic,
)

__all__ = [
    "EmaStatisticState",
    "HardMask",
    "Mask",
    "Moments",
    "PopriskGateState",
    "SnrMask",
    "SoftMask",
    "Statistic",
    "ema_statistic",
    "finite_data_alpha",
    "poprisk_adamw",
    "poprisk_gate",
]
