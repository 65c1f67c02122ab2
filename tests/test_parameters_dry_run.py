"""parameter_report's forward pass: shapes give what values give, and nothing changes."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import parameter_report
from fastlora.inject.adapters import apply_adapters
from fastlora.inject.prompts import apply_prompts
from tests.lora_models import Snapshot, mlp, tiny_vit

ROWS, WIDE, OUT = 5, 8, 4
X = ROWS * WIDE * 4


def kept_both_ways(model: nn.Module, sample_input: tuple[int, ...]) -> int:
    report = parameter_report(model, sample_input=sample_input)
    assert report.kept_bytes is not None
    assert report == parameter_report(model, sample_input=sample_input, execute=True)
    return report.kept_bytes


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y.exp() if x.sum().item() >= 0 else y


def adapted() -> nn.Module:
    model: nn.Module = tiny_vit()
    return apply_adapters(model, adapter_size=2, modules_to_save=["head"])


def prompted() -> nn.Module:
    model: nn.Module = tiny_vit()
    return apply_prompts(model, num_tokens=3, deep=True)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))


IMAGES = (2, 3, 8, 8)
MODELS: list[Callable[[], nn.Module]] = [
    convolutions,
    tiny_vit,
    lambda: fastlora.apply_lora(tiny_vit(), rank=2, dropout=0.1),
    adapted,
    prompted,
]
IDS = ["convolutions", "vit", "lora", "adapters", "prompts"]


@pytest.mark.parametrize("make", MODELS, ids=IDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_shapes_alone_give_what_values_give(make: Callable[[], nn.Module], training: bool) -> None:
    assert kept_both_ways(make().train(training), IMAGES) > 0


@pytest.mark.parametrize("execute", [False, True], ids=["shapes", "values"])
@pytest.mark.parametrize("make", MODELS, ids=IDS)
def test_nothing_changes(make: Callable[[], nn.Module], execute: bool) -> None:
    model = nn.Sequential(make(), nn.Dropout(0.5))
    seen: list[str] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    versions = [buffer._version for buffer in model.buffers()]
    before = Snapshot(model)
    for sample_input in (IMAGES, (2, 7)):
        if sample_input == IMAGES:
            parameter_report(model, sample_input=sample_input, execute=execute)
        else:
            with pytest.raises(ValueError, match="it fails with"):
                parameter_report(model, sample_input=sample_input, execute=execute)
        before.assert_unchanged()
        assert [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()] == hooks
        assert all((p.grad == 1).all() for p in model.parameters() if p.grad is not None)
        assert sum(p.grad is not None for p in model.parameters()) == sum(
            p.requires_grad for p in model.parameters()
        )
    # a hook of the user's runs once, since the second pass fails before it
    assert seen == ["Dropout"]
    if not execute:
        assert [buffer._version for buffer in model.buffers()] == versions


def test_statistics_that_no_pass_changes_are_left_alone() -> None:
    """Somebody's graph may hold a buffer in the version it has."""
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.BatchNorm1d(WIDE)).eval()
    x = torch.randn(ROWS, WIDE)
    loss = model(x).sum()
    parameter_report(model, sample_input=x, execute=True)
    torch.autograd.backward(loss)


def test_no_graph_outlives_the_report() -> None:
    """An operation that saves its own result must not be held by it."""
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Sigmoid())
    alive: list[weakref.ref[Tensor]] = []
    model[1].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    parameter_report(model, sample_input=(ROWS, WIDE), execute=True)
    assert [reference() for reference in alive] == [None]


def test_a_model_that_looks_at_values() -> None:
    model = LooksAtValues()
    with pytest.raises(
        ValueError, match="a model that looks at values, or can't be copied, needs execute=True"
    ):
        parameter_report(model, sample_input=(ROWS, WIDE))
    report = parameter_report(model, sample_input=(ROWS, WIDE), execute=True)
    # x for the layer, and the result of exp
    assert report.kept_bytes == 2 * X
    x = torch.full((ROWS, WIDE), -1.0)
    assert parameter_report(model, sample_input=x, execute=True).kept_bytes == X


def test_a_compiled_part_runs_as_written() -> None:
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, OUT))
    plain = kept_both_ways(model, (ROWS, WIDE))
    model[0].compile(backend="eager")
    assert kept_both_ways(model, (ROWS, WIDE)) == plain


def test_bad_input(capfd: pytest.CaptureFixture[str]) -> None:
    model = mlp()
    for wrong in ("abc", 3, (), (-1, 12)):
        with pytest.raises(TypeError, match="expected sample_input as a tensor, a shape"):
            parameter_report(model, sample_input=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected sample_input to be what Sequential can run on"):
        parameter_report(model, sample_input=(2, 7))
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match=r"expected weights and inputs with values for execute=True"):
        parameter_report(model.to("meta"), sample_input=(2, 12), execute=True)
    with pytest.raises(ValueError, match=r"leave execute out"):
        parameter_report(mlp(), sample_input=torch.zeros(2, 12, device="meta"), execute=True)
