"""The report of a gate against what the gate did, and the warnings a user should get."""

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transforms import (
    Alpha,
    GateAudit,
    HardMask,
    OpenShare,
    PerTensor,
    SnrMask,
    SoftMask,
    Summary,
    TStatistic,
    batch_statistic,
    gate_report,
    poprisk_adamw,
    poprisk_gate,
)

EXACT = Summary(sample=None, every=1, of_step=True)
PARAMS = {"noise": np.zeros((40, 50), np.float32), "signal": np.zeros(300, np.float32)}


def batch(key, size=16):
    """Per-example gradients of pure noise, and of a signal of 1 with noise of 1."""
    first, second = jax.random.split(key)
    return {
        "noise": jax.random.normal(first, (size, 40, 50)),
        "signal": 1 + jax.random.normal(second, (size, 300)),
    }


def moments_of(examples):
    mean = jax.tree.map(lambda g: g.mean(0), examples)
    spread = jax.tree.map(lambda g, m: ((g - m) ** 2).sum(0), examples, mean)
    return {"mean_grads": mean, "sum_sq_diff_grads": spread, "sample_size": len(examples["signal"])}


def run(tx, num_steps=40):
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for key in jax.random.split(jax.random.key(0), num_steps):
        moments = moments_of(batch(key))
        updates, state = update(moments["mean_grads"], state, PARAMS, **moments)
    return updates, state, moments


@pytest.mark.parametrize(
    ("mask", "threshold"),
    [
        (HardMask(), TStatistic(1.0)),
        (HardMask(), OpenShare(0.1)),
        (SnrMask(lam=2.0), TStatistic(1.5)),
        (SoftMask(lam=0.5), Alpha(0.5)),
    ],
)
def test_open_fractions_are_those_of_the_gate_and_of_pure_noise(mask, threshold):
    updates, state, _ = run(poprisk_gate(threshold=threshold, mask=mask, summary=EXACT))
    neutral, _, _ = run(poprisk_gate(mask=SnrMask(lam=0.0)))
    report = gate_report(state)
    for layer in report.layers:
        q = updates[layer.name] / neutral[layer.name]
        np.testing.assert_allclose(layer.open_fraction, (q >= 0.5).mean(), atol=1e-6)
        np.testing.assert_allclose(layer.openness, q.mean(), rtol=1e-5)
    noise, signal = report.layers
    assert abs(noise.open_fraction - noise.noise_open_fraction) < 0.03
    assert signal.open_fraction > 0.9 > 0.5 > signal.noise_open_fraction
    sizes = np.array([layer.size for layer in report.layers])
    fractions = np.array([layer.open_fraction for layer in report.layers])
    np.testing.assert_allclose(report.total.open_fraction, sizes @ fractions / sizes.sum(), rtol=1e-6)


