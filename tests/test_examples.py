"""Examples in docstrings are what a user copies, so they run here."""

import doctest
import importlib

import pytest

from ssah_utils.files import PACKAGE

MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted and not outcome.failed


def test_the_modules_that_users_copy_from_have_examples():
    kernels = {"per_unit", "scores", "units", "search", "stats"}
    assert {f"{PACKAGE.name}.{name}" for name in kernels} <= set(MODULES)
