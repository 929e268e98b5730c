"""Kernels over several devices, computed and saved by a process of its own: test_sharded.py starts it and looks.

python sharded_worker.py one OUT                      eight devices of one process
python sharded_worker.py many OUT ADDRESS PROCESS     two devices of each of two processes
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from entk import FullJacobian, Structured, empirical_ntk, sharded_ntk
from entk._kernels.sharded import Place, _kernel

README = Path(__file__).parents[3] / "README.md"
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)


def mlp(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def cnn(params, x):
    hidden = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(hidden).mean((1, 2)) @ params["v"]


def rnn(params, x):
    def step(hidden, x_t):
        return jnp.tanh(hidden @ params["u"] + x_t @ params["w"]), None

    sequence = jnp.moveaxis(x["sequence"], 1, 0)
    hidden, _ = jax.lax.scan(step, jnp.zeros((sequence.shape[1], 5)), sequence)
    return x["scale"][:, None] * (hidden @ params["v"])


def sequences(n):
    return {"sequence": normal(n, 4, 3), "scale": normal(n)}


MODELS = {
    "mlp": (mlp, {"w": normal(4, 6), "b": normal(6), "v": normal(6, 3)}, normal(40, 4), normal(24, 4)),
    "cnn": (cnn, {"k": normal(3, 3, 2, 4), "v": normal(4, 3)}, normal(16, 5, 5, 2), normal(8, 5, 5, 2)),
    "rnn": (rnn, {"u": normal(5, 5), "w": normal(3, 5), "v": normal(5, 2)}, sequences(16), sequences(8)),
}
SMALL = Structured(workspace_bytes=12_000)  # two or three examples of the MLP at a time


def mesh_of(*shape, kind=AxisType.Auto):
    names = ("data", "more")[: len(shape)]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(shape))


def put(x, mesh, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(axes)))


def cases():
    """Name, model, symmetric or not, kernel; each is compared with the kernel of the model on one device."""
    line, grid = mesh_of(8), mesh_of(4, 2)
    for name in MODELS:
        apply_fn, params, x1, x2 = MODELS[name]
        on_line, on_grid = put(x1, line, "data"), put(x1, grid, "data", "more")
        yield f"{name}-ss", name, True, lambda f=apply_fn, w=params, x=on_line: empirical_ntk(f, w, x)
        columns = put(x2, grid, "data", "more")
        yield (
            f"{name}-qs-grid",
            name,
            False,
            lambda f=apply_fn, w=params, x=on_grid, y=columns: empirical_ntk(f, w, x, y),
        )
    apply_fn, params, x1, x2 = MODELS["mlp"]
    few = put(x1, line, "data")
    for devices in (2, 5):
        x = put(x1, mesh_of(devices), "data")
        yield f"{devices}-devices", "mlp", True, lambda x=x: empirical_ntk(apply_fn, params, x)
    for strategy, name in ((FullJacobian(), "full"), (FullJacobian(2), "microbatches"), (SMALL, "blocks")):
        x = put(x1, grid, "data", "more")
        yield f"{name}-ss", "mlp", True, lambda x=x, s=strategy: empirical_ntk(apply_fn, params, x, strategy=s)
    yield "full-qs", "mlp", False, lambda: empirical_ntk(apply_fn, params, few, x2, strategy=FullJacobian())
    yield "blocks-qs", "mlp", False, lambda: empirical_ntk(apply_fn, params, few, x2, strategy=SMALL)
    yield "one-axis-of-two", "mlp", True, lambda: empirical_ntk(apply_fn, params, put(x1, grid, "data"))
    explicit = put(x1, mesh_of(4, kind=AxisType.Explicit), "data")
    yield "explicit", "mlp", True, lambda: empirical_ntk(apply_fn, params, explicit)
    yield "explicit-jit", "mlp", True, lambda: jax.jit(lambda w, x: empirical_ntk(apply_fn, w, x))(params, explicit)
    yield (
        "jit",
        "mlp",
        True,
        lambda: jax.jit(lambda w, x: sharded_ntk(apply_fn, w, x, mesh=grid, axis=("data", "more")))(params, x1),
    )
    sharded = {**params, "v": put(params["v"], mesh_of(2), "data")}
    yield "sharded-params", "mlp", True, lambda: empirical_ntk(apply_fn, sharded, few)
    replicated = jax.device_put(x2, NamedSharding(line, P()))
    yield "replicated-x2", "mlp", False, lambda: empirical_ntk(apply_fn, params, few, replicated)
    yield "readme", "mlp", True, lambda: readme(0, apply_fn, params, x=x1)
    yield "odd-x2", "mlp", False, lambda: empirical_ntk(apply_fn, params, few, x2[:21])


def readme(block, apply_fn, params, **given):
    """What README's code, the first or second block about several devices, leaves as `k_ss`."""
    section = README.read_text().split("## Several devices\n")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[block]
    code = re.sub(r"jax\.distributed\.initialize\(\).*", "", code)  # done already, with this test's address
    names = {"jax": jax, "empirical_ntk": empirical_ntk, "NamedSharding": NamedSharding, "PartitionSpec": P}
    names |= {"apply_fn": apply_fn, "params": params, **given}
    exec(code, names)
    return names["k_ss"]