def test_decreases_are_those_of_leaving_each_example_out():
    """Equation (9): (1/b) Σ_i ⟨g_i, M ḡ_{-i}⟩, every example held out of its own batch explicitly."""
    tx = poprisk_gate(optax.sgd(0.1), statistic=batch_statistic(), mask=HardMask(), summary=EXACT)
    examples = batch(jax.random.key(3), size=6)
    moments = moments_of(examples)
    updates, state = tx.update(moments["mean_grads"], tx.init(PARAMS), PARAMS, **moments)
    report = gate_report(state)
    for layer in report.layers:
        g = np.asarray(examples[layer.name], np.float64).reshape(6, -1)
        q = np.asarray(updates[layer.name] != 0).ravel()
        others = (g.sum(0) - g) / 5
        gain = (g * others).mean(0)
        np.testing.assert_allclose(layer.decrease, q @ gain, rtol=1e-4)
        np.testing.assert_allclose(layer.ungated_decrease, gain.sum(), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(layer.step_decrease, 0.1 * q @ gain, rtol=1e-4)
        np.testing.assert_allclose(layer.ungated_step_decrease, 0.1 * gain.sum(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(layer.step_norm, np.linalg.norm(updates[layer.name]), rtol=1e-5)
        assert layer.decrease > layer.ungated_decrease  # the hard gate at z = 1 keeps the positive terms alone


def test_a_sample_stands_for_the_leaf():
    _, state, _ = run(poprisk_gate(summary=EXACT))
    _, sampled, _ = run(poprisk_gate(summary=Summary(sample=500, every=1)))
    exact, close = gate_report(state), gate_report(sampled)
    assert [layer.size for layer in close.layers] == [2000, 300]
    np.testing.assert_allclose(close.total.openness, exact.total.openness, atol=0.03)
    np.testing.assert_allclose(close.layers[1].decrease, exact.layers[1].decrease, rtol=1e-5)  # a small leaf is whole
    assert close.layers[0].decrease != exact.layers[0].decrease
    assert np.isnan(close.total.step_norm)


def test_summaries_are_kept_every_so_often():
    tx = poprisk_gate(summary=Summary(every=4))
    state, opens = tx.init(PARAMS), []
    for key in jax.random.split(jax.random.key(0), 9):
        moments = moments_of(batch(key))
        _, state = tx.update(moments["mean_grads"], state)
        opens.append(gate_report(state).total.openness)
    changed = [t for t in range(1, 9) if opens[t] != opens[t - 1]]
    assert changed == [4, 8]


def test_blocks_of_a_reduction_on_noise():
    _, state, _ = run(poprisk_gate(mask=HardMask(), reduction=PerTensor(), summary=EXACT))
    noise, signal = gate_report(state).layers
    assert 0.4 < noise.noise_open_fraction < 0.6  # a sum of 2,000 squares against its mean
    assert signal.open_fraction == 1


def test_a_report_is_found_anywhere_in_a_state():
    gate = poprisk_gate(mask=HardMask())
    tx = optax.multi_transform({"a": optax.chain(gate, optax.adam(0.1)), "b": gate}, {"noise": "a", "signal": "b"})
    _, state, _ = run(optax.apply_if_finite(tx, 3))
    report = gate_report(state)
    assert sorted(layer.name for layer in report.layers) == ["noise", "signal"]
    text, html = repr(report), report._repr_html_()
    for shown in ("noise", "signal", "all", "step 40", "open on noise"):
        assert shown in text
        assert shown in html
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (poprisk_gate(threshold=TStatistic(0.05)), "can hardly do anything"),
        (poprisk_gate(threshold=Alpha(1 / 59_000), mask=HardMask()), "can hardly do anything"),
        (poprisk_gate(threshold=TStatistic(60.0), mask=HardMask()), "shuts nearly everything"),
        (poprisk_gate(floor=1.0), "next to nothing"),
        (poprisk_adamw(1e-3), None),
    ],
)
def test_warnings(tx, said):
    _, state, _ = run(tx)
    warnings = gate_report(state).warnings
    assert not warnings if said is None else any(said in warning for warning in warnings)


def test_what_cannot_be_reported():
    with pytest.raises(ValueError, match=r"No gate in this state, a tuple.*poprisk_gate"):
        gate_report(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="not taken a step yet"):
        gate_report(poprisk_gate().init(PARAMS))
    with pytest.raises(ValueError, match=r"summary=None.*Summary\(\)"):
        gate_report(run(poprisk_gate(summary=None), 2)[1])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), run(poprisk_gate(), 2)[1])
    with pytest.raises(ValueError, match=r"runs of shape \(2,\).*take one"):
        gate_report(stacked)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_reports_print_wherever_text_does(encoding, monkeypatch):
    params = {"größe": jnp.ones(3), "日": jnp.ones(2)}
    tx = poprisk_gate()
    report = gate_report(tx.update(params, tx.init(params))[1])
    audit = GateAudit(0.1, (0.0, 0.2), 1.0, (0.5, 1.5), 1.1, 0.3, report, 8, "A verdict.")
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding))
    print(report, audit, flush=True)
    shown = file.getvalue().decode(encoding)
    assert "Audit of a gate" in shown
    assert ("größe" in shown) == (encoding != "ascii")
    assert ("gr??e" in shown) == (encoding == "ascii")
    for character in ("\N{BOX DRAWINGS LIGHT VERTICAL}", "日"):
        assert (character in shown) == (encoding == "utf-8")


def test_names_of_leaves_are_kept_whatever_they_are():
    params = {"": jnp.ones(2), "größe/β": {"0": [jnp.ones(1)]}, "w" * 300: jnp.ones(3)}
    tx = poprisk_gate()
    state = jax.jit(tx.update)(params, jax.jit(tx.init)(params))[1]
    assert [layer.name for layer in gate_report(state).layers] == ["parameters", "größe/β.0.0", "w" * 300]
    alone = poprisk_gate()
    assert gate_report(alone.update(jnp.ones(2), alone.init(jnp.ones(2)))[1]).layers[0].name == "parameters"
