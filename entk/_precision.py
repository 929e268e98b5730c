"""The precision of products: full where nothing else is asked for.

TF32 and bfloat16 passes, which accelerators take by default, would break symmetry and positive semi-definiteness of K.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

PRECISION = jax.lax.Precision.HIGHEST


def matmul(a: ArrayLike, b: ArrayLike) -> Array:
    """a @ b at full precision, whatever the backend's default is."""
    return jnp.matmul(a, b, precision=PRECISION)


def row_products(rows: Array, columns: Array, precision: jax.lax.PrecisionLike = PRECISION) -> Array:
    """rows @ columns.T, accumulated and returned in float32 at least."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.matmul(rows, columns.T, precision=precision, preferred_element_type=dtype)


def model_precision():
    """The precision of products for which the model names none: the caller's `jax.default_matmul_precision`, else full.

    Accelerators default to eight or eleven bits of a float32, with which J is wrong in the third digit.
    """
    of_caller = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return jax.default_matmul_precision(of_caller or "highest")


@contextlib.contextmanager
def free_promotion() -> Iterator[None]:
    """Code of this package and of matfree broadcasts and promotes freely, whatever the caller asks of their own.

    The model has been traced under the caller's settings before, by `entk._tracing.pinned`.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
