"""Layers that are computed together where models live: checkpointed, compiled, copied, sharded."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from fastlora.together import state
from tests import sibling_models
from tests.cases import cases
from tests.sibling_models import (
    WORDS,
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


@pytest.fixture(autouse=True, params=list(sibling_models.WAYS.values()), ids=list(sibling_models.WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both PEFT's layers and our own."""
    monkeypatch.setattr(sibling_models, "way", request.param)


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
    module = attention(dropout=0.2)
    with apart():
        expected = run(module)
    with groups() as seen:
        found = run(Checkpointed(module, **options))
    assert_as_apart({name.removeprefix("module."): each for name, each in found.items()}, expected)
    assert set(seen) == {3}


@pytest.mark.parametrize("trains", [True, False])
def test_kernels_compute_alike_what_a_checkpoint_repeats(trains: bool, kernel_device: torch.device) -> None:
    """The first pass has no gradients, and no x that says whether one will be wanted."""
    pytest.importorskip("triton", reason="kernels need Triton")
    module = attention().to(kernel_device).train(trains)
    x = an_input().detach().to(kernel_device).requires_grad_()
    with fastlora.use_backend("triton"), groups() as seen:
        expected = module(x * 1)
        y = checkpoint(lambda x: module(x * 1), x, use_reentrant=True)
        y.sum().backward()
    assert torch.equal(y, expected)
    assert seen == ([3, 3, 3] if trains else [])


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
    module = attention(WithDropoutBetween(), dropout=0.2)
    sibling_models.way.set_dropout(module.q, first)
    expected = run(module)
    found = run(Checkpointed(module, use_reentrant=reentrant))
    assert_as_apart({name.removeprefix("module."): each for name, each in found.items()}, expected)


def test_masks_are_drawn_at_once_whatever_wants_a_gradient() -> None:
    module, x, found = attention(WithDropoutBetween(), dropout=0.2), an_input(), list[Tensor]()
    for enabled, given in ((True, x), (True, x.detach()), (False, x)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(enabled):
            found.append(module(given * 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_inference_tensor_that_changes_counts() -> None:
    module = attention(dropout=0.5)
    with torch.inference_mode(), groups() as seen:
        module(an_input() * 1)
    assert not seen


def test_another_stream_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = type("OnAGpu", (), {"is_cuda": True, "device": torch.device("cuda", 0)})()
    monkeypatch.setattr(state, "_state", lambda tensor: None)
    monkeypatch.setattr(state, "autocast_dtype", lambda x: None)
    streams = iter(["one", "one", "other"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    first, same, other = (state.of_call(stand_in) for _ in range(3))
    assert first == same != other


def test_a_checkpoint_of_every_layer_repeats_what_was_computed() -> None:
    module = attention(dropout=0.2)
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
    model, batch = family("Qwen2", dropout=0.1)
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
        assert seen == [2, 3, 2]


def test_a_copied_layer_brings_no_siblings() -> None:
    module = attention()
    alone = copy.deepcopy(module.k)
    del alone.__dict__["_siblings"]
    assert len(pickle.dumps(module.k)) < 1.2 * len(pickle.dumps(alone))


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
        sibling_models.way.factor(copied, "lora_B").mul_(3)
    replica = layer._replicate_for_data_parallel()
    replica._modules, replica._parameters = copied._modules, copied._parameters
    return replica


def test_threads_take_nothing_of_each_other() -> None:
    module = attention(dropout=0.0)
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


def one_of_two(rank: int, way: sibling_models.Way, folder: Path, use_orig_params: bool) -> None:
    """A rank whose layers' weights are there only while each is called."""
    torch.set_num_threads(1)
    sibling_models.way = way
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
    spawn(one_of_two, (sibling_models.way, tmp_path, use_orig_params), 2)
