"""The signal channel while training goes on: probes that follow the run, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from entk import NtkOperator, top_eigenpairs
from entk.internal import Pinned, check_count
from gramian._losses import OutputLoss
from gramian._pinning import pinned_run
from gramian._run.linear_update import FrozenUpdate
from gramian._run.step import Data, Probes, Shared, Sums, carry, no_sums, start_probes, take
from gramian._run.training import TrainState, check_optimizer, check_training

PyTree = Any


class LiveState(NamedTuple):
    """Probes, what they share, and the sums up to the last interval's end; a pytree of arrays.

    Of the interval under way: its number of steps so far, the parameters it began with, what has moved in it.
    """

    probes: Probes
    shared: Shared
    sums: Sums
    drift: Array
    steps: Array
    begin: PyTree
    moves: PyTree
    motion: Float[Array, "r r"]


class LiveInfo(NamedTuple):
    """The channel at the end of the last whole interval.

    Attributes:
      gramian_eigenvalues: of W on the span of the probes, descending, (r,): each at most the eigenvalue of W of the
        same rank.
      motion_eigenvalues: of V there.
      left: ‖P ψ‖ of every probe.
      drift: by how much P ψ has changed at most within one interval, relative to ‖P ψ‖, over the run: the relative
        error that an `every` above 1 makes in each interval's steps; with `every=1` nothing is neglected.
    """

    gramian_eigenvalues: Float[Array, " r"]
    motion_eigenvalues: Float[Array, " r"]
    left: Float[Array, " r"]
    drift: Float[Array, ""]


@dataclass(frozen=True, eq=False)
class LiveChannel:
    """Follows r directions of output space through training as it happens: an (init, update) pair (theory §4).

    On the span of the probes W and V are exact, to the quadrature; what they hold outside of it is not seen. The
    default probes are the top eigenvectors of K_SS at the start, where the flow's W begins: W(t) = K_SS t + O(t²).

    With `every` = m > 1 an interval of m steps is carried to the outputs as one: Σ_k DW_k at the real gradients of
    every step, batch and optimizer state, but on the probes as they were when the interval began, and J, B averaged
    along the chord of the parameters. The error is of first order in the motion of P within an interval, which
    `info.drift` measures. Where it nears 1 the period is too long, and probes may diverge, as gradient descent does
    with too large a step.

    Args:
      apply_fn, loss, x_s: as in `gradient_flow`.
      optimizer: the optax transformation of the loop.
      rank: number of probes r.
      every: steps that are carried to all training points at once.
      quadrature: Gauss points of the averages along an interval.

    Extra arguments of the optimizer's `update` are not supported.

    Raises:
      ValueError: an optimizer that is not linear in the gradients given its realized state.

    Cost: an update takes the step's own gradient again, and for every probe one product with Jᵀ on the batch; every
    m-th also quadrature products with J on all of x_s. Memory: two or three times r·p numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gramian import LiveChannel, squared_loss
      >>> x, loss, tx = jnp.diag(jnp.arange(1.0, 5.0)), squared_loss(jnp.ones(4)), optax.sgd(0.1)
      >>> w = jnp.zeros(4)
      >>> opt_state, live = tx.init(w), LiveChannel(lambda w, x: x @ w, loss, x, tx, rank=2)
      >>> state = live.init(w, opt_state)
      >>> for _ in range(2):
      ...     state, info = live.update(state, w, opt_state, jnp.arange(4))
      ...     updates, opt_state = tx.update(x.T @ (x @ w - 1) / 4, opt_state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> info.gramian_eigenvalues.round(3)  # of n/2 = 2, what the two largest kernel eigenvalues have dissipated
      Array([1.741, 1.278], dtype=float64)
    """

    apply_fn: Any
    loss: OutputLoss
    x_s: PyTree
    optimizer: optax.GradientTransformation
    rank: int = field(default=8, kw_only=True)
    every: int = field(default=1, kw_only=True)
    quadrature: int = field(default=1, kw_only=True)

    def init(self, params: PyTree, opt_state: PyTree, probes: Float[Array, "N r"] | None = None) -> LiveState:
        """Probes at the step before which this is called; orthonormal columns, or the top eigenvectors of K_SS."""
        check_training(self.apply_fn, params, self.x_s, self.loss)
        check_optimizer(self.optimizer)
        self.__dict__.pop("_begun", None)
        apply_fn = self._as_begun(params)[0]
        check_count("quadrature", self.quadrature)
        check_count("every", self.every)
        if probes is None:
            rank = check_count("rank", self.rank)
            kernel = NtkOperator(apply_fn, params, self.x_s)
            probes = top_eigenpairs(kernel, min(rank, kernel.shape[0]), key=jax.random.key(0)).vectors
        dtype = jax.tree.leaves(params)[0].dtype
        psi = jnp.linalg.qr(jnp.asarray(probes, dtype))[0].T
        update = self._as_begun(params)[2]
        shared, rows = start_probes(update, TrainState(params, opt_state), psi, 0)
        r = len(psi)
        moves = jax.tree.map(lambda leaf: jnp.zeros((r + 1, *jnp.shape(leaf)), dtype), params)
        begin = jax.tree.map(lambda leaf: jnp.array(leaf), params)  # of its own: the loop may donate its buffers
        numbers = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
        sums = no_sums(r, psi.shape[1], 0, dtype)
        return LiveState(rows, shared, sums, *numbers, begin, moves, jnp.zeros((r, r), dtype))

    def update(self, state: LiveState, params: PyTree, opt_state: PyTree, batch: Array) -> tuple[LiveState, LiveInfo]:
        """The step that takes (params, opt_state) on by the examples `batch`; called before or after it is taken."""
        apply_fn, loss, frozen = self._as_begun(params)
        data, now = Data(self.x_s, loss, None), TrainState(params, opt_state)
        static = apply_fn, frozen, self.quadrature, self.every
        return _update(*static, data, state, now, jnp.asarray(batch))

    def _as_begun(self, params) -> tuple[Pinned, OutputLoss, FrozenUpdate]:
        """Model, loss and optimizer as they were when following began."""
        if "_begun" not in self.__dict__:
            apply_fn, loss, optimizer, _ = pinned_run(self.apply_fn, params, self.x_s, self.loss, self.optimizer)
            self.__dict__["_begun"] = apply_fn, loss, FrozenUpdate(optimizer, params)
        return self.__dict__["_begun"]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _update(apply_fn, frozen, quadrature, every, data, state, now, batch):
    shared, probes = state.shared._replace(state=now), state.probes
    begin = jax.tree.map(lambda old, new: jnp.where(state.steps == 0, new, old), state.begin, now.params)
    taken = take(apply_fn, frozen, data, shared, probes, batch)
    moves, motion = jax.tree.map(jnp.add, (state.moves, state.motion), (taken.moves, taken.motion))
    history, forced_history, ones = taken.histories

    def go_on(_):
        kept = Shared(taken.state, ones, Probes(shared.forced.psi, forced_history), shared.direction)
        return LiveState(
            Probes(probes.psi, history), kept, state.sums, state.drift, state.steps + 1, begin, moves, motion
        )

    def finish(_):
        whole = taken._replace(moves=moves, motion=motion)
        interval = shared._replace(state=TrainState(begin, now.opt_state))
        after, carried, more = carry(apply_fn, quadrature, data, interval, probes, whole)
        size = jnp.linalg.norm(probes.psi, axis=1)
        changes = jnp.linalg.norm(carried.psi - probes.psi, axis=1) / jnp.where(size > 0, size, 1)
        sums, nothing = jax.tree.map(jnp.add, state.sums, more), jax.tree.map(jnp.zeros_like, (moves, motion))
        drift = jnp.maximum(state.drift, changes.max())
        return LiveState(carried, after, sums, drift, jnp.zeros_like(state.steps), begin, *nothing)

    state = jax.lax.cond(state.steps + 1 >= every, finish, go_on, None)
    info = LiveInfo(
        jnp.linalg.eigvalsh(state.sums.gramian[:-1, :-1])[::-1],
        jnp.linalg.eigvalsh(state.sums.motion)[::-1],
        jnp.linalg.norm(state.probes.psi, axis=1),
        state.drift,
    )
    return state, info
