"""Prompts beside the model's life: state dicts, copies, conversion, removal, LoRA in the same model."""

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import fastlora
from fastlora.inject.adapters import apply_adapters
from fastlora.inject.prompts import apply_prompts, remove_prompts
from fastlora.nn.settings import PromptSettings
from tests.lora_models import same_bits, tiny_vit
from tests.prompt_models import IMAGES, TOKENS, main_output, prompts_of, text_model, vision_model

IDS = torch.tensor([[2, 7, 9, 4, 11, 3]])
DEEP = {"torchvision", "timm", "hf-classifier"}
KINDS = pytest.mark.parametrize(
    "kind", ["torchvision", "timm", "timm-registers", "hf-classifier", "bert", "llama"]
)


def plain_model(kind: str) -> nn.Module:
    return text_model(kind) if kind in ("bert", "llama") else vision_model(kind)


def prompted(kind: str) -> Any:
    return apply_prompts(plain_model(kind), num_tokens=TOKENS, deep=kind in DEEP).eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    # without gradients, because nn.MultiheadAttention computes otherwise where a weight may train
    text = type(model).__name__.startswith(("Bert", "Llama"))
    return main_output(model(IDS if text else IMAGES))


def move_prompts(model: nn.Module) -> None:
    tokens = prompts_of(model).tokens
    with torch.no_grad():
        tokens.add_(torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2)))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def by_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@KINDS
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save],
    ids=["deepcopy", "pickle", "torch-save"],
)
def test_a_copy_has_prompts_of_its_own(kind: str, duplicate: Callable[[Any], Any]) -> None:
    model = prompted(kind)
    expected = run(model)
    twin = duplicate(model)
    assert same_bits(run(twin), expected)
    move_prompts(twin)
    assert not torch.allclose(run(twin), expected)
    assert same_bits(run(model), expected)
    move_prompts(model)
    assert same_bits(run(twin), run(model))
    remove_prompts(twin)
    assert not torch.allclose(run(twin), run(model))
    assert same_bits(run(remove_prompts(model)), run(twin))


def test_hooks_of_an_unpickled_model_are_not_overwritten_by_the_next() -> None:
    # a fresh process counts its hooks from 0, as the one that pickled the model did
    model = prompted("torchvision")
    pickled, next_id = pickle.dumps(model), RemovableHandle.next_id
    try:
        RemovableHandle.next_id = 0
        twin = pickle.loads(pickled)
        for module in twin.modules():
            module.register_forward_pre_hook(lambda *_: None)
            module.register_forward_hook(lambda *_: None)
        assert same_bits(run(twin), run(model))
    finally:
        RemovableHandle.next_id = next_id


