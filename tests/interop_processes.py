"""Two processes train accelerated PEFT models, each on half of every batch: run by torchrun."""

import sys
from collections.abc import Callable
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
from tests.sibling_models import family, gated, groups

STEPS, BATCH = 3, 8


def dora() -> tuple[Any, list[nn.Module]]:
    """A model, and its blocks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4))
    model: Any = get_peft_model(
        net, LoraConfig(r=3, use_dora=True, target_modules=["0", "2"], modules_to_save=["4"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return fastlora.accelerate(model), [model.base_model.model.get_submodule(place) for place in ("0", "2")]


def llama() -> tuple[Any, list[nn.Module]]:
    """A model whose layers share their inputs, and its blocks."""
    model, _ = family("Llama")
    return model, list(model.base_model.model.model.layers)


def loss_of_dora(called: Any, generator: torch.Generator, rank: int, processes: int) -> Tensor:
    """Of a process's part of a batch."""
    x = torch.randn(BATCH, 12, generator=generator)
    loss: Tensor = called(x.chunk(processes)[rank]).square().mean()
    return loss


def loss_of_llama(called: Any, generator: torch.Generator, rank: int, processes: int) -> Tensor:
    """Of a process's part of a batch."""
    words = torch.randint(3, 100, (BATCH, 6), generator=generator).chunk(processes)[rank]
    loss: Tensor = called(input_ids=words, labels=words).loss
    return loss


MODELS: dict[str, tuple[Callable[[], tuple[Any, list[nn.Module]]], Callable[..., Tensor]]] = {
    "DoRA": (dora, loss_of_dora),
    "Llama": (llama, loss_of_llama),
}


def train(name: str, how: str = "", rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """What trains after some steps of SGD, and what was computed together in them.

    Args:
        name: Of the model.
        how: ``ddp`` or ``fsdp2``; else one process trains alone.
        rank: The process's.
        processes: How many there are.
    """
    make, loss = MODELS[name]
    model, blocks = make()
    called = model
    if how == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    elif how == "fsdp2":
        mesh = init_device_mesh("cpu", (processes,))
        for block in (*blocks, model):
            fully_shard(block, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with groups() as shared, gated() as activations:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(called, torch.Generator().manual_seed(step), rank, processes).backward()
            optimizer.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}
    return {"together": [*shared, *activations], **{name: p.detach() for name, p in whole.items()}}


def main(how: str, path: Path) -> None:
    """Train as one of the processes; the first writes what was learnt."""
    dist.init_process_group("gloo")
    found = {name: train(name, how, dist.get_rank(), dist.get_world_size()) for name in MODELS}
    if dist.get_rank() == 0:
        torch.save(found, path)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
