"""gradient_flow against the reference flow, and its own contract: times, pytrees, precision, compilation, errors."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entk import FullJacobian
from gramian import (
    AdaptiveStep,
    ConstantStep,
    ExponentialEuler,
    KernelEvolution,
    gradient_flow,
    reference_flow,
    squared_loss,
)
from tests.gramian.flow_problems import leaves_differ, mlp, problem, relative


@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, diffrax.Tsit5()) for name in ("squared", "logistic", "softmax", "probabilities", "cosh")]
    + [(name, diffrax.Kvaerno5()) for name in ("squared", "softmax")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_against_reference_solvers(name, solver):
    """Explicit and implicit, parameters and outputs; test_steppers compares the operators."""
    exact = reference_flow(*problem(name), t1=1.0, solver=solver, operators=False)
    flow = gradient_flow(*problem(name), t1=1.0, controller=AdaptiveStep(1e-7))
    assert relative(flow.params, exact.params) < 3e-6
    assert relative(flow.outputs(flow.params)[1], exact.outputs(exact.params)[1]) < 1e-5


def test_save_at_is_hit_and_keeps_its_order():
    args = problem("squared")
    flow = gradient_flow(*args, t1=1.0, save_at=(0.7, 0.2, 0.7, 1.0), controller=AdaptiveStep(1e-6))
    late, early, again, end = flow.saved_params
    assert {0.2, 0.7, 1.0} <= set(flow.history["t"])
    for saved, t in ((late, 0.7), (early, 0.2)):
        assert relative(saved, gradient_flow(*args, t1=t, controller=AdaptiveStep(1e-6)).params) < 1e-5
    assert relative(late, again) == relative(end, flow.params) == 0
    assert flow.history["t"][-1] == flow.t1 == 1.0
    # A step shortened to hit a time does not shorten the steps after it.
    plain = gradient_flow(*args, t1=1.0, controller=AdaptiveStep(1e-6))
    assert flow.num_steps <= plain.num_steps + 4


def test_time_has_no_origin():
    args = problem("logistic")
    flow = gradient_flow(*args, t1=1.0, controller=ConstantStep(0.25))
    moved = gradient_flow(*args, t0=-2.0, t1=-1, controller=ConstantStep(0.25))
    assert moved.t0 == -2.0
    np.testing.assert_array_equal(moved.history["t"], flow.history["t"] - 2)
    assert type(moved.t1) is float  # an integer is the same time
    assert relative((moved.params, moved.operators), (flow.params, flow.operators)) == 0


def test_two_stretches_make_one():
    """P(T,s) = P(T,r) P(r,s), W = W₁ + P₁ᵀW₂P₁, D = D₁ + D₂P₁, G = G₁ + G₂P₁."""
    apply_fn, params, x_s, loss, x_q = problem("softmax")
    # Euler's carry is its start, so that a second flow starts as the first would have gone on.
    settings = {"stepper": ExponentialEuler(), "controller": ConstantStep(0.25)}
    whole = gradient_flow(apply_fn, params, x_s, loss, x_q, t1=1.0, **settings)
    first = gradient_flow(apply_fn, params, x_s, loss, x_q, t1=0.5, **settings)
    second = gradient_flow(apply_fn, first.params, x_s, loss, x_q, t0=0.5, t1=1.0, **settings)
    (p1, w1, d1, g1), (p2, w2, d2, g2) = first.operators, second.operators
    composed = p2 @ p1, w1 + p1.T @ w2 @ p1, d1 + d2 @ p1, g1 + g2 @ p1
    assert relative(second.params, whole.params) < 1e-13
    for actual, expected in zip(composed, whole.operators, strict=True):
        assert relative(actual, expected) < 1e-12


def test_history_is_what_happened():
    args = problem("squared")
    flow = gradient_flow(*args, t1=1.0, observables={"kernel": KernelEvolution()}, controller=AdaptiveStep(1e-6))
    history = flow.history
    assert {len(leaf) for leaf in jax.tree.leaves(history)} == {flow.num_steps}
    np.testing.assert_allclose(np.cumsum(history["h"]), history["t"], rtol=1e-12)
    assert (np.diff(history["loss"]) < 0).all()
    u_s = flow.source.outputs(flow.params)[0]
    assert history["loss"][-1] == pytest.approx(float(flow.loss.value(u_s)), rel=1e-12)
    assert (history["error"] <= 1).all()
    assert (history["error"] > 0).all()
    assert flow.params0["w"].tolist() == args[1]["w"].tolist()


def test_outputs_of_one_axis_are_those_of_two():
    _, params, x_s, loss, x_q = problem("squared")
    settings = {"t1": 0.5, "controller": ConstantStep(0.1)}
    column = gradient_flow(mlp, params, x_s, loss, x_q, **settings)
    row = gradient_flow(lambda p, x: mlp(p, x)[:, 0], params, x_s, loss, x_q, **settings)
    assert relative((row.params, row.operators), (column.params, column.operators)) < 1e-13


def test_single_precision_stays_single():
    """All results are float32, however long the sums; times stay Python floats."""
    settings = {"t1": 1.0, "observables": {"kernel": KernelEvolution()}, "save_at": (0.3,)}
    flow = gradient_flow(*problem("squared", dtype=np.float32), **settings)
    arrays = flow.params, flow.operators, flow.saved_params, flow.observed, flow.history["kernel"]
    assert {np.asarray(leaf).dtype for leaf in jax.tree.leaves(arrays)} == {np.dtype(np.float32)}
    assert type(flow.t1) is float
    double = gradient_flow(*problem("squared"), **settings)
    assert relative((flow.params, flow.operators), (double.params, double.operators)) < 1e-4


def test_a_second_run_compiles_nothing():
    traces = []

    def counted(params, x):
        if isinstance(jax.tree.leaves(params)[0], jax.core.Tracer):
            traces.append(1)
        return mlp(params, x)

    _, params, x_s, loss, x_q = problem("squared")
    # What remains are three shape checks: apply_fn on S, on Q, and on one example of each.
    gradient_flow(counted, params, x_s, loss, x_q, t1=0.5)
    first = len(traces)
    gradient_flow(counted, params, x_s + 0.1, squared_loss(-loss.targets), x_q, t1=1.0, controller=AdaptiveStep(1e-5))
    second = len(traces) - first
    assert second <= 6 < first


def test_the_strategy_changes_nothing_but_cost():
    settings = {"t1": 0.5, "controller": ConstantStep(0.1)}
    whole = gradient_flow(*problem("softmax"), **settings)
    parts = gradient_flow(*problem("softmax"), strategy=FullJacobian(microbatch_size=2), **settings)
    assert relative((parts.params, parts.operators), (whole.params, whole.operators)) < 1e-12


def test_progress_is_drawn_and_changes_nothing(capsys):
    settings = {"t1": 1.0, "controller": ConstantStep(0.25)}
    drawn = gradient_flow(*problem("squared"), progress=True, **settings)
    assert "4 steps" in capsys.readouterr().out
    silent = gradient_flow(*problem("squared"), **settings)
    assert capsys.readouterr().out == ""
    assert leaves_differ(drawn, silent) == []


def test_too_many_steps():
    with pytest.raises(
        RuntimeError, match=r"at t=0\.2 of 1 after max_num_steps=2 steps\. Raise max_num_steps, or rtol"
    ):
        gradient_flow(*problem("squared"), t1=1.0, controller=ConstantStep(0.1), max_num_steps=2)
    with pytest.raises(ValueError, match="max_num_steps=0 must be an integer of at least 1"):
        gradient_flow(*problem("squared"), t1=1.0, max_num_steps=0)


def test_a_flow_at_rest():
    """At the minimum nothing moves, and steps grow without limit."""
    w = jnp.array([1.0, -1.0])
    flow = gradient_flow(lambda w, x: x @ w, w, jnp.eye(2), squared_loss(w), t1=1e6)
    np.testing.assert_array_equal(flow.params, w)
    assert flow.num_steps < 30
    still = gradient_flow(lambda w, x: 0 * (x @ w), w, jnp.eye(2), squared_loss(w), t1=1e6)
    np.testing.assert_array_equal(still.operators.propagator, np.eye(2))


def test_observables_may_not_take_the_names_of_the_history():
    with pytest.raises(ValueError, match=r"observables must not be called \['loss'\]"):
        gradient_flow(*problem("squared"), t1=1.0, observables={"loss": KernelEvolution()})


def test_params_may_be_any_pytree():
    """A dictionary, a tuple of lists and a flat vector are the same flow."""
    apply_fn, params, x_s, loss, x_q = problem("softmax")
    settings = {"t1": 0.5, "controller": ConstantStep(0.1)}
    as_dict = gradient_flow(apply_fn, params, x_s, loss, x_q, **settings)
    nested = (params["b"], [params["v"], params["w"]])
    other = gradient_flow(
        lambda p, x: mlp({"b": p[0], "v": p[1][0], "w": p[1][1]}, x), nested, x_s, loss, x_q, **settings
    )
    assert jax.tree.structure(other.params) == jax.tree.structure(nested)
    assert relative((other.params, other.operators), (as_dict.params, as_dict.operators)) < 1e-13
