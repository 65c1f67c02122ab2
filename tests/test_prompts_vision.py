"""Visual prompts: what they compute in every library's vision transformer, and what they leave alone."""

import copy
import inspect
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from fastlora.inject.prompts import apply_prompts
from fastlora.nn.prompts.modules import VisualPrompts
from fastlora.nn.settings import PromptSettings
from tests.cases import cases
from tests.lora_models import tiny_vit
from tests.prompt_models import (
    IMAGES,
    TOKENS,
    VISION_KINDS,
    main_output,
    open_vision,
    prompts_of,
    vision_model,
)

KINDS = pytest.mark.parametrize("kind", VISION_KINDS)
DEEP = pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
BATCHES = pytest.mark.parametrize("batch", [0, 1, 3], ids=["no-row", "one-row", "rows"])


def shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    values = output.values() if isinstance(output, dict) else output
    return [shapes(value) for value in values]


@KINDS
@DEEP
@BATCHES
def test_computes_the_formula_with_tokens_concatenated_by_hand(kind: str, deep: bool, batch: int) -> None:
    if batch == 0 and kind.startswith("hf"):
        pytest.skip("transformers' own attention cannot reshape a batch without rows")
    model = vision_model(kind).double().eval()
    by_hand, images = open_vision(kind, copy.deepcopy(model)), IMAGES[:batch].double()
    plain = model(images)
    apply_prompts(model, num_tokens=TOKENS, deep=deep)
    tokens = prompts_of(model).tokens
    assert tokens.shape == (2 if deep else 1, TOKENS, 8)
    prompted = model(images)
    torch.testing.assert_close(main_output(prompted), by_hand(images, tokens, deep), rtol=1e-10, atol=1e-12)
    assert shapes(prompted) == shapes(plain)
    if batch:
        assert not torch.allclose(main_output(prompted), main_output(plain))


@KINDS
@DEEP
def test_every_prompt_gets_a_gradient_and_nothing_else_does(kind: str, deep: bool) -> None:
    model = apply_prompts(vision_model(kind).double(), num_tokens=TOKENS, deep=deep)
    prompts = prompts_of(model)
    main_output(model(IMAGES.double())).square().sum().backward()
    assert [name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad] == ["tokens"]
    assert prompts.tokens.grad is not None
    assert prompts.tokens.grad.abs().sum(-1).gt(0).all()
    assert [
        name for name, p in model.named_parameters() if p.grad is not None and p is not prompts.tokens
    ] == []


@DEEP
def test_gradients_are_those_of_the_formula(deep: bool) -> None:
    model = tiny_vit().double().eval()
    by_hand, images = open_vision("torchvision", copy.deepcopy(model)), IMAGES.double()
    tokens = prompts_of(apply_prompts(model, num_tokens=TOKENS, deep=deep)).tokens
    actual = torch.autograd.grad(model(images).square().sum(), tokens)
    expected = torch.autograd.grad(by_hand(images, tokens, deep).square().sum(), tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_head_named_to_save_trains_too() -> None:
    model = apply_prompts(tiny_vit(), modules_to_save=["head"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"prompts.tokens", "heads.head.weight", "heads.head.bias"}


def test_prompts_are_drawn_from_the_papers_range_and_nothing_else_is_drawn() -> None:
    model = vision_model("torchvision")
    torch.manual_seed(3)
    tokens = prompts_of(apply_prompts(model, num_tokens=400, deep=True)).tokens
    after = torch.rand(1)
    torch.manual_seed(3)
    bound = math.sqrt(6 / (3 * 4 * 4 + 8))
    assert torch.equal(tokens, torch.empty(2, 400, 8).uniform_(-bound, bound))
    assert torch.equal(after, torch.rand(1))
    assert tokens.abs().max() > 0.98 * bound
    assert abs(tokens.mean()) < 0.05 * bound


@KINDS
def test_dropout_acts_in_training_only_and_on_every_row_by_itself(kind: str) -> None:
    model = apply_prompts(vision_model(kind), num_tokens=TOKENS, deep=True, dropout=0.5)
    image = IMAGES[:1].expand(2, -1, -1, -1)
    first, second = main_output(model(image))
    assert not torch.allclose(first, second)
    model.eval()
    first, second = main_output(model(image))
    torch.testing.assert_close(first, second)
    twin = copy.deepcopy(model)
    prompts_of(twin).settings = PromptSettings(TOKENS, True, 0.0)
    assert torch.equal(main_output(model(image)), main_output(twin.train()(image)))


def test_dropout_scales_what_it_keeps() -> None:
    prompts = VisualPrompts(PromptSettings(4, dropout=0.25), torch.ones(1, 4, 500), position=1)
    out = prompts(torch.zeros(3, 2, 500))[:, 1:5]
    values, counts = out.detach().unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 4 / 3]))
    assert abs(counts[0] / out.numel() - 0.25) < 0.03


COMPILED = [("timm", True)]


