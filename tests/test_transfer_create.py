"""Models by name: head, strategies, weights from files, errors before anything is built or changed."""

import copy
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision import models

from fastlora import LoRAConv2d, create_transfer_model, merge_adapters, remove_adapters
from fastlora.anatomy.stages import head as find_head
from fastlora.transfer.data import pretrained_transforms
from fastlora.transfer.models.efficientnet import efficientnet_lite0
from fastlora.transfer.strategies import STRATEGIES
from tests.cases import cases


def create(*given: Any, **options: Any) -> Any:
    return create_transfer_model(*given, **options)


def trainable(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = models.resnet18()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    model.eval()
    return model


SMALL = {
    "alexnet": 64, "resnet18": 32, "densenet121": 32, "efficientnet_b0": 32, "mobilenet_v3_small": 32,
    "mnasnet0_5": 32, "regnet_y_400mf": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "googlenet": 64,
    "inception_v3": 96, "convnext_tiny": 32, "swin_t": 32,
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), SMALL.items(), ids=SMALL.keys())
def test_a_new_head_for_every_family(name: str, size: int) -> None:
    model = create(name, 3, weights=None)
    assert model.training
    assert model(torch.randn(2, 3, size, size)).shape == (2, 3)
    assert len([p for p in model.parameters() if p.requires_grad]) == 2


SEED = [
    ("resnet50", "feature_extraction", {"fc"}),
    ("resnet50", "fine_tuning", {"fc", "layer4"}),
    ("vit_b_16", "feature_extraction", {"heads"}),
]


@pytest.mark.parametrize(("name", "strategy", "expected"), SEED)
def test_the_founding_signature(name: str, strategy: str, expected: set[str]) -> None:
    model = create(name, 7, strategy, weights=None)
    assert trainable(model) == expected


def test_fine_tuning_a_transformer_trains_its_last_block() -> None:
    model = create("vit_b_16", 7, "fine_tuning", weights=None)
    names = {n.rsplit(".", 3)[0] for n, p in model.named_parameters() if p.requires_grad}
    blocks = {n for n, p in model.encoder.layers.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in blocks} == {"encoder_layer_11"}
    assert names


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_and_keeps_the_rest(strategy: str) -> None:
    torch.manual_seed(0)
    model = create("dinov2_vits14", 3, strategy, image_size=28)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x, y = torch.randn(6, 3, 28, 28), torch.tensor([0, 1, 2] * 2)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_stages_to_fine_tune() -> None:
    model = create("resnet18", 2, "fine_tuning", weights=None, num_stages=3)
    assert trainable(model) == {"fc", "layer2", "layer3", "layer4"}


def test_batch_norm_on_purpose() -> None:
    model = create("resnet18", 2, weights=None, train_batch_norm=True)
    assert model.bn1.training
    assert not model.conv1.weight.requires_grad
    assert not create("resnet18", 2, weights=None).bn1.training
    assert create("resnet18", 2, "full", weights=None).bn1.training


def files(folder: Path, state: dict[str, Any]) -> dict[str, Path]:
    paths = {suffix: folder / f"weights{suffix}" for suffix in (".pt", ".safetensors")}
    torch.save(state, paths[".pt"])
    save_file(state, paths[".safetensors"])
    paths["nested"] = folder / "checkpoint.pt"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, paths["nested"])
    paths["headless"] = folder / "headless.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, paths["headless"])
    return paths


@pytest.mark.parametrize("kind", [".pt", ".safetensors", "nested", "headless"])
def test_weights_from_a_file(kind: str, resnet18: nn.Module, tmp_path: Path) -> None:
    path = files(tmp_path, resnet18.state_dict())[kind]
    model = create("resnet18", 3, weights=path)
    for name, value in resnet18.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(model.state_dict()[name], value), name


def test_files_that_do_not_fit(resnet18: nn.Module, tmp_path: Path) -> None:
    path = files(tmp_path, resnet18.state_dict())[".pt"]
    with pytest.raises(ValueError, match=r"another architecture .*missing: .*name the model"):
        create("resnet34", 3, weights=path)
    with pytest.raises(ValueError, match="of another shape"):
        create("wide_resnet50_2", 3, weights=_file_of("resnet50", tmp_path))
    with pytest.raises(FileNotFoundError, match=r"none at .*nowhere\.pt"):
        create("resnet18", 3, weights=tmp_path / "nowhere.pt")
    for name, content in {
        "torn.pt": path.read_bytes()[:5000],
        "empty.safetensors": b"",
        "text.pt": b"hello",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="can't be read"):
            create("resnet18", 3, weights=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="got list without tensors"):
        create("resnet18", 3, weights=tmp_path / "list.pt")


def _file_of(name: str, folder: Path) -> Path:
    torch.save(models.get_model(name, weights=None).state_dict(), folder / f"{name}.pt")
    return folder / f"{name}.pt"


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(
        ValueError, match=r"more than tensors and numbers; it could run code, so nothing of it was read"
    ):
        create("resnet18", 3, weights=tmp_path / "module.pt")


