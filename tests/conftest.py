"""What holds for every test."""

import os

# Triton decides at its first import, which other packages may trigger, whether kernels are interpreted.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_as_before():
    """A test may set the number of threads; those after it see none of that."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
