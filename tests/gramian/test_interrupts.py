"""Ctrl-C and SIGTERM: one line, soon, and nothing lost; whoever handles signals himself keeps doing so."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gramian import (
    Checkpoint,
    ConstantStep,
    Integrator,
    RealizedPath,
    Recorder,
    gradient_flow,
    minibatches,
    record_training,
)
from gramian._run import path as realized
from gramian._storage.interrupts import Pace, answer, interruptible
from tests.gramian.flow_problems import leaves_differ, problem
from tests.gramian.training_problems import OPTIMIZERS, PARAMS, SOFTMAX, N, X, apply_fn, record

ROOT = Path(__file__).parents[2]
WORKER = """
import sys, jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {root!r})
from tests.gramian.training_problems import *
from gramian import analyze_training
{patch}
print("ready", flush=True)
batches = np.tile(minibatches(N, 4, 1_000), (1_000, 1))
_, run = record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["adamw"], batches, Recorder({folder!r}, 100))
print("recorded", flush=True)
analyze_training(run, X_Q, dense=False, rank=2, store={folder!r} + "/sweeps")
"""


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """A shell has Ctrl-C ignored by what runs in its background, and by all processes that this starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_ends_with_one_line(number, tmp_path):
    """Exit status as ever, one line, and a state that the same call goes on from."""
    code = WORKER.format(root=str(ROOT), folder=str(tmp_path / "run"), patch="")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "gramian.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == -number
    assert out == ""
    assert err.startswith("Interrupted at step ")
    assert err.endswith("the same run goes on from there.\n")
    assert err.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.partial"))


def send_when(monkeypatch, module, name, count, number=signal.SIGINT):
    """The call of this number of `module.name` finds that a signal has come."""
    plain, calls = getattr(module, name), []

    def counted(*args, **keywords):
        calls.append(1)
        if len(calls) == count:
            signal.raise_signal(number)
        return plain(*args, **keywords)

    monkeypatch.setattr(module, name, counted)
    return calls


def one_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_recording_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    """Also what has not been written yet, up to the last kept state; the same call ends with the same bits."""
    batches = minibatches(N, 4, 20)
    whole, _ = record(tmp_path / "whole", OPTIMIZERS["adam"], batches=batches, every=8)
    with monkeypatch.context() as patch:
        calls = send_when(patch, Recorder, "update", 5)
        with pytest.raises(KeyboardInterrupt) as raised:
            record(tmp_path / "cut", OPTIMIZERS["adam"], batches=batches, every=8)
        assert len(calls) == 5
    line = one_line(capsys)
    assert line == str(raised.value)
    kept = int(max(path.stem for path in (tmp_path / "cut").glob("*.save")))
    assert kept == 40
    assert line.startswith(f"Interrupted at step {kept}. Recorded in {tmp_path / 'cut'} up to step {kept}; ")
    again, run = record(tmp_path / "cut", OPTIMIZERS["adam"], batches=batches, every=8)
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name])
    assert run.num_steps == len(batches)


def test_a_loop_of_ones_own(tmp_path, capsys):
    """Inside `with recorder`: answered after the next update, which is kept."""
    with pytest.raises(KeyboardInterrupt):
        loop(Recorder(tmp_path, every=1), lambda step: step == 3 and signal.raise_signal(signal.SIGINT))
    assert one_line(capsys).startswith(f"Interrupted at step 4. Recorded in {tmp_path} up to step 4;")
    assert loop(Recorder(tmp_path, every=1), lambda step: None) == 4