@KINDS
def test_removal_leaves_nothing_behind(kind: str) -> None:
    model = plain_model(kind).eval()
    expected = run(model)
    before = {name: (id(module), set(vars(module))) for name, module in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert apply_prompts(model, num_tokens=TOKENS, deep=kind in DEEP) is model
    assert not torch.allclose(run(model), expected)
    assert remove_prompts(model) is model
    assert same_bits(run(model), expected)
    assert {name: (id(module), set(vars(module))) for name, module in model.named_modules()} == before
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for module in model.modules():
        assert not any(hooks for name, hooks in vars(module).items() if "hooks" in name)
    apply_prompts(model, num_tokens=2)
    assert prompts_of(model).tokens.shape[1] == 2


def test_removal_keeps_other_hooks() -> None:
    model = tiny_vit()
    calls: list[int] = []
    block = model.encoder.layers[0]
    block.register_forward_hook(lambda module, args, output: calls.append(output.shape[1]))
    apply_prompts(model, num_tokens=TOKENS, deep=True)
    model(IMAGES)
    remove_prompts(model)
    model(IMAGES)
    assert calls == [5, 5]


@KINDS
def test_state_dicts_of_the_plain_model_and_of_the_prompted(kind: str) -> None:
    plain, model = plain_model(kind).eval(), prompted(kind)
    (key,) = set(model.state_dict()) - set(plain.state_dict())
    assert key.rpartition(".")[0].endswith("prompts")
    tokens = prompts_of(model).tokens.detach().clone()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(prompts_of(model).tokens, tokens)
    twin = prompted(kind)
    twin.load_state_dict(model.state_dict())
    assert same_bits(run(twin), run(model))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*prompts"):
        plain.load_state_dict(model.state_dict())
    incomplete = dict(plain.state_dict())
    incomplete.pop(next(iter(incomplete)))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(incomplete)


def test_prompts_on_the_meta_device_do_not_pass_for_loaded() -> None:
    model = prompted("torchvision").to("meta")
    with pytest.raises(RuntimeError, match=r"Missing key.*prompts\.tokens"):
        model.load_state_dict(tiny_vit().state_dict(), assign=True)


@KINDS
def test_conversion_moves_prompts_along(kind: str) -> None:
    model = prompted(kind).double()
    assert prompts_of(model).tokens.dtype == torch.float64
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


@KINDS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_mode_stays(kind: str, training: bool) -> None:
    model = plain_model(kind).train(training)
    apply_prompts(model)
    assert all(module.training is training for module in model.modules())


def test_settings_make_the_like() -> None:
    model = apply_prompts(tiny_vit(), num_tokens=7, deep=True, dropout=0.25, init="uniform")
    settings = prompts_of(model).settings
    assert settings == PromptSettings(7, True, 0.25, "uniform")
    twin = apply_prompts(tiny_vit(), **vars(settings))
    twin.load_state_dict(model.state_dict())
    assert same_bits(run(twin.eval()), run(model.eval()))
    assert repr(prompts_of(twin)) == "VisualPrompts(num_tokens=7, deep=True, dropout=0.25, init='uniform')"


def test_it_logs_what_trains(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastlora"):
        apply_prompts(tiny_vit(), num_tokens=4)
    assert "4 prompt tokens before the first block; 32 of " in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert "the head 'heads.head' stays frozen" in caplog.text


def test_the_summary_tells_of_prompts() -> None:
    model = apply_prompts(tiny_vit(), deep=True)
    share = "160 of 1,843 parameters train (8.68 %)"
    assert str(fastlora.adapter_summary(model)) == f"10 prompt tokens before 2 blocks; {share}"
    apply_adapters(fastlora.apply_lora(model, rank=2, modules_to_save=["head"]), adapter_size=3)
    summary = fastlora.adapter_summary(model)
    assert summary.prompts == ("10 prompt tokens before 2 blocks",)
    assert str(summary).startswith(
        "LoRA rank 2 on 4 LoRALinear + 2 LoRAMultiheadAttention and 4 bottleneck adapters of size 3 and "
        "10 prompt tokens before 2 blocks; also training heads.head; "
    )
    text = fastlora.adapter_summary(apply_prompts(text_model("bert"), num_tokens=3))
    assert str(text).startswith("3 prompt tokens in the embedded text; 24 of ")


def test_prompts_alone_have_nothing_to_merge() -> None:
    for change in (fastlora.merge_adapters, fastlora.remove_adapters):
        with pytest.raises(ValueError, match=r"got prompts alone.*fastlora\.remove_prompts"):
            change(apply_prompts(tiny_vit()))
    with pytest.raises(ValueError, match="got bottleneck adapters and prompts alone"):
        fastlora.merge_adapters(apply_adapters(apply_prompts(tiny_vit())))


def test_a_compiled_model_is_prompted_and_freed_through_its_wrapper() -> None:
    model = tiny_vit()
    compiled: Any = torch.compile(model, backend="eager")
    assert apply_prompts(compiled) is compiled
    assert model.get_parameter("prompts.tokens").requires_grad
    remove_prompts(compiled)
    assert not hasattr(model, "prompts")
