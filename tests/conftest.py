"""What the tests of the optimizers need around them."""

import warnings

import pytest
import torch


@pytest.fixture
def no_compiler():
    """Kron compiles four small functions; no test here may need a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def known_optimizer_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*opt_einsum.*")  # timm's Kron, if that is not installed
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")  # Adahessian needs it
        yield
