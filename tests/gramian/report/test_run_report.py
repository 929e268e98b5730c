"""The account of a recorded run: dense and matrix-free agree, a killed analysis goes on, devices change nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gramian import AboveThreshold, RealizedPath, analyze_training, minibatches, softmax_cross_entropy
from gramian._run import path as realized
from tests.gramian.training_problems import CLASSES, OPTIMIZERS, OUTPUTS, SQUARED, X_Q, N, record

CLEAN = softmax_cross_entropy(jnp.array((CLASSES + (np.arange(N) < 3)) % OUTPUTS))
TEST = softmax_cross_entropy(jnp.array([0, 1, 2, 0]))
SETTINGS = {"clean_loss": CLEAN, "test_loss": TEST, "quadrature": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("run"), OPTIMIZERS["adamw"], batches=minibatches(N, 4, 8))[1]


@pytest.fixture(scope="module")
def dense(run):
    return analyze_training(run, X_Q, **SETTINGS)


def test_everything_holds_and_shows(dense):
    assert [row.name for row in dense.identities] == ["(I1)", "(I2)", "(I3)", "(I4)", "(I6′)"]
    assert all(row.holds for row in dense.identities)
    assert max(row.residual for row in dense.identities) < 1e-6
    assert dense.forced[0] > 0.001
    assert 0 < dense.negative_share < 1
    assert dense.coupling.correlation > 0.5
    for risk in (dense.train_risk, dense.test_risk):
        assert abs(risk.predicted - risk.end) < 1e-6 * risk.start
    for shares in zip(*(cell[2:5] for cell in dense.cells), strict=True):
        assert abs(sum(shares) - 1) < 1e-9
    text = repr(dense)
    for word in ("Recorded run", "(I6′)", "noise", "weight decay", "Gauss points"):
        assert word in text
    assert "<pre" in dense._repr_html_()
    assert json.loads(json.dumps(dense.as_dict()))["num_steps"] == 24


def test_matrix_free_is_dense(run, dense):
    """With products enough the few eigenpairs are those of the matrices, and so is all that follows from them."""
    free = analyze_training(run, X_Q, dense=False, rank=6, num_products=4, rule=AboveThreshold(60.0), **SETTINGS)
    exact = analyze_training(run, X_Q, dense=True, rule=AboveThreshold(60.0), **SETTINGS)
    assert free.operators is None
    assert 1 < free.channel.rank == exact.channel.rank < 6
    np.testing.assert_allclose(free.channel.eigenvalues, exact.channel.eigenvalues[:6], rtol=1e-8)
    np.testing.assert_allclose(free.gramian_eigenvalues, exact.gramian_eigenvalues[:6], rtol=1e-8)
    assert (free.residuals < 1e-5 * exact.channel.eigenvalues[0]).all()
    assert abs(free.negative_share - exact.negative_share) < 1e-8
    for one, other in zip(free.cells, exact.cells, strict=True):
        np.testing.assert_allclose(one[2:], other[2:], rtol=1e-6)
    for one, other in zip(free.identities[:4], exact.identities[:4], strict=True):
        np.testing.assert_allclose(one.residual, other.residual, rtol=1e-4)
    np.testing.assert_allclose(free.coupling.correlation, exact.coupling.correlation, rtol=1e-6)


def test_a_broken_identity_is_seen(run, monkeypatch):
    """An operator that is 0.1 % off fails by far: tolerances follow the quadrature, not the residual."""
    plain = RealizedPath.forward

    def wrong(self, psi, **options):
        sweep = plain(self, psi, **options)
        return sweep._replace(sums=sweep.sums._replace(moved=1.001 * sweep.sums.moved))

    monkeypatch.setattr(RealizedPath, "forward", wrong)
    verdicts = {row.name: row.holds for row in analyze_training(run, X_Q, **SETTINGS).identities}
    assert not verdicts["(I3)"]
    assert verdicts["(I1)"]
    assert verdicts["(I4)"]


def test_squared_loss_without_test_points(tmp_path):
    _, run = record(tmp_path, optax.sgd(0.05, momentum=0.8), loss=SQUARED)
    report = analyze_training(run, quadrature=4)
    assert [row.name for row in report.identities] == ["(I1)", "(I2)", "(I3)"]
    assert all(row.holds for row in report.identities)
    assert report.coupling is None
    assert report.test_risk is None
    assert report.forced == (0.0, 0.0)


@pytest.mark.parametrize("of", [None, "gramian"])
def test_a_sweep_goes_on_where_it_was_killed(run, tmp_path, monkeypatch, of):
    """Interrupted at every third segment: no segment but that one is swept twice, and all bits are the same."""
    monkeypatch.setattr(realized, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(realized, "STEPS_AT_ONCE", 8)
    psi, swept = np.random.default_rng(0).normal(size=(2, N * OUTPUTS)), []

    def sweep(store):
        path = RealizedPath(run, X_Q, 1, store)
        return path.forward(psi) if of is None else path.backward(psi, of=of)

    whole = sweep(None)

    def interrupted(plain):
        def call(*args):
            swept.append(plain)
            if len(swept) % 3 == 0:
                raise KeyboardInterrupt
            return plain(*args)

        return call

    for name in ("_forward", "_backward"):
        monkeypatch.setattr(realized, name, interrupted(getattr(realized, name)))
    segments, kills, found = 3 if of is None else 6, 0, None
    while found is None and kills < segments:
        try:
            found = sweep(tmp_path)
        except KeyboardInterrupt:
            kills += 1
    assert 0 < kills < segments
    assert len(swept) == segments + kills
    for one, other in zip(*map(jax.tree.leaves, (whole, found)), strict=True):
        np.testing.assert_array_equal(one, other)
    left = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert left == ["forward" if of is None else "backward", "gramian.json", "gramian.lock"], "nothing of the way"


def test_a_damaged_state_on_the_way_is_computed_again(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(realized, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(realized, "STEPS_AT_ONCE", 8)
    psi, plain = np.ones((1, N * OUTPUTS)), realized._backward
    whole = RealizedPath(run, X_Q, 1).backward(psi, of="motion")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(realized, "_backward", stop)
    with pytest.raises(KeyboardInterrupt):
        RealizedPath(run, X_Q, 1, tmp_path).backward(psi, of="motion")
    monkeypatch.setattr(realized, "_backward", plain)
    (damaged,) = tmp_path.glob("*/16.save")
    damaged.write_bytes(damaged.read_bytes()[:-50])
    np.testing.assert_array_equal(RealizedPath(run, X_Q, 1, tmp_path).backward(psi, of="motion"), whole)
    assert "16.save does not match its checksum. It is kept as" in capsys.readouterr().out
    assert len(list(tmp_path.glob("aside/*/16.save"))) == 1


@pytest.mark.parametrize("direction", ["_forward", "_backward"])
def test_a_sweep_that_was_cut_otherwise_begins_again(direction, run, tmp_path, monkeypatch, capsys):
    """Stopped at a step that is now in the midst of a segment: its probes must not be taken for the segment's."""
    monkeypatch.setattr(realized, "KEEP_SECONDS", 0.0)
    psi, plain, calls = np.ones((1, N * OUTPUTS)), getattr(realized, direction), []

    def sweep(store=None):
        path = RealizedPath(run, X_Q, 1, store)
        return path.forward(psi) if direction == "_forward" else path.backward(propagated=psi)

    def stop(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*args)

    whole = sweep()
    with monkeypatch.context() as patch:
        patch.setattr(realized, "STEPS_AT_ONCE", 1)
        patch.setattr(realized, direction, stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path)
    found = sweep(tmp_path)
    assert "belongs to steps that were cut otherwise. It is kept as" in capsys.readouterr().out
    for one, other in zip(*map(jax.tree.leaves, (whole, found)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_killed_analysis_takes_up_finished_sweeps(run, tmp_path, monkeypatch):
    settings = {"dense": False, "rank": 2, "num_products": 1, "store": tmp_path}
    whole = analyze_training(run, X_Q, **settings | {"store": None}).as_dict()
    plain, done = RealizedPath._forward, []

    def interrupted(self, *args):
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(RealizedPath, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze_training(run, X_Q, **settings)
    kept = {path.name for path in tmp_path.glob("*.save")}
    assert len(kept) == 3
    damaged = tmp_path / sorted(kept)[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert analyze_training(run, X_Q, **settings).as_dict() == whole
    before = len(done)
    assert analyze_training(run, X_Q, **settings).as_dict() == whole
    assert len(done) == before, "a third run computes nothing"


def test_a_store_tells_runs_of_the_same_start_apart(run, tmp_path):
    other = record(tmp_path / "run", OPTIMIZERS["sgd"], batches=minibatches(N, 4, 8))[1]
    psi, store = np.ones((1, N * OUTPUTS)), tmp_path / "store"
    first, second = (RealizedPath(one, store=store).forward(psi).sums.moved for one in (run, other))
    np.testing.assert_array_equal(second, RealizedPath(other).forward(psi).sums.moved)
    assert np.abs(first - second).max() > 1e-3


def test_examples_and_probes_on_eight_devices(tmp_path):
    """In a process of its own, where the CPU is eight devices."""
    code = f"""
import sys, jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.gramian.training_problems import *
from gramian import RealizedPath, Recording
assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()), ("i",))
rng = np.random.default_rng(0)
x, x_q, y = rng.normal(size=(16, INPUTS)), rng.normal(size=(8, INPUTS)), rng.integers(0, OUTPUTS, 16)
loss = softmax_cross_entropy(jnp.array(y))
recorder = Recorder({str(tmp_path)!r}, 4)
_, run = record_training(apply_fn, PARAMS, x, loss, OPTIMIZERS["adam"], minibatches(16, 4, 4), recorder)
psi = rng.normal(size=(8, 16 * OUTPUTS))
expected = RealizedPath(run, x_q).forward(psi), RealizedPath(run, x_q).backward(psi, of="gramian")
x, x_q = (jax.device_put(one, NamedSharding(mesh, P("i"))) for one in (x, x_q))
import dataclasses
run = dataclasses.replace(run, x_s=x)
for spec in (P(None), P("i")):
    probes = jax.device_put(psi, NamedSharding(mesh, spec))
    path = RealizedPath(run, x_q)
    found = path.forward(probes), path.backward(probes, of="gramian")
    for one, other in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-12)
    print(len(found[0].sums.moved.sharding.device_set), found[0].probes.psi.sharding)
"""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_loss": SQUARED}, "clean_loss is squared"),
        ({"test_loss": softmax_cross_entropy(jnp.array([0, 1]))}, "targets for 2 examples and x_q holds 4"),
        ({"num_products": 0}, "num_products=0"),
        ({"dense": False, "rank": 40}, "rank=40 exceeds"),
    ],
)
def test_bad_settings(run, settings, message):
    with pytest.raises(ValueError, match=message):
        analyze_training(run, X_Q, **settings)


def test_test_targets_without_test_inputs(run):
    with pytest.raises(ValueError, match="pass x_q"):
        analyze_training(run, test_loss=TEST)
