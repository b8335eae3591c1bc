"""The examples in docstrings are right, wherever in the package they stand."""

import doctest
import importlib
from pathlib import Path

import pytest

import lit_dpo

PACKAGE = Path(lit_dpo.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(("lit_dpo", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_some():
    assert len(WITH_EXAMPLES) > 20


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_file_are_right(name, capsys):
    tests = [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]
    assert tests
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0, capsys.readouterr().out
