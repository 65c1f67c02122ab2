"""Every way to compute one pass of a layer call, as choices that the op can be told to take."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import reference
from fastlora.ops.decide import Decision, Paths, is_aligned
from fastlora.ops.keep_mask import keep_probability
from fastlora.ops.lora_linear import LoRALinearFunction
from fastlora.ops.lora_passes import lora_linear_backward, lora_linear_forward
from fastlora.ops.runtime import draw_seed
from fastlora.ops.weights import in_parts
from fastlora.ops.weights.frozen import FrozenWeight
from fastlora.tuning.calls import LayerCall
from fastlora.tuning.weights import draw_weight
from fastlora_kernels import targets
from fastlora_kernels.choose import plan as plans
from fastlora_kernels.choose import quantised
from fastlora_kernels.choose.call import Call
from fastlora_kernels.choose.paths import Pass, large_kernel
from fastlora_kernels.choose.tuned import Choice
from fastlora_kernels.quant.kernels import DECODE, most_rows
from fastlora_kernels.tile import MASK_WORD_BITS, Shape

SCALING = 2.0


@dataclass(frozen=True)
class Tensors:
    """Of one layer call; ``s`` and ``mask`` are what forward leaves for backward.

    Where the frozen weight is quantised, that is ``stored``, and ``weight`` the same, dense.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    seed: Tensor | None
    dropout: float
    s: Tensor | None = None
    mask: Tensor | None = None
    stored: FrozenWeight | None = None

    def to(self, dtype: torch.dtype, *, unrounded: bool = False) -> "Tensors":
        """The same in another dtype, adapters too.

        Args:
            dtype: For instance float64.
            unrounded: Whether W has the values that are stored, which the dense one was rounded from.
        """
        names = ("x", "weight", "bias", "lora_A", "lora_B", "dy")
        cast = {name: getattr(self, name).to(dtype) for name in names}
        if unrounded and self.stored is not None:
            cast["weight"] = self.stored.dense(dtype)
        return replace(self, **cast)

    def unrounded_by(self, choice: Choice) -> bool:
        """Whether a path multiplies by W as it is stored, and by its scale at the end."""
        return choice.path == DECODE and self.stored is not None and self.stored.scale is not None


def draw(call: LayerCall, device: torch.device) -> Tensors:
    """Random tensors of a layer's usual scale; A and B in float32 beside a 16-bit layer, as by default."""

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = call.torch_dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    m, n, k, r = call.rows, call.outputs, call.inputs, call.rank
    stored = None if call.weight is None else draw_weight(call.weight, n, k, device)
    return Tensors(
        x=normal(m, k),
        weight=normal(n, k, scale=k**-0.5) if stored is None else stored.dense(call.torch_dtype),
        bias=normal(n),
        lora_A=normal(r, k, scale=k**-0.5, dtype=torch.float32),
        lora_B=normal(n, r, scale=r**-0.5, dtype=torch.float32),
        dy=normal(m, n),
        seed=torch.tensor([1234], device=device) if call.dropout else None,
        dropout=call.dropout,
        stored=stored,
    )


def choices(part: Pass, call: LayerCall, device: torch.device) -> list[Choice]:
    """Every path that can serve the pass, with every tile of its large product."""
    target, dtype = targets.detect(device), call.torch_dtype
    found = []
    # the paths over the parts of a large weight are chosen for each of them
    parts = call.weight is not None and call.outputs > most_rows(call.inputs, dtype.itemsize)
    given = Call(call.shape, dtype, target, call.dropout > 0)
    for candidate in quantised.of_weight(part, given, call.weight):
        if candidate.refused:
            continue
        if parts and candidate.path != DECODE:
            found.append(Choice("split"))
            continue
        if candidate.path == "library" and call.dropout:
            # where no kernel is meant for the call; the library's mask has another form
            found.append(Choice("split"))
            continue
        kernel = large_kernel(part, candidate.path, call.weight)
        tiles = (
            ()
            if kernel is None
            else plans.tiles(kernel, call.rank, dtype, target, aligned=call.shape.aligned)
        )
        found += [Choice(candidate.path, tile) for tile in dict.fromkeys(tiles)] or [Choice(candidate.path)]
    return list(dict.fromkeys(found))


