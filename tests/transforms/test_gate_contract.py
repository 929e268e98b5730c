"""What every optimizer built here must do, whatever its statistic, threshold, mask, reduction and placement."""

import itertools
import warnings

import equinox as eqx
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from transforms import (
    Alpha,
    ByLabel,
    HardMask,
    OpenShare,
    PerRow,
    PerTensor,
    SnrMask,
    SoftMask,
    Summary,
    TStatistic,
    adam_moments_statistic,
    adam_statistic,
    algorithm_1,
    batch_statistic,
    ema_statistic,
    poprisk_adamw,
    poprisk_gate,
    popriskmin,
    snr_grad,
)

PARAMS = {"w": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), "b": np.array(0.3, np.float32)}
PLACEMENTS = {
    "gradient": lambda **options: optax.chain(poprisk_gate(**options), optax.adam(0.1)),
    "step": lambda **options: poprisk_gate(optax.adam(0.1), **options),
    "adamw": lambda **options: poprisk_adamw(0.1, weight_decay=0.1, **options),
}
STATISTICS = {
    "ema": ema_statistic(),
    "ema, bfloat16": ema_statistic(b1=0.5, rho=0.8, data_noise=0.01, state_dtype=jnp.bfloat16),
    "batch": batch_statistic(),
    "batch, b1": batch_statistic(b1=0.5),
}
ADAM_STATISTICS = {
    "adam": adam_statistic(),
    "adam, bfloat16": adam_statistic(state_dtype=jnp.bfloat16),
    "adam moments": adam_moments_statistic(),
}
THRESHOLDS = {"alpha": Alpha(0.1), "t": TStatistic(optax.linear_schedule(0.5, 1.5, 3)), "share": OpenShare(0.4)}
MASKS = {"hard": HardMask(), "soft": SoftMask(lam=0.5, eps=1e-6), "snr": SnrMask(lam=2.0, eps=1e-6)}
COMBINATIONS = [
    *itertools.product(("gradient", "step"), STATISTICS, THRESHOLDS, MASKS),
    *itertools.product(("adamw",), STATISTICS | ADAM_STATISTICS, THRESHOLDS, MASKS),
]


def build(placement, statistic, threshold, mask, **options):
    statistic = (STATISTICS | ADAM_STATISTICS)[statistic]
    return PLACEMENTS[placement](statistic=statistic, threshold=THRESHOLDS[threshold], mask=MASKS[mask], **options)


def optimizer(placement, statistic, threshold, mask, **options):
    name = ", ".join([placement, statistic, threshold, mask, *(type(o).__name__ for o in options.values())])
    return pytest.param(build(placement, statistic, threshold, mask, **options), id=name)


