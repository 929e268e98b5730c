"""One realized step: what it does to the run, and to every probe carried along it (theory §3).

Along realized steps everything is linear in the first output gradient once coefficients are frozen at their realized
values. With DW_k the map from it to the step Δw_k, J̄_k, B̄_k the Jacobian and Hessian averaged along the step:

    S_k = J̄_k DW_k,   P_{k+1} = P_k + B̄_k S_k,   D = −Σ S_k,   G = −Σ J̄_{Q,k} DW_k,
    W = −Σ [sym(P_kᵀ S_k) + S_kᵀ H̄_k S_k],   V = Σ DW_kᵀ N_k⁻¹ DW_k,

H̄_k = ∫ (1−θ) B(u_k + θΔu_k) dθ, and N_k the diagonal step that gradients of ones would have caused up to here: ηM_k
for SGD and Adam, η/(1−β) for heavy-ball momentum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from entk.internal import map_examples, matmul, model_precision
from gramian._losses import OutputLoss, block_product
from gramian._run.linear_update import FrozenUpdate
from gramian._run.training import TrainState, batch_gradient

PyTree = Any
POWER_STEPS = 3  # products with J̄_Q N J̄_Qᵀ a step, which go on from the last step's vector


class Data(NamedTuple):
    """Training inputs and loss, test inputs or None."""

    x_s: PyTree
    loss: OutputLoss
    x_q: PyTree | None


class Probes(NamedTuple):
    """Where r directions of output space have got to: P_k ψ, (r, N), and the optimizer's memory of each."""

    psi: Float[Array, "r N"]
    history: list[Array]


class Shared(NamedTuple):
    """What all probes see: the run itself, its response to a gradient of ones, what does not depend on gradients."""

    state: TrainState
    ones: list[Array]
    forced: Probes
    direction: Float[Array, " M"]


class Sums(NamedTuple):
    """Sums over steps, of r probes and, last, of the forced part.

    Attributes:
      moved: Σ J̄ Δw, (r + 1, N): −D ψ.
      moved_q: Σ J̄_Q Δw, (r + 1, M): −G ψ.
      gramian: Ψᵀ W Ψ, (r + 1, r + 1).
      motion: Ψᵀ V Ψ, (r, r).
      visibility: Σ λ_max(J̄_Q N J̄_Qᵀ), a scalar: the factor in the bound (I6′).
    """

    moved: Float[Array, "r1 N"]
    moved_q: Float[Array, "r1 M"]
    gramian: Float[Array, "r1 r1"]
    motion: Float[Array, "r r"]
    visibility: Float[Array, ""]


def start_probes(
    update: FrozenUpdate, state: TrainState, psi: Float[Array, "r N"], num_test: int
) -> tuple[Shared, Probes]:
    """r probes before the first step: P = I, and an optimizer that remembers nothing of them."""

    def repeated(leaves, r):
        return [jnp.broadcast_to(leaf, (r, *leaf.shape)) for leaf in leaves]

    nothing = update.init_history(state.opt_state)
    remembered = update.init_history(state.opt_state, forced=True)
    forced = Probes(jnp.zeros((1, psi.shape[1]), psi.dtype), repeated(remembered, 1))
    direction = jnp.ones(num_test, psi.dtype) / max(1, num_test) ** 0.5
    return Shared(state, nothing, forced, direction), Probes(psi, repeated(nothing, len(psi)))


def no_sums(r, num_train, num_test, dtype) -> Sums:
    shapes = (r + 1, num_train), (r + 1, num_test), (r + 1, r + 1), (r, r), ()
    return Sums(*(jnp.zeros(shape, dtype) for shape in shapes))


class Taken(NamedTuple):
    """A step, or several, as the run and every probe took it, before it is carried to the outputs.

    Attributes:
      state: after it.
      moves: Δw along each probe and, last, of the forced part, pytree of (r + 1, ...).
      motion: Ψᵀ V Ψ of it, (r, r).
      response: N, the diagonal step that gradients of ones would have caused up to here.
      histories: what the optimizer remembers of the probes, of the forced part, of gradients of ones.
    """

    state: TrainState
    moves: PyTree
    motion: Float[Array, "r r"]
    response: PyTree
    histories: tuple[list[Array], list[Array], list[Array]]


def realized_step(
    apply_fn: Any, update: FrozenUpdate, quadrature: int, data: Data, shared: Shared, probes: Probes, batch: Array
) -> tuple[Shared, Probes, Sums]:
    """One step of the run, and of every probe along it."""
    return carry(apply_fn, quadrature, data, shared, probes, take(apply_fn, update, data, shared, probes, batch))


