import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from foretune.report import tensor_file
from foretune.report.tensor_file import write_tensors


def test_safetensors_reads_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_ROWS", 64)
    mapped = np.lib.format.open_memmap(tmp_path / "k.npy", mode="w+", dtype=np.float64, shape=(3, 5, 5))
    mapped[:] = np.random.default_rng(0).standard_normal((3, 5, 5))
    arrays = {"K": mapped[0], "K_draws": mapped, "labels": np.arange(7), "flags": np.array([[True], [False]])}
    arrays |= {"f": np.ones((2, 3), np.float32), "none": np.empty((0, 4))}
    write_tensors(tmp_path / "x.safetensors", arrays, {"foretune": "{}"})
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"foretune": "{}"}


def test_other_types_are_refused(tmp_path):
    with pytest.raises(KeyError):
        write_tensors(tmp_path / "x.safetensors", {"x": np.ones(2, complex)}, {})