def shards(kernel):
    return [
        {"device": shard.device.id, "rows": shard.index[0].indices(kernel.shape[0])[:2], "shape": shard.data.shape}
        for shard in kernel.addressable_shards
    ]


def refusals():
    apply_fn, params, x1, x2 = MODELS["mlp"]
    line = mesh_of(8)
    wrong = {
        "columns-alone": lambda: empirical_ntk(apply_fn, params, x1, put(x2, line, "data")),
        "remainder": lambda: sharded_ntk(apply_fn, params, x1[:21], mesh=line, axis="data"),
        "axis": lambda: sharded_ntk(apply_fn, params, x1, mesh=line, axis="rows"),
        "memory": lambda: sharded_ntk(
            apply_fn, params, jax.ShapeDtypeStruct((2**22, 4), jnp.float64), mesh=line, axis="data"
        ),
    }
    for name, call in wrong.items():
        try:
            call()
        except (ValueError, MemoryError) as error:
            yield name, f"{type(error).__name__}: {error}"


def compiled():
    """The program of each kind of kernel, and bytes that a device holds in it."""
    apply_fn, params, x1, x2 = MODELS["mlp"]
    place = Place(mesh_of(8), ("data",))
    for name, strategy in (("structured", Structured()), ("full", FullJacobian())):
        for columns in (None, place.shard(x2)):
            arguments = place.replicate(params), place.shard(x1), columns
            program = _kernel.lower(strategy, apply_fn, place, True, *arguments).compile()
            yield f"{name}-{'ss' if columns is None else 'qs'}", program.as_text()


def on_one(out):
    jax.config.update("jax_num_cpu_devices", 8)
    single = {
        (name, symmetric): np.asarray(empirical_ntk(*MODELS[name][: 3 if symmetric else 4]))
        for name in MODELS
        for symmetric in (True, False)
    }
    facts, arrays = {"refusals": dict(refusals()), "programs": dict(compiled())}, {}
    for case, name, symmetric, call in cases():
        kernel = call()
        arrays[f"{case}:got"], arrays[f"{case}:expected"] = np.asarray(kernel), single[name, symmetric]
        facts[case] = shards(kernel)
    np.savez(out / "kernels.npz", **arrays)
    (out / "facts.json").write_text(json.dumps(facts))


def on_many(out, address, process):
    """Every process holds half of the examples; nothing but its rows of K is looked at."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(coordinator_address=address, num_processes=2, process_id=process)
    apply_fn, params, x1, x2 = MODELS["mlp"]
    mesh = jax.make_mesh((4,), ("data",))
    rows, columns = (
        jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), np.split(x, 2)[process])
        for x in (x1, x2)
    )
    found = {}
    for name, given, whole in (("ss", None, None), ("qs", columns, x2), ("odd", x2[:21], x2[:21])):
        expected = np.asarray(empirical_ntk(apply_fn, params, x1, whole))
        kernels = {
            type(strategy).__name__: empirical_ntk(apply_fn, params, rows, given, strategy=strategy)
            for strategy in (Structured(), FullJacobian())
        }
        if name == "ss":
            kernels["readme"] = readme(1, apply_fn, params, x_of_this_process=np.split(x1, 2)[process])
        for how, kernel in kernels.items():
            error = max(np.abs(shard.data - expected[shard.index]).max() for shard in kernel.addressable_shards)
            found[f"{name}-{how}"] = {"error": float(error), "shards": shards(kernel)}
    (out / f"process{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    kind, out, *rest = sys.argv[1:]
    if kind == "one":
        on_one(Path(out))
    else:
        on_many(Path(out), rest[0], int(rest[1]))
