"""Runs that are killed, torn files, folders of another run: what is resumed is bit-identical or refused."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gramian import (
    AdaptiveStep,
    ChannelFill,
    Checkpoint,
    ConstantStep,
    DoublingGramian,
    Integrator,
    KernelEvolution,
    KernelSource,
    TestKernelTop,
    convex_loss,
    gradient_flow,
    logistic_loss,
    squared_loss,
)
from tests.gramian.flow_problems import cosh_loss, leaves_differ, mlp, problem


@dataclass(frozen=True)
class Empty:
    """An observable whose state and value hold no numbers."""

    def init(self, source, loss, start):
        return jnp.zeros((0, 3))

    def update(self, state, source, point, operators, h):
        return state, (state, jnp.zeros(0))


OBSERVABLES = {"kernel": KernelEvolution(2), "fill": ChannelFill(), "top": TestKernelTop(), "w": DoublingGramian()}
SETTINGS = {"t1": 1.0, "observables": OBSERVABLES, "save_at": (0.6, 0.3), "controller": AdaptiveStep(1e-6)}


class Killed(BaseException):
    """Not an Exception, so that nothing on the way may swallow it."""


def stopped_after(monkeypatch, steps, args, settings, folder):
    """A run that is cut off inside its step number steps + 1."""
    original, taken = Integrator.update, []

    def update(self, state, t_end):
        if len(taken) == steps:
            raise Killed
        taken.append(1)
        return original(self, state, t_end)

    with monkeypatch.context() as patch:
        patch.setattr(Integrator, "update", update)
        with pytest.raises(Killed):
            gradient_flow(*args, **settings, checkpoint=Checkpoint(folder, every_seconds=0))


def saves(folder):
    return sorted(int(path.stem) for path in Path(folder).glob("*.save"))


@pytest.mark.parametrize(("name", "dtype"), [("squared", np.float64), ("softmax", np.float32)])
def test_four_kills_leave_no_trace(name, dtype, tmp_path, monkeypatch):
    """Parameters, operators, history, observables and saved parameters, bit for bit; kills fall around `save_at`."""
    args = problem(name, dtype=dtype)
    settings = SETTINGS
    if dtype == np.float32:
        settings = {**SETTINGS, "controller": AdaptiveStep(1e-5), "observables": {"fill": ChannelFill()}}
    whole = gradient_flow(*args, **settings)
    assert whole.num_steps > 7
    for steps in (1, 2, 1, 3):
        stopped_after(monkeypatch, steps, args, settings, tmp_path)
    assert saves(tmp_path) == [6, 7]  # the two newest of 1 + 2 + 1 + 3 steps: each run went on where the last was cut
    resumed = gradient_flow(*args, **settings, checkpoint=Checkpoint(tmp_path, every_seconds=0))
    assert leaves_differ(resumed, whole) == []
    assert [type(number) for number in (resumed.t1, resumed.num_steps)] == [float, int]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_time_and_step_come_back_with_all_their_bits(dtype, tmp_path):
    """Python floats, 53 bits each, whatever the dtype of the arrays beside them."""
    apply_fn, params, x_s, loss, x_q = problem("squared", dtype=dtype)
    flow = Integrator(KernelSource(apply_fn, x_s, x_q), loss)
    start = flow.init(params, 1 / 3)
    state, info = flow.update(start, 1.0)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.restore(flow, start, 1.0, ()) == (start, [], [])
    checkpoint.save(state, [info], [], force=True)
    checkpoint.close()
    restored, infos, saved = Checkpoint(tmp_path).restore(flow, start, 1.0, ())
    for name in ("t", "h", "grad_scale", "num_steps", "num_rejected"):
        assert getattr(restored, name) == getattr(state, name)
        assert type(getattr(restored, name)) is type(getattr(state, name))
    assert float(np.float32(state.t)) != state.t  # else nothing was tested
    assert infos == [info]
    assert saved == []


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import numpy as np
from tests.gramian.flow_problems import leaves_differ, problem
from gramian import Checkpoint, ConstantStep, gradient_flow

args = problem("logistic", dtype=np.float32)
settings = dict(t1=2.0, controller=ConstantStep(0.04))
print("ready", flush=True)
flow = gradient_flow(*args, **settings, checkpoint=Checkpoint({folder!r}, every_seconds=0.0))
whole = gradient_flow(*args, **settings)
print(flow.num_steps, leaves_differ(flow, whole))
"""


