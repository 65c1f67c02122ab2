"""What changes between two calls of layers that share x, or between two steps, counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests import sibling_models
from tests.sibling_models import (
    Between,
    an_input,
    apart,
    assert_counts,
    assert_none_share,
    attention,
    interrupt,
    run,
)

pytestmark = pytest.mark.usefixtures("way")


def _x_by_its_data(module: Any, x: Tensor) -> Tensor:
    x.data = x.data * 2
    return x


def _other_x(module: Any, x: Tensor) -> Tensor:
    return x * 2


def _scaling(module: Any, x: Tensor) -> Tensor:
    sibling_models.way.rescale(module.k, 7.0)
    return x


def _other_weights(module: Any, x: Tensor) -> Tensor:
    sibling_models.way.exchange(
        module.v, "lora_A", sibling_models.way.factor(module.v, "lora_A").detach() * 2
    )
    return x


def _same_memory(module: Any, x: Tensor) -> Tensor:
    lora_B = sibling_models.way.factor(module.v, "lora_B")
    sibling_models.way.exchange(module.v, "lora_B", lora_B.detach())
    return x


def _merged(module: Any, x: Tensor) -> Tensor:
    sibling_models.way.rescale(module.v, 2.0)
    module.v.merge()
    return x


def _frozen(module: Any, x: Tensor) -> Tensor:
    sibling_models.way.factor(module.k, "lora_A").requires_grad_(False)
    return x


def _pre_hook(module: Any, x: Tensor) -> Tensor:
    module.k.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
    return x


def _own_forward(module: Any, x: Tensor) -> Tensor:
    k = module.k
    k.forward = lambda x: type(k).forward(k, x * 2)
    return x


def _backend(module: Any, x: Tensor) -> Tensor:
    with fastlora.use_backend("reference"):
        module.seen = [module.k(x).grad_fn.name()]
    return x


def _no_grad(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        module.seen = [module.k(x).requires_grad]
    return x


def _autocast(module: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.seen = [module.k(x).dtype]
    return x


def _called_twice(module: Any, x: Tensor) -> Tensor:
    added: Tensor = 0 * (module.k(x) - module.k(x) + module.q(x))
    return x + added


CHANGES = [
    _x_by_its_data, _other_x, _scaling, _other_weights, _same_memory, _merged, _frozen, _pre_hook,
    _own_forward, _backend, _no_grad, _autocast, _called_twice,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__.strip("_") for change in CHANGES])
def test_what_changes_between_two_calls_counts(change: Between) -> None:
    assert_counts(change)


def test_a_layer_that_no_longer_trains_drops_nothing() -> None:
    module, outputs = attention(dropout=0.5), list[Tensor]()

    def between(module: Any, x: Tensor) -> Tensor:
        module.k.eval()
        outputs.append(module.k(x))
        with apart():
            outputs.append(module.k(x))
        return x

    interrupt(module, between)
    run(module)
    assert torch.equal(*outputs)


IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "lora_B": lambda module, x: sibling_models.way.factor(module.k, "lora_B"),
    "bias": lambda module, x: sibling_models.way.frozen(module.k).bias,
    "x": lambda module, x: x,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_changes_in_place_between_two_calls_counts(name: str) -> None:
    def between(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            IN_PLACE[name](module, x).mul_(2)
        return x

    modules = attention(), attention()
    for module in modules:
        interrupt(module, between)
    y = modules[0](an_input() * 1)
    with apart():
        assert torch.equal(y, modules[1](an_input() * 1))
    if name != "bias":
        # the query's backward pass is the key's, too, which was computed with other values
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def _hooked(module: Any) -> None:
    module.q.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))


def _wrapped(module: Any) -> None:
    module.q = nn.Sequential(module.q)


def _wrapped_sibling(module: Any) -> None:
    module.v = nn.Sequential(module.v)


def _exchanged(module: Any) -> None:
    module.q, module.k = module.k, module.q


@pytest.mark.parametrize("change", [_hooked, _wrapped, _wrapped_sibling, _exchanged])
def test_nothing_is_shared_by_layers_that_are_no_longer_called_alike(change: Callable[[Any], None]) -> None:
    assert_none_share(change)
