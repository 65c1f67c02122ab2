"""Two processes train LoRA on sharded 4-bit layers, each on half of every batch: run by torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fastlora
from fastlora.interop._peft_fused import Fused
from tests.launching import leave
from tests.quantised import four_bit

STEPS, BATCH = 3, 8
# how bytes are stored, and whether they are sharded; torch 2.11 shards floats alone
CASES = {"bytes": (torch.uint8, True), "whole bytes": (torch.uint8, False), "floats": (torch.bfloat16, True)}
# pairs of bytes that are NaN as floats, as bfloat16 of a kind that arithmetic makes another of
NANS = torch.tensor([0x81, 0x7F, 0x91, 0xFF], dtype=torch.uint8)
REFUSED_BY_TORCH = "only Tensors of floating point dtype can require gradients"
PLACES = ("0", "2")


def make(kind: str, storage: torch.dtype) -> Any:
    """Our layers, or PEFT's accelerated; bytes are odd to two processes."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"compute_dtype": torch.float32, "quant_storage": storage}
    net = nn.Sequential(four_bit(30, 34, **settings), nn.Tanh(), four_bit(6, 30, **settings))
    for place in PLACES:
        hold_nans(net.get_submodule(place).weight)
    if kind == "ours":
        model: Any = fastlora.apply_lora(net, rank=3, alpha=3)
    else:
        model = fastlora.accelerate(get_peft_model(net, LoraConfig(r=3, target_modules=list(PLACES))))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def hold_nans(weight: Any) -> None:
    """Write bytes into both ends of a packed weight that are NaN where they are stored as floats."""
    packed = weight.data.view(torch.uint8).view(-1)
    for end in (packed[: 4 * len(NANS)], packed[-4 * len(NANS) :]):
        end.copy_(NANS.repeat(4))
    if weight.is_floating_point():
        assert weight.isnan().sum() >= 16


def layers(model: Any) -> list[nn.Module]:
    """The LoRA layers."""
    inner = model.base_model.model if hasattr(model, "base_model") else model
    return [inner.get_submodule(place) for place in PLACES]


def stored(model: Any) -> list[Tensor]:
    """The bytes of the frozen weights, gathered."""
    found = []
    for layer in layers(model):
        weight: Any = getattr(layer, "base_layer", layer).weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
        found.append(whole.contiguous().view(torch.uint8).flatten())
    return found


def weights(model: Any) -> set[nn.Parameter]:
    """The frozen ones, packed."""
    held: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers(model)]
    return {layer.weight for layer in held}


def batch(step: int) -> Tensor:
    """What all processes see together."""
    return torch.randn(BATCH, 34, generator=torch.Generator().manual_seed(step))


def train(model: Any, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Bytes before and after some steps, the last output, and what trains."""
    before = stored(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step).chunk(processes)[rank]).square().mean().backward()
        optimizer.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "before": before,
        "after": stored(model),
        "output": model(batch(STEPS)).detach(),
        **{name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in trained.items()},
    }


def sharded(model: Any, **how: Any) -> Any:
    """The model, each layer and what is around them sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def refusal(kind: str) -> str:
    """What is said where FSDP casts bytes that were stored as floats."""
    model = sharded(make(kind, torch.float16), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        model(batch(0))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def main(path: Path) -> None:
    """Train as one of the processes; the first writes what was learnt."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for kind in ("ours", "peft"):
        found[f"{kind} refusal"] = refusal(kind)
        for name, (storage, packed_too) in CASES.items():
            model = make(kind, storage)
            try:
                sharded(model, ignored_params=None if packed_too else weights(model))
            except RuntimeError as error:
                found[f"{kind} {name}"] = str(error)
                continue
            found[f"{kind} {name}"] = train(model, rank, processes)
            assert kind == "ours" or all(isinstance(layer, Fused) for layer in layers(model))
    if rank == 0:
        torch.save(found, path)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
