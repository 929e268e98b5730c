"""Every picture of a recorded run draws the report's own numbers and names its axes."""

import dataclasses
import doctest
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gramian import AboveThreshold, analyze_training, minibatches
from gramian.plots import run as training_plots
from tests.gramian.training_problems import OPTIMIZERS, X_Q, N, record

PICTURES = ["loss", "spectra", "invisibility", "identities", "coupling", "cells"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("run"), OPTIMIZERS["adam"], batches=minibatches(N, 4, 6))[1]


@pytest.fixture(scope="module")
def dense(run):
    return analyze_training(run, X_Q, quadrature=1)


@pytest.fixture(scope="module")
def free(run):
    return analyze_training(run, X_Q, quadrature=1, dense=False, rank=3, num_products=2, rule=AboveThreshold(1e-3))


def labelled(ax, label):
    (line,) = [line for line in ax.get_lines() if str(line.get_label()).startswith(label)]
    return line


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("kind", ["dense", "free"])
def test_the_page_has_all_six_and_names_their_axes(kind, tmp_path, request):
    report, before = request.getfixturevalue(kind), matplotlib.rcParams.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapses only warns
        figure = report.plot(path=tmp_path / "page.png")
    assert len({ax.get_title(loc="left") for ax in figure.axes}) == len(PICTURES)
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    assert imread(tmp_path / "page.png").shape[1] > 1600
    assert f"N = {N * 3} training" in figure.get_suptitle()
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert min(a.x1, b.x1) < max(a.x0, b.x0) + 2 or min(a.y1, b.y1) < max(a.y0, b.y0) + 2
    assert plt.get_fignums() == []
    assert matplotlib.rcParams == before


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_goes_where_it_is_told(name, dense):
    ax = Figure().add_subplot()
    assert getattr(training_plots, name)(dense, ax) is ax
    assert getattr(training_plots, name)(dense).figure is not ax.figure


def test_the_loss_is_that_of_every_step_and_w_predicts_it(dense, run):
    ax = training_plots.loss(dense)
    steps, observed = labelled(ax, "training loss").get_data()
    np.testing.assert_array_equal(steps, np.arange(run.num_steps + 1))
    for segment in run.segments():
        outputs = run.apply_fn(segment.start.params, run.x_s)
        np.testing.assert_allclose(observed[segment.step], run.loss.value(outputs), rtol=1e-12)
    np.testing.assert_allclose(labelled(ax, "predicted").get_ydata(), observed, rtol=1e-3)
    assert np.abs(dense.predicted - dense.losses).max() > 0
    assert dense.predicted[-1] == pytest.approx(dense.train_risk.predicted, rel=1e-12)
    missed = np.abs(dense.predicted - dense.losses).max() / dense.losses[0]
    assert any(f"{missed:.1e}" in text for text in legend_texts(ax))


def test_spectra_are_those_of_the_matrices_with_the_negative_part(dense):
    ax = training_plots.spectra(dense)
    v, w = (np.linalg.eigvalsh(dense.operators[name])[::-1] for name in ("motion", "gramian"))
    np.testing.assert_allclose(labelled(ax, "motion").get_ydata(), v, atol=1e-12 * v[0])
    drawn, below = labelled(ax, "dissipation").get_ydata(), labelled(ax, "W below zero").get_ydata()
    assert (w < 0).any()
    np.testing.assert_allclose(np.where(w > 0, drawn, -below), w, atol=1e-12 * w[0])
    assert any(f"rank {dense.channel.rank} of {len(v)}" in text for text in legend_texts(ax))


def test_a_few_pairs_stand_before_the_whole_spectrum(free, dense):
    ax = training_plots.spectra(free)
    assert len(labelled(ax, "motion").get_xdata()) == 3
    whole = labelled(ax, "all of V")
    assert whole.get_xdata().max() > 0.8 * len(dense.channel.eigenvalues)
    estimate, exact = (one.densities[0].trace_of() for one in (free, dense))
    assert abs(estimate.value - exact.value) < 5 * estimate.standard_error
    assert exact.value == pytest.approx(np.trace(dense.operators["motion"]))
    for name in ("cells", "coupling"):
        (text,) = getattr(training_plots, name)(free).texts
        assert f"about {free.channel_estimate} directions" in text.get_text()
        assert "more than the 3 known" in text.get_text()
    assert dense.channel_reached
    assert 0.7 < free.channel_estimate / np.sum(dense.channel.eigenvalues > 1e-3) < 1.3
    assert "raise rank" in repr(free)
    assert "raise rank" not in repr(dense)


def test_what_test_points_see_stays_under_the_bound(dense):
    ax = training_plots.invisibility(dense)
    bound, seen = labelled(ax, "bound").get_ydata(), labelled(ax, r"$\|G").get_ydata()
    vectors = dense.channel.vectors
    np.testing.assert_allclose(seen, np.sum((dense.operators["test_transfer"] @ vectors) ** 2, axis=0))
    np.testing.assert_allclose(bound, dense.visibility * np.maximum(dense.channel.eigenvalues, 0))
    assert (seen <= bound + 1e-12 * bound[0]).all()


def test_a_broken_identity_is_red(dense):
    rows = list(dense.identities)
    rows[2] = dataclasses.replace(rows[2], residual=0.5, holds=False)
    ax = training_plots.identities(dataclasses.replace(dense, identities=tuple(rows)))
    broken = labelled(ax, "residual, too large")
    assert (broken.get_xdata(), broken.get_ydata()) == ([0.5], [1])
    (line,) = [line for line in training_plots.identities(dense).get_lines() if line.get_label() == "residual"]
    np.testing.assert_array_equal(line.get_xdata(), [row.residual for row in dense.identities[:4]])


def test_without_test_points_the_axes_say_so(run):
    report = analyze_training(run, quadrature=1)
    assert report.seen is None
    for name in ("invisibility", "coupling"):
        assert "no test points" in getattr(training_plots, name)(report).texts[0].get_text()
    report.plot()


def test_docstring_examples():
    results = doctest.testmod(training_plots)
    assert results.failed == 0
    assert results.attempted > 0
