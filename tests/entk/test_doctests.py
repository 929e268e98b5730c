"""Every example in a docstring of the package runs, and everything public has one."""

import doctest
import importlib
import pkgutil

import pytest

import entk

MODULES = [module.name for module in pkgutil.walk_packages(entk.__path__, "entk.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", entk.__all__)
def test_what_a_user_calls_has_an_example_that_doctest_finds(name):
    """A decorator can hide an example from doctest; and a docstring is a contract with all its parts."""
    function = getattr(entk, name)
    (found,) = [
        test
        for test in doctest.DocTestFinder().find(importlib.import_module(function.__module__))
        if test.name == f"{function.__module__}.{name}"
    ]
    assert any(name in example.source for example in found.examples)
    for part in ("Args:", "Returns:", "Raises:", "Cost:", "Example:"):
        assert part in function.__doc__, part
