"""Recording a training run: its states now and then, its batches always, so that every step can be computed again."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from entk.internal import check_count
from gramian._checks import check_seconds
from gramian._losses import OutputLoss
from gramian._pinning import pinned_run
from gramian._run.linear_update import ExtraArgs, FrozenUpdate
from gramian._run.training import (
    TrainState,
    check_optimizer,
    check_training,
    finite_leaves,
    finite_steps,
    names_of_lost,
    train,
)
from gramian._storage.fingerprint import differing, digests, program
from gramian._storage.folder import Folder, absolute
from gramian._storage.interrupts import Pace, answer, interruptible
from gramian._storage.saves import read_save, write_arrays
from gramian._storage.trees import characters, pack, unpack

PyTree = Any
KIND = "recording"


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
    """Stores what a training loop does, to a folder, while it goes on.

    `start` before the loop, `update` after every step (or every few), `close` at the end. The state is kept every
    `every` steps, the batches of all steps; what lies between is computed again when it is wanted. A killed run goes on
    from the last save: the loop asks `start` where. Inside `with recorder:` a loop that is interrupted, or fails, also
    writes what it has kept; Ctrl-C and SIGTERM are answered after the next `update`, with a line on how to go on.

    From `start` to `close` the folder is locked: a second recorder there is refused, in this process or another.
    Readers may come and go meanwhile.

    Args:
      directory: the folder; made if it does not exist. It belongs to one run, and holds nothing else to begin with.
      every: steps from one kept state to the next.
      save_bytes: kept states are collected up to this size before they are written.
      every_seconds: and for this long at most; what a kill can cost.

    Raises:
      TypeError, ValueError: no path; sizes that are not positive.
      FloatingPointError: from `update` and `close`, as soon as a state to be kept is finite no more; what was recorded
        up to the last finite one is written, and can be analysed.
      OSError: from `update` and `close`, when nothing can be written; the saves so far stay intact.

    Cost: a copy of the state every `every` steps; it is written in the background. Memory: 2·save_bytes and one state.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> from gramian import Recorder
      >>> tx, w = optax.sgd(0.1), jnp.ones(2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Recorder(folder, every=2) as recorder:
      ...         w, state, step = recorder.start(w, tx.init(w), identity={"rate": "0.1"})
      ...         for k in range(step, 4):
      ...             updates, state = tx.update(w, state, w)
      ...             w = optax.apply_updates(w, updates)
      ...             recorder.update([k % 3], w, state)
      ...         recorder.close()
      ...     with Recorder(folder, every=2) as recorder:
      ...         print(recorder.start(jnp.ones(2), tx.init(jnp.ones(2)), identity={"rate": "0.1"})[2])
      4
    """

    directory: str | Path
    every: int = 64
    save_bytes: int = 2**26
    every_seconds: float = 20.0
    _folder: Folder | None = field(default=None, init=False, repr=False)
    _identity: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)
    _saved: int = field(default=0, init=False, repr=False)
    _kept: list[tuple[int, TrainState]] = field(default_factory=list, init=False, repr=False)
    _batches: list[np.ndarray] = field(default_factory=list, init=False, repr=False)
    _last: float = field(default=0.0, init=False, repr=False)
    _thread: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _writing: Future | None = field(default=None, init=False, repr=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False, repr=False)
    _sound: Array | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.directory = absolute(self.directory)
        self.every = check_count("every", self.every)
        self.save_bytes = check_count("save_bytes", self.save_bytes)
        self.every_seconds = check_seconds(self.every_seconds)

    def __enter__(self) -> Recorder:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(interruptible(self._how_to_go_on))
        self._stack.push(self._end)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.__exit__(*exception)

    def _end(self, kind, *_) -> None:
        if self._folder is None:
            return
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # what ended the loop is what is to be known
                self._leave()

    def start(
        self,
        params: PyTree,
        opt_state: PyTree,
        *,
        identity: Mapping[str, PyTree] | None = None,
        batches: np.ndarray | None = None,
    ) -> tuple[PyTree, PyTree, int]:
        """Where the loop begins: the given state at step 0, or the last one saved, and its step.

        A save that does not match its checksum is moved to the folder `aside`, with those after it, and the run goes
        on from the one before.

        Args:
          params, opt_state: at the first step.
          identity: what else tells this run from others, by name: settings as strings, data as arrays. A folder whose
            run had another is refused. Functions cannot be compared; two loops of one model whose learning rates differ
            are told apart by what is given here alone.
          batches: those of the loop, (steps, b), where they are known: the recorded ones must be the first of them.

        Raises:
          ValueError: a folder that holds something else, or another run; the message says what differs.
          RuntimeError: a folder that is being recorded to.
          OSError: a folder that cannot be written to, a save that cannot be read; nothing has been changed.
        """
        self._release()
        given = TrainState(params, opt_state)
        self._identity = digests({"parameters": params, "optimizer state": opt_state, **(identity or {})})
        self._folder = Folder(self.directory, KIND)
        self._folder.claim()
        try:
            self._step, state = self._resume(self._folder, given, batches)
        except BaseException:
            self._release()
            raise
        self._saved, self._kept, self._batches = self._step, [(self._step, _copy(state))], []
        self._sound = finite_leaves(given)
        self._thread, self._last = ThreadPoolExecutor(1), time.monotonic()
        return state.params, state.opt_state, self._step

    def update(self, indices: Any, params: PyTree, opt_state: PyTree) -> None:
        """After a step on the examples `indices` (b,), or after several at once, (steps, b): the state they led to."""
        if self._folder is None:
            raise RuntimeError("call start(params, opt_state) before the loop: it says where the loop begins.")
        indices = np.atleast_2d(np.asarray(indices, np.int32))
        if self._batches and indices.shape[1:] != self._batches[0].shape:
            raise ValueError(f"a batch of {indices.shape[1]} examples follows one of {len(self._batches[0])}.")
        self._take(indices, params, opt_state)
        answer()

    def _take(self, indices: np.ndarray, params: PyTree, opt_state: PyTree) -> None:
        before = self._step
        self._step += len(indices)
        self._batches.extend(indices)
        if before // self.every == self._step // self.every:
            return
        if self._step % self.every:
            raise ValueError(f"{len(indices)} steps at once pass over step {before // self.every + 1} x every.")
        state = self._finite(_copy(TrainState(params, opt_state)))
        held = len(self._kept) * sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
        if held >= self.save_bytes or time.monotonic() - self._last >= self.every_seconds:
            self._save(self._step, state)
        else:
            self._kept.append((self._step, state))

    def close(self, params: PyTree = None, opt_state: PyTree = None) -> None:
        """Writes what is left and unlocks the folder; a run that ends between two kept states passes its last one."""
        if self._folder is None:
            return
        if self._batches and self._kept[-1][0] != self._step and params is None:
            raise ValueError(
                f"the run ends at step {self._step}, which no multiple of every={self.every} is: pass the last "
                "state, close(params, opt_state)."
            )
        try:
            if self._batches and self._kept[-1][0] != self._step:
                self._save(self._step, self._finite(TrainState(params, opt_state)))
            elif self._batches:
                self._save(*self._kept.pop())
            self._wait()
        finally:
            self._release()

    def _finite(self, state: TrainState) -> TrainState:
        """The state itself; if it is finite no more, the good part of the run is written and the loop stopped."""
        assert self._sound is not None
        if not (names := names_of_lost(self._sound, state)):
            return state
        step, last = self._step, self._kept[-1][0]
        self._leave()
        raise FloatingPointError(
            f"{names} holds NaN or infinite values since a step from {last + 1} to {step}: nothing after it can be "
            f"analysed. The run is recorded up to step {last} in {self.directory}. Lower the learning rate, clip "
            "gradients by their norm, or look at the batches of those steps."
        )

    def _how_to_go_on(self) -> str:
        return (
            f"Interrupted at step {self._step}. Recorded in {self.directory} up to step {self._saved}; started again, "
            "the same run goes on from there."
        )

    def _resume(self, folder: Folder, given: TrainState, batches: np.ndarray | None) -> tuple[int, TrainState]:
        at, state, saves = 0, given, folder.saves()
        for place, (number, path) in enumerate(saves):
            chunk, reason = read_save(path)
            if chunk is not None:
                self._check_same(chunk)
                chunk, reason = _fitting(chunk, at, number)
            if chunk is None:
                rest = saves[place:]
                for later in [read_save(path)[0] for _, path in rest]:  # another run's are not ours to move
                    self._check_same(later)
                for _, path in rest:
                    folder.set_aside(path)
                print(
                    f"save {number} in {folder.path} cannot be used (it {reason}). It is kept in the folder aside"
                    f"{', with those after it' if rest[1:] else ''}; going on from step {at}."
                )
                break
            planned = chunk["batches"] if batches is None else batches[at:number]
            if not np.array_equal(planned, chunk["batches"][: len(planned)]):
                raise ValueError(_of_another_run(folder.path, ["batches"]))
            at, state = number, unpack(given, chunk["states"][-1])
        folder.clear()
        return at, state

    def _check_same(self, chunk: dict[str, np.ndarray] | None) -> None:
        if chunk is not None and (other := differing(json.loads(chunk["identity"].tobytes()), self._identity)):
            raise ValueError(_of_another_run(self.directory, other))

    def _save(self, step: int, end: TrainState) -> None:
        """Writes the states kept so far, and `end`, in the background."""
        self._wait()
        assert self._folder is not None
        assert self._thread is not None
        path, first = self._folder.save_path(step), self._kept[0][0]
        kept, batches, identity = self._kept, self._batches[: step - first], characters(json.dumps(self._identity))
        self._kept, self._batches, self._last = [(step, end)], self._batches[step - first :], time.monotonic()

        def write() -> int:
            write_arrays(
                path,
                {
                    "identity": identity,
                    "steps": np.asarray([step for step, _ in kept]),
                    "states": np.stack([pack(state) for state in (*(one for _, one in kept), end)]),
                    "batches": np.stack(batches),
                },
            )
            return step

        self._writing = self._thread.submit(write)

    def _wait(self) -> None:
        """For the save that is being written."""
        if self._writing is None:
            return
        try:
            self._saved = self._writing.result()
            self._writing = None
        except Exception as error:
            self._writing = None
            self._release()
            raise OSError(
                f"recording to {self.directory} failed at step {self._step} ({type(error).__name__}: "
                f"{str(error)[:200]}). The run is intact up to step {self._saved}: free space there and start again."
            ) from error

    def _leave(self) -> None:
        """Writes what is kept, although the run has not come to its end."""
        try:
            if len(self._kept) > 1:
                self._save(*self._kept.pop())
            self._wait()
        finally:
            self._release()

    def _release(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if self._folder is not None:
            self._folder.release()
        self._folder = self._thread = self._writing = None


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
      num_steps: steps that were recorded when this was opened. A run that goes on meanwhile is not disturbed; to see
        more of it, open it again.

    Nothing is ever written.

    Raises:
      TypeError, ValueError: as `gradient_flow`; a folder without a recording, or whose first save is not there yet.
      FileNotFoundError: there is no such folder.
    """

    directory: str | Path
    apply_fn: Any
    optimizer: optax.GradientTransformation
    loss: OutputLoss
    x_s: PyTree
    params: PyTree = field(repr=False)
    extra_args: ExtraArgs | None = None
    start: TrainState = field(init=False, repr=False)
    num_steps: int = field(init=False)

    def __post_init__(self):
        check_training(self.apply_fn, self.params, self.x_s, self.loss)
        check_optimizer(self.optimizer)
        object.__setattr__(self, "directory", absolute(self.directory))
        folder = Folder(self.directory, KIND)
        folder.check()
        object.__setattr__(self, "num_steps", max((number for number, _ in folder.saves()), default=0))
        if not self.num_steps:
            raise ValueError(f"{self.directory} holds no recorded step yet; record the run with record_training.")
        first = next(self.segments())
        object.__setattr__(self, "start", first.start)
        object.__setattr__(self, "params", first.start.params)
        static = self.apply_fn, self.params, self.x_s, self.loss, self.optimizer, self.extra_args, first.batches[0]
        for name, one in zip(("apply_fn", "loss", "optimizer", "extra_args"), pinned_run(*static), strict=True):
            object.__setattr__(self, name, one)

    def segments(self, *, backwards: bool = False, at_most: int | None = None) -> Iterator[Segment]:
        """The run from kept state to kept state, or `at_most` so many steps at a time; holds one save at a time.

        States that were not kept are computed again, one gradient a step.
        """
        template = TrainState(self.params, self.optimizer.init(self.params))
        saves = [(number, path) for number, path in Folder(self.directory, KIND).saves() if number <= self.num_steps]
        starts = [0, *(number for number, _ in saves[:-1])]
        whole = list(zip(starts, saves, strict=True))
        for start, (number, path) in reversed(whole) if backwards else whole:
            chunk, reason = read_save(path)
            if chunk is not None:
                chunk, reason = _fitting(chunk, start, number)
            if chunk is None:
                raise ValueError(
                    f"save {number} in {self.directory} cannot be used (it {reason}). Record the run again with the "
                    "same arguments: it goes on from the save before."
                )
            states = [unpack(template, row) for row in chunk["states"]]
            bounds = [*(int(step) for step in chunk["steps"]), number]
            pieces = [
                Segment(a, states[k], chunk["batches"][a - start : b - start], states[k + 1])
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
                end, _ = train(*static, state, jnp.asarray(batches), self.extra_args)
            parts.append(Segment(segment.step + a, state, batches, end))
            state = end
        return parts


@interruptible(lambda: "Interrupted before the first step; the same call begins anew.")
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
      TypeError, ValueError: as `gradient_flow`; indices outside of x_s; a folder of another run; an optimizer that
        cannot be analysed, as `LiveChannel` and `analyze_training` would say later.
      FloatingPointError: the step at which the loss of a batch, a parameter or the optimizer's state is finite no more.
        What came before it stays recorded.
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
    check_optimizer(optimizer)
    if not isinstance(recorder, Recorder):
        raise TypeError(f"recorder={recorder!r} is a {type(recorder).__name__}; pass Recorder(directory).")
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
    batches = batches.astype(np.int32)
    params = jax.tree.map(jnp.asarray, params)
    static = apply_fn, params, x_s, loss, optimizer, extra_args, batches[0]
    apply_fn, loss, optimizer, extra_args = pinned_run(*static)
    FrozenUpdate(optimizer, params, extra_args, jnp.asarray(batches[0]))  # refuses what could not be analysed
    start, pace = TrainState(params, optimizer.init(params)), Pace()
    with recorder:
        identity = _identity_of(apply_fn, start, x_s, loss, optimizer, batches[0], extra_args)
        weights, opt_state, step = recorder.start(*start, identity=identity, batches=batches)
        if step > len(batches):
            raise ValueError(f"{recorder.directory} holds {step} steps already, batches only {len(batches)}.")
        state = TrainState(weights, opt_state)
        sound = finite_leaves(state)
        while step < len(batches):
            stop = min((step // recorder.every + 1) * recorder.every, len(batches))
            before, finite, some = state, True, jnp.asarray(batches[step:stop])
            for span in pace.calls(stop - step):
                answer()
                state, losses = train(apply_fn, optimizer, loss, x_s, state, some, extra_args, span=span)
                finite = finite and bool(losses)
            if not finite or names_of_lost(sound, state):
                _stop_where_lost((apply_fn, optimizer, loss, x_s), before, some, extra_args, recorder, step)
            recorder.update(batches[step:stop], *state)
            step = stop
        recorder.close(*state)
        return state.params, Recording(recorder.directory, apply_fn, optimizer, loss, x_s, params, extra_args)


def _identity_of(apply_fn, start: TrainState, x_s, loss, optimizer, batch, extra_args) -> dict[str, Any]:
    """What the steps of a run are computed from, by name."""
    x, targets = (jax.tree.map(lambda leaf: jnp.asarray(leaf)[batch], tree) for tree in (x_s, loss.targets))
    outputs = jax.eval_shape(apply_fn, start.params, x)
    output = jax.ShapeDtypeStruct((outputs.size // len(batch),), outputs.dtype)

    def update(grads, state, params, batch):
        extras = extra_args(params, batch) if extra_args else {}
        return optax.with_extra_args_support(optimizer).update(grads, state, params, **extras)

    return {
        "apply_fn": program(apply_fn, start.params, x),
        "loss": program(loss.example_loss, output, jax.tree.map(lambda leaf: leaf[0], targets)),
        "optimizer": program(update, start.params, start.opt_state, start.params, jnp.asarray(batch)),
        "targets": loss.targets,
        "x_s": x_s,
    }


def _stop_where_lost(
    problem: tuple[Any, Any, Any, Any], state: TrainState, batches, extra_args, recorder, step: int
) -> None:
    """Records the steps among these from which the run was still finite, and says which one was the last."""
    losses, states = map(np.asarray, finite_steps(*problem, state, batches, extra_args))
    bad = int(np.argmin(losses & states))
    # Parameters may be finite and their loss not: the step that led there is the one that left.
    good = bad if losses[bad] else max(0, bad - 1)
    if good:
        state, _ = train(*problem, state, batches[:good], extra_args)
        recorder.update(np.asarray(batches[:good]), *state)
    recorder.close(*state)
    if losses[bad]:
        after, _ = train(*problem, state, batches[bad : bad + 1], extra_args)
        said = f"{names_of_lost(finite_leaves(state), after)} holds NaN or infinite values after it"
    else:
        said = "the loss of its batch is NaN or infinite"
    kept = "No step before it can be used, and none is recorded"
    if step + good:
        kept = (
            f"The steps up to {step + good} are recorded in {recorder.directory}, for Recording(directory, ...) to open"
        )
    raise FloatingPointError(
        f"the run leaves the finite numbers at step {step + bad + 1}: {said}. {kept}. Lower the learning rate, clip "
        f"gradients by their norm, or look at the examples of that step, {np.asarray(batches[bad])[:8].tolist()}."
    )


def _fitting(chunk: dict[str, np.ndarray], start: int, end: int) -> tuple[dict[str, np.ndarray] | None, str]:
    """The save, or None and the reason, if it is not of the steps from `start` to `end`."""
    first, num_steps = int(chunk["steps"][0]), len(chunk["batches"])
    if (first, first + num_steps) == (start, end):
        return chunk, ""
    return None, f"holds the steps from {first} to {first + num_steps}, not from {start} to {end}"


def _of_another_run(directory: Any, differ: list[str]) -> str:
    return (
        f"{directory} holds another run; what differs: {', '.join(differ)}. Nothing was changed: give this run a "
        "folder of its own, or remove that one to record anew."
    )


@jax.jit
def _copies(arrays: list[Array]) -> list[Array]:
    return [jnp.copy(array) for array in arrays]


def _copy(state: TrainState) -> TrainState:
    """Of its own: the loop may donate its buffers. One program for all leaves takes a tenth of one for each."""
    leaves, structure = jax.tree.flatten(state)
    own = iter(_copies([leaf for leaf in leaves if isinstance(leaf, jax.Array)]))
    return jax.tree.unflatten(structure, [next(own) if isinstance(leaf, jax.Array) else leaf for leaf in leaves])
