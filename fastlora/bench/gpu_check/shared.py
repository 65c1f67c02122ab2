"""Layers that share their input on the card: every path against float64, and times of q, k and v."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.bench.candidates import DTYPES
from fastlora.bench.cases import ALPHA, LLAMA_8B, ROWS, Case, layer_work
from fastlora.bench.gpu_check.comparing import equality, outcome
from fastlora.bench.gpu_check.items import Found, Item, failure, refuse_lost_gpu
from fastlora.bench.gpu_check.layers import timed_rows
from fastlora.bench.gpu_check.profiled import profile_item
from fastlora.bench.results import EAGER_MODE, OURS
from fastlora.bench.turns import Step
from fastlora.ops import shared_triton_forward
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.shared_lora_linear import Projection, shared_lora_linear
from fastlora.tuning.calls import LayerCall
from fastlora.tuning.candidates import SCALING, Tensors, run_eager
from fastlora.tuning.search import name_of
from fastlora.tuning.shared import draw_shared, keeps_of, work_of
from fastlora_kernels import targets
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.explain import explain_shared, frozen
from fastlora_kernels.choose.shared import SHARED_PATHS, added, shared_tiles
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.predict.launches import total_us
from fastlora_kernels.tile import Shape

# rows, inputs, outputs and rank of each layer, dtype, dropout: three layers and two, ranks that are joined
# and others, sizes that no tile and no wide word divides, what models have
GROUPS: tuple[tuple[int, int, tuple[tuple[int, int], ...], str, float], ...] = (
    *((1029, 2048, ((1024, 16), (256, 16), (256, 16)), "bfloat16", p) for p in (0.0, 0.1)),
    *((512, 1024, ((768, 8), (256, 64)), dtype, p) for dtype in ("float16", "float32") for p in (0.0, 0.1)),
    *((37, 70, ((50, 5), (33, 17), (1, 1)), "bfloat16", p) for p in (0.0, 0.25)),
    (8192, 4096, ((4096, 16), (1024, 16), (1024, 16)), "bfloat16", 0.0),
)
# rows, inputs, outputs of each layer
QKV = (ROWS[LLAMA_8B], 4096, (4096, 1024, 1024))


def items(device: torch.device) -> list[Item]:
    """An item for each of :data:`GROUPS`."""
    found = []
    for m, k, sizes, dtype, p in GROUPS:
        calls = [LayerCall(m, k, n, r, p, dtype) for n, r in sizes]
        layers = " + ".join(f"{n} of rank {r}" for n, r in sizes)
        name = f"shared input: {m} × {k} × {layers}, {dtype}, p = {p:g}"
        found.append(Item(name, partial(every_path, name, calls, device)))
    return found


def every_path(case: str, calls: Sequence[LayerCall], device: torch.device) -> Iterator[Found]:
    """Each y, S and mask by one read of x; dX, and each layer's dA and dB, by every path and tile of ours."""
    layers = draw_shared(calls, device)
    keeps = keeps_of(layers)
    wide = [layer.to(torch.float64) for layer in layers]
    of_eager, of_exact = (
        [run_eager(layer, keep=keep) for layer, keep in zip(each, keeps, strict=True)]
        for each in (layers, wide)
    )
    of_forward = (
        [y for y, *_ in results] + [_s_of(layer, keep) for layer, keep in zip(each, keeps, strict=True)]
        for results, each in ((of_eager, layers), (of_exact, wide))
    )
    yield from _one_read(case, layers, *of_forward)
    eager, exact = _gradients(of_eager), _gradients(of_exact)
    terms = max(layers[0].x.shape[0], sum(call.outputs for call in calls))
    for choice in _choices(calls, device):
        name = name_of(choice)
        try:
            dx, others = work_of(layers, choice)()
            got = [dx, *(gradient for pair in others for gradient in pair)]
            yield outcome(case, name, got, eager, exact, terms)
        # one that does not compile or fit leaves the others
        except Exception as error:
            yield failure(f"{case}: {name}", error)
            refuse_lost_gpu(name)


def _one_read(
    case: str, layers: Sequence[Tensors], eager: Sequence[Tensor], exact: Sequence[Tensor]
) -> Iterator[Found]:
    """Each layer's y and S, from one launch that reads x, and masks, which are those of a launch for each."""
    name, count = "one read of x", len(layers)
    tensors = [(each.weight, each.bias, each.lora_A, each.lora_B) for each in layers]
    seeds, dropouts = [each.seed for each in layers], tuple(each.dropout for each in layers)
    settings: Any = {"scalings": (SCALING,) * count, "dropouts": dropouts, "path": "shared"}
    settings["paths"] = [None] * count
    try:
        made = shared_triton_forward.forward(layers[0].x, tensors, seeds, **settings)
        assert made is not None
        got = [*(y for y, *_ in made), *(s for _, s, _ in made)]
        yield outcome(case, name, got, eager, exact, layers[0].x.shape[1])
        for number, (layer, (*_, mask)) in enumerate(zip(layers, made, strict=True), start=1):
            if layer.mask is not None and mask is not None:
                yield equality(case, f"{name}: mask {number}", mask, layer.mask)
    # the backward pass takes what a launch for each has made
    except Exception as error:
        yield failure(f"{case}: {name}", error)
        refuse_lost_gpu(name)


