"""What is saved answers as the model did: merged, tied, with a trained head, and from the Trainer."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

import fastlora
from tests.lora_models import ConvNet, mlp, randomize_adapters, same_bits, tiny_vit

transformers = pytest.importorskip("transformers")
Model = Any
Make = Callable[[], Model]
IDS = torch.arange(14).view(2, 7) + 3
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def llama(tie: bool = False) -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tie, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def tied() -> Model:
    return llama(tie=True)


def bert() -> Model:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).eval()


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def adapted(make: Make, **settings: Any) -> Model:
    return randomize_adapters(fastlora.apply_lora(make(), **{"rank": 2, "alpha": 4, **settings})).eval()


def saved_and_read(model: Model, folder: Path, **options: Any) -> Model:
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder).eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (llama, {}),
        (llama, {"dora": True, "rslora": True}),
        (bert, {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["classifier"]}),
        (tied, {"target_modules": ["embed_tokens", "q_proj"]}),
        (tied, {"target_modules": ["lm_head", "q_proj"]}),
    ],
    ids=["llama", "dora", "modules-to-save", "tied-embedding", "tied-head"],
)
def test_from_pretrained_answers_as_the_model_that_was_saved(
    make: Make, settings: dict[str, Any], merged: bool, tmp_path: Path
) -> None:
    """unsloth#5410, #1519, #2534, #9331; unsloth-zoo#369; transformers#45127; peft#2777."""
    model = adapted(make, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1)
    if merged:
        fastlora.merge_adapters(model)
    wanted = logits(model)
    frozen = logits(make())
    assert not torch.allclose(wanted, frozen, atol=1e-3)
    assert_close(logits(saved_and_read(model, tmp_path)), wanted)
    assert model.config.tie_word_embeddings == make().config.tie_word_embeddings


def test_removing_merged_adapters_unties_what_they_moved_apart(tmp_path: Path) -> None:
    """transformers#45127: merged, tied on reading, garbage."""
    model = fastlora.merge_adapters(adapted(tied, target_modules=["embed_tokens"]))
    wanted = logits(model)
    fastlora.remove_adapters(model)
    assert "save_pretrained" not in vars(model)
    assert model.config.tie_word_embeddings is False
    assert_close(logits(saved_and_read(model, tmp_path)), wanted)


def test_merging_says_that_tied_weights_differ(caplog: pytest.LogCaptureFixture) -> None:
    fastlora.merge_adapters(adapted(tied, target_modules=["embed_tokens"]))
    assert "lm_head" in caplog.text
    assert "tie_word_embeddings" in caplog.text
    caplog.clear()
    fastlora.merge_adapters(adapted(llama))
    assert not caplog.text


def test_what_goes_around_the_adapted_model_is_saved_with_its_training(tmp_path: Path) -> None:
    """apply_lora on a part: the classifier around it was never seen."""
    model = bert()
    randomize_adapters(fastlora.apply_lora(model.bert, rank=2))
    assert_close(logits(saved_and_read(model, tmp_path)), logits(model))


@pytest.mark.parametrize(
    "options",
    [lambda model: {"state_dict": model.state_dict()}, lambda _: {"max_shard_size": "4KB"}],
    ids=["state-dict-given", "shards"],
)
def test_other_ways_to_save(options: Callable[[Model], dict[str, Any]], tmp_path: Path) -> None:
    model = adapted(llama)
    assert_close(logits(saved_and_read(model, tmp_path, **options(model))), logits(model))


