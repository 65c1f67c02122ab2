"""The backbone with a new classifier: any output, right freezing, real training."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fastlora.transfer.models.freezing import keep_frozen_in_eval
from fastlora.transfer.models.wrapper import TransferLearningModel


class Wrapped(nn.Module):
    """A small network whose output is put into something else."""

    def __init__(self, wrap: Callable[[Tensor], Any], channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.body(x))


def resnet(**settings: Any) -> TransferLearningModel:
    torch.manual_seed(0)
    backbone = models.resnet18()
    backbone.fc = nn.Identity()
    return TransferLearningModel(backbone, 4, **settings)


def trainable_stages(model: TransferLearningModel) -> list[str]:
    return [stage.name for stage in model.stages if all(p.requires_grad for p in stage.all_parameters())]


def train_steps(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for step in range(steps):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 3 + 1
        loss = nn.functional.cross_entropy(model(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "feature-map": lambda y: y,
    "vector": lambda y: y.mean((2, 3)),
    "tokens": lambda y: y.flatten(2).transpose(1, 2),
    "tuple": lambda y: (y, "auxiliary"),
    "list": lambda y: [y.mean((2, 3)), y],
    "dict": lambda y: {"aux": y[:, :1], "out": y},
    "hugging-face": lambda y: {"last_hidden_state": y.flatten(2).mT, "pooler_output": y.mean((2, 3))},
    "single-pixel": lambda y: y.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_any_output(wrap: Callable[[Tensor], Any]) -> None:
    model = TransferLearningModel(Wrapped(wrap), 3)
    x = torch.randn(2, 3, 20, 20)
    expected = model.eval().backbone.get_submodule("body")(x).mean((2, 3))
    torch.testing.assert_close(model.features(x), expected)
    torch.testing.assert_close(model(x), model.classifier(expected))


@pytest.mark.parametrize("channels", [1, 5])
def test_the_dry_run_asks_the_first_layer_for_its_channels(channels: int) -> None:
    assert TransferLearningModel(Wrapped(lambda y: y, channels), 3).num_features == 6


def test_backbones_of_vectors_series_and_volumes() -> None:
    assert TransferLearningModel(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), 2).num_features == 5
    series = nn.Sequential(nn.Conv1d(2, 9, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    assert TransferLearningModel(series, 2).num_features == 9
    volumes = TransferLearningModel(nn.Conv3d(1, 6, 3), 2, sample_input=torch.zeros(1, 1, 5, 5, 5))
    assert volumes(torch.zeros(2, 1, 4, 5, 6)).shape == (2, 2)


def test_the_dry_run_leaves_no_trace() -> None:
    backbone = Wrapped(lambda y: nn.functional.dropout(y)).train()
    backbone.body[1].eval()
    before = copy.deepcopy(backbone.state_dict())
    random_state = torch.get_rng_state()
    modes = [module.training for module in backbone.modules()]
    TransferLearningModel(backbone, 2, freeze_backbone=False)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    # only the classifier's own initial values were drawn
    after = torch.get_rng_state()
    torch.set_rng_state(random_state)
    nn.Linear(6, 2)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_classifier_follows_dtype() -> None:
    assert TransferLearningModel(Wrapped(lambda y: y).double(), 2).classifier.weight.dtype == torch.float64


def test_unfreezing_counts_stages() -> None:
    model = resnet()
    assert trainable_stages(model) == []
    assert model.unfreeze_layers(2) == ["layer3", "layer4"] == trainable_stages(model)
    assert model.unfreeze_layers(5) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert all(p.requires_grad for p in model.parameters())
    model.freeze()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_unfrozen_from_the_start_on_request() -> None:
    assert all(p.requires_grad for p in resnet(freeze_backbone=False).parameters())


@pytest.mark.parametrize("count", [-1, 6, 1.0, True])
def test_more_stages_than_there_are_change_nothing(count: Any) -> None:
    model = resnet()
    model.unfreeze_layers(1)
    with pytest.raises(ValueError, match=r"from 0 to 5.*stem, layer1, layer2, layer3, layer4"):
        model.unfreeze_layers(count)
    assert trainable_stages(model) == ["layer4"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_frozen_stages_stay_bit_identical_and_in_eval(count: int) -> None:
    model = resnet()
    names = model.unfreeze_layers(count)
    before = copy.deepcopy(model.state_dict())
    train_steps(model)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    layers = {name.removeprefix("backbone.").split(".")[0] for name in moved}
    assert layers == {"classifier", *names}
    # statistics of what trains do move
    assert any("running_mean" in name for name in moved) == bool(count)
    modes = {stage.name: stage.modules[0].training for stage in model.stages}
    assert modes == {stage.name: stage.name in names for stage in model.stages}


def test_a_frozen_backbone_gives_the_same_in_train_and_eval() -> None:
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_batch_norm_trains_on_purpose_only() -> None:
    model = resnet(train_batch_norm=True)
    before = copy.deepcopy(model.state_dict())
    train_steps(model)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    assert "backbone.bn1.running_mean" in moved
    assert "backbone.bn1.weight" in moved
    assert "backbone.conv1.weight" not in moved


def test_statistics_without_weights_stay_beside_frozen_weights() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(2))
    model = TransferLearningModel(backbone, 2, sample_input=torch.zeros(1, 3, 8, 8)).train()
    assert not backbone[1].training
    model.unfreeze_layers(len(model.stages))
    assert model.train() is model
    assert backbone[1].training


def test_dropout_of_frozen_parts_is_off_and_of_others_on() -> None:
    backbone = models.vit_b_32(dropout=0.5)
    model = keep_frozen_in_eval(backbone.requires_grad_(False)).train()
    block = model.encoder.layers[0]
    assert not block.dropout.training
    block.mlp.requires_grad_(True)
    model.train()
    assert block.dropout.training
    assert block.mlp[2].training
    assert not block.ln_1.training


def test_a_kept_model_copies_pickles_and_stays_what_it_was() -> None:
    model = keep_frozen_in_eval(models.resnet18().requires_grad_(False))
    assert isinstance(model, models.ResNet)
    assert type(model).__name__ == "ResNet"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), keep_frozen_in_eval(model)):
        assert isinstance(other, type(model))
        assert not other.train().bn1.training
        assert torch.equal(other.conv1.weight, model.conv1.weight)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_classes >= 2, got 1"):
        TransferLearningModel(Wrapped(lambda y: y), 1)
    with pytest.raises(TypeError, match="num_classes as an integer"):
        TransferLearningModel(Wrapped(lambda y: y), "3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected backbone to be an nn\.Module, got str"):
        TransferLearningModel("resnet50", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="return floating-point features"):
        TransferLearningModel(Wrapped(lambda y: y.argmax(1)), 3)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(17, 3)).train()
    backbone.insert(0, nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="give a batch of yours as sample_input"):
        TransferLearningModel(backbone, 3)
    assert backbone.training
