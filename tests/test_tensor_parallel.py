"""Tensor parallelism: two processes compute, learn and save what one does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import fastlora
from fastlora.distributed import LoRAColwiseParallel, LoRARowwiseParallel
from tests.launching import in_two_processes
from tests.tensor_parallel_processes import make, train


@pytest.mark.full
def test_two_processes_compute_and_learn_what_one_does(tmp_path: Path) -> None:
    in_two_processes("tests.tensor_parallel_processes", str(tmp_path))
    model = make()
    expected = train(model)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    x = torch.randn(3, 10)
    for rank in (0, 1):
        loaded = fastlora.load_adapter(fastlora.remove_adapters(make()), tmp_path / f"adapter-{rank}")
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-6)


def lora(*, dora: bool = False) -> nn.Module:
    return fastlora.apply_lora(nn.Sequential(nn.Linear(6, 4)), rank=2, dora=dora)


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 4)), TypeError, "got Linear; call fastlora.apply_lora first"),
        (lambda: lora(dora=True), ValueError, "without DoRA, got dora=True"),
        (lambda: fastlora.merge_adapters(lora()), ValueError, "an unmerged layer, got a merged one"),
        (lambda: fastlora.init.pissa_(lora()), ValueError, "without a start to subtract"),
    ],
    ids=["plain", "dora", "merged", "start"],
)
def test_what_cannot_be_parallel_is_told(
    model: Callable[[], nn.Module], error: type[Exception], text: str, tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for style in (LoRAColwiseParallel(), LoRARowwiseParallel()):
            with pytest.raises(error, match=text):
                parallelize_module(model(), mesh, {"0": style})
        parallel = parallelize_module(lora(), mesh, {"0": LoRAColwiseParallel()})
        with pytest.raises(ValueError, match="expected whole weights to merge"):
            fastlora.merge_adapters(parallel)
    finally:
        dist.destroy_process_group()