each_optimizer = pytest.mark.parametrize(
    "tx",
    [
        optimizer("gradient", "ema", "t", "snr"),
        optimizer("gradient", "batch", "alpha", "hard", reduction=PerTensor()),
        optimizer("gradient", "ema, bfloat16", "share", "soft", reduction=PerRow()),
        optimizer("step", "ema", "share", "hard", summary=Summary(of_step=True)),
        optimizer("step", "batch, b1", "t", "soft", reduction=ByLabel("all")),
        optimizer("step", "ema, bfloat16", "alpha", "snr", summary=None),
        optimizer("adamw", "adam", "t", "snr"),
        optimizer("adamw", "adam, bfloat16", "share", "snr", reduction=PerTensor()),
        optimizer("adamw", "adam moments", "share", "soft"),
        optimizer("adamw", "batch", "t", "snr"),
        optimizer("adamw", "ema", "alpha", "hard", warmup=jnp.array(1), floor=jnp.array(0.1)),
        pytest.param(algorithm_1(0.1, summary=None), id="algorithm_1"),
        pytest.param(popriskmin(0.1, reduction=PerTensor(), summary=None), id="popriskmin"),
        pytest.param(snr_grad(0.1, summary=None), id="snr_grad"),
    ],
)
# Wrappers see the state as an opaque tree, so one statistic and mask a placement is enough for them.
each_placement = pytest.mark.parametrize(
    "tx",
    [
        optimizer("gradient", "ema", "alpha", "soft"),
        optimizer("step", "ema", "t", "snr", summary=None),
        optimizer("adamw", "adam", "t", "soft", summary=None),
        optimizer("adamw", "batch, b1", "t", "snr", summary=None),
    ],
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


def moments_of(gradient):
    """What `batch_statistic` needs; every other optimizer has to accept, and ignore, extra arguments."""
    return {"sum_sq_diff_grads": jax.tree.map(lambda g: 3 + g**2, gradient), "sample_size": jnp.array(4)}


def train(tx, gradients, params=PARAMS, state=None):
    """A plain loop: final parameters and state."""
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for gradient in steps(gradients):
        updates, state = update(gradient, state, params, **moments_of(gradient))
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


NEUTRAL = {
    "snr": {"mask": SnrMask(lam=0.0)},
    "soft": {"mask": SoftMask(lam=0.0), "threshold": TStatistic(0.0)},
    "floor": {"floor": 1.0, "mask": HardMask()},
    "warmup": {"warmup": 9, "mask": HardMask()},
}
PLAIN = {
    "gradient": (PLACEMENTS["gradient"], optax.adam(0.1)),
    "step": (
        lambda **options: poprisk_gate(optax.adamw(0.1, weight_decay=0.3), **options),
        optax.adamw(0.1, weight_decay=0.3),
    ),
    "poprisk_adamw": (
        lambda **options: poprisk_adamw(0.1, weight_decay=0.3, **options),
        optax.adamw(0.1, weight_decay=0.3),
    ),
    "adam moments": (
        lambda **options: poprisk_adamw(0.1, statistic=adam_moments_statistic(), **options),
        optax.adamw(0.1),
    ),
    "batch": (lambda **options: poprisk_gate(optax.sgd(0.1), statistic=batch_statistic(), **options), optax.sgd(0.1)),
    "not elementwise": (lambda **options: poprisk_gate(optax.lamb(0.1), **options), optax.lamb(0.1)),
}


@pytest.mark.parametrize("neutral", NEUTRAL.values(), ids=NEUTRAL)
@pytest.mark.parametrize(("make", "inner"), PLAIN.values(), ids=PLAIN)
def test_a_neutral_gate_is_its_inner_optimizer(neutral, make, inner):
    # A coordinate without any gradient still decays: the neutral gate must not shut it.
    gradients = gradients_of(3) | {"b": jnp.zeros(3)}
    gated = make(summary=None, **neutral)
    gated_state, plain_state = gated.init(PARAMS), inner.init(PARAMS)
    for gradient in steps(gradients):
        ours, gated_state = gated.update(gradient, gated_state, PARAMS, **moments_of(gradient))
        theirs, plain_state = inner.update(gradient, plain_state, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(("make", "inner"), PLAIN.values(), ids=PLAIN)
def test_a_compiled_neutral_gate_is_its_inner_optimizer_to_rounding(make, inner):
    gradients = gradients_of(3)
    assert_close(train(make(mask=SnrMask(lam=0.0)), gradients)[0], train(inner, gradients)[0], rtol=1e-5)


@pytest.mark.parametrize(("placement", "statistic"), sorted({c[:2] for c in COMBINATIONS}))
@pytest.mark.parametrize("x64", [False, True])
def test_every_combination_keeps_shapes_dtypes_and_weak_types(placement, statistic, x64):
    with jax.enable_x64(x64):
        for threshold, mask in itertools.product(THRESHOLDS, MASKS):
            tx = build(placement, statistic, threshold, mask, summary=None)
            state = tx.init(PARAMS)
            updates, new_state = jax.eval_shape(tx.update, PARAMS, state, PARAMS, **moments_of(PARAMS))
            assert avals(new_state) == avals(state)
            assert avals(updates) == avals(PARAMS)


@each_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x64", [False, True])
def test_shapes_dtypes_and_weak_types_are_stable(tx, dtype, x64):
    with jax.enable_x64(x64):
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
        state = tx.init(params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params, **moments_of(params))
        assert avals(new_state) == avals(state)
        assert avals(updates) == avals(params)


@each_optimizer
def test_a_jitted_loop_compiles_once_and_equals_scan_and_eager(tx):
    gradients = gradients_of(3)
    traces = []

    def step(carry, gradient, **extra_args):
        traces.append(None)
        params, state = carry
        updates, state = tx.update(gradient, state, params, **moments_of(gradient), **extra_args)
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
    tx = poprisk_gate(inner, mask=SnrMask(lam=0.0))
    updates, _ = tx.update(jnp.array(2.0), tx.init(jnp.array(1.0)), jnp.array(1.0), **{name: 10.0})
    assert updates == 21.0


@each_placement
def test_vmap_equals_a_loop_over_runs(tx):
    gradients = [gradients_of(3, seed=seed) for seed in (1, 2)]
    expected = [train(tx, g)[0] for g in gradients]

    def run(gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params, **moments_of(gradient))
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), gradients)[0][0]

    stacked = jax.vmap(run)(jax.tree.map(lambda *g: jnp.stack(g), *gradients))
    assert_close(stacked, jax.tree.map(lambda *p: jnp.stack(p), *expected), rtol=1e-4)


