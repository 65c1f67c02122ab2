"""What the launch plan predicts for GPUs that need not be here. Nothing in this file was measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastlora._core.backend import triton_available
from fastlora.bench.results import GRAPHS, Row
from fastlora.bench.work import lora_flops, lora_least_bytes

if TYPE_CHECKING:
    from fastlora_kernels.targets import Target

DROPOUT, RANK = 0.1, 16
# rows, columns in, columns out: whose DRAM traffic and times are published for other kernels
SQUARES = {f"8192 × {side} × {side}": (8192, side, side) for side in (4096, 5120, 8192)}
# what people adapt, beside the squares
LAYERS = {
    "ViT-B attention": (6304, 768, 768),
    "BERT-base FFN up": (8192, 768, 3072),
    "LLaMA-8B k, v": (8192, 4096, 1024),
    "LLaMA-8B gate, up": (8192, 4096, 14336),
    "LLaMA-70B down": (8192, 28672, 8192),
    "LLaMA-8B q, o, 64 rows": (64, 4096, 4096),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prediction:
    """A LoRA layer's forward and backward pass on a GPU, predicted.

    Attributes:
        name: Name of the layer.
        card: The GPU.
        path: What the plan chooses.
        predicted_us: Time of both passes, in µs.
        ceiling_us: Time of both passes of the frozen layer alone, in µs.
        flops: Floating-point operations of both passes.
        least_bytes: Memory traffic of both passes where either moves each tensor once.
        moved_bytes: Memory traffic of both passes, predicted.
    """

    name: str
    card: str
    path: str
    predicted_us: float
    ceiling_us: float
    flops: int
    least_bytes: int
    moved_bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte that has to move."""
        return self.flops / self.least_bytes

    @property
    def tflops(self) -> float:
        """Operations in 10¹² a second."""
        return self.flops / self.predicted_us / 1e6

    @property
    def overhead(self) -> float:
        """Time over the frozen layer's."""
        return self.predicted_us / self.ceiling_us


@dataclass(frozen=True)
class Predictions:
    """Everything that is predicted for a report.

    Attributes:
        target: The GPU whose roof is drawn.
        points: Layers on it.
        cards: Overheads of the squares by card: ``cards[card][square]``.
    """

    target: "Target"
    points: list[Prediction]
    cards: dict[str, dict[str, float]]


def predict(card: str, rows: Iterable[Row] = ()) -> Predictions | None:
    """Predict layers on a GPU, and the squares on every card; None where Triton is not installed.

    Args:
        card: Name of a GPU that is known.
        rows: Cases measured on it: their layers are predicted too, or the usual layers where there are none.

    Raises:
        ValueError: No such GPU is known.
    """
    if not triton_available():
        return None
    from fastlora_kernels.targets import CARDS, find_card

    target = find_card(card)
    measured = {(row.name, row.dtype): (row.m, row.k, row.n) for row in rows if _comparable(row)}
    shapes: dict[tuple[str, str], Any] = measured or {(name, "bf16"): size for name, size in LAYERS.items()}
    shapes = {(name, "bf16"): size for name, size in SQUARES.items()} | shapes
    points = [_explain(name, size, dtype, target) for (name, dtype), size in shapes.items()]
    cards = {
        other.card: {name: _explain(name, size, "bf16", other).overhead for name, size in SQUARES.items()}
        for other in CARDS.values()
    }
    return Predictions(target, points, cards)


def _comparable(row: Row) -> bool:
    both = row.suite in ("layers", GRAPHS) and row.passes == "forward_backward"
    return both and row.dropout == DROPOUT and row.dtype in _DTYPES and row.m is not None


def _explain(name: str, size: tuple[int, int, int], dtype: str, target: "Target") -> Prediction:
    from fastlora_kernels.choose.explain import explain
    from fastlora_kernels.tile import Shape

    m, k, n = size
    told = explain("lora_linear", Shape(m, n, k, RANK), _DTYPES[dtype], target, dropout=DROPOUT)
    return Prediction(
        name=name,
        card=target.card,
        path=str(told.path),
        predicted_us=told.predicted_us,
        ceiling_us=told.ceiling_us,
        flops=lora_flops(m, k, n, RANK, backward=True),
        least_bytes=lora_least_bytes(m, k, n, RANK, itemsize=2, dropout=True, backward=True),
        moved_bytes=told.bytes,
    )
