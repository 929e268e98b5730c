"""Every example in a docstring of the package runs."""

import doctest
import importlib
import pkgutil

import pytest

import gramian

MODULES = [module.name for module in pkgutil.walk_packages(gramian.__path__, "gramian.") if ".plots" not in module.name]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_are_found():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 20
