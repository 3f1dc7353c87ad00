import os
import uuid

# Before any Hugging Face library is imported: tests never reach for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis
import jaxtyping
import pytest
import torch

# Shapes in types are checked in every call and dataclass of these modules; before they are imported.
SHAPED = [
    "models.adapted",
    "ntk.capture",
    "ntk.factors",
    "ntk.features",
    "ntk.general",
    "ntk.head_factors",
    "ntk.jacobian",
    "ntk.kernel",
    "ntk.probe",
    "ntk.sequence_features",
    "ntk.sequence_losses",
    "ntk.sequence_pass",
    "ntk.sketches",
]
jaxtyped = jaxtyping.jaxtyped


def outermost(**options):
    """Leave functions inside others alone: they would be wrapped anew in every call, which is a third of the suite."""
    wrap = jaxtyped(**options)
    return lambda thing: thing if "<locals>" in getattr(thing, "__qualname__", "") else wrap(thing)


jaxtyping.jaxtyped = outermost  # what the hook puts above every function
jaxtyping.install_import_hook([f"foretune.{name}" for name in SHAPED], "beartype.beartype")

# machines are shared and noisy; half of the usual number of examples
hypothesis.settings.register_profile("foretune", deadline=None, max_examples=50)
hypothesis.settings.load_profile("foretune")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_home(tmp_path_factory):
    """Nor for what foretune keeps in the user's home: fixtures of modules share a folder, each test has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORETUNE_HOME", str(tmp_path_factory.getbasetemp() / "home"))
        yield


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FORETUNE_HOME", str(tmp_path_factory.getbasetemp() / f"home-{uuid.uuid4().hex}"))


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(1)  # tiny models: threads cost more than they bring, and xdist has the other core


@pytest.fixture(autouse=True)
def foretune_home(tmp_path_factory, monkeypatch):
    """Keep what outlives a run away from the user's own folder."""
    folder = tmp_path_factory.mktemp("foretune-home")
    monkeypatch.setenv("FORETUNE_HOME", str(folder))
    return folder
