"""FSDP2: parameters are whole only inside their module's forward, and files hold them whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastlora
from tests.lora_models import tiny_vit, trained


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process that shards as many would."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_model_computes_trains_and_saves_the_same(mesh: DeviceMesh, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = trained(tiny_vit())
    torch.manual_seed(0)
    sharded = trained(tiny_vit())
    for layer in sharded.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(sharded(images), plain(images))
    torch.autograd.backward([sharded(images).sum(), plain(images).sum()])
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
    with pytest.raises(TypeError, match=r"(?s)plain Parameter, got DTensor; add LoRA before sharding"):
        fastlora.apply_lora(model)
