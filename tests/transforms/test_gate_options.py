"""Every option changes the output, and every bad value is refused with its value, the rule and the remedy."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transforms import (
    HardMask,
    SnrMask,
    SoftMask,
    Statistic,
    ema_statistic,
    finite_data_alpha,
    poprisk_adamw,
    poprisk_gate,
)

PARAMS = np.array([1.0, -2.0, 0.5], np.float32)
GRADIENTS = np.random.default_rng(0).normal(0.5, 1.0, (5, 3)).astype(np.float32)


def trajectory(tx):
    params, state = jnp.asarray(PARAMS), tx.init(PARAMS)
    for gradient in GRADIENTS:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


ADAMW_OPTIONS = {
    "learning_rate": optax.linear_schedule(0.1, 0.0, 5),
    "b1": 0.5,
    "b2": 0.5,
    "eps": 0.1,
    "eps_root": 0.1,
    "mu_dtype": jnp.bfloat16,
    "weight_decay": optax.linear_schedule(0.0, 1.0, 5),
    "rho": 0.5,
    "mask": SnrMask(lam=3.0),
    "state_dtype": jnp.bfloat16,
    "weight_decay_mask": False,
}
GATE_OPTIONS = {"inner": optax.adam(0.1), "statistic": ema_statistic(b1=0.5), "mask": SoftMask()}
STATISTIC_OPTIONS = {"b1": 0.5, "rho": 0.5, "state_dtype": jnp.bfloat16}


def test_every_option_is_listed_here():
    assert ADAMW_OPTIONS.keys() == inspect.signature(poprisk_adamw).parameters.keys()
    assert GATE_OPTIONS.keys() == inspect.signature(poprisk_gate).parameters.keys()
    assert STATISTIC_OPTIONS.keys() == inspect.signature(ema_statistic).parameters.keys()


@pytest.mark.parametrize("name", ADAMW_OPTIONS)
def test_options_of_poprisk_adamw(name):
    base = {"learning_rate": 0.1, "weight_decay": 0.1}
    changed = trajectory(poprisk_adamw(**base | {name: ADAMW_OPTIONS[name]}))
    assert (trajectory(poprisk_adamw(**base)) != changed).any()


@pytest.mark.parametrize("name", GATE_OPTIONS)
def test_options_of_poprisk_gate(name):
    assert (trajectory(poprisk_gate()) != trajectory(poprisk_gate(**{name: GATE_OPTIONS[name]}))).any()


@pytest.mark.parametrize("name", STATISTIC_OPTIONS)
def test_options_of_ema_statistic(name):
    changed = ema_statistic(**{name: STATISTIC_OPTIONS[name]})
    assert (trajectory(poprisk_gate()) != trajectory(poprisk_gate(statistic=changed))).any()


@pytest.mark.parametrize(
    ("make", "field"), [(m, f.name) for m in (HardMask, SoftMask, SnrMask) for f in dataclasses.fields(m)]
)
def test_fields_of_masks(make, field):
    changed = dataclasses.replace(make(), **{field: 0.05})
    assert (trajectory(poprisk_gate(mask=make())) != trajectory(poprisk_gate(mask=changed))).any()


def test_weight_decay_mask_and_learning_rate_act_as_in_adamw():
    options = {"learning_rate": ADAMW_OPTIONS["learning_rate"], "weight_decay": ADAMW_OPTIONS["weight_decay"]}
    neutral = SnrMask(lam=0.0, eps=0.0)
    np.testing.assert_allclose(
        trajectory(poprisk_adamw(**options, mask=neutral, weight_decay_mask=False)),
        trajectory(optax.adamw(**options, mask=False)),
    )


NONNEGATIVE = [-1.0, -1, float("nan"), float("inf"), np.float32(-1e-9), jnp.array(-1.0), np.array([1.0, -1.0])]
DECAYS = [-0.1, 1.0, 1, 1.5, float("nan"), jnp.array(1.0), jnp.array(-0.5, jnp.bfloat16)]
NO_NUMBERS = ["0.5", None, True, 1j, [0.5, None], lambda step: 0.5]
BUILDERS = {
    (make, field.name): (lambda value, make=make, name=field.name: make(**{name: value}))
    for make in (HardMask, SoftMask, SnrMask)
    for field in dataclasses.fields(make)
} | {
    (poprisk_adamw, name): (lambda value, name=name: poprisk_adamw(**{"learning_rate": 0.1} | {name: value}))
    for name in ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "rho")
}
BUILDERS |= {(ema_statistic, name): (lambda value, name=name: ema_statistic(**{name: value})) for name in ("b1", "rho")}


@pytest.mark.parametrize(("owner", "name"), BUILDERS)
def test_numbers_out_of_range(owner, name):
    decay = name in ("b1", "b2", "rho")
    rule = r"in \[0, 1\)" if decay else "a finite number >= 0"
    for value in DECAYS if decay else NONNEGATIVE:
        with pytest.raises(ValueError, match=rf"^{name} must be {rule}, got .*: \w+") as error:
            BUILDERS[owner, name](value)
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(("owner", "name"), BUILDERS)
def test_values_that_are_no_numbers(owner, name):
    for value in NO_NUMBERS:
        if callable(value) and (owner, name) in [(poprisk_adamw, "learning_rate"), (poprisk_adamw, "weight_decay")]:
            continue  # These two take schedules.
        with pytest.raises(TypeError, match=rf"^{name} must be a real number .*inject_hyperparams"):
            BUILDERS[owner, name](value)


@pytest.mark.parametrize(("owner", "name"), BUILDERS)
def test_traced_numbers_are_not_compared(owner, name):
    def build(value):
        BUILDERS[owner, name](value)
        return value

    assert jax.jit(build)(-1.0) == -1.0


@pytest.mark.parametrize("inner", [None, 0.1, optax.adam, HardMask(), ema_statistic()])
def test_inner_of_the_wrong_kind(inner):
    with pytest.raises(
        TypeError, match=r"inner must be an optax.GradientTransformation .* got .*Call the factory first"
    ):
        poprisk_gate(inner)


@pytest.mark.parametrize("statistic", [None, 0.99, ema_statistic, optax.adam(0.1), HardMask()])
def test_statistic_of_the_wrong_kind(statistic):
    with pytest.raises(TypeError, match=r"statistic must be a transforms.Statistic .* got .*Statistic\(init, update\)"):
        poprisk_gate(statistic=statistic)


@pytest.mark.parametrize("mask", [None, "hard", 1.0, HardMask, {"w": True}, lambda m, s: m, ema_statistic()])
@pytest.mark.parametrize("build", [poprisk_gate, lambda mask: poprisk_adamw(0.1, mask=mask)])
def test_mask_of_the_wrong_kind(build, mask):
    with pytest.raises(TypeError, match=r"mask must have a method openness.* got .*weight_decay_mask"):
        build(mask=mask)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
@pytest.mark.parametrize("build", [lambda d: ema_statistic(state_dtype=d), lambda d: poprisk_adamw(0.1, state_dtype=d)])
def test_state_dtype_that_is_not_floating_point(build, dtype):
    with pytest.raises(TypeError, match=r"state_dtype must be a floating-point dtype .* got .*None stores"):
        build(dtype)


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(2, bool), jnp.ones(2, jnp.complex64), 3])
@pytest.mark.parametrize("tx", [poprisk_gate(), poprisk_adamw(0.1)], ids=["gate", "adamw"])
def test_parameters_that_are_not_real_floating_point(tx, leaf):
    with pytest.raises(
        TypeError, match=r"real floating-point parameters, got \w+ at params\['layer'\]\[1\].*optax.masked"
    ):
        tx.init({"layer": [jnp.ones(2), leaf]})


@pytest.mark.parametrize(("batch_size", "num_examples"), [(0, 10), (-1, 10), (10, 10), (10, 9)])
def test_finite_data_alpha_out_of_range(batch_size, num_examples):
    with pytest.raises(ValueError, match=rf"must .*{min(batch_size, num_examples)}.*: \w+"):
        finite_data_alpha(batch_size, num_examples)


@pytest.mark.parametrize(("batch_size", "num_examples"), [(1.0, 10), (1, "10"), (None, 10)])
def test_finite_data_alpha_of_no_integers(batch_size, num_examples):
    with pytest.raises(TypeError, match=r"must be integers, got .* and .*: pass counts"):
        finite_data_alpha(batch_size, num_examples)


def test_missing_params_for_the_decay_is_optax_s_own_error():
    tx = poprisk_adamw(0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_a_statistic_s_missing_extra_argument_is_a_type_error_at_the_call():
    def update(grads, state, params=None, *, sample_size, **extra_args): ...

    tx = poprisk_gate(statistic=Statistic(lambda params: (), update))
    with pytest.raises(TypeError, match="sample_size"):
        tx.update(PARAMS, tx.init(PARAMS))
