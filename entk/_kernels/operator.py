"""The empirical NTK as a matrix-free operator: products with K^M = J₁ M J₂ᵀ that never form it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from entk._batching import map_examples, sum_blocks
from entk._checks.apply import check_apply_pair, pin_model
from entk._checks.counts import check_count, check_microbatch_size
from entk._checks.memory import check_fits
from entk._kernels.ntk import empirical_ntk
from entk._parameters import differentiable, num_params
from entk._precision import free_promotion, model_precision
from entk._types import ApplyFn, PyTree


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, repr=False)
class NtkOperator:
    """The linear operator K^M = J₁ M J₂ᵀ with K^M v = J₁ (M (J₂ᵀ v)): one vjp, one scaling, one jvp (theory §1, §4).

    A pytree: `params`, `x1`, `x2` and `preconditioner` are data, the rest is static, so it can be built from new
    parameters and passed to a jitted function without compiling anew.

    Args:
      apply_fn: pure function `(params, x) -> (n, ...)` that treats examples independently; c outputs an example, of any
        shape, flattened by rows. The operator is this function as it is when the operator is made: where a flag, an
        array or statistics that it reads change later, products that have been compiled go on as before, and one for
        which a program would have to be made of the changed function is refused.
      params: pytree whose floating-point leaves, p scalars in all, share one dtype; other leaves are constants.
      x1: inputs of the rows, n₁ examples.
      x2: inputs of the columns, n₂ examples; None means x1, and then the operator is symmetric and PSD.
      preconditioner: diagonal of M ⪰ 0, a pytree like params with its dtype, e.g. Adam's realized 1/(√v̂ + ε); entries
        at constant leaves of params are not used. None is the identity.
      microbatch_size: examples whose activations a product holds at once; a remainder is allowed. None holds all.
      probe_batch_size: columns of a block (N, r) that are multiplied at once; a remainder is allowed. None takes all r.

    Returns:
      An operator with `shape` (n₁·c, n₂·c), rows and columns in the order of `empirical_ntk`, `dtype`, `mv`,
      `transpose_mv`, `as_matrix` and the transpose `T`.

    Raises:
      TypeError, ValueError: as `empirical_ntk`; a preconditioner of another structure, shape or dtype than params, or,
        where its values are known, with entries that are negative or not finite; sizes that are not positive.
      RuntimeError: from a product, where apply_fn has changed since and a new program is needed.

    Cost: here only the checks, one trace and two evaluations of apply_fn. A product takes about four forward passes a
    vector and holds min(r, probe_batch_size) copies of params, twice as many with a microbatch_size, beside the
    activations of microbatch_size examples.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import NtkOperator
      >>> linear = lambda w, x: x @ w
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> k = NtkOperator(linear, jnp.ones(2), x, preconditioner=jnp.array([1.0, 0.5]))
      >>> k
      NtkOperator(shape=(2, 2), dtype=float64)
      >>> k.mv(jnp.array([1.0, -1.0]))
      Array([ -4., -10.], dtype=float64)
    """

    apply_fn: ApplyFn
    params: PyTree
    x1: PyTree
    x2: PyTree | None = None
    preconditioner: PyTree | None = field(default=None, kw_only=True)
    microbatch_size: int | None = field(default=None, kw_only=True)
    probe_batch_size: int | None = field(default=None, kw_only=True)
    num_outputs: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "apply_fn", pin_model(self.apply_fn, self.params, self.x1, self.x2).held())
        spec, _ = check_apply_pair(self.apply_fn, self.params, self.x1, self.x2)
        _check_preconditioner(self.preconditioner, self.params)
        object.__setattr__(self, "microbatch_size", check_microbatch_size(self.microbatch_size))
        if self.probe_batch_size is not None:
            object.__setattr__(self, "probe_batch_size", check_count("probe_batch_size", self.probe_batch_size))
        object.__setattr__(self, "num_outputs", spec.num_outputs)

    @property
    def shape(self) -> tuple[int, int]:
        """(n₁·c, n₂·c)."""
        rows = _num_rows(self.x1) * self.num_outputs
        return rows, rows if self.x2 is None else _num_rows(self.x2) * self.num_outputs

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the floating parameters, of vectors and of products."""
        return jnp.result_type(differentiable(self.params)[0][0])

    @property
    def T(self) -> NtkOperator:
        """The transpose J₂ M J₁ᵀ; itself where x2 is None."""
        if self.x2 is None:
            return self
        data, static = self.tree_flatten()
        return self.tree_unflatten(static, (data[0], data[2], data[1], data[3]))

    def mv(self, vector: Float[Array | np.ndarray, "n2c ..."]) -> Float[Array, "n1c ..."]:
        """K v for v of shape (N,), or K V for a block (N, r) of r probes, in the dtype of params."""
        return _multiply(self, vector, "column")

    def transpose_mv(self, vector: Float[Array | np.ndarray, "n1c ..."]) -> Float[Array, "n2c ..."]:
        """Kᵀ v for v of shape (n₁·c,) or (n₁·c, r)."""
        return _multiply(self.T, vector, "row")

    def as_matrix(self) -> Float[Array, "n1c n2c"]:
        """The matrix, by `empirical_ntk` with its own plan and at its cost; MemoryError where it would not fit."""

        def form(apply_fn, params):
            return empirical_ntk(apply_fn, params, self.x1, self.x2)

        if self.preconditioner is None:
            return form(self.apply_fn, self.params)
        # The compiled function below checks memory when it is traced; this checks it at every call.
        jax.eval_shape(lambda params: form(self.apply_fn, params), self.params)
        with free_promotion():
            return _preconditioned_matrix(self)

    def tree_flatten(self):
        data = (self.params, self.x1, self.x2, self.preconditioner)
        return data, (self.apply_fn, self.microbatch_size, self.probe_batch_size, self.num_outputs)

    def tree_flatten_with_keys(self):
        data, static = self.tree_flatten()
        names = ("params", "x1", "x2", "preconditioner")
        return [(jax.tree_util.GetAttrKey(name), child) for name, child in zip(names, data, strict=True)], static

    @classmethod
    def tree_unflatten(cls, static, data):
        operator = object.__new__(cls)  # no checks: JAX rebuilds pytrees with leaves that are not arrays
        params, x1, x2, preconditioner = data
        apply_fn, microbatch_size, probe_batch_size, num_outputs = static
        values = (apply_fn, params, x1, x2, preconditioner, microbatch_size, probe_batch_size, num_outputs)
        for spec, value in zip(fields(cls), values, strict=True):
            object.__setattr__(operator, spec.name, value)
        return operator

    def __repr__(self):
        return f"NtkOperator(shape={self.shape}, dtype={self.dtype})"


