"""Values that no setting has, or that some setting has and others must refuse."""

import datetime as dt
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

# Whatever YAML may hold.
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([2**31, 2**32, 2**63, 2**64, 1e308, 1e-320, -0.0, "yes", "nan", "inf", "1e400", "\0", "\x1b[31m"])
    | st.sampled_from(["9" * 5000, "a" * 999, dt.date(2024, 1, 1), b"x"])
)
# Whatever Python may hold.
SCALARS = (
    PLAIN
    | st.binary(max_size=3)
    | st.sampled_from(["\udc80", "a" * 9999, Path("x"), 1j, object(), int])
    | st.sampled_from([np.int64(3), np.float32(0.5), np.nan, Decimal("1.5"), Fraction(1, 3), np.zeros(2)])
)
