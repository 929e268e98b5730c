"""Recording a training run: its states now and then, its batches always, so that every step can be computed again."""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array

from entk._checks import check_count
from gramian._frozen_update import ExtraArgs
from gramian._leaves import pack, unpack
from gramian._losses import OutputLoss
from gramian._pinning import pinned_run
from gramian._training_steps import TrainState, check_training, train

PyTree = Any


class Segment(NamedTuple):
    """Consecutive steps of a run: the state before the first, the batch of each, and the state after the last.

    Attributes:
      step: number of the first step.
      start, end: states before and after.
      batches: indices of the training examples, (steps, b).
    """

    step: int
    start: TrainState
    batches: np.ndarray
    end: TrainState


@dataclass
class Recorder:
    """Stores what a training loop does, to a folder, through Orbax, while it goes on.

    `start` before the loop, `update` after every step (or every few), `close` at the end. The state is kept every
    `every` steps, the batches of all steps; what lies between is computed again when it is wanted. A killed run goes on
    from the last save: the loop asks `start` where.

    Args:
      directory: the folder; made if it does not exist. It belongs to one run.
      every: steps from one kept state to the next.
      save_bytes: kept states are collected up to this size before they are written.
      every_seconds: and for this long at most; what a kill can cost.

    Raises:
      ValueError: sizes that are not positive.
      OSError: from `update` and `close`, when nothing can be written; the saves so far stay intact.

    Cost: a copy of the state every `every` steps; it is written in the background. Memory: 2·save_bytes and one state.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> from gramian import Recorder
      >>> tx, w = optax.sgd(0.1), jnp.ones(2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     recorder = Recorder(folder, every=2)
      ...     w, state, step = recorder.start(w, tx.init(w))
      ...     for k in range(step, 4):
      ...         updates, state = tx.update(w, state, w)
      ...         w = optax.apply_updates(w, updates)
      ...         recorder.update([k % 3], w, state)
      ...     recorder.close()
      ...     print(Recorder(folder, every=2).start(jnp.ones(2), tx.init(jnp.ones(2)))[2])
      4
    """

    directory: str | Path
    every: int = 64
    save_bytes: int = 2**26
    every_seconds: float = 20.0
    _manager: ocp.CheckpointManager | None = field(default=None, repr=False)
    _step: int = field(default=0, repr=False)
    _kept: list[tuple[int, TrainState]] = field(default_factory=list, repr=False)
    _batches: list[np.ndarray] = field(default_factory=list, repr=False)
    _last: float = field(default=0.0, repr=False)

    def __post_init__(self):
        self.every = check_count("every", self.every)
        self.save_bytes = check_count("save_bytes", self.save_bytes)

    def start(self, params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree, int]:
        """Where the loop begins: the given state at step 0, or the last one saved, and its step."""
        given = TrainState(params, opt_state)
        self._manager = _manager(self.directory)
        self._step, state = 0, given
        for saved in sorted(self._manager.all_steps()):
            chunk, reason = _read(self._manager, saved)
            if chunk is not None and chunk["steps"][0] != self._step:
                chunk, reason = None, f"it begins at step {chunk['steps'][0]}, not {self._step}"
            if chunk is None:
                print(f"save {saved} in {self.directory} cannot be used ({reason}); going on from step {self._step}")
                for later in [step for step in self._manager.all_steps() if step >= saved]:
                    self._manager.delete(later)
                break
            if self._step == 0 and not _same_start(chunk["states"][0], given):
                raise ValueError(
                    f"{self.directory} holds a run that began with other parameters. Remove the folder, or give this "
                    "run one of its own."
                )
            self._step, state = saved, unpack(given, chunk["states"][-1])
        self._kept, self._batches = [(self._step, _copy(state))], []
        self._last = time.monotonic()
        return state.params, state.opt_state, self._step

    def update(self, indices: Any, params: PyTree, opt_state: PyTree) -> None:
        """After a step on the examples `indices` (b,), or after several at once, (steps, b): the state they led to."""
        if self._manager is None:
            raise RuntimeError("call start(params, opt_state) before the loop: it says where the loop begins.")
        indices = np.atleast_2d(np.asarray(indices, np.int32))
        before = self._step
        self._step += len(indices)
        self._batches.extend(indices)
        if before // self.every == self._step // self.every:
            return
        if self._step % self.every:
            raise ValueError(f"{len(indices)} steps at once pass over step {before // self.every + 1} x every.")
        state = _copy(TrainState(params, opt_state))
        held = len(self._kept) * sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
        if held >= self.save_bytes or time.monotonic() - self._last >= self.every_seconds:
            self._save(state)
        else:
            self._kept.append((self._step, state))

    def close(self, params: PyTree = None, opt_state: PyTree = None) -> None:
        """Writes what is left; a run that ends between two kept states passes its last one."""
        assert self._manager is not None
        if self._batches:
            if self._kept[-1][0] == self._step:
                self._save(self._kept.pop()[1])
            elif params is not None:
                self._save(TrainState(params, opt_state))
            else:
                raise ValueError(
                    f"the run ends at step {self._step}, which no multiple of every={self.every} is: pass the last "
                    "state, close(params, opt_state)."
                )
        self._guard(self._manager.wait_until_finished)
        self._manager.close()
        self._manager = None

    def _save(self, end: TrainState) -> None:
        tree: dict[str, Any] = {
            "steps": np.asarray([step for step, _ in self._kept]),
            "states": np.stack([pack(state) for state in (*(one for _, one in self._kept), end)]),
            "batches": np.stack(self._batches),
        }
        tree["checksum"] = np.asarray(_checksum(tree))
        manager, step = self._manager, self._step
        assert manager is not None
        self._guard(lambda: manager.save(step, args=ocp.args.PyTreeSave(tree), force=True))
        self._kept, self._batches, self._last = [(step, end)], [], time.monotonic()

    def _guard(self, write) -> None:
        try:
            write()
        except Exception as error:  # Orbax raises whatever its storage raises
            assert self._manager is not None
            with contextlib.suppress(Exception):  # what was being written before may still arrive
                self._manager.wait_until_finished()
            saved = max(_manager(self.directory).all_steps(), default=0)
            raise OSError(
                f"recording to {self.directory} failed at step {self._step} ({type(error).__name__}: "
                f"{str(error)[:200]}). The run is intact up to step {saved}: free space there and start again."
            ) from error