def _s_of(layer: Tensors, keep: Tensor | None) -> Tensor:
    """S by the eager formula, in the layer's dtype."""
    dropped = layer.x if keep is None else layer.x * keep / keep_probability(layer.dropout)
    return F.linear(dropped, layer.lora_A.to(dropped.dtype)) * SCALING


def _choices(calls: Sequence[LayerCall], device: torch.device) -> list[Choice]:
    """Also paths that no plan has for such calls: whoever asks for kernels by name gets them."""
    shapes, dtype = [call.shape for call in calls], calls[0].torch_dtype
    tiles = shared_tiles(shapes, dtype, targets.detect(device))
    paths = [Choice(path) for path in SHARED_PATHS if path != "shared"]
    return [*(Choice("shared", tile) for tile in tiles), *paths]


def _gradients(of_layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """dX, added up as autograd does, and each layer's dA and dB, given y, dX, dA and dB of each."""
    dx, *others = (gradients[1] for gradients in of_layers)
    for other in others:
        dx = dx + other
    return [dx, *(gradient for gradients in of_layers for gradient in gradients[2:])]


def timed_items(device: torch.device) -> Sequence[Item]:
    """Query, key and value together, beside each by itself and the frozen layers."""
    return [Item(_name(), partial(rows, device))]


def profiles(device: torch.device) -> Sequence[Item]:
    """An item for each of :func:`timed_items`, to come after all that is timed."""
    return [profile_item(_name(), lambda: _steps(device)[OURS])]


def rows(device: torch.device) -> Iterator[Found]:
    """Both passes in a row of eager mode and one of graphs."""
    told: dict[str, Any] = layer_work(_case()) | {"predicted_ms": _predicted_ms(device)}
    yield from timed_rows(_case(), _steps(device), told, {}, device)


def _case() -> Case:
    m, k, outputs = QKV
    return Case(EAGER_MODE, f"{LLAMA_8B} q, k, v", m, k, sum(outputs))


def _name() -> str:
    return f"{_case().name}, p = {_case().dropout:g}"


def _steps(device: torch.device) -> dict[str, Step]:
    """Both passes of the frozen layers, of ours one by one, and of ours together."""
    (m, k, outputs), (rank, dtype) = QKV, (_case().rank, DTYPES[_case().dtype])
    x = torch.randn(m, k, device=device, dtype=dtype).requires_grad_()
    dys = [torch.randn(m, n, device=device, dtype=dtype) for n in outputs]
    weights = [torch.randn(n, k, device=device, dtype=dtype) * k**-0.5 for n in outputs]
    layers = list[Projection]()
    for weight in weights:
        a = torch.randn(rank, k, device=device) * k**-0.5
        b = torch.zeros(weight.shape[0], rank, device=device)
        layers.append(Projection(weight, None, a.requires_grad_(), b.requires_grad_(), ALPHA / rank))
    trained = [x, *(t for layer in layers for t in (layer.lora_A, layer.lora_B))]

    def apart(layer: Projection) -> Tensor:
        return lora_linear(x, layer.weight, None, layer.lora_A, layer.lora_B, scaling=layer.scaling)

    return {
        "frozen": lambda: torch.autograd.grad([x @ weight.t() for weight in weights], [x], dys),
        "separate": lambda: torch.autograd.grad([apart(layer) for layer in layers], trained, dys),
        OURS: lambda: torch.autograd.grad(shared_lora_linear(x, layers), trained, dys),
    }


def _predicted_ms(device: torch.device) -> dict[str, float]:
    """What is predicted of each of the steps."""
    (m, k, outputs), target, dtype = QKV, targets.detect(device), DTYPES[_case().dtype]
    calls = [Call(Shape(m, n, k, _case().rank), dtype, target, dropping=False) for n in outputs]
    bare = [launch for call in calls for launch in frozen(call.shape, dtype.itemsize, target)]
    found = explain_shared([call.shape for call in calls], dtype, target)
    assert found.apart is not None
    microseconds = {"separate": found.apart.predicted_us, OURS: found.predicted_us}
    microseconds["frozen"] = total_us([*bare, *added(calls)])
    return {name: each / 1e3 for name, each in microseconds.items()}