@each_placement
def test_the_state_can_be_donated(tx):
    state = tx.init(PARAMS)
    step = jax.jit(tx.update, donate_argnums=1)
    for gradient in steps(gradients_of(2)):
        _, state = step(gradient, state, PARAMS, **moments_of(gradient))


@each_placement
def test_half_precision_parameters_follow_single_precision(tx):
    halves = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    gradients = gradients_of(3)
    params, _ = train(tx, jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients), halves)
    assert_close(params, train(tx, gradients)[0], rtol=0.05, atol=0.05)


def test_a_wider_state_dtype_sets_the_precision_of_the_statistic():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")  # A cap of float64 squares cast to float32 would overflow.
        tx = poprisk_adamw(0.1, statistic=ema_statistic(state_dtype=jnp.float64))
        gradient = jnp.full(1, 1 / 3, jnp.float32)
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        variance = state[0].statistic_state.variance
        assert variance.dtype == jnp.float64
        np.testing.assert_allclose(variance, (1 - 0.99) * np.float64(gradient) ** 2, rtol=1e-12)


@each_placement
def test_masked(tx):
    gradients = gradients_of(3)
    masked = optax.masked(tx, {"w": True, "b": False}, mask_compatible_extra_args=True)
    params, _ = train(masked, gradients)
    alone, _ = train(tx, gradients["w"], PARAMS["w"])
    assert_close(params["w"], alone)
    np.testing.assert_allclose(params["b"], PARAMS["b"] + gradients["b"].sum(), rtol=1e-5)


@each_placement
def test_partition(tx):
    gradients = gradients_of(3)
    # The label "unused" makes a gate over an empty tree.
    transforms = {"gated": tx, "plain": optax.sgd(0.1), "unused": tx}
    labels = {"w": "gated", "b": "plain"}
    params, _ = train(optax.partition(transforms, labels, mask_compatible_extra_args=True), gradients)
    assert_close(params["w"], train(tx, gradients["w"], PARAMS["w"])[0])
    assert_close(params["b"], train(optax.sgd(0.1), gradients["b"], PARAMS["b"])[0])


@pytest.mark.parametrize("statistic", ["batch", "batch, b1"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_multi_steps_around_exact_moments_is_refused(placement, statistic):
    """However deep the gate is inside, and however the step is run."""
    tx = PLACEMENTS[placement](statistic=STATISTICS[statistic])
    inside = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.masked(tx, True)), 3)
    gradient = steps(gradients_of(1))[0]
    for accumulated in (optax.MultiSteps(tx, 2), optax.MultiSteps(inside, lambda step: step + 1)):
        state = accumulated.init(PARAMS)
        for run in (
            accumulated.update,
            jax.jit(accumulated.update),
            jax.jit(accumulated.gradient_transformation().update),
        ):
            with pytest.raises(
                NotImplementedError, match=r"inside optax.MultiSteps.*gradient_moments.*microbatch_size"
            ):
                run(gradient, state, PARAMS, **moments_of(gradient))
    train(tx, gradients_of(2))  # outside nothing is refused, afterwards as before