def take(apply_fn: Any, update: FrozenUpdate, data: Data, shared: Shared, probes: Probes, batch: Array) -> Taken:
    """What the gradients of a batch move: DW_k. Costs a product with Jᵀ on the batch for every probe."""
    x_s, loss, _ = data
    (params, opt_state), n = shared.state, jax.tree.leaves(x_s)[0].shape[0]
    grads, pull, _ = batch_gradient(apply_fn, loss, x_s, params, batch)
    extras = update.extras(params, batch)

    def follow(psi, history, *, forced=False):
        """Δw along one probe: E_k weighs the examples of the batch by n / b."""
        pulled = pull(psi.reshape(n, -1)[batch] * (n / len(batch)))[0]
        return update(grads, opt_state, params, pulled, history, extras, forced=forced)[1]

    (updates, after), (response, ones) = update(
        grads, opt_state, params, jax.tree.map(jnp.ones_like, grads), shared.ones, extras
    )
    steps, history = map_examples(lambda probe: follow(*probe), probes, None)
    forced_steps, forced_history = map_examples(lambda probe: follow(*probe, forced=True), shared.forced, None)
    response = jax.tree.map(jnp.negative, response)
    moves = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), steps, forced_steps)
    state = TrainState(optax.apply_updates(params, updates), after)
    return Taken(state, moves, _motion(steps, response), response, (history, forced_history, ones))


def carry(
    apply_fn: Any, quadrature: int, data: Data, shared: Shared, probes: Probes, taken: Taken
) -> tuple[Shared, Probes, Sums]:
    """What the step does to the outputs, from the state in `shared` to that after it: P_{k+1}, and sums of D, G, W, V.

    Costs `quadrature` products with J on all points for every probe, and one evaluation more.
    """
    x_s, loss, x_q = data
    params, following, moves = shared.state.params, taken.state.params, taken.moves
    nodes, weights = (list(map(float, one)) for one in _gauss(quadrature))

    def averaged(product):
        """`product(w)`, a pytree, averaged along the step."""

        def add(total, node):
            place, weight = node
            value = product(jax.tree.map(lambda w, v: w + place.astype(w.dtype) * (v - w), params, following))
            return jax.tree.map(lambda sum_, one: sum_ + weight.astype(one.dtype) * one, total, value), None

        nothing = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), jax.eval_shape(product, params))
        return jax.lax.scan(add, nothing, (jnp.array(nodes), jnp.array(weights)))[0]

    def push(x, moves):
        def at(w):
            def along(dw):
                return jax.jvp(lambda w: rows(apply_fn, w, x), (w,), (dw,))[1].reshape(-1)

            return map_examples(along, moves, None)

        return averaged(at)

    pushed = push(x_s, moves)
    pushed_q = jnp.zeros((len(pushed), 0), pushed.dtype) if x_q is None else push(x_q, moves)
    before, behind = (rows(apply_fn, w, x_s) for w in (params, following))
    hessians = [loss.hessian(before + node * (behind - before)) for node in nodes]
    hessian = jnp.tensordot(jnp.array(weights, before.dtype), jnp.stack(hessians), 1)
    beyond = [weight * (1 - node) for node, weight in zip(nodes, weights, strict=True)]
    remainder = jnp.tensordot(jnp.array(beyond, before.dtype), jnp.stack(hessians), 1)

    psi = jnp.concatenate([probes.psi, shared.forced.psi])
    cross = matmul(psi, pushed.T)
    gramian = -(cross + cross.T) / 2 - matmul(pushed, block_product(remainder, pushed.T))
    psi = psi + block_product(hessian, pushed.T).T
    direction, top = shared.direction, jnp.zeros((), psi.dtype)
    if x_q is not None:

        def seen(v):  # J̄_Q N J̄_Qᵀ v
            pulled = averaged(lambda w: _pull(apply_fn, w, x_q, v))
            scaled = jax.tree.map(lambda one, diagonal: (one * diagonal)[None], pulled, taken.response)
            return push(x_q, scaled)[0]

        direction, top = _power(seen, direction)
    history, forced_history, ones = taken.histories
    sums = Sums(pushed, pushed_q, gramian, taken.motion, top)
    return Shared(taken.state, ones, Probes(psi[-1:], forced_history), direction), Probes(psi[:-1], history), sums


def rows(apply_fn, params, x):
    with model_precision():
        out = apply_fn(params, x)
    return out.reshape(out.shape[0], -1)


def _pull(apply_fn, params, x, v):
    out, pull = jax.vjp(lambda w: rows(apply_fn, w, x), params)
    return pull(v.reshape(out.shape))[0]


def _gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return (nodes + 1) / 2, weights / 2


def _motion(steps: PyTree, response: PyTree) -> Array:
    """DWᵀ N⁻¹ DW; where N is zero nothing has ever moved."""
    products = []
    for step, diagonal in zip(jax.tree.leaves(steps), jax.tree.leaves(response), strict=True):
        scaled = jnp.where(diagonal > 0, step / jnp.where(diagonal > 0, diagonal, 1), 0)
        products.append(matmul(scaled.reshape(len(step), -1), step.reshape(len(step), -1).T))
    return sum(products[1:], products[0])


def _power(product, direction):
    """The largest eigenvalue by power steps, as Rayleigh quotient plus residual, and where they ended."""

    def step(v, _):
        image = product(v)
        quotient, size = v @ image, jnp.linalg.norm(image)
        bound = quotient + jnp.linalg.norm(image - quotient * v)
        return jnp.where(size > 0, image / jnp.where(size > 0, size, 1), v), bound

    direction, bounds = jax.lax.scan(step, direction, length=POWER_STEPS)
    return direction, bounds[-1]
