"""Whole training steps (forward, backward, AdamW): PEFT, the same model accelerated, both compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from benchmarks import peft_steps
from benchmarks.marks import parameters
from benchmarks.measuring import peaks, time_in_turns
from benchmarks.shapes import step_cases
from fastlora._core.extras import require
from fastlora.bench.candidates import DTYPES, TOLERANCE
from fastlora.bench.cases import Case
from fastlora.bench.checked import BOUNDS, checked, without
from fastlora.bench.results_file import Record
from fastlora.bench.turns import Step


def tiny_bert() -> peft_steps.Case:
    """Two layers of BERT, hidden 256, on 8 texts of 64 tokens; random weights, which make no difference."""
    transformers = require("transformers", distribution="transformers", purpose="BERT", extra="bench")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024
    )
    model = transformers.BertForSequenceClassification(config)
    words = torch.randint(1000, 30000, (8, 64))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return peft_steps.Case(model, batch, "bert.embeddings")


def tiny_vit() -> peft_steps.Case:
    """ViT-Ti/16 with four of its twelve layers on 8 pictures of 112 pixels; random weights."""
    timm = require("timm", distribution="timm", purpose="ViT-Ti", extra="bench")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, num_classes=2, depth=4)
    return peft_steps.Case(model, {"x": torch.randn(8, 3, 112, 112)}, "patch_embed")


MODELS: dict[str, Callable[[], peft_steps.Case]] = {
    "BERT-tiny": tiny_bert,
    "ViT-Ti": tiny_vit,
    "MiniLM": peft_steps.minilm,
    "DINOv2-S": peft_steps.dinov2,
}


@pytest.mark.parametrize("case", parameters(step_cases()))
def bench_step(case: Case, benchmark: Any, record: Record) -> None:
    """One row. The check compares the third step's logits, so that what was learnt before counts too."""
    plain = case.without_dropout()
    learnt = {name: _third(step) for name, step in _steps(plain, _model(case, own_dropout=False)).items()}
    _, left_out = checked(learnt, TOLERANCE[case.dtype])
    model = _model(case)
    steps = without(_steps(case, model), left_out)
    timed = time_in_turns(benchmark, case, steps, rounds=9 if case.device == "cpu" else 30)
    kept = peft_steps.kept_bytes(model, DTYPES[case.dtype], _variant(case))
    peak = peaks(case, without(steps, BOUNDS))
    record(case, timed | {"kept_bytes": kept, "peak_bytes": peak}, left_out=left_out)


def _model(case: Case, *, own_dropout: bool = True) -> peft_steps.Case:
    made, device = MODELS[case.name](), torch.device(case.device)
    for module in made.model.modules():
        if isinstance(module, nn.Dropout) and not own_dropout:
            module.p = 0.0
    batch = {name: tensor.to(device) for name, tensor in made.batch.items()}
    return dataclasses.replace(made, model=made.model.to(device), batch=batch)


def _variant(case: Case) -> peft_steps.Variant:
    return peft_steps.Variant(dropout=case.dropout)


def _steps(case: Case, model: peft_steps.Case) -> dict[str, Step]:
    """Those of ``peft_steps``, on a GPU with both compiled, and fastlora's model on the eager formula."""
    dtype, variant = DTYPES[case.dtype], _variant(case)
    torch._dynamo.reset()
    eager = peft_steps.steps(model, dtype, variant, compiled=False)["fastlora"]

    def reference() -> tuple[Tensor, ...]:
        with fastlora.use_backend("reference"):
            return eager()

    return peft_steps.steps(model, dtype, variant, compiled=case.device == "cuda") | {"reference": reference}


def _third(step: Step) -> Step:
    def steps() -> tuple[Tensor, ...]:
        step()
        step()
        return step()

    return steps
