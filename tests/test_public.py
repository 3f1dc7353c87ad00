import subprocess
import sys

import pytest

import foretune


def test_every_public_name_is_there():
    for name in foretune.__all__:
        assert getattr(foretune, name) is not None, name
    assert dir(foretune) == foretune.__all__
    with pytest.raises(AttributeError, match="nothing"):
        foretune.nothing  # noqa: B018


def test_a_function_wins_over_the_module_of_its_name():
    """`foretune.score` stays the function no module has the name of a public function."""
    code = "import foretune.scores, foretune.spectra, foretune as ft; assert callable(ft.score) and callable(ft.spectrum) and callable(ft.forecast)"
    subprocess.run([sys.executable, "-c", code], check=True)
