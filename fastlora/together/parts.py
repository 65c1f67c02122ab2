"""What a linear layer with LoRA tells of its calls, so that others can compute them with theirs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastlora.ops.weights.frozen import FrozenWeight

# types of tensors that are their values: no quantised, sharded, nested or masked ones
PLAIN: frozenset[type] = frozenset({Tensor, nn.Parameter})

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# layers of dropout with what they compute, so that whoever patches one of these is noticed
DROPOUT: Mapping[type[nn.Module], Any] = {
    nn.Identity: nn.Identity.forward,
    nn.Dropout: nn.Dropout.forward,
}

# torch fills these dicts in place
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Adapter(NamedTuple):
    """What one adapter brings into a call.

    Attributes:
        lora_A: ``[rank, in]``.
        lora_B: ``[out, rank]``.
        bias: PEFT's ``lora_bias`` ``[out]``, or None.
        scaling: Factor of the update, finite.
        dropout: Probability of zeroing an element of the update's input now; 0 when not training.
        magnitude: DoRA's ``[out]``, or None.
    """

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout: float
    magnitude: Tensor | None


class Parts(NamedTuple):
    """Weight ``[out, in]`` and bias of the frozen layer, and its adapters."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None
    adapters: list[Adapter]


class LayerOfParts:
    """A linear layer with LoRA that tells what a call of it is computed from."""

    # its place among siblings, where it has some
    _siblings: Any = None
    # whether it wants to drop the same of x as those of its siblings that want it, too
    _one_mask: bool = False

    def _parts_of(self, x: Tensor) -> Parts | None:
        """What a call is computed from; None if the layer has to compute it itself.

        Args:
            x: ``[..., in_features]``, or a tensor of its dtype and kind.
        """
        raise NotImplementedError

    def _draws_masks(self) -> bool:
        """Whether the layer has dropout now, in any of its adapters."""
        raise NotImplementedError

    def _ask_for_one_mask(self, *, asked: bool) -> None:
        """Let the layer have one mask with its siblings, or no longer, without a trace."""
        self.__dict__.pop("_one_mask", None)
        if asked:
            self.__dict__["_one_mask"] = True


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling a module means its class's forward and nothing else."""
    own = module.__dict__
    return "forward" not in own and not any(own[name] for name in HOOKS) and not has_global_hooks()


def can_tell(module: Any) -> bool:
    """Whether a call of a module means what its parts tell, if it tells them."""
    return isinstance(module, LayerOfParts) and is_called_plainly(module)  # type: ignore[arg-type]


def passes_on(module: Any) -> bool:
    """Whether a call of a module gives back what it is given, and nobody would notice that there is none."""
    kind = type(module)
    if kind not in DROPOUT or DROPOUT[kind] is not kind.forward or not is_called_plainly(module):
        return False
    return not (kind is nn.Dropout and module.training and module.p > 0)


def has_global_hooks() -> bool:
    """Whether something is called with every module that is."""
    return any(_GLOBAL_HOOKS)


def is_plain_input(x: Tensor) -> bool:
    """Whether x is one of torch's own tensors, with rows."""
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_nested