def run_forward(tensors: Tensors, choice: Choice) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, S and, with dropout, the packed mask, by the op on this path."""
    t = tensors
    rest = (t.bias, t.lora_A, t.lora_B, t.seed, SCALING, t.dropout, _taking(choice, t))
    if t.stored is not None:
        return in_parts.forward(t.x, t.stored, *rest)
    return lora_linear_forward(t.x, t.weight, *rest)


def run_backward(tensors: Tensors, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dA and dB, by the op on this path."""
    t = tensors
    kept = (t.lora_A, t.lora_B, t.s, t.mask, SCALING, t.dropout, True, True, True, _taking(choice, t))
    if t.stored is not None:
        dx, da, db = in_parts.backward(t.dy, t.x, t.stored, *kept)
    else:
        dx, da, db = lora_linear_backward(t.dy, t.x, t.weight, *kept)
    # all three are wanted
    assert dx is not None
    assert da is not None
    assert db is not None
    return dx, da, db


def run_step(tensors: Tensors, forward: Choice, backward: Choice) -> list[Tensor]:
    """y, dX, dA and dB by the op on these paths and autograd; with dropout, of a seed drawn anew."""
    t = tensors
    inputs = [each.detach().requires_grad_() for each in (t.x, t.lora_A, t.lora_B)]
    x, lora_A, lora_B = inputs
    seed = None if t.seed is None else draw_seed(t.x.device, None)
    decision = Decision("triton", Paths(shape_of(t), forward, backward))
    frozen = t.weight if t.stored is None else t.stored
    layer = (x, frozen, t.bias, lora_A, lora_B, seed)
    y = LoRALinearFunction.apply(*layer, SCALING, t.dropout, decision)[0]
    return [y.detach(), *torch.autograd.grad(y, inputs, t.dy)]


def _taking(choice: Choice, t: Tensors) -> Decision:
    return Decision("triton", Paths(shape_of(t), choice, choice))


def shape_of(t: Tensors) -> Shape:
    """Sizes of the call as they lie."""
    (n, k), m, r = t.weight.shape, t.x.shape[0], t.lora_A.shape[0]
    return Shape(m=m, n=n, k=k, r=r, aligned=is_aligned(t.x, t.weight, t.dy))


def run_eager(tensors: Tensors, *, keep: Tensor | None = None) -> list[Tensor]:
    """y, dX, dA and dB by the eager formula and autograd; with a mask, that one's elements are dropped."""
    t = tensors
    inputs = [each.detach().requires_grad_() for each in (t.x, t.lora_A, t.lora_B)]
    x, lora_A, lora_B = inputs
    if keep is None:
        y = reference.lora_linear(x, t.weight, t.bias, lora_A, lora_B, scaling=SCALING, dropout=t.dropout)
    else:
        y = reference.lora_linear_with_mask(
            x, t.weight, t.bias, lora_A, lora_B, keep, scaling=SCALING,
            keep_probability=keep_probability(t.dropout),
        )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, inputs, t.dy)]


def unpacked(mask: Tensor, columns: int) -> Tensor:
    """The packed keep bits as bool ``[rows, columns]``."""
    keep = torch.empty(*mask.shape, MASK_WORD_BITS, dtype=torch.bool, device=mask.device)
    # a column at a time: all at once take four bytes an element
    for column in range(MASK_WORD_BITS):
        # even columns are in the lower half of a word, odd ones in the upper
        bit = column // 2 + column % 2 * (MASK_WORD_BITS // 2)
        torch.ne(mask >> bit & 1, 0, out=keep[..., column])
    return keep.flatten(1)[:, :columns]
