"""Observables against NumPy: kernel evolution, channel fill, the top of K_QQ, the Gramian by doubling."""

import functools

import numpy as np
import pytest

import entk
from gramian import (
    AdaptiveStep,
    ChannelFill,
    ConstantStep,
    DoublingGramian,
    ExponentialEuler,
    KernelEvolution,
    TestKernelTop,
    gradient_flow,
    squared_loss,
)
from tests.gramian.flow_problems import mlp, problem, relative

OBSERVABLES = {
    "evolution": KernelEvolution(rank=2),
    "fill": ChannelFill(),
    "top": TestKernelTop(),
    "doubling": DoublingGramian(),
}


@functools.cache
def run(name):
    """Ten Euler steps: the kernel of a step is then that of its start, so that saved parameters give every one."""
    args = problem(name)
    times = tuple(np.linspace(0, 1, 11)[1:])
    flow = gradient_flow(
        *args,
        t1=1.0,
        stepper=ExponentialEuler(),
        controller=ConstantStep(0.1),
        observables=OBSERVABLES,
        save_at=times,
    )
    assert flow.num_steps == 10
    return flow, [flow.params0, *flow.saved_params[:-1]]


def test_kernel_evolution_is_that_of_the_kernels_of_the_steps():
    flow, starts = run("squared")
    k0 = np.asarray(flow.source.k_ss(flow.params0))
    lacking = -np.asarray(flow.output_grad(flow.params0))
    values = flow.history["evolution"]
    top0 = np.linalg.eigh(k0)[1][:, -2:]
    for i, params in enumerate(starts):
        k = np.asarray(entk.empirical_ntk(mlp, params, flow.source.x_s))
        lam, vectors = np.linalg.eigh(k)
        cosines = np.linalg.svd(top0.T @ vectors[:, -2:])[1]
        centre = np.eye(5) - 1 / 5
        a, b = centre @ k @ centre, centre @ k0 @ centre
        expected = (
            np.linalg.norm(k - k0, 2) / np.linalg.norm(k0, 2),
            np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b),
            lam.sum() ** 2 / (lam**2).sum(),
            lacking @ k @ lacking / (np.linalg.norm(k) * (lacking @ lacking)),
            np.arccos(min(cosines.min(), 1.0)),
            lam[-1],
        )
        for name, value in zip(values._fields, expected, strict=True):
            assert getattr(values, name)[i] == pytest.approx(value, rel=1e-6, abs=1e-7), (name, i)
    assert values.drift[-1] > 0.02  # there is something to see


def test_rank_beyond_the_number_of_outputs_is_cut():
    flow = gradient_flow(
        *problem("squared"), t1=0.2, controller=ConstantStep(0.1), observables={"k": KernelEvolution(rank=50)}
    )
    assert np.isfinite(flow.history["k"].largest_angle).all()


def test_channel_fill_is_the_gramian_in_the_first_eigenvectors():
    flow, _ = run("squared")
    vectors = np.linalg.eigh(np.asarray(flow.source.k_ss(flow.params0)))[1][:, ::-1]
    fill = flow.history["fill"]
    np.testing.assert_allclose(fill[-1], np.diag(vectors.T @ flow.operators.gramian @ vectors), rtol=1e-9)
    assert (np.diff(fill, axis=0) > 0).all()
    assert fill.max() <= 5 / 2
    assert fill[-1, 0] == fill[-1].max()


@pytest.mark.parametrize("name", ["squared", "softmax"])
def test_test_kernel_top_bounds_the_largest_eigenvalue_closely_from_above(name):
    flow, starts = run(name)
    for value, params in zip(flow.history["top"], starts, strict=True):
        exact = np.linalg.eigvalsh(entk.empirical_ntk(mlp, params, flow.source.x_q))[-1]
        assert exact * (1 - 1e-10) <= value <= 1.01 * exact


def test_test_kernel_top_without_test_points_is_zero():
    apply_fn, params, x_s, loss, _ = problem("squared")
    flow = gradient_flow(
        apply_fn, params, x_s, loss, t1=0.2, controller=ConstantStep(0.1), observables={"top": TestKernelTop()}
    )
    np.testing.assert_array_equal(flow.history["top"], np.zeros(2))


@pytest.mark.parametrize("name", ["squared", "softmax"])
def test_doubling_finds_the_same_gramian(name):
    flow, _ = run(name)
    p, w = flow.observed["doubling"]
    assert relative(w, flow.operators.gramian) < 1e-10
    assert relative(p, flow.operators.propagator) < 1e-10
    root_mean_square = np.sqrt(np.mean(np.square(flow.operators.gramian)))
    assert flow.history["doubling"][-1] == pytest.approx(root_mean_square, rel=1e-10)


@pytest.mark.parametrize("name", ["logistic", "softmax"])
def test_doubling_finds_the_same_gramian_over_a_long_time(name):
    """Steps of h‖BK‖ in the hundreds and thousands, ten and more doublings each."""
    flow = gradient_flow(
        *problem(name),
        t1=1e3,
        controller=AdaptiveStep(1e-2),
        observables={"doubling": DoublingGramian(), "k": KernelEvolution()},
    )
    p, w = flow.observed["doubling"]
    assert relative(w, flow.operators.gramian) < 1e-10
    np.testing.assert_allclose(p, flow.operators.propagator, atol=1e-10 * np.abs(p).max())


def test_doubling_of_one_very_stiff_step():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 7)), rng.normal(size=5)
    flow = gradient_flow(
        lambda w, x: x @ w,
        rng.normal(size=7),
        x,
        squared_loss(y),
        t1=1e4,
        controller=ConstantStep(1e4),
        observables={"doubling": DoublingGramian()},
    )
    assert relative(flow.observed["doubling"][1], flow.operators.gramian) < 1e-10
