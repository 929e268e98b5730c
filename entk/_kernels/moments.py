"""Mean and spread of the per-example gradients, without an array of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from entk._batching import map_examples, one_row
from entk._checks.arguments import check_params, num_examples
from entk._checks.counts import check_microbatch_size
from entk._checks.independence import check_independent
from entk._checks.misuse import check_function
from entk._checks.passed import kind, passed, remember
from entk._kernels.row_moments import add_examples, no_examples, over_all
from entk._parameters import differentiable
from entk._precision import free_promotion
from entk._structured.contractions import JacobianBlocks
from entk._structured.factors import FactoredModel, Part
from entk._structured.products import Lookup
from entk._structured.strategy import example_bytes
from entk._tracing.pinned import Pinned, pin
from entk._types import PyTree

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

    For a leaf used once per example, g_i = a_i ⊗ δ_i, and Σ g_i² = (a²)ᵀ(δ²) is one more matrix product. In a table
    that examples index, g_i is zero but in the rows that example i takes, and those rows alone are read and written.
    Leaves used at many positions (convolutions, sequences), leaves used in both ways (an embedding tied to the logits)
    and leaves left to autodiff take per-example gradients, a microbatch at a time. Microbatches are joined by the
    update of Chan, Golub & LeVeque.

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

    Errors: a leaf that is multiplied once per example subtracts n ḡ² from Σ g_i² (n of a microbatch), so its result
    carries a rounding error of about ε Σ g_i² (clipped at zero): harmless unless |ḡ| is 1/√ε times the spread. All
    others sum squares of deviations.

    Cost: two forward passes to check the loss, one forward and backward pass, and one more product per dense leaf; per
    table a few passes over the rows that are taken, sorted within each example that takes several. Memory: the two
    results, and intermediate results of microbatch_size examples; for leaves other than tables also microbatch_size
    gradients of those that take per-example gradients, and with several microbatches two more copies.

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
    tables = {part.leaves[0]: part for part in model.parts if _is_table(part)}
    size = min(microbatch_size or max(1, BLOCK_BYTES // _example_bytes(model)), n)

    def of_block(block, seen):
        """Moments of a block in all leaves but tables, and those of tables with the block's examples added."""
        factors: list[Any] = map_examples(model.factors, block, None)
        mean, spread = zeros(), zeros()  # empty leaves are in no part
        seen = dict(seen)
        for part, one in zip(model.parts, factors, strict=True):
            if (table := part.leaves[0]) in tables:
                seen[table] = add_examples(seen[table], one[0].activation, one[0].cotangent[:, 0], n)
            else:
                for leaf, both in _of_part(part, one, leaves).items():
                    mean[leaf], spread[leaf] = both
        return mean, spread, seen

    def zeros():
        return {k: jnp.zeros(leaf.shape, _wide(leaf)) for k, leaf in enumerate(leaves) if k not in tables}

    def join(state, block):
        count, mean, spread, seen = state
        more = jax.tree.leaves(block)[0].shape[0]
        other_mean, other_spread, seen = of_block(block, seen)
        share = more / (count + more)
        shift = jax.tree.map(jnp.subtract, other_mean, mean)
        mean = jax.tree.map(lambda mean, shift: mean + share * shift, mean, shift)
        spread = jax.tree.map(
            lambda spread, other, shift: spread + other + count * share * shift**2, spread, other_spread, shift
        )
        return count + more, mean, spread, seen

    seen = {leaf: no_examples(part.sizes[0], _wide(leaves[leaf])) for leaf, part in tables.items()}
    if size == n:
        mean, spread, seen = of_block(batch, seen)
    else:
        whole = n // size * size
        blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, size, *leaf.shape[1:]), batch)
        count = jnp.zeros((), jnp.promote_types(model.dtype, jnp.float32))  # bfloat16 counts to 256
        state, _ = lax.scan(lambda state, block: (join(state, block), None), (count, zeros(), zeros(), seen), blocks)
        if whole < n:
            state = join(state, jax.tree.map(lambda leaf: leaf[whole:], batch))
        _, mean, spread, seen = state
    for table, part in tables.items():
        both = over_all(seen[table], n)
        mean[table], spread[table] = (part.uses[0].to_leaf(one, leaves[table]) for one in both)
    return [mean[k] for k in range(len(leaves))], [spread[k] for k in range(len(leaves))]


def _wide(leaf: Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _is_one_product(part: Part) -> bool:
    """Used at one position an example: the gradient is one outer product."""
    return len(part.sizes) == 1 and part.sizes[0].positions == 1


def _is_table(part: Part) -> bool:
    """Used by index alone: the gradient is zero in the rows that an example does not take."""
    return bool(part.uses) and not part.mirrored and all(isinstance(use, Lookup) for use in part.uses)


def _example_bytes(model: FactoredModel) -> int:
    """What one example of a block holds: its passes through the model, and what becomes of its factors."""
    return example_bytes(model, []) + sum(map(_numbers, model.parts)) * max(model.dtype.itemsize, 4)


def _numbers(part: Part) -> int:
    """Numbers held of one example for a part: factors, and what is formed of them."""
    if _is_table(part):
        groups, positions, _, outputs = part.sizes[0]
        return 4 * groups * positions * (outputs + 1)
    factors = sum(groups * positions * (inputs + outputs) for groups, positions, inputs, outputs in part.sizes)
    return 2 * factors if _is_one_product(part) else factors + 2 * part.num_params


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
    """The loss as it is now (see `entk._tracing.pinned`), checked: one loss an example, or the mean over examples."""
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
