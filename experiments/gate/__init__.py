"""What the population-risk gate does, and when: thresholds, statistics and placements against tuned AdamW.

Claims and controls stand with each task in `_tasks`; the arms, all searched over the same grid, in `_arms`.
"""

from experiments.gate._run import (
    Gate,
    main,
)

__all__ = [
    "Gate",
    "main",
]
