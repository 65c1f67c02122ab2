"""The kernels that make quantised weights dense: bit-equal to their libraries' definitions."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton; the other backends are tested without")

from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.kernel import Kernel
from fastlora_kernels.quant import kernels
from fastlora_kernels.quant.dequantise import dequantise_4bit, dequantise_8bit
from fastlora_kernels.tile import Plan, Shape
from tests.kernel_harness import Harness
from tests.stored_weights import FLOAT8_VALUES, FourBits, four_bits, same_bits

# around a span, a block and a program; a row that is no multiple of the block; an odd number of elements
SHAPES = [(1, 1), (1, 31), (3, 33), (2, 64), (7, 130), (9, 127), (5, 4096), (3, 4097)]


def _plan(kernel: Kernel, dtype: torch.dtype, *, aligned: bool = True) -> Plan:
    (tile,) = plans.tiles(kernel, 1, dtype, targets.DEFAULT, aligned=aligned)
    return Plan(tile)


def _launch(harness: Harness, stored: FourBits, rows: slice | None = None, *, aligned: bool = True) -> Tensor:
    start, stop, _ = (rows or slice(None)).indices(stored.shape[0])
    k = stored.shape[1]

    def given(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else harness.input(tensor.view(1, -1))[0]

    dense = harness.output(stop - start, k)
    plan = _plan(kernels.DEQUANTISE_4BIT, harness.dtype, aligned=aligned)
    launch: Any = partial(dequantise_4bit, first=start * k, blocksize=stored.blocksize, plan=plan)
    launch(*map(given, stored.tensors), dense)
    return dense


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_have_the_bits_of_their_definition(
    harness: Harness, shape: tuple[int, int], nested: bool
) -> None:
    for blocksize in (32, 64) if shape[1] != 4097 else (128, 4096):
        stored = four_bits(*shape, blocksize, nested=nested)
        assert same_bits(_launch(harness, stored), stored.dense(harness.dtype)), blocksize


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_four_bits_have_the_bits_of_bitsandbytes(harness: Harness, blocksize: int, quant_type: str) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="compares with it").functional
    w = torch.randn(33, 250).to(harness.dtype)
    for nested in (False, True):
        packed, state = functional.quantize_4bit(
            w, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        absmax, codes, table = state.absmax, None, functional.get_4bit_type(quant_type, device="cpu")
        tensors = [packed, absmax, codes, None, None, table]
        if nested:
            second = state.state2
            absmax = functional.dequantize_blockwise(state.absmax, second) + state.offset
            tensors = [packed, second.absmax, state.absmax, second.code, state.offset, table]
        dense = _launch(harness, FourBits(w.shape, tensors, blocksize))
        # as one row: with several, AVX-512 code of its own takes each for a beginning of blocks
        flat = (packed, absmax, blocksize, quant_type, [1, w.numel()], harness.dtype)
        # the sign of FP4's second zero differs between bitsandbytes' own kernels
        expected = torch.ops.bitsandbytes.dequantize_4bit(*flat).view(w.shape)
        assert same_bits(dense + 0.0, expected + 0.0), nested


@pytest.mark.parametrize("rows", [slice(2, 5), slice(5, 6), slice(0, 3), slice(4, 4), slice(6, 7)], ids=str)
@pytest.mark.parametrize("k", [64, 33, 160])
def test_rows_of_four_bits_are_the_same_as_in_the_whole(harness: Harness, k: int, rows: slice) -> None:
    """Wherever they begin: within a block, a span or a byte."""
    stored = four_bits(7, k, 64, nested=True)
    whole = stored.dense(harness.dtype)
    assert same_bits(_launch(harness, stored, rows, aligned=k == 64), whole[rows])


def test_many_blocks_have_several_factors_of_factors(harness: Harness) -> None:
    stored = four_bits(20, 1024, 32, nested=True)
    assert stored.tensors[1] is not None
    assert stored.tensors[1].numel() == 3
    assert same_bits(_launch(harness, stored), stored.dense(harness.dtype))
    assert same_bits(_launch(harness, stored, slice(11, 20)), stored.dense(harness.dtype)[11:])


@pytest.mark.parametrize("is_float", [False, True], ids=["int8", "float8"])
@pytest.mark.parametrize(
    ("shape", "scale_rows", "scale_cols"),
    [
        ((5, 100), 1, 100), ((33, 256), 1, 256), ((33, 256), 33, 256), ((130, 300), 128, 128),
        ((40, 129), 16, 128), ((1, 1), 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_eight_bits_have_the_bits_of_their_definition(
    harness: Harness, shape: tuple[int, int], scale_rows: int, scale_cols: int, is_float: bool
) -> None:
    n, k = shape
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    scales = torch.rand(-(-n // scale_rows), -(-k // scale_cols)) + 0.1
    values = FLOAT8_VALUES[codes.int()] if is_float else codes.view(torch.int8).float()
    spread = scales.repeat_interleave(scale_rows, 0)[:n].repeat_interleave(scale_cols, 1)[:, :k]
    expected = (values * spread).to(harness.dtype)
    for rows in (slice(0, n), slice(n // 2, n)):
        dense = harness.output(rows.stop - rows.start, k)
        dequantise_8bit(
            harness.input(codes), harness.input(scales), dense, first_row=rows.start,
            scale_rows=scale_rows, scale_cols=scale_cols, is_float=is_float,
            plan=_plan(kernels.DEQUANTISE_8BIT, harness.dtype),
        )  # fmt: skip
        torch.testing.assert_close(dense.cpu(), expected[rows], rtol=0, atol=0, equal_nan=True)


def test_every_float8_has_its_value(harness: Harness) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    dense, plan = harness.output(2, 128), _plan(kernels.DEQUANTISE_8BIT, harness.dtype)
    dequantise_8bit(
        harness.input(codes), harness.input(torch.ones(1, 1)), dense, first_row=0,
        scale_rows=2, scale_cols=128, is_float=True, plan=plan,
    )  # fmt: skip
    expected = codes.view(torch.float8_e4m3fn).float()
    dense = dense.cpu()
    assert torch.equal(FLOAT8_VALUES.isnan().view(2, 128), dense.isnan())
    assert same_bits(dense[~dense.isnan()], expected[~expected.isnan()].to(harness.dtype))


@pytest.mark.parametrize(
    ("columns", "itemsize", "step", "rows"),
    [
        (4096, 2, 1, 8192),
        # 6553 rows would fit
        (5120, 2, 1, 6528), (5120, 2, 3, 6528), (4096, 4, 1, 4096),
        # fewer than a tile; a step that is more than the workspace
        (2**20, 2, 1, 32), (2**20, 2, 3, 30), (2**26, 2, 4, 4), (0, 2, 1, 64 * 2**20),
    ],
)  # fmt: skip
def test_rows_that_fit_the_workspace(columns: int, itemsize: int, step: int, rows: int) -> None:
    assert kernels.most_rows(columns, itemsize, step) == rows


@pytest.mark.parametrize(
    "kernel", [kernels.DEQUANTISE_4BIT, kernels.DEQUANTISE_8BIT], ids=lambda kernel: kernel.name
)
def test_one_tile_for_every_gpu(kernel: Kernel) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        chosen = {
            plans.choose(kernel, Shape(1, 1, 1, 1), dtype, target).tile
            for target in (*targets.TARGETS.values(), targets.DEFAULT)
        }
        assert len(chosen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_last_tile_of_the_most_elements_is_counted_in_32_bits(dtype: torch.dtype) -> None:
    (tile,) = plans.tiles(kernels.DEQUANTISE_4BIT, 1, dtype, targets.DEFAULT)
    # a first span may be left out in part
    assert kernels.MOST_ELEMENTS + 2 * kernels.SPAN + tile.rows * kernels.SPAN < 2**31
