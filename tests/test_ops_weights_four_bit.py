"""bitsandbytes' 4-bit weights: the same values as its own, bit for bit, and whatever else is refused."""

import copy
import weakref
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor

import fastlora
from fastlora.functional import lora_linear
from fastlora.ops import lora_torch
from fastlora.ops.weights.four_bit import FourBitWeight
from fastlora.ops.weights.read import frozen_weight
from fastlora_kernels.quant import kernels
from tests.cases import cases
from tests.quantised import DTYPES, assert_as_exact_as_dense, assert_rows_are, four_bit, read


def theirs(layer: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' own values of a layer's weight, as one row where rows don't hold whole blocks.

    Of several rows its AVX-512 code takes each for a beginning of blocks, which they were not quantised as.
    """
    state = copy.copy(layer.weight.quant_state)
    shape = state.shape
    if shape[1] % state.blocksize:
        state.shape = torch.Size([1, shape.numel()])
    state.dtype = dtype
    values: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).view(shape)
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("blocksize", cases([32, 64, 4096], [128, 256, 512, 1024, 2048]))
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("k", cases([64, 130, 33], [1, 96, 4096]))
def test_values_are_bitsandbytes_own(
    k: int, quant_type: str, blocksize: int, nested: bool, dtype: torch.dtype
) -> None:
    layer = four_bit(35, k, quant_type, blocksize, nested=nested)
    assert_rows_are(read(layer), lambda dtype: theirs(layer, dtype), dtype)


@pytest.mark.parametrize("k", [64, 96])
def test_values_are_the_table_times_the_statistics(k: int) -> None:
    """Also where rows do not hold whole blocks, whatever the CPU."""
    weight = read(four_bit(6, k, nested=False))
    assert isinstance(weight, FourBitWeight)
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], 1).flatten().int()
    values = weight.table[codes] * weight.absmax.repeat_interleave(64)[: codes.numel()]
    assert torch.equal(weight.dense(torch.float32), values.view(6, k))
    assert torch.equal(weight.dense(torch.float64), values.view(6, k).double())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_stored_as_floats(storage: torch.dtype) -> None:
    torch.manual_seed(3)
    layer = four_bit(16, 64, quant_storage=storage)
    assert layer.weight.dtype == storage
    torch.manual_seed(3)
    assert torch.equal(read(layer).dense(torch.bfloat16), theirs(four_bit(16, 64), torch.bfloat16))


def test_rows_begin_where_a_block_does() -> None:
    weight = read(four_bit(6, 96))
    assert weight.row_step == 2
    with pytest.raises(ValueError, match="multiple of 2 rows, where a block does, not at row 3"):
        weight.dense(torch.float32, slice(3, 4))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype, dropout: float) -> None:
    assert_as_exact_as_dense(read(four_bit(24, 96)), dtype, dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_s_is_computed_once_for_all_parts(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, make_s, made = read(four_bit(24, 96)), lora_torch.make_s, list[Tensor]()
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 24 // 3 * 96 * 4)
    assert len(list(weight.parts(torch.float32))) == 3

    def watched(*call: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        s, mask = make_s(*call, **settings)
        made.append(s)
        return s, mask

    def run(weight: Any) -> Tensor:
        settings: Any = {"scaling": 1.7, "dropout": dropout, "generator": torch.Generator().manual_seed(1)}
        y: Tensor = lora_linear(x, weight, bias, a, b, **settings)
        return y

    x, bias, a, b = (torch.randn(*size) for size in ((5, 96), (24,), (4, 96), (24, 4)))
    with fastlora.use_backend("torch"):
        expected = run(weight.dense(torch.float32))
        monkeypatch.setattr(lora_torch, "make_s", watched)
        torch.testing.assert_close(run(weight), expected)
    assert len(made) == 1


def test_what_a_layer_computes_in() -> None:
    assert read(four_bit(8, 64)).compute_dtype is None
    assert read(four_bit(8, 64, compute_dtype=torch.bfloat16)).compute_dtype == torch.bfloat16
    layer = four_bit(8, 64)
    layer.compute_dtype = torch.float16
    assert frozen_weight(layer) == "Linear4bit whose compute_dtype its first call may change"


def test_a_layer_is_read_anew() -> None:
    layer = four_bit(16, 64, nested=False)
    before = read(layer).dense(torch.float32)
    layer.weight.data = layer.weight.data.flip(0).contiguous()
    assert not torch.equal(read(layer).dense(torch.float32), before)
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax * 2
    assert torch.equal(read(layer).dense(torch.float32), theirs(layer, torch.float32))
    # as FSDP leaves it
    layer.quant_state = layer.weight.quant_state
    doubled = read(layer).dense(torch.float32)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(read(layer).dense(torch.float32), doubled)


def test_reading_keeps_nothing_alive() -> None:
    layer = four_bit(16, 64)
    statistics = weakref.ref(layer.weight.quant_state.absmax)
    read(layer)
    # as when it moves to another device
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.clone()
    assert statistics() is None


def repack(layer: Any) -> None:
    """As an evaluating call does on a CPU with AVX512-BF16."""
    layer.weight.data, layer.weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def on_meta(layer: Any) -> None:
    layer.weight = Params4bit(layer.weight.data.to("meta"), quant_state=layer.weight.quant_state)


def with_bytes(change: Any) -> Any:
    def changed(layer: Any) -> None:
        layer.weight.data = change(layer.weight.data)

    return changed


def with_state(name: str, change: Any) -> Any:
    def changed(layer: Any) -> None:
        state = layer.weight.quant_state
        for step in name.split(".")[:-1]:
            state = getattr(state, step)
        last = name.split(".")[-1]
        setattr(state, last, change(getattr(state, last)))

    return changed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (repack, "Linear4bit with weights repacked for inference"),
        (on_meta, "Linear4bit with a weight on the meta device"),
        (with_bytes(lambda t: t[:-1]), "of shape [32, 64] with a weight of torch.uint8 [1023, 1]"),
        (with_bytes(lambda t: t.view(1, -1)), "of shape [32, 64] with a weight of torch.uint8 [1, 1024]"),
        (
            with_bytes(lambda t: t.repeat(1, 2)[:, :1]),
            "with a weight stored as torch.uint8 with strides (2, 1)",
        ),
        (with_bytes(lambda t: t.view(torch.int8)), "with a weight stored as torch.int8"),
        (with_state("quant_type", lambda _: "int4"), "Linear4bit of type int4 in blocks of 64"),
        (with_state("blocksize", lambda _: 48), "Linear4bit of type nf4 in blocks of 48"),
        (
            with_state("blocksize", lambda _: 128),
            "with absmax torch.uint8 [32] on cpu, not 16 of torch.uint8",
        ),
        (with_state("shape", lambda _: torch.Size([64, 32])), "quantised as [64, 32]"),
        (with_state("absmax", lambda t: t.float()), "with absmax torch.float32 [32]"),
        (with_state("absmax", lambda t: t.to("meta")), "with absmax torch.uint8 [32] on meta"),
        (with_state("absmax", lambda t: t.repeat(2)[::2]), "with absmax of strides (2,)"),
        (with_state("state2.absmax", lambda t: t.repeat(2)), "with nested absmax torch.float32 [2]"),
        (with_state("state2.code", lambda t: t[:16]), "with nested code torch.float32 [16]"),
        (with_state("offset", lambda t: t.double()), "with offset torch.float64 []"),
        (with_state("state2.nested", lambda _: True), "with nested statistics of an unknown form"),
    ],
)
def test_what_is_not_understood(change: Any, why: str) -> None:
    layer = four_bit(32, 64)
    change(layer)
    told = frozen_weight(layer)
    assert isinstance(told, str)
    assert why in told


def test_layers_that_are_not_understood() -> None:
    class Own(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return -y

    assert frozen_weight(Linear4bit(8, 8)) == "Linear4bit that is not quantised yet"
    own: Any = Own
    assert frozen_weight(own(8, 8).to("cpu")) == "Own, a Linear4bit with a forward of its own"
    assert frozen_weight(torch.nn.Identity()) == "Identity, which is no quantised layer that is known"
