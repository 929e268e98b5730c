"""Every example in a docstring of the package runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import transforms

MODULES = [module.name for module in pkgutil.walk_packages(transforms.__path__, "transforms.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    "public",
    [
        transforms.HardMask,
        transforms.SoftMask,
        transforms.SnrMask,
        *filter(inspect.isfunction, vars(transforms).values()),
    ],
)
def test_what_a_user_calls_has_an_example_its_errors_and_a_source(public):
    assert ">>> " in public.__doc__
    assert "Raises:" in public.__doc__
    assert "arXiv:2605.01172" in public.__doc__
