"""Kernels in JAX: entk, plain `vmap(jacrev)` with a matmul, and neural-tangents, each in its own environment."""

from __future__ import annotations

from _protocol import load, serve, spec  # isort: skip  (pins the process before JAX counts its cores)

import jax
import jax.numpy as jnp
import numpy as np
from jax_models import FAMILIES


def entk_default(apply, w, x):
    from entk import empirical_ntk

    return lambda: empirical_ntk(apply, w, x)


def jacrev_matmul(apply, w, x):
    """What one writes without a library."""

    @jax.jit
    def ntk(w, x):
        jac = jax.vmap(jax.jacrev(lambda w, x_i: apply(w, x_i[None])[0]), (None, 0))(w, x)
        rows = [leaf.reshape(leaf.shape[0] * leaf.shape[1], -1) for leaf in jax.tree_util.tree_leaves(jac)]
        return sum(leaf @ leaf.T for leaf in rows)

    return lambda: ntk(w, x)


def neural_tangents(implementation):
    def kernel(apply, w, x):
        import neural_tangents as nt  # pyright: ignore[reportMissingImports]

        ntk = nt.empirical_ntk_fn(
            apply, trace_axes=(), vmap_axes=0, implementation=nt.NtkImplementation[implementation]
        )
        ntk = jax.jit(ntk)
        return lambda: ntk(x, None, w)

    return kernel


VARIANTS = {
    "entk": entk_default,
    "jacrev + matmul": jacrev_matmul,
    "jacobian contraction": neural_tangents("JACOBIAN_CONTRACTION"),
    "NTK-vector products": neural_tangents("NTK_VECTOR_PRODUCTS"),
    "structured derivatives": neural_tangents("STRUCTURED_DERIVATIVES"),
    "auto": neural_tangents("AUTO"),
}


def to_numpy(kernel):
    """(n·c, n·c) in the order of examples; neural-tangents returns (n, n, c, c), which is not on the clock."""
    kernel = np.asarray(kernel)
    if kernel.ndim == 4:
        n1, n2, c, _ = kernel.shape
        kernel = kernel.transpose(0, 2, 1, 3).reshape(n1 * c, n2 * c)
    return kernel


def main():
    arrays = load()
    apply = FAMILIES[spec["family"]](**spec["sizes"])
    w = {name: jnp.asarray(array) for name, array in arrays.items() if name != "x"}
    x = jnp.asarray(arrays["x"])
    ntk = VARIANTS[spec["variant"]](apply, w, x)
    jax.block_until_ready((w, x))
    serve(lambda: jax.block_until_ready(ntk()), to_numpy, jax=jax.__version__)


if __name__ == "__main__":
    main()
