"""The kernel benchmark measures in pairs, resumes, compares results, and says what stopped a contender."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import _ntk_measure, _ntk_report
from experiments.benchmarks._ntk_measure import Bench, fastest, measure, median_seconds, ratio
from experiments.benchmarks._ntk_models import arrays, num_outputs, num_params
from experiments.benchmarks._ntk_workers import (
    KERNELS,
    MATMUL,
    SCRIPTS,
    Contender,
    Stopped,
    Worker,
    all_cores,
    is_set_up,
)
from experiments.benchmarks.ntk import GROWTH, NETWORKS, TINY, NtkBenchmark, _point, main

ENTK, JACREV = KERNELS[:2]
TANGENTS = [contender for contender in KERNELS if contender.family == "neural-tangents"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A run without peers, and its settings."""
    out = tmp_path_factory.mktemp("benchmark")
    settings = NtkBenchmark(smoke=True, networks=("mlp",), peers=out / "none", out=out)
    main(settings)
    return settings, json.loads((out / "results.json").read_text())


def test_smoke_run_measures_and_compares(smoke):
    settings, done = smoke
    record = done["models"]["mlp"]
    assert set(record["alone"]) == {ENTK.name, JACREV.name}
    assert record["alone"][JACREV.name]["error"] < 1e-5
    assert len(record["rounds"]) >= settings.repeats
    assert all(set(run) == {ENTK.name, JACREV.name} for run in record["rounds"])
    assert all(run["peak_bytes"] > 0 and run["first_seconds"] > run["seconds"] for run in record["alone"].values())
    assert record["plan"]["operations"] > 0
    assert done["peak"]["one core"]["operations_per_second"] > 1e8
    moments = done["moments"]["mlp"]["alone"]
    assert moments["gradient_moments"]["error"] < 1e-5
    assert moments["vmap(grad)"]["error"] < 1e-5
    assert not done["largest"]["stopped"]
    assert done["largest"]["bytes"] <= 2**24
    assert [len(points) for points in done["growth"].values()] == [2]
    for name in ("kernels", "growth"):
        assert (settings.out / f"{name}.png").stat().st_size > 5_000


def test_a_second_run_measures_nothing(smoke, monkeypatch):
    settings, done = smoke
    monkeypatch.setattr(Worker, "__init__", lambda *_: pytest.fail("measured twice"))
    main(settings)
    assert json.loads((settings.out / "results.json").read_text()) == done


def test_measurements_of_other_settings_are_not_overwritten(smoke):
    settings, _ = smoke
    with pytest.raises(ValueError, match="--fresh"):
        main(NtkBenchmark(smoke=True, repeats=5, peers=settings.peers, out=settings.out))


def test_readme_shows_no_smoke_run():
    with pytest.raises(ValueError, match="without --smoke"):
        main(NtkBenchmark(smoke=True, readme=True))


def test_readme_table_has_every_network_and_family(smoke):
    _, done = smoke
    text = _ntk_report.markdown(done)
    assert "| network | entk | jacrev + matmul | neural-tangents | torch.func |" in text
    assert f"| {TINY['mlp'].title}, n = 6, c = 3, p = 659 |" in text
    assert "| geometric mean of the ratios | 1.00x |" in text
    assert "| network | batch gradient | gradient_moments | vmap(grad) |" in text
    assert "Share that entk reaches" in text
    assert "Largest kernel within" in text


@pytest.mark.parametrize(
    ("variant", "limits", "reason"),
    [
        ("matmul", {"seconds": 0.05}, r"over 0 s"),
        ("matmul", {"memory": 1e6}, r"over 0\.0 GiB"),
        ("nothing", {}, r"KeyError: 'nothing'"),
    ],
)
def test_a_worker_says_what_stopped_it(tmp_path, variant, limits, reason):
    def run():
        contender = Contender("x", variant, MATMUL.script)
        worker = Worker(contender, {"size": 6000}, tmp_path, all_cores()[:1], limits.get("memory", 2**34))
        worker.call(limits.get("seconds", 60.0))

    with pytest.raises(Stopped, match=reason):
        run()


class FakeWorker:
    """Answers at once, with the seconds and the result of its contender."""

    def __init__(self, name, seconds, result):
        self.name, self.seconds, self.result, self.facts, self.calls = name, seconds, result, {}, 0

    def call(self, limit, save=None):
        self.calls += 1
        if self.seconds > limit:
            raise Stopped(f"over {limit:.0f} s")
        if save:
            np.save(save, np.float32(self.result))
        return {"seconds": self.seconds, "peak_bytes": 1, "maxrss_bytes": 1}

    def close(self):
        pass


@pytest.fixture
def bench(tmp_path):
    """A bench of fakes: their `seconds` and `results` by contender, and a `log` of who was started."""

    class FakeBench(Bench):
        def start(self, contender, spec, cores=None):
            self.log.append(contender.name)
            return FakeWorker(
                contender.name, self.seconds.get(contender.name, 1.0), self.results.get(contender.name, [[1.0, 2.0]])
            )

    made = FakeBench(tmp_path, tmp_path, lambda: None, print, lambda _: None, "a", 100.0, 2**30, [0], 3, 0)
    made.seconds, made.results, made.log = {}, {}, []
    return made


def measured(bench, contenders=KERNELS, record=None):
    record = {} if record is None else record
    measure(bench, TINY["mlp"], contenders, record)
    return record