def test_sigkill(tmp_path):
    """A process that is killed at a random moment between or within its saves; in 32-bit mode, as most runs are."""
    script = SCRIPT.format(root=str(Path(__file__).parents[3]), folder=str(tmp_path))
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "JAX_ENABLE_X64": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not saves(tmp_path):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    process.stdout.close()
    killed_at = max(saves(tmp_path))
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    num_steps, different = resumed.stdout.split("\n")[-2].split(" ", 1)
    assert different == "[]"
    assert int(num_steps) >= killed_at
    assert not list(tmp_path.glob("*.partial"))  # what the kill left half-written is cleared away


# ---------------------------------------------------------------------------------------------------------- torn files


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    """One bit in the middle, which no file system notices."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the last two saves of a finished run, and the run."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, gradient_flow(*problem("squared"), **SETTINGS, checkpoint=Checkpoint(folder, every_seconds=0))


def copy(folder, target):
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_a_torn_save_is_passed_over_and_named(damage, finished, tmp_path, capsys):
    """The newest save is damaged: the run goes on from the one before, says so, and ends as it would have."""
    folder, whole = finished
    copy(folder, tmp_path)
    newest = max(saves(tmp_path))
    torn = tmp_path / f"{newest:08d}.save"
    damage(torn)
    content = torn.read_bytes()
    resumed = gradient_flow(*problem("squared"), **SETTINGS, checkpoint=Checkpoint(tmp_path, every_seconds=0))
    printed = capsys.readouterr().out
    assert leaves_differ(resumed, whole) == []
    assert f"checkpoint {newest} in {tmp_path} does not match its checksum" in printed
    assert (tmp_path / "aside" / torn.name).read_bytes() == content
    assert saves(tmp_path) == saves(folder)
    again = gradient_flow(*problem("squared"), **SETTINGS, checkpoint=Checkpoint(tmp_path, every_seconds=0))
    assert capsys.readouterr().out == ""  # the torn save has been replaced
    assert leaves_differ(again, whole) == []


def test_what_a_kill_left_half_written_is_cleared_away(finished, tmp_path):
    """A save cut off by a kill is a file of a temporary name: no save, and gone after the next run."""
    folder, whole = finished
    copy(folder, tmp_path)
    (tmp_path / "00000009.save.partial").write_bytes(b"half")
    (tmp_path / "notes.partial").write_bytes(b"the user's")
    gradient_flow(*problem("squared"), **SETTINGS, checkpoint=Checkpoint(tmp_path))
    assert saves(tmp_path) == [whole.num_steps - 1, whole.num_steps]
    assert [path.name for path in tmp_path.glob("*.partial")] == ["notes.partial"]


def test_all_saves_torn_starts_over(finished, tmp_path, capsys):
    folder, whole = finished
    copy(folder, tmp_path)
    for path in tmp_path.glob("*.save"):
        truncate(path)
    resumed = gradient_flow(*problem("squared"), **SETTINGS, checkpoint=Checkpoint(tmp_path, every_seconds=0))
    assert capsys.readouterr().out.count("does not match its checksum") == 2
    assert leaves_differ(resumed, whole) == []
    assert saves(tmp_path) == saves(folder)


# ------------------------------------------------------------------------------------------------------------ contract


def test_a_finished_run_is_returned_at_once(finished, monkeypatch):
    folder, whole = finished
    monkeypatch.setattr(Integrator, "update", None)  # not a single step
    assert leaves_differ(gradient_flow(*problem("squared"), **SETTINGS, checkpoint=Checkpoint(folder)), whole) == []


def changed(what):
    """(args, settings) of the finished run with one thing changed."""
    apply_fn, params, x_s, loss, x_q = problem("squared")
    settings = dict(SETTINGS)
    if what == "params":
        params = {**params, "b": params["b"] + 1e-12}
    elif what == "x_s":
        x_s = x_s + 1e-12
    elif what == "x_q":
        x_q = x_q[:2]
    elif what == "targets":
        loss = squared_loss(-loss.targets)
    elif what == "loss":
        loss = logistic_loss(loss.targets[:, 0])
    elif what == "other_convex_loss":
        loss = convex_loss(cosh_loss, loss.targets)
    elif what == "model":
        apply_fn = shifted
    elif what == "t1":
        settings["t1"] = 2.0
    elif what == "t0":
        settings["t0"] = 0.1
    elif what == "save_at":
        settings["save_at"] = (0.3,)
    elif what == "controller":
        settings["controller"] = ConstantStep(0.1)
    elif what == "rtol":
        settings["controller"] = AdaptiveStep(1e-5)
    elif what == "observables":
        settings["observables"] = {}
    elif what == "dtype":
        apply_fn, params, x_s, loss, x_q = problem("squared", dtype=np.float32)
    return (apply_fn, params, x_s, loss, x_q), settings


def shifted(params, x):
    return mlp(params, x) + 1e-3


PROBLEM = ["params", "x_s", "x_q", "targets", "loss", "other_convex_loss", "model", "dtype"]


@pytest.mark.parametrize("what", [*PROBLEM, "t1", "t0", "save_at", "controller", "rtol", "observables"])
def test_a_folder_of_another_problem_is_refused(what, finished):
    folder, _ = finished
    args, settings = changed(what)
    before = saves(folder)
    names = {"rtol": "controller", "other_convex_loss": "loss", "model": "apply_fn"}
    names |= {"params": "parameters", "dtype": "parameters"}
    differs = rf"another problem or other settings; what differs: .*{names.get(what, what)}.*Remove the folder"
    with pytest.raises(ValueError, match=differs):
        gradient_flow(*args, **settings, checkpoint=Checkpoint(folder))
    assert saves(folder) == before


def test_the_same_settings_written_otherwise_are_the_same(finished):
    folder, whole = finished
    settings = {**SETTINGS, "t1": 1, "t0": np.int64(0), "save_at": [np.float64(0.6), 0.3]}
    assert leaves_differ(gradient_flow(*problem("squared"), **settings, checkpoint=Checkpoint(folder)), whole) == []


def test_empty_arrays_come_back_empty(tmp_path, monkeypatch):
    """No test points, and observables without numbers."""
    apply_fn, params, x_s, loss, _ = problem("squared")
    settings = {**SETTINGS, "observables": {"empty": Empty(), "top": TestKernelTop()}}
    whole = gradient_flow(apply_fn, params, x_s, loss, **settings)
    stopped_after(monkeypatch, 3, (apply_fn, params, x_s, loss), settings, tmp_path)
    resumed = gradient_flow(apply_fn, params, x_s, loss, **settings, checkpoint=Checkpoint(tmp_path))
    assert resumed.operators.test_transfer.shape == (0, 5)
    assert leaves_differ(resumed, whole) == []


def test_saves_are_as_seldom_as_asked(tmp_path):
    folder = tmp_path / "made" / "if" / "missing"
    flow = gradient_flow(*problem("squared"), **SETTINGS, checkpoint=Checkpoint(folder, every_seconds=1e6))
    assert saves(folder) == [flow.num_steps]


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, "1", True])
def test_times_between_saves_are_checked(tmp_path, seconds):
    with pytest.raises((TypeError, ValueError), match="every_seconds="):
        Checkpoint(tmp_path, every_seconds=seconds)