def ntk_vector_product(
    apply_fn: ApplyFn,
    params: PyTree,
    vector: Float[Array | np.ndarray, "n2c ..."],
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    preconditioner: PyTree | None = None,
    microbatch_size: int | None = None,
    probe_batch_size: int | None = None,
) -> Float[Array, "n1c ..."]:
    """K v = J₁ M J₂ᵀ v in one call: `NtkOperator(...).mv(vector)` (theory §4).

    Args:
      apply_fn, params, x1, x2, preconditioner, microbatch_size, probe_batch_size: as `NtkOperator`.
      vector: shape (n₂·c,), or (n₂·c, r) for r vectors at once, in the order of `empirical_ntk`'s columns and in the
        dtype of params.

    Returns:
      K v of shape (n₁·c,) or (n₁·c, r).

    Raises:
      TypeError, ValueError: as `NtkOperator`; also a vector of the wrong length, rank or dtype.
      MemoryError: the copies of params would not fit; nothing has been allocated then.

    Cost: as a product of `NtkOperator`.

    Example:
      >>> import jax.numpy as jnp
      >>> from entk import ntk_vector_product
      >>> linear = lambda w, x: x @ w
      >>> ntk_vector_product(linear, jnp.ones(2), jnp.array([1.0, -1.0]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array([ -6., -14.], dtype=float64)
    """
    sizes = {"microbatch_size": microbatch_size, "probe_batch_size": probe_batch_size}
    return NtkOperator(apply_fn, params, x1, x2, preconditioner=preconditioner, **sizes).mv(vector)


