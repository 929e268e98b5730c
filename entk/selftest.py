"""Does this machine's JAX compute what it should? ``python -m entk.selftest`` says so in about ten seconds.

A compiler fault raises no error: it returns wrong numbers. So two computations with known answers run here as the
library's own do, in float32 under ``jax.jit`` on the default backend:

* the Jacobian of a 2-layer Transformer's 64 last-token logits on 16 sequences, whose answer is the same Jacobian in
  float64, evaluated eagerly (operation by operation, hence without the compiler's fusions). It is taken in the two
  embedding tables: their cotangents cross every layer, and the whole Jacobian would take gigabytes. jaxlib 0.10.2 is
  off by 17 % here, and right on 2 sequences;
* ``sum((m @ r)**2)`` for each of 32,769 rows r = (i, 0, 0), i = 0, 1, ..., with m the identity: the last answer is
  32768**2 = 1073741824, exact in float32. With one row fewer jaxlib 0.10.2 gets it right.

Matrix products run at the highest precision: the reduced default of GPUs and TPUs is a choice, not a fault.
"""

import math
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The error is about 4e-7 where the compiler is right.
JACOBIAN_RTOL = 1e-4
LAST_ROW, EXACT_SUM = 32_768, 1_073_741_824.0

REMEDY = """JAX computes wrong numbers here, so nothing computed with it can be trusted. What to do, in this order:
  1. pip install --upgrade jax "jaxlib!=0.10.2", and run this again.
  2. On CPU, switch a faulty fusion off before Python starts, and run this again:
     export XLA_FLAGS="$XLA_FLAGS --xla_cpu_experimental_ynn_fusion_type=-reduce"
  3. If it still fails, report the table above to JAX with its versions."""


class Result(NamedTuple):
    """One check: its name, what was measured, what is allowed, and whether it passed."""

    name: str
    measured: str
    allowed: str
    passed: bool


def run() -> list[Result]:
    """Runs every check on the default backend and returns one `Result` a check, failed ones included."""
    return [check() for check in CHECKS]


def check_jacobian(num_examples: int = 16) -> Result:
    """Jitted float32 against eager float64: the Jacobian of a Transformer's logits, the worse of two arrays."""
    params, tokens = _init_transformer(np.random.default_rng(0)), _tokens(num_examples)
    with jax.enable_x64(False):
        fast = jax.jit(_jacobian)(_cast(params, np.float32), tokens)
    with jax.enable_x64(True):
        exact = _jacobian(_cast(params, np.float64), tokens)
    errors = jax.tree.map(_relative_error, fast, exact)
    worst = np.max(jax.tree.leaves(errors))
    return Result(
        f"Jacobian of a Transformer, n = {num_examples}",
        f"relative error {worst:.1e}",
        f"{JACOBIAN_RTOL:.0e}",
        bool(worst <= JACOBIAN_RTOL),  # a NaN fails
    )


def check_row_sums() -> Result:
    """Jitted float32 ``sum((m @ r)**2)`` over 32,769 rows: the last must be exactly 1073741824."""
    with jax.enable_x64(False):
        rows = np.zeros((LAST_ROW + 1, 3), np.float32)
        rows[:, 0] = np.arange(LAST_ROW + 1)
        last = float(jax.jit(_row_sums)(rows)[-1])
    return Result("sum((m @ r)**2) over 32,769 rows", f"{last:.0f}", f"{EXACT_SUM:.0f} exactly", last == EXACT_SUM)


def _row_sums(rows):
    matrix = jnp.eye(rows.shape[1], dtype=rows.dtype)
    return jax.vmap(lambda row: jnp.sum(jnp.matmul(matrix, row, precision="highest") ** 2))(rows)


CHECKS = (check_jacobian, check_row_sums)

NUM_LAYERS, WIDTH, NUM_HEADS, NUM_TOKENS, VOCABULARY = 2, 128, 4, 16, 64


def _init_transformer(rng: np.random.Generator) -> dict[str, Any]:
    def dense(rows: int, columns: int) -> np.ndarray:
        return rng.normal(size=(rows, columns)) / math.sqrt(rows)

    def layer() -> dict[str, np.ndarray]:
        square = {name: dense(WIDTH, WIDTH) for name in ("query", "key", "value", "mix")}
        return square | {"up": dense(WIDTH, 4 * WIDTH), "down": dense(4 * WIDTH, WIDTH)}

    layers = [layer() for _ in range(NUM_LAYERS)]
    return {
        "embed": rng.normal(size=(VOCABULARY, WIDTH)),
        "position": rng.normal(size=(NUM_TOKENS, WIDTH)),
        "layers": layers,
        "logits": dense(WIDTH, VOCABULARY),
    }


def _tokens(num_examples: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCABULARY, (num_examples, NUM_TOKENS), dtype=np.int32)


def _transformer(params, tokens):
    """The last token's logits, (VOCABULARY,), of one sequence of tokens, (NUM_TOKENS,)."""
    hidden = params["embed"][tokens] + params["position"]
    causal = np.tril(np.ones((NUM_TOKENS, NUM_TOKENS), bool))

    def heads(matrix):
        return (_normalize(hidden) @ matrix).reshape(NUM_TOKENS, NUM_HEADS, -1).swapaxes(0, 1)

    for layer in params["layers"]:
        query, key, value = heads(layer["query"]), heads(layer["key"]), heads(layer["value"])
        scores = query @ key.swapaxes(1, 2) / math.sqrt(WIDTH // NUM_HEADS)
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        hidden = hidden + (weights @ value).swapaxes(0, 1).reshape(NUM_TOKENS, WIDTH) @ layer["mix"]
        hidden = hidden + jax.nn.gelu(_normalize(hidden) @ layer["up"]) @ layer["down"]
    # Normalizing every position before taking the last is what the faulty fusion stumbles on.
    return _normalize(hidden)[-1] @ params["logits"]


def _normalize(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def _jacobian(params, tokens):
    """Each sequence's logits differentiated in both embedding tables: (n, VOCABULARY, rows, WIDTH) an array."""

    def of_one(sequence):
        return jax.jacrev(lambda tables: _transformer(params | tables, sequence))(embeddings)

    embeddings = {name: params[name] for name in ("embed", "position")}
    with jax.default_matmul_precision("highest"):
        return jax.vmap(of_one)(tokens)


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def _relative_error(value, reference) -> float:
    reference = np.asarray(reference)
    return float(np.linalg.norm(np.asarray(value, np.float64) - reference) / np.linalg.norm(reference))


def main() -> int:
    """Prints the table of results, with the remedy where a check fails; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    results = run()
    title = f"jax {version('jax')}, jaxlib {version('jaxlib')}, {jax.default_backend()}"
    table = Table("check", "measured", "allowed", "", title=title)
    for result in results:
        table.add_row(*result[:3], "[green]passed" if result.passed else "[red]FAILED")
    Console().print(table)
    if all(result.passed for result in results):
        return 0
    print(REMEDY)  # not through rich, which would break the command to copy
    return 1


if __name__ == "__main__":
    sys.exit(main())
