"""Accelerated PEFT models of nine families, in what users do with them: as PEFT's, or with layers apart."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlora
from fastlora.interop.peft import restore
from tests.cases import cases
from tests.sibling_models import FAMILIES, WORDS, apart, assert_as_apart, family, gated, groups, step

QUICK = ("Llama", "T5", "ViT")
EVERY = cases(QUICK, [name for name in FAMILIES if name not in QUICK])
WRITERS = cases(["Llama", "T5"], ["Qwen2", "Gemma", "Mistral", "Phi", "GPT-2"])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_it_generates_what_peft_generates(name: str, cache: bool) -> None:
    model, batch = family(name)
    # what a step has left behind may not count
    step(model, batch)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    ours = model.eval().generate(input_ids=WORDS, **options)
    with apart():
        separate = model.generate(input_ids=WORDS, **options)
    own = restore(model).generate(input_ids=WORDS, **options)
    for logits, of_separate, of_peft in zip(ours.logits, separate.logits, own.logits, strict=True):
        assert torch.equal(logits, of_separate)
        torch.testing.assert_close(logits, of_peft, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.sequences, own.sequences)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_repeats_what_was_computed(name: str, reentrant: bool) -> None:
    model, batch = family(name, dropout=0.1)
    # a reentrant checkpoint computes gradients for inputs that want some
    for module in model.modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embeddings"):
            module.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    with apart():
        expected = step(model, batch)
    with groups() as once:
        assert_as_apart(step(model, batch), expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with groups() as seen:
        assert_as_apart(step(model, batch), expected)
    assert set(seen) == set(once)
    assert len(seen) > len(once) or name == "GPT-2"


@pytest.mark.parametrize("name", EVERY)
def test_adapters_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, batch = family(name)
    with groups() as before:
        expected = step(model, batch)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded: Any = peft.PeftModel.from_pretrained(FAMILIES[name]()[0], tmp_path, is_trainable=True).train()
    of_peft = step(loaded, batch)
    fastlora.accelerate(loaded)
    with groups() as after:
        assert_as_apart(step(loaded, batch), expected)
    assert after == before
    for key, tensor in of_peft.items():
        torch.testing.assert_close(expected[key], tensor, rtol=1e-4, atol=1e-5)
    # beside the adapter that is there
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.mul_(3 if "lora_B" in key else 1)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    model.set_adapter("second")
    with groups() as after:
        found = {key.replace("second", "default"): each for key, each in step(model, batch).items()}
    assert_as_apart(found, expected)
    assert after == before


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", EVERY)
def test_replicated_and_sharded_models(name: str, how: str) -> None:
    model, batch = family(name)
    with apart():
        expected = step(model, batch)
    with groups() as once, gated() as gated_once:
        assert_as_apart(step(model, batch), expected)
    called = nn.parallel.DistributedDataParallel(model) if how == "ddp" else sharded(model)
    with groups() as seen, gated() as gated_seen:
        found = step(called, batch)
    assert_as_apart({key.removeprefix("module."): whole(each) for key, each in found.items()}, expected)
    assert (seen, gated_seen) == (once, gated_once)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", cases(["Llama"], ["Gemma"]))
def test_a_gated_mlp_that_is_sharded_by_itself(name: str) -> None:
    model, batch = family(name)
    with apart(), gated() as once:
        expected = step(model, batch)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.base_model.model.model.layers:
        fully_shard(block.mlp, mesh=mesh)
    with gated() as seen:
        found = step(fully_shard(model, mesh=mesh), batch)
    assert_as_apart({key: whole(each) for key, each in found.items()}, expected)
    assert len(seen) == 2
    assert seen == once


def sharded(model: Any) -> Any:
    """The model, each of its blocks by itself."""
    mesh = init_device_mesh("cpu", (1,))
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # a block of T5 is a list of its own
    for name in lists:
        if not any(name.startswith(f"{other}.") for other in lists):
            for block in model.get_submodule(name):
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
