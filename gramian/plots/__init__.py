"""The pictures of the theory, one function each, and all of them on one page; `gramian.plots.run`: of recorded runs."""

from gramian.plots.flow import (
    cells,
    kernel_drift,
    kernel_surface,
    loss,
    overview,
    residual_by_direction,
    spectrum,
    test_displacement,
)

__all__ = [
    "cells",
    "kernel_drift",
    "kernel_surface",
    "loss",
    "overview",
    "residual_by_direction",
    "spectrum",
    "test_displacement",
]
