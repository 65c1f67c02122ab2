"""Layers that share x and, on request, drop the same of it: one mask is drawn and kept for them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import fastlora
from fastlora.functional import Projection, lora_linear, shared_lora_linear
from fastlora.ops import lora_torch, shared_passes, shared_torch
from fastlora.ops.keep_mask import draw_keep_mask, masked
from fastlora.ops.runtime import draw_seed, packed
from fastlora_kernels.quant import kernels
from tests.quantised import four_bit, read
from tests.test_ops_shared import BOTH, assert_same_gradients, both_passes, make_layers, make_x

ALL, TWO_OF_THREE = (0.3, 0.3, 0.3), (0.3, 0.5, 0.3)


def with_one_mask(x: Tensor, layers: Sequence[Projection]) -> tuple[Tensor, ...]:
    return shared_lora_linear(x, layers, one_mask=True)


def replayed(x: Tensor, layers: Sequence[Projection]) -> tuple[Tensor, ...]:
    """By separate calls, of which those with the same dropout get the same seed."""
    rates, ys = list[float](), []
    state = torch.get_rng_state()
    for layer in layers:
        rates += [layer.dropout] if layer.dropout and layer.dropout not in rates else []
        torch.set_rng_state(state)
        for _ in range(rates.index(layer.dropout) if layer.dropout else 0):
            draw_seed(x.device, None)
        ys.append(lora_linear(x, *layer[:4], scaling=layer.scaling, dropout=layer.dropout))
    return tuple(ys)


def made(
    dtype: torch.dtype, dropouts: Sequence[float], *, one_factor: bool, device: Any = "cpu"
) -> list[Projection]:
    layers = make_layers(dtype, dropouts, device)
    return [layer._replace(scaling=0.5) for layer in layers] if one_factor else layers


@pytest.mark.parametrize("one_factor", [True, False], ids=["one factor", "factors"])
@pytest.mark.parametrize("dropouts", [ALL, TWO_OF_THREE, (0.0, 0.3, 0.3)], ids=str)
@pytest.mark.parametrize("dtype", BOTH)
def test_it_gives_what_separate_calls_with_one_mask_give(
    dtype: torch.dtype, dropouts: tuple[float, ...], one_factor: bool
) -> None:
    layers = made(dtype, dropouts, one_factor=one_factor)
    with fastlora.use_backend("torch"):
        ys, gradients = both_passes(with_one_mask, make_x(dtype), layers)
        expected_ys, expected = both_passes(replayed, make_x(dtype), layers)
    assert_same_gradients(ys, expected_ys)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("used", [(0,), (1, 2)], ids=str)
def test_outputs_may_be_left_unused(used: tuple[int, ...]) -> None:
    layers = made(torch.float32, ALL, one_factor=True)
    layers[2].lora_A.requires_grad_(False)
    with fastlora.use_backend("torch"):
        _, gradients = both_passes(with_one_mask, make_x(), layers, used)
        _, expected = both_passes(replayed, make_x(), layers, used)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_quantised_weights(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = made(torch.float32, ALL, one_factor=True)
    weight = read(four_bit(32, 48))
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 32 // parts * 48 * 4)
    layers = [layers[0]._replace(weight=weight), *layers[1:]]
    with fastlora.use_backend("torch"):
        ys, gradients = both_passes(with_one_mask, make_x(), layers)
        expected_ys, expected = both_passes(replayed, make_x(), layers)
    assert_same_gradients(ys, expected_ys)
    assert_same_gradients(gradients, expected)


def test_by_kernels(kernel_device: torch.device) -> None:
    layers = made(torch.float32, ALL, one_factor=False, device=kernel_device)
    with fastlora.use_backend("triton"):
        ys, gradients = both_passes(with_one_mask, make_x(device=kernel_device), layers)
        expected_ys, expected = both_passes(replayed, make_x(device=kernel_device), layers)
    for got, wanted in zip([*ys, *gradients], [*expected_ys, *expected], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_mask_is_kept(backend: Any, kernel_device: torch.device) -> None:
    """Once for all who have it, where what is kept is moved, too."""
    device = kernel_device if backend == "triton" else torch.device("cpu")
    word = torch.int32 if backend == "triton" else torch.int8
    layers = made(torch.float32, TWO_OF_THREE, one_factor=True, device=device)
    kept = list[torch.dtype]()

    def move(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor.clone()

    with fastlora.use_backend(backend):
        expected = both_passes(with_one_mask, make_x(device=device), layers)[1]
        with saved_tensors_hooks(move, lambda tensor: tensor):
            moved = both_passes(with_one_mask, make_x(device=device), layers)[1]
    assert kept.count(word) == 2
    assert_same_gradients(moved, expected)


def test_a_mask_that_the_first_needs_not_is_kept() -> None:
    layers = made(torch.float32, ALL, one_factor=True)
    layers[0].lora_A.requires_grad_(False)
    x = make_x().requires_grad_(False)
    with fastlora.use_backend("torch"):
        _, gradients = both_passes(with_one_mask, x, layers)
        _, expected = both_passes(replayed, x, layers)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("one_factor", [True, False], ids=["one factor", "factors"])
def test_a_mask_is_drawn_once_and_x_masked_once_a_factor(
    one_factor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, seen = list[tuple[int, int]](), list[tuple[int, ...]]()

    def draw(shape: tuple[int, int], dropout: float, seed: Tensor) -> Tensor:
        drawn.append(shape)
        return draw_keep_mask(shape, dropout, seed)

    def watched(x: Tensor, keep: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return masked(x, keep)

    monkeypatch.setattr(shared_passes, "draw_keep_mask", draw)
    monkeypatch.setattr(lora_torch, "masked", watched)
    with fastlora.use_backend("torch"):
        both_passes(with_one_mask, make_x(), made(torch.float32, ALL, one_factor=one_factor))
    assert drawn == [(10, 48)]
    # backward once
    assert seen == [(10, 48)] * ((1 if one_factor else 3) + 1)


def test_parts_of_s_are_packed() -> None:
    """Some libraries read a 16-bit matrix up to its stride."""
    x = torch.randn(6, 48).bfloat16()
    mask = torch.full((6, 48), -1, dtype=torch.int8)
    factors = [torch.randn(rank, 48) for rank in (3, 5, 1)]
    for s in shared_torch.make_s(x, factors, [0.5, 2.0, 0.5], mask, 0.5):
        assert packed(s) is s


def test_many_rows_go_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = made(torch.float32, TWO_OF_THREE, one_factor=True)
    x = torch.randn(700, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with fastlora.use_backend("torch"):
        expected_ys, expected = both_passes(replayed, x, layers)
        monkeypatch.setattr(lora_torch, "ELEMENTS_PER_BLOCK", 1)
        ys, gradients = both_passes(with_one_mask, x, layers)
    for got, wanted in zip([*ys, *gradients], [*expected_ys, *expected], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_without_dropout_nothing_is_drawn() -> None:
    layers = made(torch.float32, ALL, one_factor=True)
    state = torch.get_rng_state()
    ys = shared_lora_linear(make_x(), layers, training=False, one_mask=True)
    assert torch.equal(torch.get_rng_state(), state)
    for y, expected in zip(ys, shared_lora_linear(make_x(), layers, training=False), strict=True):
        assert torch.equal(y, expected)
