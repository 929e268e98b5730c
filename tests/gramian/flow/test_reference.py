"""The reference flow: against closed forms and identities it does not know, and its own contract."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gramian._flow.reference
from gramian import reference_flow, squared_loss
from tests.gramian.flow_problems import linear, mlp, problem, relative, residuals


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Kvaerno5()], ids=["tsit5", "kvaerno5"])
def test_against_the_closed_form_of_a_linear_model(solver):
    rng = np.random.default_rng(1)
    n, t = 3, 4.0
    x, x_q, y, w = (rng.normal(size=shape) for shape in ((n, 4), (2, 4), n, 4))
    values, vectors = np.linalg.eigh(x @ x.T / n)
    propagator = (vectors * np.exp(-values * t)) @ vectors.T
    integrated = (vectors * (-np.expm1(-values * t) / values)) @ vectors.T
    flow = reference_flow(linear, w, x, squared_loss(y), x_q, t0=1.0, t1=1.0 + t, solver=solver)
    expected = (
        propagator,
        n / 2 * (np.eye(n) - propagator @ propagator),
        n * (np.eye(n) - propagator),
        x_q @ x.T @ integrated,
    )
    assert relative(flow.params, w - x.T @ integrated @ (x @ w - y) / n) < 1e-7
    assert relative(flow.operators, expected) < 1e-7


def test_the_identities_hold_to_its_own_tolerance_for_a_loss_without_closed_form():
    flow = reference_flow(*problem("softmax"), t1=1.0, rtol=1e-10, atol=1e-12)
    assert residuals(flow).max() < 1e-8
    assert flow.tolerance == pytest.approx(
        max(flow.num_steps * 1e-10, 1e4 * 2.2e-16 * np.sqrt(flow.outputs(flow.params)[0].size)), rel=0.1
    )
    history = flow.history
    assert len(history["t"]) == flow.num_steps
    np.testing.assert_allclose(np.cumsum(history["h"]), history["t"], rtol=1e-12)
    assert history["t"][-1] == flow.t1 == 1.0
    assert history["loss"][-1] == pytest.approx(float(flow.loss.value(flow.source.outputs(flow.params)[0])), rel=1e-12)
    assert (np.diff(history["loss"]) < 0).all()


def test_parameters_alone_are_the_same_and_form_no_kernel(monkeypatch):
    args = problem("logistic")
    whole = reference_flow(*args, t1=0.5)
    monkeypatch.setattr(gramian._problem, "empirical_ntk", None)
    monkeypatch.setattr("entk._checks.memory.available_bytes", lambda: 0)  # and they ask for no memory
    alone = reference_flow(*args, t1=0.5, operators=False)
    assert alone.operators is None
    assert relative(alone.params, whole.params) < 1e-8
    monkeypatch.undo()
    monkeypatch.setattr("entk._checks.memory.available_bytes", lambda: 0)
    with pytest.raises(MemoryError, match=r"a dense flow of N = 5 x 1 training and M = 3 x 1 test outputs"):
        reference_flow(*args, t1=0.5)


def test_single_precision_stays_single():
    flow = reference_flow(*problem("squared", dtype=np.float32), t1=0.5, rtol=1e-5, atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves((flow.params, flow.operators))} == {np.dtype(np.float32)}
    exact = reference_flow(*problem("squared"), t1=0.5)
    assert relative(flow.params, exact.params) < 1e-4
    with pytest.raises(ValueError, match=r"rtol=1e-08 must be at least 1e-06 for float32"):
        reference_flow(*problem("squared", dtype=np.float32), t1=0.5)


def test_a_second_run_compiles_nothing():
    traces = []

    def counted(params, x):
        traces.append(1)
        return mlp(params, x)

    _, params, x_s, loss, x_q = problem("squared")
    reference_flow(counted, params, x_s, loss, x_q, t1=0.25)
    before = len(traces)
    reference_flow(counted, params, x_s, loss, x_q, t1=0.5, rtol=1e-6)
    # What is left are the checks and the outputs at the start and the end: the first run took six times as many.
    assert len(traces) - before < 12


def test_too_many_steps():
    with pytest.raises(RuntimeError, match=r"Tsit5 gave up after 3 trial steps.*Raise max_steps or rtol"):
        reference_flow(*problem("squared"), t1=1.0, max_steps=3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"t1": 0.0}, ValueError, r"t1=0\.0 must be finite and later than t0=0\.0"),
        ({"t1": 1.0, "solver": diffrax.Euler()}, TypeError, "is not an adaptive solver of diffrax"),
        ({"t1": 1.0, "solver": "Tsit5"}, TypeError, "solver='Tsit5' is not an adaptive solver"),
        ({"t1": 1.0, "rtol": 0.0}, ValueError, r"rtol=0\.0 must be at least 2e-15 for float64"),
        ({"t1": 1.0, "atol": -1.0}, ValueError, r"atol=-1\.0 not negative"),
        ({"t1": 1.0, "max_steps": 0}, ValueError, "max_steps=0 must be an integer of at least 1"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        reference_flow(*problem("squared"), **settings)


def test_the_problem_is_checked_as_for_gradient_flow():
    apply_fn, params, x_s, _, _ = problem("squared")
    with pytest.raises(ValueError, match="targets for 3 examples and x_s holds 5"):
        reference_flow(apply_fn, params, x_s, squared_loss(jnp.zeros(3)), t1=1.0)
