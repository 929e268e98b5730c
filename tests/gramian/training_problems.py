"""Small recorded runs with every kind of optimizer."""

import jax.numpy as jnp
import numpy as np
import optax

from gramian import Recorder, minibatches, record_training, softmax_cross_entropy, squared_loss
from transforms import poprisk_adamw, poprisk_gate

N, INPUTS, HIDDEN, OUTPUTS, M = 12, 5, 7, 3, 4
RNG = np.random.default_rng(0)
X, X_Q = RNG.normal(size=(N, INPUTS)), RNG.normal(size=(M, INPUTS))
PARAMS = {"a": RNG.normal(size=(INPUTS, HIDDEN)) / 2, "b": RNG.normal(size=(HIDDEN, OUTPUTS)) / 2}
CLASSES = RNG.integers(0, OUTPUTS, N)
SOFTMAX = softmax_cross_entropy(jnp.array(CLASSES))
SQUARED = squared_loss(jnp.array(RNG.normal(size=(N, OUTPUTS))))

OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "nesterov": optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.02),
    "adamw": optax.adamw(0.02, weight_decay=0.1),
    "decay before adam": optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.02)),
    "clipped adam": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.02)),
    "clipped by block": optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1, momentum=0.5)),
    "schedule": optax.adam(optax.cosine_decay_schedule(0.03, 60)),
    "rmsprop": optax.rmsprop(0.005),
    "gate before adam": optax.chain(poprisk_gate(summary=None), optax.adam(0.02)),
    "gate on the step": poprisk_gate(optax.adam(0.02), summary=None),
    "poprisk_adamw": poprisk_adamw(0.02, weight_decay=0.01),
    "every second step": optax.MultiSteps(optax.adam(0.03), 2).gradient_transformation(),
    "if finite": optax.apply_if_finite(optax.adam(0.02), 3),
    "injected": optax.inject_hyperparams(optax.adam)(0.02),
}


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def record(folder, optimizer, *, loss=SOFTMAX, batches=None, every=8, params=PARAMS):
    """(trained parameters, recording) of 60 steps on batches of 4."""
    batches = minibatches(N, 4, 20) if batches is None else batches
    return record_training(apply_fn, params, X, loss, optimizer, batches, Recorder(folder, every=every))
