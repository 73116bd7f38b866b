"""What pickles of numpy 2 need where numpy is 1."""

import sys

import numpy as np
import pytest


@pytest.fixture
def pickle_knows_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own pickle looks for the name that numpy.core has in numpy 2. Our reader needs no such help."""
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        for name in ("", ".multiarray", ".numeric"):
            monkeypatch.setitem(sys.modules, f"numpy._core{name}", sys.modules[f"numpy.core{name}"])
