"""Every option changes the output, and every bad value is refused with its value, the rule and the remedy."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transforms
from transforms import (
    Alpha,
    ByLabel,
    HardMask,
    LeafSummary,
    OpenShare,
    PerRow,
    PerScalar,
    PerTensor,
    SnrMask,
    SoftMask,
    Statistic,
    Summary,
    TStatistic,
    adam_moments_statistic,
    adam_statistic,
    algorithm_1,
    batch_statistic,
    ema_statistic,
    finite_data_alpha,
    poprisk_adamw,
    poprisk_gate,
    popriskmin,
    snr_grad,
)

PARAMS = np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.0]], np.float32)
GRADIENTS = np.random.default_rng(0).normal(0.5, 1.0, (5, 2, 3)).astype(np.float32)
HALF = optax.linear_schedule(0.0, 1.0, 5)


def moments_of(gradient):
    return {"sum_sq_diff_grads": 1 + gradient**2, "sample_size": jnp.array(4)}


def run(tx):
    params, state, update = jnp.asarray(PARAMS), tx.init(PARAMS), jax.jit(tx.update)
    for gradient in GRADIENTS:
        updates, state = update(gradient, state, params, **moments_of(gradient))
        params = optax.apply_updates(params, updates)
    return params, state


def trajectory(tx):
    return run(tx)[0]


GATE_OPTIONS = {
    "inner": optax.adam(0.1),
    "statistic": ema_statistic(b1=0.5),
    "threshold": TStatistic(2.0),
    "mask": SoftMask(),
    "reduction": PerTensor(),
    "warmup": 3,
    "floor": 0.9,
    "summary": None,
}
# Each option's other value, of each builder: a name and how to build a gate from it.
OPTIONS = {
    poprisk_gate: (poprisk_gate, GATE_OPTIONS),
    poprisk_adamw: (
        lambda **options: poprisk_adamw(**{"learning_rate": 0.1, "weight_decay": 0.1, "mask": SnrMask()} | options),
        {name: value for name, value in GATE_OPTIONS.items() if name != "inner"}
        | {
            "learning_rate": optax.linear_schedule(0.1, 0.0, 5),
            "b1": 0.5,
            "b2": 0.5,
            "eps": 0.1,
            "eps_root": 0.1,
            "mu_dtype": jnp.bfloat16,
            "weight_decay": HALF,
            "statistic": adam_moments_statistic(),
            "weight_decay_mask": False,
        },
    ),
    ema_statistic: (
        lambda **options: poprisk_gate(summary=None, statistic=ema_statistic(**options)),
        {"b1": 0.5, "rho": 0.5, "data_noise": 0.5, "state_dtype": jnp.bfloat16},
    ),
    adam_statistic: (
        lambda **options: poprisk_adamw(0.1, summary=None, statistic=adam_statistic(**options), mask=SnrMask()),
        {"rho": 0.5, "data_noise": 0.5, "state_dtype": jnp.bfloat16},
    ),
    adam_moments_statistic: (
        lambda **options: poprisk_adamw(0.1, summary=None, statistic=adam_moments_statistic(**options), mask=SnrMask()),
        {"data_noise": 0.5},
    ),
    batch_statistic: (lambda **options: poprisk_gate(summary=None, statistic=batch_statistic(**options)), {"b1": 0.5}),
    HardMask: (lambda **options: poprisk_gate(summary=None, mask=HardMask(**options)), {}),
    SoftMask: (lambda **options: poprisk_gate(summary=None, mask=SoftMask(**options)), {"lam": 0.05, "eps": 0.05}),
    SnrMask: (lambda **options: poprisk_gate(summary=None, mask=SnrMask(**options)), {"lam": 0.05, "eps": 0.05}),
    Alpha: (lambda **options: poprisk_gate(summary=None, threshold=Alpha(**options)), {"alpha": HALF}),
    TStatistic: (lambda **options: poprisk_gate(summary=None, threshold=TStatistic(**options)), {"z": HALF}),
    OpenShare: (lambda **options: poprisk_gate(summary=None, threshold=OpenShare(**options)), {"share": HALF}),
    PerScalar: (lambda **options: poprisk_gate(summary=None, reduction=PerScalar(**options)), {}),
    PerTensor: (lambda **options: poprisk_gate(summary=None, reduction=PerTensor(**options)), {}),
    PerRow: (lambda **options: poprisk_gate(summary=None, reduction=PerRow(**options)), {"axis": 0}),
}
PRESET_OPTIONS = {
    name: value for name, value in OPTIONS[poprisk_adamw][1].items() if name not in ("threshold", "statistic")
} | {"learning_rate": HALF, "weight_decay": 0.5, "alpha": 0.1, "rho": 0.5}
for preset, other_mask in ((algorithm_1, SnrMask()), (popriskmin, SoftMask()), (snr_grad, SoftMask())):
    OPTIONS[preset] = (
        lambda preset=preset, **options: preset(**{"learning_rate": 0.1, "weight_decay": 0.1} | options),
        PRESET_OPTIONS | {"mask": other_mask},
    )
# Their options are tested below, by what they do to the state and to a tree.
ELSEWHERE = {Summary, ByLabel}


def test_every_option_of_everything_public_is_listed_here():
    """`gate_report` and `gate_audit` have files of their own."""
    data = {name for name in transforms.__all__ if name.endswith(("State", "Summary", "Report", "Audit"))}
    protocols = {"Mask", "Threshold", "Reduction", "Statistic", "StatisticFn", "Moments", "Level", "Pooled"}
    functions = {"finite_data_alpha", "join_moments", "gate_report", "gate_audit"}
    builders = {getattr(transforms, name) for name in set(transforms.__all__) - data - protocols - functions}
    assert builders <= OPTIONS.keys() | ELSEWHERE | {Summary}
    for builder, (_, options) in OPTIONS.items():
        assert options.keys() == inspect.signature(builder).parameters.keys(), builder


@pytest.mark.parametrize(("builder", "name"), [(b, n) for b, (_, options) in OPTIONS.items() for n in options])
def test_every_option_changes_the_outcome(builder, name):
    make, options = OPTIONS[builder]
    changed = make(**{name: options[name]})
    if name == "summary":
        assert jax.tree.structure(run(make())[1]) != jax.tree.structure(run(changed)[1])
    else:
        assert (trajectory(make()) != trajectory(changed)).any()


@pytest.mark.parametrize("make", [algorithm_1, popriskmin, snr_grad])
def test_presets_are_different_optimizers(make):
    assert (trajectory(make(0.1)) != trajectory(poprisk_adamw(0.1))).any()
    others = {algorithm_1, popriskmin, snr_grad} - {make}
    for other in others:
        assert (trajectory(make(0.1)) != trajectory(other(0.1))).any()


def test_options_of_a_summary_change_the_state_and_not_the_updates():
    def summary(**options):
        params, state = run(poprisk_gate(optax.sgd(0.1), summary=Summary(**options)))
        np.testing.assert_array_equal(params, trajectory(poprisk_gate(optax.sgd(0.1))))
        (row,) = state.summary
        return LeafSummary(*row)

    exact = summary(sample=None, every=1)
    assert summary(sample=2, every=1).sum_openness != exact.sum_openness
    assert summary(sample=None, every=3).sum_openness != exact.sum_openness
    assert jnp.isnan(exact.squared_norm)
    assert jnp.isfinite(summary(sample=None, every=1, of_step=True).squared_norm)


def test_labels_say_what_is_decided_on_together():
    params = {"a": jnp.ones(2), "b": jnp.full(3, 5.0)}
    gradients = {"a": jnp.array([0.1, 0.2]), "b": jnp.array([1.0, 1.1, -2.0])}
    extra = {"sum_sq_diff_grads": jax.tree.map(jnp.ones_like, gradients), "sample_size": 4}

    def updates(labels):
        tx = poprisk_gate(statistic=batch_statistic(), reduction=ByLabel(labels), summary=None)
        return tx.update(gradients, tx.init(params), **extra)[0]

    def q(labels):
        return [float(u[0] / g[0]) for u, g in zip(*map(jax.tree.leaves, (updates(labels), gradients)), strict=True)]

    together, apart = q("all"), q({"a": "one", "b": "two"})
    assert together[0] == pytest.approx(together[1])
    assert apart[0] < together[0] < apart[1]
    by_function = q(lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, tree))
    np.testing.assert_allclose(by_function, apart)
    tx = poprisk_gate(statistic=batch_statistic(), reduction=PerTensor(), summary=None)
    by_tensor = tx.update(gradients, tx.init(params), **extra)[0]
    jax.tree.map(np.testing.assert_allclose, by_tensor, updates({"a": "one", "b": "two"}))


def test_warmup_is_open_and_its_statistic_watches():
    tx = poprisk_gate(mask=HardMask(), threshold=TStatistic(100.0), warmup=2, summary=None)
    plain = poprisk_gate(mask=HardMask(), threshold=TStatistic(100.0), summary=None)
    state, watched = tx.init(PARAMS), plain.init(PARAMS)
    for step, gradient in enumerate(GRADIENTS):
        updates, state = tx.update(gradient, state)
        _, watched = plain.update(gradient, watched)
        np.testing.assert_array_equal(updates, gradient if step < 2 else 0.0)
    jax.tree.map(np.testing.assert_array_equal, state.statistic_state, watched.statistic_state)


def test_floor_is_the_least_openness():
    tx = poprisk_gate(mask=HardMask(), threshold=TStatistic(100.0), floor=0.25)
    updates, _ = tx.update(GRADIENTS[0], tx.init(PARAMS))
    np.testing.assert_allclose(updates, 0.25 * GRADIENTS[0])


def test_schedules_count_from_zero_as_in_optax():
    seen = []

    def schedule(step):
        seen.append(int(step))
        return 1.0

    tx = poprisk_gate(threshold=TStatistic(schedule), summary=None)
    state = tx.init(PARAMS)
    for gradient in GRADIENTS[:3]:
        _, state = tx.update(gradient, state)
    assert seen == [0, 1, 2]


def test_weight_decay_mask_and_learning_rate_act_as_in_adamw():
    options = {"learning_rate": optax.linear_schedule(0.1, 0.0, 5), "weight_decay": HALF}
    np.testing.assert_allclose(
        trajectory(poprisk_adamw(**options, mask=SnrMask(lam=0.0), weight_decay_mask=False)),
        trajectory(optax.with_extra_args_support(optax.adamw(**options, mask=False))),
        rtol=1e-6,
    )


# ---------------------------------------------------------------- bad values

NONNEGATIVE = [-1.0, -1, float("nan"), float("inf"), np.float32(-1e-9), jnp.array(-1.0), np.array([1.0, -1.0])]
DECAYS = [-0.1, 1.0, 1, 1.5, float("nan"), jnp.array(1.0), jnp.array(-0.5, jnp.bfloat16)]
IN_UNIT = [-0.1, 1.1, 2, float("nan"), float("inf"), jnp.array(-0.5), np.array([0.5, 1.5])]
RULES = {
    r"in \[0, 1\)": (DECAYS, {"b1", "b2", "rho"}),
    r"in \[0, 1\]": (IN_UNIT, {"floor", "share"}),
    "a finite number >= 0": (
        NONNEGATIVE,
        {"lam", "eps", "eps_root", "alpha", "z", "data_noise", "warmup", "learning_rate", "weight_decay"},
    ),
}
RULE_OF = {name: (rule, values) for rule, (values, names) in RULES.items() for name in names}
SCHEDULED = {"learning_rate", "weight_decay", "alpha", "z", "share"}
NO_NUMBERS = ["0.5", None, True, 1j, [0.5, None], lambda step: 0.5]
NUMBERS = [(b, n) for b, (_, options) in OPTIONS.items() for n in options if n in RULE_OF]


@pytest.mark.parametrize(("builder", "name"), NUMBERS)
def test_numbers_out_of_range(builder, name):
    rule, values = RULE_OF[name]
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be {rule}, got .*: \w+") as error:
            OPTIONS[builder][0](**{name: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(("builder", "name"), NUMBERS)
def test_values_that_are_no_numbers(builder, name):
    for value in NO_NUMBERS:
        if (callable(value) and name in SCHEDULED) or (value is None and builder is batch_statistic):
            continue
        with pytest.raises(TypeError, match=rf"^{name} must be a real number .*inject_hyperparams"):
            OPTIONS[builder][0](**{name: value})


@pytest.mark.parametrize(("builder", "name"), NUMBERS)
def test_traced_numbers_are_not_compared(builder, name):
    def build(value):
        OPTIONS[builder][0](**{name: value})
        return value

    assert jax.jit(build)(-1.0) == -1.0


@pytest.mark.parametrize("name", ["sample", "every"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), ("3", TypeError)])
def test_summaries_of_no_positive_integer(name, value, error):
    with pytest.raises(error, match=rf"^{name} must be an integer >= 1, got {value!r}: \w+"):
        Summary(**{name: value})


@pytest.mark.parametrize("inner", [None, 0.1, optax.adam, HardMask(), ema_statistic()])
def test_inner_of_the_wrong_kind(inner):
    with pytest.raises(
        TypeError, match=r"inner must be an optax.GradientTransformation .* got .*Call the factory first"
    ):
        poprisk_gate(inner)


BUILD = [poprisk_gate, lambda **options: poprisk_adamw(0.1, **options)]


@pytest.mark.parametrize("statistic", [None, 0.99, ema_statistic, optax.adam(0.1), HardMask()])
@pytest.mark.parametrize("build", BUILD)
def test_statistic_of_the_wrong_kind(build, statistic):
    with pytest.raises(TypeError, match=r"statistic must be a transforms.Statistic .* got .*Statistic\(init, update\)"):
        build(statistic=statistic)


OBJECTS = {"mask": ("openness", HardMask), "threshold": ("level", TStatistic), "reduction": ("pool", PerTensor)}


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("build", BUILD)
def test_objects_of_the_wrong_kind(build, name):
    method, cls = OBJECTS[name]
    for value in (None, "hard", 1.0, cls, {"w": True}, lambda m, s: m, ema_statistic()):
        with pytest.raises(
            TypeError, match=rf"{name} must be an object with a method {method}.* got .*weight_decay_mask"
        ):
            build(**{name: value})


@pytest.mark.parametrize("build", BUILD)
@pytest.mark.parametrize("summary", [True, Summary, 10, {}])
def test_summary_of_the_wrong_kind(build, summary):
    with pytest.raises(TypeError, match=r"summary must be a transforms.Summary or None, got .*: Summary\(\)"):
        build(summary=summary)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool, jnp.float16, jnp.float8_e4m3fn, "half", "no dtype"])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (ema_statistic, "state_dtype"),
        (adam_statistic, "state_dtype"),
        (lambda **o: poprisk_adamw(0.1, **o), "mu_dtype"),
    ],
)
def test_dtypes_that_no_average_can_be_kept_in(build, name, dtype):
    with pytest.raises(TypeError, match=rf"{name} must be jnp.float32, jnp.float64 or jnp.bfloat16, got .*None is"):
        build(**{name: dtype})


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(2, bool), jnp.ones(2, jnp.complex64), 3])
@pytest.mark.parametrize(
    "tx",
    [
        poprisk_gate(),
        poprisk_adamw(0.1),
        poprisk_adamw(0.1, statistic=adam_moments_statistic()),
        poprisk_gate(statistic=batch_statistic()),
        poprisk_gate(statistic=batch_statistic(0.9)),
    ],
    ids=["gate", "adamw", "adam moments", "batch", "batch, b1"],
)
def test_parameters_that_are_not_real_floating_point(tx, leaf):
    with pytest.raises(
        TypeError, match=r"real floating-point parameters, got \w+ at params\['layer'\]\[1\].*optax.masked"
    ):
        tx.init({"layer": [jnp.ones(2), leaf]})


@pytest.mark.parametrize(("batch_size", "num_examples"), [(0, 10), (-1, 10), (10, 10), (10, 9)])
def test_finite_data_alpha_out_of_range(batch_size, num_examples):
    """n <= b among them: nothing is left to generalize to."""
    with pytest.raises(ValueError, match=rf"must .*{min(batch_size, num_examples)}.*: \w+|use smaller batches"):
        finite_data_alpha(batch_size, num_examples)


@pytest.mark.parametrize(("batch_size", "num_examples"), [(1.0, 10), (1, "10"), (None, 10)])
def test_finite_data_alpha_of_no_integers(batch_size, num_examples):
    with pytest.raises(TypeError, match=r"must be integers, got .* and .*: pass counts"):
        finite_data_alpha(batch_size, num_examples)


def test_missing_params_for_the_decay_is_optax_s_own_error():
    tx = poprisk_adamw(0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


# ---------------------------------------------------------------- bad moments

BATCH = [
    lambda **options: poprisk_gate(statistic=batch_statistic(), **options),
    lambda **options: poprisk_gate(statistic=batch_statistic(0.9), **options),
    lambda **options: poprisk_adamw(0.1, weight_decay=0.0, statistic=batch_statistic(), **options),
]
each_batch = pytest.mark.parametrize("make", BATCH, ids=["batch", "batch, b1", "adamw"])


@each_batch
@pytest.mark.parametrize("missing", [["sum_sq_diff_grads"], ["sample_size"], ["sum_sq_diff_grads", "sample_size"]])
@pytest.mark.parametrize("jit", [True, False])
def test_a_missing_extra_argument_is_a_type_error_at_the_call(make, missing, jit):
    tx = make()
    extra = {name: value for name, value in moments_of(GRADIENTS[0]).items() if name not in missing}
    update = jax.jit(tx.update) if jit else tx.update
    said = rf"batch_statistic\(\) needs .* and {' and '.join(missing)} did not come: .*gradient_moments.*ema_statistic"
    with pytest.raises(TypeError, match=said):
        update(GRADIENTS[0], tx.init(PARAMS), PARAMS, **extra)


def test_a_missing_extra_argument_of_a_user_s_own_statistic_is_one_too():
    def update(grads, state, params=None, *, curvature, **extra_args): ...

    tx = poprisk_gate(statistic=Statistic(lambda params: (), update))
    with pytest.raises(TypeError, match="curvature"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("statistic", [adam_statistic(), adam_moments_statistic()])
def test_adam_s_statistics_need_the_adam_of_poprisk_adamw(statistic):
    tx = poprisk_gate(statistic=statistic)
    with pytest.raises(TypeError, match="b1"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@each_batch
@pytest.mark.parametrize("size", [1, 0, 1.5, np.array(1)])
def test_batches_of_one_are_refused(make, size):
    tx = make()
    extra = moments_of(GRADIENTS[0]) | {"sample_size": size}
    with pytest.raises(ValueError, match=r"sample_size must be >= 2, got .*: .*larger batches, or ema_statistic\(\)"):
        tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS, **extra)


@each_batch
@pytest.mark.parametrize(
    ("mask", "threshold"), [(HardMask(), OpenShare(0.9)), (SoftMask(), Alpha(0.01)), (SnrMask(), TStatistic(0.1))]
)
def test_traced_batches_of_one_shut_the_gate(make, mask, threshold):
    tx = make(mask=mask, threshold=threshold)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for size, gradient in zip((1, 4, 1, 4), GRADIENTS, strict=False):
        extra = moments_of(gradient) | {"sample_size": jnp.array(size)}
        updates, state = update(gradient, state, PARAMS, **extra)
        assert (jnp.abs(updates).max() < 1e-30) == (size == 1)


def test_averages_over_steps_pass_over_traced_batches_of_one():
    tx = poprisk_gate(statistic=batch_statistic(0.9))
    update, states = jax.jit(tx.update), []
    for sizes in ((4, 4), (4, 1, 4)):
        state = tx.init(PARAMS)
        for size in sizes:
            gradient = GRADIENTS[0] if size == 4 else GRADIENTS[1]
            _, state = update(gradient, state, PARAMS, **moments_of(gradient) | {"sample_size": jnp.array(size)})
        states.append(state.statistic_state)
    jax.tree.map(np.testing.assert_array_equal, *states)


@each_batch
@pytest.mark.parametrize("name", ["mean_grads", "sum_sq_diff_grads"])
@pytest.mark.parametrize(
    "wrong",
    [jnp.ones(3), {"w": jnp.ones((2, 3))}, [jnp.ones((2, 3))], 1.0],
    ids=["shape", "dict", "list", "scalar"],
)
def test_moments_of_the_wrong_tree_are_refused(make, name, wrong):
    tx = make()
    with pytest.raises(
        ValueError, match=rf"{name} must be a tree of the gradients' shapes, got .*entk.gradient_moments"
    ):
        tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS, **moments_of(GRADIENTS[0]) | {name: wrong})


def test_the_means_given_are_what_is_tested():
    tx = poprisk_gate(statistic=batch_statistic(), mask=HardMask())
    extra = moments_of(GRADIENTS[0]) | {"mean_grads": jnp.zeros((2, 3))}
    updates, _ = tx.update(GRADIENTS[0], tx.init(PARAMS), **extra)
    np.testing.assert_array_equal(updates, 0.0)


@each_batch
def test_a_negative_sum_of_squares_counts_as_zero(make):
    tx = make()
    extra = moments_of(GRADIENTS[0])
    negative, zero = (
        jax.jit(tx.update)(GRADIENTS[0], tx.init(PARAMS), PARAMS, **extra | {"sum_sq_diff_grads": spread})
        for spread in (jnp.full((2, 3), -1e-3), jnp.zeros((2, 3)))
    )
    jax.tree.map(np.testing.assert_array_equal, negative, zero)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("statistic", [ema_statistic(), batch_statistic(0.9), adam_statistic()])
def test_gradients_that_are_not_finite_leave_their_coordinate_s_statistic_as_it_was(statistic, bad):
    is_adam = "adam" in statistic.update.__qualname__
    tx = poprisk_adamw(0.1, statistic=statistic) if is_adam else poprisk_gate(statistic=statistic)
    update, start = jax.jit(tx.update), tx.init(PARAMS)
    _, before = update(GRADIENTS[0], start, PARAMS, **moments_of(GRADIENTS[0]))
    spoilt = GRADIENTS[1].copy()
    spoilt[0, 1] = bad
    _, after = update(spoilt, before, PARAMS, **moments_of(spoilt))
    _, clean = update(GRADIENTS[1], before, PARAMS, **moments_of(GRADIENTS[1]))

    def averages(state):
        state = (state[0] if is_adam else state).statistic_state
        return [leaf for leaf in jax.tree.leaves(state) if leaf.shape == PARAMS.shape]

    for old, new, other in zip(averages(before), averages(after), averages(clean), strict=True):
        expected = np.asarray(other).copy()
        expected[0, 1] = old[0, 1]
        np.testing.assert_allclose(new, expected, rtol=1e-6)


def test_fields_are_frozen():
    for thing in (HardMask(), SoftMask(), SnrMask(), Alpha(), TStatistic(), OpenShare(), PerRow(), Summary()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.anything = 1