@pytest.mark.parametrize(
    ("kind", "deep"),
    cases(COMPILED, [each for each in product(VISION_KINDS, (False, True)) if each not in COMPILED]),
)
def test_compiles_without_graph_break(kind: str, deep: bool) -> None:
    torch.compiler.reset()
    if kind.startswith("hf") and _takes_compiling_for_exporting():
        pytest.skip("this torch takes every graph for an export, for which transformers makes a mask")
    model = apply_prompts(vision_model(kind), num_tokens=TOKENS, deep=deep).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(main_output(compiled(IMAGES)), main_output(model(IMAGES)))
    tokens = prompts_of(model).tokens
    expected = torch.autograd.grad(main_output(model(IMAGES)).square().sum(), tokens)
    actual = torch.autograd.grad(main_output(compiled(IMAGES)).square().sum(), tokens)
    torch.testing.assert_close(actual, expected)


def _takes_compiling_for_exporting() -> bool:
    def exporting(x: Tensor) -> Tensor:
        return x + int(torch.compiler.is_exporting())

    return bool(torch.compile(exporting, backend="eager")(torch.zeros(())))


def enable_checkpointing(kind: str, model: Any) -> None:
    if kind.startswith("timm"):
        model.set_grad_checkpointing()
    else:
        # renamed in transformers 5
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("kind", [kind for kind in VISION_KINDS if kind != "torchvision"])
@DEEP
def test_activation_checkpointing_changes_no_gradient(kind: str, deep: bool) -> None:
    model = apply_prompts(vision_model(kind), num_tokens=TOKENS, deep=deep, dropout=0.5)
    tokens, gradients = prompts_of(model).tokens, []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(kind, model)
        torch.manual_seed(0)
        main_output(model(IMAGES)).square().sum().backward()
        assert tokens.grad is not None
        gradients.append(tokens.grad)
        tokens.grad = None
    assert torch.equal(*gradients)


def test_checkpointing_by_torchs_own_function() -> None:
    model = apply_prompts(tiny_vit(), num_tokens=TOKENS, deep=True, dropout=0.5)
    tokens = prompts_of(model).tokens
    losses = []
    for wrapped in (model, lambda x: checkpoint.checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(0)
        losses.append(torch.autograd.grad(wrapped(IMAGES).square().sum(), tokens)[0])
    assert torch.equal(*losses)


@KINDS
@DEEP
def test_a_bf16_model_keeps_float32_prompts(kind: str, deep: bool) -> None:
    model = apply_prompts(vision_model(kind).bfloat16(), num_tokens=TOKENS, deep=deep).eval()
    tokens = prompts_of(model).tokens
    assert tokens.dtype == torch.float32
    out = main_output(model(IMAGES.bfloat16()))
    assert out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().square().sum(), tokens)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(out.float(), main_output(model.float()(IMAGES)), rtol=0.1, atol=0.1)


@KINDS
def test_autocast_computes_in_16_bits(kind: str) -> None:
    model = apply_prompts(vision_model(kind), num_tokens=TOKENS, deep=True).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = main_output(model(IMAGES))
    torch.testing.assert_close(out.float(), main_output(model(IMAGES)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("used_before", [False, True], ids=["fresh", "used-before"])
@DEEP
@pytest.mark.parametrize("kind", ["hf", "hf-classifier", "hf-deit"])
def test_hidden_states_have_no_prompts(kind: str, deep: bool, used_before: bool) -> None:
    # Hugging Face installs hooks that collect hidden states at the first request
    model = vision_model(kind).eval()
    if used_before:
        model(IMAGES, output_hidden_states=True)
    plain = copy.deepcopy(model)
    apply_prompts(model, num_tokens=TOKENS, deep=deep)
    expected = plain(IMAGES, output_hidden_states=True)
    for options in ({}, {"return_dict": False}):
        out = model(IMAGES, output_hidden_states=True, **options)
        assert shapes(out) == shapes(expected)
    torch.testing.assert_close(
        model(IMAGES, output_hidden_states=True).hidden_states[0], expected.hidden_states[0]
    )


@DEEP
def test_timms_intermediates(deep: bool) -> None:
    model: Any = vision_model("timm-registers").eval()
    plain = model.forward_intermediates(IMAGES)
    apply_prompts(model, num_tokens=TOKENS, deep=deep)
    assert model.forward_features(IMAGES).shape == plain[0].shape
    if deep:
        features, intermediates = model.forward_intermediates(IMAGES)
        torch.testing.assert_close(features, model.forward_features(IMAGES))
        assert [x.shape for x in intermediates] == [x.shape for x in plain[1]]
    else:
        with pytest.raises(ValueError, match="expected deep prompts for forward_intermediates"):
            model.forward_intermediates(IMAGES)


def test_attention_masks_are_refused() -> None:
    model: Any = apply_prompts(vision_model("timm"), num_tokens=TOKENS)
    with pytest.raises(ValueError, match="expected no attention mask, got one"):
        model(IMAGES, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    # a later argument of timm's
    if "is_causal" in inspect.signature(model.forward).parameters:
        with pytest.raises(ValueError, match="expected no attention mask, got one"):
            model(IMAGES, is_causal=True)


def test_a_model_around_a_vision_transformer() -> None:
    model = nn.Sequential(tiny_vit(), nn.Linear(3, 2))
    apply_prompts(model, num_tokens=TOKENS, modules_to_save=["1"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "0.prompts.tokens",
        "1.weight",
        "1.bias",
    }
