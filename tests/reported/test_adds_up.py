"""Tables of parameters add up: rows to totals, and what is tied counts once."""

from collections.abc import Callable

import pytest
from torch import nn
from torchvision import models

import fastlora
from fastlora.cli.params import _cells
from fastlora.parameters.report import folded
from fastlora.transfer.costs import CostSettings, compare
from fastlora.transfer.models.weightless import ModelSpec


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    model: nn.Module = transformers.BertForMaskedLM(config)
    return model


def llama() -> nn.Module:
    """Its head is its embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: models.VisionTransformer(32, 16, 2, 2, 32, 64),
    "resnet": models.resnet18,
    "bert": bert,
    "llama": llama,
}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_rows_add_up_to_the_totals(make: Callable[[], nn.Module], adapted: bool) -> None:
    model = make()
    if adapted:
        fastlora.apply_lora(model, rank=2)
    report = fastlora.parameter_report(model)
    once = {id(parameter): parameter for parameter in model.parameters()}.values()
    total = sum(parameter.numel() for parameter in once)
    trained = sum(parameter.numel() for parameter in once if parameter.requires_grad)
    rows = [[int(cell.replace(",", "")) for cell in row[2:4]] for row in folded(report.modules)]
    assert [sum(column) for column in zip(*rows, strict=True)] == [total, trained]
    assert f"{trained:,} of {total:,} parameters train" in str(report)
    assert (report.trainable_parameters, report.total_parameters) == (trained, total)
    parts = report.weight_bytes + report.buffer_bytes + report.gradient_bytes + report.optimizer_bytes
    assert report.training_bytes == parts


def test_what_two_modules_share_counts_once() -> None:
    first, second = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
    second.weight = first.weight
    report = fastlora.parameter_report(nn.Sequential(first, second))
    assert (report.trainable_parameters, report.total_parameters) == (6, 6)


def test_a_line_of_params_adds_up() -> None:
    """Of a model whose buffers are as large as its weights too."""
    (cost,) = compare(ModelSpec("resnet18", batch_size=1), CostSettings(), ["full"])
    assert cost.report is not None
    sizes = [float(cell.replace(",", "")) for cell in _cells(cost, 2**10, False)[3:]]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=2)
