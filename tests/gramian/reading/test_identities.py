"""The identities hold on real runs, and each one fails when its operator is off by a little."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gramian import (
    AdaptiveStep,
    ConstantStep,
    DoublingGramian,
    TestKernelTop,
    coupling,
    four_cells,
    gradient_flow,
    identities,
    reference_flow,
    squared_loss,
)
from tests.gramian.flow_problems import linear, problem, residuals

OBSERVED = {"top": TestKernelTop(), "doubling": DoublingGramian()}


def run(name, rtol=1e-5, observables=OBSERVED):
    apply_fn, params, x_s, loss, x_q = problem(name)
    controller = AdaptiveStep(rtol)
    return gradient_flow(apply_fn, params, x_s, loss, x_q, t1=10.0, controller=controller, observables=observables)


def by_name(flow, **settings):
    return {row.name: row for row in identities(flow, **settings)}


@pytest.fixture(scope="module")
def squared():
    return run("squared")


@pytest.fixture(scope="module")
def softmax():
    return run("softmax")


def test_all_hold_for_the_squared_loss(squared):
    rows = by_name(squared)
    assert list(rows) == [f"(I{i})" for i in range(1, 10)]
    assert {name for name, row in rows.items() if row.holds} == set(rows) - {"(I8)"}
    assert rows["(I8)"].holds is None
    assert "drift" in rows["(I8)"].note
    assert rows["(I7)"].residual < 1e-10


def test_all_hold_for_softmax_and_the_squared_form_fails(softmax):
    rows = by_name(softmax)
    assert {name for name, row in rows.items() if row.holds} == set(rows) - {"(I8)"}
    assert "must fail" in rows["(I7)"].note
    assert rows["(I7)"].residual > 0.1


def test_path_residuals_are_those_written_out(squared, softmax):
    for flow in (squared, softmax):
        rows = by_name(flow)
        found = [rows[f"(I{i})"].residual for i in range(1, 5)]
        np.testing.assert_allclose(found, residuals(flow), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(
    ("operator", "broken"),
    [
        ("propagator", {"(I1)", "(I7)"}),
        ("gramian", {"(I2)", "(I5)", "(I7)"}),
        ("displacement", {"(I3)", "(I7)"}),
        ("test_transfer", {"(I4)"}),
    ],
)
def test_a_wrong_operator_breaks_its_identities_and_no_others(squared, operator, broken):
    wrong = squared.operators._replace(**{operator: 1.01 * getattr(squared.operators, operator)})
    rows = by_name(dataclasses.replace(squared, operators=wrong))
    assert {name for name, row in rows.items() if row.holds is False} == broken


def test_a_visible_reservoir_breaks_invisibility(squared):
    # A direction that W_S does not hold, made visible at the test points.
    values, vectors = np.linalg.eigh(squared.operators.gramian)
    ghost = np.zeros_like(squared.operators.test_transfer)
    ghost[0] = 1e3 * vectors[:, 0]
    gramian = squared.operators.gramian - values[0] * np.outer(vectors[:, 0], vectors[:, 0])
    wrong = squared.operators._replace(gramian=gramian, test_transfer=squared.operators.test_transfer + ghost)
    assert by_name(dataclasses.replace(squared, operators=wrong))["(I6)"].holds is False


def test_the_negative_control_fails_if_the_squared_form_is_put_in(softmax):
    p, n = softmax.operators.propagator, 5
    wrong = softmax.operators._replace(gramian=n / 2 * (np.eye(len(p)) - p.T @ p))
    assert by_name(dataclasses.replace(softmax, operators=wrong))["(I7)"].holds is False


def test_path_residuals_fall_with_the_tolerance():
    loose, tight = (
        np.array([by_name(run("squared", rtol))[f"(I{i})"].residual for i in range(1, 5)]) for rtol in (1e-3, 1e-6)
    )
    # rtol^(2/3) for a method of order 2: a factor of 100; a third of it is asked for.
    assert (tight < loose / 30).all()
    assert (tight < 1e-6 ** (2 / 3)).all()


def test_frozen_kernel_theory_is_asserted_where_the_kernel_is_still():
    apply_fn, w, x = linear, jnp.zeros(4), jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))
    flow = gradient_flow(apply_fn, w, x, squared_loss(jnp.arange(4.0)), x + 1, t1=3.0)
    row = by_name(flow)["(I8)"]
    assert row.holds
    assert row.residual < 1e-10
    wrong = flow.operators._replace(propagator=flow.operators.propagator + 0.1)
    assert by_name(dataclasses.replace(flow, operators=wrong))["(I8)"].holds is False


def test_what_was_not_recorded_is_said_and_not_claimed():
    rows = by_name(run("squared", observables={}))
    for name, missing in (("(I5)", "DoublingGramian"), ("(I6)", "TestKernelTop")):
        assert rows[name].holds is None
        assert rows[name].residual is None
        assert missing in rows[name].note


def test_without_test_points_there_are_no_rows_about_them():
    apply_fn, params, x_s, loss, _ = problem("squared")
    rows = by_name(gradient_flow(apply_fn, params, x_s, loss, t1=1.0))
    assert not {"(I4)", "(I6)", "(I9)"} & set(rows)
    assert rows["(I3)"].holds


def test_a_tolerance_is_needed_where_the_controller_aims_at_none():
    apply_fn, params, x_s, loss, x_q = problem("squared")
    flow = gradient_flow(apply_fn, params, x_s, loss, x_q, t1=1.0, controller=ConstantStep(0.05))
    with pytest.raises(ValueError, match="pass tolerance"):
        identities(flow)
    assert by_name(flow, tolerance=0.1)["(I1)"].holds
    assert not by_name(flow, tolerance=1e-12)["(I1)"].holds


@pytest.mark.parametrize("account", [identities, coupling, lambda flow: four_cells(flow, None)])
def test_a_flow_without_operators_is_refused(account):
    flow = reference_flow(*problem("squared"), t1=1.0, operators=False)
    with pytest.raises(ValueError, match="operators=True"):
        account(flow)
