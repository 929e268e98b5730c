"""What tells a run: programs by their jaxprs and constants, the same in every process; a refusal names what differs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gramian import Recorder, convex_loss, minibatches, record_training
from gramian._storage import fingerprint
from gramian._storage.fingerprint import differing, digests, program, text
from tests.gramian.training_problems import OPTIMIZERS, PARAMS, SQUARED, N, X, apply_fn

BATCHES = minibatches(N, 4, 4)
TABLE = np.arange(3000.0).reshape(1000, 3)


def update_of(tx):
    return program(tx.update, PARAMS, tx.init(PARAMS), PARAMS)


def programs():
    """Digests of programs with whatever jaxprs hold: shared parts, custom rules, loops, callbacks, keys, tables."""
    key = jax.random.key(3)

    @jax.custom_vjp
    def cut(x):
        return x

    cut.defvjp(lambda x: (x, None), lambda _, g: (g * 2,))
    functions = {
        "relu": lambda x: jax.nn.relu(x) + jax.nn.relu(2 * x),
        "gelu": jax.nn.gelu,
        "custom": lambda x: cut(x) + 1,
        "scan": lambda x: jax.lax.scan(lambda c, a: (c + a, jnp.where(a > 0, c, a)), x[0], x)[1],
        "while": lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c, jnp.abs(x)),
        "cond": lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
        "table": lambda x: jnp.asarray(TABLE)[x.astype(int)],
        "key": lambda x: x + jax.random.normal(key, x.shape),
        "callback": lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
        "gradient": jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 3)),
        "checkpointed": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
        "gather": lambda x: x[jnp.array([2, 0])] + jnp.sort(x)[:2],
    }
    found = {name: program(function, jnp.ones(3, jnp.float32)) for name, function in functions.items()}
    return found | {name: update_of(OPTIMIZERS[name]) for name in ("adamw", "poprisk_adamw", "schedule", "injected")}


def test_programs_are_the_same_in_every_process():
    """Another order of hashes, another place in memory, caches filled by the same programs before."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
import jax
jax.config.update("jax_enable_x64", True)
from tests.gramian.storage.test_fingerprint import programs
for _ in range(2):
    for name, told in programs().items():
        print(name, told, sep=";")
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    here = programs()
    assert len(set(here.values())) == len(here)
    lines = [f"{name};{told}" for name, told in here.items()]
    assert done.splitlines() == lines * 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (optax.sgd(0.1), optax.sgd(0.001)),
        (optax.sgd(0.1, 0.9), optax.sgd(0.1, 0.9, nesterov=True)),
        (optax.adam(0.1, b2=0.99), optax.adam(0.1, b2=0.999)),
        (optax.adam(optax.cosine_decay_schedule(0.1, 100)), optax.adam(optax.cosine_decay_schedule(0.1, 101))),
        (optax.adam(0.1), optax.adamw(0.1)),
        (optax.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0 + 1e-12)),
    ],
)
def test_optimizers_differ(one, other):
    assert update_of(one) != update_of(other)
    assert update_of(one) == update_of(one)


def test_constants_shapes_and_dtypes_differ():
    x = jnp.ones(3)
    changed = TABLE.copy()
    changed[500, 1] += 1e-9  # in the midst of what a text would leave out
    pairs = [
        (program(lambda x, t=t: x + jnp.asarray(t)[7:8, :3] * jnp.asarray(t).sum(), x) for t in (TABLE, changed)),
        (program(lambda x, s=s: x + s, x) for s in (0.1, np.nextafter(0.1, 1))),
        (program(lambda x: jnp.sin(x), y) for y in (x, x[:2])),
        (program(lambda x: jnp.sin(x), y) for y in (x, x.astype(jnp.float32))),
        (program(lambda x: x - 2 * x[::-1], x), program(lambda x: 2 * x - x[::-1], x)),
        (program(lambda x: (x, 2 * x), x), program(lambda x: (2 * x, x), x)),
        (program(lambda x, k=k: x + jax.random.normal(jax.random.key(k), (3,)), x) for k in (0, 1)),
    ]
    for one, other in pairs:
        assert one != other


def test_text_is_of_no_place_in_memory():
    assert text([object(), lambda: 0]) == text([object(), lambda: 0])


