"""FSDP2 over two processes: bytes of 4-bit weights come back as they were, and what is learnt is one's."""

from typing import Any

import pytest
import torch

from tests.launching import in_two_processes
from tests.quantised_processes import CASES, REFUSED_BY_TORCH, make, train

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    path = tmp_path_factory.mktemp("processes") / "found.pt"
    in_two_processes("tests.quantised_processes", str(path))
    loaded: Found = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_two_processes_learn_what_one_does(kind: str, case: str, found: Found) -> None:
    expected, by_two = train(make(kind, CASES[case][0])), found[f"{kind} {case}"]
    if case == "bytes" and torch.__version__.startswith("2.11."):
        assert by_two == REFUSED_BY_TORCH
        return
    assert by_two.keys() == expected.keys()
    for name in ("before", "after"):
        assert all(map(torch.equal, by_two.pop(name), expected.pop(name)))
    for name, tensor in expected.items():
        torch.testing.assert_close(by_two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_bytes_that_are_cast_as_floats_are_refused(found: Found) -> None:
    assert "a weight cast from torch.float16 to torch.bfloat16" in found["ours refusal"]
    assert "stored as torch.float16, got bytes that were cast to torch.bfloat16" in found["peft refusal"]
