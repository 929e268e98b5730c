"""What a flow asks of its arguments, checked before any heavy work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from entk._checks import check_apply, check_fits
from gramian._losses import OutputLoss, check_targets
from gramian._source import KernelSource

PyTree = Any


def check_times(t0: float, t1: float, save_at: Iterable[float] = ()) -> tuple[float, float, tuple[float, ...]]:
    """Returns the times as Python floats: integers and NumPy's numbers are the same times."""
    t0, t1, save_at = float(t0), float(t1), tuple(float(t) for t in save_at)
    if not (math.isfinite(t0) and math.isfinite(t1)) or t1 <= t0:
        raise ValueError(f"t1={t1} must be finite and later than t0={t0}.")
    for t in save_at:
        if not t0 < t <= t1:
            raise ValueError(f"save_at holds {t}, but must lie in (t0, t1] = ({t0}, {t1}].")
    return t0, t1, save_at


def check_problem(source: KernelSource, loss: OutputLoss, params: PyTree, *, operators: bool = True) -> None:
    """Shapes, dtypes, finiteness, labels, memory and convexity, cheapest first.

    Without operators no kernel is formed and no memory is asked for.
    """
    if not isinstance(loss, OutputLoss):
        raise TypeError(f"loss is a {type(loss).__name__}; build it with squared_loss(y) or another gramian loss.")
    spec = check_apply(source.apply_fn, params, source.x_s, "x_s")
    check_all_move(params)
    n, c, dtype = spec
    m, test = 0, None
    if source.x_q is not None:
        test = check_apply(source.apply_fn, params, source.x_q, "x_q")
        m = test.num_examples
        if test.num_outputs != c:
            raise ValueError(f"x_q has {test.num_outputs} outputs an example and x_s {c}; they must agree.")
    check_targets(loss, n, c, dtype)
    if operators:

        def bytes_of(n):
            return (12 * (n * c) ** 2 + 3 * n * c * m * c) * dtype.itemsize

        check_fits(
            bytes_of(n),
            f"a dense flow of N = {n} x {c} training and M = {m} x {c} test outputs in {dtype}",
            f"Pass fewer examples{', or float32 data and parameters' if dtype.itemsize > 4 else ''}. Without N x N "
            "matrices: reference_flow(..., operators=False) for the flow alone, record_training and analyze_training "
            "for a run of an optimizer.",
            count=n,
            bytes_of=bytes_of,
        )
        source.strategy.check(params, spec, spec, True)
        if test is not None:
            source.strategy.check(params, test, spec, False)
    for name, tree in (("params", params), ("x_s", source.x_s), ("x_q", source.x_q)):
        check_finite(tree, name)
    u_s, u_q = source.outputs(params)
    check_finite(u_s, "apply_fn(params, x_s)")
    check_finite(u_q, "apply_fn(params, x_q)")
    if not loss.isotropic:
        lowest = float(jnp.linalg.eigvalsh(loss.hessian(u_s)).min()) * n
        if not lowest >= -1e3 * float(jnp.finfo(dtype).eps):
            raise ValueError(
                f"the loss is not convex in the outputs: its Hessian has the eigenvalue {lowest:.3g} at the first "
                "outputs, but must be positive semi-definite. The operators are defined for convex losses only."
            )


def check_all_move(params: PyTree) -> None:
    """Training moves every leaf; constants among them, which `entk` leaves alone, have no place to go."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, but training moves "
                "floating-point leaves only: take it out of params and close apply_fn over it."
            )


def check_finite(tree: PyTree, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} holds {bad} NaN or infinite values; remove or repair them."
            )
