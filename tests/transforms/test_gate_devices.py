"""Eight devices: sharded parameters keep their sharding, and moments joined across devices are those of all examples.

The file runs itself in a process of its own, where the CPU is eight devices: `python test_gate_devices.py`.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from entk import gradient_moments
from transforms import (
    HardMask,
    OpenShare,
    PerRow,
    PerTensor,
    adam_moments_statistic,
    adam_statistic,
    batch_statistic,
    ema_statistic,
    join_moments,
    poprisk_adamw,
    poprisk_gate,
)

OPTIMIZERS = {
    "gate": lambda: optax.chain(poprisk_gate(), optax.adam(0.1)),
    "bfloat16 statistic": lambda: poprisk_gate(optax.sgd(0.1), statistic=ema_statistic(state_dtype=jnp.bfloat16)),
    "adamw": lambda: poprisk_adamw(0.1),
    "adamw, bfloat16": lambda: poprisk_adamw(0.1, statistic=adam_statistic(state_dtype=jnp.bfloat16)),
    "adam moments": lambda: poprisk_adamw(0.1, statistic=adam_moments_statistic(), threshold=OpenShare(0.3)),
    "per row": lambda: poprisk_adamw(0.1, reduction=PerRow()),
    "per tensor": lambda: poprisk_adamw(0.1, reduction=PerTensor()),
}
NNX = ("gate", "adamw", "adamw, bfloat16", "per row")
SIZES = {"equal": [4] * 8, "unequal": [1, 2, 3, 4, 5, 6, 7, 8]}


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def problem(n, rng):
    params = {"w": rng.normal(size=(16, 24)), "v": rng.normal(size=24)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    return params, jnp.asarray(rng.normal(size=(n, 16)), jnp.float32), jnp.asarray(rng.normal(size=n), jnp.float32)


def example_gradients(params, x, y):
    return jax.vmap(jax.grad(lambda p, x, y: loss(p, x[None], y[None])), (None, 0, 0))(params, x, y)


def own_moments(gradients, weight):
    """Moments of the examples of weight 1; the others are padding."""
    size = weight.sum()
    shaped = jax.tree.map(lambda g: weight.reshape(-1, *[1] * (g.ndim - 1)), gradients)
    mean = jax.tree.map(lambda g, w: (w * g).sum(0) / size, gradients, shaped)
    spread = jax.tree.map(lambda g, m, w: (w * (g - m) ** 2).sum(0), gradients, mean, shaped)
    return mean, spread, size


def sharding_kept(name, mesh, rng):
    """Names of parameter-sized arrays that lost their parameter's sharding, and the distance from one device."""
    tx = OPTIMIZERS[name]()
    params, x, y = problem(32, rng)
    alone, alone_state = params, tx.init(params)
    spec = {"w": NamedSharding(mesh, P("i")), "v": NamedSharding(mesh, P("i"))}
    params = jax.tree.map(jax.device_put, params, spec)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state, updates

    state = jax.tree.map(lambda s, p=params: s, tx.init(params))
    for _ in range(3):
        params, state, updates = step(params, state, x, y)
        alone, alone_state, _ = step(alone, alone_state, x, y)
    lost = []
    for path, leaf in jax.tree.leaves_with_path((params, state, updates)):
        if leaf.shape in ((16, 24), (24,)) and not leaf.sharding.is_equivalent_to(spec["w"], leaf.ndim):
            lost.append(f"{jax.tree_util.keystr(path)}: {leaf.sharding}")
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True)
    return {"lost": lost, "distance": max(float(abs(jnp.asarray(a) - b).max()) for a, b in pairs)}


