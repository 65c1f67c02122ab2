"""Tiny language models, their accelerated copies with the chunked loss, and a step of either."""

import copy
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import fastlora
from tests import hf_models

CLASSES = hf_models.SIZES["vocab_size"]
IDS = torch.randint(3, CLASSES, (2, 16), generator=torch.Generator().manual_seed(0))
# a prompt, and what pads the second text, don't count
LABELS = torch.where(torch.tensor([[False] * 5 + [True] * 11, [True] * 9 + [False] * 7]), IDS, -100)


def made(family: str = "Llama", **options: Any) -> Any:
    """A tiny model that trains whole, its head's logits far from equal."""
    if family == "GPT2":
        model = hf_models.gpt2().apply(_without_dropout)
    else:
        config = getattr(transformers, f"{family.removesuffix('Model')}Config")
        sizes = hf_models.SIZES | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1} | options
        kind = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
        model = hf_models._made(kind, config(**sizes, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 3)
    return model.train()


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def with_lora(model: Any, **settings: Any) -> Any:
    """A PEFT model around it, whose update is not zero."""
    defaults: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    config = peft.LoraConfig(**defaults | settings, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def chunked(model: Any) -> Any:
    """Its accelerated copy."""
    return fastlora.accelerate(copy.deepcopy(model), loss="chunked")


def step(model: Any, called: Any = None, **given: Any) -> dict[str, Tensor]:
    """Loss and gradients, by parameter."""
    model.zero_grad()
    out = (called or model)(input_ids=IDS, **{"labels": LABELS} | given)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), **found}


def assert_its_own_step(plain: Any, found: dict[str, Tensor], exact: Any = None, **given: Any) -> None:
    """No further from the step in float64 than the model's own in its dtype, and a rounding of a sum."""
    own = step(plain, **given)
    exact = exact or step(copy.deepcopy(plain).double(), **given)
    assert own.keys() == found.keys()
    for name, truth in exact.items():
        error, allowed = (float((each[name] - truth).norm()) for each in (found, own))
        rounding = torch.finfo(torch.float32).eps / 2 * CLASSES**0.5 * float(truth.norm())
        assert error <= allowed + rounding, f"{name}: error {error:.1e}, the model's own {allowed:.1e}"
        assert found[name].dtype == own[name].dtype, name


HEADS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "trained": {"modules_to_save": ["lm_head"]},
}


class Small(transformers.LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Embeddings and a head, and what it does to logits between it and the loss."""

    change = look = staticmethod(lambda logits: logits)
    takes_loss = True

    def forward(self, input_ids: Any = None, labels: Any = None, **given: Any) -> Any:
        logits = self.lm_head(self.model.embed_tokens(input_ids))
        logits, loss = self.change(logits), None
        if self.takes_loss:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        logits = self.look(logits)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)
