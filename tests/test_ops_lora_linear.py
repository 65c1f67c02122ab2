"""The whole op on every backend: as exact as eager, for every layout, dtype and degenerate size."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.functional import lora_linear
from fastlora.ops.decide import Decision
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_linear import LoRALinearFunction
from tests.cases import cases
from tests.lora_yardstick import (
    DTYPES,
    EACH_DTYPE,
    Case,
    assert_as_exact_as_eager,
    eager,
    make_case,
    outputs_and_gradients,
    unpack_mask,
)

SIZES = [
    (33, 37, 41, 5),
    (1, 64, 32, 16),
    (31, 33, 63, 70),
    (64, 1, 48, 8),
    (65, 48, 1, 3),
    (130, 96, 160, 16),
]


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        pytest.importorskip("triton", reason="the triton backend needs Triton")
        request.getfixturevalue("kernel_device")
    with fastlora.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("kernel_device") if backend == "triton" else torch.device("cpu")


def run(case: Case, **options: Any) -> list[Tensor]:
    return outputs_and_gradients(
        lambda x, a, b: lora_linear(x, case.weight, case.bias, a, b, scaling=case.scaling, **options), case
    )


def run_with_dropout(case: Case, backend: Any, dropout: float) -> list[Tensor]:
    """Like :func:`run`, recording in the case the mask that the op drew."""
    seed = torch.tensor([5], device=case.x.device)

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor
        y, _, mask = LoRALinearFunction.apply(
            x, case.weight, case.bias, a, b, seed, case.scaling, dropout, Decision(backend)
        )
        case.keep = unpack_mask(mask, x.shape[-1])
        case.keep_probability = keep_probability(dropout)
        return y

    return outputs_and_gradients(forward, case)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
@EACH_DTYPE
@pytest.mark.parametrize("size", cases(SIZES[:3], map(pytest.param, SIZES[3:])), ids=str)
def test_as_exact_as_eager(
    backend: str,
    device: torch.device,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    dropout: float,
) -> None:
    case = make_case(*size, dtype, bias=size[-1] != 3, device=device)
    got = run_with_dropout(case, backend, dropout) if dropout else run(case)
    ratios = assert_as_exact_as_eager(got, case)
    print("error over eager's:", {name: round(ratio, 2) for name, ratio in ratios.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_in_another_dtype(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """fp32 adapters beside a 16-bit layer: rounded once, their gradients back in fp32."""
    case = make_case(70, 40, 50, 6, dtype, adapter_dtype=torch.float32, device=device)
    assert_as_exact_as_eager(run(case), case)


@pytest.mark.parametrize("shape", [(41,), (7, 41), (2, 3, 41), (2, 3, 4, 41), (2, 1, 3, 2, 41)], ids=str)
def test_one_to_five_dimensions(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    case = make_case(1, 37, 41, 5, torch.float32, device=device)
    case.x, case.dy = torch.randn(shape, device=device), torch.randn(*shape[:-1], 37, device=device)
    assert_as_exact_as_eager(run(case), case)


@pytest.mark.parametrize("layout", ["row slice", "column slice", "transposed", "permuted", "expanded"])
def test_strides(backend: str, device: torch.device, layout: str) -> None:
    case = make_case(12, 37, 41, 5, torch.float32, device=device)
    wide = torch.randn(3, 8, 41 + 9, device=device)
    case.x = {
        "row slice": wide[:, 2:6, :41],
        "column slice": wide[:, ::2, 3:44],
        "transposed": torch.randn(3, 41, 4, device=device).transpose(1, 2),
        "permuted": torch.randn(4, 3, 41, device=device).permute(1, 0, 2),
        "expanded": torch.randn(1, 1, 41, device=device).expand(3, 4, 41),
    }[layout]
    case.weight = torch.randn(41, 37, device=device).t()
    case.lora_a, case.lora_b = torch.randn(41, 5, device=device).t(), torch.randn(5, 37, device=device).t()
    case.dy = torch.randn(37, 4, 3, device=device).permute(2, 1, 0)
    assert_as_exact_as_eager(run(case), case)


@pytest.mark.parametrize("size", [(0, 5, 6, 2), (4, 0, 6, 2), (4, 5, 0, 2), (0, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_empty_axes(
    backend: str, device: torch.device, size: tuple[int, int, int, int], dropout: float
) -> None:
    case = make_case(*size, torch.float32, device=device)
    got = run(case, dropout=dropout)
    for value, expected in zip(got, eager(case), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("rank", cases([1, 17, 100], [2, 15, 16, 32, 128, 256]))
def test_ranks(backend: str, device: torch.device, rank: int) -> None:
    case = make_case(40, 50, 60, rank, torch.float32, device=device)
    assert_as_exact_as_eager(run(case), case)


def test_zero_b_changes_nothing_bit_for_bit() -> None:
    for dtype in DTYPES.values():
        case = make_case(64, 48, 80, 8, dtype)
        case.lora_b.zero_()
        assert torch.equal(run(case)[0], torch.nn.functional.linear(case.x, case.weight, case.bias))


def test_backends_by_name(kernel_device: torch.device) -> None:
    case = make_case(33, 37, 41, 5, torch.float64)
    with fastlora.use_backend("reference"):
        assert torch.equal(run(case)[0], eager(case)[0])
    with (
        fastlora.use_backend("triton"),
        pytest.raises(ValueError, match="float32, float16 and bfloat16, got"),
    ):
        run(case)


def test_weight_and_bias_that_train_get_their_gradients(backend: str, device: torch.device) -> None:
    case = make_case(33, 37, 41, 5, torch.float32, device=device)
    assert case.bias is not None
    parameters = [case.weight.requires_grad_(), case.bias.requires_grad_()]
    y = lora_linear(case.x, case.weight, case.bias, case.lora_a, case.lora_b, scaling=1.0)
    dweight, dbias = torch.autograd.grad(y, parameters, case.dy)
    torch.testing.assert_close(dweight, case.dy.t() @ case.x)
    torch.testing.assert_close(dbias, case.dy.sum(0))


@pytest.mark.parametrize(
    ("target", "rank"),
    cases(
        [("sm_90", 96), ("gfx942", 16)],
        [
            *[("sm_80", 16), ("sm_80", 32), ("sm_80", 96), ("sm_90", 16), ("sm_90", 32)],
            *[("gfx942", 32), ("gfx942", 96)],
        ],
    ),
)
def test_plans_of_real_gpus(
    target: str, rank: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole op with the tiles and splits that a GPU gets, through the interpreter where there is none."""
    targets = pytest.importorskip("fastlora_kernels.targets")
    monkeypatch.setattr(targets, "detect", lambda _: targets.TARGETS[target])
    case = make_case(200, 144, 176, rank, torch.bfloat16, adapter_dtype=torch.float32, device=kernel_device)
    assert_as_exact_as_eager(run_with_dropout(case, "triton", 0.3), case)


@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [
        ((64, 48, 80, 8), torch.bfloat16, "triton"),
        # which path these take, library products among them, is decided inside
        ((64, 48, 80, 8), torch.float32, "triton"),
        ((8, 48, 80, 8), torch.bfloat16, "triton"),
        ((64, 47, 80, 8), torch.bfloat16, "torch"),
        ((64, 48, 80, 20), torch.bfloat16, "torch"),
    ],
    ids=["kernels", "fp32", "few rows", "unaligned", "odd rank"],
)
def test_auto_follows_the_plan(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    expected: str,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = pytest.importorskip("fastlora_kernels.targets")
    monkeypatch.setattr(targets, "detect", lambda _: targets.TARGETS["sm_90"])
    monkeypatch.setattr("fastlora._core.backend._automatic", lambda device, dtype: "triton")
    used: list[str] = []
    apply = LoRALinearFunction.apply

    def spy(*args: Any) -> Any:
        used.append(args[8].backend)
        return apply(*args)

    monkeypatch.setattr(LoRALinearFunction, "apply", spy)
    run(make_case(*size, dtype, device=kernel_device))
    assert used == [expected]
