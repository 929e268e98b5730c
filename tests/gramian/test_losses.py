"""Losses: value, gradient and Hessian against closed forms and differences; and the targets that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian import convex_loss, logistic_loss, softmax_cross_entropy, squared_loss
from gramian._losses import block_product, check_targets
from tests.gramian.flow_problems import cosh_loss


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(u):
    e = np.exp(u - u.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def case(name, n, c, rng, scale=1.0):
    """A loss, outputs, and its value, g (n, c) and B (n, c, c) in closed form."""
    c = 1 if name == "logistic" else max(c, 2) if name in ("classes", "probabilities") else c
    u = rng.normal(size=(n, c)) * scale
    eye = np.eye(c)
    if name in ("squared", "cosh"):
        y = rng.normal(size=(n, c))
        if name == "squared":
            blocks = np.broadcast_to(eye, (n, c, c)) / n
            return squared_loss(y), u, np.sum((u - y) ** 2) / (2 * n), (u - y) / n, blocks
        blocks = np.cosh(u - y)[:, :, None] * eye / n
        return convex_loss(cosh_loss, y), u, np.sum(np.cosh(u - y)) / n, np.sinh(u - y) / n, blocks
    if name == "logistic":
        y = np.sign(rng.normal(size=(n, 1)))
        blocks = (sigmoid(u) * sigmoid(-u))[:, :, None] / n
        return logistic_loss(y[:, 0]), u, np.mean(np.log1p(np.exp(-y * u))), -y * sigmoid(-y * u) / n, blocks
    labels = rng.integers(0, c, n)
    y = eye[labels] if name == "classes" else rng.dirichlet(np.ones(c), n)
    pi = softmax(u)
    blocks = (pi[:, :, None] * eye - pi[:, :, None] * pi[:, None, :]) / n
    loss = softmax_cross_entropy(labels if name == "classes" else y)
    return loss, u, -np.mean(np.sum(y * np.log(pi), 1)), (pi - y) / n, blocks


NAMES = ["squared", "logistic", "classes", "probabilities", "cosh"]


SHAPES = [(1, 1), (1, 3), (5, 2)]  # few, because each is compiled; the values are many


@jax.jit
def all_of(loss, u):
    return loss.value(u), loss.grad(u), loss.hessian(u)


@settings(max_examples=20)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 5.0]))
@pytest.mark.parametrize("name", NAMES)
def test_value_gradient_and_hessian_in_closed_form(name, shape, seed, scale):
    loss, u, *expected = case(name, *shape, np.random.default_rng(seed), scale)
    for actual, closed in zip(all_of(loss, u), expected, strict=True):
        np.testing.assert_allclose(actual, np.reshape(closed, actual.shape), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_hessian_are_the_differences_of_the_value(name):
    """Central differences know nothing of the closed forms; they also see a wrong 1/n."""
    loss, u, *_ = case(name, 3, 3, np.random.default_rng(1))
    shape, flat = u.shape, u.reshape(-1)
    step = 1e-5
    units = step * np.eye(len(flat))
    value = jax.vmap(lambda u: loss.value(u.reshape(shape)))
    value, grad = jax.jit(value), jax.jit(jax.vmap(lambda u: loss.grad(u.reshape(shape))))
    np.testing.assert_allclose(loss.grad(u), (value(flat + units) - value(flat - units)) / (2 * step), atol=1e-9)
    dense = (grad(flat + units) - grad(flat - units)) / (2 * step)
    np.testing.assert_allclose(block_product(loss.hessian(u), np.eye(len(flat))), dense, atol=1e-9)


@settings(max_examples=20)
@given(shape=st.sampled_from(SHAPES), r=st.sampled_from([0, 1, 4]), seed=st.integers(0, 10**6))
def test_block_product_is_the_dense_product(shape, r, seed):
    n, c = shape
    rng = np.random.default_rng(seed)
    blocks, matrix = rng.normal(size=(n, c, c)), rng.normal(size=(n * c, r) if r else n * c)
    dense = np.zeros((n * c, n * c))
    for i in range(n):
        dense[i * c : (i + 1) * c, i * c : (i + 1) * c] = blocks[i]
    product = block_product(jnp.asarray(blocks), jnp.asarray(matrix))
    assert product.shape == matrix.shape
    np.testing.assert_allclose(product, dense @ matrix, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("margin", [-1e3, -88.8, -30.0, 0.0, 30.0, 88.8, 1e3])
def test_logistic_neither_overflows_nor_cancels(margin, dtype):
    loss, u = logistic_loss(np.ones(1, dtype)), np.full((1, 1), margin, dtype)
    e = np.exp(-abs(float(dtype(margin))))  # in longhand: both tails keep their relative accuracy
    loss_value = np.log1p(e) + max(-float(dtype(margin)), 0)
    rtol, tiny = 20 * np.finfo(dtype).eps, float(np.finfo(dtype).tiny)
    value, grad, blocks = all_of(loss, u)
    np.testing.assert_allclose(value, loss_value, rtol=rtol, atol=tiny)
    np.testing.assert_allclose(grad[0], -(e if margin > 0 else 1) / (1 + e), rtol=100 * rtol, atol=tiny)
    np.testing.assert_allclose(blocks[0, 0, 0], e / (1 + e) ** 2, rtol=100 * rtol, atol=tiny)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["classes", "probabilities"])
def test_softmax_at_large_outputs(form, dtype):
    u = np.array([[1e3, -1e3, 0], [-1e3, 1e3, 1e3], [1e3, 1e3, 1e3]], dtype)
    labels = np.array([1, 0, 2])
    loss = softmax_cross_entropy(labels if form == "classes" else np.eye(3, dtype=dtype)[labels])
    pi = np.array([[1, 0, 0], [0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    tolerance = {"rtol": 1e-4 if dtype == np.float32 else 1e-12, "atol": 1e-6 if dtype == np.float32 else 1e-14}
    value, grad, hessian = all_of(loss, u)
    np.testing.assert_allclose(value, (2000 + 2000 + np.log(2) + np.log(3)) / 3, **tolerance)
    np.testing.assert_allclose(grad, ((pi - np.eye(3)[labels]) / 3).reshape(-1), **tolerance)
    blocks = (pi[:, :, None] * np.eye(3) - pi[:, :, None] * pi[:, None, :]) / 3
    np.testing.assert_allclose(hessian, blocks, **tolerance)


def test_softmax_blocks_are_singular_along_ones_and_positive():
    loss, u, *_ = case("classes", 6, 4, np.random.default_rng(3))
    blocks = loss.hessian(u)
    assert np.abs(blocks @ np.ones(4)).max() < 1e-16
    assert np.linalg.eigvalsh(blocks)[:, 0].min() > -1e-16


def test_a_loss_is_a_pytree_and_compiles_once_for_other_targets():
    traces = []

    @jax.jit
    def value(loss, u):
        traces.append(1)
        return loss.value(u)

    u = np.ones((3, 1))
    assert value(squared_loss(np.zeros(3)), u) == 0.5
    assert value(squared_loss(np.array([1.0, 1, 4])), u) == 1.5
    assert len(traces) == 1
    assert squared_loss(np.zeros(3)).isotropic
    assert not logistic_loss(np.ones(3)).isotropic


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [squared_loss, logistic_loss])
def test_integer_targets_are_refused(make):
    with pytest.raises(TypeError, match=r"y has dtype int64.*y\.astype\(float\)"):
        make(np.array([1, -1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "make",
    [
        lambda bad: squared_loss(np.array([1.0, bad])),
        lambda bad: logistic_loss(np.array([1.0, bad])),
        lambda bad: softmax_cross_entropy(np.array([[1.0, 0.0], [bad, 0.5]])),
        lambda bad: convex_loss(cosh_loss, np.array([1.0, bad])),
    ],
)
def test_targets_that_are_not_finite_are_refused(make, bad):
    with pytest.raises(ValueError, match="1 NaN or infinite values"):
        make(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: squared_loss(np.ones((2, 1, 1))), r"y has shape \(2, 1, 1\)"),
        (lambda: squared_loss(np.float64(1.0)), r"y has shape \(\)"),
        (lambda: logistic_loss(np.ones((3, 2))), r"one output an example"),
        (lambda: logistic_loss(np.array([0.0, 1.0])), r"only -1 and 1: map 0/1 labels by 2 \* y - 1"),
        (lambda: softmax_cross_entropy(np.array([[0, 1]])), r"integer classes must have shape \(n,\)"),
        (lambda: softmax_cross_entropy(np.array([0, -1])), r"holds -1; classes are counted from 0"),
        (lambda: softmax_cross_entropy(np.array([0.0, 1.0])), r"pass integers \(n,\) or probabilities \(n, c\)"),
        (lambda: softmax_cross_entropy(np.array([[0.5, 0.6]])), r"probability vector"),
        (lambda: softmax_cross_entropy(np.array([[-0.1, 1.1]])), r"probability vector"),
        (lambda: convex_loss(cosh_loss, np.float64(0)), r"targets is a scalar"),
    ],
)
def test_malformed_targets_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "shape", "message"),
    [
        (squared_loss(np.ones(3)), (4, 1), "targets for 3 examples and x_s holds 4"),
        (squared_loss(np.ones((4, 2))), (4, 3), r"targets of shape \(4, 2\), but the outputs have shape \(4, 3\)"),
        (squared_loss(np.ones(4)), (4, 2), r"targets of shape \(4, 1\), but the outputs have shape \(4, 2\)"),
        (logistic_loss(np.ones(4)), (4, 2), r"the outputs have shape \(4, 2\)"),
        (softmax_cross_entropy(np.array([0, 1])), (2, 1), "at least 2 outputs an example, got 1; use logistic_loss"),
        (softmax_cross_entropy(np.array([0, 3])), (2, 3), r"class 3, but apply_fn has 3 outputs: 0\.\.2"),
        (softmax_cross_entropy(np.eye(3)), (3, 2), r"targets of shape \(3, 3\)"),
        (convex_loss(lambda u, y: (u - y) ** 2, np.ones((2, 1))), (2, 1), "must return a scalar"),
    ],
)
def test_targets_that_do_not_match_the_outputs_are_refused(loss, shape, message):
    with pytest.raises(ValueError, match=message):
        check_targets(loss, *shape, np.dtype(np.float64))


def test_targets_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match="targets of dtype float32 and the outputs float64"):
        check_targets(squared_loss(np.ones(2, np.float32)), 2, 1, np.dtype(np.float64))


def test_matching_targets_pass():
    for loss, shape in [
        (squared_loss(np.ones((4, 2))), (4, 2)),
        (softmax_cross_entropy(np.array([0, 2])), (2, 3)),
        (softmax_cross_entropy(np.eye(3)), (3, 3)),
        (convex_loss(cosh_loss, np.ones((2, 1))), (2, 1)),
    ]:
        check_targets(loss, *shape, np.dtype(np.float64))
