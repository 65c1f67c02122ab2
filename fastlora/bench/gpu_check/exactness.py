"""Every kernel, path and tile on the card against float64, and what has to be the same to the bit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from fastlora import reference
from fastlora._core.backend import use_backend
from fastlora.bench.gpu_check import shared
from fastlora.bench.gpu_check.comparing import eager_and_exact, equality, outcome, outputs_and_gradients
from fastlora.bench.gpu_check.interpreted_mask import mask_by_interpreter
from fastlora.bench.gpu_check.items import Found, Item, failure, refuse_lost_gpu
from fastlora.bench.gpu_check.other_ops import adapter_items, dora_items
from fastlora.nn import LoRALinear
from fastlora.ops.lora_linear import lora_linear
from fastlora.tuning.calls import LayerCall
from fastlora.tuning.candidates import SCALING, choices, draw, run_backward, run_eager, run_forward, unpacked
from fastlora.tuning.search import name_of
from fastlora.tuning.timing import captured
from fastlora.tuning.truth import WrongResult, truth_of
from fastlora_kernels import targets
from fastlora_kernels.choose import paths
from fastlora_kernels.choose.paths import Pass
from fastlora_kernels.choose.tuned import Choice

BF16, FP16, FP32 = "bfloat16", "float16", "float32"
PASSES: tuple[Pass, Pass] = ("forward", "backward")
# every path and tile of these: each dtype with and without dropout, ranks of one chunk and of several, sizes
# that no tile and no wide word divides, few rows, what models have, and bytes that are decoded
CALLS = (
    *(LayerCall(1029, 1024, 2048, 16, p, dtype) for dtype in (BF16, FP16, FP32) for p in (0.0, 0.1)),
    *(LayerCall(512, 1024, 1024, 64, p, BF16) for p in (0.0, 0.1)),
    LayerCall(300, 768, 768, 8, 0.1, FP16),
    LayerCall(200, 512, 768, 48, 0.5, BF16),
    LayerCall(640, 1024, 512, 128, 0.1, BF16),
    *(LayerCall(37, 70, 50, 5, p, dtype) for dtype in (BF16, FP32) for p in (0.0, 0.25)),
    LayerCall(131, 333, 257, 17, 0.1, FP16),
    *(LayerCall(rows, 4096, 1024, 16, p, BF16) for rows in (1, 16) for p in (0.0, 0.1)),
    *(LayerCall(6304, 768, 768, 16, p, BF16) for p in (0.0, 0.1)),
    LayerCall(8192, 4096, 4096, 16, 0.1, BF16),
    LayerCall(300, 1040, 768, 16, 0.1, BF16, "int8"),
    LayerCall(300, 1040, 768, 48, 0.0, FP16, "fp8-rows"),
)
# persistent kernels and those that read through pointers
TWINS = tuple(LayerCall(1029, 1024, 2048, 16, p, dtype) for dtype in (BF16, FP16) for p in (0.0, 0.1))
# outputs beyond 2 GiB
HUGE = LayerCall(80_000, 256, 14_336, 16, 0.1, BF16)
# rows, inputs, outputs
STRIDED = (512, 768, 768)
# a mask of so many rows begins like one of few
MANY_ROWS = 4096
MASKS = (LayerCall(70, 200, 64, 16, 0.1, FP16), LayerCall(16, 1024, 64, 16, 0.5, FP16))


def items(device: torch.device) -> Sequence[Item]:
    """All of them, those that compile most first."""
    found = [
        Item(f"LoRA {part}: {words(call)}", partial(lora_paths, part, call, device))
        for call in CALLS
        for part in PASSES
    ]
    found += dora_items(device) + adapter_items(device) + shared.items(device)
    found += [
        Item(f"replays and compiled graphs, p = {p:g}", partial(replays, p, device)) for p in (0.0, 0.1)
    ]
    found += [Item(f"persistent kernels: {words(c)}", partial(persistent, c, device)) for c in TWINS]
    found += [Item(f"dropout masks: {words(call)}", partial(masks, call, device)) for call in MASKS]
    found += [Item("strides", partial(strides, device))]
    found += [Item(f"beyond 2 GiB: {words(HUGE)}", partial(huge, HUGE, device))]
    return found


def words(call: LayerCall) -> str:
    """A call's sizes, rank, dtype, dropout and how its weight is stored, unless that is dense."""
    sizes = f"{call.rows} × {call.inputs} × {call.outputs}"
    stored = "" if call.weight is None else f", {call.weight}"
    return f"{sizes}, rank {call.rank}, {call.dtype}, p = {call.dropout:g}{stored}"


def lora_paths(part: Pass, call: LayerCall, device: torch.device) -> Iterator[Found]:
    """One pass of a call by every path and tile that there is for it."""
    case = f"LoRA {part}: {words(call)}"
    tensors = draw(call, device)
    _, s, mask = run_forward(tensors, Choice("split"))
    tensors = replace(tensors, s=s, mask=mask)
    keep = None if mask is None else unpacked(mask, call.inputs)
    results = slice(0, 1) if part == "forward" else slice(1, 4)
    found = choices(part, call, device)
    exact = {
        kind: run_eager(tensors.to(torch.float64, unrounded=kind), keep=keep)[results]
        for kind in {tensors.unrounded_by(choice) for choice in found}
    }
    eager = run_eager(tensors, keep=keep)[results]
    for choice in found:
        try:
            got = run_forward(tensors, choice)[:1] if part == "forward" else run_backward(tensors, choice)
            terms = max(call.rows, call.inputs, call.outputs)
            truth = exact[tensors.unrounded_by(choice)]
            yield outcome(case, name_of(choice), got, eager, truth, terms)
        # one tile that does not compile or fit leaves the others
        except Exception as error:
            yield failure(f"{case}: {name_of(choice)}", error)
            refuse_lost_gpu(name_of(choice))


