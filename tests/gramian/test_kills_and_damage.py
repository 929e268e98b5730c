"""Kills and damage at random: what comes back is right to the bit, or refused, and what was not ours stays.

A few of each by default; STORAGE_CAMPAIGN=1 takes 20 kills, 20 readers and 100 damages of each kind.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gramian import (
    Checkpoint,
    ConstantStep,
    RealizedPath,
    Recorder,
    Recording,
    gradient_flow,
    minibatches,
    record_training,
)
from gramian._run import path as realized
from gramian._storage.trees import digest
from tests.gramian.flow_problems import problem
from tests.gramian.training_problems import OPTIMIZERS, PARAMS, SOFTMAX, X_Q, N, X, apply_fn, record

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("STORAGE_CAMPAIGN") == "1"
KILLS, READERS, DAMAGES = (20, 20, 100) if FULL else (1, 1, 12)

COMMON = """
import sys, jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {root!r})
from tests.gramian.test_kills_and_damage import *
print("ready", flush=True)
"""
RECORD = COMMON + "print('done', record_wide({folder!r}, {steps})[1].num_steps)"
ANALYZE = COMMON + "print('done', analysis({run!r}, {folder!r}))"
WIDE = {"a": np.random.default_rng(1).normal(size=(5, 3000)) / 2, "b": np.random.default_rng(2).normal(size=(3000, 3))}


def record_wide(folder, steps):
    """A run whose saves take as long as its steps; one a step."""
    batches, recorder = minibatches(N, 4, steps // 3), Recorder(folder, every=1, save_bytes=1)
    return record_training(apply_fn, WIDE, X, SOFTMAX, OPTIMIZERS["adam"], batches, recorder)


def analysis(folder, store):
    """Digests of products with all operators, from sweeps that keep where they are at every step."""
    realized.KEEP_SECONDS, realized.STEPS_AT_ONCE = 0.0, 1
    path = RealizedPath(Recording(folder, apply_fn, OPTIMIZERS["adam"], SOFTMAX, X, WIDE), X_Q, 1, store)
    psi = np.random.default_rng(3).normal(size=(12, 3 * N))
    found = [path.forward(psi), path.backward(psi, of="gramian"), path.backward(psi, of="motion")]
    found += [path.backward(propagated=psi), path.backward(moved_q=psi[:, : 3 * len(X_Q)])]
    return digest(jax.device_get(found))


def start(code):
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def kill(code, folder, rng, longest, *, in_a_save):
    """Kills a process a random time after it has begun to write, or when it writes next; says if a save was cut."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.save*")}
    process = start(code)

    def wait_until(seen):
        deadline = time.monotonic() + 120
        while not seen():
            assert process.poll() is None, f"it ended before it could be killed: {process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    wait_until(lambda: any(before.get(path) != time_of(path) for path in folder.rglob("*.save*")))
    time.sleep(rng.uniform(0, longest))
    if in_a_save:
        wait_until(lambda: any(folder.rglob("*.save.partial")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    return any(folder.rglob("*.save.partial"))


def kills(code, folder, rng, longest):
    """Whether each of them cut a save: at least a third of them does."""
    under_way: list[bool] = []
    while len(under_way) < KILLS or sum(under_way) < KILLS / 3:
        under_way.append(kill(code, folder, rng, longest, in_a_save=len(under_way) % 2 == 0))
        assert len(under_way) <= 2 * KILLS + 3, "hardly a kill fell into a save"
    return under_way


def time_of(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def finish(code):
    out, err = start(code).communicate(timeout=300)
    assert out.startswith("done "), err
    assert err == ""
    return out.removeprefix("done ").strip()


def test_kills_of_a_recording(tmp_path):
    """What they leave, gone on from, is the same files to the last byte."""
    steps, rng, folder = 150 * KILLS, np.random.default_rng(0), tmp_path / "killed"
    folder.mkdir()
    code = RECORD.format(root=str(ROOT), folder=str(folder), steps=steps)
    under_way = kills(code, folder, rng, 0.25)
    killed_at = max(int(path.stem) for path in folder.glob("*.save"))
    assert int(finish(code)) == steps > killed_at
    record_wide(tmp_path / "whole", steps)
    print(f"{sum(under_way)} of {len(under_way)} kills fell into a save; the last one at step {killed_at} of {steps}")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        if name != "gramian.lock":
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "whole")


def test_kills_of_an_analysis(tmp_path, monkeypatch):
    """Five sweeps, killed at any moment and gone on from, end with the same bits."""
    for name in ("KEEP_SECONDS", "STEPS_AT_ONCE"):
        monkeypatch.setattr(realized, name, getattr(realized, name))  # `analysis` sets them
    run, store, rng = tmp_path / "run", tmp_path / "sweeps", np.random.default_rng(1)
    record_wide(run, 60 if FULL else 30)
    store.mkdir()
    code = ANALYZE.format(root=str(ROOT), run=str(run), folder=str(store))
    under_way = kills(code, store, rng, 0.1)
    done = len(list(store.glob("*.save")))
    print(f"{sum(under_way)} of {len(under_way)} kills fell into a save; {done} of 5 sweeps were done")
    assert finish(code) == analysis(run, tmp_path / "new")


def test_readers_beside_a_writer(tmp_path):
    """Another process records, this one looks on as often as it can."""
    for k in range(READERS):
        folder = tmp_path / str(k)
        writer = start(RECORD.format(root=str(ROOT), folder=str(folder), steps=90))
        looks = set()
        while writer.poll() is None:
            try:
                run = Recording(folder, apply_fn, OPTIMIZERS["adam"], SOFTMAX, X, WIDE)
                looks.add(run.num_steps)
                assert sum(len(one.batches) for one in run.segments()) == run.num_steps
            except (FileNotFoundError, ValueError):
                assert not looks
        out, err = writer.communicate()
        assert (out, err) == ("done 90\n", "")
        print(f"reader {k}: {len(looks)} different lengths seen")
        assert len(looks) > 1
        shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------------------------- damage


def damage(folder, rng):
    """Something happens to one of the files, marks and locks included; what and to which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, other = rng.choice(files), rng.choice(files)
    content, place = bytearray(path.read_bytes()), 0
    place = int(rng.integers(len(content))) if content else 0
    how = rng.choice(["flip", "zeros", "truncate", "empty", "append", "remove", "noise", "other"])
    if how == "flip" and content:
        content[place] ^= 1 << int(rng.integers(8))
    elif how == "zeros":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    elif how == "noise":
        content[place : place + 64] = rng.bytes(len(content[place : place + 64]))
    elif how == "truncate":
        content = content[:place]
    elif how == "empty":
        content = bytearray()
    elif how == "append":
        content += rng.bytes(10)
    elif how == "other":
        content = bytearray(other.read_bytes())
    path.write_bytes(content)
    if how == "remove":
        path.unlink()
    return how, path.name


def damaged_often(whole, work, expected, seed, tmp_path):
    """Damages copies of a folder; `work` on them gives what is expected, or refuses and changes nothing.

    Nothing but a damaged mark is refused. Of the saves nothing is lost, least of all a damaged one.
    """
    rng, refused = np.random.default_rng(seed), 0
    for k in range(DAMAGES):
        folder = tmp_path / f"damaged{k}"
        shutil.copytree(whole, folder)
        told = [damage(folder, rng) for _ in range(int(rng.integers(1, 3)))]
        before = contents(folder)
        try:
            found = work(folder)
        except ValueError:
            if "gramian.json" not in {name for _, name in told}:
                raise
            assert contents(folder) == before, told
            refused += 1
        else:
            assert found == expected, told
            for path, content in before.items():
                assert path.parent != folder or path.suffix != ".save" or content in contents(folder).values(), told
        shutil.rmtree(folder)
    print(f"of {DAMAGES} damages {DAMAGES - refused} gave the right result, {refused} were refused")
    assert refused < DAMAGES


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damage_to_a_recording(tmp_path):
    def work(folder):
        recorder = Recorder(folder, every=4, save_bytes=1)
        params, run = record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["adam"], minibatches(N, 4, 8), recorder)
        return digest(jax.device_get((params, list(run.segments()))))

    expected = work(tmp_path / "whole")
    damaged_often(tmp_path / "whole", work, expected, 10, tmp_path)


def test_damage_to_a_flow_checkpoint(tmp_path):
    def work(folder):
        settings = {"t1": 1.0, "controller": ConstantStep(0.125)}
        flow = gradient_flow(*problem("squared"), **settings, checkpoint=Checkpoint(folder, every_seconds=0))
        return digest(jax.device_get((flow.params, flow.operators, flow.history)))

    expected = work(tmp_path / "whole")
    damaged_often(tmp_path / "whole", work, expected, 11, tmp_path)


def test_damage_to_sweeps(tmp_path, monkeypatch):
    """Finished ones and one under way, with its states on the way."""
    run, psi = record(tmp_path / "run", OPTIMIZERS["adam"], batches=minibatches(N, 4, 10))[1], np.ones((1, 3 * N))
    monkeypatch.setattr(realized, "KEEP_SECONDS", 0.0)

    def work(folder):
        path = RealizedPath(run, X_Q, 1, folder)
        found = path.forward(psi), path.forward(2 * psi), path.backward(psi, of="motion")
        return digest(jax.device_get(found))

    expected, plain, calls = work(tmp_path / "other"), realized._backward, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(realized, "_backward", stop)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "whole")
    assert len(list((tmp_path / "whole").rglob("*.save"))) > 4
    monkeypatch.setattr(realized, "_backward", plain)
    damaged_often(tmp_path / "whole", work, expected, 12, tmp_path)
