"""``fastlora demo`` on dialogues, from end to end with a tiny model."""

import json
import logging
import math
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.cli._progress import LiveReporter
from fastlora.transfer.demo.language import run as language_run
from fastlora.transfer.demo.language.candidate import IGNORED
from fastlora.transfer.demo.language.dialogues import (
    corpus_folder,
    load_dialogues,
    split_dialogues,
)
from fastlora.transfer.models import smollm2
from tests.cases import cases
from tests.chat_models import save_tiny
from tests.demo_runs import handlers
from tests.language_runs import STEPS, WIDE, LanguageRun, fused_layers, language_demo

# of the real model, which is patched away below
_SAVE_DENSE = smollm2.save_dense


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    """A model of 64 wide in float32 in the place of SmolLM2, on one thread, whatever is installed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "save_dense", save_tiny)
        patch.setattr(language_run, "native_precision", lambda: "no")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the weights, which no extra installs, as if it were there."""
    monkeypatch.setattr(smollm2, "check_installed", lambda: None)


@pytest.fixture(scope="module", params=cases([None], ["nf4"]))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageRun:
    folder = tmp_path_factory.mktemp("language") / "new" / "folder"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "of_before.bin").write_bytes(b"of an earlier run")
    return language_demo(folder, request.param)


def test_files_and_nothing_else(run: LanguageRun) -> None:
    assert {path.name for path in run.folder.iterdir()} == {
        "report.json",
        "report.html",
        "losses.png",
        "adapter",
    }
    saved = {path.name for path in (run.folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert "of_before.bin" not in saved
    with Image.open(run.folder / "losses.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or ()) > 50


def test_report_says_what_ran(run: LanguageRun) -> None:
    report = run.report
    assert report["quantised"] == run.quantised
    assert report["model"] == f"SmolLM2-135M-Instruct, {run.quantised or 'dense'} weights"
    assert (report["recipe"]["seed"], report["recipe"]["steps"]) == (3, STEPS)
    assert report["licence"] == "BSD"
    assert sum(report["dialogues"].values()) == len(load_dialogues(corpus_folder()))
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["versions"]["trl"]
    assert [method["title"] for method in report["methods"]] == ["PEFT", "PEFT, accelerated"]
    for method in report["methods"]:
        assert method["steps"] == len(method["losses"]) == len(method["step_seconds"]) == STEPS
        assert method["seconds"] == pytest.approx(sum(method["step_seconds"]))
        assert method["median_step_seconds"] == method["step_seconds"][-1]
        # r = 16 on seven layers of each of two blocks, 64, 32 and 128 wide
        assert method["trainable_parameters"] == 2 * 16 * (2 * 128 + 2 * 96 + 3 * 192)
        assert method["peak_memory_bytes"] > 512 * 258 * 4
    seconds = [method["median_step_seconds"] for method in report["methods"]]
    assert report["peft_over_accelerated"] == pytest.approx(seconds[0] / seconds[1])


def test_both_curves_are_the_same_and_training_changes_the_model(run: LanguageRun) -> None:
    own, ours = run.report["methods"]
    # of weights of 4 bits TRL keeps A and B in bfloat16, and each rounds elsewhere
    tolerance = 1e-5 if run.quantised is None else 2e-3
    assert ours["losses"] == pytest.approx(own["losses"], abs=tolerance)
    assert run.report["largest_loss_difference"] <= tolerance
    assert ours["perplexity"] == pytest.approx(own["perplexity"], rel=tolerance)
    assert len(set(own["losses"])) == STEPS
    assert ours["perplexity"] < run.report["perplexity_before"]


def test_the_second_alone_is_accelerated(run: LanguageRun) -> None:
    assert list(map(fused_layers, run.trainers)) == [0, 2 * 7]


def test_a_dialogue_of_a_training_row_is_as_it_is_alone(run: LanguageRun) -> None:
    # of weights of 4 bits TRL keeps A and B in bfloat16
    tolerance = 1e-4 if run.quantised is None else 2e-3
    for trainer in run.trainers:
        model = trainer.model.train()
        row = next(row for row in trainer.train_dataset if len(row["seq_lengths"]) > 2)
        batch = trainer.data_collator([row])
        labels, logits = batch.pop("labels")[0], model(**batch).logits[0]
        pieces = [words.split(row["seq_lengths"]) for words in (batch["input_ids"][0], labels, logits)]
        for words, label, packed in zip(*pieces, strict=True):
            alone = model(input_ids=words[None]).logits[0]
            torch.testing.assert_close(packed, alone, rtol=0, atol=tolerance)
            # the dialogue before foretells no word of it
            assert label[0] == IGNORED


def test_the_adapter_is_what_was_measured(run: LanguageRun, tmp_path: Path) -> None:
    tensors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert all(tensors[name].any() for name in tensors if "lora_B" in name)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == smollm2.HUB_NAME
    save_tiny(tmp_path)
    base = smollm2.load_causal(tmp_path, quantised=run.quantised)
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    # TRL packs dialogues into rows; here every one stands alone
    alone = _perplexity(model, AutoTokenizer.from_pretrained(tmp_path))
    expected = run.report["methods"][1]["perplexity"]
    assert alone == pytest.approx(expected, rel=1e-5 if run.quantised is None else 1e-2)


@torch.no_grad()
def _perplexity(model: Any, tokenizer: Any) -> float:
    test = split_dialogues(load_dialogues(corpus_folder()), test=60, seed=3)[1]
    summed, count = 0.0, 0
    for dialogue in test:
        asked = [{"role": "user", "content": dialogue.question}]
        said = [*asked, {"role": "assistant", "content": dialogue.answer}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(said, tokenize=False)
        begin = len(tokenizer(prompt)["input_ids"])
        # a row is 512 tokens long
        words = torch.tensor([tokenizer(text)["input_ids"][:512]])
        logits = model(input_ids=words).logits[0, begin - 1 : -1].float()
        summed += functional.cross_entropy(logits, words[0, begin:], reduction="sum").item()
        count += words.shape[1] - begin
    return math.exp(summed / count)


def test_the_page_shows_it_all(run: LanguageRun) -> None:
    page = (run.folder / "report.html").read_text()
    report = run.report
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert f"<b>{report['peft_over_accelerated']:.2f}×</b>" in page
    assert ('quantised="nf4"' in page) == (run.quantised == "nf4")
    assert "first two steps are left out" in page
    for number in (report["perplexity_before"], *(m["perplexity"] for m in report["methods"])):
        assert f"<td>{number:.2f}</td>" in page


def test_answers_are_of_held_out_questions(run: LanguageRun) -> None:
    test = split_dialogues(load_dialogues(corpus_folder()), test=60, seed=3)[1]
    answers = run.report["answers"]
    assert [(entry["question"], entry["answer"]) for entry in answers] == [
        (dialogue.question, dialogue.answer) for dialogue in test[:3]
    ]
    assert all({"before", "PEFT", "PEFT, accelerated"} <= entry.keys() for entry in answers)


def test_what_is_printed_and_told(run: LanguageRun) -> None:
    report = run.report
    for text in (
        "Licence: BSD",
        "PEFT, accelerated",
        "Test perplexity",
        f"{report['perplexity_before']:.2f}",
        f"{report['peft_over_accelerated']:.2f}x",
        f"Wrote report.html, report.json, losses.png, adapter/ to {run.folder}",
        f"Asked: {report['answers'][0]['question']}",
    ):
        assert text in run.stdout
    assert run.stderr == ""
    # a training logs its step before the other's begins
    titles = ("PEFT", "PEFT, accelerated")
    steps = [(task, done, total) for task, done, total in run.told if task in titles]
    assert steps == [(title, step, STEPS) for step in (1, 2, 3) for title in titles]
    tasks = list(dict.fromkeys(task for task, _, _ in run.told))
    assert tasks == [
        "PEFT, accelerated: test before",
        "PEFT, accelerated: answers before",
        "PEFT",
        "PEFT, accelerated",
        "PEFT: test after",
        "PEFT, accelerated: test after",
        "PEFT: answers after",
        "PEFT, accelerated: answers after",
    ]


@pytest.mark.full
def test_two_steps_in_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The dtype of most machines; too few steps for a ratio of their seconds."""
    monkeypatch.setattr(smollm2, "check_installed", lambda: None)
    monkeypatch.setattr(language_run, "native_precision", lambda: "bf16")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--max-steps", "2"], env=WIDE)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "demo-output" / "dialogues"
    report = json.loads((folder / "report.json").read_text())
    assert report["precision"] == "bf16"
    own, ours = report["methods"]
    # a value near 1 rounds to bfloat16 by 2⁻⁹ at most; the two round at other places
    assert ours["losses"] == pytest.approx(own["losses"], abs=2**-9)
    assert ours["perplexity"] == pytest.approx(own["perplexity"], rel=2**-9)
    assert ours["perplexity"] < report["perplexity_before"] * (1 - 2**-7)
    assert report["peft_over_accelerated"] is None
    page = (folder / "report.html").read_text()
    assert "over ours" not in page
    assert "compare nothing" in page
    assert "PEFT takes" not in result.stdout


@pytest.mark.usefixtures("_packages")
# by default test_demo_stopped interrupts a demo
@pytest.mark.full
def test_an_interrupted_demo_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(
        self: LiveReporter, task: str, done: int, total: int, loss: float | None, memory: int | None = None
    ) -> None:
        if (task, done) == ("PEFT", 1):
            os.kill(os.getpid(), signal.SIGINT)

    output, temporary, before = tmp_path / "output", tmp_path / "temporary", handlers()
    temporary.mkdir()
    level = logging.getLogger("transformers").level
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(LiveReporter, "advance", interrupted)
    result = CliRunner().invoke(app, ["demo", "--output", str(output), "--max-steps", "2"])
    assert result.exit_code == 128 + signal.SIGINT
    assert handlers() == before
    assert list(temporary.iterdir()) == list(output.iterdir()) == []
    assert logging.getLogger("transformers").level == level


@pytest.mark.full
def test_the_packaged_model_answers(tmp_path: Path) -> None:
    _SAVE_DENSE(tmp_path)
    model, tokenizer = smollm2.load_causal(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    asked: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said: Any = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, asked["input_ids"].shape[1] :])
