import subprocess
import sys
from pathlib import Path

import pytest

import foretune


def test_every_public_name_is_there():
    for name in foretune.__all__:
        assert getattr(foretune, name) is not None, name
    assert dir(foretune) == foretune.__all__
    with pytest.raises(AttributeError, match="nothing"):
        foretune.nothing  # noqa: B018


def test_no_module_hides_a_public_function():
    code = (
        "import foretune.scoring.score, foretune.ntk.spectrum, foretune.ntk.prediction, foretune as ft;"
        "assert callable(ft.score) and callable(ft.spectrum) and callable(ft.predict_by_regression)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    modules = {path.stem for path in Path(foretune.__file__).parent.glob("*.py")}
    assert not modules & set(foretune.__all__)