@pytest.mark.parametrize("b1", [None, 0.5])
@pytest.mark.parametrize("jit", [True, False])
def test_aggregated_micro_batches_are_the_whole_batch(b1, jit):
    """`optax.experimental.aggregating` pools the moments of micro-batches: the step is that of all their examples."""
    tx = poprisk_gate(optax.sgd(0.1), statistic=batch_statistic(b1), mask=SnrMask(), summary=None)
    examples = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), (2, 12, *p.shape)) + 0.3, PARAMS)
    aggregating = optax.experimental.aggregating
    pooled = aggregating.process(
        optax.identity(),
        aggregating.get_per_element_mean_and_sum_sq_diff_grads(per_elt_axis=0, accumulation_steps=3),
        tx,
        aggregator_has_aux=True,
    )
    update = jax.jit(pooled.update) if jit else pooled.update
    state, whole_state = pooled.init(PARAMS), tx.init(PARAMS)
    for batch in steps(examples):
        for start in (0, 4, 8):
            part = jax.tree.map(lambda g, start=start: g[start : start + 4], batch)
            updates, state = update(part, state, PARAMS)
            assert differ(updates, jax.tree.map(jnp.zeros_like, PARAMS)) == (start == 8)
        whole = jax.tree.map(lambda g: np.asarray(g, np.float64), batch)
        moments = {
            "mean_grads": jax.tree.map(lambda g: jnp.asarray(g.mean(0), jnp.float32), whole),
            "sum_sq_diff_grads": jax.tree.map(lambda g: jnp.asarray(((g - g.mean(0)) ** 2).sum(0), jnp.float32), whole),
            "sample_size": 12,
        }
        expected, whole_state = tx.update(moments["mean_grads"], whole_state, PARAMS, **moments)
        assert_close(updates, expected, rtol=1e-4, atol=1e-6)


@each_optimizer
def test_only_trees_like_the_parameters_are_taken_for_parameters(tx):
    state = tx.init(PARAMS)
    marked = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, param: leaf.shape == param.shape,
        state,
        PARAMS,
        transform_non_params=lambda leaf: leaf.ndim < 3,
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert all(jax.tree.leaves(marked))
    names = optax.tree_utils.tree_map_params(tx, lambda _: "param", state, transform_non_params=lambda _: "other")
    pairs = zip(jax.tree.leaves(names), jax.tree.leaves(state), strict=True)
    assert all(name == "other" for name, leaf in pairs if leaf.shape not in ((2, 2), ()))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_multi_steps_sees_accumulated_gradients(placement):
    tx = PLACEMENTS[placement](mask=HardMask())
    gradients = gradients_of(4)
    means = jax.tree.map(lambda g: g.reshape(2, 2, *g.shape[1:]).mean(axis=1), gradients)
    accumulated, _ = train(optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation(), gradients)
    assert_close(accumulated, train(tx, means)[0], rtol=1e-4)


SWEEPS = {
    "threshold": (TStatistic, lambda z: {"threshold": TStatistic(z)}),
    "share": (OpenShare, lambda share: {"threshold": OpenShare(share)}),
    "alpha": (Alpha, lambda alpha: {"threshold": Alpha(alpha)}),
    "mask": (lambda lam: SnrMask(lam=lam), lambda lam: {"mask": SnrMask(lam=lam)}),
    "floor": (None, lambda floor: {"floor": floor}),
    "warmup": (None, lambda warmup: {"warmup": 10 * warmup}),
    "b1": (None, lambda b1: {"statistic": ema_statistic(b1=b1)}),
    "data_noise": (None, lambda data_noise: {"statistic": ema_statistic(data_noise=data_noise)}),
    "batch b1": (None, lambda b1: {"statistic": batch_statistic(b1=b1)}),
}


@pytest.mark.parametrize("options_of", [options for _, options in SWEEPS.values()], ids=SWEEPS)
def test_injected_hyperparameters_change_without_recompiling(options_of):
    def make(knob):
        return poprisk_gate(optax.sgd(1.0), summary=None, **options_of(knob))

    tx = optax.inject_hyperparams(make)(knob=0.1)
    traces = []

    @jax.jit
    def step(gradient, state):
        traces.append(None)
        return tx.update(gradient, state, PARAMS, **moments_of(gradient))

    gradients = steps(gradients_of(4, seed=3))
    outcomes = []
    for knob in (0.1, 0.9):
        state = tx.init(PARAMS)
        # A strong type from the first step on, as inject_hyperparams itself keeps it.
        state.hyperparams["knob"] = jnp.asarray(knob, state.hyperparams["knob"].dtype)
        for gradient in gradients:
            updates, state = step(gradient, state)
        outcomes.append(updates)

        plain, start = jax.jit(make(knob).update), make(knob).init(PARAMS)
        for gradient in gradients:
            expected, start = plain(gradient, start, PARAMS, **moments_of(gradient))
        assert_close(updates, expected, rtol=1e-4)
    assert len(traces) == 1
    assert differ(*outcomes)


