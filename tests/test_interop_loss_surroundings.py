"""Models with the chunked loss where they live: trained, saved, sharded, checkpointed, compiled."""

import copy
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.interop._chunked_loss import ChunkedLoss, _tell_at_once
from fastlora.interop._lazy_logits import LazyLogits
from fastlora.interop.peft import restore
from tests.chunked_models import (
    HEADS,
    IDS,
    LABELS,
    Small,
    assert_its_own_step,
    chunked,
    made,
    step,
    with_lora,
)


def test_with_checkpointing_and_both_accelerated() -> None:
    plain = with_lora(made())
    accelerated = chunked(plain)
    accelerated.gradient_checkpointing_enable()
    accelerated.enable_input_require_grads()
    found = step(accelerated)
    trained = {"loss", *(name for name, each in plain.named_parameters() if each.requires_grad)}
    assert_its_own_step(plain, {name: found[name] for name in trained})
    with plain.disable_adapter(), accelerated.disable_adapter(), torch.no_grad():
        losses = [model(input_ids=IDS, labels=LABELS).loss for model in (plain, accelerated)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_the_models_own_class_comes_back() -> None:
    plain = with_lora(made())
    accelerated = chunked(plain)
    inside, own = accelerated.get_base_model(), type(plain.get_base_model())
    assert isinstance(inside, ChunkedLoss)
    assert (type(inside).__name__, type(inside).__module__) == (own.__name__, own.__module__)
    assert inspect.signature(inside.forward) == inspect.signature(plain.get_base_model().forward)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(inside)))
    assert isinstance(copied, ChunkedLoss)
    kept = inside.forward
    for undo in (restore, fastlora.accelerate):
        fastlora.accelerate(accelerated, loss="chunked")
        fastlora.accelerate(accelerated, loss="chunked")
        undo(accelerated)
        assert type(inside) is own
        assert type(accelerated(input_ids=IDS, labels=LABELS).logits) is Tensor
        assert type(kept(input_ids=IDS, labels=LABELS).logits) is Tensor
        assert_its_own_step(plain, step(accelerated))


def test_a_merged_model_is_saved_by_its_own_name(tmp_path: Path) -> None:
    merged = chunked(with_lora(made())).merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert torch.equal(loaded(input_ids=IDS).logits, merged.eval()(input_ids=IDS).logits)


def _best(given: Any) -> dict[str, Any]:
    return {"best": given.predictions.argmax(-1).tolist()}


def _trainer(model: Any, folder: Path, **options: Any) -> Any:
    rows = [{"input_ids": ids, "labels": wanted} for ids, wanted in zip(IDS, LABELS, strict=True)] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **options,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=_best,
    )


def test_the_trainer_counts_items_and_evaluates(tmp_path: Path) -> None:
    found = []
    plain = with_lora(made())
    for model in (plain, chunked(plain)):
        trainer = _trainer(model, tmp_path)
        assert trainer.model_accepts_loss_kwargs
        before = trainer.evaluate()
        loss = trainer.train().training_loss
        learnt = {n: p for n, p in model.named_parameters() if "lora" in n}
        found.append({"loss": torch.tensor(loss), "before": torch.tensor(before["eval_loss"]), **learnt})
        found[-1]["best"] = torch.tensor(before["eval_best"])
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6)


def test_mixed_precision_by_accelerate_reads_no_logits(tmp_path: Path) -> None:
    """It casts all outputs to float32."""
    trainer = _trainer(chunked(with_lora(made())), tmp_path, bf16=True)
    trainer.train()
    batch = {"input_ids": IDS, "labels": LABELS}
    logits = trainer.model_wrapped.train()(**batch).logits
    assert (type(logits), logits.dtype) == (LazyLogits, torch.float32)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("settings", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_under_ddp(settings: dict[str, Any]) -> None:
    plain = with_lora(made(tie_word_embeddings=True), **HEADS["LoRA"])
    accelerated = chunked(plain)
    called = nn.parallel.DistributedDataParallel(accelerated, **settings)
    assert_its_own_step(plain, step(accelerated, called))
    assert isinstance(called(input_ids=IDS, labels=LABELS).logits, LazyLogits)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("head_apart", [False, True])
def test_under_fsdp(head_apart: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A head that is sharded by itself can't be called by rows: the model computes its loss, and says so."""
    plain = with_lora(made(), **HEADS["LoRA"])
    accelerated = chunked(plain)
    inside = accelerated.get_base_model()
    for part in [*inside.model.layers, *([inside.lm_head] if head_apart else [])]:
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(accelerated, mesh=init_device_mesh("cpu", (1,)))
    _tell_at_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastlora"):
        found = step(accelerated)
    assert ("its head is sharded" in caplog.text) == head_apart
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
    assert_its_own_step(plain, whole)


@pytest.mark.usefixtures("one_process")
def test_under_the_first_fsdp(caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's policy wraps each layer of LoRA by itself."""
    plain = with_lora(made(), **HEADS["LoRA"])
    accelerated = chunked(plain)
    head = accelerated.get_base_model().lm_head
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for layers in (head.lora_A, head.lora_B):
        layers["default"] = FullyShardedDataParallel(layers["default"], **options)
    called = FullyShardedDataParallel(accelerated, **options)
    _tell_at_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastlora"):
        found = {name.replace("_fsdp_wrapped_module.", ""): each for name, each in step(called).items()}
    assert "its head is sharded" in caplog.text
    assert_its_own_step(plain, found)


def test_replicas_of_data_parallel_give_what_it_gathers() -> None:
    replica = chunked(made())._replicate_for_data_parallel()
    assert type(replica(input_ids=IDS, labels=LABELS).logits) is Tensor


def test_within_a_checkpoint_of_the_caller() -> None:
    model = made()

    def called(input_ids: Tensor, labels: Tensor) -> Any:
        loss = checkpoint(
            lambda ids: accelerated(input_ids=ids, labels=labels).loss, input_ids, use_reentrant=False
        )
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)

    accelerated = chunked(model)
    assert_its_own_step(model, step(accelerated, called))


def test_in_a_compiled_graph_the_loss_is_the_models() -> None:
    model = Small(made().config)
    # of a class that transformers does not know
    model.loss_type = "ForCausalLM"
    compiled: Any = torch.compile(chunked(model), backend="eager", fullgraph=True)
    found = step(compiled)
    assert_its_own_step(model, {name.removeprefix("_orig_mod."): grad for name, grad in found.items()})
    assert type(compiled(input_ids=IDS, labels=LABELS).logits) is Tensor
