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


def planned():
    """What entk means to spend. Not asked of the worker that is measured: planning takes memory, too."""
    from entk import plan

    made = plan(*_network())
    return (lambda: made), {"operations": made.operations, "bytes": made.bytes}


def largest():
    """The kernel of as many of the inputs as `entk.plan` says fit `budget` bytes."""
    from entk import empirical_ntk, plan

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
    losses, w, batch = _training()
    gradient = jax.jit(jax.grad(lambda w, batch: losses(w, batch).mean()))
    return (lambda: gradient(w, batch)), {}


def gradient_moments():
    from entk import gradient_moments

    losses, w, batch = _training()
    return (lambda: gradient_moments(losses, w, batch)), {}


def vmap_grad():
    """What one writes without a library: every example's gradient, then their moments."""
    losses, w, batch = _training()

    def example_loss(w, example):
        return losses(w, jax.tree_util.tree_map(lambda leaf: leaf[None], example))[0]

    @jax.jit
    def moments(w, batch):
        gradients = jax.vmap(jax.grad(example_loss), (None, 0))(w, batch)
        mean = jax.tree_util.tree_map(lambda g: g.mean(0), gradients)
        return mean, jax.tree_util.tree_map(lambda g, m: ((g - m) ** 2).sum(0), gradients, mean)

    return (lambda: moments(w, batch)), {}


VARIANTS = {
    "matmul": matmul,
    "plan": planned,
    "largest": largest,
    "batch gradient": batch_gradient,
    "gradient_moments": gradient_moments,
    "vmap(grad)": vmap_grad,
}


def _network():
    arrays = load()
    w = {name: jnp.asarray(array) for name, array in arrays.items() if name != "x"}
    return FAMILIES[spec["family"]](**spec["sizes"]), w, jnp.asarray(arrays["x"])


def _training():
    """Cross-entropy of every example, weights, and a batch of inputs and labels."""
    apply, w, x = _network()

    def losses(w, batch):
        x, y = batch
        outputs = apply(w, x)
        return jax.nn.logsumexp(outputs, axis=-1) - jnp.take_along_axis(outputs, y[:, None], axis=-1)[:, 0]

    return losses, w, (x, jnp.arange(len(x)) % jax.eval_shape(apply, w, x).shape[-1])


def mean_gradient(result):
    """The first of the moments, or the batch gradient itself, as one vector."""
    mean = result if isinstance(result, dict) else result[0]
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree_util.tree_leaves(mean)])


def main():
    call, facts = VARIANTS[spec["variant"]]()
    serve(lambda: jax.block_until_ready(call()), mean_gradient, jax=jax.__version__, **facts)


if __name__ == "__main__":
    main()
