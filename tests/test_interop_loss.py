"""``accelerate(model, loss="chunked")``: the model's own loss and gradients without all logits at once."""

import copy
import inspect
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlora
from fastlora.bench.turns import peak_bytes
from fastlora.interop._chunked_loss import ChunkedLoss, _tell_at_once
from fastlora.interop._lazy_logits import LazyLogits
from fastlora.interop.peft import restore
from tests import hf_models
from tests.cases import cases
from tests.quantised import four_bit

CLASSES = hf_models.SIZES["vocab_size"]
IDS = torch.randint(3, CLASSES, (2, 16), generator=torch.Generator().manual_seed(0))
# a prompt, and what pads the second text, don't count
LABELS = torch.where(torch.tensor([[False] * 5 + [True] * 11, [True] * 9 + [False] * 7]), IDS, -100)


def made(family: str = "Llama", **options: Any) -> Any:
    """A tiny model that trains whole, its head's logits far from equal."""
    if family == "GPT2":
        model = hf_models.gpt2().apply(_without_dropout)
    else:
        config = getattr(transformers, f"{family.removesuffix('Model')}Config")
        sizes = hf_models.SIZES | {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1} | options
        kind = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
        model = hf_models._made(kind, config(**sizes, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 3)
    return model.train()


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def with_lora(model: Any, **settings: Any) -> Any:
    """A PEFT model around it, whose update is not zero."""
    defaults: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    config = peft.LoraConfig(**defaults | settings, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def chunked(model: Any) -> Any:
    """Its accelerated copy."""
    return fastlora.accelerate(copy.deepcopy(model), loss="chunked")


def step(model: Any, called: Any = None, **given: Any) -> dict[str, Tensor]:
    """Loss and gradients, by parameter."""
    model.zero_grad()
    out = (called or model)(input_ids=IDS, **{"labels": LABELS} | given)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), **found}


def assert_its_own_step(plain: Any, found: dict[str, Tensor], exact: Any = None, **given: Any) -> None:
    """No further from the step in float64 than the model's own in its dtype, and a rounding of a sum."""
    own = step(plain, **given)
    exact = exact or step(copy.deepcopy(plain).double(), **given)
    assert own.keys() == found.keys()
    for name, truth in exact.items():
        error, allowed = (float((each[name] - truth).norm()) for each in (found, own))
        rounding = torch.finfo(torch.float32).eps / 2 * CLASSES**0.5 * float(truth.norm())
        assert error <= allowed + rounding, f"{name}: error {error:.1e}, the model's own {allowed:.1e}"
        assert found[name].dtype == own[name].dtype, name


FAMILIES = cases(
    ["Llama", "Gemma2", "Cohere", "GPT2"],
    ["Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3Text", "Phi3", "Granite"],
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_whole_model_is_its_own(family: str) -> None:
    """Gemma, Cohere and GPT-2 are tied; Gemma2 caps logits; Cohere multiplies, Granite divides them."""
    model = made(family, **{"final_logit_softcapping": 2.0} if family == "Gemma2" else {})
    accelerated = chunked(model)
    assert_its_own_step(model, step(accelerated))
    assert isinstance(accelerated(input_ids=IDS, labels=LABELS).logits, LazyLogits)


HEADS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "trained": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("head", "tied"),
    # what PEFT saves it unties
    cases([("frozen", True), ("LoRA", True), ("DoRA", False), ("trained", False)], [("LoRA", False)]),
)
def test_a_step_of_peft_is_its_own(head: str, tied: bool) -> None:
    plain = with_lora(made(tie_word_embeddings=tied), **HEADS[head])
    found = step(chunked(plain))
    assert_its_own_step(plain, found)
    assert any("lm_head" in name for name in found) == (head != "frozen")


@pytest.mark.parametrize("head", ["LoRA", "trained"])
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_16_bits_are_as_exact(how: str, head: str) -> None:
    plain = with_lora(made(), **HEADS[head])
    plain = plain.bfloat16() if how == "bf16" else plain
    exact = step(copy.deepcopy(plain).double())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        eager, found = step(fastlora.accelerate(copy.deepcopy(plain))), step(chunked(plain))
    assert eager.keys() == found.keys()
    for name, truth in exact.items():
        error, allowed = (float((each[name] - truth).norm()) for each in (found, eager))
        # the loss is one draw: the mean of as many rounding errors as labels
        unit = torch.finfo(torch.bfloat16).eps / 2 * float(truth.norm()) / int((LABELS != -100).sum()) ** 0.5
        assert error <= 1.1 * allowed + unit, name
        assert found[name].dtype == eager[name].dtype


