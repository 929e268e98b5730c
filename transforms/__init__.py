"""Optax transformations that gate each coordinate of an update by an estimate of its effect on the population risk.

`poprisk_gate` gates any optax transformation; `poprisk_adamw` is AdamW with a gated direction. What is measured (a
`Statistic`), where noise ends (a threshold), how that becomes an openness (a mask), which coordinates are decided on
together (a reduction) and where the gate acts (`inner`) are separate objects. `gate_audit` says before training whether
a gate could help, `gate_report` what it did.

Source: Litman & Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172.
"""

from transforms._adamw import poprisk_adamw
from transforms._audit import (
    GateAudit,
    gate_audit,
)
from transforms._estimators.adam import (
    AdamStatisticState,
    adam_moments_statistic,
    adam_statistic,
)
from transforms._estimators.base import Moments, Statistic
from transforms._estimators.batch import (
    BatchStatisticState,
    batch_statistic,
    join_moments,
)
from transforms._estimators.ema import EmaStatisticState, ema_statistic
from transforms._gate import (
    PopriskGateState,
    poprisk_gate,
)
from transforms._masks import (
    HardMask,
    Mask,
    SnrMask,
    SoftMask,
)
from transforms._monitor import (
    LeafSummary,
    Summary,
)
from transforms._presets import (
    algorithm_1,
    popriskmin,
    snr_grad,
)
from transforms._reductions import (
    ByLabel,
    PerRow,
    PerScalar,
    PerTensor,
    Pooled,
    Reduction,
)
from transforms._report import (
    GateReport,
    LayerReport,
    gate_report,
)
from transforms._thresholds import (
    Alpha,
    Level,
    OpenShare,
    Threshold,
    TStatistic,
    finite_data_alpha,
)

__all__ = [
    "AdamStatisticState",
    "Alpha",
    "BatchStatisticState",
    "ByLabel",
    "EmaStatisticState",
    "GateAudit",
    "GateReport",
    "HardMask",
    "LayerReport",
    "LeafSummary",
    "Level",
    "Mask",
    "Moments",
    "OpenShare",
    "PerRow",
    "PerScalar",
    "PerTensor",
    "Pooled",
    "PopriskGateState",
    "Reduction",
    "SnrMask",
    "SoftMask",
    "Statistic",
    "Summary",
    "TStatistic",
    "Threshold",
    "adam_moments_statistic",
    "adam_statistic",
    "algorithm_1",
    "batch_statistic",
    "ema_statistic",
    "finite_data_alpha",
    "gate_audit",
    "gate_report",
    "join_moments",
    "poprisk_adamw",
    "poprisk_gate",
    "popriskmin",
    "snr_grad",
]
