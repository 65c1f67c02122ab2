"""Layers of accelerated PEFT models that share x, computed together: the same numbers, whatever happens."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.interop import _peft_siblings, _peft_state
from fastlora.interop.peft import restore
from tests.cases import cases
from tests.quantised import four_bit
from tests.sibling_models import (
    WIDTH,
    WORDS,
    Attention,
    accelerated,
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
    model, batch = family(name, lora_dropout=dropout)
    with apart():
        expected = step(model, batch)
    with groups() as seen:
        assert_as_apart(step(model, batch), expected)
    assert seen == (FIRST[name] if dropout else []) + TOGETHER[name]
    assert _peft_siblings._thread.group is None


def test_ranks_factors_dropout_and_what_trains_may_differ() -> None:
    module = attention(rank_pattern={"k": 2}, alpha_pattern={"v": 32}, lora_bias=True)
    module.q.lora_A["default"].weight.requires_grad_(False)
    module.k.lora_dropout["default"] = nn.Dropout(0.5)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]


def test_quantised_layers() -> None:
    parent = Attention()
    parent.q, parent.k = four_bit(WIDTH, WIDTH), four_bit(WIDTH, WIDTH)
    module = attention(parent)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]


Change = Callable[[Any, Tensor], Tensor]


def _x_by_its_data(module: Any, x: Tensor) -> Tensor:
    x.data = x.data * 2
    return x


def _other_x(module: Any, x: Tensor) -> Tensor:
    return x * 2


def _scaling(module: Any, x: Tensor) -> Tensor:
    module.k.scaling["default"] = 7.0
    return x


def _other_weights(module: Any, x: Tensor) -> Tensor:
    module.v.lora_A["default"].weight = nn.Parameter(module.v.lora_A["default"].weight.detach() * 2)
    return x


def _same_memory(module: Any, x: Tensor) -> Tensor:
    module.v.lora_B["default"].weight = nn.Parameter(module.v.lora_B["default"].weight.detach())
    return x


def _disabled(module: Any, x: Tensor) -> Tensor:
    module.k.enable_adapters(False)
    return x


def _merged(module: Any, x: Tensor) -> Tensor:
    module.v.scaling["default"] *= 2
    module.v.merge()
    return x


def _frozen(module: Any, x: Tensor) -> Tensor:
    module.k.lora_A["default"].weight.requires_grad_(False)
    return x


def _pre_hook(module: Any, x: Tensor) -> Tensor:
    module.k.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
    return x


def _inner_hook(module: Any, x: Tensor) -> Tensor:
    module.k.lora_A["default"].register_forward_hook(lambda layer, inputs, out: out * 2)
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
    _x_by_its_data, _other_x, _scaling, _other_weights, _same_memory, _disabled, _merged, _frozen, _pre_hook,
    _inner_hook, _own_forward, _backend, _no_grad, _autocast, _called_twice,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__.strip("_") for change in CHANGES])
def test_what_changes_between_two_calls_counts(change: Change) -> None:
    modules = attention(), attention()
    for module in modules:
        module.seen = None
        interrupt(module, change)
    with groups() as seen:
        found = run(modules[0])
    with apart():
        expected = run(modules[1])
    assert_as_apart(found, expected)
    assert modules[0].seen == modules[1].seen
    assert seen[0] == 3


def test_a_layer_that_no_longer_trains_drops_nothing() -> None:
    module, outputs = attention(lora_dropout=0.5), list[Tensor]()

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
    "lora_B": lambda module, x: module.k.lora_B["default"].weight,
    "bias": lambda module, x: module.k.base_layer.bias,
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
        mixed: Tensor = self.o(x) + self.v(x=x)
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
    module = attention(lora_dropout=0.5)
    x = an_input() * 1
    with apart():
        torch.manual_seed(5)
        expected = module(x)
    interrupt(module, _raise)
    with pytest.raises(KeyError):
        module(x)
    assert _peft_siblings._thread.group is not None
    del module.forward
    torch.manual_seed(5)
    assert torch.equal(module(x), expected)


def test_what_was_computed_ahead_in_vain_goes_with_the_next_call() -> None:
    other = attention()
    calls: list[Callable[[Any], object]] = [
        lambda module: module.o(an_input()),
        lambda module: other.q(an_input().detach()),
        lambda module: restore(module),
    ]
    for call in calls:
        module = attention()
        interrupt(module, _raise)
        with pytest.raises(KeyError):
            module(an_input() * 1)
        assert _peft_siblings._thread.group is not None
        call(module)
        assert _peft_siblings._thread.group is None


def test_what_was_computed_ahead_in_vain_goes_with_the_model() -> None:
    module = attention()
    interrupt(module, _raise)
    with pytest.raises(KeyError):
        module(an_input() * 1)
    alive = weakref.ref(module.k.base_layer.weight)
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


class Checkpointed(nn.Module):
    """Calls a module under a checkpoint."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: Tensor) -> Any:
        """As the module."""
        return checkpoint(self.module, x, **self.options)


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "early_stop": False}],
)
def test_checkpoints_repeat_what_was_computed(options: dict[str, Any]) -> None:
    module = attention(lora_dropout=0.2)
    with apart():
        expected = run(module)
    with groups() as seen:
        found = run(Checkpointed(module, **options))
    assert_as_apart({name.removeprefix("module."): each for name, each in found.items()}, expected)
    assert set(seen) == {3}


