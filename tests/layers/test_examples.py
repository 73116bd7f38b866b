import doctest
import importlib

import pytest

MODULES = ("activations", "pool2d_same", "residual", "same_conv", "squeeze_excite", "standardize", "std_conv")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_show(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"timm_nf.layers.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
