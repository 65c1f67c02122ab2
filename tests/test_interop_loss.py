"""``accelerate(model, loss="chunked")``: the model's own loss and gradients without all logits at once."""

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlora
from fastlora.bench.turns import peak_bytes
from fastlora.interop._lazy_logits import LazyLogits
from tests import hf_models
from tests.cases import cases
from tests.chunked_models import (
    CLASSES,
    HEADS,
    IDS,
    LABELS,
    Small,
    assert_its_own_step,
    chunked,
    made,
    step,
    with_lora,
)
from tests.quantised import four_bit

FAMILIES = cases(
    ["Llama", "Gemma2", "Cohere", "GPT2"],
    ["Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3Text", "Phi3", "Granite"],
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_whole_model_is_its_own(family: str) -> None:
    """Gemma, Cohere and GPT-2 are tied; Gemma2 caps logits; Cohere multiplies, Granite divides them."""
    model = made(family, **{"final_logit_softcapping": 2.0} if family == "Gemma2" else {})
    accelerated = chunked(model)
    assert_its_own_step(model, step(accelerated))
    assert isinstance(accelerated(input_ids=IDS, labels=LABELS).logits, LazyLogits)


@pytest.mark.parametrize(
    ("head", "tied"),
    # what PEFT saves it unties
    cases([("frozen", True), ("LoRA", True), ("DoRA", False), ("trained", False)], [("LoRA", False)]),
)
def test_a_step_of_peft_is_its_own(head: str, tied: bool) -> None:
    plain = with_lora(made(tie_word_embeddings=tied), **HEADS[head])
    found = step(chunked(plain))
    assert_its_own_step(plain, found)
    assert any("lm_head" in name for name in found) == (head != "frozen")


@pytest.mark.parametrize("head", ["LoRA", "trained"])
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_16_bits_are_as_exact(how: str, head: str) -> None:
    plain = with_lora(made(), **HEADS[head])
    plain = plain.bfloat16() if how == "bf16" else plain
    exact = step(copy.deepcopy(plain).double())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        eager, found = step(fastlora.accelerate(copy.deepcopy(plain))), step(chunked(plain))
    assert eager.keys() == found.keys()
    for name, truth in exact.items():
        error, allowed = (float((each[name] - truth).norm()) for each in (found, eager))
        # the loss is one draw: the mean of as many rounding errors as labels
        unit = torch.finfo(torch.bfloat16).eps / 2 * float(truth.norm()) / int((LABELS != -100).sum()) ** 0.5
        assert error <= 1.1 * allowed + unit, name
        assert found[name].dtype == eager[name].dtype


@pytest.mark.parametrize("given", [{"num_items_in_batch": 9}, {"num_items_in_batch": torch.tensor(9)}])
def test_items_are_divided_by_what_is_given(given: dict[str, Any]) -> None:
    model = made()
    assert_its_own_step(model, step(chunked(model), **given), **given)


def test_labels_may_be_shifted_already() -> None:
    model = made()
    given = {"shift_labels": LABELS.roll(3, dims=1)}
    assert_its_own_step(model, step(chunked(model), **given), **given)


def test_a_quantised_head() -> None:
    pytest.importorskip("bitsandbytes")
    model = made().requires_grad_(False)
    model.lm_head = four_bit(CLASSES, hf_models.SIZES["hidden_size"], bias=False)
    plain = with_lora(model, **HEADS["LoRA"])
    found = step(chunked(plain))
    own = fastlora.accelerate(plain)
    assert_its_own_step(own, found, exact=step(own))


def test_loras_of_ours() -> None:
    model = fastlora.apply_lora(made(), target_modules=["q_proj", "lm_head"], rank=2)
    assert_its_own_step(model, step(chunked(model)))


def test_it_takes_an_eighth_of_the_memory() -> None:
    model = made(vocab_size=4096, num_hidden_layers=1).requires_grad_(False)
    words = torch.randint(3, 4096, (2, 64))

    def loss_alone(model: Any) -> int:
        hidden = torch.randn(2, 64, 32, requires_grad=True)
        model.model.forward = lambda **given: transformers.modeling_outputs.BaseModelOutputWithPast(hidden)

        def train() -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(input_ids=words, labels=words).loss, [hidden])

        train()
        return peak_bytes(train)

    assert loss_alone(chunked(model)) <= loss_alone(model) / 8


def test_labels_by_position_and_a_tuple() -> None:
    model = made()
    at = list(inspect.signature(model.forward).parameters).index("labels")
    given = (IDS, *(None,) * (at - 1), LABELS)
    accelerated = chunked(model)
    loss, logits, *_ = accelerated(*given, return_dict=False)
    torch.testing.assert_close(loss, model(*given).loss, rtol=1e-6, atol=0)
    assert isinstance(logits, LazyLogits)


def test_a_failed_call_leaves_the_head_as_it_was() -> None:
    accelerated = chunked(made())
    with pytest.raises(ValueError, match="batch_size"):
        accelerated(input_ids=IDS, labels=LABELS, logits_to_keep=3)
    assert "forward" not in vars(accelerated.lm_head)


def _masked() -> Any:
    return hf_models.masked_bert()


def _own_loss() -> Any:
    model = made()
    model.loss_function = lambda **given: torch.zeros(())
    return model


def _own_forward() -> Any:
    model = made()
    model.forward = model.forward
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_masked, "computes its loss itself"),
        (hf_models.t5, "computes its loss itself"),
        (_own_loss, "the loss of LlamaForCausalLM is <lambda>"),
        (_own_forward, "a forward of its own"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "got Sequential; leave"),
    ],
)
def test_what_it_does_not_know_is_refused(make: Any, reason: str) -> None:
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f'expected for loss="chunked" .*{reason}'):
        fastlora.accelerate(model, loss="chunked")
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ValueError, match='"model" or "chunked"'):
        fastlora.accelerate(model, loss="whole")  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}])
def test_hooks_of_parameters_see_one_gradient(head: dict[str, Any]) -> None:
    plain = with_lora(made(), **head)
    accelerated = chunked(plain)
    for model in (plain, accelerated):
        for name, parameter in model.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    expected, found = step(plain), step(accelerated)
    assert any("lm_head" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


class Static(Small):  # type: ignore[no-untyped-call]
    """A class that says its loss by itself."""

    loss_function = staticmethod(ForCausalLMLoss)


def test_a_class_that_names_its_loss() -> None:
    model = Static(made().config)
    accelerated = chunked(model)
    assert_its_own_step(model, step(accelerated))
    assert isinstance(accelerated(input_ids=IDS, labels=LABELS).logits, LazyLogits)
    accelerated.loss_function = lambda **given: torch.zeros(())
    out = accelerated(input_ids=IDS, labels=LABELS)
    assert out.loss == 0
    assert type(out.logits) is Tensor
