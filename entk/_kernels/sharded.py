"""Kernels over several devices: every device computes its own rows, and the columns go round a ring (theory §4)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from entk._batching import map_examples
from entk._checks.apply import OutputSpec, check_apply_pair, pin_model
from entk._checks.memory import check_fits
from entk._kernels.strategy import Strategy
from entk._precision import free_promotion
from entk._structured.strategy import Structured, contract, matched, prepare_example
from entk._types import ApplyFn, PyTree


class Place(NamedTuple):
    """Where examples are: axes of a mesh over which their leading axis is sharded."""

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    @property
    def num_devices(self) -> int:
        """Parts that the examples are in; the mesh may have more devices, which hold copies."""
        size = 1
        for axis in self.axes:
            size *= self.mesh.shape[axis]
        return size

    def shard(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree, NamedSharding(self.mesh, P(self.axes)))

    def replicate(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree, NamedSharding(self.mesh, P()))


def place_of(x: PyTree) -> Place | None:
    """Where the examples of x are, if on several devices; None also where `jax.jit` hides it."""
    for leaf in jax.tree.leaves(x):
        sharding = _sharding(leaf)
        if isinstance(sharding, NamedSharding) and len(sharding.spec) and sharding.spec[0] is not None:
            axes = sharding.spec[0]
            place = Place(sharding.mesh, axes if isinstance(axes, tuple) else (axes,))
            if place.num_devices > 1:
                return place
    return None


def place_of_rows(x1: PyTree, x2: PyTree | None) -> Place | None:
    """Where the rows of K belong: where the examples of x1 are."""
    place = place_of(x1)
    if place is None and (columns := place_of(x2)):
        raise ValueError(
            f"the examples of x2 are sharded over {columns.axes} and those of x1 are not, but K is sharded by rows: "
            "shard x1 likewise, or exchange them: empirical_ntk(apply_fn, params, x2, x1).T."
        )
    return place


def _sharding(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return None
    sharding = getattr(leaf, "sharding", None)
    return jax.typeof(leaf).sharding if sharding is None else sharding  # traced: known on a mesh of explicit axes


def sharded_ntk(
    apply_fn: ApplyFn,
    params: PyTree,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str | tuple[str, ...],
    strategy: Strategy = Structured(),
) -> Float[Array, "n1c n2c"]:
    """Empirical NTK K = J₁ J₂ᵀ whose rows are sharded over the devices of a mesh, as `empirical_ntk` on one device.

    `empirical_ntk` calls this for examples that are sharded already; call it for examples that are not, and inside
    `jax.jit`, which hides how its arguments are sharded unless the axes of the mesh are explicit.

    Args:
      apply_fn, strategy: as for `empirical_ntk`. The strategy's memory is that of each device.
      params: replicated, whatever their sharding is: every device holds all of them.
      x1: inputs of the rows. n₁ must be a multiple of the number D of devices along `axis`.
      x2: inputs of the columns; None means x1, and then little more than one triangle is computed. Sharded like x1
        where n₂ is a multiple of D; otherwise every device holds, and differentiates, all of it.
      mesh: devices of this process, or of all processes, which then call this together.
      axis: name of the mesh axis over which examples are sharded, or a tuple of names.

    Returns:
      Array of shape (n₁·c, n₂·c), sharded by rows over `axis`; every device holds n₁c/D whole rows. Equal to the
      kernel on one device up to rounding: products run at the same stated precision on every device.

    Raises:
      TypeError, ValueError: as `empirical_ntk`; no such axis, or n₁ that is not a multiple of D.
      MemoryError: a device's rows of K would not fit.

    Not supported: models that mix examples; on a mesh of explicit axes, and on arrays of several processes, this is not
    looked for.

    Cost: every example is differentiated once, while its factors fit in the strategy's workspace. They are passed on
    from device to device while those that came before are contracted. For x2=None a device computes 1 + ⌊D/2⌋ of its D
    blocks and receives the others, one at a time. Other strategies than `Structured` differentiate every example up to
    2·D times: inputs are passed on instead. Neither K nor a Jacobian is ever on one device as a whole.

    Several processes: each one runs the same program and holds its part of the examples.

        jax.distributed.initialize()  # or with coordinator_address, num_processes and process_id
        mesh = jax.make_mesh((jax.device_count(),), ("examples",))
        by_examples = NamedSharding(mesh, PartitionSpec("examples"))
        x = jax.make_array_from_process_local_data(by_examples, x_of_this_process)
        k_ss = empirical_ntk(apply_fn, params, x)  # params: equal in every process
        rows = [shard.data for shard in k_ss.addressable_shards]  # those of this process

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from entk import sharded_ntk
      >>> mesh = jax.make_mesh((jax.device_count(),), ("examples",))
      >>> x = jnp.ones((2 * jax.device_count(), 3))
      >>> kernel = sharded_ntk(lambda w, x: x @ w, jnp.ones(3), x, mesh=mesh, axis="examples")
      >>> kernel.sharding.spec[0], kernel.addressable_shards[0].data[0, 0].item()
      ('examples', 3.0)
    """
    place = Place(mesh, _check_axes(mesh, axis))
    size = place.num_devices
    for_checks = tuple(map(_for_checks, (params, x1, x2)))
    apply_fn = pin_model(apply_fn, *for_checks)
    spec1, spec2 = check_apply_pair(apply_fn, *for_checks)
    n1, n2 = spec1.num_examples, spec2.num_examples
    if n1 % size:
        raise ValueError(
            f"x1 has {n1} examples, and {place.axes} has {size} devices: every device takes equally many rows. Drop or "
            f"add examples to reach a multiple of {size}, e.g. {max(1, n1 // size) * size}, or use fewer devices."
        )
    in_ring = n2 % size == 0
    _check_share(strategy, params, spec1, spec2, size, in_ring)
    params, x1 = place.replicate(params), place.shard(x1)
    if x2 is not None:
        x2 = place.shard(x2) if in_ring else place.replicate(x2)
    with free_promotion():
        return _kernel(strategy, apply_fn, place, in_ring, params, x1, x2)


def _check_axes(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...]) -> tuple[str, ...]:
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if not axes or any(one not in mesh.shape for one in axes):
        raise ValueError(f"axis={axis!r} must name axes of the mesh, which has {tuple(mesh.axis_names)}.")
    return axes


def _for_checks(tree: PyTree) -> PyTree:
    """Without explicit axes: apply_fn as a whole may not be defined on them, and each device applies it to its own."""

    def plain(leaf):
        sharding = _sharding(leaf)
        explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if explicit else leaf

    return jax.tree.map(plain, tree)


def _check_share(strategy: Any, params: PyTree, spec1: OutputSpec, spec2: OutputSpec, size: int, in_ring: bool) -> None:
    """Refuses what would not fit on a device: one block of the ring, or its rows of K."""
    share = spec1._replace(num_examples=spec1.num_examples // size)
    visiting = spec2._replace(num_examples=spec2.num_examples // size) if in_ring else spec2
    strategy.check(params, share, visiting, False)
    rows, columns = (spec.num_examples * spec.num_outputs for spec in (share, spec2))
    sharing = jax.local_device_count() if jax.default_backend() == "cpu" else 1  # devices that are all one memory
    check_fits(
        rows * columns * max(spec1.dtype.itemsize, 4) * sharing,
        f"a device's {rows} of the {spec1.num_examples * spec1.num_outputs} x {columns} kernel in {spec1.dtype}",
        "Use more devices, take K in blocks with NtkBlocks, or use NtkOperator, which never forms it.",
        count=share.num_examples,
        bytes_of=lambda n: n * spec1.num_outputs * columns * max(spec1.dtype.itemsize, 4) * sharing,
        unit="rows' examples of a device",
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _kernel(strategy, apply_fn, place, in_ring, params, x1, x2):
    def rows(params, x1, x2):
        if not in_ring:
            return strategy.kernel(apply_fn, params, x1, x2)
        ring = Ring(place.axes, place.num_devices, x2 is None)
        fill = _structured_rows if isinstance(strategy, Structured) else _rows
        kernel = fill(strategy, apply_fn, ring, params, x1, x2)
        return ring.mirror(kernel) if x2 is None else kernel

    by_rows, everywhere = P(place.axes), P()
    specs = everywhere, by_rows, by_rows if in_ring else everywhere
    # check_vma would ask of apply_fn that its scans start with carries marked as different on every device.
    return jax.shard_map(rows, mesh=place.mesh, in_specs=specs, out_specs=by_rows, check_vma=False)(params, x1, x2)


class Ring(NamedTuple):
    """The devices along some axes of a mesh, inside `jax.shard_map`.

    Attributes:
      axes, size: names of the axes, and number of devices.
      symmetric: each pair of devices needs its block only once, and `mirror` fills the other one.
    """

    axes: tuple[str, ...]
    size: int
    symmetric: bool

    def pass_on(self, tree: PyTree, by: int) -> PyTree:
        """To the device `by` places further on, from the one as many places back."""
        to = [(k, (k + by) % self.size) for k in range(self.size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axes, to), tree)

    def fill(self, kernel: Array, start: tuple[Any, Any], columns: PyTree, block) -> Array:
        """Writes `block(columns)` of this device, then of the next ones.

        Args:
          kernel: this device's rows.
          start: row and column of the block, the latter counted from each device's own first column.
          columns: what this device passes on of its columns.
          block: from a device's columns to values.
        """
        width = kernel.shape[1] // self.size
        here = lax.axis_index(self.axes)

        def step(distance, carry):
            kernel, visiting = carry
            # Passed on before the product that does not depend on it, so that the two can overlap.
            following = self.pass_on(visiting, -1)
            column = (here + distance) % self.size * width + start[1]
            return lax.dynamic_update_slice(kernel, block(visiting), _corner(start[0], column)), following

        steps = 1 + self.size // 2 if self.symmetric else self.size
        return lax.fori_loop(0, steps, step, (kernel, columns))[0]

    def mirror(self, kernel: Array) -> Array:
        """Gets the transposes of the blocks that `fill` left out from the devices that have computed them."""
        width = kernel.shape[1] // self.size
        here = lax.axis_index(self.axes)
        for distance in range(1, (self.size + 1) // 2):
            ahead, behind = ((here + by) % self.size * width for by in (distance, -distance))
            own = lax.dynamic_slice(kernel, _corner(0, ahead), (kernel.shape[0], width))
            kernel = lax.dynamic_update_slice(kernel, self.pass_on(own.T, distance), _corner(0, behind))
        return kernel


def _corner(row: Any, column: Any) -> tuple[Array, Array]:
    return jnp.asarray(row, jnp.int32), jnp.asarray(column, jnp.int32)


def _rows(strategy, apply_fn, ring: Ring, params, x1, x2) -> Array:
    """A device's rows by any strategy: examples go round, and are differentiated by every device."""

    def block(visiting):
        return strategy.kernel(apply_fn, params, x1, visiting)

    columns = x1 if x2 is None else x2
    one = jax.eval_shape(block, columns)
    kernel = jnp.zeros((one.shape[0], one.shape[1] * ring.size), one.dtype)
    return ring.fill(kernel, (0, 0), columns, block)


