"""Mean and spread of the per-example gradients, without an array of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from entk._checks import PyTree, check_microbatch_size, check_params, num_examples
from entk._contractions import JacobianBlocks
from entk._factors import FactoredModel, Part
from entk._independence import check_independent, kind, one_row, passed, remember
from entk._jacobian import free_promotion
from entk._misuse import check_function
from entk._params import differentiable
from entk._pinned import Pinned, pin
from entk._structured import Choice, example_bytes

BLOCK_BYTES = 2**26  # of per-example gradients and intermediate results, where microbatch_size leaves the choice


class GradientMoments(NamedTuple):
    """Moments of the gradients g_i of n examples, under the names that optax gives them; see `gradient_moments`.

    Args:
      mean_grads: ḡ = (1/n) Σ g_i, a pytree like params.
      sum_sq_diff_grads: Σ (g_i − ḡ)², entry by entry, a pytree like params.
      sample_size: n.

    Returns:
      A named tuple.

    Raises: nothing.

    Cost: two copies of params.

    Example:
      >>> from entk import GradientMoments
      >>> GradientMoments(0.5, 2.0, 8).sum_sq_diff_grads / 7  # the unbiased variance of one example's gradient
      0.2857142857142857
    """

    mean_grads: PyTree
    sum_sq_diff_grads: PyTree
    sample_size: int


def gradient_moments(
    loss_fn: Callable[[PyTree, PyTree], Any], params: PyTree, batch: PyTree, *, microbatch_size: int | None = None
) -> GradientMoments:
    """Mean gradient and Σ (g_i − ḡ)² for every parameter, exact, without a (n, p) array (theory §7.1).

    For a leaf used once an example, g_i = a_i ⊗ δ_i, and Σ g_i² = (a²)ᵀ(δ²) is one more matrix product. Leaves used
    at many positions (convolutions, sequences) and leaves left to autodiff take per-example gradients, a microbatch at
    a time. Microbatches are joined by the update of Chan, Golub & LeVeque.

    Args:
      loss_fn: pure function `(params, batch) -> losses` of shape (n,), one an example, or their mean, a scalar. It has
        to treat examples independently, wherever they are in the batch. It is compiled once for what it closes over.
      params: pytree whose floating-point leaves share one dtype; others are constants, with float0 moments.
      batch: pytree of arrays with n rows, e.g. `(x, y)`.
      microbatch_size: examples differentiated at once; a remainder is allowed. None chooses for about 64 MiB.

    Returns:
      `GradientMoments`; `update(moments.mean_grads, state, params, **moments._asdict())` hands them to a gate.

    Raises:
      TypeError, ValueError: parameters or losses of other kinds than above; a scalar loss that is not the mean over
        examples (a mean over the tokens of all sequences is none), a loss that mixes them or depends on their place.
        Both are looked for where values are at hand: not inside `jax.jit`.

    Errors: a leaf used once an example subtracts n ḡ² from Σ g_i², so its result carries a rounding error of about
    ε Σ g_i² (clipped at zero): harmless unless |ḡ| is 1/√ε times the spread.

    Cost: two forward passes to check the loss, one forward and backward pass, and one more product a dense leaf.
    Memory: microbatch_size examples' intermediate results and gradients of leaves with many positions, four copies of
    params.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import gradient_moments
      >>> squared = lambda w, batch: (batch[0] @ w - batch[1]) ** 2 / 2
      >>> batch = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, -1.0])
      >>> gradient_moments(squared, jnp.zeros(2), batch)
      GradientMoments(mean_grads=Array([0., 1.], dtype=float64), sum_sq_diff_grads=Array([2., 2.], dtype=float64), \
sample_size=2)
    """
    microbatch_size = check_microbatch_size(microbatch_size)
    check_params(params)
    n = num_examples(batch, "batch")
    loss_fn = _pin_loss(loss_fn, params, batch, n)
    with free_promotion():
        mean, spread = _moments(loss_fn, params, batch, microbatch_size)
    _, rebuild = differentiable(jax.tree.map(_float0, params))
    return GradientMoments(rebuild(mean), rebuild(spread), n)


def _float0(leaf: Any) -> Any:
    """The leaf itself where it is differentiated, the zero tangent of a constant elsewhere."""
    is_parameter = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return leaf if is_parameter else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


@partial(jax.jit, static_argnums=(0, 3))
def _moments(loss_fn, params, batch, microbatch_size):
    def losses(params, batch):
        return jnp.asarray(loss_fn(params, batch)).reshape(-1)

    n = jax.tree.leaves(batch)[0].shape[0]
    model = FactoredModel(losses, params, batch)
    leaves = [jnp.asarray(leaf) for leaf in differentiable(params)[0]]
    if microbatch_size is None:
        per_example = [part for part in model.parts if not _is_one_product(part)]
        choices = [Choice(part, JacobianBlocks(), JacobianBlocks().cost(part, 1)) for part in per_example]
        microbatch_size = max(1, BLOCK_BYTES // example_bytes(model, choices))
    size = min(microbatch_size, n)

    def of_block(block):
        factors = jax.vmap(model.factors)(block)
        mean = [jnp.zeros(leaf.shape, _wide(leaf)) for leaf in leaves]  # empty leaves are in no part
        spread = list(mean)
        for part, one in zip(model.parts, factors, strict=True):
            for leaf, (first, second) in _of_part(part, one, leaves).items():
                mean[leaf], spread[leaf] = first, second
        return mean, spread

    def join(state, block):
        count, mean, spread = state
        more = jax.tree.leaves(block)[0].shape[0]
        other_mean, other_spread = of_block(block)
        share = more / (count + more)
        shift = jax.tree.map(jnp.subtract, other_mean, mean)
        mean = jax.tree.map(lambda mean, shift: mean + share * shift, mean, shift)
        spread = jax.tree.map(
            lambda spread, other, shift: spread + other + count * share * shift**2, spread, other_spread, shift
        )
        return count + more, mean, spread

    if size == n:
        return of_block(batch)

    whole = n // size * size
    blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, size, *leaf.shape[1:]), batch)
    zeros = [jnp.zeros(leaf.shape, _wide(leaf)) for leaf in leaves]
    state = jnp.zeros((), jnp.promote_types(model.dtype, jnp.float32)), zeros, zeros  # bfloat16 counts to 256
    state, _ = lax.scan(lambda state, block: (join(state, block), None), state, blocks)
    if whole < n:
        state = join(state, jax.tree.map(lambda leaf: leaf[whole:], batch))
    return state[1:]


def _wide(leaf: Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _is_one_product(part: Part) -> bool:
    """Used at one position an example: the gradient is one outer product."""
    return len(part.sizes) == 1 and part.sizes[0].positions == 1


def _of_part(part: Part, factors: Any, leaves: list[Array]) -> dict[int, tuple[Array, Array]]:
    """(ḡ, Σ (g_i − ḡ)²) of a block of examples, for the leaves of one part."""
    first = part.leaves[0]
    wide = _wide(leaves[first])
    if not part.uses:
        return {first: _two_passes(factors[:, 0].astype(wide).reshape(-1, *leaves[first].shape))}
    straight, mirrored = factors
    use = part.uses[0]
    found = {}
    if part.has_bias:
        bias = part.leaves[1]
        pulled = straight.cotangent[:, 0].sum((1, 2)).astype(wide)
        found[bias] = _two_passes(pulled.reshape(-1, *leaves[bias].shape))
    if _is_one_product(part):
        seen, pulled = straight.activation[:, :, 0], straight.cotangent[:, 0, :, 0]
        n = seen.shape[0]
        if jnp.issubdtype(seen.dtype, jnp.integer):
            seen = jax.nn.one_hot(seen, part.sizes[0].inputs, dtype=pulled.dtype)
        seen, pulled = seen.astype(wide), pulled.astype(wide)
        mean = jnp.einsum("ngd,ngh->gdh", seen, pulled, precision=lax.Precision.HIGHEST) / n
        squares = jnp.einsum("ngd,ngh->gdh", seen**2, pulled**2, precision=lax.Precision.HIGHEST)
        both = mean, jnp.maximum(squares - n * mean**2, 0)
    else:
        blocks = jax.vmap(lambda *factors: JacobianBlocks().prepare(part, factors)[0][0])(straight, mirrored)
        groups, _, inputs, outputs = part.sizes[0]
        gradients = blocks.reshape(-1, groups, outputs, inputs).astype(wide)
        both = _two_passes(jnp.swapaxes(gradients, -1, -2))
    found[first] = jax.tree.map(lambda one: use.to_leaf(one, leaves[first]), both)
    return found


def _two_passes(gradients: Array) -> tuple[Array, Array]:
    mean = gradients.mean(0)
    return mean, ((gradients - mean) ** 2).sum(0)


def _pin_loss(loss_fn: Any, params: PyTree, batch: PyTree, n: int) -> Pinned:
    """The loss as it is now (see `entk._pinned`), checked: one loss an example, or the mean over examples."""
    if not isinstance(loss_fn, Pinned):
        check_function(loss_fn, "loss_fn")
    loss_fn = pin(loss_fn, (params, one_row(batch)))
    found = "losses", loss_fn, kind(params), kind(batch)
    shape = passed(found)
    if shape is None:
        out = jax.eval_shape(loss_fn, params, batch)
        if not isinstance(out, jax.ShapeDtypeStruct) or out.shape not in ((), (n,)):
            returned = getattr(out, "shape", jax.tree.structure(out))
            raise ValueError(
                f"loss_fn returns {returned}, but must return ({n},), one loss an example, or their mean, a scalar; "
                "return the losses alone."
            )
        shape = out.shape
        if not loss_fn.is_traced:
            remember(found, shape)
    check_independent(loss_fn, params, batch, "batch", is_mean=shape == ())
    return loss_fn
