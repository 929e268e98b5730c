"""The user's functions as they are when a flow or a run begins: models, losses, observables, optimizers.

All of them are static arguments of compiled steps. `entk._tracing.pinned` says why each is traced afresh, and what
happens to one that changes on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from entk.internal import Pinned, pin, pin_model
from gramian._losses import OutputLoss
from gramian._problem import KernelSource

PyTree = Any


def pinned_problem(source: KernelSource, loss: OutputLoss, params: PyTree) -> tuple[KernelSource, OutputLoss]:
    """The model and the loss of a flow."""
    model = pin_model(source.apply_fn, params, source.x_s, source.x_q, names=("x_s", "x_q")).held()
    return replace(source, apply_fn=model), pinned_loss(loss, model, params, source.x_s)


def pinned_loss(loss: OutputLoss, apply_fn: Any, params: PyTree, x_s: PyTree) -> OutputLoss:
    """The loss on outputs of the model. Those of this package read nothing and stay what they are."""
    function = loss.example_loss
    if isinstance(function, Pinned) or function.__module__ == OutputLoss.__module__:
        return loss
    out = jax.eval_shape(apply_fn, params, x_s)
    outputs = jax.ShapeDtypeStruct((int(out.size) // out.shape[0],), out.dtype)
    target = jax.ShapeDtypeStruct(loss.targets.shape[1:], loss.targets.dtype)
    return replace(loss, example_loss=pin(function, (outputs, target), derived=jax.hessian).held())


@dataclass(frozen=True)
class PinnedObservable:
    """An observable whose `update` is pinned."""

    init: Callable
    update: Pinned


def pinned_observable(observable: Any, *arguments: Any) -> Any:
    """The observable of a user, traced with the arguments of its update."""
    if type(observable).__module__.startswith("gramian."):
        return observable
    update = pin(observable.update, arguments, of=(type(observable), observable), derived=None).held()
    return PinnedObservable(observable.init, update)


def pinned_run(
    apply_fn: Any,
    params: PyTree,
    x_s: PyTree,
    loss: OutputLoss,
    optimizer: Any,
    extra_args: Any = None,
    batch: Any = None,
) -> tuple[Pinned, OutputLoss, Any, Any]:
    """Model, loss, optimizer and extra arguments of a training run; batch are the indices of one of its steps."""
    model = pin_model(apply_fn, params, x_s, names=("x_s", "")).held()
    params = jax.tree.map(jnp.asarray, params)
    loss = pinned_loss(loss, model, params, x_s)
    extras: dict[str, Any] = {}
    if extra_args is not None:
        batch = jnp.asarray(batch)
        extra_args = pin(extra_args, (params, batch), derived=None).held()
        extras = jax.eval_shape(extra_args, params, batch)
    return model, loss, pinned_optimizer(optimizer, params, extras), extra_args


def pinned_optimizer(optimizer: optax.GradientTransformation, params: PyTree, extras: PyTree) -> Any:
    """The optimizer, its update traced with gradients like params."""
    if isinstance(optimizer.update, Pinned):
        return optimizer

    def by_position(update):
        supporting = optax.with_extra_args_support(optimizer._replace(update=update))
        return lambda grads, state, params, extras: supporting.update(grads, state, params, **extras)

    state = jax.eval_shape(optimizer.init, params)
    try:
        update = pin(optimizer.update, (params, state, params, extras), by=by_position, derived=None).held()
    except TypeError:  # it lacks extra arguments: nothing can come of it, and `FrozenUpdate` says what it needs
        return optimizer
    return optimizer._replace(update=update)
