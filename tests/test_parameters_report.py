"""parameter_report: counts, bytes and tables against numbers worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchao.quantization import Int8Tensor, PerRow

import fastlora
from fastlora import ParameterReport, parameter_report
from tests.lora_models import mlp, tiny_vit
from tests.quantised import four_bit


class Tied(nn.Module):
    """A language model in small: the output layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 11)
        self.output.weight = self.embedding.weight


def test_counts_and_bytes_of_a_small_model() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    report = parameter_report(model)
    frozen, trainable = 12 * 10 + 10, 10 * 8 + 8 * 3 + 3
    assert report.total_parameters == frozen + trainable
    assert report.trainable_parameters == trainable
    assert report.trainable_percent == pytest.approx(100 * trainable / (frozen + trainable))
    assert report.weight_bytes == 4 * (frozen + trainable)
    assert report.gradient_bytes == 4 * trainable
    # two moments, and a float32 step count for each of three tensors
    assert report.optimizer_bytes == 2 * 4 * trainable + 3 * 4
    assert report.kept_bytes is None
    assert report.training_bytes == 4 * (frozen + 4 * trainable) + 12
    assert [(row.name, row.kind, row.parameters, row.trainable_parameters) for row in report.modules] == [
        ("0", "Linear", 130, 0),
        ("2", "Linear", 80, 80),
        ("head", "Linear", 27, 27),
    ]


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bytes_are_those_of_real_gradients_and_of_adamws_real_state(
    dtype: torch.dtype, default: torch.dtype
) -> None:
    """The step count's dtype follows torch's default dtype, the moments' the parameter's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        model = fastlora.apply_lora(mlp(dtype), rank=2, modules_to_save=["head"])
        report = parameter_report(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        torch.autograd.backward(model(torch.randn(4, 12, dtype=dtype)).sum())
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    assert report.optimizer_bytes == sum(tensor.nbytes for tensor in state)
    assert report.gradient_bytes == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert report.weight_bytes == sum(p.nbytes for p in model.parameters())


def test_shared_parameters_count_once() -> None:
    report = parameter_report(Tied())
    assert report.total_parameters == 11 * 4 + (4 * 4 + 4) + 11
    assert report.optimizer_bytes == 2 * 4 * report.total_parameters + 4 * 4
    assert [(row.name, row.parameters) for row in report.modules] == [
        ("embedding", 44),
        ("hidden", 20),
        ("output", 11),
    ]
    # and a module under two names has one row
    linear = nn.Linear(3, 3)
    assert len(parameter_report(nn.Sequential(linear, nn.ReLU(), linear)).modules) == 1


def test_buffers_are_no_parameters() -> None:
    report = parameter_report(nn.BatchNorm1d(6))
    assert report.total_parameters == 12
    # mean, variance and the count of batches, an int64
    assert report.buffer_bytes == 2 * 6 * 4 + 8
    assert report.training_bytes == report.buffer_bytes + 4 * 12 * 4 + 2 * 4


def test_a_model_without_parameters() -> None:
    report = parameter_report(nn.ReLU(), sample_input=(2, 3))
    assert (report.total_parameters, report.trainable_percent, report.training_bytes) == (0, 0.0, 0)
    assert report.modules == ()
    assert "0 of 0 parameters train (0 %)" in str(report)


def test_rows_add_up_to_the_sums() -> None:
    model = fastlora.apply_lora(tiny_vit(), rank=2, modules_to_save=["head"])
    report = parameter_report(model, sample_input=(3, 3, 8, 8))
    assert sum(row.parameters for row in report.modules) == report.total_parameters
    assert sum(row.trainable_parameters for row in report.modules) == report.trainable_parameters
    assert sum(row.kept_bytes or 0 for row in report.modules) == report.kept_bytes
    summary = fastlora.adapter_summary(model)
    assert summary.trainable_parameters == report.trainable_parameters
    assert summary.total_parameters == report.total_parameters


def test_meta_weights_count_as_real_ones() -> None:
    with torch.device("meta"):
        model = tiny_vit()
    images = torch.empty(3, 3, 8, 8)
    expected = parameter_report(tiny_vit(), sample_input=images)
    assert parameter_report(model, sample_input=images) == expected
    assert parameter_report(model, sample_input=images.to("meta")) == expected
    assert all(p.is_meta for p in model.parameters())


def test_a_model_of_seven_billion_parameters_needs_no_memory() -> None:
    transformers = pytest.importorskip("transformers", reason="LLaMA's shape comes from transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    tokens = torch.zeros(2, 16, dtype=torch.long)
    report = parameter_report(model, sample_input={"input_ids": tokens})
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert report.total_parameters == 2 * 32000 * 4096 + 32 * block + 4096 == 6_738_415_616
    assert report.optimizer_bytes == 4 * report.total_parameters + 4 * len(list(model.parameters()))
    # each of three products of the MLP keeps an input, gate and up the same one
    rows = {row.name: row.kept_bytes for row in report.modules}
    assert rows["model.layers.31.mlp.down_proj"] == 2 * 16 * 11008 * 2
    assert report.kept_bytes is not None
    assert report.kept_bytes > 32 * 2 * 16 * (4096 * 4 + 11008 * 3) * 2


def test_the_table_folds_alike_modules() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(12)), nn.Linear(4, 2))
    lines = str(parameter_report(model)).splitlines()
    assert lines[0].split() == ["Module", "Kind", "Parameters", "Trainable", "Kept"]
    assert lines[1].split() == ["[0-11].0", "x", "12", "Linear", "240", "240"]
    assert lines[2].split() == ["12", "Linear", "10", "10"]
    assert lines[3] == "250 of 250 parameters train (100 %)"
    assert lines[4] == "weights 1000 B + buffers 0 B + gradients 1000 B + AdamW 2.1 KiB = 4.0 KiB"


def test_json_has_every_number() -> None:
    report = parameter_report(mlp(), sample_input=(2, 12))
    record = report.as_json()
    rows = record.pop("modules")
    derived = {name: record.pop(name) for name in ("trainable_percent", "training_bytes")}
    assert derived == {"trainable_percent": 100.0, "training_bytes": report.training_bytes}
    assert ParameterReport(**record, modules=report.modules) == report
    assert [row["kept_bytes"] for row in rows] == [row.kept_bytes for row in report.modules]


@pytest.mark.parametrize(
    "wrap",
    [lambda m: torch.compile(m, backend="eager"), nn.DataParallel],
    ids=["compiled", "data-parallel"],
)
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp()
    plain = parameter_report(model, sample_input=(2, 12))
    assert parameter_report(wrap(model), sample_input=(2, 12)) == plain


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got dict"):
        parameter_report({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lazy modules, '0\.weight' first; run one batch"):
        parameter_report(nn.Sequential(nn.LazyLinear(4)))


def test_quantised_weights_count_as_what_they_stand_for() -> None:
    """In the bytes that are stored: half a byte a scalar, a byte a block, and the statistics of those."""
    eight = nn.Linear(64, 48, bias=False)
    eight.weight = nn.Parameter(Int8Tensor.from_hp(eight.weight.detach(), PerRow()), requires_grad=False)
    model = fastlora.apply_lora(nn.Sequential(four_bit(64, 32), eight), rank=2)
    report = parameter_report(model)
    packed = 64 * 32 // 2 + 64 * 32 // 64 + 4 + 256 * 4 + 4
    assert report.weight_bytes == packed + 64 * 4 + 48 * 64 + 48 * 4 + report.gradient_bytes
    frozen = 64 * 32 + 64 + 48 * 64
    assert report.total_parameters == frozen + report.trainable_parameters
    assert sum(row.parameters for row in report.modules) == report.total_parameters
