"""Whose folder it is: what is not ours stays as it is, one writer at a time, readers change nothing."""

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import optax
import pytest

from gramian import Checkpoint, RealizedPath, Recorder, Recording, gradient_flow, minibatches, record_training
from gramian._storage.folder import Folder
from gramian._storage.saves import read_arrays
from tests.gramian.flow_problems import problem
from tests.gramian.training_problems import OPTIMIZERS, PARAMS, SOFTMAX, N, X, apply_fn, record

BATCHES = minibatches(N, 4, 2)


def write_recording(folder):
    return record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["sgd"], BATCHES, Recorder(folder, 2, save_bytes=1))


def write_checkpoint(folder):
    return gradient_flow(*problem("squared"), t1=1.0, checkpoint=Checkpoint(folder, every_seconds=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("run"), OPTIMIZERS["sgd"], batches=BATCHES)[1]


@pytest.fixture(params=["recording", "checkpoint", "sweeps"])
def write(request, run):
    def sweep(folder):
        return RealizedPath(run, None, 1, folder).forward(np.ones((1, 3 * N)))

    return {"recording": write_recording, "checkpoint": write_checkpoint, "sweeps": sweep}[request.param]


def contents(folder):
    """Names, bytes and times of everything."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.mark.parametrize("theirs", ["0", "100/results.csv", "00000004.save", "gramian.lock/x", ".DS_Store", "aside/x"])
def test_a_folder_of_somebody_else_is_left_alone(write, theirs, tmp_path):
    """Numbered folders, as Orbax writes them, files named like ours, hidden ones."""
    if "/" in theirs:
        (tmp_path / theirs).parent.mkdir()
    (tmp_path / theirs).write_text("1,2,3")
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"folder of its own|cannot be written"):
        write(tmp_path)
    assert contents(tmp_path) == before


def test_kinds_do_not_share_a_folder(write, tmp_path):
    for other in (write_recording, write_checkpoint):
        folder = tmp_path / other.__name__
        other(folder)
        before = contents(folder)
        if write is not other:
            with pytest.raises(ValueError, match=r"holds a (recording|flow checkpoint), not a .* folder of its own"):
                write(folder)
            assert contents(folder) == before


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (json.dumps({"kind": "recording", "format": 99}), "of format 99, and this version of gramian knows format 1"),
        ("{", "is damaged, and nothing was touched.*write .*recording.* into that file"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ("\0" * 40, "is damaged"),
        ("", "is damaged"),
    ],
)
def test_marks_of_other_versions_and_damaged_ones(mark, message, tmp_path):
    write_recording(tmp_path)
    plain = (tmp_path / "gramian.json").read_text()
    (tmp_path / "gramian.json").write_text(mark)
    before = contents(tmp_path)
    for use in (write_recording, lambda folder: Recording(folder, apply_fn, OPTIMIZERS["sgd"], SOFTMAX, X, PARAMS)):
        with pytest.raises(ValueError, match=message):
            use(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "gramian.json").write_text(plain)
    assert write_recording(tmp_path)[1].num_steps == len(BATCHES)


def test_files_that_come_later_stay(write, tmp_path):
    """Notes in a folder of ours, partial files of other names, folders with a number."""
    write(tmp_path)
    theirs = ["notes.txt", "9.save", "x.save.partial", "12/data.csv", "aside/mine"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    write(tmp_path)
    assert [(tmp_path / name).read_text() for name in theirs] == ["mine"] * len(theirs)


@pytest.mark.parametrize("make", [Recorder, Checkpoint])
def test_paths(make, tmp_path, monkeypatch):
    for nothing in ("", "  "):
        with pytest.raises(ValueError, match="names no folder"):
            make(nothing)
    with pytest.raises(TypeError, match="directory=None is a NoneType"):
        make(None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make("~/run").directory == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    made = make("run")
    monkeypatch.chdir("/")
    assert made.directory == tmp_path / "run"
    assert make(os.fsencode(tmp_path)).directory == tmp_path
    assert list(tmp_path.iterdir()) == []  # nothing is made before something is written


def test_a_path_that_is_no_folder(write, tmp_path):
    file, broken, inside = tmp_path / "file", tmp_path / "broken", tmp_path / "file" / "run"
    file.write_text("x")
    broken.symlink_to(tmp_path / "nowhere")
    for path in (file, broken):
        with pytest.raises(ValueError, match="is a file or a broken link"):
            write(path)
    with pytest.raises(OSError, match=r"cannot be written to .*Not a directory"):
        write(inside)
    assert file.read_text() == "x"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_to_a_folder(write, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write(tmp_path / "link")
    assert (tmp_path / "there" / "gramian.json").exists()
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_cannot_be_written_to(write, tmp_path, monkeypatch):
    plain = os.open

    def refuse(path, *args, **keywords):
        if str(path).endswith("gramian.lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return plain(path, *args, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"cannot be written to .*\(Read-only file system\)") as raised:
        write(tmp_path)
    assert raised.value.errno == errno.EROFS
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_was_killed_is_taken_up(tmp_path):
    (tmp_path / "gramian.lock").write_text("1 here")
    (tmp_path / "gramian.json.partial").write_text('{"ki')
    assert write_recording(tmp_path)[1].num_steps == len(BATCHES)


def test_saves_without_a_mark_say_how_to_mark_them(tmp_path):
    write_recording(tmp_path)
    (tmp_path / "gramian.json").unlink()
    with pytest.raises(ValueError, match=r"If they are a recording, write (.*) into that file") as refused:
        write_recording(tmp_path)
    (tmp_path / "gramian.json").write_text(re.search("write (.*) into", str(refused.value))[1])
    assert write_recording(tmp_path)[1].num_steps == len(BATCHES)


def test_removing_takes_what_is_ours(tmp_path):
    Checkpoint(tmp_path / "absent").remove()
    write_checkpoint(tmp_path / "flow")
    Checkpoint(tmp_path / "flow").remove()
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "flow")
    (tmp_path / "flow" / "notes").write_text("mine")
    Checkpoint(tmp_path / "flow").remove()
    assert [path.name for path in (tmp_path / "flow").iterdir()] == ["notes"]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"did not write \(notes\)"):
        Checkpoint(tmp_path / "flow").remove()
    assert contents(tmp_path) == before
    write_recording(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a recording, not a flow checkpoint"):
        Checkpoint(tmp_path / "run").remove()
    assert write_recording(tmp_path / "run")[1].num_steps == len(BATCHES)


# --------------------------------------------------------------------------------------------------------------- locks


def test_a_second_writer_is_refused_and_named(write, tmp_path):
    write(tmp_path)
    kind = json.loads((tmp_path / "gramian.json").read_text())["kind"]
    with Folder(tmp_path, kind), pytest.raises(RuntimeError, match=rf"this very process \({os.getpid()}\)\. Wait"):
        write(tmp_path)
    write(tmp_path)


def test_a_writer_in_another_process(tmp_path):
    code = f"""
from gramian._storage.folder import Folder
import sys
folder = Folder({str(tmp_path)!r}, "recording")
folder.claim()
print("claimed", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(RuntimeError, match=rf"is being written by process {other.pid} on "):
        write_recording(tmp_path)
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert write_recording(tmp_path)[1].num_steps == len(BATCHES)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_does_not_hold_on(tmp_path):
    folder = Folder(tmp_path, "recording")
    folder.claim()
    fork = multiprocessing.get_context("fork")
    runs, stop = fork.Event(), fork.Event()
    child = fork.Process(target=lambda: (runs.set(), stop.wait()), daemon=True)
    child.start()
    assert runs.wait(30)
    with pytest.raises(RuntimeError, match="is being written"):
        Folder(tmp_path, "recording").claim()
    folder.release()
    with Folder(tmp_path, "recording"):
        stop.set()
    child.join()


def test_a_recorder_that_is_forgotten_lets_go(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.start(PARAMS, ())
    with pytest.raises(RuntimeError, match="this very process"):
        Recorder(tmp_path).start(PARAMS, ())
    del recorder
    Recorder(tmp_path).start(PARAMS, ())


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_recording(tmp_path)
    assert "cannot be locked (No locks available): see to it that nothing else writes" in capsys.readouterr().out


def test_recordings_in_threads(tmp_path):
    """Six at once, each in its own folder, and six in one: one of them records, the others are refused at once."""

    def record_there(folder, found):
        try:
            found.append(write_recording(folder)[0])
        except RuntimeError as refused:
            found.append(refused)

    write_recording(tmp_path / "whole")
    expected, _ = write_recording(tmp_path / "whole")
    for shared in (False, True):
        found: list = []
        folders = [tmp_path / f"{shared}{0 if shared else k}" for k in range(6)]
        threads = [threading.Thread(target=record_there, args=(folder, found)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(found) == 6
        trained = [one for one in found if not isinstance(one, RuntimeError)]
        assert trained if shared else len(trained) == 6
        for params in trained:
            for name in expected:
                np.testing.assert_array_equal(params[name], expected[name])


# ------------------------------------------------------------------------------------------------------------- readers


def read(folder):
    return Recording(folder, apply_fn, OPTIMIZERS["sgd"], SOFTMAX, X, PARAMS)


def test_reading_changes_nothing(tmp_path):
    write_recording(tmp_path)
    (tmp_path / "00000008.save.partial").write_bytes(b"half a save that somebody is writing")
    before = contents(tmp_path)
    run = read(tmp_path)
    list(run.segments())
    list(run.segments(backwards=True, at_most=1))
    RealizedPath(run).forward(np.ones((1, 3 * N)))
    assert contents(tmp_path) == before


def test_reading_a_typo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'typo'}, and so no recording"):
        read("typo")
    with pytest.raises(ValueError, match="names no folder"):
        read("")
    with pytest.raises(ValueError, match="holds no recording"):
        read(tmp_path)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match=r"did not write \(mine\)"):
        read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_notebook_watches_a_run_of_its_own_process(tmp_path):
    """Opened over and over while a thread records; each look is of whole saves, and of as many steps as it says."""
    batches, failed = minibatches(N, 4, 100), []

    def train():
        try:
            recorder = Recorder(tmp_path, every=2, save_bytes=1)
            record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["sgd"], batches, recorder)
        except BaseException as error:
            failed.append(error)

    training = threading.Thread(target=train)
    training.start()
    looks, nothing_yet = [], "no recorded step yet|there is no folder|holds no recording"
    while training.is_alive():
        try:
            run = read(tmp_path)
        except (FileNotFoundError, ValueError) as nothing:
            if not re.search(nothing_yet, str(nothing)):
                raise
            continue
        looks.append(run)
        steps = np.concatenate([segment.batches for segment in run.segments()])
        np.testing.assert_array_equal(steps, batches[: run.num_steps])
    assert not failed
    assert len({run.num_steps for run in looks}) > 2
    assert read(tmp_path).num_steps == len(batches)
    assert sum(len(segment.batches) for segment in looks[0].segments()) == looks[0].num_steps < len(batches)


# -------------------------------------------------------------------------------------------------- what proves nothing


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE, errno.ENOMEM])
def test_a_disk_that_fails_to_read_stops_the_run_and_costs_nothing(code, write, tmp_path, monkeypatch):
    write(tmp_path)
    plain, before = Path.read_bytes, contents(tmp_path)

    def fail(path):
        if path.suffix == ".save" and tmp_path in path.parents:
            raise OSError(code, os.strerror(code), str(path))
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match=r"\.save") as raised:
            write(tmp_path)
    assert raised.value.errno == code
    after = contents(tmp_path)
    assert {name: after[name][1] for name in after if name != "gramian.lock"} == {
        name: before[name][1] for name in before if name != "gramian.lock"
    }
    write(tmp_path)


def test_a_full_disk(write, tmp_path, monkeypatch):
    """It is said, nothing half written is left, and the same call goes on once there is space."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    write(tmp_path)


def test_a_save_appears_whole(write, tmp_path, monkeypatch):
    """While it is being written nothing stands under its name but what stood there before."""
    plain, looks = np.save, []

    def look(*args, **keywords):
        looks.append([read_arrays(path) for path in tmp_path.rglob("*.save")])
        plain(*args, **keywords)

    monkeypatch.setattr(np, "save", look)
    write(tmp_path)
    assert looks


def test_saves_of_another_run_are_not_moved(tmp_path):
    """One of them is damaged: this run must not take the others for its own to put aside."""
    record_training(apply_fn, PARAMS, X, SOFTMAX, OPTIMIZERS["sgd"], BATCHES, Recorder(tmp_path, 2, save_bytes=1))
    first = tmp_path / "00000002.save"
    first.write_bytes(first.read_bytes()[:-1])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="what differs: optimizer"):
        record(tmp_path, optax.sgd(0.5), batches=BATCHES)
    assert contents(tmp_path).keys() == before.keys()
