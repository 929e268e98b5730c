"""The benchmark's other questions to JAX: the machine's peak, the largest kernel that fits, gradient moments."""

from __future__ import annotations

from _protocol import load, serve, spec  # isort: skip  (pins the process before JAX counts its cores)

import bisect

import jax
import jax.numpy as jnp
import numpy as np
from jax_models import FAMILIES


def matmul():
    """The product of two square matrices, 2·size³ operations: what the machine can do at best."""
    size = spec["size"]
    a, b = (jax.random.normal(jax.random.key(i), (size, size)) for i in range(2))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready((a, b))
    return (lambda: product(a, b)), {"operations": 2 * size**3}


def largest():
    """The kernel of as many of the inputs as `entk.plan` says fit `budget` bytes."""
    from entk import empirical_ntk, plan  # pyright: ignore[reportAttributeAccessIssue]

    apply, w, x = _network()

    def planned(n):
        try:
            return plan(apply, w, x[:n])
        except MemoryError:
            return None

    def fits(n):
        made = planned(n)
        return made is not None and made.bytes <= spec["budget"]

    n = bisect.bisect_left(range(1, len(x) + 1), True, key=lambda n: not fits(n))
    made = planned(n) if n else None
    if made is None:
        raise MemoryError(f"not even one example fits a budget of {spec['budget']:,.0f} bytes; raise it.")
    points = x[:n]
    return (lambda: empirical_ntk(apply, w, points)), {"n": n, "operations": made.operations, "bytes": made.bytes}


def batch_gradient():
    """One plain gradient of the mean loss: the unit of the others' cost."""
    apply, w, x = _network()
    y = _labels(x)
    gradient = jax.jit(jax.grad(lambda w, x, y: _losses(apply(w, x), y).mean()))
    return (lambda: gradient(w, x, y)), {}


def gradient_moments():
    from entk import gradient_moments  # pyright: ignore[reportAttributeAccessIssue]

    apply, w, x = _network()
    example_loss = _example_loss(apply)
    batch = (x, _labels(x))
    return (lambda: gradient_moments(example_loss, w, batch)), {}


def vmap_grad():
    """What one writes without a library: every example's gradient, then their moments."""
    apply, w, x = _network()
    example_loss = _example_loss(apply)

    @jax.jit
    def moments(w, batch):
        gradients = jax.vmap(jax.grad(example_loss), (None, 0))(w, batch)
        mean = jax.tree_util.tree_map(lambda g: g.mean(0), gradients)
        return mean, jax.tree_util.tree_map(lambda g, m: ((g - m) ** 2).sum(0), gradients, mean)

    batch = (x, _labels(x))
    return (lambda: moments(w, batch)), {}


VARIANTS = {
    "matmul": matmul,
    "largest": largest,
    "batch gradient": batch_gradient,
    "gradient_moments": gradient_moments,
    "vmap(grad)": vmap_grad,
}


def _network():
    arrays = load()
    w = {name: jnp.asarray(array) for name, array in arrays.items() if name != "x"}
    return FAMILIES[spec["family"]](**spec["sizes"]), w, jnp.asarray(arrays["x"])


def _labels(x):
    return jnp.arange(len(x)) % 10


def _losses(outputs, y):
    return jax.nn.logsumexp(outputs, axis=-1) - jnp.take_along_axis(outputs, y[:, None], axis=-1)[:, 0]


def _example_loss(apply):
    def example_loss(w, example):
        x, y = example
        return _losses(apply(w, x[None]), y[None])[0]

    return example_loss


def mean_gradient(result):
    """The first of the moments, or the batch gradient itself, as one vector."""
    mean = result if isinstance(result, dict) else result[0]
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree_util.tree_leaves(mean)])


def main():
    call, facts = VARIANTS[spec["variant"]]()
    serve(lambda: jax.block_until_ready(call()), mean_gradient, jax=jax.__version__, **facts)


if __name__ == "__main__":
    main()
