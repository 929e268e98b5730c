"""The frozen update against the optimizer itself, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gramian._run.linear_update import FrozenUpdate
from tests.gramian.training_problems import OPTIMIZERS, PARAMS


def gradients(num_steps, seed=0):
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape)), PARAMS) for _ in range(num_steps)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_realized_gradients_give_the_realized_updates(name):
    """The affine map at the gradients it was frozen at is the optimizer."""
    tx, params = OPTIMIZERS[name], jax.tree.map(jnp.asarray, PARAMS)
    frozen, state = FrozenUpdate(tx, params), tx.init(PARAMS)
    history = frozen.init_history(state, forced=True)
    for grads in gradients(5):
        expected, after = tx.update(grads, state, params)
        (updates, found), (linear, history) = frozen(grads, state, params, grads, history, forced=True)
        for one, other, third in zip(*map(jax.tree.leaves, (expected, updates, linear)), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(third, one, rtol=1e-12, atol=1e-15)
        state = found
        assert jax.tree.structure(after) == jax.tree.structure(found)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_forced_part_the_map_is_linear(name):
    tx, params = OPTIMIZERS[name], jax.tree.map(jnp.asarray, PARAMS)
    frozen = FrozenUpdate(tx, params)

    def run(scale, probes):
        state, history = tx.init(PARAMS), frozen.init_history(tx.init(PARAMS))
        moved = []
        for grads, probe in zip(gradients(4), probes, strict=True):
            probe = jax.tree.map(lambda leaf: scale * leaf, probe)
            (_, state), (linear, history) = frozen(grads, state, params, probe, history)
            moved.append(jax.flatten_util.ravel_pytree(linear)[0])
        return jnp.stack(moved)

    first, second = gradients(4, 1), gradients(4, 2)
    both = [jax.tree.map(jnp.add, a, b) for a, b in zip(first, second, strict=True)]
    tolerance = 1e-5 if name == "every second step" else 1e-11  # it accumulates in single precision
    np.testing.assert_allclose(run(2.0, both), 2 * (run(1.0, first) + run(1.0, second)), rtol=tolerance, atol=1e-15)
    assert float(jnp.abs(run(1.0, first)).max()) > 1e-4


def test_weight_decay_is_forced_and_nothing_else():
    params = jax.tree.map(jnp.asarray, PARAMS)
    zero = jax.tree.map(jnp.zeros_like, params)
    for name, forced in (("adamw", True), ("adam", False), ("poprisk_adamw", True), ("clipped adam", False)):
        tx = OPTIMIZERS[name]
        frozen, state = FrozenUpdate(tx, params), tx.init(PARAMS)
        (grads,) = gradients(1)
        _, (linear, _) = frozen(grads, state, params, zero, frozen.init_history(state, forced=True), forced=True)
        assert (float(jnp.abs(linear["a"]).max()) > 0) == forced


@pytest.mark.parametrize(
    ("tx", "operation"),
    [
        (optax.lion(0.01), "sign"),
        (optax.contrib.muon(0.01), "scan"),
        (optax.chain(optax.clip(0.1), optax.sgd(0.1)), "clamp|min|max"),
        (optax.sign_sgd(0.1), "sign"),
    ],
)
def test_what_is_not_linear_is_refused_by_name(tx, operation):
    with pytest.raises(ValueError, match=f"(?s)cannot be analysed.*'({operation})'"):
        FrozenUpdate(tx, PARAMS)


def test_the_refusal_names_the_link():
    with pytest.raises(ValueError, match="scale_by_lion"):
        FrozenUpdate(optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.01)), PARAMS)


def test_the_memory_of_a_probe():
    assert [FrozenUpdate(OPTIMIZERS[name], PARAMS).num_history for name in ("sgd", "momentum", "adam", "rmsprop")] == [
        0,
        1,
        1,
        0,
    ]


def test_an_extra_argument_is_a_coefficient_and_no_summand():
    params = {"w": jnp.array([1.0, 2.0])}

    def transformation(combine):
        def update(grads, state, params=None, *, other, power, **_):
            assert power == 2, "numbers stay numbers"
            return jax.tree.map(lambda g, o: combine(g, o**power), grads, other), state

        return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)

    def extra_args(params, batch):
        return {"other": jax.tree.map(lambda w: w * batch.sum(), params), "power": 2}

    batch, grads = jnp.array([1, 2]), {"w": jnp.array([1.0, -1.0])}
    frozen = FrozenUpdate(transformation(jnp.multiply), params, extra_args, batch)
    linear = {"w": jnp.array([10.0, 20.0])}
    (updates, _), (mapped, _) = frozen(grads, optax.EmptyState(), params, linear, [], frozen.extras(params, batch))
    np.testing.assert_allclose(updates["w"], [9.0, -36.0])
    np.testing.assert_allclose(mapped["w"], [90.0, 720.0])
    with pytest.raises(ValueError, match="not linear in the gradients because of"):
        FrozenUpdate(transformation(jnp.add), params, extra_args, batch)