def test_programs_of_another_jax_are_not_compared(monkeypatch, capsys):
    here = digests({"apply_fn": program(jnp.sin, 1.0), "x_s": X})
    monkeypatch.setattr(fingerprint.jax, "__version__", "99.0")
    there = digests({"apply_fn": program(jnp.cos, 1.0), "x_s": X})
    assert differing(here, there) == []
    assert "apply_fn cannot be compared: the run began with jax" in capsys.readouterr().out
    assert differing(here, there | digests({"x_s": X + 1})) == ["x_s"]
    assert differing(here, {}) == ["apply_fn", "x_s"]


def shifted(params, x):
    return apply_fn(params, x) + 1e-9


def squares(output, target):
    return jnp.sum((output - target) ** 2)


def call(folder, what=""):
    """A recording, with one thing changed."""
    model = shifted if what == "apply_fn" else apply_fn
    params = {**PARAMS, "b": PARAMS["b"] + (1e-12 if what == "parameters" else 0)}
    x = X * (1 + 1e-12) if what == "x_s" else X
    loss = SQUARED
    if what == "targets":
        loss = type(loss)(loss.targets + 1e-12, loss.example_loss, loss.name, loss.isotropic)
    if what == "loss":
        loss = convex_loss(squares, loss.targets)
    tx = {"optimizer": optax.adam(0.0200001), "optimizer, optimizer state": optax.sgd(0.02)}.get(what, optax.adam(0.02))
    batches = BATCHES[::-1] if what == "batches" else BATCHES
    recorder = Recorder(folder, every=3, save_bytes=1)
    return record_training(model, params, x, loss, tx, batches, recorder)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    call(folder)
    return folder


@pytest.mark.parametrize(
    "what",
    ["apply_fn", "parameters", "x_s", "targets", "loss", "optimizer", "optimizer, optimizer state", "batches"],
)
def test_another_run_is_refused_by_name(what, folder):
    before = {path: path.read_bytes() for path in folder.glob("*.save")}
    with pytest.raises(ValueError, match=rf"holds another run; what differs: {what}\. Nothing was changed"):
        call(folder, what)
    assert {path: path.read_bytes() for path in folder.glob("*.save")} == before


def test_the_same_run_goes_on(folder):
    """Also where the same function was written anew, and after what was saved last has gone."""
    trained = call(folder)
    max(folder.glob("*.save")).unlink()
    again = call(folder)
    for name in trained:
        np.testing.assert_array_equal(trained[name], again[name])


def test_a_loop_of_ones_own_says_what_it_is(tmp_path):
    tx = optax.sgd(0.1)
    with Recorder(tmp_path, every=1) as recorder:
        recorder.start(PARAMS, tx.init(PARAMS), identity={"rate": "0.1", "data": X})
        recorder.update([0], PARAMS, tx.init(PARAMS))
    for identity, differ in (
        ({"rate": "0.2", "data": X}, "rate"),
        ({"rate": "0.1", "data": X[:3]}, "data"),
        ({"rate": "0.1"}, "data"),
        (None, "data, rate"),
    ):
        with pytest.raises(ValueError, match=f"what differs: {differ}\\."):
            Recorder(tmp_path, every=1).start(PARAMS, tx.init(PARAMS), identity=identity)
    with pytest.raises(ValueError, match="what differs: batches"):
        Recorder(tmp_path, every=1).start(
            PARAMS, tx.init(PARAMS), identity={"rate": "0.1", "data": X}, batches=np.array([[1]])
        )
    start = Recorder(tmp_path, every=1).start(PARAMS, tx.init(PARAMS), identity={"rate": "0.1", "data": X})
    assert start[2] == 1


def test_states_with_random_keys_come_back(tmp_path):
    """A key is not an array of numbers, and is kept all the same."""
    state = {"key": jax.random.key(5), "count": 3, "half": jnp.ones(2, jnp.bfloat16)}
    with Recorder(tmp_path, every=1) as recorder:
        recorder.start(PARAMS, state)
        recorder.update([0], PARAMS, {**state, "key": jax.random.key(6)})
    _, found, step = Recorder(tmp_path, every=1).start(PARAMS, state)
    assert step == 1
    np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(jax.random.key(6)))
    assert (found["count"], found["half"].dtype) == (3, jnp.bfloat16)