def test_a_saved_model_goes_on_training_bit_for_bit(tmp_path: Path) -> None:
    """Trainer's resume reads the file of save_pretrained into the adapted model."""
    model = adapted(llama, modules_to_save=["norm"])
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    again = fastlora.apply_lora(llama(), rank=2, alpha=4, modules_to_save=["norm"])
    again.load_state_dict(state)
    assert all(same_bits(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    # beside other frozen weights, those that were adapted are computed, and that is said
    other = llama()
    other.apply(other._init_weights)
    fastlora.apply_lora(other, rank=2, alpha=4)
    with pytest.warns(UserWarning, match="other frozen weights"):
        other.load_state_dict(state)
    assert_close(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="from one file"):
        other.load_state_dict({n: t for n, t in state.items() if "q_proj.weight" not in n}, strict=False)


def test_the_trainer_resumes_and_saves(tmp_path: Path) -> None:
    """Trainer.save_model lost the training in silence; resuming stays exact."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4

    def trainer(folder: str, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, save_steps=2, learning_rate=0.1,
            per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        model = fastlora.apply_lora(llama(), rank=2)
        # the same first A in all of them
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, fastlora.LoRALinear):
                module.reset_lora_parameters()
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    whole, resumed = trainer("whole", 4), trainer("resumed", 4)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(same_bits(tensor, states[1][name]) for name, tensor in states[0].items())
    whole.save_model(str(tmp_path / "final"))
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert_close(logits(read), logits(whole.model.eval()))


def test_adapters_and_prompts_that_from_pretrained_cannot_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fastlora.apply_adapters(bert(), adapter_size=2).save_pretrained(tmp_path)
    assert "bottleneck adapters" in caplog.text
    assert "fastlora.save_adapter" in caplog.text
    caplog.clear()
    fastlora.apply_prompts(llama(), num_tokens=2).save_pretrained(tmp_path)
    assert "prompts" in caplog.text
    with caplog.at_level(logging.INFO):
        adapted(llama).save_pretrained(tmp_path)
    assert "lora_merged" in caplog.text


def test_copies_save_themselves(tmp_path: Path) -> None:
    model = adapted(llama)
    for index, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        randomize_adapters(twin, seed=5)
        assert_close(logits(saved_and_read(twin, tmp_path / str(index))), logits(twin))


PLAIN = pytest.mark.parametrize(
    ("make", "settings", "x"),
    [
        (mlp, {}, torch.ones(2, 12)),
        (mlp, {"dora": True}, torch.ones(2, 12)),
        (ConvNet, {"target_modules": ["stem", "head"]}, torch.ones(2, 3, 8, 8)),
        (tiny_vit, {}, torch.ones(2, 3, 8, 8)),
        (lambda: nn.Sequential(nn.Embedding(9, 4)), {"target_modules": ["0"]}, torch.arange(6)),
    ],
    ids=["linear", "dora", "conv", "attention", "embedding"],
)


@PLAIN
def test_the_plain_model_loads_a_merged_models_state(
    make: Callable[[], nn.Module], settings: dict[str, Any], x: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    model = randomize_adapters(fastlora.apply_lora(model, rank=2, **settings))
    fastlora.merge_adapters(model)
    wanted = model(x)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), wanted)
    save_model(model, str(tmp_path / "model.safetensors"))
    read = make().eval()
    load_model(read, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(read(x), wanted)
    # into itself: nothing changes
    unmerged = copy.deepcopy(fastlora.unmerge_adapters(copy.deepcopy(model)).state_dict())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(t, unmerged[n]) for n, t in fastlora.unmerge_adapters(model).state_dict().items())
    fastlora.merge_adapters(model)
    # into an adapted one: its own update does not come on top
    other = randomize_adapters(fastlora.apply_lora(other, rank=2, **settings), seed=3)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), wanted)


def test_a_plain_file_under_a_trained_update_is_told() -> None:
    """A file has no mark that says whether its weights hold an update."""
    model = fastlora.merge_adapters(randomize_adapters(fastlora.apply_lora(mlp(), rank=2)))
    other = randomize_adapters(fastlora.apply_lora(mlp(), rank=2))
    with pytest.warns(UserWarning, match="counts twice"):
        other.load_state_dict(dict(model.state_dict()))


def test_merged_and_several_adapters_load_themselves() -> None:
    model = fastlora.add_adapter(randomize_adapters(fastlora.apply_lora(mlp(), rank=2)), "second", rank=3)
    fastlora.merge_adapters(model)
    model.load_state_dict(model.state_dict())
    assert fastlora.adapter_names(model) == ["default", "second"]
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(torch.ones(2, 12)), model(torch.ones(2, 12)))


def test_dora_around_a_layer_takes_the_norms_of_the_weight_that_is_loaded() -> None:
    plain, layer = nn.Linear(6, 4), fastlora.LoRALayer(nn.Linear(6, 4), rank=2, dora=True)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(torch.ones(2, 6)), plain(torch.ones(2, 6)))


def test_around_a_layer_the_names_are_the_plain_layers() -> None:
    layer = randomize_adapters(fastlora.LoRALayer(nn.Linear(6, 4), rank=2))
    layer.merge()
    assert list(layer.state_dict()) == ["weight", "bias"]
    plain = nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(torch.ones(6)), layer(torch.ones(6)))
