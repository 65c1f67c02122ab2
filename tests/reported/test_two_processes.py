"""meta-pytorch/torchforge#592: under FSDP two of 192 LoRA tensors got gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from tests.lora_models import tiny_vit, trained

PROCESSES = 2


def seeded_model() -> Any:
    torch.manual_seed(0)
    return trained(tiny_vit())


def images() -> Tensor:
    return torch.randn(2 * PROCESSES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def train_a_part(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    model, mesh = seeded_model(), init_device_mesh("cpu", (PROCESSES,))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(images().chunk(PROCESSES)[rank]).square().mean().backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()


# by default test_sharding_quantised learns LoRA in two processes
@pytest.mark.full
def test_every_sharded_lora_tensor_gets_its_gradient(tmp_path: Path) -> None:
    spawn(train_a_part, (tmp_path,), PROCESSES)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = seeded_model()
    model(images()).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert sum("lora_" in name for name in found) > 10
    for name, gradient in expected.items():
        assert gradient is not None
        assert found[name].abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient)
