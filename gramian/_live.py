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
from entk._checks import check_count
from gramian._frozen_update import FrozenUpdate
from gramian._losses import OutputLoss
from gramian._realized_step import Data, Probes, Shared, Sums, no_sums, realized_step, start_probes
from gramian._recording import TrainState, check_training

PyTree = Any


class LiveState(NamedTuple):
    """Probes, what they share, and the sums so far; a pytree of arrays."""

    probes: Probes
    shared: Shared
    sums: Sums


class LiveInfo(NamedTuple):
    """The channel after a step.

    Attributes:
      gramian_eigenvalues: of W on the span of the probes, descending, (r,): each at most the eigenvalue of W of the
        same rank.
      motion_eigenvalues: of V there.
      left: ‖P ψ‖ of every probe.
    """

    gramian_eigenvalues: Float[Array, " r"]
    motion_eigenvalues: Float[Array, " r"]
    left: Float[Array, " r"]


@dataclass(frozen=True, eq=False)
class LiveChannel:
    """Follows r directions of output space through training as it happens: an (init, update) pair (theory §4).

    On the span of the probes W and V are exact, to the quadrature; what they hold outside of it is not seen. The
    default probes are the top eigenvectors of K_SS at the start, where the flow's W begins: W(t) = K_SS t + O(t²).

    Args:
      apply_fn, loss, x_s: as in `gradient_flow`.
      optimizer: the optax transformation of the loop.
      rank: number of probes r.
      quadrature: Gauss points of the averages along a step.

    Raises:
      ValueError: an optimizer that is not linear in the gradients given its realized state.

    Cost: an update takes the step's own gradient again, and quadrature + 1 products with J a probe on all of x_s.

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
    quadrature: int = field(default=1, kw_only=True)

    def init(self, params: PyTree, opt_state: PyTree, probes: Float[Array, "N r"] | None = None) -> LiveState:
        """Probes at the step before which this is called; orthonormal columns, or the top eigenvectors of K_SS."""
        check_training(self.apply_fn, params, self.x_s, self.loss)
        check_count("quadrature", self.quadrature)
        if probes is None:
            rank = check_count("rank", self.rank)
            kernel = NtkOperator(self.apply_fn, params, self.x_s)
            probes = top_eigenpairs(kernel, min(rank, kernel.shape[0]), key=jax.random.key(0)).vectors
        dtype = jax.tree.leaves(params)[0].dtype
        psi = jnp.linalg.qr(jnp.asarray(probes, dtype))[0].T
        update = self._update_of(params)
        shared, rows = start_probes(update, TrainState(params, opt_state), psi, 0)
        return LiveState(rows, shared, no_sums(len(psi), psi.shape[1], 0, dtype))

    def update(self, state: LiveState, params: PyTree, opt_state: PyTree, batch: Array) -> tuple[LiveState, LiveInfo]:
        """The step that takes (params, opt_state) on by the examples `batch`; called before or after it is taken."""
        state = state._replace(shared=state.shared._replace(state=TrainState(params, opt_state)))
        data = Data(self.x_s, self.loss, None)
        return _update(self.apply_fn, self._update_of(params), self.quadrature, data, state, jnp.asarray(batch))

    def _update_of(self, params) -> FrozenUpdate:
        if "_frozen" not in self.__dict__:
            object.__setattr__(self, "_frozen", FrozenUpdate(self.optimizer, params))
        return self.__dict__["_frozen"]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _update(apply_fn, frozen, quadrature, data, state, batch):
    shared, probes, more = realized_step(apply_fn, frozen, quadrature, data, state.shared, state.probes, batch)
    sums = jax.tree.map(jnp.add, state.sums, more)
    info = LiveInfo(
        jnp.linalg.eigvalsh(sums.gramian[:-1, :-1])[::-1],
        jnp.linalg.eigvalsh(sums.motion)[::-1],
        jnp.linalg.norm(probes.psi, axis=1),
    )
    return LiveState(probes, shared, sums), info
