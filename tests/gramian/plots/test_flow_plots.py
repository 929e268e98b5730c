"""Every picture draws the report's own numbers, names its axes, and leaves matplotlib as it was."""

import dataclasses
import doctest
import warnings
from functools import cache

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from mpl_toolkits.mplot3d.axes3d import Axes3D

from gramian import (
    AboveThreshold,
    AdaptiveStep,
    Coupling,
    analyze,
    four_cells,
    plots,
    signal_channel,
    softmax_cross_entropy,
    squared_loss,
)
from tests.gramian.flow_problems import linear, problem

PICTURES = ["cells", "kernel_drift", "kernel_surface", "loss", "residual_by_direction", "spectrum", "test_displacement"]
KINDS = ["squared", "softmax", "no test points", "no clean loss", "late"]


@cache
def tiny(kind):
    """A run of 5 training examples."""
    if kind == "no clean loss":
        report = tiny("squared")
        return dataclasses.replace(report, cells=four_cells(report.flow, report.channel))
    apply_fn, params, x_s, loss, x_q = problem("softmax" if kind == "softmax" else "squared", width=8)
    targets = np.asarray(loss.targets).copy()
    targets[0] = 1 - targets[0] if kind == "softmax" else -targets[0]
    clean = softmax_cross_entropy(targets) if kind == "softmax" else squared_loss(targets)
    return analyze(
        apply_fn,
        params,
        x_s,
        loss,
        None if kind == "no test points" else x_q,
        t1=30_000.0 if kind == "late" else 4.0,
        controller=AdaptiveStep(1e-2),
        clean_loss=clean,
    )


@cache
def lazy():
    return analyze(linear, jnp.zeros(3), jnp.eye(3) + 1, squared_loss(jnp.array([1.0, -1.0, 2.0])), t0=1.0, t1=3.0)


