"""The flow as a plain ordinary differential equation in the parameters: the oracle for `gradient_flow`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from entk.internal import check_count, matmul
from gramian._checks import check_problem, check_real, check_times
from gramian._flow.flow import Flow, attainable
from gramian._losses import OutputLoss, block_product
from gramian._operators import Operators, init_operators
from gramian._pinning import pinned_problem
from gramian._problem import KernelSource

if TYPE_CHECKING:
    import diffrax

PyTree = Any


class _State(NamedTuple):
    params: PyTree
    operators: Operators | None


def reference_flow(
    apply_fn: Any,
    params: PyTree,
    x_s: PyTree,
    loss: OutputLoss,
    x_q: PyTree | None = None,
    *,
    t0: float = 0.0,
    t1: float,
    solver: diffrax.AbstractAdaptiveSolver | None = None,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    max_steps: int = 100_000,
    operators: bool = True,
) -> Flow:
    """Integrates ẇ = −J_Sᵀ∇Φ_S(u) from t0 to t1 with a general-purpose solver of diffrax: simple, slow, exact.

    P, W_S, D and G (theory §2, equations 5-8) are integrated in the same system, with kernels from
    `entk.empirical_ntk` at every evaluation. Nothing is frozen and nothing is shared with the exponential steppers, so
    that agreement with `gradient_flow` means something.

    Args:
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)` that treats examples independently.
      params: pytree of floating-point arrays of one dtype, p scalars: w(t0).
      x_s: training inputs, n examples.
      loss: convex loss of the outputs, e.g. `squared_loss(y_s)`.
      x_q: test inputs, m examples; None leaves G empty.
      t0, t1: training time, t1 > t0.
      solver: any adaptive solver of diffrax: `diffrax.Tsit5()` (explicit, order 5), which None stands for,
        `diffrax.Kvaerno5()` (implicit, for stiff flows), ...
      rtol, atol: local error of every step, root mean square over parameters and operators together, relative to the
        entries and absolute.
      max_steps: a flow that takes more trial steps is stopped with an error.
      operators: False integrates the parameters alone, without a single kernel; `Flow.operators` is None then.

    Returns:
      A `Flow`. Its history holds `t`, `h` and `loss` of the accepted steps; diffrax does not report their errors.

    Raises:
      TypeError, ValueError, MemoryError: as `gradient_flow`; also an rtol below what the dtype resolves.
      RuntimeError: more than max_steps, or steps that shrink to nothing.

    Not supported: observables, checkpoints; a loss that turns non-convex on the way is not noticed.

    Cost: an explicit solver takes a number of steps that grows with (t1 − t0)·λ_max(B K_SS); each evaluates both
    kernels 6 times and more (with operators=False: one vector-Jacobian product). An implicit one takes few, but solves
    dense systems of size p + 3·N² + M·N (with operators=False: p).

    Source: Kidger, "On Neural Differential Equations", arXiv:2202.02435 (diffrax).

    Example:
      >>> import jax.numpy as jnp
      >>> from gramian import reference_flow, squared_loss
      >>> loss = squared_loss(jnp.array([1.0, -1.0]))
      >>> flow = reference_flow(lambda w, x: x @ w, jnp.zeros(2), jnp.eye(2), loss, t1=2.0)
      >>> flow.params.round(6)
      Array([ 0.632121, -0.632121], dtype=float64)
    """
    import diffrax  # where it is called: it takes longer to import than the rest of the package

    source = KernelSource(apply_fn, x_s, x_q)
    t0, t1, _ = check_times(t0, t1)
    solver = diffrax.Tsit5() if solver is None else solver
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise TypeError(f"solver={solver!r} is not an adaptive solver of diffrax; pass e.g. diffrax.Tsit5().")
    max_steps = check_count("max_steps", max_steps)
    rtol, atol = check_real("rtol", rtol), check_real("atol", atol)
    check_problem(source, loss, params, operators=operators)
    source, loss = pinned_problem(source, loss, params)
    params = jax.tree.map(jnp.asarray, params)
    dtype = jax.tree.leaves(params)[0].dtype
    resolution = float(jnp.finfo(dtype).eps)
    if not rtol >= 10 * resolution or not atol >= 0:
        raise ValueError(
            f"rtol={rtol!r} must be at least {10 * resolution:.1g} for {dtype} and atol={atol!r} not negative: smaller "
            "errors are lost in rounding. Raise rtol, or pass float64 data and parameters."
        )
    # Times in the dtype of the parameters: diffrax would promote the parameters otherwise.
    numbers = [jnp.asarray(number, dtype) for number in (t0, t1, rtol, atol)]
    state, times, losses, stats, result = _solve(solver, max_steps, operators, source, loss, params, *numbers)
    if result != diffrax.RESULTS.successful:
        raise RuntimeError(
            f"{type(solver).__name__} gave up after {int(stats['num_steps'])} trial steps: {diffrax.RESULTS[result]} "
            "Raise max_steps or rtol, use a solver for stiff equations (diffrax.Kvaerno5()), or check apply_fn for "
            "outputs that are not finite."
        )
    num_steps = int(stats["num_accepted_steps"])
    times = np.asarray(times[: num_steps + 1], np.float64)
    return Flow(
        source=source,
        loss=loss,
        t0=t0,
        t1=t1,
        params0=params,
        params=state.params,
        operators=state.operators,
        history={"t": times[1:], "h": np.diff(times), "loss": np.asarray(losses[1 : num_steps + 1])},
        observed={},
        observables={},
        saved_params=(),
        num_steps=num_steps,
        num_rejected=int(stats["num_rejected_steps"]),
        tolerance=attainable(num_steps * rtol, source.outputs(params)[0]),
    )


def _field(t: Array, state: _State, problem: tuple[KernelSource, OutputLoss]) -> _State:
    """Right-hand sides of ẇ = −J_Sᵀg, from which (1)-(4) follow, and of equations (5)-(8)."""
    source, loss = problem
    u_s, _ = source.outputs(state.params)
    velocity = jax.tree.map(jnp.negative, source.pull(state.params, loss.grad(u_s)))
    if state.operators is None:
        return _State(velocity, None)
    p = state.operators.propagator
    moved = matmul(source.k_ss(state.params), p)
    return _State(
        velocity,
        Operators(
            propagator=-block_product(loss.hessian(u_s), moved),
            gramian=matmul(p.T, moved),
            displacement=moved,
            test_transfer=matmul(source.k_qs(state.params), p),
        ),
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(solver, max_steps, operators, source, loss, params, t0, t1, rtol, atol):
    import diffrax

    u_s, u_q = source.outputs(params)
    start = _State(params, init_operators(u_s.size, u_q.size, u_s.dtype) if operators else None)
    steps = diffrax.SubSaveAt(t0=True, steps=True, fn=lambda t, state, _: loss.value(source.outputs(state.params)[0]))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),  # pyright: ignore[reportArgumentType]
        solver,
        t0,
        t1,
        dt0=None,
        y0=start,
        args=(source, loss),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        saveat=diffrax.SaveAt(subs=[diffrax.SubSaveAt(t1=True), steps]),
        max_steps=max_steps,
        throw=False,
    )
    (_, times), (end, losses) = solution.ts, solution.ys  # pyright: ignore[reportGeneralTypeIssues]
    return jax.tree.map(lambda leaf: leaf[0], end), times, losses, solution.stats, solution.result
