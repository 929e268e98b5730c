"""Saving a flow as it goes, so that a killed run loses nothing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gramian._checks import check_seconds
from gramian._flow.integrator import FlowState, Integrator, StepInfo
from gramian._storage.fingerprint import differing, digests, program, text
from gramian._storage.folder import Folder, absolute
from gramian._storage.saves import read_save, write_arrays
from gramian._storage.trees import characters, flatten, unflatten

PyTree = Any
KIND = "flow checkpoint"
KEPT = 2  # saves; the older one is there for the case that the newer one is damaged


@dataclass
class Checkpoint:
    """A folder that a flow saves its state to, and goes on from.

    A save is atomic: a run killed at any moment goes on from the last complete one and ends bit-identical to a run
    that was never stopped. The two newest saves are kept. One that does not match its checksum is moved to the folder
    `aside` and passed over for the one before, with a line that says so; one that cannot be read for another reason
    stops the run, and nothing is changed.

    Args:
      directory: the folder; made if it does not exist. It belongs to one problem, and holds nothing else to begin with:
        going on with other data, another model, another loss or other settings is refused. While a flow runs it is
        locked.
      every_seconds: least time between two saves; the end of the run is always saved.

    Raises:
      TypeError, ValueError: no path; every_seconds that is negative or no number.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from gramian import Checkpoint, gradient_flow, squared_loss
      >>> args = lambda w, x: x @ w, jnp.zeros(2), jnp.eye(2), squared_loss(jnp.array([1.0, -1.0]))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     first = gradient_flow(*args, t1=2.0, checkpoint=Checkpoint(folder))
      ...     again = gradient_flow(*args, t1=2.0, checkpoint=Checkpoint(folder))
      >>> bool((first.params == again.params).all())
      True
    """

    directory: str | Path
    every_seconds: float = 20.0
    _folder: Folder | None = field(default=None, init=False, repr=False)
    _identity: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _start: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _last: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self):
        self.directory = absolute(self.directory)
        self.every_seconds = check_seconds(self.every_seconds)

    def restore(
        self, integrator: Integrator, state: FlowState, t1: float, save_at: tuple[float, ...]
    ) -> tuple[FlowState, list[StepInfo], list[PyTree]]:
        """The last intact save of this very problem; the given start if there is none. Locks the folder until `close`.

        Raises:
          ValueError: a folder that holds something else, or another problem; the message says what differs.
          RuntimeError: a folder that another flow is saving to.
          OSError: a folder that cannot be written to, a save that cannot be read.
        """
        self.close()
        self._identity = _identity(integrator, state, t1, save_at)
        self._start = flatten((state.outputs_s, state.outputs_q, integrator.loss.grad(state.outputs_s)))
        self._last = time.monotonic()
        self._folder = folder = Folder(self.directory, KIND)
        folder.claim()
        try:
            read = [(step, path, *read_save(path)) for step, path in reversed(folder.saves())]
            for *_, tree, _ in read:  # before anything is moved: another problem's are not ours to move
                self._check_same(tree)
            folder.clear()
            for step, path, tree, reason in read:
                if tree is not None:
                    return _restored(integrator, state, tree)
                kept = folder.set_aside(path)
                print(f"checkpoint {step} in {folder.path} {reason}; it is kept as {kept}. Going back one.")
        except BaseException:
            self.close()
            raise
        return state, [], []

    def save(self, state: FlowState, infos: list[StepInfo], saved: list[PyTree], *, force: bool = False) -> None:
        """Saves, if the last save is `every_seconds` ago or `force` is set."""
        if self._folder is None:
            raise RuntimeError("call restore before the first save: it says whether this is the folder's problem.")
        if not force and time.monotonic() - self._last < self.every_seconds:
            return
        tree = {
            "identity": characters(json.dumps(self._identity)),
            **_named("start", self._start),
            **_named("state", flatten(state)),
            **_named("history", flatten(jax.tree.map(lambda *values: np.stack(values), *infos))),
            **_named("saved", flatten(saved)),
            "num_saved": np.asarray(len(saved)),
        }
        try:
            write_arrays(self._folder.save_path(state.num_steps), tree)
        except OSError as error:
            intact = max((step for step, _ in self._folder.saves()), default=0)
            raise OSError(
                error.errno,
                f"step {state.num_steps} cannot be saved to {self.directory} ({error.strerror}). The flow is intact up "
                f"to step {intact}: free space there and start again",
            ) from error
        for _, path in self._folder.saves()[:-KEPT]:
            path.unlink()
        self._last = time.monotonic()

    def close(self) -> None:
        """Unlocks the folder."""
        if self._folder is not None:
            self._folder.release()
        self._folder = None

    def remove(self) -> None:
        """Removes the saves, once what they led to is kept elsewhere; whatever else is in the folder stays.

        Raises:
          ValueError: a folder that holds something else.
          RuntimeError: a folder that a flow is saving to.
        """
        Folder(self.directory, KIND).remove()

    def _check_same(self, tree: dict[str, np.ndarray] | None) -> None:
        if tree is None:
            return
        differ = differing(json.loads(tree["identity"].tobytes()), self._identity)
        start = _under("start", tree)
        for key, expected in self._start.items() if not differ else ():
            # Another machine rounds otherwise; another model differs by more.
            away = np.linalg.norm(start[key] - expected)
            if not away <= np.sqrt(np.finfo(expected.dtype).eps) * np.linalg.norm(expected):
                differ.append(f"{('training outputs', 'test outputs', 'output gradient')[int(key)]} at the start")
        if differ:
            raise ValueError(
                f"{self.directory} holds a checkpoint of another problem or other settings; what differs: "
                f"{', '.join(differ)}. Remove the folder, or give this run one of its own."
            )


def _named(name: str, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}/{key}": leaf for key, leaf in leaves.items()}


def _under(name: str, tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}/"): leaf for key, leaf in tree.items() if key.startswith(f"{name}/")}


def _restored(
    integrator: Integrator, state: FlowState, tree: dict[str, np.ndarray]
) -> tuple[FlowState, list[StepInfo], list[PyTree]]:
    saved = unflatten([state.params] * int(tree["num_saved"]), _under("saved", tree))
    history = _unflatten_history(integrator, state, _under("history", tree))
    return unflatten(state, _under("state", tree)), history, saved


def _unflatten_history(integrator: Integrator, state: FlowState, leaves: dict[str, np.ndarray]) -> list[StepInfo]:
    def observe(observed, point, operators):
        return {
            name: observable.update(observed[name], integrator.source, point, operators, jax.numpy.asarray(state.h))[1]
            for name, observable in integrator.observables.items()
        }

    values = jax.eval_shape(observe, state.observed, state.carry, state.operators)
    length = len(next(iter(leaves.values())))
    # Time and the other numbers of a step come first; an empty value was left out by `flatten`.
    empty = [np.zeros((length, *leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(values)]
    columns = [leaves.get(f"{i:04d}", empty[i - 4] if i >= 4 else None) for i in range(4 + len(empty))]
    structure = jax.tree.structure(StepInfo(0.0, 0.0, 0.0, 0.0, values))
    rows = [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]
    return [StepInfo(float(row.t), float(row.h), float(row.loss), float(row.error), row.observed) for row in rows]


def _identity(integrator: Integrator, state: FlowState, t1: float, save_at: tuple[float, ...]) -> dict[str, str]:
    """What a flow is computed from, by name."""
    source, loss, params = integrator.source, integrator.loss, state.params
    one = jax.tree.map(lambda leaf: leaf[0], (state.outputs_s, loss.targets))
    return digests(
        {
            "apply_fn": program(source.apply_fn, params, source.x_s),
            "controller": text(integrator.controller),
            "loss": program(loss.example_loss, *one),
            "observables": text(integrator.observables),
            "parameters": params,
            "save_at": text(save_at),
            "stepper": text(integrator.stepper),
            "t0": text(state.t),
            "t1": text(t1),
            "targets": loss.targets,
            "x_q": () if source.x_q is None else source.x_q,
            "x_s": source.x_s,
        }
    )
