"""LoRA beside a weight that another library quantised and that stays as it is stored."""

import functools
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from fastlora.nn.lora.stored import is_dense
from fastlora.nn.lora.update import LoRAUpdate
from fastlora.ops.weights.read import FORWARD_OF_BASE

Linear = TypeVar("Linear", bound=nn.Linear)

# where a module keeps what belongs to its class
_TABLES = ("_parameters", "_buffers", "_load_state_dict_pre_hooks")


class QuantisedLayer(LoRAUpdate):
    """Mixin for a LoRA layer that is an instance of a quantiser's class, too.

    Attributes, parameters, state dict and moves between devices are the quantiser's; the forward is ours.
    """

    _read_as: type[nn.Linear]
    _taken: dict[str, tuple[str, ...]]

    def to_base(self) -> nn.Linear:
        """The quantiser's layer, sharing this one's weight; a plain ``nn.Linear`` while merged."""
        layer: Any = self
        if is_dense(layer):
            return share_linear(nn.Linear, layer, cast=self._copied)
        plain: nn.Linear = new_linear(self._read_as, layer)
        take_over(plain, layer, self._taken)
        own = vars(layer).get(FORWARD_OF_BASE)
        if own is not None:
            vars(plain)["forward"] = MethodType(own, plain)
        plain.weight, plain.bias = layer.weight, layer.bias
        return plain.train(self.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        layer: Any = self
        if is_dense(layer):
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
            # a plain layer's, without the scales of the weight that lies aside
            for name in (*self._taken["_parameters"], *self._taken["_buffers"]):
                if name not in ("weight", "bias"):
                    destination.pop(prefix + name, None)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that was made here is made again where a pickle is read."""
        _, lora, kind = type(self).__bases__
        return _empty, (lora, kind), self.__dict__


@functools.cache
def quantised_class(lora: Any, kind: Any) -> Any:
    """The class of LoRA layers of class ``lora`` that are layers of the quantiser's class ``kind``, too."""
    return type(f"LoRA{kind.__name__}", (QuantisedLayer, lora, kind), {"_read_as": kind})


def _empty(lora: Any, kind: Any) -> Any:
    made = quantised_class(lora, kind)
    return made.__new__(made)


def lora_around(lora: Any, linear: Any) -> Any:
    """A layer of class ``lora`` with all of a quantiser's layer but its hooks, yet without an update."""
    kind: Any = type(linear)
    plain = new_linear(quantised_class(lora, kind), linear)
    of_every_module = vars(plain)
    taken = {name: tuple(vars(linear)[name]) for name in _TABLES}
    own = vars(linear).get("forward")
    taken[""] = tuple(name for name in vars(linear) if name not in of_every_module and name != "forward")
    take_over(plain, linear, taken)
    plain._taken = taken
    if own is not None:
        # bound to the other layer, to whose kind it is given back
        setattr(plain, FORWARD_OF_BASE, own.__func__)
    return plain


def new_linear(kind: Any, like: nn.Linear) -> Any:
    """A layer of this class with the sizes of another, which has no weight yet."""
    layer = kind.__new__(kind)
    nn.Linear.__init__(layer, like.in_features, like.out_features, like.bias is not None, device="meta")
    return layer


def share_linear(kind: type[Linear], linear: nn.Linear, *, cast: bool = False) -> Linear:
    """A plain layer of this kind that shares weight and bias of another.

    Args:
        kind: ``nn.Linear``, or a subclass that is made as it is.
        linear: Has the weight.
        cast: Whether a bias of another dtype than the weight's is copied into it, as a plain layer needs it.
    """
    plain: Linear = new_linear(kind, linear)
    plain.weight, plain.bias = linear.weight, linear.bias
    if cast and linear.bias is not None and linear.bias.dtype != linear.weight.dtype:
        plain.bias = nn.Parameter(linear.bias.detach().to(linear.weight.dtype), linear.bias.requires_grad)
    return plain.train(linear.training)


def take_over(layer: nn.Module, source: nn.Module, names: dict[str, tuple[str, ...]]) -> None:
    """Share attributes, and under the names of a module's tables its parameters, buffers and hooks."""
    for table, wanted in names.items():
        target, given = (vars(each)[table] if table else vars(each) for each in (layer, source))
        target.update({name: given[name] for name in wanted})
