"""The Jacobian of one example in factored form: what every product saw, and the cotangent at its result.

For a leaf used in products y = W x at `positions` r of `groups` g (convolution pixels, tokens, iterations of a scan),
the Jacobian is J[a] = Σ_r Δ[a, g, r, :] ⊗ A[g, r, :], A the activations and Δ[a] = ∂output_a/∂y the cotangents. Both
come from one reverse pass: zeros are added to every y, and the outputs are differentiated in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from entk._batching import map_examples
from entk._parameters import differentiable
from entk._precision import model_precision
from entk._structured.convolution import convolution
from entk._structured.products import Conv, Lookup, Sizes, Use
from entk._structured.uses import Scope, Uses
from entk._tracing.jaxpr import bind, intermediate_bytes, is_literal
from entk._types import ApplyFn, PyTree


class Factors(NamedTuple):
    """Factors of one leaf's Jacobian.

    Attributes:
      activation: (groups, positions, inputs), or (groups, positions) integers that stand for one-hot rows.
      cotangent: (outputs of the model c, groups, positions, outputs of the product).
    """

    activation: Array
    cotangent: Array


@dataclass(frozen=True)
class Part:
    """One summand of K: a leaf (with the bias added to its product), factored or as a Jacobian block.

    Attributes:
      leaves: indices of the parameter leaves; the second is the bias.
      uses: products with the leaf, positions of one leaf; empty for a leaf left to autodiff.
      mirrored: products with the transposed leaf (tied weights), inputs and outputs exchanged.
      reason: why the leaf is left to autodiff.
    """

    leaves: tuple[int, ...]
    num_params: int
    uses: tuple[Use, ...] = ()
    mirrored: tuple[Use, ...] = ()
    reason: str = ""

    @property
    def has_bias(self) -> bool:
        return len(self.leaves) == 2

    @property
    def sizes(self) -> tuple[Sizes, ...]:
        """Of the uses and, where there are any, of the mirrored ones; all positions of a kind together."""
        return tuple(_together(uses) for uses in (self.uses, self.mirrored) if uses)

    @property
    def layouts(self) -> Any:
        """Equal for two traces of a model whose factors belong together."""
        both = (*self.uses, *self.mirrored)
        return self.leaves, [(use.view.steps, use.layout, use.total._replace(positions=0)) for use in both]


def _together(uses: tuple[Use, ...]) -> Sizes:
    return uses[0].total._replace(positions=sum(use.total.positions for use in uses))


class FactoredModel:
    """`apply_fn` on inputs of one shape: its parts, and the factors of an example.

    Attributes:
      parts: summands of K, every floating leaf in exactly one; with `factor=False` all by autodiff.
      num_outputs: c.
      dtype: of the outputs.
      residual_bytes, largest_bytes: all intermediate results of one example's forward pass, and the largest.
    """

    def __init__(self, apply_fn: ApplyFn, params: PyTree, x: PyTree, *, factor: bool = True):
        leaves, rebuild = differentiable(params)
        self._leaves = [jnp.asarray(leaf) for leaf in leaves]

        def outputs(leaves, x_i):
            return apply_fn(rebuild(leaves), jax.tree.map(lambda leaf: leaf[None], x_i)).reshape(-1)

        spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), x)
        with model_precision():
            closed, out = jax.make_jaxpr(outputs, return_shape=True)(self._leaves, spec)
        self._outputs, self._scope = outputs, None
        self.num_outputs, self.dtype = out.shape[0], out.dtype
        try:
            found = Uses(closed, len(leaves))
            self._scope = found.scope
            self.parts = _divide(found if factor else None, self._leaves)
            self.residual_bytes, self.largest_bytes = intermediate_bytes(found.scope.jaxpr)
            jax.eval_shape(lambda x_i: self._tapped(self._leaves, self._taps(), x_i), spec)
        except Exception as error:  # of whatever kind: jaxprs change from one release of JAX to the next
            self._scope = None
            self.parts = _by_autodiff(self._leaves, f"is in a model that cannot be read: {error!r}")
            self.residual_bytes = self.largest_bytes = sum(leaf.nbytes for leaf in self._leaves)

    def factors(self, x_i: PyTree) -> list[tuple[Factors | None, Factors | None] | Array]:
        """Per part: factors of its uses and of its mirrored uses, or its (c, leaf size) Jacobian block."""
        by_autodiff = [part.leaves[0] for part in self.parts if not part.uses]

        def outputs(taps, chosen):
            leaves = list(self._leaves)
            for index, leaf in zip(by_autodiff, chosen, strict=True):
                leaves[index] = leaf
            return self._tapped(leaves, taps, x_i)

        with model_precision():
            out, pull, activations = jax.vjp(
                outputs, self._taps(), [self._leaves[index] for index in by_autodiff], has_aux=True
            )
            cotangents, blocks = map_examples(pull, jnp.eye(self.num_outputs, dtype=out.dtype), None)
        blocks = dict(zip(by_autodiff, blocks, strict=True))

        def join(uses):
            return _join(uses, activations, cotangents, jnp.promote_types(self.dtype, jnp.float32))

        return [
            (join(part.uses), join(part.mirrored))
            if part.uses
            else blocks[part.leaves[0]].reshape(self.num_outputs, -1)
            for part in self.parts
        ]

    def _taps(self) -> dict[int, Array]:
        """Zeros to be added to the result of every use, by its number."""
        uses = [use for part in self.parts for use in (*part.uses, *part.mirrored)]
        return {use.index: jnp.zeros((*use.loops, *use.shape), use.dtype) for use in uses}

    def _tapped(self, leaves: list[Array], taps: dict[int, Array], x_i: PyTree) -> tuple[Array, dict[int, Array]]:
        """The outputs of an example with `taps` added to the results of their uses, and what those uses saw."""
        if self._scope is None:
            return self._outputs(leaves, x_i), {}
        args = [*leaves, *jax.tree.leaves(x_i)]
        (out,), activations = _evaluate(self._scope, args, taps, [False] * len(args))
        return out, activations


def _join(
    uses: tuple[Use, ...], activations: dict[int, Array], cotangents: dict[int, Array], wide: jnp.dtype
) -> Factors | None:
    """The factors of several uses of one leaf, one after the other along the positions; no wider than the kernel."""
    if not uses:
        return None
    one_hot = any(isinstance(use, Lookup) for use in uses) and not all(isinstance(use, Lookup) for use in uses)
    seen, pulled = [], []
    for use in uses:
        activation, cotangent = activations[use.index], use.cotangent(cotangents[use.index])
        if isinstance(use, Lookup) and one_hot:
            activation = jax.nn.one_hot(activation, use.sizes.inputs, dtype=use.dtype)
        if use.view.scale != 1.0:  # of the weight alone: a bias has the cotangent as it is, an index cannot be scaled
            if isinstance(use, Lookup):
                cotangent = cotangent.astype(wide) * use.view.scale
            else:  # float16 would overflow where the product does not
                activation = activation.astype(wide) * use.view.scale
        pulled.append(use.merge_loops(_narrowed(cotangent, wide), 1, 1))
        seen.append(use.merge_loops(_narrowed(activation, wide), 0, activation.ndim - len(use.loops) - 2))
    return Factors(jnp.concatenate(seen, axis=1), jnp.concatenate(pulled, axis=2))


def _narrowed(array: Array, wide: jnp.dtype) -> Array:
    """In float32 at most for a float32 model that computes a product in float64."""
    return array.astype(wide) if array.dtype.itemsize > wide.itemsize else array


def _evaluate(
    scope: Scope, args: list[Array], taps: dict[int, Array], depends: list[bool]
) -> tuple[list[Array], dict[int, Array]]:
    """Runs a jaxpr with `taps` added to the results of its uses; also returns what those uses saw.

    `depends` says which arguments depend on taps: only there does a convolution need the gradient in its input.
    """
    dependent = {var for var, is_dependent in zip(scope.jaxpr.invars, depends, strict=True) if is_dependent}
    values = dict(zip([*scope.jaxpr.constvars, *scope.jaxpr.invars], [*scope.consts, *args], strict=True))
    activations: dict[int, Array] = {}

    def read(var):
        return var.val if is_literal(var) else values[var]

    for number, eqn in enumerate(scope.jaxpr.eqns):
        operands = [read(var) for var in eqn.invars]
        inner, use = scope.inner.get(number), scope.uses.get(number)
        wanted = inner.indices() & taps.keys() if inner is not None else set()
        touched = [not is_literal(var) and var in dependent for var in eqn.invars]
        if inner is not None and wanted:
            run = _evaluate if inner.scan is None else _evaluate_scan
            results, seen = run(inner, operands, {index: taps[index] for index in wanted}, touched)
            activations.update(seen)
        elif isinstance(use, Conv) and touched[0]:
            results = [convolution(eqn, *operands)]
        else:
            results = bind(eqn, operands)
        if use is not None and use.index in taps:
            activations[use.index] = use.activation(operands)
            results = [results[0] + taps[use.index]]
        if any(touched) or wanted or (use is not None and use.index in taps):
            dependent.update(eqn.outvars)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in scope.jaxpr.outvars], activations


def _evaluate_scan(scope: Scope, operands, taps, touched) -> tuple[list[Array], dict[int, Array]]:
    """A scan whose taps are scanned over too, and whose activations are stacked like its results."""
    assert scope.scan is not None
    _, num_consts, num_carry, *_ = scope.scan
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    depends = [*touched[:num_consts], *[True] * num_carry, *touched[num_consts + num_carry :]]

    def body(carry, slices):
        slices, taps = slices
        results, seen = _evaluate(scope, [*consts, *carry, *slices], taps, depends)
        return results[:num_carry], (results[num_carry:], seen)

    options = {"length": scope.scan.length, "reverse": scope.scan.reverse, "unroll": scope.scan.unroll}
    carry, (stacked, seen) = lax.scan(body, carry, (operands[num_consts + num_carry :], taps), **options)
    return [*carry, *stacked], seen


def _divide(found: Uses | None, leaves: list[Array]) -> list[Part]:
    """Every leaf into one part: factored where its uses fit together, else by autodiff."""
    if found is None:
        return _by_autodiff(leaves, "is used differently for x1 and x2")
    by_leaf: dict[int, list[Use]] = {}
    for use in found.uses:
        by_leaf.setdefault(use.view.leaf, []).append(use)
    parts, in_a_part = [], set()
    reasons = dict(found.opaque)
    for leaf, uses in by_leaf.items():
        if not leaves[leaf].size:
            continue
        if leaf in reasons or leaf in found.biases:
            reasons.setdefault(leaf, "is a weight and a bias")
            continue
        first = uses[0]
        straight = [use for use in uses if _same(use, first)]
        mirrored = [use for use in uses if not _same(use, first) and _is_mirrored(use, first)]
        if len(straight) + len(mirrored) < len(uses):
            reasons[leaf] = "is used in several shapes"
            continue
        bias = [  # added to every product with the leaf: then it is one more input of each, always 1
            other
            for other, added_to in found.biases.items()
            if not mirrored
            and sorted(added_to) == [use.index for use in uses]
            and other not in by_leaf
            and other not in reasons
        ]
        owned = (leaf, *bias[:1])
        in_a_part.update(owned)
        parts.append(Part(owned, sum(leaves[k].size for k in owned), tuple(straight), tuple(mirrored)))
    for leaf, array in enumerate(leaves):
        if leaf not in in_a_part and array.size:
            reason = reasons.get(leaf) or ("is the bias of a shared product" if leaf in found.biases else "is not used")
            parts.append(Part((leaf,), array.size, reason=reason))
    return sorted(parts, key=lambda part: part.leaves)


def _by_autodiff(leaves: list[Array], reason: str) -> list[Part]:
    return [Part((k,), leaf.size, reason=reason) for k, leaf in enumerate(leaves) if leaf.size]


def _same(use: Use, other: Use) -> bool:
    return use.view.steps == other.view.steps and use.layout == other.layout


def _is_mirrored(use: Use, other: Use) -> bool:
    groups, inputs, outputs = use.layout if len(use.layout) == 3 and use.layout[0] != "conv" else (None, None, None)
    return use.view.steps == other.view.steps and other.layout == (groups, outputs, inputs) and groups == ()