def nnx_optimizer(name, axis_type):
    """An `nnx.Optimizer` made under a mesh: its kernels, whether they keep the sharding, whether they are finite."""
    initializers = nnx.initializers
    mesh = jax.make_mesh((8,), ("i",), axis_types=(axis_type,))

    def train(tx):
        @nnx.jit
        def create():
            kernel = nnx.with_partitioning(initializers.lecun_normal(), (None, "i"))
            bias = nnx.with_partitioning(initializers.zeros_init(), ("i",))
            model = nnx.Linear(96, 64, kernel_init=kernel, bias_init=bias, rngs=nnx.Rngs(0))
            return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            gradient = nnx.grad(lambda model: jnp.mean((model(jnp.ones((8, 96))) - 1) ** 2))(model)
            optimizer.update(model, gradient)

        with jax.set_mesh(mesh):
            model, optimizer = create()
            for _ in range(2):
                step(model, optimizer)
        return model, optimizer

    model, optimizer = train(OPTIMIZERS[name]())
    kernels = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.shape == (96, 64)]
    kept = all(leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "i")), 2) for leaf in kernels)
    return len(kernels), kept, bool(jnp.isfinite(model.kernel[...]).all())


def data_parallel(sizes, mesh, rng):
    """Distance of three data-parallel steps from those of one device that sees every example."""
    tx = poprisk_adamw(0.1, statistic=batch_statistic(), mask=HardMask(), summary=None)
    most, n = max(sizes), sum(sizes)
    params, x, y = problem(n, rng)
    ends = np.cumsum(sizes)

    def padded(rows):
        parts = np.split(np.asarray(rows), ends[:-1])
        return jnp.concatenate([np.concatenate([p, np.ones((most - len(p), *p.shape[1:]))]) for p in parts])

    weight = jnp.concatenate([(np.arange(most) < size) for size in sizes]).astype(jnp.float32)
    x_padded, y_padded = padded(x).astype(jnp.float32), padded(y).astype(jnp.float32)

    def on_one(params, state, x, y, weight):
        own = jax.lax.pcast(params, "i", to="varying")
        joined = join_moments(*own_moments(example_gradients(own, x, y), weight), axis_name="i")
        updates, state = tx.update(joined["mean_grads"], state, params, **joined)
        return optax.apply_updates(params, updates), state, joined

    step = jax.jit(jax.shard_map(on_one, mesh=mesh, in_specs=(P(), P(), P("i"), P("i"), P("i")), out_specs=P()))
    many, state = params, tx.init(params)
    alone, alone_state = params, tx.init(params)
    errors = []
    for _ in range(3):
        gradients = jax.tree.map(lambda g: np.asarray(g, np.float64), example_gradients(alone, x, y))
        expected = {
            "mean_grads": jax.tree.map(lambda g: g.mean(0), gradients),
            "sum_sq_diff_grads": jax.tree.map(lambda g: ((g - g.mean(0)) ** 2).sum(0), gradients),
            "sample_size": n,
        }
        many, state, joined = step(many, state, x_padded, y_padded, weight)
        exact = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), expected)
        updates, alone_state = jax.jit(tx.update)(exact["mean_grads"], alone_state, alone, **exact)
        alone = optax.apply_updates(alone, updates)
        for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(expected), strict=True):
            errors.append(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()))
    pairs = zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True)
    distance = max(float(abs(a - b).max()) for a, b in pairs)
    return {"moments": max(errors), "distance": distance, "devices": len(jax.tree.leaves(many)[0].sharding.device_set)}


def already_summed(mesh, rng):
    """What a user is told whose gradients are with respect to replicated parameters."""
    params, x, y = problem(32, rng)

    def on_one(params, x, y):
        return join_moments(*own_moments(example_gradients(params, x, y), jnp.ones(4)), axis_name="i")

    try:
        jax.shard_map(on_one, mesh=mesh, in_specs=(P(), P("i"), P("i")), out_specs=P())(params, x, y)
    except ValueError as error:
        return str(error)
    return "no error"


