"""What is launched: every path, tile, dtype, rank, gradient, layout and layer, in calls that differ in kind.

Quick cases are launched for every target, the others, near-equals of them, for Hopper. The default run takes
those of :func:`few`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.tuning.calls import LayerCall, SharedCall
from fastlora.tuning.candidates import choices
from fastlora.tuning.search import name_of
from fastlora.tuning.shared import choices_of as shared_choices
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.shared import SharedPath
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.compiled import tile_text
from tests.launch.adapter_calls import adapters
from tests.launch.calls import Backward, Case, Work, adapter, lora, measured, module, shared
from tests.launch.quantised_calls import quantised
from tests.launch.stage import DEVICE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PASSES: tuple[Pass, ...] = get_args(Pass)


def usual_layers() -> Iterator[Case]:
    """What people run; plans choose."""
    layers = {
        "ViT-B": (768, 768), "ViT-B up": (3072, 768), "ViT-B down": (768, 3072), "LLaMA q": (4096, 4096),
        "LLaMA k": (1024, 4096), "LLaMA gate": (14336, 4096), "LLaMA down": (4096, 14336),
    }  # fmt: skip
    rows = (1, 16, 64, 197, 512, 1024, 4096, 6304, 8192)
    for (name, (n, k)), m, p in product(layers.items(), rows, (0.0, 0.1)):
        quick = name == "LLaMA q" and m in (1, 8192)
        yield Case(f"{name}, {m} rows, p = {p}", lora(m, n, k, p=p), quick)
    for dtype, m in product((FP16, FP32), (64, 4096)):
        yield Case(f"{dtype}, {m} rows", lora(m, 768, 768, 8, dtype=dtype, p=0.1), quick=m == 64)
    for r in (8, 32, 64, 128):
        yield Case(f"rank {r}", lora(4096, 4096, 4096, r), quick=r == 64)


def every_path_and_tile() -> Iterator[Case]:
    """Each that ``fastlora tune`` would time."""
    for dtype, rank, p in product(("bfloat16", "float16", "float32"), (16, 8, 48, 64), (0.0, 0.1)):
        call = LayerCall(1024, 1024, 2048, rank, p, dtype)
        for part in PASSES:
            for choice in choices(part, call, DEVICE):
                tile = "" if choice.tile is None else f" {tile_text(choice.tile)}"
                name = f"{part} {choice.path}{tile}, {dtype}, rank {rank}, p = {p}"
                yield Case(name, _chosen(part, call, choice), (dtype, rank) == ("bfloat16", 16))


def _chosen(part: Pass, call: LayerCall, choice: Choice) -> Work:
    both = lora(call.rows, call.outputs, call.inputs, call.rank, dtype=call.torch_dtype, p=call.dropout)

    def work() -> None:
        other = Choice("split")
        with measured(call, *((choice, other) if part == "forward" else (other, choice))):
            backward = both()
            assert backward is not None
            backward()

    return work


def by_name() -> Iterator[Case]:
    """The kernels asked for: sizes that plans would leave to the library."""
    sizes = ((37, 50, 70, 5), (1, 1, 1, 1), (5, 33, 17, 1), (64, 48, 80, 3), (17, 2048, 256, 16))
    ranks = (1, 2, 15, 17, 24, 48, 100, 256)
    for dtype, p, (m, n, k, r) in product((BF16, FP16, FP32), (0.25, 0.0), sizes):
        work = lora(m, n, k, r, dtype=dtype, p=p, backend="triton")
        yield Case(f"{m}×{k}×{n}, rank {r}, {dtype}, p = {p}", work, quick=m == 37 and dtype != FP16)
    for r in ranks:
        yield Case(f"rank {r} by name", lora(96, 256, 512, r, p=0.25, backend="triton"), quick=r in (17, 256))
    for (m, n, k), p in product(((0, 64, 64), (3, 0, 64), (3, 64, 0)), (0.0, 0.25)):
        for backend in ("triton", "auto"):
            yield Case(
                f"empty: {m}×{k}×{n}, p = {p}, {backend}", lora(m, n, k, p=p, backend=backend), quick=p > 0
            )
    for p in (1 / 65536, 0.5, 0.999999):
        yield Case(f"p = {p}", lora(64, 256, 256, p=p, backend="triton"), quick=p < 0.1)
    same = lora(64, 256, 256, adapter_dtype=None, p=0.1, backend="triton")
    yield Case("A and B in bf16", same, quick=True)


def gradients() -> Iterator[Case]:
    """Not every one is wanted."""
    for wanted, p, m in product(("x", "a", "b", "xa", "xb", "ab", ""), (0.1, 0.0), (64, 4096)):
        work = lora(m, 768, 768, p=p, wanted=wanted, backend="triton")
        yield Case(f"gradients: {wanted or 'none'}, {m} rows, p = {p}", work, quick=m == 64 and p > 0)
    yield Case("without a bias", lora(64, 768, 768, bias=False), quick=True)
    yield Case("evaluation", lora(64, 768, 768, p=0.1, training=False), quick=True)


def layouts() -> Iterator[Case]:
    """Strides, offsets and views that models hand in."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=BF16)

    inputs: dict[str, Callable[[], Tensor]] = {
        "odd row stride": lambda: empty(512, 769)[:, :768],
        "odd offset": lambda: empty(512 * 768 + 1)[1:].view(512, 768),
        "transposed": lambda: empty(768, 512).t(),
        "broadcast row": lambda: empty(1, 768).expand(512, 768),
        "four dimensions": lambda: empty(2, 4, 64, 768),
        "columns of a wider": lambda: empty(512, 1536)[:, :768],
        "offset by 16 bytes": lambda: empty(512 * 768 + 8)[8:].view(512, 768),
        "batch first, transposed": lambda: empty(64, 8, 768).transpose(0, 1),
        "a row of a wider": lambda: empty(4, 1536)[1:2, :768],
        "a row, odd stride": lambda: empty(4, 777)[1:2, :768],
        "a vector": lambda: empty(768),
        "every other row": lambda: empty(1024, 768)[::2],
    }
    for index, (name, x) in enumerate(inputs.items()):
        for p in (0.1, 0.0):
            yield Case(
                f"x: {name}, p = {p}", lora(0, 768, 768, p=p, x=x(), backend="triton"), index < 5 and p > 0
            )
    outputs: dict[str, Callable[[Tensor], Tensor]] = {
        "of a sum": lambda y: empty(1)[0].expand_as(y),
        "of a mean over rows": lambda y: empty(1, y.shape[1]).expand_as(y),
        "transposed": lambda y: empty(y.shape[1], y.shape[0]).t(),
        "part of a wider": lambda y: empty(y.shape[0], 3 * y.shape[1])[:, : y.shape[1]],
    }
    for (name, dy), m in product(outputs.items(), (512, 1, 4096)):
        yield Case(f"dy: {name}, {m} rows", lora(m, 768, 768, p=0.1, dy=dy, backend="triton"), quick=m == 512)
    for backend in ("auto", "triton"):
        weight = empty(768, 768).t()
        yield Case(
            f"weight: transposed, {backend}", lora(512, 768, 768, weight=weight, backend=backend), quick=True
        )
    yield Case("weight: rows of a packed one", lora(512, 768, 768, weight=empty(2304, 768)[768:1536]))