@pytest.mark.parametrize("given", [{"num_items_in_batch": 9}, {"num_items_in_batch": torch.tensor(9)}])
def test_items_are_divided_by_what_is_given(given: dict[str, Any]) -> None:
    model = made()
    assert_its_own_step(model, step(chunked(model), **given), **given)


def test_labels_may_be_shifted_already() -> None:
    model = made()
    given = {"shift_labels": LABELS.roll(3, dims=1)}
    assert_its_own_step(model, step(chunked(model), **given), **given)


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


def test_a_quantised_head() -> None:
    pytest.importorskip("bitsandbytes")
    model = made().requires_grad_(False)
    model.lm_head = four_bit(CLASSES, hf_models.SIZES["hidden_size"], bias=False)
    plain = with_lora(model, **HEADS["LoRA"])
    found = step(chunked(plain))
    own = fastlora.accelerate(plain)
    assert_its_own_step(own, found, exact=step(own))


def test_loras_of_ours() -> None:
    model = fastlora.apply_lora(made(), target_modules=["q_proj", "lm_head"], rank=2)
    assert_its_own_step(model, step(chunked(model)))


def test_it_takes_an_eighth_of_the_memory() -> None:
    model = made(vocab_size=4096, num_hidden_layers=1).requires_grad_(False)
    words = torch.randint(3, 4096, (2, 64))

    def loss_alone(model: Any) -> int:
        hidden = torch.randn(2, 64, 32, requires_grad=True)
        model.model.forward = lambda **given: transformers.modeling_outputs.BaseModelOutputWithPast(hidden)

        def train() -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(input_ids=words, labels=words).loss, [hidden])

        train()
        return peak_bytes(train)

    assert loss_alone(chunked(model)) <= loss_alone(model) / 8


def test_logits_that_the_loss_has_taken_are_spent() -> None:
    """They can be looked at and handed on; who reads them is told what to do, and nothing is kept for it."""
    model = made("Cohere")
    expected = model(input_ids=IDS).logits
    out = chunked(model)(input_ids=IDS, labels=LABELS)
    # as accelerate and FSDP hand outputs on, and DDP
    handed = [out.logits.float(), out.logits.to("cpu"), out.logits.clone(), out.logits.detach()]
    for logits in (out.logits, *handed):
        assert (logits.shape, logits.dtype, logits.device) == (expected.shape, torch.float32, expected.device)
        assert not logits.requires_grad
        assert "shape=(2, 16, 60)" in repr(logits)
        for read in (torch.argmax, torch.Tensor.tolist, pickle.dumps, lambda logits: logits * 2):
            with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\) or without labels"):
                read(logits)
    with pytest.raises(RuntimeError, match="never has all"), torch._C.DisableTorchFunctionSubclass():
        out.logits * 1
    assert out.logits.bfloat16().dtype == torch.bfloat16
    hidden = weakref.ref(out.logits._call)
    assert out.logits._call.hidden is None
    del out, logits, handed
    assert hidden() is None


@pytest.mark.parametrize("without", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_what_forward_itself_reads_is_the_models(without: Any, after: bool) -> None:
    """Before the loss or after it, with or without gradients; outputs have what was read."""
    model = Small(made().config)
    guesses = []

    def look(logits: Tensor) -> Tensor:
        with without():
            guesses.append(logits.argmax(-1))
        return logits

    setattr(model, "look" if after else "change", look)
    accelerated = chunked(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [each(input_ids=IDS, labels=LABELS) for each in (model, accelerated)]
    assert torch.equal(*guesses)
    assert type(outputs[1].logits) is Tensor
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for each, out in zip((model, accelerated), outputs, strict=True):
        each.zero_grad()
        (out.loss + out.logits.float().logsumexp(-1).sum()).backward()
    torch.testing.assert_close(
        accelerated.lm_head.weight.grad, model.lm_head.weight.grad, rtol=0.02, atol=0.02
    )


def test_logits_that_no_loss_takes_are_the_models() -> None:
    model = Small(made().config)
    model.takes_loss = False
    found, own = (each(input_ids=IDS, labels=LABELS).logits for each in (chunked(model), model))
    assert type(found) is Tensor
    assert found.requires_grad
    assert torch.equal(found, own)


def test_labels_by_position_and_a_tuple() -> None:
    model = made()
    at = list(inspect.signature(model.forward).parameters).index("labels")
    given = (IDS, *(None,) * (at - 1), LABELS)
    accelerated = chunked(model)
    loss, logits, *_ = accelerated(*given, return_dict=False)
    torch.testing.assert_close(loss, model(*given).loss, rtol=1e-6, atol=0)
    assert isinstance(logits, LazyLogits)


def test_evaluation_and_generation_are_the_models(caplog: pytest.LogCaptureFixture) -> None:
    plain = with_lora(made())
    accelerated = chunked(plain)
    for model in (plain, accelerated):
        model.eval()
    assert type(accelerated(input_ids=IDS).logits) is Tensor
    tokens = [
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for model in (plain, accelerated)
    ]
    assert torch.equal(*tokens)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            found, expected = (model(input_ids=IDS, labels=LABELS) for model in (accelerated, plain))
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
            assert type(found.logits) is Tensor
            assert torch.equal(found.logits, expected.logits)
    assert not caplog.records


def test_a_failed_call_leaves_the_head_as_it_was() -> None:
    accelerated = chunked(made())
    with pytest.raises(ValueError, match="batch_size"):
        accelerated(input_ids=IDS, labels=LABELS, logits_to_keep=3)
    assert "forward" not in vars(accelerated.lm_head)


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


def _masked() -> Any:
    return hf_models.masked_bert()


def _own_loss() -> Any:
    model = made()
    model.loss_function = lambda **given: torch.zeros(())
    return model


def _own_forward() -> Any:
    model = made()
    model.forward = model.forward
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_masked, "computes its loss itself"),
        (hf_models.t5, "computes its loss itself"),
        (_own_loss, "the loss of LlamaForCausalLM is <lambda>"),
        (_own_forward, "a forward of its own"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "got Sequential; leave"),
    ],
)
def test_what_it_does_not_know_is_refused(make: Any, reason: str) -> None:
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f'expected for loss="chunked" .*{reason}'):
        fastlora.accelerate(model, loss="chunked")
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ValueError, match='"model" or "chunked"'):
        fastlora.accelerate(model, loss="whole")  # type: ignore[arg-type]


