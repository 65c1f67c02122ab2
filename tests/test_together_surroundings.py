"""Layers that are computed together where models live: generating, compiled, copied, threaded, sharded."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.spawn import spawn

from fastlora.together import state
from tests import sibling_models
from tests.cases import cases
from tests.sibling_models import (
    WORDS,
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
