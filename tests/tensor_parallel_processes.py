"""Two processes share the layers of one model: run by torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module

import fastlora
from fastlora.distributed import LoRAColwiseParallel, LoRARowwiseParallel
from fastlora.nn import LoRAModule
from tests.launching import leave

STEPS = 3


def make() -> nn.Sequential:
    """A residual-free MLP with LoRA, B away from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4))
    fastlora.apply_lora(model, rank=3, alpha=6)
    for module in model.modules():
        if isinstance(module, LoRAModule):
            nn.init.normal_(module.lora_B, std=0.3)
    return model


def train(model: nn.Module) -> dict[str, Tensor]:
    """The last output, the input's gradient, and what trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    y = x = torch.empty(0)
    for step in range(STEPS):
        x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(step)).requires_grad_()
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
    assert x.grad is not None
    found = {"y": y.detach(), "dX": x.grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach()
    return found


def main(folder: Path) -> None:
    """Train as one of the processes; the first writes what was learnt."""
    dist.init_process_group("gloo")
    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(
        model,
        mesh,
        {
            "0": LoRAColwiseParallel(),
            "2": LoRARowwiseParallel(),
            "4": LoRAColwiseParallel(output_layouts=Replicate()),
        },
    )
    found = train(model)
    fastlora.save_adapter(model, folder / f"adapter-{dist.get_rank()}")
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
