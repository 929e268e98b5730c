"""Kernels over eight devices, and over two processes, equal those on one device; no device holds more than its rows."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).parent / "sharded_worker.py"
DEVICES = {"2-devices": 2, "5-devices": 5, "explicit": 4, "explicit-jit": 4}  # the others have eight
CASES = [
    *(f"{model}-{kind}" for model in ("mlp", "cnn", "rnn") for kind in ("ss", "qs-grid")),
    *("full-ss", "microbatches-ss", "blocks-ss", "full-qs", "blocks-qs", "one-axis-of-two", "jit"),
    *("sharded-params", "replicated-x2", "readme", *DEVICES),
]


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """Kernels and facts from one process with eight devices."""
    out = tmp_path_factory.mktemp("devices")
    run = subprocess.run([sys.executable, WORKER, "one", out], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return np.load(out / "kernels.npz"), json.loads((out / "facts.json").read_text())


def test_every_case_is_looked_at(devices):
    assert {key.split(":")[0] for key in devices[0]} == {*CASES, "odd-x2"}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_kernel_on_one_device_and_sharded_by_rows(devices, case):
    kernels, facts = devices
    got, expected = kernels[f"{case}:got"], kernels[f"{case}:expected"]
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()
    copies = 2 if case == "one-axis-of-two" else 1
    parts = DEVICES.get(case, 8) // copies
    rows = len(expected) // parts
    held = facts[case]
    assert len({shard["device"] for shard in held}) == parts * copies
    assert all(shard["shape"] == [rows, expected.shape[1]] for shard in held)
    assert sorted(shard["rows"][0] for shard in held) == sorted([*range(0, len(expected), rows)] * copies)


def test_columns_that_cannot_be_shared_equally_are_on_every_device(devices):
    kernels, facts = devices
    got, expected = kernels["odd-x2:got"], kernels["odd-x2:expected"][:, : 21 * 3]
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()
    assert all(shard["shape"] == [15, 63] for shard in facts["odd-x2"])


def test_the_two_triangles_are_copies_but_for_blocks_that_two_devices_compute(devices):
    """Odd numbers of devices have no such blocks."""
    kernel = devices[0]["5-devices:got"]
    blocks = kernel.reshape(5, 24, 5, 24).transpose(0, 2, 1, 3)
    for i, j in np.ndindex(5, 5):
        if i != j:
            np.testing.assert_array_equal(blocks[i, j], blocks[j, i].T)


@pytest.mark.parametrize("program", ["structured-ss", "structured-qs", "full-ss", "full-qs"])
def test_devices_pass_on_and_gather_nothing(devices, program):
    text = devices[1]["programs"][program]
    assert "collective-permute" in text
    for gathering in ("all-gather", "all-reduce", "all-to-all"):
        assert gathering not in text, gathering
    columns = 120 if program.endswith("ss") else 72
    sizes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f64\[([\d,]+)\]", text)}
    assert (15, columns) in sizes  # a device's rows
    assert max(map(np.prod, sizes)) < 120 * columns // 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("columns-alone", r"ValueError: .*x2 are sharded over \('data',\).*shard x1 likewise"),
        ("remainder", r"ValueError: x1 has 21 examples.* 8 devices.*e\.g\. 16"),
        ("axis", r"ValueError: axis='rows' .*\('data',\)"),
        ("memory", r"MemoryError: .*GiB.*(NtkBlocks|NtkOperator)"),
    ],
)
def test_refusals_say_what_to_do(devices, name, said):
    assert re.search(said, devices[1]["refusals"][name])


def test_two_processes_get_their_own_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = []
    try:
        for process in range(2):
            log = (tmp_path / f"log{process}").open("w")
            command = [sys.executable, WORKER, "many", tmp_path, address, str(process)]
            runs.append(subprocess.Popen(command, stdout=log, stderr=log))
        codes = [run.wait(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert codes == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    for process in range(2):
        found = json.loads((tmp_path / f"process{process}.json").read_text())
        assert len(found) == 7
        for name, one in found.items():
            assert one["error"] <= 1e-12, name
            first = 60 * process
            assert [shard["rows"] for shard in one["shards"]] == [[first, first + 30], [first + 30, first + 60]]
