"""PEFT's model and the same one accelerated: trained in turns, tested, asked."""

import contextlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from fastlora._core.files import aside, remove_folder, settle
from fastlora._core.progress import Reporter
from fastlora.interop.peft import accelerate
from fastlora.parameters import parameter_report
from fastlora.transfer.demo.language.candidate import WARM_UP_STEPS, Candidate, Watch, begin
from fastlora.transfer.demo.language.dialogues import Dialogue
from fastlora.transfer.demo.language.recipe import Recipe
from fastlora.transfer.demo.language.turns import Turns, train_in_turns
from fastlora.transfer.models import smollm2
from fastlora.transfer.training.device import best_device

TITLES = ("PEFT", "PEFT, accelerated")
ADAPTER = "adapter"


@dataclass(frozen=True)
class Comparison:
    """What both models share.

    Attributes:
        folder: For the dense model and what the trainers write; is emptied by whoever made it.
        parts: Training and test dialogues.
        recipe: How to train.
        quantised: ``"nf4"`` for weights of 4 bits, None for dense ones.
        dtype: What dense weights and all activations are in.
        reporter: Is told about the progress.
    """

    folder: Path
    parts: tuple[list[Dialogue], list[Dialogue]]
    recipe: Recipe
    quantised: str | None
    dtype: torch.dtype
    reporter: Reporter

    def run(self, output: Path) -> dict[str, Any]:
        """Train both and write the accelerated model's adapter into ``adapter/``.

        Args:
            output: Folder for it.

        Returns:
            What ``report.json`` says of both.
        """
        self.reporter.note("Reading SmolLM2-135M-Instruct out of its package")
        # one of its bars can't be switched off
        with contextlib.redirect_stderr(io.StringIO()):
            smollm2.save_dense(self.folder)
        turns = Turns(len(TITLES))
        own, accelerated = (self._begin(turns, number) for number in range(len(TITLES)))
        answers: list[dict[str, str]] = [asdict(each) for each in self.parts[1][: self.recipe.asked]]
        # B is zero: what the two begin with is the same model. The accelerated one is asked, because after an
        # evaluation pass bitsandbytes loses gradients on some CPUs, which only accelerating prevents
        before = accelerated.perplexity("before")
        _ask(accelerated, answers, "before", key="before")
        trained = train_in_turns(turns, [own.train, accelerated.train])
        methods = [record | _tested(each) for record, each in zip(trained, (own, accelerated), strict=True)]
        for candidate in (own, accelerated):
            _ask(candidate, answers, "after", key=candidate.watch.title)
        return {
            "perplexity_before": before,
            "answers": answers,
            "methods": methods,
            **_compared(*methods),
            **_save(accelerated, output / ADAPTER),
        }

    def _begin(self, turns: Turns, number: int) -> Candidate:
        model = smollm2.load_causal(
            self.folder, quantised=self.quantised, dtype=self.dtype, device=str(best_device())
        )
        config = LoraConfig(
            r=self.recipe.rank,
            lora_alpha=self.recipe.alpha,
            # PEFT and fastlora would draw different masks
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        # what PEFT writes down as the base; the folder is gone soon
        model.name_or_path = model.config._name_or_path = smollm2.HUB_NAME
        torch.manual_seed(self.recipe.seed)
        model = get_peft_model(model, config)
        if number == TITLES.index("PEFT, accelerated"):
            model = accelerate(model)
        watch = Watch(TITLES[number], self.recipe.steps, model.device, self.reporter, turns, number)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return begin(watch, model, tokenizer, self.parts, self.recipe, self.folder / "trainer", self.reporter)


def _tested(candidate: Candidate) -> dict[str, Any]:
    parameters = parameter_report(candidate.trainer.model)
    return {
        "title": candidate.watch.title,
        "perplexity": candidate.perplexity("after"),
        "trainable_parameters": parameters.trainable_parameters,
        "total_parameters": parameters.total_parameters,
        "trainable_percent": parameters.trainable_percent,
    }


def _ask(candidate: Candidate, answers: list[dict[str, str]], when: str, *, key: str) -> None:
    said = candidate.answers([entry["question"] for entry in answers], when)
    for entry, text in zip(answers, said, strict=True):
        entry[key] = text


def _compared(own: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | None]:
    apart = [abs(one - other) for one, other in zip(own["losses"], ours["losses"], strict=True)]
    # what such steps take is not what a step takes
    warm = ours["steps"] > WARM_UP_STEPS
    return {
        "peft_over_accelerated": own["median_step_seconds"] / ours["median_step_seconds"] if warm else None,
        "largest_loss_difference": max(apart),
    }


def _save(candidate: Candidate, folder: Path) -> dict[str, Any]:
    with aside(folder) as new:
        # PEFT would ask the hub whether the embeddings are still the base's
        candidate.trainer.model.save_pretrained(new, save_embedding_layers=False)
        remove_folder(folder)
        new.replace(folder)
    settle(folder.parent)
    size = (folder / "adapter_model.safetensors").stat().st_size
    return {"adapter_folder": folder.name, "adapter_bytes": size}
