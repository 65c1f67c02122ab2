"""Logits of a model with the chunked loss: spent once it took them, the model's own to whoever reads them."""

import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.interop._chunked_loss import _tell_at_once
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


def test_logits_that_the_loss_has_taken_are_spent() -> None:
    """They can be looked at and handed on; who reads them is told what to do, and nothing is kept for it."""
    model = made("Cohere")
    expected = model(input_ids=IDS).logits
    out = chunked(model)(input_ids=IDS, labels=LABELS)
    # as accelerate and FSDP hand outputs on, and DDP
    handed = [out.logits.float(), out.logits.to("cpu"), out.logits.clone(), out.logits.detach()]
    for logits in (out.logits, *handed):
        assert (logits.shape, logits.dtype, logits.device) == (expected.shape, torch.float32, expected.device)
        assert not logits.requires_grad
        assert "shape=(2, 16, 60)" in repr(logits)
        for read in (torch.argmax, torch.Tensor.tolist, pickle.dumps, lambda logits: logits * 2):
            with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\) or without labels"):
                read(logits)
    with pytest.raises(RuntimeError, match="never has all"), torch._C.DisableTorchFunctionSubclass():
        out.logits * 1
    assert out.logits.bfloat16().dtype == torch.bfloat16
    hidden = weakref.ref(out.logits._call)
    assert out.logits._call.hidden is None
    del out, logits, handed
    assert hidden() is None


@pytest.mark.parametrize("without", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_what_forward_itself_reads_is_the_models(without: Any, after: bool) -> None:
    """Before the loss or after it, with or without gradients; outputs have what was read."""
    model = Small(made().config)
    guesses = []

    def look(logits: Tensor) -> Tensor:
        with without():
            guesses.append(logits.argmax(-1))
        return logits

    setattr(model, "look" if after else "change", look)
    accelerated = chunked(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [each(input_ids=IDS, labels=LABELS) for each in (model, accelerated)]
    assert torch.equal(*guesses)
    assert type(outputs[1].logits) is Tensor
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for each, out in zip((model, accelerated), outputs, strict=True):
        each.zero_grad()
        (out.loss + out.logits.float().logsumexp(-1).sum()).backward()
    torch.testing.assert_close(
        accelerated.lm_head.weight.grad, model.lm_head.weight.grad, rtol=0.02, atol=0.02
    )


def test_logits_that_no_loss_takes_are_the_models() -> None:
    model = Small(made().config)
    model.takes_loss = False
    found, own = (each(input_ids=IDS, labels=LABELS).logits for each in (chunked(model), model))
    assert type(found) is Tensor
    assert found.requires_grad
    assert torch.equal(found, own)


def test_evaluation_and_generation_are_the_models(caplog: pytest.LogCaptureFixture) -> None:
    plain = with_lora(made())
    accelerated = chunked(plain)
    for model in (plain, accelerated):
        model.eval()
    assert type(accelerated(input_ids=IDS).logits) is Tensor
    tokens = [
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for model in (plain, accelerated)
    ]
    assert torch.equal(*tokens)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            found, expected = (model(input_ids=IDS, labels=LABELS) for model in (accelerated, plain))
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
            assert type(found.logits) is Tensor
            assert torch.equal(found.logits, expected.logits)
    assert not caplog.records


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _in_place(logits: Tensor) -> Tensor:
    logits.mul_(0.5)
    return logits.float()


def _half_in_place(logits: Tensor) -> Tensor:
    logits *= 0.5
    return logits


def _by_a_tensor(logits: Tensor) -> Tensor:
    return logits * torch.linspace(0.5, 1, CLASSES)


@pytest.mark.parametrize("change", [_centred, _in_place, _half_in_place, _by_a_tensor])
def test_a_model_that_reads_its_logits_first_keeps_its_loss_and_says_so(
    change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Small(made().config)
    model.change = change
    accelerated = chunked(model)
    _tell_at_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastlora"):
        found = [step(accelerated), step(accelerated)]
    for each in found:
        assert_its_own_step(model, each)
    assert len(caplog.records) == 1
    assert "Small has its logits at once" in caplog.text


def test_hooks_of_the_head_see_its_logits() -> None:
    plain = with_lora(made(), **HEADS["LoRA"])
    accelerated = chunked(plain)
    for model in (plain, accelerated):
        model.get_base_model().lm_head.lora_A["default"].register_forward_hook(
            lambda part, given, out: 2 * out
        )
        model.get_base_model().lm_head.register_forward_hook(lambda head, given, out: out.softmax(-1))
    assert_its_own_step(plain, step(accelerated))


def test_a_head_that_moves_its_input_to_another_device() -> None:
    model = Small(made().config)
    own = model.lm_head.to("meta").forward
    model.lm_head.forward = lambda hidden: own(hidden.to("meta"))
    out = chunked(model)(input_ids=IDS, labels=LABELS)
    assert out.loss.device.type == out.logits.device.type == "meta"
