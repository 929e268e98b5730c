"""Saving a flow as it goes, so that a killed run loses nothing."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gramian._integrator import FlowState, Integrator, StepInfo
from gramian._leaves import characters, digest, flatten, unflatten

PyTree = Any


@dataclass
class Checkpoint:
    """A folder that a flow saves its state to, through Orbax, and goes on from.

    A save is atomic: a run killed at any moment goes on from the last complete one and ends bit-identical to a run
    that was never stopped. The two newest saves are kept; one that cannot be read, or whose contents do not match their
    digest, is passed over for the one before, with a line that says so.

    Args:
      directory: the folder; made if it does not exist. It belongs to one problem: going on with other data, another
        model, another loss or other settings is refused. (Functions cannot be compared: models and losses are told
        apart by what they give at the start.)
      every_seconds: least time between two saves; the end of the run is always saved.

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
    _fingerprint: str = field(default="", repr=False)
    _start: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _unreadable: list[int] = field(default_factory=list, repr=False)
    _last: float = field(default=0.0, repr=False)

    def restore(
        self, integrator: Integrator, state: FlowState, t1: float, save_at: tuple[float, ...]
    ) -> tuple[FlowState, list[StepInfo], list[PyTree]]:
        """The last readable save of this very problem; the given start if there is none."""
        self._fingerprint = _fingerprint(integrator, state, t1, save_at)
        self._start = flatten((state.outputs_s, state.outputs_q, integrator.loss.grad(state.outputs_s)))
        self._unreadable = []
        self._last = time.monotonic()
        with self._manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                tree: dict[str, Any] = {}
                try:
                    tree = manager.restore(step, args=ocp.args.StandardRestore())
                    intact = bytes(tree.pop("digest")).decode() == digest(tree)
                    reason = "its contents do not match their digest"
                except Exception as error:  # Orbax raises whatever its storage raises; a torn file must not end a run.
                    intact, reason = False, type(error).__name__
                if not intact:
                    print(f"checkpoint {step} in {self.directory} cannot be read ({reason}); going back one")
                    self._unreadable.append(step)
                    continue
                self._check_same(tree)
                saved = [unflatten(state.params, tree["saved"][key]) for key in sorted(tree.get("saved", {}))]
                history = _unflatten_history(integrator, state, tree["history"])
                return unflatten(state, tree["state"]), history, saved
        return state, [], []

    def save(self, state: FlowState, infos: list[StepInfo], saved: list[PyTree], *, force: bool = False) -> None:
        """Saves, if the last save is `every_seconds` ago or `force` is set."""
        if not force and time.monotonic() - self._last < self.every_seconds:
            return
        tree = {
            "fingerprint": characters(self._fingerprint),
            "start": self._start,
            "state": flatten(state),
            "history": flatten(jax.tree.map(lambda *values: np.stack(values), *infos)),
        }
        if saved:
            tree["saved"] = {f"{i:04d}": flatten(params) for i, params in enumerate(saved)}
        with self._manager() as manager:
            for step in self._unreadable:  # else it would count as the newest, and stand where this run saves again
                manager.delete(step)
            self._unreadable = []
            tree["digest"] = characters(digest(tree))
            manager.save(state.num_steps, args=ocp.args.StandardSave(tree), force=True)
            manager.wait_until_finished()
        self._last = time.monotonic()

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(Path(self.directory).absolute(), options=options)

    def _check_same(self, tree: PyTree) -> None:
        same = bytes(tree["fingerprint"]).decode() == self._fingerprint and tree["start"].keys() == self._start.keys()
        for key, expected in self._start.items() if same else ():
            # Another machine rounds otherwise; another model differs by more.
            away = np.linalg.norm(np.asarray(tree["start"][key]) - expected)
            same = same and bool(away <= np.sqrt(np.finfo(expected.dtype).eps) * np.linalg.norm(expected))
        if not same:
            raise ValueError(
                f"{self.directory} holds a checkpoint of another problem or other settings. Remove the folder, or "
                "give this run one of its own."
            )


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


def _fingerprint(integrator: Integrator, state: FlowState, t1: float, save_at: tuple[float, ...]) -> str:
    settings = (integrator.stepper, integrator.controller, integrator.observables, state.t, t1, save_at)
    return hashlib.sha256(
        (repr(settings) + digest((integrator.source, integrator.loss, state.params))).encode()
    ).hexdigest()
