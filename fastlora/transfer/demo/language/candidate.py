"""A model that the demo trains: TRL's trainer, a clock, the loss of every step, perplexity and answers."""

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fastlora._core.memory import HeldMemory
from fastlora._core.progress import Reporter
from fastlora.transfer.demo.language.dialogues import Dialogue
from fastlora.transfer.demo.language.recipe import Recipe
from fastlora.transfer.demo.language.turns import Turns

IGNORED = -100
# of an answer; the dialogues' own are shorter
_ANSWER_TOKENS = 40
# the first step makes the optimiser's state, the profiler slows the second
_MEASURED_STEP, WARM_UP_STEPS = 2, 2


class Watch(TrainerCallback):
    """Times every step, keeps its loss, tells of it, and measures one step's memory.

    Args:
        title: Name for readers.
        steps: How many there will be.
        device: Where the model is.
        reporter: Is told of every step.
        turns: Other trainings to take turns with; None for none.
        number: Which of the turns is this training's.

    Attributes:
        title: Name for readers.
        losses: The loss of each step so far, in nats.
        seconds: How long each of these steps took, without what comes between them.
        held: What the tensors of a step held.
        measuring: Open while that is measured; left by whatever stops the training.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        device: torch.device,
        reporter: Reporter,
        turns: Turns | None = None,
        number: int = 0,
    ) -> None:
        """See the class."""
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.held = HeldMemory(device)
        self.measuring = contextlib.ExitStack()
        self.title, self._steps, self._device, self._reporter = title, steps, device, reporter
        self._measured, self._began = min(_MEASURED_STEP, steps), 0.0
        self._turns, self._number = turns, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock when it is this training's turn."""
        if self._turns is not None:
            self._turns.take(self._number)
        if state.global_step + 1 == self._measured:
            self.measuring.enter_context(self.held)
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(self._now() - self._began)
        if state.global_step == self._measured:
            self.measuring.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the step's loss, tell of it, and leave the turn: every step is logged, after its end."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))
            memory = self.held.bytes or None
            self._reporter.advance(self.title, state.global_step, self._steps, self.losses[-1], memory)
            if self._turns is not None:
                self._turns.give()

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Candidate:
    """A PEFT model, accelerated or not, in TRL's ``SFTTrainer``.

    Dialogues are packed into rows; transformers keeps attention inside each, by positions that begin anew.
    The loss is of the answers alone.

    Attributes:
        trainer: TRL's trainer, with the training and the test rows.
        watch: What was noted while it trained.
        reporter: Is told about the progress.
    """

    trainer: Any
    watch: Watch
    reporter: Reporter

    @torch.no_grad()
    def perplexity(self, when: str) -> float:
        """Of the answers of the test dialogues, each given its question.

        Args:
            when: Before or after the training, for who reads the progress.
        """
        model, rows = self.trainer.model.eval(), self.trainer.get_eval_dataloader()
        summed, count = 0.0, 0
        for number, batch in enumerate(rows, 1):
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            losses = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            summed, count = summed + losses.item(), count + int((labels != IGNORED).sum())
            self.reporter.advance(f"{self.watch.title}: test {when}", number, len(rows), summed / count)
        return math.exp(summed / count)

    def answers(self, questions: Sequence[str], when: str) -> list[str]:
        """What the model says, always the likeliest word next.

        Args:
            questions: Each is the beginning of a dialogue.
            when: Before or after the training, for who reads the progress.
        """
        said = list[str]()
        for question in questions:
            said.append(self._answer(question))
            self.reporter.advance(f"{self.watch.title}: answers {when}", len(said), len(questions), None)
        return said

    @torch.no_grad()
    def _answer(self, question: str) -> str:
        model, tokenizer = self.trainer.model.eval(), self.trainer.processing_class
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        said = model.generate(
            **asked,
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )
        text: str = tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()

    def train(self) -> dict[str, Any]:
        """Train, and say what was measured on the way."""
        with self.watch.measuring:
            self.trainer.train()
        seconds = self.watch.seconds
        return {
            "steps": len(seconds),
            "losses": self.watch.losses,
            "step_seconds": seconds,
            "median_step_seconds": statistics.median(seconds[WARM_UP_STEPS:] or seconds),
            "seconds": sum(seconds),
            "peak_memory_bytes": self.watch.held.bytes,
        }


def begin(
    watch: Watch,
    model: Any,
    tokenizer: Any,
    parts: tuple[Sequence[Dialogue], Sequence[Dialogue]],
    recipe: Recipe,
    folder: Path,
    reporter: Reporter,
) -> Candidate:
    """Make a trainer for a model.

    Args:
        watch: Times the steps.
        model: A PEFT model of transformers.
        tokenizer: The model's tokenizer, with a chat template.
        parts: Training and test dialogues.
        recipe: How to train.
        folder: For what the trainer writes.
        reporter: Is told of every step.
    """
    train, test = (Dataset.from_list([_as_chat(dialogue) for dialogue in part]) for part in parts)
    trainer = SFTTrainer(
        model,
        _settings(recipe, folder, model.device.type),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    # prints every step; ours tells the reporter
    trainer.remove_callback(PrinterCallback)
    return Candidate(trainer, watch, reporter)


def _settings(recipe: Recipe, folder: Path, device: str) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        packing=True,
        max_length=recipe.tokens,
        completion_only_loss=True,
        gradient_checkpointing=False,
        # the frozen weights have their dtype already
        bf16=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
    )


def _as_chat(dialogue: Dialogue) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": dialogue.question}],
        "completion": [{"role": "assistant", "content": dialogue.answer}],
    }