def dora() -> Iterator[Case]:
    """A factor for every output."""
    for m, wanted, p in product((64, 1, 4096), ("xabm", "xab", "m"), (0.1, 0.0)):
        work = lora(m, 768, 1024, p=p, wanted=wanted, dora=True, backend="triton")
        yield Case(f"DoRA, {m} rows, gradients: {wanted}, p = {p}", work, quick=(m, p) == (64, 0.1))
    for dtype in (FP16, FP32):
        yield Case(
            f"DoRA, {dtype}", lora(96, 256, 512, 8, dtype=dtype, wanted="xabm", dora=True, backend="triton")
        )
    ragged = lora(37, 50, 70, 5, wanted="xabm", dora=True, backend="triton")
    yield Case("DoRA, ragged", ragged, quick=True)


def sharing() -> Iterator[Case]:
    """Layers that share their input: each path, and each that ``fastlora tune`` would time, two and three."""
    qkv, two = ((4096, 16), (1024, 16), (1024, 16)), ((768, 16), (256, 64))
    for p, m in product((0.0, 0.1), (8192, 64)):
        yield Case(f"LLaMA q, k, v, {m} rows, p = {p}", shared(m, 4096, qkv, p=p), quick=m == 8192 or p > 0)
    call = SharedCall(tuple(LayerCall(1024, 768, n, r) for n, r in two))
    chosen = [*(Choice(path) for path in get_args(SharedPath)), *shared_choices(call, DEVICE)]
    for (i, choice), p in product(enumerate(chosen), (0.0, 0.1)):
        # what is prepared for a path may not serve another
        work = shared(1024 + i, 768, two, p=p, backend="triton", choice=choice)
        yield Case(f"two layers, {name_of(choice)}, p = {p}, {i}", work, quick=p == 0)
    for wanted in ("x", "xa", "xb", "ab"):
        yield Case(f"q, k, v, gradients: {wanted}", shared(512, 2048, qkv, wanted=wanted, backend="triton"))
    for dtype in (FP16, FP32):
        yield Case(f"two layers, {dtype}", shared(96, 256, two, dtype=dtype, p=0.1, backend="triton"))
    ragged = shared(37, 70, ((50, 5), (33, 24), (1, 16)), p=0.1, backend="triton")
    yield Case("three layers, ragged", ragged, quick=True)