def test_a_loop_that_fails_keeps_what_it_has(tmp_path):
    with pytest.raises(ZeroDivisionError):
        loop(Recorder(tmp_path, every=2), lambda step: 1 // (5 - step))
    assert loop(Recorder(tmp_path, every=2), lambda step: None) == 4


def loop(recorder, happens):
    """Ten steps of a loop of one's own; where it began."""
    with recorder:
        *_, start = recorder.start(PARAMS, ())
        for step in range(start, 10):
            happens(step)
            recorder.update([step], PARAMS, ())
    return start


def test_a_flow_keeps_its_last_step(tmp_path, monkeypatch, capsys):
    args, settings = problem("squared"), {"t1": 1.0, "controller": ConstantStep(0.1)}
    whole = gradient_flow(*args, **settings)
    with monkeypatch.context() as patch:
        send_when(patch, Integrator, "update", 4)
        with pytest.raises(KeyboardInterrupt, match=r"Interrupted at t = 0\.4 of 1\. Saved in "):
            gradient_flow(*args, **settings, checkpoint=Checkpoint(tmp_path))
        assert one_line(capsys)
    assert [path.name for path in tmp_path.glob("*.save")] == ["00000004.save"]
    with monkeypatch.context() as patch:
        calls = send_when(patch, Integrator, "update", 100)
        assert leaves_differ(gradient_flow(*args, **settings, checkpoint=Checkpoint(tmp_path)), whole) == []
        assert len(calls) == 6
    with monkeypatch.context() as patch:
        send_when(patch, Integrator, "update", 2)
        with pytest.raises(KeyboardInterrupt, match="Nothing was kept: with checkpoint=Checkpoint"):
            gradient_flow(*args, **settings)


@pytest.mark.parametrize("direction", ["_forward", "_backward"])
def test_a_sweep_keeps_its_last_segment(direction, tmp_path, monkeypatch, capsys):
    run, psi = record(tmp_path / "run", OPTIMIZERS["adam"], batches=minibatches(N, 4, 10))[1], np.ones((1, 3 * N))
    whole = RealizedPath(run, None, 1).backward(psi, of="motion")
    store = tmp_path / "sweeps"
    with monkeypatch.context() as patch:
        send_when(patch, realized, direction, 2)
        with pytest.raises(KeyboardInterrupt, match=f"which is kept in {store}; the same call goes on"):
            RealizedPath(run, None, 1, store).backward(psi, of="motion")
        assert one_line(capsys)
    with monkeypatch.context() as patch:
        calls = send_when(patch, realized, direction, 100)
        np.testing.assert_array_equal(RealizedPath(run, None, 1, store).backward(psi, of="motion"), whole)
        assert len(calls) == len(list(run.segments())) - 2
    with monkeypatch.context() as patch:
        send_when(patch, realized, direction, 2)
        with pytest.raises(KeyboardInterrupt, match="Nothing was kept: with store=folder"):
            RealizedPath(run, None, 1).backward(psi, of="motion")


# ------------------------------------------------------------------------------------------------ the rules of signals


def wait_for_it(seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)
    raise AssertionError("nothing came")


def interrupted(work, line="line"):
    with interruptible(lambda: line):
        signal.raise_signal(signal.SIGINT)
        work()


def test_handlers_come_back(capsys):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    for work in (lambda: None, answer, lambda: signal.raise_signal(signal.SIGINT), lambda: 1 / 0):
        try:
            with interruptible(lambda: "line"):
                assert signal.getsignal(signal.SIGTERM) is not before[1]
                work()
        except (KeyboardInterrupt, ZeroDivisionError):
            pass
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().err == "line\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_programs_own_handler_stays(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(1))
    try:
        with interruptible(lambda: "line"):
            signal.raise_signal(number)
            answer()
    finally:
        signal.signal(number, before)
    assert seen == [1]


def test_a_signal_is_answered_where_nobody_asks(capsys):
    """Half a second later, between two lines of Python."""
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted(wait_for_it)
    assert time.monotonic() - start < 2
    assert capsys.readouterr().err == "line\n"


def test_asked_twice_is_answered_at_once():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: (signal.raise_signal(signal.SIGINT), wait_for_it()))
    assert time.monotonic() - start < 0.4


def test_saving_what_there_is_takes_its_time():
    """The patience of half a second does not cut short what is saved."""
    saved = []

    def save():
        time.sleep(0.8)
        saved.append(1)

    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: answer(save))
    assert saved == [1]


def test_the_innermost_knows_best(capsys):
    with pytest.raises(KeyboardInterrupt, match="inner"):
        interruptible(lambda: "outer")(interrupted)(answer, "inner")
    assert capsys.readouterr().err == "inner\n"


def test_other_threads_are_no_ones_business():
    found = []

    def work():
        with interruptible(lambda: "line"):
            answer()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_an_interrupt_that_is_caught_and_one_that_is_not():
    """In a script: `except KeyboardInterrupt` sees it; uncaught it leaves one line; other errors are shown as ever."""
    code = """
import signal, sys
from gramian._storage.interrupts import answer, interruptible
def stop():
    with interruptible(lambda: "line"):
        signal.raise_signal(signal.SIGINT)
        answer()
try:
    stop()
except KeyboardInterrupt:
    print("caught")
if sys.argv[1] == "error":
    1 / 0
stop()
"""

    def run(what):
        return subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=False)

    quiet, error = run("interrupt"), run("error")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (-signal.SIGINT, "caught\n", "line\nline\n")
    assert error.returncode == 1
    assert "ZeroDivisionError" in error.stderr


def test_a_pace_covers_all_steps_in_calls_that_stay_short():
    pace, calls = Pace(0.02), []
    for _ in range(3):
        calls += list(pace.calls(37))
        assert calls[-1][1] == 37
    assert calls[0] == (0, 1)
    assert [a for a, _ in calls[1:]] == [b if b < 37 else 0 for _, b in calls[:-1]]
    assert max(b - a for a, b in calls) > 8  # no work at all: few calls
    slow = Pace(0.02)
    lengths = []
    for first, last in slow.calls(12):
        lengths.append(last - first)
        time.sleep(0.015 * (last - first))
    assert max(lengths[1:]) <= 2


def test_a_recording_that_ends_leaves_nothing_behind(tmp_path):
    threads = threading.active_count()
    recorder = Recorder(tmp_path, every=2, save_bytes=1)
    record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["adam"], minibatches(N, 4, 4), recorder)
    assert threading.active_count() == threads