def _check_preconditioner(preconditioner: PyTree | None, params: PyTree) -> None:
    if preconditioner is None:
        return
    found, wanted = jax.tree.structure(preconditioner), jax.tree.structure(params)
    remedy = "pass one number for every parameter, e.g. jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + 1e-8), second_moment)"
    if found != wanted:
        raise ValueError(f"preconditioner has the structure {found} and params {wanted}: {remedy}.")
    paths = jax.tree_util.tree_leaves_with_path(preconditioner)
    entries = {}
    for (path, entry), parameter in zip(paths, jax.tree.leaves(params), strict=True):
        where = f"preconditioner{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(parameter), jnp.floating):
            continue
        entries[where] = entry
        if jnp.shape(entry) != jnp.shape(parameter):
            raise ValueError(
                f"{where} has shape {jnp.shape(entry)} and the parameters {jnp.shape(parameter)}: {remedy}."
            )
        if jnp.result_type(entry) != jnp.result_type(parameter):
            raise TypeError(
                f"{where} has dtype {jnp.result_type(entry)} and the parameters {jnp.result_type(parameter)}: "
                f"cast it, e.g. jax.tree.map(jnp.{jnp.result_type(parameter)}, preconditioner)."
            )
    try:
        valid = np.asarray(_are_diagonals(list(entries.values())))
    except jax.errors.TracerArrayConversionError:  # traced: its values are not known yet
        return
    for (where, entry), is_valid in zip(entries.items(), valid, strict=True):
        if not is_valid:
            raise ValueError(
                f"{where} has entries in [{jnp.min(entry)}, {jnp.max(entry)}], but M must be positive semi-definite: "
                "every entry finite and at least 0. Pass the factor that multiplies the gradient, not a signed step."
            )


@jax.jit
def _are_diagonals(entries):
    return jnp.stack([jnp.all((entry >= 0) & jnp.isfinite(entry)) for entry in entries])


def _num_rows(x: PyTree) -> int:
    return jnp.shape(jax.tree.leaves(x)[0])[0]


def _multiply(operator: NtkOperator, vector: Float[Array | np.ndarray, "n2c ..."], entry: str):
    vector, length = jnp.asarray(vector), operator.shape[1]
    if vector.ndim not in (1, 2) or vector.shape[0] != length:
        raise ValueError(
            f"vector has shape {vector.shape}, but must be ({length},) or ({length}, r): one row a {entry} of K."
        )
    if vector.dtype != operator.dtype:
        raise TypeError(f"vector has dtype {vector.dtype} and the outputs {operator.dtype}; cast the vector.")
    if vector.ndim == 2:
        r, p = vector.shape[1], num_params(operator.params)
        held = min(operator.probe_batch_size or r, r)
        in_blocks = (operator.microbatch_size or length) * operator.num_outputs < length

        def bytes_of(probes):
            return (1 + in_blocks) * probes * p * vector.dtype.itemsize  # sums of gradients, and those of one block

        check_fits(
            bytes_of(held),
            f"pushing {held} probes at once through {p:,} {vector.dtype} parameters",
            "Pass a smaller probe_batch_size.",
            count=held,
            bytes_of=bytes_of,
            unit="probes",
        )
    with free_promotion():
        return _product(operator, vector)


@jax.jit
def _product(operator, vector):
    x1, x2 = operator.x1, operator.x1 if operator.x2 is None else operator.x2
    leaves, rebuild = differentiable(operator.params)

    def pull(x, v):
        out, vjp = jax.vjp(lambda leaves: operator.apply_fn(rebuild(leaves), x), leaves)
        return vjp(v.reshape(out.shape))[0]

    def push(x_i, tangent):
        x = jax.tree.map(lambda leaf: leaf[None], x_i)
        return jax.jvp(lambda leaves: operator.apply_fn(rebuild(leaves), x).reshape(-1), (leaves,), (tangent,))[1]

    def product(v):
        pulled = sum_blocks(pull, (x2, v.reshape(_num_rows(x2), -1)), operator.microbatch_size)
        if operator.preconditioner is not None:
            pulled = [m * gradient for m, gradient in zip(_diagonal(operator), pulled, strict=True)]
        return map_examples(lambda x_i: push(x_i, pulled), x1, operator.microbatch_size).reshape(-1)

    with model_precision():
        if vector.ndim == 1:
            return product(vector)
        return map_examples(product, vector.T, operator.probe_batch_size).T


@jax.jit
def _preconditioned_matrix(operator):
    """K^M = J̃₁ J̃₂ᵀ with J̃ the Jacobian in s of the model at w = w₀ + √M s, s = 0."""
    leaves, rebuild = differentiable(operator.params)
    roots = [jnp.sqrt(m) for m in _diagonal(operator)]

    # A closure over traced arrays: a new function a trace, so it is compiled once with this function.
    def moved(steps, x):
        return operator.apply_fn(rebuild([w + r * s for w, r, s in zip(leaves, roots, steps, strict=True)]), x)

    return empirical_ntk(moved, [jnp.zeros_like(w) for w in leaves], operator.x1, operator.x2)


def _diagonal(operator):
    """The entries of M at the leaves that are differentiated."""
    pairs = zip(jax.tree.leaves(operator.preconditioner), jax.tree.leaves(operator.params), strict=True)
    return [m for m, w in pairs if jnp.issubdtype(jnp.result_type(w), jnp.floating)]
