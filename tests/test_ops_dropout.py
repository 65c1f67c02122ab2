"""Dropout masks: the right rate, the same in forward and backward, repeatable from torch's generator."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.functional import lora_linear
from fastlora.ops.decide import Decision
from fastlora.ops.keep_mask import draw_keep_mask, drop_threshold, keep_probability
from fastlora.ops.lora_linear import LoRALinearFunction
from tests.cases import cases
from tests.lora_yardstick import unpack_mask


@pytest.fixture(params=["triton", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        pytest.importorskip("triton", reason="the triton backend needs Triton")
        request.getfixturevalue("kernel_device")
    with fastlora.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("kernel_device") if backend == "triton" else torch.device("cpu")


def draw(backend: Any, shape: tuple[int, int], dropout: float, seed: int, device: torch.device) -> Tensor:
    """The keep mask that an op call draws."""
    x = torch.ones(shape, device=device)
    tensors = (x, x[:1], None, x[:1], torch.ones(1, 1, device=device))
    settings = (torch.tensor([seed], device=device), 1.0, dropout, Decision(backend))
    mask = LoRALinearFunction.apply(*tensors, *settings)[2]
    return unpack_mask(mask, shape[1])


@pytest.mark.parametrize("backend", cases(["torch"], ["triton"]), indirect=True)
@pytest.mark.parametrize("dropout", cases([0.1], [0.001, 0.5, 0.9]))
def test_keep_rate(backend: str, device: torch.device, dropout: float) -> None:
    shape = (100, 1000)
    keep = draw(backend, shape, dropout, 3, device).double()
    deviation = (dropout * (1 - dropout) / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - keep_probability(dropout)) < 5 * deviation
    if dropout < 0.1:
        # too few drops a row for the normal bounds below
        return
    # no row, column or bit position is favoured
    for axis, count in ((0, shape[0]), (1, shape[1])):
        spread = (dropout * (1 - dropout) / count) ** 0.5
        assert (keep.mean(axis) - keep_probability(dropout)).abs().max() < 6 * spread
    by_bit = keep[:, :992].reshape(-1, 32).mean(0)
    assert (by_bit - keep_probability(dropout)).abs().max() < 5 * deviation * 32**0.5


@pytest.mark.parametrize("backend", cases(["torch"], ["triton"]), indirect=True)
def test_neighbours_are_independent(backend: str, device: torch.device) -> None:
    keep = draw(backend, (150, 512), 0.5, 4, device).double() - 0.5
    for shift in (1, 2, 8, 16, 32, 64):
        correlation = 4 * (keep[:, shift:] * keep[:, :-shift]).mean()
        assert abs(correlation) < 5 * keep[:, shift:].numel() ** -0.5, shift
    across_rows = 4 * (keep[1:] * keep[:-1]).mean()
    assert abs(across_rows) < 5 * keep[1:].numel() ** -0.5


@pytest.mark.parametrize("backend", ["triton", "torch"], indirect=True)
def test_seeds_give_different_masks(backend: str, device: torch.device) -> None:
    first, again, other = (draw(backend, (64, 96), 0.5, seed, device) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert 0.4 < (first == other).double().mean() < 0.6


@pytest.mark.parametrize("dropout", [0.0051, 0.5, 0.997])
@pytest.mark.parametrize("shape", [(30, 50), (701, 1003)], ids=["few elements", "several chunks"])
def test_keep_rate_of_any_size(shape: tuple[int, int], dropout: float) -> None:
    """Few elements have a stream of their own; the others, in chunks, share thresholds of 8 bits and more."""
    repeats = 400 if shape[0] == 30 else 1
    masks = torch.stack([draw_keep_mask(shape, dropout, torch.tensor([i])) for i in range(repeats)])
    assert masks.unique().tolist() == [-1, 0]
    keep = (masks != 0).double()
    deviation = (dropout * (1 - dropout) / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - keep_probability(dropout)) < 5 * deviation


def test_splitmix_stream_of_other_devices() -> None:
    """The stream of devices other than the CPU, against the published splitmix64 of a plain loop."""
    from fastlora.ops import keep_mask

    seed, expected, state = 1234567, [], 1234567
    for _ in range(6):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    words = keep_mask._splitmix64(torch.tensor([seed]), 6)
    assert words.numpy().view(np.uint64).tolist() == expected


def test_thresholds() -> None:
    assert drop_threshold(0.5) == 32768
    assert drop_threshold(1e-9) == 1
    assert drop_threshold(1 - 1e-9) == 65535
    assert keep_probability(0.0) == 1.0
    mask = draw_keep_mask((3, 0), 0.5, torch.tensor([1]))
    assert mask.shape == (3, 0)


def test_forward_and_backward_use_the_same_mask(backend: str, device: torch.device) -> None:
    """With W = 0 and A = B = I·c the op is dropout itself: y and dX show the mask they used."""
    size = 70
    eye = torch.eye(size, device=device)
    x = torch.ones(50, size, device=device, requires_grad=True)
    a, b = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    y = lora_linear(x, torch.zeros_like(eye), None, a, b, scaling=1.0, dropout=0.4)
    keep = (y != 0).float()
    assert 0.5 < keep.mean() < 0.7
    dx, da, db = torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    scale = y.detach().max()
    torch.testing.assert_close(scale.item(), 1 / 0.6, rtol=1e-4, atol=0)
    torch.testing.assert_close(dx, keep * scale)
    torch.testing.assert_close(da, (keep.sum(0) * scale).expand(size, size))
    torch.testing.assert_close(db, (keep.sum(0) * scale).expand(size, size))


def call(x: Tensor, weights: tuple[Tensor, ...], **options: Any) -> Tensor:
    weight, a, b = weights
    return lora_linear(x, weight, None, a, b, scaling=2.0, dropout=0.3, **options)


def make(device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = torch.randn(40, 50, device=device, requires_grad=True)
    weight, a, b = (torch.randn(shape, device=device) for shape in ((60, 50), (4, 50), (60, 4)))
    return x, (weight, a.requires_grad_(), b.requires_grad_())


def test_manual_seed_reproduces(backend: str, device: torch.device) -> None:
    x, weights = make(device)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(call(x, weights))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_generator_reproduces_and_leaves_the_default_alone(backend: str, device: torch.device) -> None:
    x, weights = make(device)
    state = torch.get_rng_state()
    first, second = (call(x, weights, generator=torch.Generator(device).manual_seed(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_has_no_dropout(backend: str, device: torch.device) -> None:
    x, weights = make(device)
    plain = lora_linear(x, weights[0], None, *weights[1:], scaling=2.0)
    assert torch.equal(call(x, weights, training=False), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_the_same_bits(backend: str, device: torch.device, reentrant: bool) -> None:
    x, weights = make(device)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(7)
        y = checkpoint(call, x, weights, use_reentrant=reentrant) if wrapped else call(x, weights)
        assert isinstance(y, Tensor)
        inputs = (x, *weights[1:])
        for tensor in inputs:
            tensor.grad = None
        # the reentrant checkpoint only works with .backward()
        y.square().sum().backward()
        gradients.append((y, *(tensor.grad for tensor in inputs)))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_gradients_are_the_same_bits_on_every_run(backend: str, device: torch.device) -> None:
    x, weights = make(device)
    runs = []
    for _ in range(3):
        torch.manual_seed(3)
        runs.append(torch.autograd.grad(call(x, weights).sum(), (x, *weights[1:])))
    for gradient in zip(*runs, strict=True):
        assert all(torch.equal(gradient[0], other) for other in gradient[1:])


def test_compiled_checkpoint_recomputes_the_same_mask() -> None:
    """Compile, checkpoint and dropout together: y and dX of dropout itself show the masks they used."""
    size = 70
    # two tensors: dynamo can't trace a Function that is given one tensor twice
    a, b = torch.eye(size), torch.eye(size)
    x = torch.ones(50, size, requires_grad=True)

    def dropped(x: Tensor) -> Tensor:
        return lora_linear(x, torch.zeros_like(a), None, a, b, scaling=1.0, dropout=0.4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        y = checkpoint(dropped, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    y = step(x)
    assert 0.3 < (y == 0).double().mean() < 0.5
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert not torch.equal(step(x), y)
