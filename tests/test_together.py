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
    Between,
    an_input,
    apart,
    assert_as_apart,
    assert_counts,
    assert_none_share,
    attention,
    family,
    groups,
    interrupt,
    run,
    step,
)


@pytest.fixture(autouse=True, params=list(sibling_models.WAYS.values()), ids=list(sibling_models.WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both PEFT's layers and our own."""
    monkeypatch.setattr(sibling_models, "way", request.param)


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


class OfTwo(Attention):
    """Keys and values of another x."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        x = x.tanh()
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


class WithABlock(Attention):
    """A block with layers stands between the calls."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        mixed: Tensor = self.o(x * q) + self.k(x) * self.v(x)
        return mixed


class OfALoop(Attention):
    """The variable is another one in the loop, and another one in its condition."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        y, others = self.q(x), (x.tanh(), x.exp())
        for x in others:
            y = y + self.k(x)
            if (x := x + 1) is not y:
                y = y * self.v(x)
        mixed: Tensor = self.o(y)
        return mixed


class OfOthers(Attention):
    """No two calls have one variable."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """``[..., 64]`` to the same."""
        for weight in (self.q(x), self.k(x * scale)):
            x = x + weight
        mixed: Tensor = self.o(x) + self.v(*[x])
        return mixed


class AfterItsArguments(Attention):
    """The output's call begins before those of its arguments."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


class OfBranches(Attention):
    """Never more than one is called, by a condition."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        if self.training:
            mixed: Tensor = self.q(x)
        else:
            mixed = self.k(x)
        return mixed


class OfAnEarlyReturn(Attention):
    """Never more than one is called, because the first call is returned."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        if self.training:
            return torch.Tensor.tanh(self.q(x))
        mixed: Tensor = self.k(x)
        return mixed


class OfAnExpression(Attention):
    """Never more than one is called, by an expression's condition."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        mixed: Tensor = self.q(x) if self.training else self.k(x)
        return mixed


class OfCases(Attention):
    """Never more than one is called, by a pattern."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        match self.training:
            case True:
                mixed: Tensor = self.q(x)
            case _:
                mixed = self.k(x)
        return mixed


class OfHandlers(Attention):
    """The second is called where the first one failed."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        try:
            mixed: Tensor = self.q(x)
        except ValueError:
            mixed = self.k(x)
        return mixed


class AfterABranch(Attention):
    """A branch without calls excludes none."""

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        """``[..., 64]`` to the same."""
        q = self.q(x)
        q = q * factor if self.training else q
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


KINDS: list[tuple[type[Attention], list[int]]] = [
    (OfTwo, [2]), (WithABlock, [2]), (OfALoop, []), (OfOthers, []), (AfterItsArguments, [3]),
    (OfBranches, []), (OfAnEarlyReturn, []), (OfAnExpression, []), (OfCases, []),
    (OfHandlers, []), (AfterABranch, [3]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "together"), KINDS)
def test_siblings_are_what_is_called_with_one_variable(kind: type[Attention], together: list[int]) -> None:
    module = attention(kind())
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == together


def test_a_forward_without_a_source_has_no_siblings() -> None:
    kind: Any = type("Unknown", (Attention,), {})
    found: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.o(self.q(x) * self.k(x) + self.v(x))", found)
    kind.forward = found["forward"]
    module = attention(kind())
    with groups() as seen:
        run(module)
    assert not seen


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
