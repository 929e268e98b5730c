"""The guard against jaxlib 0.10.2 and the numerics self-test, each shown to notice the fault it is there for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from entk import selftest
from entk._numerics_guard import FLAG, refuse_faulty_jaxlib

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("version", "xla_flags"),
    [
        ("0.10.1", ""),
        ("0.11.0", f"{FLAG}=reduce"),
        ("0.10.2", f"{FLAG}=-reduce"),
        ("0.10.2", f"--xla_dump_to=dump {FLAG}=reduce {FLAG}=-reduce"),
    ],
)
def test_guard_lets_right_numerics_pass(version, xla_flags):
    refuse_faulty_jaxlib(version, xla_flags)


@pytest.mark.parametrize("xla_flags", ["", "--xla_dump_to=dump", f"{FLAG}=reduce", f"{FLAG}=-reduce {FLAG}=reduce"])
def test_guard_refuses_the_fault_with_value_rule_and_remedies(xla_flags):
    with pytest.raises(ImportError) as refusal:
        refuse_faulty_jaxlib("0.10.2", xla_flags)
    for part in ("jaxlib 0.10.2", "wrong sums", "pip install", "export XLA_FLAGS", f"{FLAG}=-reduce", repr(xla_flags)):
        assert part in str(refusal.value)


def test_this_jax_computes_right(users_environment):
    """Compiled as users compile: the fault is one of optimised programs."""
    command = [sys.executable, "-m", "entk.selftest"]
    result = subprocess.run(command, capture_output=True, text=True, env=users_environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("passed") == len(selftest.CHECKS)


def test_row_sums_notice_a_wrong_last_row(monkeypatch):
    right = selftest._row_sums
    monkeypatch.setattr(selftest, "_row_sums", lambda rows: right(rows).at[-1].mul(0.992))
    assert not selftest.check_row_sums().passed


@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_jacobian_notices_one_wrong_float32_array(monkeypatch, factor):
    def wrong_in_float32(params, tokens):
        jacobian = right(params, tokens)
        if jacobian["embed"].dtype == np.float32:
            jacobian["position"] *= factor
        return jacobian

    right = selftest._jacobian
    monkeypatch.setattr(selftest, "_jacobian", wrong_in_float32)
    assert not selftest.check_jacobian(num_examples=2).passed


def test_failure_exits_1_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "CHECKS", (lambda: selftest.Result("sums", "1", "2", False),))
    assert selftest.main() == 1
    output = capsys.readouterr().out
    assert "FAILED" in output
    assert "pip install --upgrade jax" in output
