"""Cases as pytest's parameters: those for a GPU are marked, and skipped where there is none."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fastlora.bench.cases import Case


def parameters(cases: Iterable[Case]) -> list[Any]:
    """One parameter for each case, with its id and marks."""
    no_gpu = pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU, and this machine has none"
    )
    return [
        pytest.param(case, id=case.id, marks=[] if case.device == "cpu" else [pytest.mark.gpu, no_gpu])
        for case in cases
    ]
