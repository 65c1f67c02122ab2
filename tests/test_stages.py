"""Stages and head of real architectures: nothing in two stages, nothing in none."""

import pytest
from torch import nn
from torchvision import models

from fastlora.anatomy.stages import head, stages
from tests.adapter_models import timm_vit

FAMILIES = {
    "alexnet": ("classifier.6", 4, "classifier.1"),
    "vgg16_bn": ("classifier.6", 6, "classifier.0"),
    "resnet18": ("fc", 5, "layer4"),
    "densenet121": ("classifier", 5, "features.denseblock4"),
    "efficientnet_b0": ("classifier.1", 8, "features.7"),
    "mobilenet_v2": ("classifier.1", 18, "features.17"),
    "mnasnet0_5": ("classifier.1", 7, "layers.13"),
    "regnet_x_400mf": ("fc", 5, "trunk_output.block4"),
    "shufflenet_v2_x0_5": ("fc", 4, "stage4"),
    "squeezenet1_1": ("classifier.1", 9, "features.12"),
    "convnext_tiny": ("classifier.2", 5, "features.7"),
    "swin_t": ("head", 5, "features.7"),
    "maxvit_t": ("classifier.5", 5, "blocks.3"),
    "vit_b_32": ("heads.head", 13, "encoder.layers.encoder_layer_11"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_one_stage(name: str) -> None:
    model = models.get_model(name, weights=None)
    head_name, layer = head(model)
    found = stages(model, layer)
    assert (head_name, len(found), found[-1].name) == FAMILIES[name]
    parameters = [id(p) for stage in found for p in stage.all_parameters()]
    heads = set(map(id, layer.parameters()))
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == set(map(id, model.parameters())) - heads


def test_stages_come_from_input_to_output() -> None:
    model = models.resnet18()
    found = stages(model, model.fc)
    assert [stage.name for stage in found] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert found[0].modules[0] is model.conv1
    assert list(found[-1].modules) == [model.layer4, model.avgpool]


def test_a_transformers_tokens_are_in_its_stem_and_its_last_norm_in_the_last_block() -> None:
    model = models.vit_b_32()
    found = stages(model, model.heads.head)
    assert {id(p) for p in found[0].parameters} == {id(model.class_token), id(model.encoder.pos_embedding)}
    assert model.encoder.ln in found[-1].modules


def test_timms_models() -> None:
    model = timm_vit()
    found = stages(model, head(model)[1])
    assert [stage.name for stage in found] == ["stem", *(f"blocks.{i}" for i in range(len(found) - 1))]


def test_plain_networks_are_cut_at_their_poolings() -> None:
    def convolution() -> nn.Module:
        return nn.Conv2d(3, 3, 3)

    model = nn.Sequential(convolution(), nn.ReLU(), nn.MaxPool2d(2), convolution(), convolution())
    assert [(stage.name, len(stage.modules)) for stage in stages(model)] == [("0", 3), ("3", 2)]


def test_a_model_without_layers_has_no_stages() -> None:
    assert stages(nn.ReLU()) == []


def test_one_layer_is_one_stage() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    assert [stage.name for stage in stages(model)] == ["0"]
    assert sum(p.numel() for p in stages(model)[0].all_parameters()) == 16


def test_a_model_without_head() -> None:
    with pytest.raises(ValueError, match="expected a head called heads, head, fc, classifier"):
        head(nn.Sequential(nn.Linear(2, 2)))
