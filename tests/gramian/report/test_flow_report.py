"""The report: complete, self-consistent, readable in a terminal and in Jupyter, and refused early on bad input."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import gramian._report.flow
from gramian import AboveThreshold, AdaptiveStep, ConstantStep, analyze, logistic_loss, squared_loss
from tests.gramian.flow_problems import problem


def report_on(name, dtype=np.float64, test_points=True, **settings):
    apply_fn, params, x_s, loss, x_q = problem(name, dtype=dtype)
    return analyze(apply_fn, params, x_s, loss, x_q if test_points else None, t1=5.0, **settings)


@pytest.fixture(scope="module")
def squared():
    y_q = jnp.array([1.0, -1.0, 1.0])
    return report_on("squared", test_loss=squared_loss(y_q), clean_loss=squared_loss(jnp.ones(5)))


def test_operators_are_those_of_the_flow(squared):
    assert squared.propagator is squared.flow.operators.propagator
    assert squared.gramian is squared.flow.operators.gramian
    assert squared.displacement is squared.flow.operators.displacement
    assert squared.test_transfer is squared.flow.operators.test_transfer


def test_every_identity_holds(squared):
    assert all(row.holds is not False for row in squared.identities)
    assert sum(row.holds is True for row in squared.identities) == 8


def test_risks_start_where_the_model_starts_and_are_predicted_by_the_operators(squared):
    apply_fn, params, x_s, loss, _ = problem("squared")
    start = float(np.mean((np.asarray(apply_fn(params, x_s))[:, 0] - np.asarray(loss.targets)[:, 0]) ** 2) / 2)
    assert squared.train_risk.start == pytest.approx(start)
    for risk in (squared.train_risk, squared.test_risk):
        assert risk.predicted == pytest.approx(risk.end, rel=1e-3)
        assert risk.end != pytest.approx(risk.start, rel=1e-3)


def test_kernels_are_kept_along_the_way(squared):
    times = [t for t, _ in squared.kernels]
    np.testing.assert_allclose(times, [0, 0.05, 0.5, 5])
    assert all(k.shape == (5, 5) for _, k in squared.kernels)
    drift = np.linalg.norm(squared.kernels[-1][1] - squared.kernels[0][1], 2) / np.linalg.norm(squared.kernels[0][1], 2)
    assert squared.drift == pytest.approx(drift)


def test_the_table_shows_every_part(squared):
    text = repr(squared)
    for part in ("Training run", "Identities", "Four cells", "test loss", "kernel drift", "rank", "(I9)", "noise"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 118
    html = squared._repr_html_()
    assert html.startswith("<pre>")
    assert "(I1)" in html


def test_numbers_go_into_json_and_back(squared):
    numbers = json.loads(json.dumps(squared.as_dict(), allow_nan=False))
    assert numbers["num_train_outputs"] == 5
    assert len(numbers["identities"]) == 9
    np.testing.assert_allclose(numbers["gramian_eigenvalues"], squared.channel.eigenvalues)
    assert numbers["cells"][-1]["left"] is None


def test_the_rule_reaches_the_channel():
    report = report_on("squared", rule=AboveThreshold(1e9))
    assert report.channel.rank == 0
    assert "AboveThreshold" in repr(report)


def test_without_test_points():
    report = report_on("logistic", test_points=False)
    assert report.coupling is None
    assert report.test_transfer.shape == (0, 5)
    assert "test loss" not in repr(report)
    assert "test displacement" not in repr(report)
    json.dumps(report.as_dict(), allow_nan=False)


def test_float32_stays_float32_and_holds():
    report = report_on("squared", dtype=np.float32)
    assert report.gramian.dtype == jnp.float32
    assert all(row.holds is not False for row in report.identities), report


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"clean_loss": squared_loss(jnp.ones(4))}, ValueError, "4 examples"),
        ({"test_loss": squared_loss(jnp.ones(2))}, ValueError, "2 examples"),
        ({"test_loss": squared_loss(jnp.ones(3, jnp.float32))}, TypeError, "float32"),
        ({"test_loss": squared_loss(jnp.ones(3)), "test_points": False}, ValueError, "x_q"),
        ({"controller": ConstantStep(0.1)}, ValueError, "AdaptiveStep"),
        ({"observables": {"loss": gramian.ChannelFill()}}, ValueError, "must not be called"),
    ],
)
def test_bad_companions_are_refused_before_the_run(monkeypatch, settings, error, message):
    monkeypatch.setattr(gramian.Integrator, "update", lambda *_: pytest.fail("the run had started"))
    with pytest.raises(error, match=message):
        report_on("squared", **settings)


def test_more_observables_are_recorded():
    report = report_on("squared", observables={"again": gramian.ChannelFill()}, controller=AdaptiveStep(1e-3))
    np.testing.assert_array_equal(report.flow.history["again"], report.flow.history["fill"])


def test_mixed_kinds_of_loss_are_refused():
    with pytest.raises(ValueError, match="build both alike"):
        report_on("squared", clean_loss=logistic_loss(jnp.ones(5)), controller=AdaptiveStep(1e-2))
