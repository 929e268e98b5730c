"""The audit on problems whose answer is known."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transforms import HardMask, SnrMask, _audit, gate_audit, poprisk_adamw

DIMENSION = 100
OPTIMIZERS = {"plain": optax.adam(1e-3), "gated": poprisk_adamw(1e-3, weight_decay=0.0)}


def squared(w, batch):
    x, y = batch
    return (x @ w - y) ** 2


def sparse(num_signal, noise, n=400, seed=0):
    """Linear regression with `num_signal` of 100 weights at one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIMENSION)).astype(np.float32)
    truth = (np.arange(DIMENSION) < num_signal).astype(np.float32)
    return x, (x @ truth + noise * rng.normal(size=n)).astype(np.float32)


def test_a_gate_helps_where_few_coordinates_matter():
    audit = gate_audit(squared, jnp.zeros(DIMENSION), sparse(2, noise=1.0), batch_size=20)
    assert audit.gain_interval[0] > 0.05
    assert "can help" in audit.verdict
    assert audit.gated_slope > audit.plain_slope > 0


def test_a_gate_has_nothing_to_say_about_pure_noise():
    audit = gate_audit(squared, jnp.zeros(DIMENSION), sparse(0, noise=3.0), batch_size=20)
    assert "can help" not in audit.verdict


def test_a_neutral_gate_gains_nothing_and_a_mischievous_one_does_harm():
    data = sparse(100, noise=1.0)
    neutral = gate_audit(
        squared,
        jnp.zeros(DIMENSION),
        data,
        batch_size=20,
        gated=poprisk_adamw(1e-3, mask=SnrMask(lam=0.0)),
        plain=optax.adam(1e-3),
    )
    np.testing.assert_allclose([neutral.gain, *neutral.gain_interval], 0, atol=1e-5)

    class Upside:
        def openness(self, signal, noise, tau):
            return 1 - HardMask().openness(signal, noise, tau)

    harm = gate_audit(squared, jnp.zeros(DIMENSION), data, batch_size=20, gated=poprisk_adamw(1e-3, mask=Upside()))
    assert harm.gain_interval[1] < 0
    assert "would harm" in harm.verdict


def test_slopes_and_signal_to_noise_against_their_definitions():
    x, y = sparse(3, noise=1.0)
    w = jnp.zeros(DIMENSION)
    unseen = sparse(3, noise=1.0, seed=1)
    audit = gate_audit(
        squared, w, (x, y), batch_size=20, unseen=unseen, plain=optax.sgd(1.0), num_batches=2, num_splits=2
    )
    truth = -2 * unseen[0].T @ unseen[1] / len(unseen[1])
    assert 0 < audit.plain_slope <= np.linalg.norm(truth)
    per_example = -2 * x * y[:, None]
    variance = per_example.var(0).sum()
    expected = ((per_example.mean(0) ** 2).sum() - variance / 400) / (variance / 20)
    long = gate_audit(squared, w, (x, y), batch_size=20, num_batches=100, num_splits=6)
    np.testing.assert_allclose(long.signal_to_noise, expected, rtol=0.2)


def test_equal_seeds_give_equal_audits_and_others_do_not():
    def audit(seed):
        return gate_audit(squared, jnp.zeros(DIMENSION), sparse(2, noise=1.0), batch_size=20, num_splits=2, seed=seed)

    assert audit(0).gain == audit(0).gain != audit(1).gain


def test_what_an_audit_shows():
    audit = gate_audit(squared, {"w": jnp.zeros(DIMENSION)}["w"], sparse(2, noise=1.0), batch_size=20, num_splits=2)
    for shown in ("gain on unseen examples", "95 % interval", "signal-to-noise", "open on noise", audit.verdict[:40]):
        assert shown in repr(audit)
        assert shown in audit._repr_html_()


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"batch_size": 101}, ValueError, r"400 examples, too few for batches of 101.*<= 100"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer >= 1, got 2.5"),
        ({"num_splits": 1}, ValueError, "num_splits must be an integer >= 2, got 1"),
        ({"num_batches": 1}, ValueError, "num_batches must be an integer >= 2, got 1"),
        ({"gated": "adam"}, TypeError, "gated must be an optax.GradientTransformation"),
        ({"gated": optax.adam(0.1)}, ValueError, "No gate in this state"),
        (
            {"data": (np.zeros((4, 2)), np.zeros(5))},
            ValueError,
            r"data must be arrays with one row an example.*\[4, 5\]",
        ),
        ({"unseen": (np.zeros((0, 2)), np.zeros(0))}, ValueError, "unseen must be arrays with one row an example"),
    ],
)
def test_bad_input(changed, error, match):
    arguments = {"loss_fn": squared, "params": jnp.zeros(DIMENSION), "data": sparse(2, noise=1.0), "batch_size": 20}
    with pytest.raises(error, match=match):
        gate_audit(**arguments | {"num_splits": 2, "num_batches": 2} | changed)


def test_losses_may_come_as_their_mean():
    def mean(w, batch):
        return jnp.mean(squared(w, batch))

    data = sparse(2, noise=1.0)
    options = {"batch_size": 20, "num_splits": 2, "num_batches": 5}
    each, together = (gate_audit(loss, jnp.zeros(DIMENSION), data, **options) for loss in (squared, mean))
    np.testing.assert_allclose(each.gain, together.gain, rtol=1e-3)


def test_the_verdict_says_when_the_plain_slope_itself_is_not_seen():
    audit = gate_audit(squared, jnp.zeros(DIMENSION), sparse(0, noise=3.0), batch_size=20, num_splits=4)
    assert audit.plain_interval[0] < 0 < audit.plain_interval[1]
    for said in ("plain step itself is not seen", "95 % interval", "more examples", "num_batches", "num_splits"):
        assert said in audit.verdict
    seen = gate_audit(squared, jnp.zeros(DIMENSION), sparse(2, noise=1.0), batch_size=20, num_splits=4)
    low, high = seen.plain_interval
    assert 0 < low < seen.plain_slope < high
    assert "itself" not in seen.verdict


def test_copies_of_the_parameters_held_at_the_peak():
    """As the docstring says: eleven, of what the compiled programs take, give and hold in between."""
    size = 400_000
    params = jnp.full((400, size // 400), 0.01, jnp.float32)
    batch, states = jnp.ones((8, 400), jnp.float32), {name: tx.init(params) for name, tx in OPTIMIZERS.items()}

    def losses(params, batch):
        return (jnp.tanh(batch @ params).mean(1) - 1) ** 2

    watch, propose, add_gradient = _audit._programs(losses, OPTIMIZERS)
    inputs = (params, states, _audit._no_spread(params), batch)
    held = []
    for program, arguments in ((watch, inputs), (propose, inputs), (add_gradient, (params, params, batch, 0.5))):
        memory = program.lower(*arguments).compile().memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        held.append((memory.argument_size_in_bytes + new + memory.temp_size_in_bytes) / (4 * size))
    assert max(held) == held[1]
    np.testing.assert_allclose(held, [8, 11, 3], atol=0.3)
    assert "eleven copies of params" in gate_audit.__doc__
