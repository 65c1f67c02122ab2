"""PiSSA, OLoRA and EVA: their definitions, the frozen first output, files for the plain weight."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import fastlora
from fastlora import LoRALinear
from fastlora.nn import LoRAModule

STARTS: dict[str, Callable[..., Any]] = {
    "pissa": fastlora.init.pissa_,
    "pissa-fast": lambda model: fastlora.init.pissa_(model, niter=8),
    "olora": fastlora.init.olora_,
}


def make() -> Any:
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))


def adapted(base: nn.Module, **options: Any) -> Any:
    return fastlora.apply_lora(copy.deepcopy(base), **({"rank": 3, "alpha": 5.0} | options))


def train(model: Any, x: Tensor) -> Any:
    """Two steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_the_output_is_the_frozen_models_at_first(start: Callable[..., Any]) -> None:
    base, x = make(), torch.randn(5, 12)
    model = start(adapted(base))
    torch.testing.assert_close(model(x), base(x))
    assert torch.equal(model[0].weight, base[0].weight)
    before = model[0].lora_A.clone()
    train(model, x)
    assert not torch.equal(model[0].lora_A, before)
    assert not torch.allclose(model(x), base(x))
    assert sum(p.requires_grad for p in model.parameters()) == 4


@pytest.mark.parametrize("name", ["pissa", "pissa-fast"])
def test_pissa_takes_the_principal_part(name: str) -> None:
    base = make()
    layer = STARTS[name](adapted(base))[2]
    left, values, right = torch.linalg.svd(base[2].weight.detach())
    part = (left[:, :3] * values[:3]) @ right[:3]
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, part, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_A.norm(dim=1), (values[:3] / layer.scaling).sqrt())


def test_olora_takes_orthonormal_columns() -> None:
    base = make()
    layer = fastlora.init.olora_(adapted(base))[2]
    orthonormal, upper = torch.linalg.qr(base[2].weight.detach())
    product = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(product, orthonormal[:, :3] @ upper[:3])
    gram = layer.scaling * layer.lora_B.t() @ layer.lora_B
    torch.testing.assert_close(gram, torch.eye(3))


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_it_learns_as_with_a_changed_weight(start: Callable[..., Any], rslora: bool) -> None:
    """PiSSA as published: the frozen weight without the start, and a plain update."""
    base, x = make().double(), torch.randn(5, 12).double()
    model = start(adapted(base, rslora=rslora))
    published = adapted(base, rslora=rslora)
    with torch.no_grad():
        for ours, theirs in ((model[i], published[i]) for i in (0, 2)):
            theirs.lora_A.copy_(ours.lora_A)
            theirs.lora_B.copy_(ours.lora_B)
            theirs.weight = nn.Parameter(
                theirs.weight - theirs.scaling * ours.lora_B @ ours.lora_A, requires_grad=False
            )
    train(model, x), train(published, x)
    torch.testing.assert_close(model(x), published(x))


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_the_file_is_plain_lora_of_twice_the_rank(tmp_path: Path, rslora: bool) -> None:
    base, x = make(), torch.randn(5, 12)
    model = train(fastlora.init.pissa_(adapted(base, rslora=rslora)), x)
    fastlora.save_adapter(model, tmp_path)
    plain = fastlora.load_adapter(copy.deepcopy(base), tmp_path)
    assert isinstance(plain[0], LoRALinear)
    assert plain[0].rank == 6
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    again = fastlora.load_adapter(fastlora.init.pissa_(adapted(base, rslora=rslora)), tmp_path)
    assert torch.equal(again(x), model(x))
    assert again[0].scaling == pytest.approx(model[0].scaling)


def test_merged_switched_moved_and_reset() -> None:
    base, x = make(), torch.randn(5, 12)
    model = train(fastlora.init.pissa_(adapted(base)), x)
    expected = model(x)
    other = adapted(base)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    fastlora.add_adapter(model, "b")
    torch.testing.assert_close(fastlora.set_adapter(model, "b")(x), base(x))
    fastlora.add_weighted_adapter(model, ["default", "b"], [1.0, 1.0], "both", "cat")
    torch.testing.assert_close(fastlora.set_adapter(model, "both")(x), expected)
    assert torch.equal(fastlora.set_adapter(model, "default")(x), expected)
    torch.testing.assert_close(fastlora.merge_adapters(model)(x), expected)
    fastlora.unmerge_adapters(model)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected)
    for layer in (model[0], model[2]):
        layer.reset_lora_parameters()
    assert torch.equal(model(x), base(x))
    for name in ("b", "both"):
        fastlora.delete_adapter(model, name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), base(x))


