"""What parameter_report says a forward pass keeps, against formulas by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoRALinear, parameter_report

ROWS, WIDE, OUT, RANK, FLOAT = 5, 8, 4, 2, 4
X = ROWS * WIDE * FLOAT


def kept(model: nn.Module, sample_input: Any = (ROWS, WIDE), **options: Any) -> int:
    """Kept bytes, on shapes and with values alike."""
    report = parameter_report(model, sample_input=sample_input, **options)
    real = parameter_report(model, sample_input=sample_input, execute=True)
    assert report.kept_bytes is not None
    assert report == real
    return report.kept_bytes


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class SharedInput(nn.Module):
    """Query, key and value read the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDE, OUT) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q(x) + self.k(x) + self.v(x)
        return out


class Sliced(nn.Module):
    """A head that reads the first of ROWS tokens, as a vision transformer's does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, OUT)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x)[0])
        return out


class Forgetful(nn.Module):
    """Computes something with the graph and throws it away."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x).exp().sum()
        out: Tensor = self.linear(x)
        return out


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self._segment, self.first(x), use_reentrant=self.use_reentrant)

    def _segment(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(x).exp().tanh(), 0.5)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # half of it, in a storage of its own
        ctx.save_for_backward(x[:, ::2].clone())
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        return Halved.apply(x + self.scale)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(WIDE, OUT), X),
        (frozen(nn.Linear(WIDE, OUT)), 0),
        # a frozen layer after a trained one keeps only its weight, which is a parameter
        (nn.Sequential(nn.Linear(WIDE, WIDE), frozen(nn.Linear(WIDE, OUT))), X),
        # ReLU keeps its result, which the next layer's input is
        (nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT)), 2 * X),
        # GELU keeps its input, and the next layer its own
        (nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, OUT)), 3 * X),
        (SharedInput(), X),
        (Sliced(), 2 * X),
        (Forgetful(), X),
        # the input of the first layer and of the segment, whatever is in the segment
        (Checkpointed(use_reentrant=False), 2 * X),
        (Checkpointed(use_reentrant=True), 2 * X),
        (CustomFunction(), X // 2),
        (LoRALinear(WIDE, OUT, rank=RANK), X + ROWS * RANK * FLOAT),
        (nn.Sequential(LoRALinear(WIDE, OUT, rank=RANK)).eval(), X + ROWS * RANK * FLOAT),
        # mean and 1/σ of every row beside the input
        (nn.LayerNorm(WIDE), X + 2 * ROWS * FLOAT),
    ],
    ids=[
        "linear",
        "frozen",
        "trained-frozen",
        "relu",
        "gelu",
        "shared-input",
        "slice",
        "dropped-graph",
        "checkpoint",
        "checkpoint-reentrant",
        "custom-function",
        "lora",
        "lora-eval",
        "layer-norm",
    ],
)
def test_kept_bytes_by_hand(model: nn.Module, expected: int) -> None:
    assert kept(model) == expected


def test_lora_keeps_a_mask_with_dropout_and_only_while_training() -> None:
    layer = LoRALinear(WIDE, OUT, rank=RANK, dropout=0.5)
    with fastlora.use_backend("torch"):
        without = X + ROWS * RANK * FLOAT
        # a byte an element with library products
        assert kept(layer) == without + ROWS * WIDE
        assert kept(layer.eval()) == without


def test_the_eager_formula_keeps_more() -> None:
    model = nn.Sequential(nn.Linear(WIDE, WIDE), LoRALinear(WIDE, OUT, rank=RANK, dropout=0.5))
    with fastlora.use_backend("reference"):
        eager = kept(model)
    with fastlora.use_backend("torch"):
        fused = kept(model)
    s, mask = ROWS * RANK * FLOAT, ROWS * WIDE
    # both keep two inputs and S; eager PyTorch a dropped copy of x instead of x, and its float mask
    assert fused == 2 * X + s + mask
    assert eager == 2 * X + s + X


def test_dropout_keeps_a_mask_only_while_training() -> None:
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.Dropout(0.5))
    # PyTorch's mask is as wide as the activations on a CPU
    assert kept(model) == 2 * X
    assert kept(model.eval()) == X


def test_an_input_that_wants_a_gradient_makes_a_frozen_model_keep() -> None:
    model = frozen(nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()))
    assert kept(model) == 0
    assert kept(model, torch.zeros(ROWS, WIDE, requires_grad=True)) == X


def test_a_surrounding_autocast_counts() -> None:
    model = nn.Linear(WIDE, OUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # x in bfloat16; the bfloat16 weight is kept only for x's gradient
        assert kept(model) == X // 2
        x = torch.zeros(ROWS, WIDE, requires_grad=True)
        assert kept(model, x) == X // 2 + WIDE * OUT * 2


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode], ids=["no-grad", "inference"])
def test_gradients_are_on_whatever_surrounds(surrounding: Callable[[], Any]) -> None:
    model = nn.Linear(WIDE, OUT)
    with surrounding():
        report = parameter_report(model, sample_input=(ROWS, WIDE))
    assert report.kept_bytes == X


def test_attention_has_its_out_projection_in_its_own_row() -> None:
    attention = nn.TransformerEncoderLayer(WIDE, 2, 16, dropout=0.0, batch_first=True)
    report = parameter_report(attention, sample_input=(2, 3, WIDE))
    rows = {row.name: row.kept_bytes for row in report.modules}
    assert rows["self_attn.out_proj"] == 0
    x = 2 * 3 * WIDE * FLOAT
    # x, the packed q, k and v, their product (read by out_proj) and a logarithm for each row of the scores
    assert rows["self_attn"] == x + 3 * x + x + 2 * 2 * 3 * FLOAT


@pytest.mark.parametrize("execute", [False, True], ids=["shapes", "values"])
@pytest.mark.parametrize(
    "sample_input",
    [(ROWS, WIDE), torch.Size((ROWS, WIDE)), [torch.zeros(ROWS, WIDE)], {"input": torch.zeros(ROWS, WIDE)}],
    ids=["shape", "size", "arguments", "keywords"],
)
def test_ways_to_give_the_input(sample_input: Any, execute: bool) -> None:
    report = parameter_report(nn.Linear(WIDE, OUT), sample_input=sample_input, execute=execute)
    assert report.kept_bytes == X