@dataclass(frozen=True)
class Recording:
    """A recorded run and the problem it solved: everything needed to compute any of its steps again.

    Args:
      directory: the folder a `Recorder` wrote.
      apply_fn: pure function `(params, x) -> (n, c)` or `(n,)` that treats examples independently.
      optimizer: the optax transformation of the run.
      loss: mean over examples, with the targets of x_s; the run descended its mean over the batch.
      x_s: training inputs that the batches' indices count.
      params: parameters of the structure of the run's; `params` of the recording are the run's first ones.
      extra_args: what the run passed to the optimizer's `update` beside these, `(params, batch) -> dict` of the
        parameters before a step and the indices of its examples: exact moments of a gate, say. It is computed again
        with every step, and frozen as a coefficient of the gradient.

    Attributes:
      start: parameters and optimizer state before the first step, as recorded.

    Raises:
      TypeError, ValueError: as `gradient_flow`; an empty folder.
    """

    directory: str | Path
    apply_fn: Any
    optimizer: optax.GradientTransformation
    loss: OutputLoss
    x_s: PyTree
    params: PyTree = field(repr=False)
    extra_args: ExtraArgs | None = None
    start: TrainState = field(init=False, repr=False)

    def __post_init__(self):
        check_training(self.apply_fn, self.params, self.x_s, self.loss)
        if not self.num_steps:
            raise ValueError(f"{self.directory} holds no recorded step; record the run with record_training.")
        first = next(self.segments())
        object.__setattr__(self, "start", first.start)
        object.__setattr__(self, "params", first.start.params)
        static = self.apply_fn, self.params, self.x_s, self.loss, self.optimizer, self.extra_args, first.batches[0]
        for name, one in zip(("apply_fn", "loss", "optimizer", "extra_args"), pinned_run(*static), strict=True):
            object.__setattr__(self, name, one)

    @property
    def num_steps(self) -> int:
        """Steps recorded."""
        return max(_manager(self.directory).all_steps(), default=0)

    def segments(self, *, backwards: bool = False, at_most: int | None = None) -> Iterator[Segment]:
        """The run from kept state to kept state, or `at_most` so many steps at a time; holds one save at a time.

        States that were not kept are computed again, one gradient a step.
        """
        template = TrainState(self.params, self.optimizer.init(self.params))
        with _manager(self.directory) as manager:
            saves, at = sorted(manager.all_steps()), None
            for save in reversed(saves) if backwards else saves:
                chunk, reason = _read(manager, save)
                if chunk is not None and not backwards and chunk["steps"][0] != (at or 0):
                    chunk, reason = None, f"it begins at step {chunk['steps'][0]}, not {at or 0}"
                if chunk is None:
                    raise ValueError(
                        f"save {save} in {self.directory} cannot be used ({reason}). Record the run again with the "
                        "same arguments: it goes on from the save before."
                    )
                at = save
                starts = [int(step) for step in chunk["steps"]]
                states = [unpack(template, row) for row in chunk["states"]]
                bounds = [*starts, save]
                pieces = [
                    Segment(a, states[k], chunk["batches"][a - starts[0] : b - starts[0]], states[k + 1])
                    for k, (a, b) in enumerate(itertools.pairwise(bounds))
                ]
                for piece in reversed(pieces) if backwards else pieces:
                    parts = [piece] if at_most is None else self._cut(piece, at_most)
                    yield from reversed(parts) if backwards else parts

    def _cut(self, segment: Segment, length: int) -> list[Segment]:
        parts, state, places = [], segment.start, range(0, len(segment.batches), length)
        for a in places:
            batches, end = segment.batches[a : a + length], segment.end
            if a != places[-1]:
                static = self.apply_fn, self.optimizer, self.loss, self.x_s
                end = train(*static, state, jnp.asarray(batches), self.extra_args)
            parts.append(Segment(segment.step + a, state, batches, end))
            state = end
        return parts


