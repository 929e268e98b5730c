"""Recording: what comes back, what a damaged save does, what a full disk costs."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gramian import Recorder, Recording, minibatches, record_training
from tests.gramian.training_problems import OPTIMIZERS, PARAMS, SOFTMAX, SQUARED, N, X, apply_fn, record


def by_hand(optimizer, batches, loss=SOFTMAX):
    """Parameters after every step of a plain loop."""

    def mean_loss(params, batch):
        return jnp.mean(jax.vmap(loss.example_loss)(apply_fn(params, X[batch]), loss.targets[batch]))

    params, states = jax.tree.map(jnp.asarray, PARAMS), []
    opt_state = optimizer.init(params)
    for batch in batches:
        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
        states.append(params)
    return states


def assert_same(tree, other, **tolerance):
    for a, b in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
        np.testing.assert_allclose(a, b, **tolerance) if tolerance else np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("every", "save_bytes"), [(4, 2**26), (4, 1), (7, 3000), (1000, 1)])
def test_every_state_kept_is_that_of_a_plain_loop(tmp_path, every, save_bytes):
    """30 steps in segments, whatever is written at a time; both ways through them."""
    batches = minibatches(N, 4, 10)
    expected = by_hand(OPTIMIZERS["adamw"], batches)
    recorder = Recorder(tmp_path, every=every, save_bytes=save_bytes)
    params, run = record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["adamw"], batches, recorder)
    assert_same(params, expected[-1], rtol=1e-9)
    assert run.num_steps == len(batches)
    segments = list(run.segments())
    assert [segment.step for segment in segments] == list(range(0, len(batches), every))
    np.testing.assert_array_equal(np.concatenate([segment.batches for segment in segments]), batches)
    assert_same(segments[0].start.params, PARAMS)
    for segment in segments:
        assert_same(segment.end.params, expected[segment.step + len(segment.batches) - 1], rtol=1e-9)
    backwards = list(run.segments(backwards=True))[::-1]
    assert [segment.step for segment in backwards] == [segment.step for segment in segments]
    for one, other in zip(segments, backwards, strict=True):
        assert_same((one.start, one.end, one.batches), (other.start, other.end, other.batches))


def test_a_loop_of_ones_own_that_donates_its_buffers(tmp_path):
    batches, tx = minibatches(N, 4, 3), OPTIMIZERS["adam"]
    expected, recorder = by_hand(tx, batches), Recorder(tmp_path, every=2)
    params, state, step = recorder.start(jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS))

    @jax.jit
    def gradient(params, batch):
        return jax.grad(
            lambda w: jnp.mean(
                jax.vmap(SOFTMAX.example_loss)(apply_fn(w, jnp.asarray(X)[batch]), SOFTMAX.targets[batch])
            )
        )(params)

    update = jax.jit(lambda grads, state, params: tx.update(grads, state, params), donate_argnums=(0, 1))
    apply = jax.jit(optax.apply_updates, donate_argnums=0)
    for batch in batches[step:]:
        updates, state = update(gradient(params, batch), state, params)
        params = apply(params, updates)
        recorder.update(batch, params, state)
    recorder.close(params, state)
    run = Recording(tmp_path, apply_fn, tx, SOFTMAX, X, params)
    assert_same(run.params, PARAMS)  # the first ones, whatever was passed
    for segment in run.segments():
        assert_same(segment.end.params, expected[segment.step + len(segment.batches) - 1], rtol=1e-9)


def test_a_longer_call_goes_on_where_the_shorter_one_ended(tmp_path, monkeypatch):
    batches = minibatches(N, 4, 8)
    whole, _ = record(tmp_path / "whole", OPTIMIZERS["adam"], batches=batches)
    record(tmp_path / "parts", OPTIMIZERS["adam"], batches=batches[:16])
    steps = []
    plain = Recorder.update
    monkeypatch.setattr(
        Recorder, "update", lambda self, batch, *state: (steps.append(len(batch)), plain(self, batch, *state))
    )
    parts, run = record(tmp_path / "parts", OPTIMIZERS["adam"], batches=batches)
    assert sum(steps) == len(batches) - 16
    assert_same(parts, whole)
    assert run.num_steps == len(batches)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_save_is_named_and_the_ones_before_it_are_used(tmp_path, capsys, damage):
    batches = minibatches(N, 4, 8)
    record_training(
        apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["adam"], batches, Recorder(tmp_path, every=4, save_bytes=1)
    )
    whole = list(Recording(tmp_path, apply_fn, OPTIMIZERS["adam"], SOFTMAX, X, PARAMS).segments())
    save = tmp_path / "00000016.save"
    content = bytearray(save.read_bytes())
    if damage == "missing":
        save.unlink()
    else:
        if damage == "truncated":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 1
        save.write_bytes(content)
    run = Recording(tmp_path, apply_fn, OPTIMIZERS["adam"], SOFTMAX, X, PARAMS)
    with pytest.raises(ValueError, match=r"save (16|20) .*cannot be used"):
        list(run.segments())
    record_training(
        apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["adam"], batches, Recorder(tmp_path, every=4, save_bytes=1)
    )
    assert "going on from step 12" in capsys.readouterr().out
    kept = {path.name: path.read_bytes() for path in (tmp_path / "aside").iterdir()}
    assert kept.keys() == {"00000016.save", "00000020.save", "00000024.save"} - (
        {"00000016.save"} if damage == "missing" else set()
    )
    if damage != "missing":
        assert kept["00000016.save"] == content
    for one, other in zip(run.segments(), whole, strict=True):
        assert_same((one.start, one.end), (other.start, other.end))


def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(tmp_path, monkeypatch):
    batches = minibatches(N, 4, 8)
    recorder = Recorder(tmp_path, every=4, save_bytes=1)
    plain = os.fsync

    def full(descriptor):
        if len(list(tmp_path.glob("*.save"))) == 2:
            raise OSError(28, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"(?s)step 1[26].*No space left.*intact up to step 8"):
            record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["adam"], batches, recorder)
    assert not list(tmp_path.glob("*.partial")), "what could not be written takes no space"
    params, run = record(tmp_path, OPTIMIZERS["adam"], batches=batches, every=4)
    assert_same(params, by_hand(OPTIMIZERS["adam"], batches)[-1], rtol=1e-9)
    assert len(list(run.segments())) == 6


def test_a_folder_of_another_run_is_refused(tmp_path):
    record(tmp_path, OPTIMIZERS["adam"], batches=minibatches(N, 4, 2))
    with pytest.raises(ValueError, match=r"what differs: parameters\."):
        record(tmp_path, OPTIMIZERS["adam"], params=jax.tree.map(lambda leaf: leaf + 1, PARAMS))
    with pytest.raises(ValueError, match="holds 6 steps already"):
        record(tmp_path, OPTIMIZERS["adam"], batches=minibatches(N, 4, 1))


@pytest.mark.parametrize(
    ("batches", "message"),
    [(np.ones(3), r"\(3,\)"), (np.full((2, 2), N), "indices from 12 to 12"), (np.zeros((0, 2), int), "(0, 2)")],
)
def test_bad_batches(tmp_path, batches, message):
    with pytest.raises(ValueError, match=message):
        record(tmp_path, OPTIMIZERS["sgd"], batches=batches)


def test_bad_calls(tmp_path):
    with pytest.raises(RuntimeError, match="call start"):
        Recorder(tmp_path).update([1], PARAMS, ())
    with pytest.raises(ValueError, match="holds no recording"):
        Recording(tmp_path, apply_fn, OPTIMIZERS["sgd"], SOFTMAX, X, PARAMS)
    with pytest.raises(ValueError, match="every=0"):
        Recorder(tmp_path, every=0)
    with pytest.raises(ValueError, match="batch_size=13 exceeds"):
        minibatches(N, 13, 1)
    with pytest.raises(ValueError, match="targets"):
        record(
            tmp_path,
            OPTIMIZERS["sgd"],
            loss=type(SQUARED)(SQUARED.targets[:, :2], SQUARED.example_loss, "squared", True),
        )


def test_minibatches():
    batches = minibatches(10, 3, 4, seed=1)
    assert batches.shape == (12, 3)
    for a_pass in batches.reshape(4, 9):
        assert len(set(a_pass)) == 9
    assert not np.array_equal(batches, minibatches(10, 3, 4, seed=2))
    drawn = minibatches(10, 3, 400, replace=True)
    assert any(len(set(batch)) < 3 for batch in drawn)
    assert set(drawn.ravel()) == set(range(10))
