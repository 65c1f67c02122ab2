"""Bottleneck adapters under FSDP2 and autocast, and in a graph of torch.fx."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision.models.feature_extraction import create_feature_extractor

import fastlora
from tests.adapter_models import CASES, Case, adapted
from tests.lora_models import Snapshot, tiny_vit

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"scale": "learned", "layer_norm": "pre", "placement": "houlsby"}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process that shards as many would."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_model_computes_trains_and_saves_the_same(mesh: DeviceMesh, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = adapted(tiny_vit(), **SETTINGS)
    torch.manual_seed(0)
    sharded = adapted(tiny_vit(), **SETTINGS)
    for layer in sharded.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert torch.equal(sharded(IMAGES), plain(IMAGES))
    torch.autograd.backward([sharded(IMAGES).sum(), plain(IMAGES).sum()])
    for name, parameter in plain.named_parameters():
        gradient = sharded.get_parameter(name).grad
        assert (gradient is None) == (parameter.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(gradient.full_tensor(), parameter.grad)
    for name, model in (("plain", plain), ("sharded", sharded)):
        fastlora.save_adapter(model, tmp_path / name)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "sharded" / file.name).read_bytes()


def test_adding_adapters_after_sharding_is_refused(mesh: DeviceMesh) -> None:
    model = tiny_vit()
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match="plain Parameter, got DTensor; add adapters before sharding"):
        fastlora.apply_adapters(model)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("layer_norm", [None, "pre", "post"])
def test_under_autocast(case: Case, layer_norm: Any) -> None:
    model = adapted(case.make(), layer_norm=layer_norm, scale="learned")
    expected = case.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.run(model)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.3)
    torch.autograd.backward(out.float().square().sum())
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable)


def test_a_traced_graph_runs_each_adapter_once() -> None:
    model: nn.Module = adapted(tiny_vit())
    node = "encoder.layers.encoder_layer_1.add_1"
    # tracing can't see whether attention returns a tuple
    leaves: dict[str, Any] = {"leaf_modules": [fastlora.AdaptedModule]}
    extractor: Any = create_feature_extractor(model, [node], tracer_kwargs=leaves)
    kept: list[torch.Tensor] = []
    model.get_submodule("encoder.layers.encoder_layer_1").register_forward_hook(lambda *a: kept.append(a[2]))
    model(IMAGES)
    torch.testing.assert_close(extractor(IMAGES)[node], kept[0])


def test_a_refused_request_leaves_the_generator_alone() -> None:
    model = tiny_vit()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="to be 'houlsby'"):
        fastlora.apply_adapters(model, placement="sequential")
    before.assert_unchanged()