def test_a_failed_download_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(models, "get_model", fail)
    with pytest.raises(RuntimeError, match=r"resnet18 could not be downloaded .*no route.*weights=None"):
        create("resnet18", 3, weights="IMAGENET1K_V1")


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "model": (("resnet5O", 3), {}, ValueError, "did you mean 'resnet50'"),
    "model-alien": (("???", 3), {}, ValueError, "expected a classification model of torchvision"),
    "strategy": (("resnet18", 3, "fine_tunning"), {}, ValueError, "did you mean 'fine_tuning'"),
    "classes": (("resnet18", 1), {}, ValueError, "num_classes >= 2"),
    "weights": (("resnet18", 3), {"weights": "IMAGENET1K_V9"}, ValueError, "did you mean 'IMAGENET1K_V1'"),
    "weights-type": (("resnet18", 3), {"weights": 3}, TypeError, "a name, a path or None, got int"),
    "option": (("resnet18", 3), {"rank": 4}, TypeError, "strategy 'feature_extraction'; it has no options"),
    "lora-option": (("resnet18", 3, "lora"), {"rnak": 4}, TypeError, "its options are rank, alpha"),
    "image-size": (("resnet18", 3), {"image_size": 28}, TypeError, "image_size for dinov2_vits14 only"),
    "stages": (("resnet18", 3, "fine_tuning"), {"num_stages": 9, "weights": None}, ValueError, "from 0 to 5"),
    "no-blocks": (("resnet18", 3, "adapter"), {"weights": None}, ValueError, "expected transformer blocks"),
    "lite-weights": (("efficientnet_lite0", 3), {"weights": "V2"}, ValueError, "it has no others"),
    "dino-weights": (("dinov2_vits14", 3), {"weights": None}, ValueError, "it has no others"),
    "lora-norm": (
        ("vit_b_32", 3, "lora"),
        {"weights": None, "train_batch_norm": True},
        ValueError,
        "train_batch_norm=False",
    ),
}


@pytest.mark.parametrize(("given", "options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(
    given: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        create(*given, **options)


def test_timms_models() -> None:
    pytest.importorskip("timm", reason="builds a timm model, an optional package")
    model = create("timm:resnet10t", 3, "fine_tuning", weights=None)
    assert trainable(model) == {"fc", "layer4"}
    assert model.train()(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="did you mean 'timm:resnet50'"):
        create("timm:resnet5O", 3, weights=None)


def test_efficientnet_lite0_with_its_real_weights() -> None:
    """Real photographs get their ImageNet class, and BatchNorm stays as it was through training."""
    imagenet = efficientnet_lite0().eval()
    _, evaluate = pretrained_transforms("efficientnet_lite0")
    photographs = torch.stack([evaluate(Image.fromarray(p)) for p in load_sample_images().images])
    with torch.no_grad():
        palace_and_daisy = imagenet(photographs).argmax(1).tolist()
    assert palace_and_daisy == [698, 985]
    model = create("efficientnet_lite0", 3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    nn.functional.cross_entropy(model.train()(photographs), torch.tensor([0, 2])).backward()
    assert trainable(model) == {"classifier"}
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    "name", cases(["mobilenet_v3_small"], ["resnet18", "efficientnet_lite0", "densenet121"])
)
def test_lora_of_a_network_of_convolutions(name: str) -> None:
    torch.manual_seed(0)
    weights = "DEFAULT" if name == "efficientnet_lite0" else None
    model = create_transfer_model(name, 3, "lora", weights=weights, rank=2)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.train()
    model(images).square().sum().backward()
    trained = {part for part, p in model.named_parameters() if p.requires_grad}
    head = find_head(model)[0]
    assert {part for part in trained if "lora_" not in part} == {f"{head}.weight", f"{head}.bias"}
    untouched = [part for part in trained if model.get_parameter(part).grad is None]
    assert not untouched
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    plain_ones = [m for m in convolutions if m.groups == 1 and "Same" not in type(m).__name__]
    assert [m for m in convolutions if isinstance(m, LoRAConv2d)] == plain_ones
    model = model.double().eval()
    expected = model(images.double())
    plain = remove_adapters(merge_adapters(model))
    torch.testing.assert_close(plain(images.double()), expected)


class Mixed(nn.Module):
    """Convolutions, an attention among them, and a head."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 64, 3, groups=groups)
        self.mix = nn.MultiheadAttention(8, 2) if groups == 1 else nn.Identity()
        self.head = nn.Linear(64, 500)


def test_lora_counts_the_body_alone_and_takes_attentions_whole() -> None:
    model = Mixed()
    STRATEGIES["lora"].apply(model, "head", rank=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "head" not in name}
    assert {name.rpartition(".")[0] for name in trained} == {"conv", "mix", "mix.out_proj"}
    with pytest.raises(ValueError, match="expected a plain convolution or linear layer beside the head"):
        STRATEGIES["lora"].apply(Mixed(groups=4), "head")
