"""Compiled models: whole graphs, none compiled again for other rows, one for each other alpha or dropout."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

import fastlora
from fastlora.nn import LoRAModule
from tests.cases import cases
from tests.tuning_models import pretend


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers(*, dropout: float, **options: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))
    fastlora.apply_lora(model, rank=3, alpha=6, dropout=dropout, **options)
    moved(model)
    return model


def moved(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoRAModule):
            nn.init.normal_(module.lora_B, std=0.3)


def change(model: nn.Module, alpha: float, dropout: float) -> None:
    for module in model.modules():
        if isinstance(module, LoRAModule):
            module.alpha, module.lora_dropout = alpha, dropout


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad]))


def test_rows_change_without_compiling_again() -> None:
    model, counter = layers(dropout=0.0), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for rows in (5, 7, 3, 9):
        x = torch.randn(rows, 8)
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        torch.testing.assert_close(gradients(model, y), gradients(model, model(x)))
        first = first or counter.frame_count
    # a symbol for alpha is made a constant in a second graph
    assert counter.frame_count == first <= 2


@pytest.mark.parametrize(
    "values",
    [[(6.0, 0.0), (2.0, 0.0), (-4.0, 0.0)], [(6.0, 0.1), (6.0, 0.5), (6.0, 0.9)]],
    ids=["alpha", "dropout"],
)
def test_another_alpha_or_dropout_compiles_once(values: list[tuple[float, float]]) -> None:
    """As numbers in a graph do; those that were there before compile nothing."""
    model, counter = layers(dropout=values[0][1]), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 8)
    counts = []
    for alpha, dropout in values * 2:
        change(model, alpha, dropout)
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        expected = model(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients(model, y), gradients(model, expected))
        counts.append(counter.frame_count)
    # torch first takes a number for a constant, then for a symbol that its own checks make a constant again
    most = [1, 3, 4]
    assert all(count <= limit for count, limit in zip(counts, most, strict=False))
    assert counts[2:] == [counts[2]] * 4


def test_the_reference_compiles_too() -> None:
    model = layers(dropout=0.0)
    x = torch.randn(4, 8)
    with fastlora.use_backend("reference"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        change(model, 2.0, 0.0)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_and_checkpointing_together(dora: bool) -> None:
    """The recomputed forward repeats the mask: gradients equal those without checkpointing."""
    model = layers(dropout=0.4, dora=dora)
    x = torch.randn(6, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def recomputed(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    torch.manual_seed(3)
    found = gradients(model, recomputed(x))
    torch.manual_seed(3)
    torch.testing.assert_close(found, gradients(model, model(x)))


@pytest.mark.parametrize("dropout", cases([0.1], [0.0]))
def test_a_vision_transformer_trains_in_one_graph(dropout: float) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads[0].weight)
    fastlora.apply_lora(model, rank=2, dropout=dropout, modules_to_save=["heads"])
    moved(model)
    other, x, labels = copy.deepcopy(model), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])

    def step(model: Any, images: Tensor) -> list[Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        torch.manual_seed(5)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return [loss.detach(), *(p.detach() for p in trained)]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for image in (x, x * 2):
        torch.testing.assert_close(step(compiled, image), step(other, image), rtol=1e-4, atol=1e-5)


def test_channels_last() -> None:
    """A convolution keeps the memory format it is given, compiled or not."""
    model = fastlora.apply_lora(
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)), target_modules=["0", "1"], rank=2
    ).to(memory_format=torch.channels_last)
    moved(model)
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    images = x.to(memory_format=torch.channels_last)
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = call(images)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("adapter", [False, True], ids=["lora", "adapter"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_kernels_in_one_graph_for_any_number_of_rows(
    dropout: float, adapter: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is chosen inside the op, by the rows of each call: the graph knows nothing of it."""
    pretend(monkeypatch)
    monkeypatch.setattr("fastlora._core.backend._automatic", lambda device, dtype: "triton")
    model: Any = fastlora.AdapterLayer(32, 16, dropout=dropout) if adapter else fastlora.LoRALinear(
        32, 48, rank=16, dropout=dropout
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = model.to(kernel_device, torch.float16)
    counter, first = CompileCounter(), 0
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (24, 40, 72):
        x = torch.randn(rows, 32, device=kernel_device, dtype=torch.float16)
        results = []
        for call in (model, compiled):
            torch.manual_seed(0)
            model.zero_grad()
            call(x).float().square().mean().backward()
            results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(results[0]) == (4 if adapter else 2)
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        first = first or counter.frame_count
    # a symbol for alpha is made a constant in a second graph
    assert counter.frame_count == first <= 2
