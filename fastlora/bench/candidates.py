"""The implementations that are compared, one step each: LoRA layers and bottleneck adapters."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora._core.extras import require
from fastlora.bench.cases import ALPHA, BOTH, FORWARD, Case
from fastlora.bench.library_split import LibrarySplit
from fastlora.bench.turns import Step
from fastlora.nn import AdapterLayer, LoRALinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# largest error relative to the reference's largest element that still counts as the same function
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 5e-3}

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidates:
    """What is compared in a case.

    Attributes:
        steps: One pass for each candidate.
        given: Inputs, gradients and weights, which memory measurements leave out.
        absent: Why others are not among them.
    """

    steps: dict[str, Step]
    given: tuple[Tensor, ...]
    absent: Mapping[str, str] = field(default_factory=dict)


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


def lora_candidates(case: Case) -> Candidates:
    """One pass through a LoRA layer per candidate; each returns y and, if it runs backward, dX, dA and dB.

    ``frozen`` is the layer without LoRA, whose backward is dX alone: nothing that trains through it can be
    faster. ``peft_same_dtype`` has adapters in the layer's 16-bit dtype, ``peft`` in fp32, as is its default
    and ours.
    """
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    device, m, k, n = torch.device(case.device), _size(case.m), _size(case.k), _size(case.n)
    base = nn.Linear(k, n, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(m, k, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(m, n, device=device, dtype=dtype)
    fused = LoRALinear.from_linear(base, rank=case.rank, alpha=ALPHA, dropout=case.dropout)
    a, b = fused.lora_A, fused.lora_B
    with torch.no_grad():
        b.normal_(std=0.02)
    split = LibrarySplit(base, a, b, fused.scaling, case.dropout)
    steps = {
        "frozen": _step(case, base, (x,), dy),
        "reference": _step(case, _eager(base, fused, case.dropout), (x, a, b), dy),
    }
    own: list[Tensor] = []
    for name, fp32_adapters in (("peft", True), ("peft_same_dtype", False)):
        if has_peft() and (fp32_adapters or dtype != torch.float32):
            layer, *trained = _peft_layer(base, fused, case.dropout, fp32_adapters)
            steps[name] = _step(case, layer, (x, *trained), dy)
            own += trained
    steps["addmm"] = _step(case, split, (x, a, b), dy)
    if compiles(case):
        steps["compiled"] = _step(case, _eager(base, fused, case.dropout, compiled=True), (x, a, b), dy)
    steps["fastlora"] = _step(case, fused, (x, a, b), dy)
    absent = {} if has_peft() else {"peft": "the package peft is not installed"}
    # PEFT's A and B are its own
    return Candidates(steps, (x, dy, *fused.parameters(), *own), absent)


def compiles(case: Case) -> bool:
    """Whether ``torch.compile`` is a candidate; on a CPU it takes seconds, so only where it counts most."""
    return case.device == "cuda" or (case.threads != 1 and case.passes == BOTH)


def _step(case: Case, forward: Forward, inputs: tuple[Tensor, ...], grad: Tensor) -> Step:
    """A pass from ``inputs[0]``, and back to all of them."""

    def step() -> tuple[Tensor, ...]:
        y = forward(inputs[0])
        if case.passes == FORWARD:
            return (y.detach(),)
        return (y.detach(), *torch.autograd.grad(y, inputs, grad))

    return step


def _eager(base: nn.Linear, fused: LoRALinear, dropout: float, *, compiled: bool = False) -> Forward:
    formula = reference.lora_linear
    if compiled:
        # of one case's graph nothing is of use to the next
        torch._dynamo.reset()
        formula = torch.compile(formula, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        return formula(
            x, base.weight, base.bias, fused.lora_A, fused.lora_B, scaling=fused.scaling, dropout=dropout
        )

    return forward


def _peft_layer(
    base: nn.Linear, fused: LoRALinear, dropout: float, fp32_adapters: bool
) -> tuple[Any, Tensor, Tensor]:
    peft = require("peft", distribution="peft", purpose="the comparison with PEFT", extra="bench")
    config = peft.LoraConfig(
        r=fused.lora_A.shape[0], lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["0"]
    )
    # PEFT's default keeps the adapters of a 16-bit layer in fp32
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=fp32_adapters)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(fused.lora_A)
        b.copy_(fused.lora_B)
    return layer, a, b


class EagerAdapter(nn.Module):
    """The bottleneck adapter as everybody writes it."""

    def __init__(self, hidden_size: int, adapter_size: int, dropout: float) -> None:
        """Random weights, the up-projection too, so that every gradient is real."""
        super().__init__()
        self.down = nn.Linear(hidden_size, adapter_size)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(adapter_size, hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same."""
        update: Tensor = self.up(self.dropout(self.activation(self.down(h))))
        return h + update


def adapter_candidates(case: Case) -> Candidates:
    """Forward and backward of an adapter per candidate, on a GPU the compiled module too.

    ``products`` are the six matrix products of the formula and its gradients alone, into memory that is
    already there: no implementation on the same library can be faster.
    """
    torch.manual_seed(0)
    hidden, dtype = _size(case.k), DTYPES[case.dtype]
    eager = EagerAdapter(hidden, case.rank, case.dropout).to(case.device, dtype)
    ours = AdapterLayer(
        hidden, case.rank, dropout=case.dropout, dtype=dtype, device=torch.device(case.device)
    )
    for mine, theirs in ((ours.down_proj, eager.down), (ours.up_proj, eager.up)):
        mine.load_state_dict(theirs.state_dict())
    with torch.device(case.device):
        h = torch.randn(_size(case.m), hidden, dtype=dtype).requires_grad_()
        dout = torch.randn(_size(case.m), hidden, dtype=dtype)
    steps = {
        "products": _products(h.detach(), dout, eager.down.weight.detach(), eager.up.weight.detach()),
        "reference": _step(case, eager, (h, *eager.parameters()), dout),
    }
    if case.device == "cuda":
        torch._dynamo.reset()
        steps["compiled"] = _step(case, torch.compile(eager, dynamic=False), (h, *eager.parameters()), dout)
    steps["fastlora"] = _step(case, ours, (h, *ours.parameters()), dout)
    return Candidates(steps, (h, dout, *eager.parameters(), *ours.parameters()))


def _products(h: Tensor, dout: Tensor, down: Tensor, up: Tensor) -> Step:
    z, out = h @ down.t(), torch.empty_like(h)
    d_down, d_up = torch.empty_like(down), torch.empty_like(up)

    def step() -> tuple[Tensor, ...]:
        torch.mm(h, down.t(), out=z)
        torch.mm(z, up.t(), out=out)
        torch.mm(dout, up, out=z)
        torch.mm(dout.t(), z, out=d_up)
        torch.mm(z.t(), h, out=d_down)
        torch.mm(z, down, out=out)
        return ()

    return step


def _size(value: int | None) -> int:
    if value is None:
        raise ValueError("expected the sizes of a layer, got a case of a whole model")
    return value
