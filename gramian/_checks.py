"""What a flow asks of its arguments, checked before any heavy work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from entk.internal import OutputSpec, check_apply, check_fits, num_params
from gramian._losses import OutputLoss, check_loss, check_targets
from gramian._problem import KernelSource

PyTree = Any


def check_real(name: str, value: Any) -> float:
    """Returns a real number as a Python float; NumPy's and JAX's scalars are taken, booleans and texts are not."""
    dtype = value.dtype if hasattr(value, "dtype") and jnp.ndim(value) == 0 else None
    array = dtype is not None and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or array):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, but must be a real number.")
    return float(value)


def check_seconds(every_seconds: Any) -> float:
    """Least time between two saves."""
    seconds = check_real("every_seconds", every_seconds)
    if not seconds >= 0:
        raise ValueError(f"every_seconds={seconds} must not be negative: 0 saves whenever there is something to save.")
    return seconds


def check_times(t0: float, t1: float, save_at: Iterable[float] = ()) -> tuple[float, float, tuple[float, ...]]:
    """Returns the times as Python floats: integers and NumPy's numbers are the same times."""
    if not isinstance(save_at, Iterable) or isinstance(save_at, str):
        raise TypeError(f"save_at={save_at!r} must be a sequence of times, e.g. ({save_at!r},).")
    t0, t1 = check_real("t0", t0), check_real("t1", t1)
    save_at = tuple(check_real("a time of save_at", t) for t in save_at)
    if not (math.isfinite(t0) and math.isfinite(t1)) or t1 <= t0:
        raise ValueError(f"t1={t1} must be finite and later than t0={t0}.")
    for t in save_at:
        if not t0 < t <= t1:
            raise ValueError(f"save_at holds {t}, but must lie in (t0, t1] = ({t0}, {t1}].")
    return t0, t1, save_at


def check_kind(name: str, value: Any, methods: tuple[str, ...], remedy: str) -> None:
    """Refuses an argument that lacks the methods of what it is to be."""
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        raise TypeError(f"{name}={value!r} cannot be used as one; pass {remedy}.")


def check_problem(source: KernelSource, loss: OutputLoss, params: PyTree, *, operators: bool = True) -> None:
    """Shapes, dtypes, finiteness, labels, memory and convexity, cheapest first.

    Without operators no kernel is formed and no memory is asked for.
    """
    check_order(loss, source.x_s, source.x_q)
    spec = check_apply(source.apply_fn, params, source.x_s, "x_s")
    check_all_move(source.apply_fn, params, source.x_s)
    n, c, dtype = spec
    if jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"params and outputs have dtype {dtype}, for which there are no eigendecompositions, and in which the "
            "identities could not be told from rounding: cast params and data to float32 or float64 for the flow."
        )
    m, test = 0, None
    if source.x_q is not None:
        test = check_test_inputs(source.apply_fn, params, source.x_s, source.x_q)
        m = test.num_examples
        if test.num_outputs != c:
            raise ValueError(
                f"x_q has {test.num_outputs} outputs an example and x_s {c}; they must agree: pass test inputs of the "
                "kind of x_s."
            )
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
    check_finite_loss(loss, u_s)
    if not loss.isotropic:
        blocks = loss.hessian(u_s)
        lowest, scale = float(jnp.linalg.eigvalsh(blocks).min()), float(loss.curvature(u_s))
        if not lowest >= -1e3 * float(jnp.finfo(dtype).eps) * scale:
            raise ValueError(
                f"the loss is not convex in the outputs: its Hessian has the eigenvalue {lowest * n:.3g} at the first "
                "outputs, but must be positive semi-definite. The operators are defined for convex losses only."
            )


def check_order(loss: Any, x_s: PyTree, x_q: PyTree = None) -> None:
    """Refuses a loss in the place of inputs: being a pytree, it would pass for a batch."""
    for name, inputs in (("x_s", x_s), ("x_q", x_q)):
        if isinstance(inputs, OutputLoss):
            raise TypeError(
                f"{name} is an OutputLoss and loss a {type(loss).__name__}: the order is apply_fn, params, x_s, loss, "
                "x_q. Swap them."
            )
    check_loss(loss)