def record_training(
    apply_fn: Any,
    params: PyTree,
    x_s: PyTree,
    loss: OutputLoss,
    optimizer: optax.GradientTransformation,
    batches: Array | np.ndarray,
    recorder: Recorder,
    *,
    extra_args: ExtraArgs | None = None,
) -> tuple[PyTree, Recording]:
    """Trains on mini-batches and records the run; killed at any moment, the same call goes on from the last save.

    Args:
      apply_fn, params, x_s, loss: as in `gradient_flow`.
      optimizer: optax transformation; its updates are added to the parameters.
      batches: indices of the examples of every step, (steps, b), e.g. `minibatches(n, b, epochs, seed)`.
      recorder: where to, and how often.
      extra_args: as in `Recording`: `(params, batch) -> dict` of what the optimizer's `update` takes beside gradients,
        state and parameters.

    Returns:
      The trained parameters and the `Recording`.

    Raises:
      TypeError, ValueError: as `gradient_flow`; indices outside of x_s; a folder of another run.
      OSError: nothing more can be written.

    Cost: that of training, and of `Recorder`.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> from gramian import Recorder, minibatches, record_training, squared_loss
      >>> loss = squared_loss(jnp.array([1.0, -1.0, 0.0]))
      >>> model = lambda w, x: x @ w
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     w, run = record_training(
      ...         model, jnp.zeros(3), jnp.eye(3), loss, optax.sgd(0.5), minibatches(3, 1, 10), Recorder(folder)
      ...     )
      ...     run.num_steps
      30
    """
    num_examples = check_training(apply_fn, params, x_s, loss)
    batches = np.asarray(batches)
    if batches.ndim != 2 or not np.issubdtype(batches.dtype, np.integer) or not batches.size:
        raise ValueError(
            f"batches has shape {batches.shape} and dtype {batches.dtype}, but must hold integers, (steps, b): "
            "minibatches(n, b, epochs) makes them."
        )
    if batches.min() < 0 or batches.max() >= num_examples:
        raise ValueError(
            f"batches holds indices from {batches.min()} to {batches.max()}, but x_s has {num_examples} examples."
        )
    params = jax.tree.map(jnp.asarray, params)
    static = apply_fn, params, x_s, loss, optimizer, extra_args, batches[0]
    apply_fn, loss, optimizer, extra_args = pinned_run(*static)
    weights, opt_state, step = recorder.start(params, optimizer.init(params))
    if step > len(batches):
        raise ValueError(f"{recorder.directory} holds {step} steps already, batches only {len(batches)}.")
    state = TrainState(weights, opt_state)
    while step < len(batches):
        stop = min((step // recorder.every + 1) * recorder.every, len(batches))
        state = train(apply_fn, optimizer, loss, x_s, state, jnp.asarray(batches[step:stop]), extra_args)
        recorder.update(batches[step:stop], *state)
        step = stop
    recorder.close(*state)
    recording = Recording(recorder.directory, apply_fn, optimizer, loss, x_s, params, extra_args)
    return state.params, recording


def _manager(directory: str | Path) -> ocp.CheckpointManager:
    """Numbers that training has just moved hardly compress: nothing is gained by the time that takes."""
    options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
    plain = ocp.PyTreeCheckpointHandler(use_compression=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options, item_handlers=plain)


def _read(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any] | None, str]:
    try:
        tree = dict(manager.restore(step, args=ocp.args.PyTreeRestore()) or {})
        intact = int(tree.pop("checksum")) == _checksum(tree)
    except Exception as error:  # Orbax raises whatever its storage raises
        return None, type(error).__name__
    return (tree, "") if intact else (None, "its contents do not match their checksum")


def _checksum(tree: dict[str, np.ndarray]) -> int:
    """Of shapes and bytes: Orbax stores larger arrays without one."""
    total = 0
    for name in sorted(tree):
        array = np.ascontiguousarray(tree[name])
        total = zlib.crc32(array.reshape(-1).view(np.uint8).data, zlib.crc32(f"{name} {array.shape}".encode(), total))
    return total


@jax.jit
def _copies(arrays: list[Array]) -> list[Array]:
    return [jnp.copy(array) for array in arrays]


def _copy(state: TrainState) -> TrainState:
    """Of its own: the loop may donate its buffers. One program for all leaves takes a tenth of one for each."""
    leaves, structure = jax.tree.flatten(state)
    own = iter(_copies([leaf for leaf in leaves if isinstance(leaf, jax.Array)]))
    return jax.tree.unflatten(structure, [next(own) if isinstance(leaf, jax.Array) else leaf for leaf in leaves])


def _same_start(row: np.ndarray, given: TrainState) -> bool:
    try:
        found = unpack(given, row).params
    except ValueError:  # of another size
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(given.params), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
