"""Models with LoRA whose layers share inputs, and the same with every layer on its own."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastlora
from fastlora.anatomy.names import lora_layers
from fastlora.functional import shared_lora_linear
from fastlora.interop.peft import restore
from fastlora.ops.gated_lora_linear import GatedLoRALinearFunction
from fastlora.together import compute, siblings
from fastlora.together.mlp import unfuse

WIDTH = 64
_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
WORDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def _text(kind: str, config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    return getattr(transformers, kind)(config), {"input_ids": WORDS, "labels": WORDS}


def _vit() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {name: _TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=4)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return transformers.ViTForImageClassification(config), {
        "pixel_values": pixels,
        "labels": torch.tensor([0, 1]),
    }


def _gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32}
    return _text("GPT2LMHeadModel", transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _t5() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes: dict[str, Any] = {"d_model": WIDTH, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes | {"vocab_size": 100, "decoder_start_token_id": 0})
    return _text("T5ForConditionalGeneration", config)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "Llama": lambda: _text("LlamaForCausalLM", transformers.LlamaConfig(**_GROUPED)),
    "Qwen2": lambda: _text("Qwen2ForCausalLM", transformers.Qwen2Config(**_GROUPED)),
    "Gemma": lambda: _text("GemmaForCausalLM", transformers.GemmaConfig(**_GROUPED, head_dim=16)),
    "Mistral": lambda: _text("MistralForCausalLM", transformers.MistralConfig(**_GROUPED)),
    "Phi": lambda: _text("PhiForCausalLM", transformers.PhiConfig(**_GROUPED)),
    "GPT-2": _gpt2,
    "BERT": lambda: _text("BertForMaskedLM", transformers.BertConfig(**_TEXT)),
    "T5": _t5,
    "ViT": _vit,
}


class Way:
    """A way to put LoRA into a model, so that layers compute together."""

    def adapt(
        self, model: nn.Module, *, dropout: float = 0.0, one_mask: bool = False, **settings: Any
    ) -> Any:
        """LoRA of rank 4 on all linear layers of a model, in place; no B is zero."""
        raise NotImplementedError

    def inside(self, adapted: Any) -> Any:
        """What was adapted, within what :meth:`adapt` gave."""
        return adapted

    def undo(self, model: Any) -> Any:
        """Let nothing compute together."""
        raise NotImplementedError

    def frozen(self, layer: Any) -> Any:
        """Holds weight and bias."""
        return layer

    def factor(self, layer: Any, name: str) -> nn.Parameter:
        """lora_A or lora_B."""
        raise NotImplementedError

    def exchange(self, layer: Any, name: str, values: Tensor) -> None:
        """Put another Parameter in the place of lora_A or lora_B."""
        raise NotImplementedError

    def rescale(self, layer: Any, factor: float) -> None:
        """Multiply the update's factor."""
        raise NotImplementedError

    def set_dropout(self, layer: Any, probability: float) -> None:
        """Give a layer another dropout."""
        raise NotImplementedError


class Accelerated(Way):
    """PEFT's layers, accelerated."""

    def adapt(
        self, model: nn.Module, *, dropout: float = 0.0, one_mask: bool = False, **settings: Any
    ) -> Any:
        """As PEFT's model."""
        torch.manual_seed(0)
        options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        config = peft.LoraConfig(**options | settings, lora_dropout=dropout)
        wrapped: Any = peft.get_peft_model(model, config)
        return fastlora.accelerate(wrapped.train(), one_mask=one_mask)

    def inside(self, adapted: Any) -> Any:
        return adapted.base_model.model

    def undo(self, model: Any) -> Any:
        return restore(model)

    def frozen(self, layer: Any) -> Any:
        return layer.base_layer

    def factor(self, layer: Any, name: str) -> nn.Parameter:
        found: nn.Parameter = getattr(layer, name)["default"].weight
        return found

    def exchange(self, layer: Any, name: str, values: Tensor) -> None:
        getattr(layer, name)["default"].weight = nn.Parameter(values)

    def rescale(self, layer: Any, factor: float) -> None:
        layer.scaling["default"] *= factor

    def set_dropout(self, layer: Any, probability: float) -> None:
        layer.lora_dropout["default"] = nn.Dropout(probability)


