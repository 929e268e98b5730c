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

PyTree = Any


@dataclass
class Checkpoint:
    """A folder that a flow saves its state to, through Orbax, and goes on from.

    A save is atomic: a run killed at any moment goes on from the last complete one and ends bit-identical to a run
    that was never stopped. The two newest saves are kept; one that cannot be read is passed over for the one before.

    Args:
      directory: the folder; made if it does not exist. It belongs to one problem: going on with other data, another
        model or other settings is refused.
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
    _manager: Any = field(default=None, repr=False)
    _fingerprint: str = field(default="", repr=False)
    _last: float = field(default=0.0, repr=False)

    def restore(
        self, integrator: Integrator, state: FlowState, t1: float, save_at: tuple[float, ...]
    ) -> tuple[FlowState, list[StepInfo], list[PyTree]]:
        """The last readable save of this very problem; the given start if there is none."""
        self._fingerprint = _fingerprint(integrator, state, t1, save_at)
        self._last = time.monotonic()
        self._manager = ocp.CheckpointManager(
            Path(self.directory).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                tree = self._manager.restore(step, args=ocp.args.StandardRestore())
            except Exception as error:  # Orbax raises whatever its storage raises; a truncated file must not end a run.
                print(f"checkpoint {step} in {self.directory} cannot be read ({type(error).__name__}); going back one")
                continue
            if bytes(tree["fingerprint"]).decode() != self._fingerprint:
                raise ValueError(
                    f"{self.directory} holds a checkpoint of another problem or other settings. Remove the folder, or "
                    "give this run one of its own."
                )
            saved = [_unflatten(state.params, tree["saved"][key]) for key in sorted(tree.get("saved", {}))]
            return _unflatten(state, tree["state"]), _unflatten_history(integrator, state, tree["history"]), saved
        return state, [], []

    def save(self, state: FlowState, infos: list[StepInfo], saved: list[PyTree], *, force: bool = False) -> None:
        if not force and time.monotonic() - self._last < self.every_seconds:
            return
        tree = {
            "fingerprint": np.frombuffer(self._fingerprint.encode(), np.uint8),
            "state": _flatten(state),
            "history": _flatten(jax.tree.map(lambda *values: np.stack(values), *infos)),
        }
        if saved:
            tree["saved"] = {f"{i:04d}": _flatten(params) for i, params in enumerate(saved)}
        self._manager.save(state.num_steps, args=ocp.args.StandardSave(tree), force=True)
        self._manager.wait_until_finished()
        self._last = time.monotonic()


def _flatten(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by position. Empty arrays are left out: they hold nothing, and not every storage takes them."""
    leaves = enumerate(np.asarray(leaf) for leaf in jax.tree.leaves(tree))
    return {f"{i:04d}": leaf for i, leaf in leaves if leaf.size}


def _unflatten(template: PyTree, leaves: dict[str, np.ndarray]) -> PyTree:
    """The leaves in the structure of `template`; Python numbers come back as Python numbers."""
    flat, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, [_like(old, leaves.get(f"{i:04d}", old)) for i, old in enumerate(flat)])


def _like(old, new):
    return type(old)(new) if isinstance(old, (int, float)) else jax.numpy.asarray(new)


def _unflatten_history(integrator: Integrator, state: FlowState, leaves: dict[str, np.ndarray]) -> list[StepInfo]:
    def observe(observed, point, operators):
        return {
            name: observable.update(observed[name], integrator.source, point, operators, jax.numpy.asarray(state.h))[1]
            for name, observable in integrator.observables.items()
        }

    values = jax.eval_shape(observe, state.observed, state.carry, state.operators)
    structure = jax.tree.structure(StepInfo(0.0, 0.0, 0.0, 0.0, values))
    columns = [leaves[key] for key in sorted(leaves)]
    infos = [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]
    return [info._replace(t=float(info.t), h=float(info.h)) for info in infos]


def _fingerprint(integrator: Integrator, state: FlowState, t1: float, save_at: tuple[float, ...]) -> str:
    digest = hashlib.sha256()
    settings = (integrator.stepper, integrator.controller, integrator.observables, state.t, t1, save_at)
    digest.update(repr(settings).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path((integrator.source, integrator.loss, state.params)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