def huge(call: LayerCall, device: torch.device) -> Iterator[Found]:
    """Both passes as they are planned: dA and dB whole, y and dX on rows from the first to the last."""
    case = f"beyond 2 GiB: {words(call)}"
    tensors = draw(call, device)
    _, s, mask = run_forward(tensors, Choice("split"))
    tensors = replace(tensors, s=s, mask=mask)
    truth = truth_of(tensors, None if mask is None else unpacked(mask, call.inputs))
    for part in PASSES:
        target = targets.detect(device)
        dropping = call.dropout > 0
        path = paths.choose_path(part, call.shape, call.torch_dtype, target, dropping=dropping)
        choice = Choice("split" if path == "library" else path)
        got = run_forward(tensors, choice)[:1] if part == "forward" else run_backward(tensors, choice)
        wrong = ""
        try:
            truth.check(got, first=0 if part == "forward" else 1)
        except WrongResult as error:
            wrong = f": {error}"
        yield {"outcome": {"case": case, "what": f"{part} {name_of(choice)}{wrong}", "right": not wrong}}


def persistent(call: LayerCall, device: torch.device) -> Iterator[Found]:
    """Kernels that read through descriptors compute what those that read through pointers do, to the bit."""
    case = f"persistent kernels: {words(call)}"
    tensors = draw(call, device)
    _, s, mask = run_forward(tensors, Choice("split"))
    tensors = replace(tensors, s=s, mask=mask)
    for part in PASSES:
        for choice in choices(part, call, device):
            if choice.tile is None or not choice.tile.persistent:
                continue
            twin = replace(choice, tile=replace(choice.tile, persistent=False))
            run = run_forward if part == "forward" else run_backward
            try:
                (left, *_), (right, *_) = (run(tensors, each) for each in (choice, twin))
                yield equality(case, f"{part} {name_of(choice)}", left, right)
            # its twin may need more shared memory than there is
            except Exception as error:
                yield failure(f"{case}: {part} {name_of(choice)}", error)
                refuse_lost_gpu(name_of(choice))


def masks(call: LayerCall, device: torch.device) -> Iterator[Found]:
    """Dropout draws the same bits whatever the tile and the path, and those of Triton's interpreter."""
    case = f"dropout masks: {words(call)}"

    def drawn(rows: int, path: str = "split") -> Tensor:
        mask = run_forward(draw(replace(call, rows=rows), device), Choice(path))[2]
        assert mask is not None
        return mask

    mask = drawn(call.rows)
    yield equality(case, "the interpreter's", mask.cpu(), mask_by_interpreter(call))
    yield equality(case, "of the path epilogue", mask, drawn(call.rows, "epilogue"))
    yield equality(case, f"of {MANY_ROWS} rows", mask, drawn(MANY_ROWS)[: call.rows])


def replays(p: float, device: torch.device) -> Iterator[Found]:
    """A CUDA graph repeats a layer, drawing masks anew; ``torch.compile`` takes a layer as one graph."""
    case = f"replays and compiled graphs, p = {p:g}"
    m, k, n = STRIDED
    layer = LoRALinear(k, n, rank=16, dropout=p, device=device, dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    x, dy = (torch.randn(m, size, device=device).bfloat16() for size in (k, n))
    y = torch.zeros_like(dy)
    # not where a plan would leave this layer to the library
    with use_backend("triton"):
        graph = captured(lambda: y.copy_(layer(x).detach()), device)
        graph.replay()
        first = y.clone()
        graph.replay()
    if p:
        yield {"outcome": {"case": case, "what": "another mask", "right": bool((first != y).any())}}
        return
    yield equality(case, "two replays", first, y)

    def eager(x: Tensor) -> Tensor:
        weights = [each.to(x.dtype) for each in (layer.weight, layer.bias, layer.lora_A, layer.lora_B)]
        return reference.lora_linear(x, *weights, scaling=layer.scaling)

    both = eager_and_exact(eager, [x], dy)
    eager_y, exact_y = ([each[0]] for each in both)
    yield outcome(case, "a replay", [y], eager_y, exact_y, max(m, k, n))
    with use_backend("triton"):
        got = outputs_and_gradients(torch.compile(layer, fullgraph=True), [x], dy)
    yield outcome(case, "a compiled layer in one graph", got, *both, max(m, k, n))


def strides(device: torch.device) -> Iterator[Found]:
    """Inputs and gradients as models hand them in."""
    (m, k, n), dtype = STRIDED, torch.bfloat16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    inputs = {
        "contiguous": normal(m, k),
        "odd stride": normal(m, k + 1)[:, :k],
        "odd offset": normal(m * k + 1)[1:].view(m, k),
        "transposed": normal(k, m).t(),
        "one row for all": normal(1, k).expand(m, k),
        "columns of a wider one": normal(m, 2 * k)[:, :k],
    }
    gradients = {"contiguous": normal(m, n), "one for all": normal(1)[0].expand(m, n)}
    weight, a, b = normal(n, k) * k**-0.5, normal(16, k) * k**-0.5, normal(n, 16) / 4

    def eager(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return reference.lora_linear(x, weight.to(x.dtype), None, a, b, scaling=SCALING)

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, weight, None, a, b, scaling=SCALING)

    for (name, x), (shape, dy) in product(inputs.items(), gradients.items()):
        layer = (x, a, b)
        with use_backend("triton"):
            got = outputs_and_gradients(fused, layer, dy)
        both = eager_and_exact(eager, layer, dy)
        yield outcome("strides", f"x: {name}, dY: {shape}", got, *both, max(m, n, k))