class Small(transformers.LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Embeddings and a head, and what it does to logits between it and the loss."""

    change = look = staticmethod(lambda logits: logits)
    takes_loss = True

    def forward(self, input_ids: Any = None, labels: Any = None, **given: Any) -> Any:
        logits = self.lm_head(self.model.embed_tokens(input_ids))
        logits, loss = self.change(logits), None
        if self.takes_loss:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        logits = self.look(logits)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _in_place(logits: Tensor) -> Tensor:
    logits.mul_(0.5)
    return logits.float()


def _half_in_place(logits: Tensor) -> Tensor:
    logits *= 0.5
    return logits


def _by_a_tensor(logits: Tensor) -> Tensor:
    return logits * torch.linspace(0.5, 1, CLASSES)


@pytest.mark.parametrize("change", [_centred, _in_place, _half_in_place, _by_a_tensor])
def test_a_model_that_reads_its_logits_first_keeps_its_loss_and_says_so(
    change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Small(made().config)
    model.change = change
    accelerated = chunked(model)
    _tell_at_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastlora"):
        found = [step(accelerated), step(accelerated)]
    for each in found:
        assert_its_own_step(model, each)
    assert len(caplog.records) == 1
    assert "Small has its logits at once" in caplog.text


def test_hooks_of_the_head_see_its_logits() -> None:
    plain = with_lora(made(), **HEADS["LoRA"])
    accelerated = chunked(plain)
    for model in (plain, accelerated):
        model.get_base_model().lm_head.lora_A["default"].register_forward_hook(
            lambda part, given, out: 2 * out
        )
        model.get_base_model().lm_head.register_forward_hook(lambda head, given, out: out.softmax(-1))
    assert_its_own_step(plain, step(accelerated))


@pytest.mark.parametrize("head", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}])
def test_hooks_of_parameters_see_one_gradient(head: dict[str, Any]) -> None:
    plain = with_lora(made(), **head)
    accelerated = chunked(plain)
    for model in (plain, accelerated):
        for name, parameter in model.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    expected, found = step(plain), step(accelerated)
    assert any("lm_head" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_head_that_moves_its_input_to_another_device() -> None:
    model = Small(made().config)
    own = model.lm_head.to("meta").forward
    model.lm_head.forward = lambda hidden: own(hidden.to("meta"))
    out = chunked(model)(input_ids=IDS, labels=LABELS)
    assert out.loss.device.type == out.logits.device.type == "meta"


class Static(Small):  # type: ignore[no-untyped-call]
    """A class that says its loss by itself."""

    loss_function = staticmethod(ForCausalLMLoss)


def test_a_class_that_names_its_loss() -> None:
    model = Static(made().config)
    accelerated = chunked(model)
    assert_its_own_step(model, step(accelerated))
    assert isinstance(accelerated(input_ids=IDS, labels=LABELS).logits, LazyLogits)
    accelerated.loss_function = lambda **given: torch.zeros(())
    out = accelerated(input_ids=IDS, labels=LABELS)
    assert out.loss == 0
    assert type(out.logits) is Tensor


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
