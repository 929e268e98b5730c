"""Each experiment runs from end to end on its smallest setting, writes what it promises, and refuses bad settings."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import _results
from experiments.__main__ import main as experiments
from experiments._digits import digits
from experiments.benchmarks.flow import METHODS, FlowBenchmark
from experiments.benchmarks.flow import main as benchmark_flow
from experiments.benchmarks.gate import BASE, GateBenchmark
from experiments.benchmarks.gate import main as benchmark_gate
from experiments.benchmarks.realized import RealizedBenchmark
from experiments.benchmarks.realized import main as benchmark_realized
from experiments.quickstart import PICTURES, Quickstart
from experiments.quickstart import main as quickstart
from experiments.realized import Realized
from experiments.realized import main as realized


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_quickstart_writes_numbers_and_figures(tmp_path, capsys, loss):
    quickstart(Quickstart(loss=loss, smoke=True, out=tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["identities"]}
    assert all(row["holds"] is not False for row in rows.values())
    assert ("must fail" in rows["(I7)"]["note"]) == (loss == "softmax")
    assert report["settings"]["label_noise"] == 0.1
    assert report["coupling"]["correlation"] > 0.999
    for name in (*(picture.__name__ for picture in PICTURES), "overview"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert str(tmp_path) in capsys.readouterr().out.replace("\n", "")


def test_quickstart_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    settings = Quickstart(smoke=True, out=tmp_path, t1=3.0)
    quickstart(settings)
    whole = json.loads((tmp_path / "report.json").read_text())
    assert not (tmp_path / "checkpoint").exists()

    def stop(*_):
        raise KeyboardInterrupt

    # Interrupted when the run is over and saved, but nothing is written yet.
    monkeypatch.setattr("gramian._report.flow.signal_channel", stop)
    with pytest.raises(KeyboardInterrupt):
        quickstart(settings)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another problem"):
        quickstart(Quickstart(smoke=True, out=tmp_path, t1=4.0))
    monkeypatch.setattr("gramian.Integrator.update", lambda *_: pytest.fail("computed twice"))
    quickstart(settings)
    monkeypatch.undo()
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["seconds"] is None
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}


def test_realized_reports_a_run_beside_gradient_flow(tmp_path, capsys):
    realized(Realized(smoke=True, models=("mlp",), optimizers=("adam",), out=tmp_path))
    folder = tmp_path / "mlp-adam"
    report = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in report["identities"] if row["holds"]] == ["(I1)", "(I2)", "(I3)", "(I4)", "(I6′)"]
    assert report["num_test_outputs"] == 300
    assert set(report["sides"]) == {"adam", "gradient flow"}
    assert 0 < report["flow"]["distance_of_test_displacements"] < 1
    assert report["formed"]["run"]["num_train_outputs"] == report["formed"]["flow"]["num_train_outputs"] == 60
    for name in ("report", "formed-run", "formed-flow", "sides"):
        assert (folder / f"{name}.png").stat().st_size > 5_000
    assert not (folder / "unfinished").exists()
    assert "gradient flow" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without --smoke"):
        realized(Realized(smoke=True, readme=True))


def test_realized_benchmark_measures_every_part_and_resumes(tmp_path):
    settings = RealizedBenchmark(smoke=True, repeats=1, out=tmp_path)
    benchmark_realized(settings)
    first = (tmp_path / "results.json").read_text()
    done = json.loads(first)
    assert done["recording"]["16"]["ratio"] > 0
    assert list(done["growth"]["steps"]) == ["4", "8"]
    assert done["scale"]["num_outputs"] == 200
    assert done["scale"]["residuals"][0] < done["scale"]["eigenvalues"][0]
    assert (tmp_path / "growth.png").stat().st_size > 5_000
    benchmark_realized(settings)
    assert (tmp_path / "results.json").read_text() == first


def test_gate_benchmark_measures_every_form(tmp_path, capsys):
    benchmark_gate(GateBenchmark(smoke=True, out=tmp_path))
    done = json.loads((tmp_path / "results.json").read_text())
    assert done["arrays"] == dict(zip(done["arrays"], [2, 3, 2.5, 2, 4, 3, 4], strict=True))
    assert list(done["optimizer"]) == ["300", "1000"]
    for record in (*done["optimizer"].values(), done["training"]):
        assert record["ratio"][BASE] == 1
        assert all(len(times) == 2 and min(times) > 0 for times in record["seconds"].values())
    assert any("moments of every example" in name for name in done["training"]["ratio"])
    assert "goal" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without --smoke"):
        benchmark_gate(GateBenchmark(smoke=True, readme=True))


def test_label_noise_corrupts_just_that_share():
    clean = digits(50, 10, odd_even=False, label_noise=0.0, seed=1)
    noisy = digits(50, 10, odd_even=False, label_noise=0.3, seed=1)
    np.testing.assert_array_equal(clean.x_s, noisy.x_s)
    np.testing.assert_array_equal(clean.noisy_s, clean.clean_s)
    assert (noisy.noisy_s != noisy.clean_s).sum() == 15
    assert set(noisy.noisy_s) <= set(range(10))


def test_training_and_test_points_are_different_digits():
    data = digits(800, 997, odd_even=True, label_noise=0.1, seed=0)
    train = {row.tobytes() for row in np.asarray(data.x_s)}
    assert sum(row.tobytes() in train for row in np.asarray(data.x_q)) == 0


@pytest.mark.parametrize(("sizes", "noise"), [((0, 10), 0.1), ((1000, 1000), 0.1), ((10, 10), 1.5), ((10, 10), -0.1)])
def test_impossible_splits_are_refused(sizes, noise):
    with pytest.raises(ValueError, match=r"must (be|lie)"):
        digits(*sizes, odd_even=True, label_noise=noise, seed=0)


def test_flow_benchmark_times_every_method_and_resumes(tmp_path, monkeypatch):
    settings = FlowBenchmark(smoke=True, out=tmp_path)
    benchmark_flow(settings)
    path = tmp_path / "benchmark.json"
    first = path.read_text()
    runs = json.loads(first)["runs"]
    assert len(runs) == 2 * len(METHODS)
    for name in ("exponential midpoint", "Tsit5"):
        assert all(run["error"] <= 1e-3 for key, run in runs.items() if key.startswith(name))
    assert (tmp_path / "benchmark.png").stat().st_size > 5_000
    benchmark_flow(settings)
    assert path.read_text() == first


def test_readme_table_is_made_of_the_rows_in_results(tmp_path, monkeypatch):
    monkeypatch.setattr(_results, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    _results.write_row("b", ("b", "s", "o", "c"))
    _results.write_row("a", ("a", "s", "o", "c"))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n| experiment |")
    assert text.index("| a |") < text.index("| b |")
    assert "old" not in text
    assert text.endswith("<!-- /results -->\nafter\n")
    with pytest.raises(ValueError, match="no place"):
        _results.write_readme("elsewhere", "")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nothing"], "nothing"), (["quickstart", "--loss", "hinge"], "hinge")]
)
def test_wrong_arguments_are_refused_by_name(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    with pytest.raises(SystemExit) as stopped:
        experiments()
    assert stopped.value.code not in (0, None)
    assert message in "".join(capsys.readouterr())


def test_a_misspelt_setting_stops_the_command():
    command = [sys.executable, "-m", "experiments", "quickstart", "--widht", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(_results.__file__).parent.parent)
    assert result.returncode != 0
    assert "widht" in result.stdout + result.stderr


def test_tables_are_printed_where_greek_letters_are_missing(monkeypatch):
    """To a log in ASCII, or a terminal with a Windows code page."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["experiments", "--help"])
    with pytest.raises(SystemExit):
        experiments()
    print("Φ(T)")
    stream.flush()
    assert stream.buffer.getvalue().endswith(b"?(T)\n")
