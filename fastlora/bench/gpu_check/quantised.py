"""Quantised weights on the card: dense with the bits of their definition, and the times of an NF4 layer."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora._core.backend import use_backend
from fastlora.bench.candidates import DTYPES
from fastlora.bench.cases import ALPHA, GPU, LLAMA_8B, Case, layer_work
from fastlora.bench.gpu_check.comparing import eager_and_exact, equality, outcome, outputs_and_gradients
from fastlora.bench.gpu_check.items import Found, Item
from fastlora.bench.gpu_check.layers import predicted_ms, timed_rows
from fastlora.bench.gpu_check.profiled import profile_item
from fastlora.bench.results import EAGER_MODE, OURS
from fastlora.bench.turns import Step
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.weights.scaled import ScaledWeight
from fastlora.tuning.candidates import SCALING
from fastlora.tuning.weights import DrawnWeight
from fastlora_kernels.tile import cdiv

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# outputs, inputs, block, whether its factors are quantised too: whole programs, ragged ones, rows that end
# within a block, a byte that two rows share
FOUR_BITS = (
    (1024, 4096, 64, True), (1024, 4096, 64, False), (333, 1000, 64, True), (35, 33, 32, True),
    (300, 768, 4096, False),
)  # fmt: skip
# outputs, inputs, rows and columns that share a factor
EIGHT_BITS = ((1024, 4096, 1, 4096), (333, 1000, 128, 128), (70, 333, 70, 333))
# rows, outputs, inputs, dtype: few rows decode the weight; dense, the last two exceed the workspace, and in
# float32 every card adds S·Bᵀ to a library product, to columns of y
CALLS = (
    (1029, 1024, 2048, BF16), (16, 1024, 2048, BF16), (512, 17_408, 2048, BF16), (512, 17_408, 2048, FP32),
)  # fmt: skip
LAYER = f"{LLAMA_8B} q, o"


def items(device: torch.device) -> Sequence[Item]:
    """An item for each of :data:`FOUR_BITS`, :data:`EIGHT_BITS` and :data:`CALLS`."""
    found = []
    for n, k, blocksize, nested in FOUR_BITS:
        name = f"4 bits dense: {n} × {k}, blocks of {blocksize}{', nested' if nested else ''}"
        found.append(Item(name, partial(four_bits, name, n, k, blocksize, nested, device)))
    for n, k, rows, columns in EIGHT_BITS:
        name = f"8 bits dense: {n} × {k}, blocks of {rows} × {columns}"
        found.append(Item(name, partial(eight_bits, name, n, k, (rows, columns), device)))
    for m, n, k, dtype in CALLS:
        name = f"LoRA over 4 bits: {m} × {k} × {n} in {dtype}"
        found.append(Item(name, partial(call, name, m, n, k, dtype, device)))
    return found


def four_bits(
    case: str, n: int, k: int, blocksize: int, nested: bool, device: torch.device
) -> Iterator[Found]:
    """All rows and the latter half of them; the arguments after the case are those of :data:`FOUR_BITS`."""
    weight = DrawnWeight(n, k, blocksize, nested, device)
    half = n // 2 // weight.row_step * weight.row_step
    for dtype in (BF16, FP16, FP32):
        expected = weight.by_definition(dtype)
        with use_backend("triton"):
            yield equality(case, f"all rows in {dtype}", weight.dense(dtype), expected)
            rows = weight.dense(dtype, slice(half, n))
        yield equality(case, f"rows from {half} on in {dtype}", rows, expected[half:])


def eight_bits(case: str, n: int, k: int, blocks: tuple[int, int], device: torch.device) -> Iterator[Found]:
    """int8 and e4m3fn codes; the arguments after the case are those of :data:`EIGHT_BITS`."""
    scales = torch.rand(cdiv(n, blocks[0]), cdiv(k, blocks[1]), device=device) + 0.1
    spread = scales.repeat_interleave(blocks[0], 0)[:n].repeat_interleave(blocks[1], 1)[:, :k]
    bytes_ = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=device)
    # without the two NaN of e4m3fn
    floats = torch.where(bytes_ & 0x7F == 0x7F, 0, bytes_).view(torch.float8_e4m3fn)
    for codes in (bytes_.view(torch.int8), floats):
        exact = codes.float() * (spread * (1 / 127))
        weight = ScaledWeight(codes, scales, blocks, unit=1 / 127)
        for dtype in (BF16, FP16, FP32):
            with use_backend("triton"):
                dense = weight.dense(dtype)
            yield equality(case, f"{codes.dtype} in {dtype}", dense, exact.to(dtype))


def call(case: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Iterator[Found]:
    """Output and gradients against float64; the arguments after the case are those of :data:`CALLS`."""
    weight = DrawnWeight(n, k, 64, True, device)
    x, dy = torch.randn(m, k, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
    a, b = torch.randn(16, k, device=device) * k**-0.5, torch.randn(n, 16, device=device) / 4

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, weight, None, a, b, scaling=SCALING)

    def formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return reference.lora_linear(x, dense.to(x.dtype), None, a, b, scaling=SCALING)

    with use_backend("triton"):
        dense = weight.dense(dtype)
        got = outputs_and_gradients(fused, (x, a, b), dy)
    yield outcome(case, "y, dX, dA and dB", got, *eager_and_exact(formula, (x, a, b), dy), max(m, n, k))


def timed_items(device: torch.device) -> Sequence[Item]:
    """An NF4 layer beside the frozen dense one, with dropout."""
    return [Item(_name(_case()), partial(rows, _case(), device))]


def profiles(device: torch.device) -> Sequence[Item]:
    """An item for each of :func:`timed_items`, to come after all that is timed."""
    return [profile_item(_name(_case()), lambda: _steps(_case(), device)[OURS])]


def rows(case: Case, device: torch.device) -> Iterator[Found]:
    """Both passes in a row of eager mode and one of graphs."""
    told: dict[str, Any] = layer_work(case) | {"predicted_ms": predicted_ms(case, device, weight="nf4")}
    yield from timed_rows(case, _steps(case, device), told, {}, device)


def _case() -> Case:
    m, k, n = GPU[LAYER]
    return Case(EAGER_MODE, f"{LAYER}, NF4", m, k, n, dropout=0.1)


def _name(case: Case) -> str:
    return f"{case.name}, p = {case.dropout:g}"


def _steps(case: Case, device: torch.device) -> dict[str, Step]:
    """Both passes of the frozen dense layer and of ours."""
    m, k, n = GPU[LAYER]
    dtype = DTYPES[case.dtype]
    weight = DrawnWeight(n, k, 64, True, device)
    frozen = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(m, k, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(m, n, device=device, dtype=dtype)
    a = (torch.randn(case.rank, k, device=device) * k**-0.5).requires_grad_()
    b = torch.zeros(n, case.rank, device=device).requires_grad_()
    options: dict[str, Any] = {"scaling": ALPHA / case.rank, "dropout": case.dropout}

    def bare() -> tuple[Tensor, ...]:
        return torch.autograd.grad(frozen(x), (x,), dy)

    def fused() -> tuple[Tensor, ...]:
        return torch.autograd.grad(lora_linear(x, weight, None, a, b, **options), (x, a, b), dy)

    return {"frozen": bare, OURS: fused}
