"""The gate's experiment: controls are what they say, nothing is measured twice, and the search is fair."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.__main__ import main as experiments
from experiments.gate import Gate, _audit, _detection, _grokking, _run, _sweep, _tasks, main
from experiments.gate._arms import ARMS, Arm, Hyper, Setting
from experiments.gate._controls import grokfast_ema, norm_of, openness, random_mask
from experiments.gate._regression import sparse
from experiments.gate._report import markdown
from experiments.gate._statistics import compare, compare_steps, interval
from transforms import HardMask, SnrMask, TStatistic, poprisk_adamw, poprisk_gate

HARD = {"threshold": TStatistic(1.0), "mask": HardMask()}


def test_smoke_run_by_the_command_line_and_again(tmp_path, monkeypatch, capsys):
    command = ["experiments", "gate", "--smoke", "--tasks", "sparse", "grokking", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    experiments()
    first = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sparse", "grokking")}
    arms = first["sparse"]["problems"]["sparse-redrawn"]["arms"]
    assert set(arms) == set(_tasks.SMOKE_ARMS)
    assert all(len(arms["hard-z1"]["early"][key]) == 2 for key in ("test", "validation", "open", "steps"))
    assert first["grokking"]["arms"]["adamw"]["reached"] == [False, False]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5_000 for name in first)
    assert "AdamW" in capsys.readouterr().out
    monkeypatch.setattr(_sweep, "run", lambda *_: pytest.fail("measured twice"))
    monkeypatch.setattr(_grokking, "steps_to_goal", lambda *_: pytest.fail("measured twice"))
    experiments()
    assert {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in first} == first
    text = markdown(list(first.values()))
    assert text.count("Division modulo 97") == text.count("Sparse regression") == 1


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings, measured = Gate(tasks=("sparse",), smoke=True, out=tmp_path), []

    def measure(problem, arm, tick):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arm.title)
        stop = {"learning_rate": 1.0, "weight_decay": 0.0, "at_border": [], "test": [1.0, 2.0]}
        return {"early": stop, "end": stop}

    monkeypatch.setattr(_tasks._sweep, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        main(settings)
    assert not (tmp_path / "sparse.json").exists()
    before, measured = measured, []
    main(settings)
    assert len(before) == 2
    assert len(measured) == 1
    assert not set(before) & set(measured)


def test_a_cell_of_other_settings_is_measured_anew(tmp_path):
    store = _run.Store(tmp_path)
    assert store.get("a", {"steps": (1, 2)}, lambda: {"value": 1}) == {"value": 1}
    assert store.get("a", {"steps": (1, 2)}, lambda: pytest.fail("measured twice")) == {"value": 1}
    assert store.get("a", {"steps": (1, 3)}, lambda: {"value": 2}) == {"value": 2}


def test_readme_shows_no_smoke_run():
    with pytest.raises(ValueError, match="without --smoke"):
        main(Gate(smoke=True, readme=True))


def gradients(count=6, size=40, scale=0.3):
    """Signal on the first half, noise on all."""
    signal = np.r_[np.ones(size // 2), np.zeros(size // 2)] * scale
    return jnp.asarray(signal + np.random.default_rng(0).standard_normal((count, size)))


def updates_of(optimizer, grads, **extra):
    params, update = jnp.ones_like(grads[0]), optax.with_extra_args_support(optimizer).update

    @jax.jit
    def run(grads):
        return jax.lax.scan(lambda state, g: update(g, state, params, **extra)[::-1], optimizer.init(params), grads)[1]

    return np.asarray(run(grads))


def test_arms_are_different_optimizers():
    extra = {"sum_sq_diff_grads": jnp.full(40, 30.0), "sample_size": 8}
    hyper = Hyper(jnp.asarray(1e-2), jnp.asarray(0.1), jnp.asarray(0, jnp.uint32))
    setting = Setting(10, data_noise=0.3)
    names = (
        "adamw",
        "adamw-linear",
        "paper",
        "popriskmin",
        "hard-z1",
        "snr-z1",
        "exact-hard-z1",
        "before-hard-z1",
        "around-hard-z1",
    )
    names += ("norm-hard-z2", "random-hard-z2")
    found = {name: updates_of(ARMS[name].build(hyper, setting), gradients(60, scale=1.0), **extra) for name in names}
    for k, one in enumerate(names):
        assert np.isfinite(found[one]).all()
        for other in names[:k]:
            assert not np.allclose(found[one], found[other], rtol=1e-4, atol=1e-9), (one, other)


def test_a_neutral_gate_trains_as_adamw_does():
    (problem,) = sparse(smoke=True)
    neutral = Arm(
        "neutral",
        lambda hyper, _: poprisk_adamw(hyper.learning_rate, weight_decay=hyper.weight_decay, mask=SnrMask(lam=0.0)),
        "step",
    )
    plain, gated = (_sweep.run(problem, arm, 1e-2, 0.1, 0) for arm in (ARMS["adamw"], neutral))
    np.testing.assert_allclose(gated["test"], plain["test"], rtol=1e-5)
    np.testing.assert_allclose(gated["open"], 1.0)


def test_the_norm_control_has_the_direction_of_one_and_the_norm_of_the_other():
    adam = optax.scale_by_adam()
    gated = poprisk_gate(adam, **HARD)
    control, plain, wanted = (updates_of(tx, gradients(30))[5:] for tx in (norm_of(adam, gated), adam, gated))
    np.testing.assert_allclose(np.linalg.norm(control, axis=1), np.linalg.norm(wanted, axis=1), rtol=1e-5)
    cosine = (control * plain).sum(1) / np.linalg.norm(control, axis=1) / np.linalg.norm(plain, axis=1)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    assert np.linalg.norm(control[-1]) < 0.99 * np.linalg.norm(plain[-1])


def test_the_random_control_opens_as_much_as_the_gate_but_anywhere():
    grads, adam = gradients(30, size=20_000), optax.scale_by_adam()
    control, plain = updates_of(random_mask(adam, 0, **HARD), grads), updates_of(adam, grads)
    q = updates_of(openness(**HARD), grads)
    open_ = control != 0
    np.testing.assert_allclose(control[open_], plain[open_])
    np.testing.assert_allclose(open_.mean(1), q.mean(1), atol=0.012)
    signal = np.arange(20_000) < 10_000
    assert abs(open_[-1][signal].mean() - open_[-1][~signal].mean()) < 0.02
    assert q[-1][signal].mean() > q[-1][~signal].mean() + 0.1
    assert (open_[-1] != open_[-2]).mean() > 0.1


def test_grokfast_adds_its_average():
    updates = updates_of(grokfast_ema(0.5, 2.0), jnp.array([[1.0], [3.0]]))
    np.testing.assert_allclose(updates[:, 0], [1 + 2 * 1, 3 + 2 * 2])


def test_early_stopping_looks_at_validation_alone(monkeypatch):
    (problem,) = sparse(smoke=True)
    plan = _sweep.Plan(20, (0.1, 0.2, 0.3), (0.0, 1.0), tune_seeds=(100,), seeds=(0, 1))
    problem = dataclasses.replace(problem, plan=plan)
    curves = {0.1: [5.0, 5.0], 0.2: [1.0, 9.0], 0.3: [4.0, 3.0]}

    def run(problem, arm, learning_rate, weight_decay, seed, tick):
        validation = np.array(curves[learning_rate]) + weight_decay
        return {"validation": validation, "test": 10 * validation[::-1] + seed}

    monkeypatch.setattr(_sweep, "run", run)
    result = _sweep.measure(problem, ARMS["adamw"])
    assert (result["early"]["learning_rate"], result["end"]["learning_rate"]) == (0.2, 0.3)
    assert result["early"]["at_border"] == []
    assert result["end"]["at_border"] == ["lr"]
    assert result["early"]["steps"] == [10, 10]
    assert result["early"]["test"] == [90.0, 91.0]
    assert result["end"]["test"] == [40.0, 41.0]


def test_a_search_for_grokking_stops_what_cannot_win(monkeypatch):
    settings = _grokking.Grokking(
        0.4, learning_rates=(1.0, 2.0, 3.0), weight_decays=(0.5,), search_cap=1000, tune_seeds=(7,)
    )
    needed, caps = {1.0: 5000, 2.0: 400, 3.0: 600}, []

    def steps_to_goal(settings, arm, hyper, seed, cap, tick):
        caps.append(cap)
        steps = min(needed[hyper[0]], cap)
        return steps, [0.96 if needed[hyper[0]] <= cap else 0.5]

    monkeypatch.setattr(_grokking, "steps_to_goal", steps_to_goal)
    result = _grokking.measure(settings, ARMS["adamw"])
    assert caps[:3] == [1000, 1000, 400]
    assert result["learning_rate"] == 2.0
    assert result["steps"] == [400] * len(settings.seeds)
    assert all(result["reached"])


def test_the_table_divides_modulo_97():
    settings = _grokking.Grokking(0.4)
    (x, y), (x_held_out, _) = _grokking.table(settings, 3)
    assert len(x) == settings.num_train == 3724
    np.testing.assert_array_equal(x[:, 0], y * x[:, 1] % 97)
    pairs = {tuple(pair) for pair in x.tolist()}
    assert not any(tuple(pair) in pairs for pair in x_held_out.tolist())


def test_prediction_of_a_step_has_the_right_mean():
    problem = dataclasses.replace(_audit.regression("linear", 0), num_steps=400, batch_size=128)
    found = _audit.summary(_audit.audit(problem, 0))
    for predictor in ("batch", "ema"):
        assert found[predictor]["predicted_sum"] == pytest.approx(found[predictor]["first_order_sum"], rel=0.25)
    assert found["ema"]["correlation"] > 0.9 > 0.6 > found["batch"]["correlation"]


def test_detection_opens_the_promised_share_of_noise():
    case = _detection.detect(smoke=True)["data"]["fresh"]["exact batch"]
    assert abs(case["noise_open"][case["level"].index(1.0)] - 0.32) < 0.12
    assert np.all(np.diff(case["recall"]) <= 0)


def test_differences_are_paired_by_seed():
    cells = {
        "adamw": {"early": {"test": [1.0, 2.0, 3.0]}, "steps": [100, 200, 400], "reached": [True] * 3},
        "x": {"early": {"test": [0.5, 1.5, 2.4]}, "steps": [50, 100, 200], "reached": [True, True, False]},
    }
    found = compare(cells, "early")
    assert found["adamw"]["verdict"] == "same"
    assert found["x"]["verdict"] == "better"
    assert found["x"]["difference"] == pytest.approx(-1.6 / 3)
    assert interval([1.0, 2.0, 3.0])[1] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    steps = compare_steps(cells)["x"]
    assert (steps["factor"], steps["reached"]) == (pytest.approx(0.5), 2)
