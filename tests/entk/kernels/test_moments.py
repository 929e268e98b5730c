"""Gradient moments against per-example gradients in NumPy, on every model of the zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entk import gradient_moments, jacobian
from entk._kernels.moments import _moments
from tests.entk.mlp_oracle import apply_fn as mlp
from tests.entk.mlp_oracle import assert_close, batch, init
from tests.entk.model_zoo import ZOO


def flat(tree):
    """Floating entries in `ravel_pytree` order."""
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(tree) if getattr(leaf, "dtype", None) != jax.dtypes.float0]
    return np.concatenate(leaves).astype(np.float64)


def by_hand(losses, params, data):
    gradients = np.asarray(jacobian(losses, params, data), np.float64)[:, 0]
    return gradients.mean(0), ((gradients - gradients.mean(0)) ** 2).sum(0)


@pytest.mark.parametrize("model", ZOO[::4], ids=lambda model: model.name)
def test_models_of_the_zoo(model):
    """Four examples in microbatches of three and one; every fourth model, as the factors are those of the kernel."""
    apply_fn, params, _, x = model.build(jnp.float64)
    tolerance = {"weight_through_bfloat16": 2e-2, "weight_cast": 1e-6, "nnx_attention": 1e-6}.get(model.name, 1e-12)

    def losses(params, x):
        out = apply_fn(params, x)
        return ((jnp.sin(out) - 0.3) ** 2).reshape(len(out), -1).sum(1)

    @jax.jit
    def both(params, x):
        return gradient_moments(losses, params, x, microbatch_size=3), jacobian(losses, params, x)

    moments, gradients = both(params, x)
    gradients = np.asarray(gradients, np.float64)[:, 0]
    mean, spread = gradients.mean(0), ((gradients - gradients.mean(0)) ** 2).sum(0)
    scale = np.abs(mean).max() ** 2 + spread.max()
    assert np.abs(flat(moments.mean_grads) - mean).max() <= tolerance * np.sqrt(scale)
    assert np.abs(flat(moments.sum_sq_diff_grads) - spread).max() <= 10 * tolerance * scale
    assert moments.sample_size == 4
    for tree in moments[:2]:
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert [np.shape(leaf) for leaf in jax.tree.leaves(tree)] == [
            np.shape(leaf) for leaf in jax.tree.leaves(params)
        ]


def squared(params, data):
    return ((mlp(params, data[0]) - data[1]) ** 2).sum(1) / 2


@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 9),
    c=st.integers(1, 3),
    width=st.integers(1, 5),
    microbatch_size=st.none() | st.integers(1, 10),
)
def test_any_shape(seed, n, c, width, microbatch_size):
    params, data = init(seed, 2, width, c), (batch(seed, n, 2), batch(seed + 1, n, c))
    moments = gradient_moments(squared, params, data, microbatch_size=microbatch_size)
    mean, spread = by_hand(squared, params, data)
    assert_close(flat(moments.mean_grads), mean, 1e-11)
    assert np.abs(flat(moments.sum_sq_diff_grads) - spread).max() <= 1e-12 * (spread + n * mean**2).max()
    assert min(flat(moments.sum_sq_diff_grads)) >= 0


def test_a_mean_loss_gives_what_its_losses_give():
    params, data = init(0), (batch(0, 6), batch(1, 6, 2))
    mean = gradient_moments(lambda params, data: squared(params, data).mean(), params, data)
    each = gradient_moments(squared, params, data)
    jax.tree.map(np.testing.assert_array_equal, mean, each)
    gradient = jax.grad(lambda params: squared(params, data).mean())(params)
    assert_close(flat(mean.mean_grads), flat(gradient), 1e-13)


def test_float32_rounds_by_the_squares_and_never_goes_negative():
    """|ḡ| a thousand times the spread: the square of that times ε is all that float32 can promise."""
    params = jnp.zeros(4, jnp.float32)
    data = (1000 + np.random.default_rng(0).normal(size=(64, 4))).astype(np.float32)
    moments = gradient_moments(lambda w, x: x @ w, params, data)
    exact = ((data - data.mean(0, dtype=np.float64)) ** 2).sum(0)
    bound = np.finfo(np.float32).eps * (data.astype(float) ** 2).sum(0)
    assert (np.abs(moments.sum_sq_diff_grads - exact) <= 4 * bound).all()
    same = gradient_moments(lambda w, x: x @ w, params, np.full((8, 4), 1 / 3, np.float32))
    assert (np.asarray(same.sum_sq_diff_grads) >= 0).all()


def test_many_microbatches_of_bfloat16_are_counted_exactly():
    """bfloat16 has no whole numbers between 256 and 258."""
    data = np.arange(600.0)[:, None] % 7
    moments = gradient_moments(
        lambda w, x: x @ w, jnp.zeros(1, jnp.bfloat16), jnp.asarray(data, jnp.bfloat16), microbatch_size=1
    )
    assert_close(moments.mean_grads, data.mean(0), 1e-4)
    assert_close(moments.sum_sq_diff_grads, ((data - data.mean(0)) ** 2).sum(0), 1e-4)


def test_nothing_of_size_examples_times_parameters_is_held():
    """784-512-512-10, b = 256: per-example gradients would take 1.3 GiB in float64."""
    shapes = [(784, 512), (512, 512), (512, 10)]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def losses(params, x):
        for weight in params[:-1]:
            x = jnp.tanh(x @ weight)
        return (x @ params[-1]).sum(1)

    lowered = _moments.lower(losses, params, jax.ShapeDtypeStruct((256, 784), jnp.float32), None)
    held = lowered.compile().memory_analysis().temp_size_in_bytes
    num_params = sum(np.prod(shape) for shape in shapes)
    assert held < 20 * 4 * num_params < 256 * 4 * num_params / 10


def test_moments_reach_an_optax_transformation_by_their_names():
    seen = {}

    def update(updates, state, params=None, *, mean_grads, sum_sq_diff_grads, sample_size, **extra_args):
        seen.update(mean=mean_grads, squares=sum_sq_diff_grads, n=sample_size)
        return updates, state

    gate = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = optax.chain(gate, optax.sgd(0.1))
    params, data = init(0), (batch(0, 6), batch(1, 6, 2))
    moments = gradient_moments(squared, params, data)
    optimizer.update(moments.mean_grads, optimizer.init(params), params, **moments._asdict())
    assert seen["n"] == 6
    assert jax.tree.structure(seen["squares"]) == jax.tree.structure(params)


def test_compiled_once_and_under_jit():
    params, data = init(0), (batch(0, 6), batch(1, 6, 2))
    expected = gradient_moments(squared, params, data)
    under_jit = jax.jit(lambda params, data: gradient_moments(squared, params, data))(params, data)
    assert_close(flat(under_jit.sum_sq_diff_grads), flat(expected.sum_sq_diff_grads), 1e-12)
    before = _moments._cache_size()
    gradient_moments(squared, jax.tree.map(lambda leaf: leaf + 1, params), data)
    assert _moments._cache_size() == before


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda params, data: squared(params, data).sum(), ValueError, r"must be the mean over examples"),
        (lambda params, data: squared(params, data)[:, None], ValueError, r"loss_fn returns \(6, 1\), but must"),
        (lambda params, data: (squared(params, data), 0.0), ValueError, r"return the losses alone"),
        (lambda params, data: squared(params, data) - squared(params, data).mean(), ValueError, "independently"),
        (
            lambda params, data: jnp.log(squared(params, data).mean()),
            ValueError,
            r"on 6 examples together and .* on average on each of them alone",
        ),
    ],
)
def test_bad_losses(loss, error, message):
    with pytest.raises(error, match=message):
        gradient_moments(loss, init(0), (batch(0, 6), batch(1, 6, 2)))


def test_other_bad_arguments():
    with pytest.raises(ValueError, match=r"microbatch_size=0 must be a positive integer"):
        gradient_moments(squared, init(0), (batch(0, 6), batch(1, 6, 2)), microbatch_size=0)
    with pytest.raises(ValueError, match="disagree on the number of examples"):
        gradient_moments(squared, init(0), (batch(0, 6), batch(1, 5, 2)))
    with pytest.raises(TypeError, match="mixes dtypes"):
        gradient_moments(squared, {**init(0), "b_in": np.zeros(4, np.float32)}, (batch(0, 6), batch(1, 6, 2)))
