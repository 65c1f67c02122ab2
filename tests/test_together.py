"""LoRA layers that share x, computed together: the same numbers, whatever happens."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.together import siblings
from tests import sibling_models
from tests.cases import cases
from tests.quantised import four_bit
from tests.sibling_models import (
    WIDTH,
    Attention,
    an_input,
    apart,
    assert_as_apart,
    attention,
    family,
    groups,
    interrupt,
    run,
    step,
)

pytestmark = pytest.mark.usefixtures("way")


# how many layers are computed at once in a step; the first layer's x has no gradient
TOGETHER = {
    "Llama": [2, 3, 2],
    "Qwen2": [2, 3, 2],
    "Gemma": [2, 3, 2],
    "Mistral": [2, 3, 2],
    "Phi": [3],
    "GPT-2": [],
    "BERT": [3],
    # keys and values: of an encoder, then of a decoder's own and of the encoder's output
    "T5": [2, 2, 2, 2],
    "ViT": [3],
}
# with dropout masks are drawn at once, wherever a gradient is wanted
FIRST = {name: [3] for name in TOGETHER} | {"GPT-2": [], "T5": [2, 2]}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "name", cases(["Llama", "BERT", "T5"], [n for n in TOGETHER if n not in ("Llama", "BERT", "T5")])
)
def test_a_step_is_that_of_layers_apart(name: str, dropout: float) -> None:
    # apply_lora says that GPT-2's layers are no nn.Linear
    ours = isinstance(sibling_models.way, sibling_models.Applied)
    given: dict[str, Any] = {"target_modules": ["lm_head"]} if ours and name == "GPT-2" else {}
    model, batch = family(name, dropout=dropout, **given)
    with apart():
        expected = step(model, batch)
    with groups() as seen:
        assert_as_apart(step(model, batch), expected)
    assert seen == (FIRST[name] if dropout else []) + TOGETHER[name]
    assert siblings._thread.group is None


def test_quantised_layers() -> None:
    parent = Attention()
    parent.q, parent.k = four_bit(WIDTH, WIDTH), four_bit(WIDTH, WIDTH)
    module = attention(parent)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another order": lambda m, x: m.v(x) + m.k(x) * m.q(x),
    "the first alone": lambda m, x: m.q(x),
    "not the second": lambda m, x: m.q(x) + m.v(x),
    "the first twice": lambda m, x: m.q(x) + m.q(x) * m.k(x) + m.v(x),
    "others of another": lambda m, x: m.q(x) + m.k(x.tanh()) * m.v(x),
    "the last again": lambda m, x: m.q(x) + m.k(x) + m.v(x) * m.v(x),
    "one without a gradient": lambda m, x: m.q(x).detach() + m.k(x) + m.v(x),
    "only the second has one": lambda m, x: m.q(x).detach() + m.k(x) + m.v(x).detach(),
    "in place": lambda m, x: m.q(x).relu_() * m.k(x).mul_(2) + m.v(x).add_(1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_in_another_order_or_number(
    call: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = attention()
    monkeypatch.setattr(Attention, "forward", call)
    with apart():
        expected = run(module)
    for _ in range(2):
        assert_as_apart(run(module), expected)


def _raise(module: Any, x: Tensor) -> Tensor:
    raise KeyError("stop")


def test_an_exception_leaves_nothing_that_is_taken_later() -> None:
    module = attention(dropout=0.5)
    x = an_input() * 1
    with apart():
        torch.manual_seed(5)
        expected = module(x)
    interrupt(module, _raise)
    with pytest.raises(KeyError):
        module(x)
    assert siblings._thread.group is not None
    del module.forward
    torch.manual_seed(5)
    assert torch.equal(module(x), expected)


def test_what_was_computed_ahead_in_vain_goes_with_the_next_call() -> None:
    other = attention()
    calls: list[Callable[[Any], object]] = [
        lambda module: module.q(an_input().detach()),
        lambda module: other.q(an_input().detach()),
        lambda module: sibling_models.way.undo(module),
    ]
    for call in calls:
        module = attention()
        interrupt(module, _raise)
        with pytest.raises(KeyError):
            module(an_input() * 1)
        assert siblings._thread.group is not None
        call(module)
        assert siblings._thread.group is None


def test_what_was_computed_ahead_in_vain_goes_with_the_model() -> None:
    module = attention()
    interrupt(module, _raise)
    with pytest.raises(KeyError):
        module(an_input() * 1)
    alive = weakref.ref(sibling_models.way.frozen(module.k).weight)
    del module
    gc.collect()
    assert alive() is None


def test_a_call_after_the_backward_pass_of_the_first_has_a_graph_of_its_own() -> None:
    module, x = attention(), an_input()
    module.q(x).sum().backward()
    module.k(x).sum().backward()
    assert x.grad is not None
    with apart():
        (expected,) = torch.autograd.grad(module.q(x).sum() + module.k(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_a_second_backward_pass_is_refused() -> None:
    module, x = attention(), an_input()
    query, key, _ = module.q(x), module.k(x), module.v(x)
    query.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        key.sum().backward()


def test_nothing_is_kept_of_an_input() -> None:
    module = attention()
    module(an_input() * 1)
    x = an_input() * 1
    alive = weakref.ref(x)
    y = module(x)
    del x, y
    assert alive() is None


def test_undoing_leaves_no_trace() -> None:
    model = sibling_models.way.adapt(nn.Sequential(Attention()))
    assert len([layer for layer in model.modules() if "_siblings" in vars(layer)]) == 3
    sibling_models.way.undo(model)
    assert not any("sibling" in name for module in model.modules() for name in vars(module))


def test_autocast_keeps_one_x() -> None:
    module, kept = attention(), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = an_input() * 1
    options: Any = {"dtype": torch.bfloat16}
    with fastlora.use_backend("torch"), torch.autocast("cpu", **options):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            together = module.q(x) + module.k(x) + module.v(x)
        with apart():
            assert torch.equal(module.q(x) + module.k(x) + module.v(x), together)
    assert len({t.data_ptr() for t in kept if t.shape == x.shape and t.dtype == torch.bfloat16}) == 1