class WithDropoutBetween(Attention):
    """Draws random numbers between the calls."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 64]`` to the same."""
        q = nn.functional.dropout(self.q(x), 0.5)
        mixed: Tensor = self.o(q * self.k(x) + self.v(x))
        return mixed


@pytest.mark.parametrize("first", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_repeat_what_is_drawn_between_calls(reentrant: bool, first: float) -> None:
    module = attention(WithDropoutBetween(), lora_dropout=0.2)
    module.q.lora_dropout["default"] = nn.Dropout(first)
    expected = run(module)
    found = run(Checkpointed(module, use_reentrant=reentrant))
    assert_as_apart({name.removeprefix("module."): each for name, each in found.items()}, expected)


def test_masks_are_drawn_at_once_whatever_wants_a_gradient() -> None:
    module, x, found = attention(WithDropoutBetween(), lora_dropout=0.2), an_input(), list[Tensor]()
    for enabled, given in ((True, x), (True, x.detach()), (False, x)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(enabled):
            found.append(module(given * 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_inference_tensor_that_changes_counts() -> None:
    module = attention(lora_dropout=0.5)
    with torch.inference_mode(), groups() as seen:
        module(an_input() * 1)
    assert not seen


def test_another_stream_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = type("OnAGpu", (), {"is_cuda": True, "device": torch.device("cuda", 0)})()
    monkeypatch.setattr(_peft_state, "_state", lambda tensor: None)
    monkeypatch.setattr(_peft_state, "autocast_dtype", lambda x: None)
    streams = iter(["one", "one", "other"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    first, same, other = (_peft_state.of_call(stand_in) for _ in range(3))
    assert first == same != other


def test_a_checkpoint_of_every_layer_repeats_what_was_computed() -> None:
    module = attention(lora_dropout=0.2)
    with apart():
        expected = run(module)
    for layer in (module.q, module.k, module.v):
        layer.forward = checkpointed(layer)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert not seen


def checkpointed(layer: Any) -> Any:
    """The layer's forward under a checkpoint."""
    return lambda x: checkpoint(type(layer).forward, layer, x, use_reentrant=False)


def test_a_checkpoint_of_a_call_between_the_others_repeats_what_was_computed() -> None:
    module = attention()

    def forward(x: Tensor) -> Tensor:
        query: Tensor = module.q(x)
        key: Tensor = checkpoint(lambda x: module.k(x), x, use_reentrant=False)
        mixed: Tensor = module.o(query * key + module.v(x))
        return mixed

    module.forward = forward
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert seen == [3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_takes_the_steps_of_one_apart(reentrant: bool) -> None:
    model, batch = family("Qwen2", lora_dropout=0.1)
    model.enable_input_require_grads()
    with apart():
        expected = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with groups() as seen:
        assert_as_apart(step(model, batch), expected)
    assert seen.count(3) == 4


def test_it_generates_the_same_words() -> None:
    model, batch = family("Llama")
    options = {"max_new_tokens": 6, "do_sample": False}
    with apart():
        expected = model.eval().generate(input_ids=WORDS, **options)
    with groups() as seen:
        assert torch.equal(model.eval().generate(input_ids=WORDS, **options), expected)
    assert not seen
    step(model.train(), batch)
    assert torch.equal(model.eval().generate(input_ids=WORDS, **options), expected)


def test_a_compiled_graph_has_layers_apart() -> None:
    module = attention()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with groups() as seen:
        got = compiled(an_input())
    assert not seen
    torch.testing.assert_close(got, module(an_input()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(copied: Callable[[Any], Any]) -> None:
    model, batch = family("Llama")
    expected = step(model, batch)
    other = copied(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(3 if "lora_B" in name else 1)
    with apart():
        changed = step(other, batch)
    for each, numbers in ((other, changed), (model, expected)):
        with groups() as seen:
            assert_as_apart(step(each, batch), numbers)
        assert seen == TOGETHER["Llama"]


def test_a_copied_layer_brings_no_siblings() -> None:
    module = attention()
    alone = len(pickle.dumps(restore(copy.deepcopy(module.k))))
    assert len(pickle.dumps(module.k)) < 1.2 * alone


def test_replicas_compute_with_their_own_weights() -> None:
    module = attention()
    for source in (module, copy.deepcopy(module)):
        # as torch.nn.parallel.replicate makes them: a new module of the same attributes, with other tensors
        replica = source._replicate_for_data_parallel()
        for name in ("q", "k", "v", "o"):
            setattr(replica, name, _replica(getattr(source, name)))
        with apart():
            expected = replica(an_input() * 1).detach()
        with groups() as seen:
            assert torch.equal(replica(an_input() * 1), expected)
        assert not seen


def _replica(layer: Any) -> Any:
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.lora_B["default"].weight.mul_(3)
    replica = layer._replicate_for_data_parallel()
    replica._modules = copied._modules
    return replica


def test_threads_take_nothing_of_each_other() -> None:
    module = attention(lora_dropout=0.0)
    with apart():
        expected = [module(an_input() * factor) for factor in range(4)]
    wrong = list[int]()
    meet = threading.Barrier(4)
    interrupt(module, lambda module, x: (meet.wait(), x)[1])

    def work(factor: int) -> None:
        for _ in range(5):
            if not torch.equal(module(an_input() * factor), expected[factor]):
                wrong.append(factor)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_restoring_leaves_no_trace() -> None:
    model = accelerated(nn.Sequential(Attention()))
    layers = [layer for layer in model.modules() if "_siblings" in vars(layer)]
    assert len(layers) == 3
    restore(model)
    assert not any("sibling" in name for module in model.modules() for name in vars(module))
    fastlora.accelerate(model)
    assert [layer for layer in model.modules() if "_siblings" in vars(layer)] == layers


def test_another_adapter_and_a_deleted_one() -> None:
    model = accelerated(nn.Sequential(Attention()))
    module = model.base_model.model[0]
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False))
    for names, together in ((["other"], []), (["default"], [3]), (["default", "other"], [3])):
        model.base_model.set_adapter(names)
        for _ in range(2):
            with apart():
                expected = run(module)
            with groups() as seen:
                assert_as_apart(run(module), expected)
        assert seen == together
    model.delete_adapter("other")
    model.base_model.set_adapter("default")
    with apart():
        expected = run(module)
    assert_as_apart(run(module), expected)


def _hooked(module: Any) -> None:
    module.q.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))


def _wrapped(module: Any) -> None:
    module.q = nn.Sequential(module.q)


def _wrapped_sibling(module: Any) -> None:
    module.v = nn.Sequential(module.v)


def _switched_off(module: Any) -> None:
    module.k.enable_adapters(False)


def _exchanged(module: Any) -> None:
    module.q, module.k = module.k, module.q


@pytest.mark.parametrize("change", [_hooked, _wrapped, _wrapped_sibling, _switched_off, _exchanged])
def test_nothing_is_shared_by_layers_that_are_no_longer_called_alike(change: Callable[[Any], None]) -> None:
    module = attention()
    change(module)
    with apart():
        expected = run(module)
    with groups() as seen:
        assert_as_apart(run(module), expected)
    assert not seen


def test_gate_and_up_of_an_mlp_are_read_as_they_are() -> None:
    model, batch = family("Llama")
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.gate_proj.enable_adapters(False)
    mlp.up_proj.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
    with apart():
        expected = step(model, batch)
    assert_as_apart(step(model, batch), expected)
    mlp.gate_proj.enable_adapters(True)
    with apart():
        expected = step(model, batch)
    with groups() as seen:
        assert_as_apart(step(model, batch), expected)
    assert seen == [3, 2]


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


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", ["ddp", "fsdp1", "fsdp1 of layers", "fsdp2", "fsdp2 of layers"])
def test_sharded_and_replicated_models(how: str) -> None:
    module = attention()
    with apart():
        expected = run(module)
    called: Any = module
    if how == "ddp":
        called = nn.parallel.DistributedDataParallel(module)
    elif how.startswith("fsdp1"):
        called = fsdp1(module, of_layers=how == "fsdp1 of layers", use_orig_params=True)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in (module.q, module.k, module.v) if how == "fsdp2 of layers" else ():
            fully_shard(layer, mesh=mesh)
        called = fully_shard(module, mesh=mesh)
    for _ in range(2):
        with groups() as seen:
            found = run(called)
        plain = {
            name.removeprefix("module.").replace("_fsdp_wrapped_module.", ""): each
            for name, each in found.items()
        }
        plain = {
            name: getattr(each, "_local_tensor", each).view_as(expected[name]) for name, each in plain.items()
        }
        assert_as_apart(plain, expected)
    assert seen == ([] if how.endswith("of layers") else [3])


def fsdp1(module: Any, *, of_layers: bool, use_orig_params: bool) -> Any:
    """The module in FSDP's first version, and each layer, too."""
    policy = ModuleWrapPolicy({type(module.q)}) if of_layers else None
    return FullyShardedDataParallel(
        module, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def one_of_two(rank: int, folder: Path, use_orig_params: bool) -> None:
    """A rank whose layers' weights are there only while each is called."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = attention().requires_grad_()
    with apart():
        expected = run(module)
    called = fsdp1(module, of_layers=True, use_orig_params=use_orig_params)
    found = run(called)
    assert_as_apart(
        {name: found[name] for name in ("output", "x")}, {n: expected[n] for n in ("output", "x")}
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", cases([], [False, True]))
def test_layers_that_are_sharded_each_by_itself(tmp_path: Path, use_orig_params: bool) -> None:
    spawn(one_of_two, (tmp_path, use_orig_params), 2)
