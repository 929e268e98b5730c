"""Runs whose outputs cannot move, or need not: refused where no parameter could, an empty channel elsewhere."""

import json

import jax
import numpy as np
import optax
import pytest

from gramian import (
    Recorder,
    TraceShare,
    analyze,
    analyze_training,
    gradient_flow,
    minibatches,
    record_training,
    signal_channel,
    squared_loss,
)

RNG = np.random.default_rng(0)
X = np.abs(RNG.normal(size=(6, 3)))
LOSS = squared_loss(np.sign(X[:, 0] - 0.5))
DEAD = {"a": np.full((3, 4), -1.0), "c": np.ones((4, 1))}
ALIVE = {"a": np.abs(RNG.normal(size=(3, 4))), "c": RNG.normal(size=(4, 1))}
FROZEN = {"(I2)", "(I3)"}


def relu(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["c"]


def constant(params, x):
    return x[:, :1]


def stopped(params, x):
    return relu(jax.lax.stop_gradient(params), x)


def undecided(report):
    return {row.name for row in report.identities if row.holds is None}


@pytest.mark.parametrize("model", [constant, jax.jit(constant), jax.checkpoint(constant), stopped])
def test_a_model_without_params_is_refused_before_anything_runs(tmp_path, model):
    message = r"do not depend on params.*nnx\.merge"
    with pytest.raises(ValueError, match=message):
        gradient_flow(model, ALIVE, X, LOSS, t1=1.0)
    with pytest.raises(ValueError, match=message):
        record_training(model, ALIVE, X, LOSS, optax.sgd(0.1), minibatches(6, 2, 1), Recorder(tmp_path))


def test_params_of_no_numbers_are_refused():
    with pytest.raises(ValueError, match="params holds no numbers"):
        gradient_flow(lambda p, x: x[:, 0] + p.sum(), np.zeros((0, 2)), X, LOSS, t1=1.0)


@pytest.mark.filterwarnings("error")
def test_dead_units_give_an_empty_channel_and_a_sentence():
    """On the training points alone, too: what test points could see never happens."""
    for x_q in (X[:2], -X[:2]):
        report = analyze(relu, DEAD, X, LOSS, x_q, t1=1.0, test_loss=squared_loss(np.ones(2)))
        assert report.channel.rank == 0
        assert not report.gramian.any()
        assert not any(row.holds is False for row in report.identities)
        assert undecided(report) >= FROZEN | {"(I4)", "(I5)", "(I6)", "(I7)", "(I8)", "(I9)"}
        assert "J_S is zero" in repr(report)
        assert "nan" not in repr(report)
        json.dumps(report.as_dict(), allow_nan=False)
    report.plot()


@pytest.mark.filterwarnings("error")
def test_dead_test_points_leave_the_training_side_alone():
    report = analyze(relu, ALIVE, X, LOSS, -X[:2], t1=1.0)
    assert undecided(report) == {"(I4)", "(I6)", "(I8)", "(I9)"}
    assert all(row.holds for row in report.identities if row.holds is not None)
    assert np.isnan(report.coupling.relative_error)
    report.plot()


@pytest.mark.filterwarnings("error")
def test_fitted_labels_have_operators_and_no_motion():
    """To the bit, and to rounding: steps are not spent on the last digit of g."""
    fitted = np.asarray(jax.jit(relu)(ALIVE, X))
    for labels in (fitted, fitted * (1 + 1e-15)):
        report = analyze(relu, ALIVE, X, squared_loss(labels), X[:2], t1=1.0)
        assert undecided(report) == {"(I1)", "(I2)", "(I3)", "(I4)"}
        assert all(row.holds for row in report.identities if row.holds is not None)
        assert report.gramian.any()
        assert report.flow.num_steps < 20
    report.plot()
    assert "nothing moves" in repr(analyze(lambda w, x: x @ w, np.zeros(3), X, squared_loss(np.zeros(6)), t1=1.0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ["no rate", "dead"])
def test_a_recorded_run_that_stands_still(tmp_path, case):
    params, rate = (ALIVE, 0.0) if case == "no rate" else (DEAD, 0.1)
    _, run = record_training(relu, params, X, LOSS, optax.sgd(rate), minibatches(6, 3, 2), Recorder(tmp_path))
    report = analyze_training(run, X[:2])
    assert undecided(report) == FROZEN | {"(I4)", "(I6′)"}
    assert not any(row.holds is False for row in report.identities)
    assert report.channel.rank == 0
    assert report.negative_share == 0
    assert "nothing moves" in repr(report)
    assert "nan" not in repr(report)
    report.plot()


def test_an_empty_gramian_has_an_empty_channel():
    assert signal_channel(np.zeros((3, 3)), TraceShare(1.0)).rank == 0