def test_rounds_hold_the_fastest_of_each_family_in_rotated_order(bench):
    bench.seconds = {ENTK.name: 15.0, TANGENTS[0].name: 20.0, TANGENTS[1].name: 10.0, JACREV.name: 30.0}
    record = measured(bench, [ENTK, JACREV, *TANGENTS[:2]])
    chosen = [ENTK.name, JACREV.name, TANGENTS[1].name]
    assert [list(run) for run in record["rounds"]] == [chosen[i:] + chosen[:i] for i in range(3)]
    assert bench.log == [ENTK.name, JACREV.name, TANGENTS[0].name, TANGENTS[1].name]  # the chosen stay alive
    assert ratio(record, JACREV.name, ENTK.name) == 2
    assert not bench.alive


def test_quick_calls_get_more_rounds(bench):
    assert len(measured(bench, [ENTK])["rounds"]) == _ntk_measure.MAX_ROUNDS


@pytest.mark.parametrize("result", [[[1.0, 2.01]], [[1.0, np.nan]], [[1.0]]])
def test_a_wrong_result_does_not_count(bench, result):
    bench.results = {TANGENTS[0].name: result}
    bench.seconds = {TANGENTS[0].name: 0.1}
    record = measured(bench, [ENTK, *TANGENTS[:2]])
    assert fastest(record, "neural-tangents", KERNELS) == TANGENTS[1]
    done = {"models": {"mlp": record}, "moments": {}, "growth": {}}
    (said,) = _ntk_report.wrong_results(done)
    assert TANGENTS[0].name in said


def test_what_takes_too_long_is_reported_and_the_rest_goes_on(bench):
    bench.seconds = {JACREV.name: 500.0}
    record = measured(bench, [ENTK, JACREV])
    assert record["alone"][JACREV.name] == {"stopped": "over 190 s"}
    assert median_seconds(record, ENTK.name) == 1.0
    assert "over 190 s" in _ntk_report._kernel_cell(record, JACREV.family)


def test_a_variant_far_behind_its_family_is_given_up(bench):
    bench.seconds = {TANGENTS[0].name: 10.0, TANGENTS[1].name: 220.0}
    record = measured(bench, [ENTK, *TANGENTS[:2]])
    assert record["alone"][TANGENTS[1].name] == {"stopped": "over 120 s"}
    bench.seconds[TANGENTS[1].name] = 29.0
    assert "seconds" in measured(bench, [ENTK, *TANGENTS[:2]])["alone"][TANGENTS[1].name]


def test_an_interrupted_run_goes_on_where_it_stopped(bench):
    kept = []

    def keep():
        kept.append(json.dumps(record))
        if len(kept) == 5:  # two contenders, the end of them, two rounds
            raise KeyboardInterrupt

    record, bench.keep, bench.seconds = {}, keep, {ENTK.name: 20.0}
    with pytest.raises(KeyboardInterrupt):
        measured(bench, [ENTK, JACREV], record)
    record, bench.keep = json.loads(kept[-1]), lambda: None
    before = json.loads(kept[-1])
    assert len(before["rounds"]) == 2
    measured(bench, [ENTK, JACREV], record)
    assert record["alone"] == before["alone"]
    assert record["rounds"][:2] == before["rounds"]
    assert len(record["rounds"]) == 3


def test_a_contender_set_up_later_is_compared_and_joins_new_rounds(bench):
    record = measured(bench, [ENTK, JACREV])
    measured(bench, [ENTK, JACREV, TANGENTS[0]], record)
    assert record["alone"][TANGENTS[0].name]["error"] == 0
    assert all(len(run) == 3 for run in record["rounds"])


def test_an_unfinished_case_of_other_sources_is_begun_anew(bench):
    record = measured(bench, [ENTK])
    bench.sources, finished = "b", json.dumps(record)
    assert json.dumps(measured(bench, [ENTK], record)) == finished
    del record["rounds"][1:]
    assert measured(bench, [ENTK], record)["sources"] == "b"


@pytest.mark.parametrize("networks", [TINY, NETWORKS])
def test_networks_have_the_shapes_they_announce(networks, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from jax_models import FAMILIES

    for network in networks.values():
        made = arrays(network, 0)
        assert sum(array.size for name, array in made.items() if name != "x") == num_params(network)
        out = jax.eval_shape(FAMILIES[network.family](**network.sizes), made, made["x"])
        assert out.shape == (network.n, num_outputs(network))
        again = arrays(network, 0)
        assert all(np.array_equal(again[name], array) for name, array in made.items())


def test_growth_names_what_grows():
    for what, (values, network) in GROWTH.items():
        first, last = network(values[0]), network(values[-1])
        measures = {
            "examples n": lambda net: net.n,
            "outputs c": num_outputs,
            "width": lambda net: net.sizes["widths"][1],
            "length T": lambda net: net.sizes["length"],
        }
        assert (measures[what](first), measures[what](last)) == (values[0], values[-1])


def test_growth_stops_for_who_would_take_too_long(bench):
    bench.seconds = {JACREV.name: 3.0}
    points = {}
    for value in (1, 2, 4):
        _point(TINY["mlp"], points, value, bench)
    assert set(points["1"]["alone"]) == {ENTK.name, JACREV.name}  # 3 s, four times which is over the limit
    assert set(points["2"]["alone"]) == set(points["4"]["alone"]) == {ENTK.name}


def test_numbers_keep_three_digits():
    assert [_ntk_report._number(v) for v in (0.00123, 0.5, 1.0, 12.34, 123.4, 1234.0)] == [
        "0.00123",
        "0.500",
        "1.00",
        "12.3",
        "123",
        "1,230",
    ]


def test_an_environment_of_older_pins_is_not_set_up(tmp_path):
    assert not is_set_up("torch", tmp_path)
    (tmp_path / "torch").mkdir()
    stamp = tmp_path / "torch" / "installed.txt"
    stamp.write_text("torch==1.0\n")
    assert not is_set_up("torch", tmp_path)
    stamp.write_text((SCRIPTS / "torch.txt").read_text())
    assert is_set_up("torch", tmp_path)
