"""Small problems that the tests of flows share: a tanh network under three losses, and a linear model."""

import jax
import jax.numpy as jnp
import numpy as np

from gramian import convex_loss, logistic_loss, softmax_cross_entropy, squared_loss


def mlp(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def linear(w, x):
    return x @ w


def cosh_loss(u, y):
    return jnp.sum(jnp.cosh(u - y))


def problem(name, n=5, m=3, width=5, seed=0, dtype=np.float64):
    """(apply_fn, params, x_s, loss, x_q): a smooth model with more parameters than training outputs."""
    rng = np.random.default_rng(seed)
    c = 2 if name in ("softmax", "probabilities") else 1
    params = {
        "w": rng.normal(size=(2, width)).astype(dtype),
        "b": rng.normal(size=width).astype(dtype),
        "v": (rng.normal(size=(width, c)) / 2).astype(dtype),
    }
    x_s, x_q = rng.normal(size=(n, 2)).astype(dtype), rng.normal(size=(m, 2)).astype(dtype)
    y = np.where(np.arange(n) % 2, 1.0, -1.0).astype(dtype)
    probabilities = rng.dirichlet(np.ones(2), size=n).astype(dtype)
    loss = {
        "squared": lambda: squared_loss(y),
        "logistic": lambda: logistic_loss(y),
        "softmax": lambda: softmax_cross_entropy(np.arange(n) % 2),
        "probabilities": lambda: softmax_cross_entropy(probabilities),
        "cosh": lambda: convex_loss(cosh_loss, y[:, None]),
    }[name]()
    return mlp, params, x_s, loss, x_q


def flat(tree):
    """All numbers of a pytree, one after another."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def relative(actual, expected):
    """‖actual − expected‖ / ‖expected‖ over all leaves together."""
    a, b = flat(actual), flat(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def residuals(flow):
    """Relative residuals of (I1)-(I4), written out here so that they do not lean on the library's own."""
    p, w, d, g_q = (np.asarray(operator) for operator in flow.operators)
    (u0, q0), (u1, q1) = flow.outputs(flow.params0), flow.outputs(flow.params)
    g0, g1 = np.asarray(flow.output_grad(flow.params0)), np.asarray(flow.output_grad(flow.params))
    n = flow.source.x_s.shape[0]
    drop = float(flow.loss.value(u0.reshape(n, -1)) - flow.loss.value(u1.reshape(n, -1)))
    return np.array(
        [
            np.linalg.norm(g1 - p @ g0) / np.linalg.norm(g0),
            abs(drop - g0 @ w @ g0) / drop,
            np.linalg.norm(u1 - u0 + d @ g0) / np.linalg.norm(u1 - u0),
            np.linalg.norm(q1 - q0 + g_q @ g0) / np.linalg.norm(q1 - q0),
        ]
    )


def leaves_differ(a, b):
    """Names of what is not bit-identical, in value or dtype, between two flows."""
    parts = ("params", "operators", "history", "observed", "saved_params", "num_steps", "num_rejected", "t1")
    different = []
    for part in parts:
        left, right = (jax.tree_util.tree_leaves_with_path(getattr(flow, part)) for flow in (a, b))
        assert len(left) == len(right), part
        for (path, x), (_, y) in zip(left, right, strict=True):
            x, y = np.asarray(x), np.asarray(y)
            if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                different.append(part + jax.tree_util.keystr(path))
    return different
