"""Whole training steps on the card, AdamW included: the frozen model, eager LoRA, PEFT, fastlora."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora._core.extras import require
from fastlora.bench.candidates import DTYPES, TOLERANCE, has_peft
from fastlora.bench.cases import ALPHA, RANK, STEP, Case
from fastlora.bench.checked import checked
from fastlora.bench.clocks import make_calls_clock
from fastlora.bench.gpu_check.items import Found, Item
from fastlora.bench.gpu_check.models import LLAMA_8B, VIT_B, Sizes, Transformer
from fastlora.bench.results import EAGER, OURS, PEFT
from fastlora.bench.results_file import as_json_row
from fastlora.bench.turns import Step, gpu_peak_bytes, take_turns
from fastlora.nn import LoRALinear

MODELS: dict[str, Sizes] = {"ViT-B": VIT_B, "LLaMA-8B, 4 layers": LLAMA_8B}
ROUNDS = 5
LAYERS = ("query", "key", "value", "out", "gate", "up", "down")


class EagerLoRA(nn.Module):
    """A linear layer with LoRA as everybody writes it.

    Args:
        linear: The frozen layer.
        dropout: Probability.
    """

    def __init__(self, linear: nn.Linear, dropout: float) -> None:
        """A random, B zero."""
        super().__init__()
        self.linear, self.dropout = linear, dropout
        device = linear.weight.device
        a = torch.randn(RANK, linear.in_features, device=device) * linear.in_features**-0.5
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, RANK, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        layer = (self.linear.weight, self.linear.bias, self.lora_a, self.lora_b)
        return reference.lora_linear(x, *layer, scaling=ALPHA / RANK, dropout=self.dropout)


def items(device: torch.device) -> Sequence[Item]:
    """An item for each model and dropout, in bf16."""
    return [
        Item(f"{name}, p = {dropout:g}", partial(rows, name, sizes, dropout, device))
        for name, sizes in MODELS.items()
        for dropout in (0.0, 0.1)
    ]


def rows(name: str, sizes: Sizes, dropout: float, device: torch.device) -> Iterator[Found]:
    """One row: the time of a step, and the most bytes that it holds beside weights and optimiser states.

    Without dropout the third step's output is compared first, so that what was learnt before counts too.
    """
    case = Case("steps", name, None, None, None, dropout=dropout, passes=STEP)
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    base = Transformer(sizes, device, dtype).requires_grad_(False)
    stream = torch.randn(sizes.batch, sizes.tokens, sizes.width, device=device).to(dtype)
    eager = _replaced(_sharing(base), lambda linear: EagerLoRA(linear, dropout))
    steps = {
        # backward passes on dX alone: nothing that trains through it can be faster
        "frozen": training_step(base, stream.clone().requires_grad_()),
        EAGER: training_step(eager, stream),
        OURS: training_step(_replaced(_sharing(eager), _fused), stream),
    }
    left_out = {}
    if has_peft():
        steps[PEFT] = training_step(_with_peft(base, eager, dropout), stream)
    else:
        left_out[PEFT] = "the package peft is not installed"
    if not dropout:
        checked({each: _third(step) for each, step in steps.items()}, TOLERANCE[case.dtype])
    timed = take_turns(steps, ROUNDS, make_calls_clock(steps[OURS]))
    peaks = {each: gpu_peak_bytes(step) for each, step in steps.items()}
    yield {"row": as_json_row(case, timed | {"peak_bytes": peaks}, left_out=left_out)}


def training_step(model: nn.Module, stream: Tensor) -> Step:
    """Forward, backward and, where there is something to train, AdamW."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> tuple[Tensor, ...]:
        out = model(stream)
        out.float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        stream.grad = None
        return (out.detach(),)

    return step


def _third(step: Step) -> Step:
    def steps() -> tuple[Tensor, ...]:
        step()
        step()
        return step()

    return steps


def _replaced(model: Transformer, made: Callable[[Any], nn.Module]) -> Transformer:
    """The model with what ``made`` makes of each layer that LoRA is for."""
    for block in model.blocks:
        for name in LAYERS:
            layer = getattr(block, name)
            if layer is not None:
                setattr(block, name, made(layer))
    return model


def _fused(eager: EagerLoRA) -> LoRALinear:
    """The same update by fastlora, in parameters of its own."""
    made = LoRALinear.from_linear(eager.linear, rank=RANK, alpha=ALPHA, dropout=eager.dropout)
    with torch.no_grad():
        made.lora_A.copy_(eager.lora_a)
    return made


def _with_peft(base: Transformer, eager: Transformer, dropout: float) -> nn.Module:
    """The same updates by PEFT, whose B begins at zero too."""
    peft = require("peft", distribution="peft", purpose="the comparison with PEFT", extra="bench")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(LAYERS))
    adapted = peft.get_peft_model(_sharing(base), config)
    with torch.no_grad():
        for name, layer in eager.named_modules():
            if isinstance(layer, EagerLoRA):
                adapted.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(layer.lora_a)
    model: nn.Module = adapted.train()
    return model


def _sharing(model: Transformer) -> Transformer:
    """A copy of the modules around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(each): each for each in tensors})
