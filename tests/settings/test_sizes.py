import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import ConfigError
from foretune.settings.commands import ForecastSettings
from foretune.settings.sizes import parse_bytes

UNITS = {"kB": 10**3, "MB": 10**6, "gb": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(number=st.integers(1, 10**6), unit=st.sampled_from(sorted(UNITS)), blank=st.sampled_from(["", " "]))
def test_amounts_with_their_unit(number, unit, blank):
    assert parse_bytes("memory", f"{number}{blank}{unit}") == number * UNITS[unit]


def test_fractions():
    assert parse_bytes("memory", " 1.5 GiB ") == 3 * 2**29


NO_AMOUNTS = ["", "2", "GB", "-1GB", "0GB", "2 TB", "2GBs", "1e3MB", "0.0000001kB", "nan GB", "２GB"]


@pytest.mark.parametrize("text", NO_AMOUNTS)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"memory = .*give an amount of memory, such as 2GB or 500MB"):
        parse_bytes("memory", text)
    with pytest.raises(ConfigError, match=r"memory = "):
        ForecastSettings(memory=text)