def with_entk(mesh, rng):
    """Distance of joined `entk.gradient_moments` from those of the whole batch."""
    params, x, y = problem(32, rng)

    def losses(params, batch):
        return (jnp.tanh(batch[0] @ params["w"]) @ params["v"] - batch[1]) ** 2

    def on_one(params, x, y):
        return join_moments(*gradient_moments(losses, params, (x, y)), axis_name="i")

    specs = {"mesh": mesh, "in_specs": (P(), P("i"), P("i")), "out_specs": P(), "check_vma": False}
    joined = jax.shard_map(on_one, **specs)(params, x, y)
    whole = gradient_moments(losses, params, (x, y))._asdict()
    pairs = zip(jax.tree.leaves(joined), jax.tree.leaves(whole), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs)


def main():
    mesh = Mesh(np.array(jax.devices()), ("i",))
    rng = np.random.default_rng(0)
    found = {"count": len(jax.devices())}
    found |= {name: sharding_kept(name, mesh, rng) for name in OPTIMIZERS}
    found |= {name: data_parallel(sizes, mesh, rng) for name, sizes in SIZES.items()}
    found |= {
        f"nnx, {name}, {kind.name}": nnx_optimizer(name, kind)
        for name in NNX
        for kind in (AxisType.Auto, AxisType.Explicit)
    }
    found |= {"error": already_summed(mesh, rng), "entk": with_entk(mesh, rng)}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["count"] == 8
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_parameters_keep_their_sharding_in_state_and_updates(found, name):
    assert not found[name]["lost"]
    assert found[name]["distance"] < 1e-4


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", NNX)
def test_nnx_optimizer_under_a_mesh_keeps_the_parameters_sharding(found, name, kind):
    num_kernels, *others = found[f"nnx, {name}, {kind}"]
    assert num_kernels == {"gate": 4}.get(name, 3)
    assert others == [True, True]


@pytest.mark.parametrize("name", SIZES)
def test_data_parallel_training_is_that_of_one_device_with_all_examples(found, name):
    assert found[name]["devices"] == 8
    assert found[name]["moments"] < 1e-5
    assert found[name]["distance"] < 1e-4


def test_joined_moments_of_entk_are_those_of_the_whole_batch(found):
    assert found["entk"] < 1e-5


def test_gradients_that_are_already_summed_over_devices_are_refused(found):
    assert "each device's own, got the same along 'i' everywhere" in found["error"]
    assert "jax.lax.pcast(params, 'i', to='varying')" in found["error"]


@pytest.mark.parametrize("sizes", [[2, 2], [1, 7, 3], [1, 1, 1]])
def test_chan_s_formula_against_numpy(sizes):
    rng = np.random.default_rng(1)
    parts = [{"w": rng.normal(3, 1, (size, 4)), "b": rng.normal(-1, 2, (size,))} for size in sizes]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def stacked(of):
        return jax.tree.map(lambda *leaves: jnp.stack([of(leaf) for leaf in leaves]), *parts)

    with jax.enable_x64(True):
        means = stacked(lambda leaf: leaf.mean(0))
        spreads = stacked(lambda leaf: ((leaf - leaf.mean(0)) ** 2).sum(0))
        join = jax.vmap(lambda *own: join_moments(*own, axis_name="d"), axis_name="d")
        joined = jax.tree.map(np.asarray, join(means, spreads, jnp.array(sizes)))
    for d in range(len(sizes)):
        assert joined["sample_size"][d] == sum(sizes)
        for name, leaf in whole.items():
            np.testing.assert_allclose(joined["mean_grads"][name][d], leaf.mean(0), rtol=1e-13)
            expected = ((leaf - leaf.mean(0)) ** 2).sum(0)
            np.testing.assert_allclose(joined["sum_sq_diff_grads"][name][d], expected, rtol=1e-13)


def test_an_axis_that_is_not_bound_is_an_error():
    with pytest.raises(NameError, match="nowhere"):
        join_moments(jnp.ones(2), jnp.ones(2), 3, axis_name="nowhere")


if __name__ == "__main__":
    main()
