"""lora_linear on every path of the ``triton`` backend: as exact as eager, from the same mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the triton backend needs Triton")

import fastlora
from fastlora.functional import lora_linear
from fastlora.ops import kernel_paths, lora_triton
from fastlora.ops.decide import Decision
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_linear import LoRALinearFunction
from fastlora_kernels import targets
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.tile import Shape
from tests.cases import cases
from tests.lora_yardstick import (
    EACH_DTYPE,
    Case,
    assert_as_exact_as_eager,
    eager,
    make_case,
    outputs_and_gradients,
    unpack_mask,
)

PATHS = ("split", "single", "epilogue")
# ragged, and ranks on both sides of what one launch and one read of dY hold
SIZES = [(33, 37, 41, 5), (65, 48, 1, 3), (34, 34, 48, 40), (31, 33, 63, 70)]


def taking(forward: str, backward: str) -> Callable[..., Choice]:
    """A choice of these paths, of the split one where they can't serve the call."""

    def choose(
        part: str, shape: Shape, *args: Any, dropping: bool, dora: bool = False, **options: Any
    ) -> Choice:
        path = forward if part == "forward" else backward
        fits = part == "forward" and not (dropping or dora) and shape.n > 0 and shape.r <= 64
        return Choice("split" if path == "single" and not fits else path)

    return choose


class Taken:
    """Makes every call take one path, and notes which kernels of the other paths were launched."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        monkeypatch.setattr(kernel_paths, "choose", taking(path, path))
        for name in ("lora_forward_single", "lora_add"):
            monkeypatch.setattr(lora_triton, name, self._noting(name))

    def _noting(self, name: str) -> Any:
        function = getattr(lora_triton, name)

        def run(*args: Any, **options: Any) -> Any:
            self.ran.append(name)
            return function(*args, **options)

        return run


# the split path has its tests in test_ops_lora_linear
@pytest.fixture(params=PATHS[1:])
def taken(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> Any:
    with fastlora.use_backend("triton"):
        yield Taken(request.param, monkeypatch)


def run(case: Case, dropout: float = 0.0) -> list[Tensor]:
    """y and gradients, recording in the case the mask that the op drew."""
    seed = torch.tensor([5], device=case.x.device) if dropout else None

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor
        y, _, mask = LoRALinearFunction.apply(
            x, case.weight, case.bias, a, b, seed, case.scaling, dropout, Decision("triton")
        )
        if dropout:
            case.keep, case.keep_probability = unpack_mask(mask, x.shape[-1]), keep_probability(dropout)
        return y

    return outputs_and_gradients(forward, case)


@EACH_DTYPE
@pytest.mark.parametrize("size", cases(SIZES[::2], map(pytest.param, SIZES[1::2])), ids=str)
def test_as_exact_as_eager(
    taken: Taken,
    request: pytest.FixtureRequest,
    kernel_device: torch.device,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    """The split path serves what one launch can't: dropout and high ranks."""
    path = request.node.callspec.params["taken"]
    served = ["lora_add", "lora_add"] if path == "epilogue" else ["lora_forward_single"]
    for dropout in (0.0, 0.3) if path == "epilogue" or dtype == torch.float32 else (0.0,):
        taken.ran.clear()
        case = make_case(*size, dtype, bias=size[-1] != 3, device=kernel_device)
        assert_as_exact_as_eager(run(case, dropout), case)
        assert taken.ran == (served if path == "epilogue" or not (dropout or size[-1] > 64) else [])


@pytest.mark.parametrize(("target", "rank"), [("sm_80", 64), ("sm_90", 16)])
def test_plans_of_real_gpus(
    taken: Taken,
    request: pytest.FixtureRequest,
    target: str,
    rank: int,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the tiles and splits that a GPU gets, through the interpreter where there is none."""
    monkeypatch.setattr(targets, "detect", lambda _: targets.TARGETS[target])
    for dropout in (0.0, 0.3) if "epilogue" in request.node.name else (0.0,):
        case = make_case(
            70, 144, 112, rank, torch.bfloat16, adapter_dtype=torch.float32, device=kernel_device
        )
        assert_as_exact_as_eager(run(case, dropout), case)


@pytest.mark.parametrize("size", [(0, 5, 6, 2), (4, 0, 6, 2), (4, 5, 0, 2), (0, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_empty_axes(
    taken: Taken, kernel_device: torch.device, size: tuple[int, int, int, int], dropout: float
) -> None:
    case = make_case(*size, torch.float32, device=kernel_device)
    got = run(case, dropout)
    case.keep = None
    for value, wanted in zip(got, eager(case), strict=True):
        assert torch.equal(value, wanted)


def test_strides(taken: Taken, kernel_device: torch.device) -> None:
    """Columns out of a wider x, a transposed weight, a permuted gradient of the output."""
    case = make_case(12, 37, 41, 5, torch.float32, device=kernel_device)
    case.x = torch.randn(3, 8, 50, device=kernel_device)[:, ::2, 3:44]
    case.weight = torch.randn(41, 37, device=kernel_device).t()
    case.dy = torch.randn(37, 4, 3, device=kernel_device).permute(2, 1, 0)
    assert_as_exact_as_eager(run(case), case)


def test_only_x_or_only_the_adapter_trains(taken: Taken, kernel_device: torch.device) -> None:
    """Each gradient alone is the same as beside the others."""
    case = make_case(33, 37, 41, 5, torch.float32, device=kernel_device)
    together = run(case)[1:]
    for index, wanted in enumerate(together):
        inputs = [case.x, case.lora_a, case.lora_b]
        inputs[index] = inputs[index].detach().requires_grad_()
        x, a, b = inputs
        y = lora_linear(x, case.weight, case.bias, a, b, scaling=case.scaling)
        torch.testing.assert_close(torch.autograd.grad(y, inputs[index], case.dy)[0], wanted)


def test_every_path_draws_the_same_mask(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a backward pass may take another path than its forward pass, and recomputation too."""
    masks = []
    for path in PATHS:
        Taken(path, monkeypatch)
        case = make_case(20, 33, 70, 5, torch.float32, device=kernel_device)
        run(case, 0.3)
        masks.append(case.keep)
    assert masks[0] is not None
    assert all(mask is not None and torch.equal(mask, masks[0]) for mask in masks)


def test_paths_mix(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward on one path, backward on another, either way round."""
    mixed = [("epilogue", "split"), ("split", "epilogue"), ("single", "epilogue")]
    # without dropout there is no mask, of which the library would keep another kind
    undropped = [("library", "split"), ("single", "library"), ("library", "epilogue"), ("library", "library")]
    for forward, backward in mixed + undropped:
        monkeypatch.setattr(kernel_paths, "choose", taking(forward, backward))
        for dropout in (0.0, 0.3) if (forward, backward) in mixed else (0.0,):
            case = make_case(20, 33, 40, 5, torch.float32, device=kernel_device)
            assert_as_exact_as_eager(run(case, dropout), case)