def labelled(ax, label):
    (line,) = [line for line in ax.get_lines() if line.get_label().startswith(label)]
    return line


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def assert_named(figure):
    for i, ax in enumerate(figure.axes):
        shares_x = any(ax in other.get_shared_x_axes().get_siblings(other) for other in figure.axes[:i])
        assert ax.get_ylabel()
        assert ax.get_xlabel() or shares_x
        assert not isinstance(ax, Axes3D) or ax.get_zlabel()
        assert ax.get_title(loc="left") or shares_x


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_draws_alone_and_names_its_axes(name):
    figure = getattr(plots, name)(tiny("squared")).figure
    figure.canvas.draw()
    assert_named(figure)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_all_seven_and_is_laid_out(kind, tmp_path):
    report = tiny(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapses only warns
        figure = report.plot(path=tmp_path / "page.png")
    assert isinstance(figure, Figure)
    assert_named(figure)
    titles = {ax.get_title(loc="left") for ax in figure.axes} - {""}
    assert len(titles) == 7
    image = imread(tmp_path / "page.png")
    assert image.shape[0] > 1000
    assert image.shape[1] > 1600
    heading = figure.get_suptitle()
    m, n = report.test_transfer.shape
    for part in (report.flow.loss.name, f"N = {n} ", f"M = {m} ", f"t = 0 to {report.flow.t1:g}"):
        assert part in heading
    assert f"{report.flow.num_steps} steps" in heading


@pytest.mark.parametrize("kind", ["squared", "late"])
def test_pictures_on_the_page_do_not_overlap(kind):
    figure = plots.overview(tiny(kind))
    figure.canvas.draw()
    pictures = [ax for ax in figure.axes if ax.get_title(loc="left")]
    boxes = [ax.get_tightbbox() for ax in pictures]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert min(a.x1, b.x1) < max(a.x0, b.x0) + 2 or min(a.y1, b.y1) < max(a.y0, b.y0) + 2


@pytest.mark.parametrize("name", [*PICTURES, "overview"])
def test_nothing_stays_open_and_no_setting_changes(name):
    before = matplotlib.rcParams.copy()
    getattr(plots, name)(tiny("squared"))
    assert plt.get_fignums() == []
    assert matplotlib.rcParams == before


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_goes_where_it_is_told(name):
    figure = Figure()
    ax = figure.add_subplot(projection="3d" if name == "kernel_surface" else None)
    assert getattr(plots, name)(tiny("squared"), ax) is ax
    assert ax.figure is figure


def test_a_figure_shows_itself_without_pyplot():
    png = plots.spectrum(tiny("squared")).figure._repr_png_()
    assert png.startswith(b"\x89PNG")


def test_spectrum_draws_eigenvalues_channel_and_ceiling():
    report = tiny("squared")
    ax = plots.spectrum(report)
    line = labelled(ax, "eigenvalues")
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(line.get_ydata(), np.linalg.eigvalsh(report.gramian)[::-1], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(labelled(ax, "ceiling").get_ydata(), [2.5, 2.5])
    assert "ceiling n/2 = 2.5" in legend_texts(ax)
    band = next(text for text in legend_texts(ax) if text.startswith("signal channel"))
    assert f"rank {report.channel.rank} of 5" in band
    assert repr(report.channel.rule) in band
    assert ax.get_yscale() == "log"


def test_spectrum_has_no_ceiling_for_another_loss():
    assert not any("ceiling" in text for text in legend_texts(plots.spectrum(tiny("softmax"))))


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_the_band_ends_with_the_channel(rank):
    report = tiny("squared")
    report = dataclasses.replace(report, channel=dataclasses.replace(report.channel, rank=rank))
    for draw in (plots.spectrum, plots.residual_by_direction):
        band = next(patch for patch in draw(report).patches if patch.get_label().startswith("signal channel"))
        assert band.get_x() == 0.5
        assert band.get_width() == rank


def test_what_is_only_rounding_is_marked_and_counted():
    report = tiny("squared")
    values = np.array([2.0, 1.0, 1e-17, 0.0, -1e-17])
    report = dataclasses.replace(report, channel=dataclasses.replace(report.channel, eigenvalues=values))
    ax = plots.spectrum(report)
    assert "below rounding: 3\n(2 not positive, not drawn)" in legend_texts(ax)
    low, _ = ax.get_ylim()
    assert 0 < low < 1e-17
    assert not any("rounding" in text for text in legend_texts(plots.spectrum(tiny("squared"))))


def test_a_small_channel_among_many_directions_is_not_a_thin_line():
    n = 150
    channel = dataclasses.replace(
        tiny("squared").channel, eigenvalues=np.geomspace(1, 1e-3, n), vectors=np.eye(n), rank=3
    )
    assert plots.spectrum(dataclasses.replace(tiny("squared"), channel=channel)).get_xscale() == "log"
    wide = dataclasses.replace(channel, rank=75)
    assert plots.spectrum(dataclasses.replace(tiny("squared"), channel=wide)).get_xscale() == "linear"


@pytest.mark.parametrize("kind", ["squared", "softmax"])
def test_residuals_are_those_of_the_start_and_the_end(kind):
    report = tiny(kind)
    ax = plots.residual_by_direction(report)
    g = report.flow.output_grad(report.flow.params0)
    for label, at in (("start, t = 0", g), ("end, t = 4", report.flow.output_grad(report.flow.params))):
        expected = [abs(np.dot(psi, at)) for psi in report.channel.vectors.T]
        np.testing.assert_allclose(labelled(ax, label).get_ydata(), expected, rtol=1e-9, atol=1e-15)


def test_residuals_at_rounding_are_said_to_be_so():
    assert any(text.startswith("below rounding") for text in legend_texts(plots.residual_by_direction(tiny("late"))))


@pytest.mark.parametrize("kind", ["squared", "softmax", "no test points", "no clean loss"])
def test_cells_are_bars_of_their_height(kind):
    report = tiny(kind)
    ax = plots.cells(report)
    assert len(ax.containers) == len(report.cells)
    for bars, cell in zip(ax.containers, report.cells, strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in bars], 100 * np.array(cell[2:]))
        assert cell.part in bars.get_label()
        assert cell.space in bars.get_label() or cell.part == "interaction"
    written = {text.get_text() for text in ax.texts}
    assert f"{100 * report.cells[0].gradient:.1f}" in written or f"{100 * report.cells[0].gradient:.0f}" in written
    assert ("no test\npoints" in written) == (kind == "no test points")


def test_a_negative_interaction_is_drawn_downwards():
    report = tiny("squared")
    cells = (*report.cells[:-1], report.cells[-1]._replace(gradient=-0.25, dissipated=-1e-9))
    ax = plots.cells(dataclasses.replace(report, cells=cells))
    assert ax.containers[-1][0].get_height() == -25
    assert ax.get_ylim()[0] < -25
    written = [text.get_text() for text in ax.texts]
    assert "−25.0" in written
    assert "−0.0" not in written


def test_an_empty_cell_has_a_dash_for_what_is_left():
    report = tiny("squared")
    cells = (report.cells[0], report.cells[1]._replace(left=float("nan")), *report.cells[2:])
    assert "–" in [text.get_text() for text in plots.cells(dataclasses.replace(report, cells=cells)).texts]


def test_displacements_are_predicted_over_observed():
    report = tiny("softmax")
    observed, predicted = np.array([1.0, 2.0, 3.0]), np.array([1.5, 1.0, 4.0])
    coupled = dataclasses.replace(
        report.coupling, observed=observed, predicted=predicted, correlation=0.25, relative_error=0.0123
    )
    assert isinstance(coupled, Coupling)
    ax = plots.test_displacement(dataclasses.replace(report, coupling=coupled))
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), np.stack([observed, predicted], axis=1))
    x, y = labelled(ax, "predicted = observed").get_data()
    np.testing.assert_array_equal(x, y)
    assert x[0] < 1
    assert x[1] > 4
    assert ax.get_xlim() == ax.get_ylim()
    (note,) = [text.get_text() for text in ax.texts]
    assert note == "correlation 0.250000\nrelative error 0.012"


