"""Where a flow takes its kernels from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from entk import Structured, empirical_ntk
from entk.internal import Strategy, model_precision

PyTree = Any


@partial(jax.tree_util.register_dataclass, data_fields=["x_s", "x_q"], meta_fields=["apply_fn", "strategy"])
@dataclass(frozen=True)
class KernelSource:
    """A model on its training and test points: outputs, K_SS, K_QS and the products with J and Jᵀ.

    Attributes:
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)`.
      x_s: training inputs, n examples.
      x_q: test inputs, m examples, or None.
      strategy: how kernels are computed, and in how much memory (see `entk.empirical_ntk`).
    """

    apply_fn: Any
    x_s: PyTree
    x_q: PyTree | None = None
    strategy: Strategy = Structured()

    def outputs(self, params: PyTree) -> tuple[Float[Array, "n c"], Float[Array, "m c"]]:
        """Training and test outputs; (0, c) without test points."""
        u_s = self._rows(params, self.x_s)
        return u_s, u_s[:0] if self.x_q is None else self._rows(params, self.x_q)

    def k_ss(self, params: PyTree) -> Float[Array, "N N"]:
        return empirical_ntk(self.apply_fn, params, self.x_s, strategy=self.strategy)

    def k_qs(self, params: PyTree) -> Float[Array, "M N"]:
        if self.x_q is None:
            n, c = jax.eval_shape(self._rows, params, self.x_s).shape
            return jax.numpy.zeros((0, n * c), jax.tree.leaves(params)[0].dtype)
        return empirical_ntk(self.apply_fn, params, self.x_q, self.x_s, strategy=self.strategy)

    def pull(self, params: PyTree, v: Float[Array, " N"]) -> PyTree:
        """J_Sᵀ v, a pytree like params."""
        u, vjp = jax.vjp(lambda p: self._rows(p, self.x_s), params)
        return vjp(v.reshape(u.shape))[0]

    def push(self, params: PyTree, tangent: PyTree) -> tuple[Float[Array, "n c"], Float[Array, "m c"]]:
        """J_S Δw and J_Q Δw."""
        return jax.jvp(self.outputs, (params,), (tangent,))[1]

    def _rows(self, params, x):
        with model_precision():  # as in entk: its J and this one have to be the same
            out = self.apply_fn(params, x)
        return out.reshape(out.shape[0], -1)