def check_test_inputs(apply_fn: Any, params: PyTree, x_s: PyTree, x_q: PyTree) -> OutputSpec:
    """`check_apply` at x_q, which is named where the model fails on it for having other features than x_s."""
    if isinstance(x_q, OutputLoss):
        raise TypeError("x_q is an OutputLoss, but must hold test inputs; pass it as test_loss.")
    try:
        return check_apply(apply_fn, params, x_q, "x_q")
    except Exception as error:
        of_q, of_s = _features(x_q), _features(x_s)
        if of_q == of_s:
            raise
        raise ValueError(
            f"apply_fn cannot be evaluated at x_q: its examples have shape {of_q}, and those of x_s {of_s}; "
            f"prepare x_q as x_s was. The model says: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _features(x: PyTree) -> str:
    """Shapes of one example, by name."""
    named = [
        (jax.tree_util.keystr(path), str(jnp.shape(leaf)[1:]))
        for path, leaf in jax.tree_util.tree_leaves_with_path(x)
        if hasattr(leaf, "dtype")
    ]
    return ", ".join(f"{name}: {one}" if name else one for name, one in named)


def check_all_move(apply_fn: Any, params: PyTree, x_s: PyTree) -> None:
    """Training moves every leaf, and the outputs with them.

    Constants among the leaves, which `entk` leaves alone, have no place to go. A model that closes over its own weights
    is a constant as a whole; one whose units are all dead at the start is not, since its outputs depend on `params`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, but training moves "
                "floating-point leaves only: take it out of params and close apply_fn over it."
            )
    if num_params(params) == 0:
        raise ValueError("params holds no numbers: all its leaves are empty, and there is nothing to train.")

    params = jax.tree.map(jnp.asarray, params)
    outputs = jax.eval_shape(apply_fn, params, x_s)
    pull = jax.make_jaxpr(lambda v: jax.vjp(lambda w: apply_fn(w, x_s), params)[1](v))(outputs)
    if not _depends(pull.jaxpr):
        raise ValueError(
            "the outputs of apply_fn do not depend on params at all, so that training cannot move them. The usual slip "
            "is an apply_fn that calls a model with weights of its own: build the model from params inside of it, "
            "nnx.merge(graphdef, params)(x) or equinox.combine(params, static)(x); another is jax.lax.stop_gradient."
        )


def _depends(jaxpr: Any) -> bool:
    """Whether an output of a jaxpr is reached from its inputs; calls count as passing everything on."""
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not hasattr(var, "val") and var in reached for var in eqn.invars):
            reached.update(eqn.outvars)
    return any(not hasattr(var, "val") and var in reached for var in jaxpr.outvars)


def check_finite(tree: PyTree, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
            where = name + jax.tree_util.keystr(path)
            bad = np.argwhere(~np.isfinite(np.asarray(leaf, np.complex128 if jnp.iscomplexobj(leaf) else np.float64)))
            first = f", the first at {[int(i) for i in bad[0]]}" if leaf.ndim else ""
            raise ValueError(f"{where} holds {len(bad)} NaN or infinite values{first}; remove or repair them.")


def check_finite_loss(loss: OutputLoss, outputs: Any) -> None:
    """At finite outputs a loss may overflow, exp does beyond 88 in float32."""
    for name, found in (("value", loss.value(outputs)), ("gradient", loss.grad(outputs))):
        if not bool(jnp.isfinite(found).all()):
            largest = float(jnp.abs(outputs).max())
            raise ValueError(
                f"the {name} of the {loss.name} loss is not finite at the first outputs, which are finite and at most "
                f"{largest:.4g} in size: it overflows {outputs.dtype}. Scale the outputs or the targets down."
            )