def test_a_single_test_output_has_no_correlation():
    coupled = dataclasses.replace(
        tiny("squared").coupling, observed=np.array([1.0]), predicted=np.array([1.0]), correlation=float("nan")
    )
    ax = plots.test_displacement(dataclasses.replace(tiny("squared"), coupling=coupled))
    assert "correlation" not in ax.texts[0].get_text()
    assert ax.get_xlim() == pytest.approx((0.9, 1.1))


def test_without_test_points_the_axes_say_so():
    assert "no test points" in plots.test_displacement(tiny("no test points")).texts[0].get_text()


def test_drift_and_rank_are_stairs_of_the_steps():
    report = tiny("squared")
    ax = plots.kernel_drift(report)
    (twin,) = [other for other in ax.figure.axes if other is not ax]
    record = report.flow.history["evolution"]
    edges = [0.0, *report.flow.history["t"]]
    for axes, values in ((ax, record.drift), (twin, record.effective_rank)):
        (stairs,) = axes.patches
        np.testing.assert_array_equal(stairs.get_data().values, values)
        np.testing.assert_array_equal(stairs.get_data().edges, edges)
        assert axes.yaxis.label.get_color() == axes.yaxis.get_ticklabels()[0].get_color()
        assert matplotlib.colors.same_color(axes.yaxis.label.get_color(), stairs.get_edgecolor())
        assert axes.get_ylim()[0] == 0
    assert ax.get_xscale() == "log"


def test_loss_and_prediction_are_two_curves():
    report = tiny("softmax")
    ax = plots.loss(report)
    history = report.flow.history
    start = report.train_risk.start
    np.testing.assert_array_equal(labelled(ax, r"training loss").get_data(), [history["t"], history["loss"]])
    np.testing.assert_allclose(labelled(ax, "predicted").get_ydata(), start - history["dissipation"], rtol=1e-12)
    assert labelled(ax, "at the start").get_ydata()[0] == start
    missed = np.abs(start - history["dissipation"] - history["loss"]).max() / start
    assert any(f"{missed:.1e}" in text for text in legend_texts(ax))