def modules() -> Iterator[Case]:
    """Layers as models use them."""
    rows = torch.empty(8, 197, 768, dtype=BF16)
    image = torch.empty(8, 64, 28, 28, dtype=BF16).to(memory_format=torch.channels_last)
    linear = fastlora.LoRALinear(768, 768, dropout=0.1, dtype=BF16)
    plain = torch.nn.Linear(768, 768, dtype=BF16)
    attention = fastlora.LoRAMultiheadAttention.from_attention(
        torch.nn.MultiheadAttention(768, 12, batch_first=True, dtype=BF16), rank=16, dropout=0.1
    )

    def checkpointed(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(linear, x, use_reentrant=False, preserve_rng_state=False)
        return y

    yield Case("LoRALinear", module(linear, rows), quick=True)
    yield Case("LoRALinear in a checkpoint", module(linear, rows, call=checkpointed), quick=True)
    yield Case("LoRALayer", module(fastlora.LoRALayer(plain, 16, 32.0, 0.1), rows))
    pointwise = fastlora.LoRAConv2d(64, 128, 1, dropout=0.1, dtype=BF16)
    yield Case("LoRAConv2d, 1×1, channels last", module(pointwise, image), quick=True)
    yield Case("LoRAConv2d, 3×3", module(fastlora.LoRAConv2d(64, 128, 3, dropout=0.1, dtype=BF16), image))
    words = torch.zeros(8, 16, dtype=torch.int64)
    yield Case("LoRAEmbedding", module(fastlora.LoRAEmbedding(100, 64, dtype=BF16), words))
    call = lambda x: attention(x, x, x)  # noqa: E731
    yield Case("LoRAMultiheadAttention", module(attention, rows, call=call), quick=True)
    bottleneck = fastlora.AdapterLayer(768, 64, layer_norm="pre", scale="learned", dtype=BF16)
    yield Case("AdapterLayer, normed, with a learned scale", module(bottleneck, rows), quick=True)

    def autocast() -> Backward | None:
        with torch.autocast("cuda", dtype=BF16):
            return lora(512, 768, 768, dtype=FP32, p=0.1)()

    yield Case("autocast", autocast, quick=True)


def changes() -> Iterator[Case]:
    """One call, and then others that differ from it in one thing: nothing prepared for it may serve them."""

    def off(elements: int, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(math.prod(shape) + elements, dtype=dtype)[elements:].view(shape)

    layer = functools.partial(lora, 256, 640, 640, backend="triton")
    yield Case("one call", layer(p=0.1), quick=True)
    yield Case("its alpha changed", layer(p=0.1, scaling=3.0), quick=True)
    yield Case("its dropout changed", layer(p=0.3), quick=True)
    yield Case("its dropout off", layer(p=0.1, training=False), quick=True)
    yield Case("fewer gradients", layer(p=0.1, wanted="ab"), quick=True)
    yield Case("no bias", layer(p=0.1, bias=False), quick=True)
    yield Case("its adapters in 16 bits", layer(p=0.1, adapter_dtype=None), quick=True)
    yield Case("its weight moved off alignment", layer(p=0.1, weight=off(1, 640, 640)), quick=True)
    yield Case("its weight moved by 16 bytes", layer(p=0.1, weight=off(8, 640, 640)), quick=True)
    yield Case("its A moved off alignment", layer(p=0.1, a=off(1, 16, 640, dtype=FP32)), quick=True)
    yield Case("the call again", layer(p=0.1), quick=True)

    def hooked() -> Backward | None:
        # an unpacked tensor may lie anywhere, as after a copy from the host
        with saved_tensors_hooks(
            lambda tensor: tensor, lambda tensor: off(1, *tensor.shape, dtype=tensor.dtype)
        ):
            return layer(p=0.1)()

    yield Case("its saved tensors come back elsewhere", hooked, quick=True)


def huge() -> Iterator[Case]:
    """More elements than 32 bits count, and outputs beyond 2 GiB."""
    wide = torch.empty(0, dtype=BF16).new_empty_strided((131_072, 1024), (16_384, 1))
    yield Case("columns of a huge x", lora(0, 1024, 1024, x=wide), quick=True)
    yield Case("huge y", lora(262_144, 14336, 1024, p=0.1), quick=True)
    yield Case("huge x", lora(600_000, 4096, 4096, p=0.1))
    yield Case("huge x by name", lora(600_000, 256, 4096, p=0.1, backend="triton"))
    yield Case("huge adapter", adapter(600_000, 4096, 64, p=0.1))


SUITES = (
    usual_layers, every_path_and_tile, by_name, gradients, layouts, dora, sharing, adapters, quantised,
    modules, changes, huge,
)  # fmt: skip
# in the names of quick cases that launch what others do with other constants, which takes seconds to compile
_OTHER_CONSTANTS = (
    "float16", "float32", "rank 64", "ragged", "odd offset", "q, k, v, 64 rows", "relu",
    "residual", "adapter, gradients: u", "16-bit", "bottleneck", "its A moved", "16 bits", "odd row",
    "two layers, separate", "AdapterLayer", "huge y",
)  # fmt: skip


def few() -> Iterator[Case]:
    """Every kernel, layout, layer and change of a call, each once."""
    for cases in SUITES:
        if cases not in (every_path_and_tile, by_name):
            yield from (
                c for c in cases() if c.quick and not any(word in c.name for word in _OTHER_CONSTANTS)
            )
