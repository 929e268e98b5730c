"""The optimizers are tested as they are used, in float32 mode; a test that needs float64 asks for it."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def float32_mode():
    with jax.enable_x64(False):
        yield
