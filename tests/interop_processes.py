"""Two processes train an accelerated PEFT model, each on half of every batch: run by torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlora
from tests.launching import leave

STEPS, BATCH = 3, 8


def make() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4))
    model = get_peft_model(
        net, LoraConfig(r=3, use_dora=True, target_modules=["0", "2"], modules_to_save=["4"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return fastlora.accelerate(model)


def train(model: Any, called: Any, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """What trains after some steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        x = torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        called(x.chunk(processes)[rank]).square().mean().backward()
        optimizer.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in trained.items()}


def main(how: str, path: Path) -> None:
    """Train as one of the processes; the first writes what was learnt."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = make()
    called = model
    if how == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (processes,))
        for place in ("0", "2"):
            fully_shard(model.base_model.model.get_submodule(place), mesh=mesh)
        fully_shard(model, mesh=mesh)
    found = train(model, called, rank, processes)
    if rank == 0:
        torch.save(found, path)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
