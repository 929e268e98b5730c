"""Slips of a first hour: each refused before anything runs, with the value, the rule and what to do."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gramian._run.recording
import gramian.plots
from gramian import (
    AboveThreshold,
    AdaptiveStep,
    ConstantStep,
    ExponentialMidpoint,
    KernelEvolution,
    Recorder,
    TestKernelTop,
    TraceShare,
    analyze,
    analyze_training,
    convex_loss,
    gradient_flow,
    logistic_loss,
    minibatches,
    record_training,
    softmax_cross_entropy,
    squared_loss,
)
from tests.gramian.training_problems import PARAMS, SOFTMAX, SQUARED, X_Q, N, X, apply_fn

BATCHES, SGD = minibatches(N, 4, 2), optax.sgd(0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: softmax_cross_entropy(np.eye(3, dtype=int)), ValueError, r"one-hot; pass labels\.argmax\(1\)"),
        (lambda: softmax_cross_entropy(np.eye(3, dtype=np.uint8)), ValueError, r"uint8.*one-hot"),
        (lambda: softmax_cross_entropy(np.ones((4, 1), int)), ValueError, r"pass labels\[:, 0\]"),
        (lambda: softmax_cross_entropy(np.full((4, 2), 2)), ValueError, "one class an example"),
        (lambda: softmax_cross_entropy(np.array([0.0, 2.0])), ValueError, r"labels\.astype\(int\)"),
        (lambda: softmax_cross_entropy(np.array([True, False])), TypeError, r"bool.*labels\.astype\(int\)"),
        (lambda: softmax_cross_entropy(np.array([0, 2**32 + 1])), ValueError, "holds 4294967297"),
        (lambda: softmax_cross_entropy(np.zeros(0, int)), ValueError, "labels is empty"),
        (lambda: softmax_cross_entropy(["cat", "dog"]), TypeError, r"labels has dtype .*encode"),
        (lambda: softmax_cross_entropy(None), TypeError, "labels has dtype object"),
        (lambda: softmax_cross_entropy(np.array([[0.5, 0.2]])), ValueError, r"add up to 0\.7"),
        (lambda: logistic_loss(np.array([0, 1])), TypeError, r"2\.0 \* y - 1"),
        (lambda: squared_loss(apply_fn), TypeError, "y is a function"),
        (lambda: squared_loss(SQUARED), TypeError, "y is a OutputLoss"),
        (lambda: squared_loss(np.array([1.0, np.nan, np.inf])), ValueError, "2 NaN or infinite values.*rows 1, 2"),
        (lambda: convex_loss(np.ones(3), lambda u, y: u), TypeError, r"convex_loss\(example_loss, targets\)"),
    ],
)
def test_labels(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint32])
def test_classes_of_any_integer_dtype_are_the_same_labels(dtype):
    labels = softmax_cross_entropy(np.array([0, 2, 1], dtype))
    assert labels.targets.dtype == jnp.int32
    u = np.random.default_rng(0).normal(size=(3, 200))
    np.testing.assert_array_equal(labels.grad(u), softmax_cross_entropy(np.array([0, 2, 1])).grad(u))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x_s": SQUARED, "loss": X}, TypeError, r"x_s is an OutputLoss.*Swap"),
        ({"loss": X_Q, "x_q": SQUARED}, TypeError, r"x_q is an OutputLoss.*Swap"),
        ({"loss": SGD}, TypeError, "optimizer, which comes after the loss"),
        ({"loss": lambda u, y: u}, TypeError, r"convex_loss\(function, targets\)"),
        (
            {"x_q": X_Q[:, :4]},
            ValueError,
            r"x_q: its examples have shape \(4,\), and those of x_s \(5,\)",
        ),
        ({"x_q": {"image": X_Q}}, ValueError, r"x_q: its examples have shape \['image'\]: \(5,\)"),
        ({"t1": "1"}, TypeError, "t1='1' is a str"),
        ({"t1": True}, TypeError, "t1=True is a bool"),
        ({"t1": None}, TypeError, "t1=None"),
        ({"t1": -1}, ValueError, r"t1=-1\.0 must be finite and later"),
        ({"save_at": 0.5}, TypeError, r"save_at=0\.5 must be a sequence"),
        ({"save_at": ("0.5",)}, TypeError, "must be a real number"),
        ({"controller": 1e-4}, TypeError, r"controller=0\.0001.*AdaptiveStep\(\)"),
        ({"controller": AdaptiveStep}, TypeError, r"controller=<class.*AdaptiveStep\(\)"),
        ({"stepper": "euler"}, TypeError, "stepper='euler'"),
        ({"observables": [KernelEvolution()]}, TypeError, "dict of names"),
        ({"observables": {"k": KernelEvolution}}, TypeError, r"observables\['k'\]"),
        ({"checkpoint": "folder"}, TypeError, r"Checkpoint\(directory\)"),
        ({"max_num_steps": 0.5}, ValueError, r"max_num_steps=0\.5 must be an integer"),
        ({"x_s": np.where(X > 1, np.nan, X)}, ValueError, r"x_s holds \d+ NaN or infinite values, the first at \[\d"),
    ],
)
def test_a_flow(arguments, error, message):
    given = {"params": PARAMS, "x_s": X, "loss": SQUARED, "x_q": None, "t1": 1.0} | arguments
    with pytest.raises(error, match=message):
        gradient_flow(apply_fn, **given)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"test_loss": SQUARED}, ValueError, "test_loss has targets for 12 examples and x_q holds 4"),
        ({"test_loss": np.ones(4)}, TypeError, "test_loss is a ndarray"),
        ({"clean_loss": SOFTMAX}, ValueError, "clean_loss is softmax.*build both alike"),
        ({"clean_loss": np.ones(4)}, TypeError, "clean_loss is a ndarray"),
        ({"rule": 0.95}, TypeError, r"rule=0\.95.*TraceShare\(share\)"),
    ],
)
def test_companions_of_a_report_are_named(tmp_path, monkeypatch, settings, error, message):
    run = record_training(apply_fn, PARAMS, X, SQUARED, SGD, BATCHES, Recorder(tmp_path))[1]
    monkeypatch.setattr(gramian.Integrator, "update", lambda *_: pytest.fail("the run had started"))
    with pytest.raises(error, match=message):
        analyze(apply_fn, PARAMS, X, SQUARED, X_Q, t1=1.0, **settings)
    with pytest.raises(error, match=message):
        analyze_training(run, X_Q, **settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1))},
            ValueError,
            "^scale_by_lion .*'sign'",
        ),
        ({"optimizer": optax.contrib.muon(0.1)}, ValueError, "^scale_by_muon cannot be analysed"),
        ({"optimizer": optax.sign_sgd(0.1)}, ValueError, "^scale_by_sign cannot"),
        ({"optimizer": optax.chain(optax.clip(0.1), optax.adam(0.1))}, ValueError, "^clip cannot"),
        ({"optimizer": optax.named_chain(("a", optax.clip(0.1)), ("b", optax.adam(0.1)))}, ValueError, "^clip cannot"),
        ({"optimizer": optax.adam}, TypeError, "optimizer=<function adam.*pass an optax transformation"),
        ({"optimizer": 0.1}, TypeError, r"optimizer=0\.1"),
        ({"optimizer": SQUARED, "loss": SGD}, TypeError, "optimizer, which comes after the loss"),
        ({"recorder": "folder"}, TypeError, r"recorder='folder'.*Recorder\(directory\)"),
        ({"batches": BATCHES.astype(float)}, ValueError, "dtype float64"),
        ({"batches": BATCHES > 1}, ValueError, "dtype bool"),
    ],
)
def test_a_recording_is_refused_when_it_starts(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.setattr(gramian._run.recording, "train", lambda *_: pytest.fail("training had started"))
    given = {"loss": SQUARED, "optimizer": SGD, "batches": BATCHES, "recorder": Recorder(tmp_path)} | arguments
    with pytest.raises(error, match=message):
        record_training(apply_fn, PARAMS, X, **given)


@pytest.mark.parametrize("seconds", [np.nan, -1.0, True, "20", None])
def test_seconds_between_saves(tmp_path, seconds):
    with pytest.raises((TypeError, ValueError), match=rf"every_seconds='?{seconds}'? "):
        Recorder(tmp_path, every_seconds=seconds)


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: AdaptiveStep(rtol=bad),
        lambda bad: AdaptiveStep(atol=bad),
        lambda bad: AdaptiveStep(first_step=bad),
        lambda bad: ConstantStep(bad),
        lambda bad: TraceShare(bad),
        lambda bad: AboveThreshold(bad),
        lambda bad: KernelEvolution(bad),
        lambda bad: TestKernelTop(bad),
        lambda bad: ExponentialMidpoint(bad),
    ],
)
@pytest.mark.parametrize("bad", ["1", True, np.nan, -1.0])
def test_settings_are_checked_where_they_are_made(make, bad):
    with pytest.raises((TypeError, ValueError), match=r"(=|of )"):
        make(bad)


def test_a_figure_that_cannot_be_written_is_refused_before_it_is_drawn(tmp_path, monkeypatch):
    report = analyze(lambda w, x: x @ w, np.zeros(2), np.eye(2), squared_loss(np.ones(2)), t1=1.0)
    monkeypatch.setattr(gramian.plots, "overview", lambda _: pytest.fail("it was drawn"))
    for path, message in (
        (tmp_path / "report.doc", r"ends in '\.doc', but must end in one of .*pdf, .*png"),
        (tmp_path / "report", "ends in ''"),
        (tmp_path / "no" / "report.png", "folder that does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            report.plot(path=path)
    with pytest.raises(TypeError, match="path=3"):
        report.plot(path=3)


def test_a_report_of_something_else():
    with pytest.raises(TypeError, match=r"must be a Recording"):
        analyze_training("folder", X_Q)