def test_a_loss_that_falls_by_decades_is_drawn_so():
    ax = plots.loss(tiny("late"))
    assert ax.get_yscale() == "log"
    assert any(text.startswith("predictions below rounding") for text in legend_texts(ax))
    assert plots.loss(lazy()).get_yscale() == "linear"


def test_a_flow_that_starts_late_counts_from_its_start():
    ax = plots.loss(lazy())
    assert ax.get_xlabel() == "time of gradient flow since 1"
    np.testing.assert_allclose(labelled(ax, "training loss").get_xdata(), lazy().flow.history["t"] - 1)


def surface_of(report, monkeypatch):
    """Heights at whole directions of every surface that was drawn, the one at the end first."""
    drawn = []
    original = Axes3D.plot_surface

    def record(self, x, y, z, **settings):
        whole = np.isclose(x[0] % 1, 0)
        np.testing.assert_array_equal(x, y.T)
        drawn.append(z[np.ix_(whole, whole)])
        return original(self, x, y, z, **settings)

    monkeypatch.setattr(Axes3D, "plot_surface", record)
    return plots.kernel_surface(report), drawn


def test_the_surface_is_the_change_of_the_centred_kernel(monkeypatch):
    report = tiny("squared")
    ax, drawn = surface_of(report, monkeypatch)
    h = np.eye(5) - 1 / 5
    kernels = [h @ k @ h / np.linalg.norm(h @ k @ h) for _, k in report.kernels]
    vectors = np.linalg.svd(kernels[0])[0][:, :4]
    g = np.asarray(report.flow.output_grad(report.flow.params0))
    vectors = vectors * -np.sign(g @ vectors)
    assert len(drawn) == 3
    for z, k in zip(drawn, (kernels[-1], kernels[1], kernels[2]), strict=True):
        np.testing.assert_allclose(z, vectors.T @ (k - kernels[0]) @ vectors, atol=1e-9)
    limits = [axes.get_zlim() for axes in ax.figure.axes]
    assert limits == [limits[0]] * 3
    assert limits[0][1] >= np.abs(drawn[0]).max()
    titles = [axes.get_title(loc="left") for axes in ax.figure.axes]
    assert [title.split()[-1] for title in titles] == ["4", "0.04", "0.4"]


def test_a_kernel_that_stands_still_to_rounding_is_a_flat_sheet_and_no_drift(monkeypatch):
    (t0, k0), *_ = lazy().kernels
    rounding = 1e-15 * np.random.default_rng(0).normal(size=k0.shape)
    ax, drawn = surface_of(dataclasses.replace(lazy(), kernels=((t0, k0), (3.0, k0 + rounding))), monkeypatch)
    assert 0 < np.abs(drawn[0]).max() < 0.02 * ax.get_zlim()[1]
    history = dict(lazy().flow.history)
    history["evolution"] = history["evolution"]._replace(drift=np.full_like(history["t"], 1e-15))
    still = dataclasses.replace(lazy(), flow=dataclasses.replace(lazy().flow, history=history))
    assert plots.kernel_drift(still).get_ylim()[1] > 1e-13


def test_a_kernel_that_centring_removes_is_a_flat_sheet(monkeypatch):
    report = dataclasses.replace(tiny("squared"), kernels=tuple((t, np.full((5, 5), 1.0 + t)) for t in (0.0, 1.0, 2.0)))
    _, drawn = surface_of(report, monkeypatch)
    assert np.abs(drawn).max() == 0


def test_no_channel_at_all_is_drawn():
    report = tiny("squared")
    channel = signal_channel(report.gramian, AboveThreshold(1e9))
    report = dataclasses.replace(report, channel=channel, cells=four_cells(report.flow, channel))
    plots.overview(report).canvas.draw()


def test_a_surface_needs_a_third_dimension():
    with pytest.raises(TypeError, match="projection='3d'"):
        plots.kernel_surface(tiny("squared"), Figure().add_subplot())


def test_docstring_examples():
    results = doctest.testmod(plots.flow)
    assert results.failed == 0
    assert results.attempted > 0
