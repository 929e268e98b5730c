"""The kernel's evolution as a shaded surface (theory §2, "surface picture")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LightSource, Normalize
from mpl_toolkits.mplot3d.axes3d import Axes3D

if TYPE_CHECKING:
    from gramian._report.flow import Report

MAX_DIRECTIONS = 24  # of the kernel at the start


def kernel_changes(report: Report) -> list[np.ndarray]:
    """v_iᵀ (C(t) − C(t0)) v_j of every kernel of the report."""
    centred = []
    for _, k in report.kernels:
        k = np.asarray(k, np.float64)
        k = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
        centred.append(k / max(float(np.linalg.norm(k)), np.finfo(float).tiny))
    size = min(MAX_DIRECTIONS, max(1, len(centred[0]) - 1))
    vectors = np.linalg.eigh(centred[0])[1][:, ::-1][:, :size]
    lacking = -np.asarray(report.flow.output_grad(report.flow.params0), np.float64) @ vectors
    vectors = vectors * np.where(lacking < 0, -1.0, 1.0)
    return [vectors.T @ (c - centred[0]) @ vectors for c in centred]


def draw_sheet(ax: Axes3D, change: np.ndarray, largest: float, brief: bool) -> None:
    """One shaded sheet; between the grid's points it is linear."""
    size = len(change)
    place = np.arange(1, size + 1)
    fine = np.linspace(1, size, 3 * (size - 1) + 1) if size > 1 else np.array([0.5, 1.5])
    rows = np.array([np.interp(fine, place, row) for row in change])
    z = np.array([np.interp(fine, place, column) for column in rows.T]).T
    x, y = np.meshgrid(fine, fine)
    light = LightSource(azdeg=315, altdeg=40)
    step = fine[1] - fine[0]
    colors = light.shade(
        z,
        colormaps["RdBu_r"],
        Normalize(-largest, largest),
        blend_mode="soft",
        vert_exag=size / (3 * largest),
        dx=step,
        dy=step,
    )
    ax.plot_surface(x, y, z, facecolors=colors, rcount=len(fine), ccount=len(fine), linewidth=0, antialiased=False)
    ax.set_zlim(-largest, largest)
    ax.set_box_aspect((1, 1, 0.6), zoom=0.92 if brief else 0.97)  # pyright: ignore[reportArgumentType]
    ax.view_init(elev=28, azim=-60)
    ticks = [t for t in (1, 8, 16) if t < size - 3 or t == 1] + [size] * (size > 1)
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.tick_params(axis="both", pad=0)
    ax.zaxis.set_tick_params(pad=3)
    ax.zaxis.set_major_formatter("{x:.3g}")
    ax.set_xlabel("direction j" if brief else "eigen-direction j\nof K at the start")
    ax.set_ylabel("direction i" if brief else "eigen-direction i\nof K at the start")
    ax.set_zlabel("change" if brief else "change of normalised K", labelpad=8)