def _structured_rows(strategy: Structured, apply_fn, ring: Ring, params, x1, x2) -> Array:
    """A device's rows: what `prepare_example` keeps of examples goes round, in blocks that keep to the workspace.

    On eight devices of a CPU this takes 0.2 to 0.9 of the time that passing the inputs on takes, by which every device
    differentiates all columns, and its own rows again at each step.
    """
    models = matched(apply_fn, params, x1, x2)
    columns = x1 if x2 is None else x2
    n1, n2 = (jax.tree.leaves(x)[0].shape[0] for x in (x1, columns))  # on this device
    choices = strategy.choose(models[0], n1 * ring.size, n2 * ring.size)
    layout = strategy.layout(models[0], choices, n1, n2, False)
    c = models[0].num_outputs

    def prepare(model, x, start, size):
        some = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), x)
        return map_examples(lambda x_i: prepare_example(model, choices, x_i), some, layout.chunk)

    def fill_row(kernel, row):
        start1 = jnp.minimum(row * layout.rows, n1 - layout.rows)  # the last block overlaps the one before
        left = prepare(models[0], x1, start1, layout.rows)

        def fill(column, kernel):
            start2 = jnp.minimum(column * layout.columns, n2 - layout.columns)
            is_left = x2 is None and layout.rows == layout.columns == n1
            right = left if is_left else prepare(models[1], columns, start2, layout.columns)
            return ring.fill(
                kernel, (start1 * c, start2 * c), right, lambda some: contract(choices, left, some, strategy.precision)
            )

        return lax.fori_loop(0, -(-n2 // layout.columns), fill, kernel), None

    dtype = jnp.promote_types(models[0].dtype, jnp.float32)
    kernel = jnp.zeros((n1 * c, n2 * c * ring.size), dtype)
    return lax.scan(fill_row, kernel, jnp.arange(-(-n1 // layout.rows)))[0]
