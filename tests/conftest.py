"""Fixtures for every test."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # read when the kernels are decorated, so it has to stand before their first import
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests draw from torch's generator; none depends on which others ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter, which then learns bf16."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from tests.interpreter_bf16 import teach_interpreter_bf16

    teach_interpreter_bf16()
    return torch.device("cpu")
