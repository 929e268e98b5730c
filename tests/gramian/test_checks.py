"""Bad input: every refusal comes with value, rule and remedy, and before any kernel is formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gramian
from entk import FullJacobian
from gramian import convex_loss, gradient_flow, logistic_loss, reference_flow, softmax_cross_entropy, squared_loss
from tests.gramian.flow_problems import cosh_loss, linear

X, W, Y = np.ones((4, 3)), np.ones(3), np.ones(4)
NAN, INF = np.where(np.arange(4) == 2, np.nan, 1.0), np.where(np.arange(4) == 2, np.inf, 1.0)
F32 = np.float32


def concave(u, y):
    return -jnp.sum((u - y) ** 2)


def saddle(u, y):
    return (u[0] - y[0]) ** 2 - 1e-6 * u[1] ** 2


BAD = {
    # outputs
    "flat": (lambda w, x: jnp.repeat(x @ w, 2), W, X, squared_loss(Y), None, ValueError, r"shape \(8,\), but must be"),
    "rank 0": (lambda w, x: jnp.sum(x @ w), W, X, squared_loss(Y), None, ValueError, r"shape \(\), but must be"),
    "transposed": (lambda w, x: (x @ w)[None], W, X, squared_loss(Y), None, ValueError, r"must be \(4, c\) or \(4,\)"),
    "two outputs": (lambda w, x: (x @ w, x), W, X, squared_loss(Y), None, TypeError, "must return one array"),
    "NaN at the start": (lambda w, x: jnp.log(-x @ w), W, X, squared_loss(Y), None, ValueError, "apply_fn.*4 NaN or"),
    "NaN on Q": (lambda w, x: jnp.log(x @ w), W, X, squared_loss(Y), -X, ValueError, r"apply_fn\(params, x_q\).*4 NaN"),
    # labels
    "rows": (linear, W, X, squared_loss(np.ones(3)), None, ValueError, "targets for 3 examples and x_s holds 4"),
    "columns": (linear, W, X, squared_loss(np.ones((4, 2))), None, ValueError, r"targets of shape \(4, 2\)"),
    "class": (linear, np.ones((3, 2)), X, softmax_cross_entropy(np.arange(4)), None, ValueError, "class 3"),
    "softmax c=1": (linear, W, X, softmax_cross_entropy(np.zeros(4, int)), None, ValueError, "use logistic_loss"),
    "labels as loss": (linear, W, X, Y, None, TypeError, r"loss is a ndarray; build it with squared_loss\(y\)"),
    # data
    "NaN in x_s": (linear, W, X * NAN[:, None], squared_loss(Y), None, ValueError, "x_s holds 3 NaN or infinite"),
    "inf in x_q": (linear, W, X, squared_loss(Y), X * INF[:, None], ValueError, "x_q holds 3 NaN or infinite"),
    "NaN in params": (linear, NAN[1:], X, squared_loss(Y), None, ValueError, "params holds 1 NaN or infinite"),
    "no examples": (linear, W, X[:0], squared_loss(Y[:0]), None, ValueError, "x_s holds zero examples"),
    "no test examples": (linear, W, X, squared_loss(Y), X[:0], ValueError, "x_q holds zero examples"),
    # dtypes
    "mixed x_s": (linear, W, F32(X), squared_loss(Y), None, TypeError, "x_s has dtype float32 and params float64"),
    "mixed x_q": (linear, W, X, squared_loss(Y), F32(X), TypeError, "x_q has dtype float32 and params float64"),
    "mixed targets": (linear, W, X, squared_loss(F32(Y)), None, TypeError, "targets of dtype float32"),
    "mixed params": (lambda w, x: x @ w[0], [W, F32(W)], X, squared_loss(Y), None, TypeError, "params mixes dtypes"),
    "constant in params": (
        lambda w, x: x @ w[0],
        [W, 3],
        X,
        squared_loss(Y),
        None,
        TypeError,
        r"params\[1\] has dtype int",
    ),
    "integer params": (linear, np.ones(3, int), X, squared_loss(Y), None, ValueError, "must be floating point"),
    "integer outputs": (lambda w, x: (x @ w).astype(int), W, X, squared_loss(Y), None, TypeError, "dtype int64"),
    # the loss
    "concave": (linear, W, X, convex_loss(concave, Y[:, None]), None, ValueError, "has the eigenvalue -2 at the first"),
    "saddle": (linear, np.ones((3, 2)), X, convex_loss(saddle, Y[:, None]), None, ValueError, "the eigenvalue -2e-06"),
}


@pytest.mark.parametrize("flow", [gradient_flow, reference_flow])
@pytest.mark.parametrize("name", BAD)
def test_refused_before_any_kernel_is_formed(name, flow, monkeypatch):
    apply_fn, params, x_s, loss, x_q, error, message = BAD[name]
    monkeypatch.setattr(gramian._problem, "empirical_ntk", None)  # a kernel would raise "not callable"
    with pytest.raises(error, match=message):
        flow(apply_fn, params, x_s, loss, x_q, t1=1.0)


def test_test_points_with_other_outputs_are_refused():
    def ragged(w, x):
        return jax.tree.leaves(x)[0] @ w if isinstance(x, dict) else x @ w[:, :1]

    with pytest.raises(ValueError, match="x_q has 2 outputs an example and x_s 1; they must agree"):
        gradient_flow(ragged, np.ones((3, 2)), X, squared_loss(Y), {"x": X}, t1=1.0)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"t1": 0.0}, r"t1=0\.0 must be finite and later than t0=0\.0"),
        ({"t0": 2.0, "t1": 1.0}, r"t1=1\.0 must be finite and later than t0=2\.0"),
        ({"t1": np.nan}, "t1=nan must be finite"),
        ({"t1": np.inf}, "t1=inf must be finite"),
        ({"t0": -np.inf, "t1": 1.0}, "later than t0=-inf"),
        ({"t1": 1.0, "save_at": (0.5, 1.5)}, r"save_at holds 1\.5, but must lie in \(t0, t1\] = \(0\.0, 1\.0\]"),
        ({"t1": 1.0, "save_at": (0.0,)}, r"save_at holds 0\.0"),
        ({"t1": 1.0, "save_at": (np.nan,)}, "save_at holds nan"),
    ],
)
def test_bad_times(times, message):
    with pytest.raises(ValueError, match=message):
        gradient_flow(linear, W, X, squared_loss(Y), **times)


def test_what_would_not_fit_is_refused_with_its_size_and_the_ways_out(monkeypatch):
    monkeypatch.setattr(gramian._problem, "empirical_ntk", None)
    monkeypatch.setattr("entk._checks.memory.available_bytes", lambda: 2**20)
    n, p, m = 100, 3, 50
    x, x_q = np.ones((n, p)), np.ones((m, p))
    entries = 12 * n**2 + 3 * n * m
    with pytest.raises(MemoryError, match=r"N = 100 x 1 training and M = 50 x 1 test outputs.*Pass fewer examples"):
        gradient_flow(linear, W, x, squared_loss(np.ones(n)), x_q, t1=1.0)
    # To the byte: one less than what it takes is too little, and exactly that is enough.
    monkeypatch.undo()
    for room, fits in ((8 * entries - 1, False), (8 * entries, True)):
        monkeypatch.setattr("entk._checks.memory.available_bytes", lambda room=room: room)
        check = gramian._checks.check_problem
        problem = gramian.KernelSource(linear, x, x_q), squared_loss(np.ones(n)), W
        if fits:
            check(*problem)
        else:
            with pytest.raises(MemoryError):
                check(*problem)


def test_the_strategy_is_asked_whether_its_kernels_fit(monkeypatch):
    x, w = np.ones((20, 1000)), np.ones(1000)
    monkeypatch.setattr("entk._checks.memory.available_bytes", lambda: 8 * 10_000)
    with pytest.raises(MemoryError, match=r"20 x 1 x 1,000 Jacobian rows"):
        gradient_flow(linear, w, x, squared_loss(np.ones(20)), t1=1.0, strategy=FullJacobian())
    flow = gradient_flow(linear, w, x, squared_loss(np.ones(20)), t1=1.0, strategy=FullJacobian(microbatch_size=2))
    assert flow.num_steps > 0


def test_good_problems_pass():
    for loss in (squared_loss(Y), logistic_loss(Y), convex_loss(cosh_loss, Y[:, None])):
        gramian._checks.check_problem(gramian.KernelSource(linear, X, X), loss, W)
    # Integer inputs are data like any other, as for an embedding.
    gramian._checks.check_problem(gramian.KernelSource(lambda w, x: w[x], np.array([0, 1, 2, 0])), squared_loss(Y), W)
    # A saturated softmax has eigenvalues of -1e-17, which is rounding and no concavity.
    far = gramian.KernelSource(linear, 1e3 * np.eye(4)[:, :3])
    gramian._checks.check_problem(far, softmax_cross_entropy(np.zeros(4, int)), np.ones((3, 2)) * [1.0, -0.001])
