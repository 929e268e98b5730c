"""What every optimizer built here must do, whatever its statistic, mask and placement."""

import itertools
import warnings

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from transforms import HardMask, SnrMask, SoftMask, ema_statistic, poprisk_adamw, poprisk_gate

PARAMS = {"w": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), "b": np.array(0.3, np.float32)}
STATISTICS = {
    "default": ema_statistic(),
    "other": ema_statistic(b1=0.5, rho=0.8, state_dtype=jnp.bfloat16),
}
MASKS = {
    "hard": HardMask(alpha=0.5),
    "soft": SoftMask(alpha=0.1, lam=0.5, eps=1e-6),
    "snr": SnrMask(alpha=0.5, lam=2.0, eps=1e-6),
}
PLACEMENTS = {
    "gradient": lambda statistic, mask: optax.chain(poprisk_gate(statistic=statistic, mask=mask), optax.adam(0.1)),
    "step": lambda statistic, mask: poprisk_gate(optax.adam(0.1), statistic=statistic, mask=mask),
}
COMBINATIONS = [*itertools.product(PLACEMENTS, ["default"], MASKS), *itertools.product(PLACEMENTS, ["other"], ["snr"])]
OPTIMIZERS = {
    f"{placement}, {statistic}, {mask}": PLACEMENTS[placement](STATISTICS[statistic], MASKS[mask])
    for placement, statistic, mask in COMBINATIONS
}
OPTIMIZERS |= {f"adamw, {mask}": poprisk_adamw(0.1, weight_decay=0.1, mask=MASKS[mask]) for mask in MASKS}
OPTIMIZERS |= {"adamw, state_dtype": poprisk_adamw(0.1, mu_dtype=jnp.bfloat16, state_dtype=jnp.bfloat16)}

each_optimizer = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
# Wrappers see the state as an opaque tree, so one statistic and mask a placement is enough for them.
each_placement = pytest.mark.parametrize(
    "tx",
    [OPTIMIZERS["gradient, default, soft"], OPTIMIZERS["step, default, snr"], OPTIMIZERS["adamw, soft"]],
    ids=["gradient", "step", "adamw"],
)