@pytest.mark.parametrize("name", ["threshold", "share", "alpha", "mask"])
def test_objects_are_arguments_of_jit_and_swept_by_vmap(name):
    make_object, _ = SWEEPS[name]
    keyword = "mask" if name == "mask" else "threshold"
    gradients = gradients_of(3)
    traces = []

    def run(thing):
        traces.append(None)
        tx = poprisk_gate(**{keyword: thing}, summary=None)

        def step(state, gradient):
            updates, state = tx.update(gradient, state)
            return state, updates

        return jax.lax.scan(step, tx.init(PARAMS), gradients)[1]

    jitted, values = jax.jit(run), (0.2, 0.8)
    apart = [jitted(make_object(value)) for value in values]
    assert len(traces) == 1
    assert differ(*apart)
    swept = jax.vmap(run)(jax.vmap(make_object)(jnp.array(values)))
    assert_close(swept, jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart), rtol=1e-4)


@pytest.mark.parametrize("make", [poprisk_adamw, algorithm_1, popriskmin, snr_grad])
def test_inject_hyperparams_takes_the_aliases_themselves(make):
    schedule = optax.linear_schedule(0.1, 0.0, 3)
    tx = optax.inject_hyperparams(make)(learning_rate=schedule, weight_decay=0.1)
    assert_close(train(tx, gradients_of(3))[0], train(make(schedule, weight_decay=0.1), gradients_of(3))[0])
    assert {"b1", "b2", "eps", "learning_rate", "weight_decay"} <= tx.init(PARAMS).hyperparams.keys()


@each_placement
def test_nan_gradients_do_not_poison_a_state_under_apply_if_finite(tx):
    gradients = gradients_of(3)
    with_nan = jax.tree.map(lambda g: jnp.insert(g, 1, jnp.nan, axis=0), gradients)
    params, state = train(optax.apply_if_finite(tx, max_consecutive_errors=2), with_nan)
    expected_params, expected_state = train(tx, gradients)
    assert_close(params, expected_params)
    assert_close(state.inner_state, expected_state)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_train_state(placement):
    tx = PLACEMENTS[placement]()
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
        gradient = nnx.grad(loss)(model, x)
        optimizer.update(model, gradient, **moments_of(gradient))

    params = jax.tree.map(jnp.copy, params)  # The optimizer updates the model's own arrays in place.
    state = tx.init(params)
    for batch in x:
        step(model, optimizer, batch)
        gradient = jax.grad(lambda p, batch=batch: loss(nnx.merge(graph, p), batch))(params)
        updates, state = tx.update(gradient, state, params, **moments_of(gradient))
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


@each_placement
def test_equinox(tx):
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (3, 8, 3)), jnp.ones((8, 2))

    def loss(model, x):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    @eqx.filter_jit
    def step(model, state, x):
        gradient = eqx.filter_grad(loss)(model, x)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(gradient, state, arrays, **moments_of(gradient))
        return eqx.apply_updates(model, updates), state

    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)
    expected_state = state
    for batch in x:
        model, state = step(model, state, batch)
        gradient = jax.grad(lambda p, batch=batch: loss(eqx.combine(p, static), batch))(params)
        updates, expected_state = jax.jit(tx.update)(gradient, expected_state, params, **moments_of(gradient))
        params = optax.apply_updates(params, updates)
    assert_close(jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)), jax.tree.leaves(params), rtol=1e-4)


INNERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_other_optimizers_inside_take_the_step_that_is_gated(inner):
    gradients = gradients_of(4)
    tx, plain = poprisk_gate(inner(), mask=HardMask(), summary=None), inner()
    statistic = ema_statistic()
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    state, plain_state, watched = tx.init(PARAMS), plain.init(PARAMS), statistic.init(PARAMS)
    seen = set()
    for gradient in steps(gradients):
        ours, state = update(gradient, state, PARAMS)
        theirs, plain_state = plain_update(gradient, plain_state, PARAMS)
        watched, moments = statistic.update(gradient, watched)
        q = jax.tree.map(lambda m, s: m**2 > moments.noise_ratio * s, moments.mean, moments.variance)  # noqa: B023
        assert_close(ours, jax.tree.map(jnp.multiply, q, theirs), rtol=1e-4, atol=1e-6)
        seen |= {bool(x) for leaf in jax.tree.leaves(q) for x in np.ravel(leaf)}
    assert seen == {False, True}


@pytest.mark.parametrize("placement", ["gradient", "step"])
def test_schedule_free(placement):
    gradients = gradients_of(4)

    def schedule_free(base):
        return optax.contrib.schedule_free(base, 0.1)

    def make(**options):
        base = optax.sgd(0.1)
        return optax.chain(poprisk_gate(**options), base) if placement == "gradient" else poprisk_gate(base, **options)

    plain = train(schedule_free(optax.sgd(0.1)), gradients)[0]
    assert_close(train(schedule_free(make(floor=1.0)), gradients)[0], plain)
    params, state = train(schedule_free(make()), gradients)
    assert differ(params, plain)
    evaluated = optax.contrib.schedule_free_eval_params(state, params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(evaluated))


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (jax.nn.relu, "got the function relu at params.*eqx.filter"),
        (lambda x: x, "got the function <lambda> at params.*eqx.filter"),
        ("sgd", "got a str at params"),
        (object(), "got a object at params"),
        (np.array(["a"]), "at params"),
    ],
)
@each_placement
def test_leaves_that_are_no_arrays_are_refused_by_name(tx, leaf, said):
    with pytest.raises(TypeError, match=said):
        tx.init({"w": jnp.ones(2), "layers": [leaf]})


@each_placement
def test_a_whole_equinox_model_is_refused_by_name_with_the_way_out(tx):
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"at params\.activation.*eqx\.filter\(model, eqx\.is_inexact_array\)"):
        tx.init(model)
    tx.init(eqx.filter(model, eqx.is_inexact_array))


def arrays_like_the_parameters(tx):
    state = jax.eval_shape(tx.init, jnp.zeros((7, 11)))
    return sum(leaf.shape == (7, 11) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("tx", "inner", "more"),
    [
        (poprisk_adamw(0.1), optax.adamw(0.1), 1),
        (poprisk_adamw(0.1, statistic=adam_moments_statistic()), optax.adamw(0.1), 0),
        (poprisk_adamw(0.1, statistic=batch_statistic()), optax.adamw(0.1), 0),
        (poprisk_adamw(0.1, statistic=ema_statistic()), optax.adamw(0.1), 2),
        (algorithm_1(0.1), optax.adamw(0.1), 1),
        (poprisk_gate(), optax.identity(), 2),
        (poprisk_gate(optax.adamw(0.1)), optax.adamw(0.1), 2),
        (poprisk_gate(statistic=batch_statistic()), optax.identity(), 0),
        (poprisk_gate(statistic=batch_statistic(b1=0.9)), optax.identity(), 2),
    ],
)
def test_parameter_sized_arrays_in_the_state(tx, inner, more):
    assert arrays_like_the_parameters(tx) == arrays_like_the_parameters(inner) + more


def test_the_rest_of_the_state_is_a_counter_a_small_summary_and_its_names():
    def num_leaves(tx):
        return len(jax.tree.leaves(jax.eval_shape(tx.init, jnp.zeros((7, 11)))))

    plain = num_leaves(optax.adamw(0.1))
    assert num_leaves(poprisk_adamw(0.1, summary=None)) == plain + 1 + 1
    assert num_leaves(poprisk_adamw(0.1)) == plain + 1 + 1 + 2


@pytest.mark.parametrize("reduction", [PerTensor(), PerRow(), ByLabel("all")])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_none_leaves_pass_through(placement, reduction):
    params = {"w": PARAMS["w"], "static": None}
    tx = PLACEMENTS[placement](reduction=reduction)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["static"] is None
