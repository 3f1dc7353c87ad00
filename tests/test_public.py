import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import datasets
import pytest

import foretune


def test_every_public_name_is_there():
    for name in foretune.__all__:
        assert getattr(foretune, name) is not None, name
    assert dir(foretune) == foretune.__all__
    with pytest.raises(AttributeError, match="nothing"):
        foretune.nothing  # noqa: B018


def classes(kind):
    """The classes that an annotation names, inside lists, unions and functions too."""
    for part in kind if isinstance(kind, list) else typing.get_args(kind):
        yield from classes(part)
    if isinstance(kind, type):
        yield kind


def test_what_public_functions_take_and_return_is_public():
    functions = [function for name in foretune.__all__ if inspect.isfunction(function := getattr(foretune, name))]
    assert len(functions) > 20
    known = {"datasets": datasets}  # imported by the modules where they need it
    for function in functions:
        for kind in classes(list(typing.get_type_hints(function, localns=known).values())):
            if kind.__module__.split(".")[0] == "foretune":
                assert getattr(foretune, kind.__name__, None) is kind, f"{function.__name__}: {kind.__name__}"


def test_type_checkers_see_the_names_that_are_imported_when_they_are_used():
    """The block for type checkers and the table of homes say the same."""
    tree = ast.parse(Path(foretune.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {(node.module.removeprefix("foretune."), name.asname) for node in block.body for name in node.names}
    assert told == {(module, name) for name, module in foretune._MODULE_OF.items()}


def test_no_module_hides_a_public_function():
    code = (
        "import foretune.scoring.score, foretune.ntk.spectrum, foretune.forecasting.forecast, foretune as ft;"
        "assert callable(ft.score) and callable(ft.spectrum) and callable(ft.forecast)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    modules = {path.stem for path in Path(foretune.__file__).parent.glob("*.py")}
    assert not modules & set(foretune.__all__)