def gradients_of(num_steps, params=PARAMS, seed=0):
    """Noisy gradients with a mean, stacked along the first axis."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(k, (num_steps, *p.shape), p.dtype) for k, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [n + 1 for n in noise])


def steps(gradients):
    num_steps = len(jax.tree.leaves(gradients)[0])
    return [jax.tree.map(lambda g: g[t], gradients) for t in range(num_steps)]  # noqa: B023


def train(tx, gradients, params=PARAMS, state=None, **extra_args):
    """A plain loop: final parameters and state."""
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for gradient in steps(gradients):
        updates, state = update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(actual, expected, rtol=1e-5, atol=1e-7):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(e, np.float32), rtol=rtol, atol=atol)


def differ(tree, other):
    return any(bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (tree, other)), strict=True))


def avals(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)


@pytest.mark.parametrize("neutral", [SnrMask(lam=0.0, eps=0.0), SoftMask(alpha=0.0, lam=0.0, eps=0.0)])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("make", "inner"),
    [
        (lambda mask: optax.chain(poprisk_gate(mask=mask), optax.adam(0.1)), optax.adam(0.1)),
        (lambda mask: poprisk_gate(optax.adamw(0.1, weight_decay=0.3), mask=mask), optax.adamw(0.1, weight_decay=0.3)),
        (lambda mask: poprisk_adamw(0.1, weight_decay=0.3, mask=mask), optax.adamw(0.1, weight_decay=0.3)),
        (lambda mask: poprisk_gate(optax.lamb(0.1), mask=mask), optax.lamb(0.1)),
    ],
    ids=["gradient", "step", "poprisk_adamw", "not elementwise"],
)
def test_a_neutral_gate_is_its_inner_optimizer(neutral, make, inner, jit):
    # A coordinate without any gradient still decays: the neutral gate must not shut it.
    gradients = gradients_of(3) | {"b": jnp.zeros(3)}
    gated, plain = make(neutral), inner
    gated_update, plain_update = (jax.jit(tx.update) if jit else tx.update for tx in (gated, plain))
    gated_state, plain_state = gated.init(PARAMS), plain.init(PARAMS)
    for gradient in steps(gradients):
        ours, gated_state = gated_update(gradient, gated_state, PARAMS)
        theirs, plain_state = plain_update(gradient, plain_state, PARAMS)
        if jit:  # Fusion may round differently.
            assert_close(ours, theirs, rtol=1e-6)
        else:
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@each_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x64", [False, True])
def test_shapes_dtypes_and_weak_types_are_stable(tx, dtype, x64):
    with jax.enable_x64(x64):
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
        state = tx.init(params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
        assert avals(new_state) == avals(state)
        assert avals(updates) == avals(params)


@each_optimizer
def test_a_jitted_loop_compiles_once_and_equals_scan_and_eager(tx):
    gradients = gradients_of(3)
    traces = []

    def step(carry, gradient, **extra_args):
        traces.append(None)
        params, state = carry
        updates, state = tx.update(gradient, state, params, **extra_args)
        return (optax.apply_updates(params, updates), state), None

    jitted = jax.jit(step)
    start = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    carry, carries = start, []
    for gradient in steps(gradients):
        carry, _ = jitted(carry, gradient)
        carries.append(carry)
    assert len(traces) == 1
    assert_close(jax.lax.scan(step, start, gradients)[0], carries[-1], rtol=1e-4, atol=1e-6)
    # Extra arguments that nothing asked for are accepted, and make no difference.
    eager, _ = step(start, steps(gradients)[0], unexpected=jnp.array(1.0), value=2.0)
    assert_close(eager, carries[0], atol=1e-6)


@each_placement
def test_the_result_takes_extra_arguments(tx):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("name", ["value", "inner_state"])
def test_extra_arguments_and_params_reach_inner_and_statistic(name):
    def update(updates, state, params=None, **extra_args):
        return jax.tree.map(lambda u, p: u * extra_args[name] + p, updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = poprisk_gate(inner, mask=SnrMask(lam=0.0, eps=0.0))
    updates, _ = tx.update(jnp.array(2.0), tx.init(jnp.array(1.0)), jnp.array(1.0), **{name: 10.0})
    assert updates == 21.0


@each_placement
def test_vmap_equals_a_loop_over_runs(tx):
    gradients = [gradients_of(3, seed=seed) for seed in (1, 2)]
    expected = [train(tx, g)[0] for g in gradients]

    def run(gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), gradients)[0][0]

    stacked = jax.vmap(run)(jax.tree.map(lambda *g: jnp.stack(g), *gradients))
    assert_close(stacked, jax.tree.map(lambda *p: jnp.stack(p), *expected), rtol=1e-4)


@each_placement
def test_the_state_can_be_donated(tx):
    state = tx.init(PARAMS)
    step = jax.jit(tx.update, donate_argnums=1)
    for gradient in steps(gradients_of(2)):
        _, state = step(gradient, state, PARAMS)


@each_placement
def test_half_precision_parameters_follow_single_precision(tx):
    halves = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    gradients = gradients_of(3)
    params, _ = train(tx, jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients), halves)
    assert_close(params, train(tx, gradients)[0], rtol=0.05, atol=0.05)


def test_a_wider_state_dtype_sets_the_precision_of_the_statistic():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")  # A cap of float64 squares cast to float32 would overflow.
        tx = poprisk_adamw(0.1, state_dtype=jnp.float64)
        gradient = jnp.full(1, 1 / 3, jnp.float32)
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        variance = state[0].statistic_state.variance
        assert variance.dtype == jnp.float64
        np.testing.assert_allclose(variance, (1 - 0.99) * np.float64(gradient) ** 2, rtol=1e-12)


@each_placement
def test_masked(tx):
    gradients = gradients_of(3)
    params, _ = train(optax.masked(tx, {"w": True, "b": False}), gradients)
    alone, _ = train(tx, gradients["w"], PARAMS["w"])
    assert_close(params["w"], alone)
    np.testing.assert_allclose(params["b"], PARAMS["b"] + gradients["b"].sum(), rtol=1e-5)


@each_placement
def test_partition(tx):
    gradients = gradients_of(3)
    # The label "unused" makes a gate over an empty tree.
    transforms = {"gated": tx, "plain": optax.sgd(0.1), "unused": tx}
    params, _ = train(optax.multi_transform(transforms, {"w": "gated", "b": "plain"}), gradients)
    assert_close(params["w"], train(tx, gradients["w"], PARAMS["w"])[0])
    assert_close(params["b"], train(optax.sgd(0.1), gradients["b"], PARAMS["b"])[0])


@each_placement
def test_multi_steps_sees_accumulated_gradients(tx):
    gradients = gradients_of(4)
    means = jax.tree.map(lambda g: g.reshape(2, 2, *g.shape[1:]).mean(axis=1), gradients)
    accumulated, _ = train(optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation(), gradients)
    assert_close(accumulated, train(tx, means)[0], rtol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda learning_rate, alpha: poprisk_adamw(learning_rate, mask=SnrMask(alpha=alpha)),
        lambda learning_rate, alpha: poprisk_gate(optax.adam(learning_rate), mask=HardMask(alpha=alpha)),
        lambda learning_rate, alpha: poprisk_gate(optax.adam(learning_rate), statistic=ema_statistic(rho=alpha)),
    ],
    ids=["poprisk_adamw", "mask", "statistic"],
)
def test_injected_hyperparameters_change_without_recompiling(build):
    tx = optax.inject_hyperparams(build)(learning_rate=0.1, alpha=0.1)
    traces = []

    @jax.jit
    def step(gradient, state):
        traces.append(None)
        return tx.update(gradient, state, PARAMS)

    *early, last = steps(gradients_of(4, seed=3))
    states = {alpha: tx.init(PARAMS) for alpha in (0.1, 0.9)}
    outcomes = {}
    for alpha, state in states.items():
        # A strong type from the first step on, as inject_hyperparams itself keeps it.
        state.hyperparams["alpha"] = jnp.asarray(alpha, state.hyperparams["alpha"].dtype)
        for gradient in early:
            _, state = step(gradient, state)
        outcomes[alpha], _ = step(last, state)

        plain = build(0.1, alpha)
        state = plain.init(PARAMS)
        for gradient in early:
            _, state = plain.update(gradient, state, PARAMS)
        assert_close(outcomes[alpha], plain.update(last, state, PARAMS)[0], rtol=1e-4)
    assert len(traces) == 1
    assert differ(outcomes[0.1], outcomes[0.9])


def test_inject_hyperparams_takes_poprisk_adamw_itself():
    schedule = optax.linear_schedule(0.1, 0.0, 3)
    tx = optax.inject_hyperparams(poprisk_adamw)(learning_rate=schedule, weight_decay=0.1)
    assert_close(train(tx, gradients_of(3))[0], train(poprisk_adamw(schedule, weight_decay=0.1), gradients_of(3))[0])


@each_placement
def test_nan_gradients_do_not_poison_a_state_under_apply_if_finite(tx):
    gradients = gradients_of(3)
    with_nan = jax.tree.map(lambda g: jnp.insert(g, 1, jnp.nan, axis=0), gradients)
    params, state = train(optax.apply_if_finite(tx, max_consecutive_errors=2), with_nan)
    expected_params, expected_state = train(tx, gradients)
    assert_close(params, expected_params)
    assert_close(state.inner_state, expected_state)


@each_placement
def test_train_state(tx):
    gradients = gradients_of(3)
    state = flax.training.train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda state, gradient: state.apply_gradients(grads=gradient))
    for gradient in steps(gradients):
        state = step(state, gradient)
    assert_close(state.params, train(tx, gradients)[0])


@each_placement
def test_nnx_optimizer(tx):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    x, y = jax.random.normal(jax.random.key(0), (3, 8, 2)), jnp.ones((8, 1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, params = nnx.split(model)

    def loss(model, x):
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    params = jax.tree.map(jnp.copy, params)  # The optimizer updates the model's own arrays in place.
    state = tx.init(params)
    for batch in x:
        step(model, optimizer, batch)
        gradient = jax.grad(lambda p, batch=batch: loss(nnx.merge(graph, p), batch))(params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(params))


@each_placement
def test_state_survives_an_orbax_round_trip(tx, tmp_path):
    gradients = gradients_of(4)
    first, last = (jax.tree.map(lambda g, s=s: g[s], gradients) for s in (slice(2), slice(2, None)))
    params, state = train(tx, first)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    assert_close(restored, state)
    assert_close(train(tx, last, params, restored), train(tx, gradients))


def test_poprisk_adamw_keeps_one_number_a_parameter_more_than_adamw():
    def num_numbers(tx):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, PARAMS)))

    size = sum(p.size for p in jax.tree.leaves(PARAMS))
    assert num_numbers(poprisk_adamw(0.1)) == num_numbers(optax.adamw(0.1)) + size
    # The stand-alone gate also keeps a mean and a step counter of its own.
    assert num_numbers(poprisk_gate(optax.adamw(0.1))) == num_numbers(optax.adamw(0.1)) + 2 * size + 1


def test_none_leaves_pass_through():
    params = {"w": PARAMS["w"], "static": None}
    tx = poprisk_gate(optax.adam(0.1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["static"] is None
