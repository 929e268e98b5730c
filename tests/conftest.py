"""Settings of the whole test session.

float64 is on everywhere (`jax_enable_x64`), because identities are asserted in it; a test of a float32 path passes
float32 arrays. Figures are drawn without a screen. Hypothesis draws the same examples on every run in CI and never
fails a test for being slow: the first call compiles.
"""

import os

import hypothesis
import jax
import matplotlib

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")