def test_attention_and_wrapped_layers() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    x = torch.randn(4, 2, 8)
    expected = model(x)
    fastlora.init.olora_(fastlora.apply_lora(model, rank=2))
    torch.testing.assert_close(model(x), expected)
    wrapped: Any = nn.Sequential(fastlora.LoRALayer(nn.Linear(6, 5), rank=2))
    plain = wrapped[0].original_layer(torch.ones(3, 6))
    torch.testing.assert_close(fastlora.init.pissa_(wrapped)(torch.ones(3, 6)), plain)


def test_half_precision_starts_to_the_bit() -> None:
    base = make().bfloat16()
    x = torch.randn(5, 12).bfloat16()
    error = (fastlora.init.pissa_(adapted(base))(x) - base(x)).abs().max()
    assert error <= 2**-7 * base(x).abs().max()


def test_eva_takes_the_directions_of_the_inputs() -> None:
    base = make()
    batches = [torch.randn(20, 12) * torch.linspace(0.1, 2, 12) for _ in range(4)]
    model = fastlora.init.eva_(adapted(base).train(), batches)
    assert model.training
    assert torch.equal(model(batches[0]), base(batches[0]))
    rows = torch.cat(batches)
    for layer, inputs in ((model[0], rows), (model[2], torch.tanh(base[0](rows)))):
        _, _, directions = torch.linalg.svd(inputs.detach(), full_matrices=False)
        found = layer.lora_A @ directions.t()
        torch.testing.assert_close(found.square().sum(), torch.tensor(3.0), rtol=0.0, atol=1e-4)
        # batch by batch is nearly, not exactly, all at once
        assert found[:, :3].square().sum() > 2.99


def test_eva_redistributes_ranks() -> None:
    """The first layer reads one direction alone, the second many: it gets the ranks."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    fastlora.apply_lora(model, rank=4, alpha=8.0)
    with torch.no_grad():
        model[0].weight.mul_(3)
    line = torch.randn(1, 12)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Any:
            return self.layers[0](x[:, :1] * line + 1e-3 * x), self.layers[1](x[:, :10])

    fastlora.init.eva_(Both(), [torch.randn(50, 12)], rho=2)
    assert (model[0].rank, model[1].rank) == (1, 7)
    assert (model[0].scaling, model[1].scaling) == (2.0, 2.0)
    assert model[1].lora_A.shape == (7, 10)
    assert all(layer.lora_A.requires_grad for layer in model)


@pytest.mark.parametrize(
    "batch", [(torch.randn(9, 12),), {"input": torch.randn(9, 12)}], ids=["tuple", "dict"]
)
def test_eva_calls_the_model_with_what_it_takes(batch: Any) -> None:
    fastlora.init.eva_(adapted(make()), [batch])


def test_bad_input_is_told_and_changes_nothing() -> None:
    base = make()
    cases: list[tuple[Any, str]] = [
        (adapted(base, dora=True), "0: expected a layer without DoRA"),
        (fastlora.merge_adapters(adapted(base)), "0: expected an unmerged layer"),
        (adapted(base, alpha=-1.0), r"0: expected alpha > 0, got -1\.0"),
        (adapted(base, rank=9), "2: expected a rank up to 8, got 9"),
        (base, "expected a model with LoRA layers"),
        (fastlora.apply_lora(nn.Sequential(nn.Embedding(4, 3)), target_modules=["0"]), "LoRAEmbedding alone"),
    ]
    for model, text in cases:
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=text):
            fastlora.init.pissa_(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"expected rho >= 1, got 0\.5"):
        fastlora.init.eva_(adapted(base), [torch.randn(9, 12)], rho=0.5)
    with pytest.raises(ValueError, match="0: expected an unmerged layer"):
        fastlora.init.eva_(fastlora.merge_adapters(adapted(base)), [torch.randn(9, 12)])
    with pytest.raises(ValueError, match="0: expected inputs in at least 3 directions, its rank, got 2"):
        fastlora.init.eva_(adapted(base), [torch.randn(2, 12)])
    assert not any(m._forward_pre_hooks for m in base.modules() if isinstance(m, LoRAModule))
