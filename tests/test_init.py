"""Public names of the package: one table says where they are, and everything else agrees with it."""

import ast
from pathlib import Path

import pytest

import d2f_fast


def test_imports_for_type_checkers_agree_with_the_table_of_modules():
    tree = ast.parse(Path(d2f_fast.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {
        alias.asname or alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert imported == d2f_fast._MODULE_OF


def test_listed_names_are_those_of_the_table_and_the_version():
    assert d2f_fast.__all__ == sorted([*d2f_fast._MODULE_OF, "__version__"])


@pytest.mark.parametrize("name", d2f_fast._MODULE_OF)
def test_public_name_is_the_object_of_its_module(name):
    __import__(d2f_fast._MODULE_OF[name])
    value = getattr(d2f_fast, name)
    assert value.__name__ == name and value.__module__.startswith("d2f_fast.")
