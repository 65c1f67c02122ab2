"""Training moves what it should, in the dtype it should, however the model is run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from tests.lora_models import mlp, randomize_adapters

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))


class Checkpointed(nn.Module):
    """A stem and a block that is computed again in backward."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(12, 12), mlp()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.use_reentrant is None:
            return self.block(h)  # type: ignore[no-any-return]
        return checkpoint(self.block, h, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


def train(model: nn.Module, run: Callable[[], Tensor], steps: int = 2) -> set[str]:
    """Names of the trainable parameters that did not move."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimiser = torch.optim.SGD(trainable.values(), lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(run())
        optimiser.step()
    return {name for name, p in trainable.items() if torch.equal(p, before[name])}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=str)
def test_every_adapter_tensor_moves(use_reentrant: bool | None, dropout: float) -> None:
    """open-unlearning#178, ai-toolkit#1054, #925, aprender#2092, peft#3020."""
    models = [
        # a scaling that is no power of two: another order of products shows in the bits
        fastlora.apply_lora(Checkpointed(None), rank=2, alpha=3.0, dropout=dropout),
        fastlora.apply_lora(Checkpointed(use_reentrant), rank=2, alpha=3.0, dropout=dropout),
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        torch.manual_seed(7)
        assert not train(model, lambda model=model: model(X).square().sum())  # type: ignore[misc]
    # computed again with the same masks: the same bits
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_recording_gradients_changes_no_bit(rows: int, dtype: torch.dtype) -> None:
    """A reentrant checkpoint computes without gradients first, then again with them."""
    lora = fastlora.LoRALinear(12, 10, rank=2, alpha=3.0, dtype=dtype)
    adapter = fastlora.AdapterLayer(12, 4).to(dtype)
    for module in (randomize_adapters(lora), adapter):
        x = torch.randn(rows, 12).to(dtype)
        with torch.no_grad():
            before = module(x)
        assert torch.equal(module(x), before)


def test_a_reentrant_checkpoint_without_gradients_on_its_way_in_is_told() -> None:
    """open-unlearning#178: nothing before the block trains, so torch would skip its adapters in silence."""
    model = fastlora.apply_lora(Checkpointed(True), rank=2, target_modules=["block.0", "block.2"])
    with pytest.warns(UserWarning, match="requires_grad"), pytest.raises(RuntimeError, match="require grad"):
        train(model, lambda: model(X).square().sum())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_language_model_trains(use_reentrant: bool) -> None:
    """open-unlearning#178: frozen embeddings give nothing that requires gradients."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    model: Any = fastlora.apply_lora(transformers.LlamaForCausalLM(config), rank=2).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    ids = torch.arange(14).view(2, 7) + 3
    assert not train(model, lambda: model(input_ids=ids, labels=ids).loss)


def test_dropout_follows_a_probability_that_changes() -> None:
    """axolotl#3806: the gate was read when the layer was wrapped."""
    model = randomize_adapters(fastlora.apply_lora(nn.Sequential(nn.Linear(12, 5)), rank=2)).train()
    layer: Any = model[0]
    assert torch.equal(model(X), model(X))
    layer.lora_dropout = 0.5
    assert not torch.equal(model(X), model(X))
    layer.lora_dropout = 0.0
    assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1}, {"dora": True}], ids=str)
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """AgileRL#623, mflux#740: adapters in float32 promoted the activations of a 16-bit model."""
    model = randomize_adapters(fastlora.apply_lora(mlp(dtype), rank=2, **settings))
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    model(X.to(dtype))
    assert set(seen) == {(dtype, dtype)}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)


def test_a_switched_adapter_counts_in_a_compiled_model() -> None:
    """diffusers#11408, sd-webui-forge-classic#795, WanVideoWrapper#1736: ignored, or compiled each time."""
    torch.compiler.reset()
    model = fastlora.add_adapter(fastlora.apply_lora(nn.Sequential(nn.Linear(12, 5)), rank=2), "b", alpha=3)
    for seed, name in enumerate(("default", "b")):
        randomize_adapters(fastlora.set_adapter(model, name), seed=seed)
    compiled_graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    counts = []
    for name in ("default", "b", "default", "b"):
        fastlora.set_adapter(model, name)
        torch.testing.assert_close(compiled(X), model(X))
        counts.append(len(compiled_graphs))
    assert counts[1] <= counts[0] + 1
    assert counts[1:] == [counts[1]] * 3


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_adapters_of_any_dtype_train_under_autocast_and_a_scaler(adapter_dtype: torch.dtype) -> None:
    """Soup#425, #429: bf16 adapters under fp16's GradScaler."""
    model = randomize_adapters(fastlora.apply_lora(mlp(), rank=2, adapter_dtype=adapter_dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    optimiser = torch.optim.SGD(trainable, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X).float().square().mean()
    torch.autograd.backward(scaler.scale(loss))
    assert all(p.grad is not None and p.grad.dtype == adapter_dtype for p in trainable)
    if adapter_dtype == torch.float16:
        # torch's own rule, said by torch
        with pytest.raises(ValueError, match="FP16"):
            scaler.step(optimiser)
        return
    scaler.step(optimiser)
    assert not any(torch.equal(p, old) for p, old in zip(trainable, before, strict=True))


def test_outputs_may_be_changed_in_place() -> None:
    """Automodel#3718, #2584: an output that is a view breaks code that adds to it."""
    model = randomize_adapters(fastlora.apply_lora(nn.Sequential(nn.Linear(12, 12)), rank=2)).double()
    x = X.double().view(2, 3, 12)
    twin = copy.deepcopy(model)
    out = model(x)
    out += x
    out.mul_(2.0).sum().backward()
    (2.0 * (twin(x) + x)).sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if mine.requires_grad:
            assert mine.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_training_goes_on_after_a_visit_to_the_merged_model() -> None:
    """unsloth#2534: merged for an evaluation, then trained on."""
    model = fastlora.apply_lora(mlp(), rank=2)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        train(each, lambda each=each: each(X).square().sum(), steps=1)  # type: ignore[misc]
        if each is model:
            fastlora.unmerge_adapters(fastlora.merge_adapters(each))
        train(each, lambda each=each: each(X).square().sum(), steps=1)  # type: ignore[misc]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
