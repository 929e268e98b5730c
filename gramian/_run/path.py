"""The operators of a recorded run: sweeps of probes over it, forwards and backwards (theory §3, §4)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from entk.internal import check_apply, check_count, check_fits
from gramian._checks import check_finite, check_test_inputs
from gramian._run.linear_update import FrozenUpdate
from gramian._run.recording import Recording
from gramian._run.step import Data, Probes, Shared, Sums, no_sums, realized_step, rows, start_probes
from gramian._storage.folder import Folder, absolute
from gramian._storage.interrupts import answer, interruptible
from gramian._storage.saves import Damaged, Trail, read_tree, write_tree
from gramian._storage.trees import digest

PyTree = Any
STEPS_AT_ONCE = 16  # at most, whose probes and linearisations a backward sweep holds
FLOPS_AT_ONCE = 1e10  # and at least one step: no signal is answered within a call
KEEP_SECONDS = 2.0  # least time between two keeps of a sweep under way: what a kill costs, or one segment


class Course(NamedTuple):
    """A run step by step.

    Attributes:
      loss: training loss before every step, (steps,).
      dissipated: what each step takes from it along each probe, the forced part included: the loss drop itself, where
        the probe is the run's first output gradient, (steps, r).
    """

    loss: Any
    dissipated: Any


class Sweep(NamedTuple):
    """A forward sweep: probes at the end of the run, the sums on the way, and their course.

    `replay` is the largest relative distance between a recorded state and the one computed from the record before it.
    """

    probes: Probes
    shared: Shared
    sums: Sums
    course: Course
    replay: Any


@dataclass(frozen=True, eq=False)
class RealizedPath:
    """A recorded run as linear maps of its first output gradient.

    Args:
      recording: of the run.
      x_q: test inputs, m examples, or None.
      quadrature: Gauss points of the averages along a step; (I1)-(I4) hold to their error: about 1e-3, 1e-6, 1e-8 and
        1e-10 with 1 to 4 points in a run of usual steps.
      store: folder for sweeps, of its own; a killed analysis that is run again takes finished ones from there, and goes
        on in the midst of the one it was at.
      progress: draws a progress bar for every sweep.

    Raises:
      ValueError: an optimizer that is not linear in the gradients given its realized state; fewer than 1 point; from
        a sweep, a store that holds something else than sweeps.
      RuntimeError: from a sweep, a store that another one is writing to.
      OSError: from a sweep, a store that cannot be written to or read.
    """

    recording: Recording
    x_q: PyTree | None = None
    quadrature: int = 2
    store: str | Path | None = None
    progress: bool = False
    update: FrozenUpdate = field(init=False, repr=False)
    sizes: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self):
        run = self.recording
        if self.store is not None:
            object.__setattr__(self, "store", absolute(self.store))
        check_count("quadrature", self.quadrature)
        batch = jnp.asarray(next(run.segments()).batches[0])
        object.__setattr__(self, "update", FrozenUpdate(run.optimizer, run.params, run.extra_args, batch))
        spec = check_apply(run.apply_fn, run.params, run.x_s, "x_s")
        num_test = 0
        if self.x_q is not None:
            test = check_test_inputs(run.apply_fn, run.params, run.x_s, self.x_q)
            check_finite(self.x_q, "x_q")
            if test.num_outputs != spec.num_outputs:
                raise ValueError(
                    f"x_q has {test.num_outputs} outputs an example and x_s {spec.num_outputs}; they must agree: pass "
                    "test inputs of the kind of x_s."
                )
            num_test = test.num_examples * test.num_outputs
        object.__setattr__(self, "sizes", (spec.num_examples * spec.num_outputs, num_test))

    @property
    def dtype(self):
        return jax.tree.leaves(self.recording.params)[0].dtype

    @property
    def data(self) -> Data:
        return Data(self.recording.x_s, self.recording.loss, self.x_q)

    def start(self, psi: Float[Array, "r N"]) -> tuple[Shared, Probes]:
        """Probes ψ at the first step."""
        return start_probes(self.update, self.recording.start, psi, self.sizes[1])

    def forward(self, psi: Float[Array | np.ndarray, "r N"]) -> Sweep:
        """Carries r probes along the run."""
        psi = jnp.asarray(psi, self.dtype)
        sweep = self._stored(("forward", psi), self._begin(psi), lambda trail: self._forward(psi, trail))
        return sweep._replace(replay=float(sweep.replay))

    def _begin(self, psi) -> Sweep:
        shared, probes = self.start(psi)
        steps, r = self.recording.num_steps, len(psi)
        course = Course(np.zeros(steps, self.dtype), np.zeros((steps, r), self.dtype))
        return Sweep(probes, shared, no_sums(r, *self.sizes, self.dtype), course, np.zeros(()))

    def _forward(self, psi, trail: Trail, visit=None) -> Sweep:
        """`visit(segment, ones, probes)` sees every segment before it is swept."""
        done, sweep = trail.last("forward", (np.zeros((), int), self._begin(psi)))
        for segment in self._track("forwards", len(psi)):
            after = segment.step + len(segment.batches)
            if after <= done:
                continue
            if segment.step < done:
                raise Damaged(trail.path("forward"), "belongs to steps that were cut otherwise")
            if visit is not None:
                visit(segment, sweep.shared.ones, sweep.probes)
            shared = sweep.shared._replace(state=segment.start)
            shared, probes, more, course = _forward(
                *self._static, self.data, shared, sweep.probes, jnp.asarray(segment.batches)
            )
            self._check_finite(segment, course)
            for whole, part in zip(sweep.course, course, strict=True):
                whole[segment.step : after] = part
            replay = max(sweep.replay, np.asarray(_distance(shared.state.params, segment.end.params)))
            sweep = Sweep(probes, shared, jax.tree.map(jnp.add, sweep.sums, more), sweep.course, replay)
            answer(lambda: trail.keep("forward", (np.asarray(after), sweep), force=True))  # noqa: B023
            trail.keep("forward", (np.asarray(after), sweep))
        self._check_replay(sweep.replay)
        return sweep

    def backward(
        self,
        psi: Float[Array | np.ndarray, "r N"] | None = None,
        *,
        propagated: Array | None = None,
        moved: Array | None = None,
        moved_q: Array | None = None,
        of: str | None = None,
    ) -> Float[Array, "r N"]:
        """Adjoint sweep: Pᵀ `propagated` + Σ S_kᵀ `moved` + Σ (J̄_Q DW)ᵀ `moved_q`, or W ψ, V ψ with `of`.

        For W and V it is half the gradient of ψᵀWψ, taken back through the forward sweep, whose states at the starts of
        the segments are kept in files meanwhile: in `store`, where a killed sweep finds them, or a temporary folder.
        """
        given = next(x for x in (psi, propagated, moved, moved_q) if x is not None)
        r, (num_train, num_test) = len(given), self.sizes
        zero = jnp.zeros((r, num_train), self.dtype)
        psi = zero if psi is None else jnp.asarray(psi, self.dtype)
        cotangent = zero if propagated is None else jnp.asarray(propagated, self.dtype)
        sources = (
            zero if moved is None else jnp.asarray(moved, self.dtype),
            jnp.zeros((r, num_test), self.dtype) if moved_q is None else jnp.asarray(moved_q, self.dtype),
            jnp.asarray([of == "gramian", of == "motion"], self.dtype),
        )
        key = ("backward", psi, cotangent, sources)
        return self._stored(key, zero, lambda trail: self._backward(psi, cotangent, sources, of is not None, trail))

    def _backward(self, psi, cotangent, sources, quadratic: bool, trail: Trail):
        shared, nothing = self.start(jnp.zeros_like(psi))
        end = self.recording.num_steps
        left, back = trail.last("backward", (np.asarray(end + 1), Probes(cotangent, nothing.history)))
        with tempfile.TemporaryDirectory() as temporary:
            folder = trail.folder or Path(temporary)

            def place(segment):
                return folder / f"{segment.step}.save"

            def keep_state(segment, *state):
                write_tree(place(segment), state, f"{trail.name}/{segment.step}")

            if quadratic and left > end:
                self._forward(psi, trail, keep_state)
                trail.keep("backward", (np.asarray(end), back), force=True)
            passed = []
            for segment in self._track("backwards", len(psi)):
                if segment.step >= left:
                    continue
                if segment.step + len(segment.batches) > left:
                    raise Damaged(trail.path("backward"), "belongs to steps that were cut otherwise")
                # Where no quadratic form is differentiated the map is linear, and where it is taken does not matter.
                ones, probes = shared.ones, nothing
                if quadratic:
                    ones, probes = read_tree(place(segment), (ones, probes), f"{trail.name}/{segment.step}")
                    passed.append(place(segment))
                here = shared._replace(state=segment.start, ones=ones)
                back = _backward(*self._static, self.data, here, probes, jnp.asarray(segment.batches), back, sources)
                jax.block_until_ready(back)
                answer(lambda: trail.keep("backward", (np.asarray(segment.step), back), force=True))  # noqa: B023
                if trail.keep("backward", (np.asarray(segment.step), back)) or trail.folder is None:
                    while passed:
                        passed.pop().unlink()
        return back.psi / (2 if quadratic else 1)

    def _stored(self, key, template, compute):
        """The result of a sweep that was finished before, or a new one; one that was begun before goes on."""
        with interruptible(self._how_to_go_on):
            if self.store is None:
                return compute(Trail(None, "", KEEP_SECONDS))
            with Folder(self.store, "folder of sweeps") as folder:
                return self._from(folder, key, template, compute)

    def _from(self, folder: Folder, key, template, compute):
        run = self.recording
        name, *arrays = key
        last = next(run.segments(backwards=True))  # where the run ended tells it from others of the same start
        told = (arrays, self.data, run.start, last.end, np.asarray([self.quadrature, run.num_steps]))
        name = f"{name}-{digest(jax.device_get(told))[:32]}"
        path, trail = folder.path / f"{name}.save", Trail(folder, name, KEEP_SECONDS)
        result = None
        while result is None:
            try:
                result = jax.tree.map(jnp.asarray, read_tree(path, template, name)) if path.exists() else compute(trail)
            except Damaged as damaged:
                kept = folder.set_aside(path if path.exists() else folder.path / name)
                print(f"{damaged}. It is kept as {kept}, and the sweep is computed again.")
        if not path.exists():
            write_tree(path, result, name)
        trail.remove()
        return result

    def _how_to_go_on(self) -> str:
        if self.store is None:
            return "Interrupted in a sweep. Nothing was kept: with store=folder the same call goes on from there."
        return f"Interrupted in a sweep, which is kept in {self.store}; the same call goes on from there."

    def _track(self, direction, num_probes):
        """Segments for a call each. Shapes alone decide on their lengths: one that goes on is cut like one that ran."""
        a_step = 3 * self.quadrature * (num_probes + 1) * self._flops
        at_most = int(np.clip(FLOPS_AT_ONCE / a_step, 1, STEPS_AT_ONCE))
        segments = self.recording.segments(backwards=direction == "backwards", at_most=at_most)
        return _with_bar(segments, direction, self.recording.num_steps) if self.progress else segments

    @cached_property
    def _flops(self) -> float:
        """Of one evaluation of the model at all points."""
        run, points = self.recording, [x for x in (self.recording.x_s, self.x_q) if x is not None]
        costs = [jax.jit(run.apply_fn).lower(run.params, x).cost_analysis() for x in points]
        return sum(float((cost or {}).get("flops", 0.0)) for cost in costs) + 1.0

    @property
    def _static(self):
        return self.recording.apply_fn, self.update, self.quadrature

    def _check_finite(self, segment, course: Course) -> None:
        """Before anything decomposes a matrix of NaN."""
        rows = (np.asarray(part).reshape(len(segment.batches), -1) for part in course)
        for what, one in zip(("the training loss", "what a step dissipates along a probe"), rows, strict=True):
            if not (finite := np.isfinite(one).all(axis=1)).all():
                bad = segment.step + int(np.argmin(finite))
                raise FloatingPointError(
                    f"{what} is not finite at step {bad + 1} of {self.recording.num_steps} in "
                    f"{self.recording.directory}: the run, or its Jacobian, leaves the finite numbers there. Record it "
                    f"again with its first {bad} batches, or with a lower learning rate."
                )

    def _check_replay(self, distance: float) -> None:
        allowed = float(jnp.finfo(self.dtype).eps) ** 0.5
        if not distance <= allowed:
            raise ValueError(
                f"the recorded steps cannot be computed again: parameters differ by {distance:.2g} (relative) after a "
                f"few steps, where {allowed:.1g} is allowed. The loop did something that the recording does not know: "
                "another loss, learning rate or batch, augmentation, dropout."
            )


@dataclass(frozen=True, eq=False)
class RealizedOperator:
    """P, W, V, D or G of a recorded run as a matrix-free operator.

    Args:
      path: the run.
      name: "propagator", "gramian", "motion", "displacement" or "test_transfer".

    Cost: a product with P, D, G sweeps over the run once, forwards; with a transpose once, backwards; with W or V three
    times. A sweep takes, for every step, probe and Gauss point, one product with J on all points.
    """

    path: RealizedPath
    name: str

    def __post_init__(self):
        names = ("propagator", "gramian", "motion", "displacement", "test_transfer")
        if self.name not in names:
            raise ValueError(f"name={self.name!r} must be one of {', '.join(names)}.")

    @property
    def shape(self) -> tuple[int, int]:
        num_train, num_test = self.path.sizes
        return (num_test if self.name == "test_transfer" else num_train), num_train

    @property
    def dtype(self):
        return self.path.dtype

    def mv(self, vector: Float[Array, "N ..."]) -> Float[Array, "rows ..."]:
        """The product with v of shape (N,), or with a block (N, r)."""
        psi = self._checked(vector, self.shape[1])
        if self.name in ("gramian", "motion"):
            return _like(self.path.backward(psi, of=self.name), vector)
        sweep = self.path.forward(psi)
        found = {
            "propagator": sweep.probes.psi,
            "displacement": -sweep.sums.moved[:-1],
            "test_transfer": -sweep.sums.moved_q[:-1],
        }
        return _like(found[self.name], vector)

    def transpose_mv(self, vector: Float[Array, "rows ..."]) -> Float[Array, "N ..."]:
        """The product of the transpose."""
        rows = self._checked(vector, self.shape[0])
        if self.name in ("gramian", "motion"):
            return self.mv(vector)
        if self.name == "propagator":
            found = self.path.backward(propagated=rows)
        elif self.name == "displacement":
            found = self.path.backward(moved=-rows)
        else:
            found = self.path.backward(moved_q=-rows)
        return _like(found, vector)

    def as_matrix(self) -> Float[Array, "rows N"]:
        """All of it, by one forward sweep with N probes."""
        return dense_operators(self.path)[self.name]

    def _checked(self, vector, length):
        vector = jnp.asarray(vector, self.dtype)
        if vector.ndim not in (1, 2) or vector.shape[0] != length:
            raise ValueError(f"vector has shape {vector.shape}, but must be ({length},) or ({length}, r).")
        return vector.reshape(length, -1).T


def _like(rows, vector):
    return rows.T if jnp.ndim(vector) == 2 else rows[0]


def dense_operators(path: RealizedPath) -> dict[str, Array]:
    """P, W, V, D, G as matrices, by name."""
    num_train, _ = path.sizes
    num_params = sum(leaf.size for leaf in jax.tree.leaves(path.recording.params))
    bytes_of_probe = (1 + path.update.num_history) * num_params * path.dtype.itemsize
    check_fits(
        num_train * bytes_of_probe,
        f"carrying N = {num_train} probes through {num_params:,} parameters",
        "Use RealizedOperator, or analyze_training with dense=False.",
        count=num_train,
        bytes_of=lambda probes: probes * bytes_of_probe,
        unit="probes",
    )
    sweep = path.forward(jnp.eye(num_train, dtype=path.dtype))
    return {
        "propagator": sweep.probes.psi.T,
        "gramian": sweep.sums.gramian[:-1, :-1],
        "motion": sweep.sums.motion,
        "displacement": -sweep.sums.moved[:-1].T,
        "test_transfer": -sweep.sums.moved_q[:-1].T,
    }


def _with_bar(segments, direction, total):
    columns = (
        TextColumn(f"sweep {direction}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)
        for segment in segments:
            yield segment
            bar.advance(task, len(segment.batches))


@jax.jit
def _distance_of(params, other):
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))
    away = sum(jnp.sum((a - b) ** 2) for a, b in pairs)
    return jnp.sqrt(away / jnp.maximum(sum(jnp.sum(b**2) for _, b in pairs), jnp.finfo(pairs[0][1].dtype).tiny))


def _distance(params, other) -> float:
    return float(_distance_of(params, other))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(apply_fn, update, quadrature, data, shared, probes, batches):
    def body(carry, batch):
        shared, probes, sums = carry
        loss = data.loss.value(rows(apply_fn, shared.state.params, data.x_s))
        shared, probes, more = realized_step(apply_fn, update, quadrature, data, shared, probes, batch)
        energy, cross, forced = jnp.diagonal(more.gramian)[:-1], more.gramian[:-1, -1], more.gramian[-1, -1]
        return (shared, probes, jax.tree.map(jnp.add, sums, more)), Course(loss, energy + 2 * cross + forced)

    sums = no_sums(len(probes.psi), probes.psi.shape[1], len(shared.direction), probes.psi.dtype)
    carry, course = jax.lax.scan(body, (shared, probes, sums), batches)
    return *carry, course


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(apply_fn, update, quadrature, data, shared, probes, batches, back, sources):
    moved, moved_q, energies = sources

    def swept(probes):
        _, after, sums, _ = _forward(apply_fn, update, quadrature, data, shared, probes, batches)
        energy = energies[0] * jnp.trace(sums.gramian[:-1, :-1]) + energies[1] * jnp.trace(sums.motion)
        work = jnp.sum(moved * sums.moved[:-1]) + jnp.sum(moved_q * sums.moved_q[:-1])
        return after, energy + work

    _, pull = jax.vjp(swept, probes)
    return pull((back, jnp.ones((), probes.psi.dtype)))[0]