class Applied(Way):
    """Our own layers."""

    def adapt(
        self, model: nn.Module, *, dropout: float = 0.0, one_mask: bool = False, **settings: Any
    ) -> Any:
        torch.manual_seed(0)
        options: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": dropout, "one_mask": one_mask}
        fastlora.apply_lora(model, **options | settings)
        for layer in lora_layers(model).values():
            nn.init.kaiming_uniform_(layer.lora_B, a=5**0.5)
        return model.train()

    def undo(self, model: Any) -> Any:
        return fastlora.remove_adapters(model)

    def factor(self, layer: Any, name: str) -> nn.Parameter:
        found: nn.Parameter = getattr(layer, name)
        return found

    def exchange(self, layer: Any, name: str, values: Tensor) -> None:
        setattr(layer, name, nn.Parameter(values))

    def rescale(self, layer: Any, factor: float) -> None:
        layer.alpha *= factor

    def set_dropout(self, layer: Any, probability: float) -> None:
        layer.lora_dropout = probability


WAYS = {"accelerate": Accelerated(), "apply_lora": Applied()}
# what models are made by; a fixture takes one after the other
way: Way = WAYS["accelerate"]


def family(name: str, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model with LoRA, and a batch."""
    torch.manual_seed(0)
    model, batch = FAMILIES[name]()
    return way.adapt(model, **settings), batch


def separated(model: Any) -> Any:
    """A copy of which every layer computes by itself."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        unfuse(module)
        siblings.forget(module)
    return copied


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Every layer computes alone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(siblings, "_parts", lambda layers, x: None)
        yield


@contextlib.contextmanager
def groups() -> Iterator[list[int]]:
    """How many layers each computation of several had."""
    seen: list[int] = []

    def spy(x: Tensor, layers: list[Any], **options: Any) -> Any:
        seen.append(len(layers))
        return shared_lora_linear(x, layers, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compute, "shared_lora_linear", spy)
        yield seen


@contextlib.contextmanager
def gated() -> Iterator[list[str]]:
    """The activation of each gated MLP whose product is not kept."""
    seen: list[str] = []
    forward = GatedLoRALinearFunction.forward

    def spy(ctx: Any, gate: Tensor, up: Tensor, *call: Any) -> Any:
        seen.append(next(each for each in call if isinstance(each, str)))
        return forward(ctx, gate, up, *call)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GatedLoRALinearFunction, "forward", spy)
        yield seen


class Attention(nn.Module):
    """Query, key and value of one x, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        mixed: Tensor = self.o(self.q(x) * self.k(x) + self.v(x))
        return mixed


Between = Callable[[Any, Tensor], Tensor]


def interrupt(module: Any, between: Between) -> None:
    """Let something happen to a module or its x after the query's call, from now on."""

    def forward(x: Tensor) -> Tensor:
        q = module.q(x)
        x = between(module, x)
        mixed: Tensor = module.o(q * module.k(x) + module.v(x))
        return mixed

    module.forward = forward


def attention(module: nn.Module | None = None, **settings: Any) -> Any:
    """An attention with LoRA; by default one whose weights are always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention() if module is None else module)
    return way.inside(way.adapt(model, **settings))[0]


def an_input() -> Tensor:
    """``[3, 5, 64]``, with a gradient."""
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()


def run(module: Any, x: Tensor | None = None, *, seed: int = 1) -> dict[str, Tensor]:
    """Output and every gradient, x's too; of :func:`an_input` without another."""
    leaf = an_input() if x is None else x.detach().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    # no leaf, so that it may change in place
    y = module(leaf * 1)
    y.float().square().sum().backward()
    found: dict[str, Any] = {"output": y.detach(), "x": leaf.grad}
    found |= {name: p.grad for name, p in module.named_parameters()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def step(model: Any, batch: dict[str, Tensor], *, seed: int = 1) -> dict[str, Tensor]:
    """Logits, loss and every gradient."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**batch)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.logits.detach(), "loss": out.loss.detach(), **found}


def assert_as_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Outputs to the bit, gradients to rounding."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name in ("output", "loss"):
            assert torch.equal(found[name], tensor), name
        else:
            atol = 1e-5 * max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close({name: found[name]}, {name: tensor}, rtol=1e-4, atol=atol)


def assert_counts(change: Between) -> None:
    """What happens between two calls has the effect that it has on layers apart."""
    modules = attention(), attention()
    for module in modules:
        module.seen = None
        interrupt(module, change)
    with groups() as seen:
        found = run(modules[0])
    with apart():
        expected = run(modules[1])
    assert_as_apart(found, expected)
    assert modules[0].seen == modules[1].seen
    assert seen[0] == 3


def assert_none_share(change: Callable[[Any], None]) -> None:
    """Once this has happened to an attention, every layer computes alone."""
    module = attention()
    change(module)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert not seen
