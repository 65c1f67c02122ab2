"""Training on two domains: the right sums, a classifier that comes back whole, and the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.domain.norms import DomainNorm, Standardise, use_domain
from fastlora.domain.registry import METHODS
from fastlora.domain.training.records import DomainRecord
from fastlora.transfer.finetune.predict import predict_files
from fastlora.transfer.finetune.saved import load_run
from fastlora.transfer.training import TrainSettings
from tests.cases import cases
from tests.domain_runs import Inverted, make_adapting, make_domain_trainer
from tests.finetune_models import CLASSES, write_pictures
from tests.training_runs import COUNT, Net, make_net, pictures

PLAIN = TrainSettings(epochs=2, batch_size=8, lr=0.02, precision="no", schedule="constant", warmup=0.0)
RESNET = ["--model", "resnet18", "--weights", "none", "--image-size", "32"]
SHORT = ["--epochs", "2", "--batch-size", "8", "--validation-share", "0.25"]


def net() -> Net:
    return make_net(dropout=0.0, batch_norm=False)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["adapt", *map(str, arguments)])


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("domains")
    source, target = (
        write_pictures(folder / "source", 16),
        write_pictures(folder / "target", count=10, size=30),
    )
    return ["--source", source, "--target", target]


def test_a_step_is_that_of_plain_torch(tmp_path: Path) -> None:
    settings = replace(PLAIN, max_steps=1, clip_norm=0.0, weight_decay=0.0, optimizer="sgd")
    trainer = make_domain_trainer(net(), settings, tmp_path, transform=lambda x: x)
    paired = make_adapting(net(), "dann_norm", total_steps=1).paired.train()
    paired.load_state_dict(trainer.model.state_dict())
    trainer.fit()
    source, target = (plan.batches(0)[0] for plan in (trainer._plan, trainer._target_plan))
    inputs = torch.stack([pictures()[index][0] for index in source])
    labels = torch.tensor([pictures().labels[index] for index in source])
    with use_domain(paired, "source"):
        features = paired.model.feature_extractor(inputs)
    with use_domain(paired, "target"):
        shifted = paired.model.feature_extractor(torch.stack([Inverted()(index) for index in target]))
    # λ is 0 at the first step: the domain classifier learns, the features don't learn from it
    told = paired.model.domain_classifier(torch.cat([features, shifted]).detach()).flatten()
    domains = F.binary_cross_entropy_with_logits(told, torch.tensor([0.0] * 8 + [1.0] * 8))
    (F.cross_entropy(paired.model.classifier(features), labels) + domains).backward()
    after = dict(trainer.model.named_parameters())
    for name, parameter in paired.named_parameters():
        assert parameter.grad is not None
        # Nesterov's first step is 1 + momentum times the gradient
        moved = parameter.detach() - 1.9 * settings.lr * parameter.grad
        torch.testing.assert_close(after[name].detach(), moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_classifier_comes_back_whole(method: str) -> None:
    model = net()
    adapting = make_adapting(model, method, total_steps=4, body_trains=False)
    paired = adapting.paired.eval()
    inputs = torch.stack([Inverted()(index) for index in range(COUNT)])
    expected = paired(inputs)
    adapting.restore()
    found = model.eval()(inputs)
    assert found.shape == (COUNT, len(CLASSES))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, DomainNorm | Standardise) for module in model.modules())


def test_statistics_follow_a_body_that_trains() -> None:
    norm = Standardise(torch.zeros(3), torch.ones(3), momentum=0.5).train()
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    norm(x)
    torch.testing.assert_close(norm.mean, torch.tensor([1.0, 1.0, 1.0]))
    torch.testing.assert_close(norm.eval()(x), (x - norm.mean) / norm.deviation)


def test_parts_of_a_batch_add_up(tmp_path: Path) -> None:
    states = []
    for parts in (1, 2):
        settings = replace(PLAIN, accumulation=parts)
        trainer = make_domain_trainer(
            net(), settings, tmp_path / str(parts), method="source_only", transform=lambda x: x
        )
        trainer.fit()
        states.append(dict(trainer.model.state_dict()))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_weights_of_zero_take_examples_out(tmp_path: Path) -> None:
    labels = torch.tensor(pictures().labels)
    trainer = make_domain_trainer(
        net(), PLAIN, tmp_path, method="source_only", transform=lambda x: x, weights=(labels == 0).float()
    )
    result = trainer.fit()
    # only one class counts, so it is all that is learnt
    assert result.history[-1].balanced_accuracy == 0.5
    assert bool((trainer.read().source_logits.argmax(dim=1) == 0).all())


@pytest.mark.parametrize(("select", "kept"), [("last", 4), ("negative_entropy", None)])
def test_the_epoch_is_chosen_by_what_was_asked_for(select: str, kept: int | None, tmp_path: Path) -> None:
    trainer = make_domain_trainer(net(), replace(PLAIN, epochs=4), tmp_path, select=select)
    result = trainer.fit()
    history = [record for record in result.history if isinstance(record, DomainRecord)]
    assert len(history) == 4
    assert result.best_epoch == kept or (
        kept is None
        and history[result.best_epoch - 1].negative_entropy == max(r.negative_entropy for r in history)
    )
    readings = trainer.read()
    assert readings.target_labels is not None
    right = readings.target_logits.argmax(1).eq(readings.target_labels).double().mean()
    assert history[result.best_epoch - 1].target_accuracy == pytest.approx(float(right))


def test_the_strength_follows_the_schedule(tmp_path: Path) -> None:
    trainer = make_domain_trainer(net(), PLAIN, tmp_path)
    result = trainer.fit()
    steps = PLAIN.total_steps(COUNT)
    for record in result.history:
        assert isinstance(record, DomainRecord)
        expected = torch.tanh(torch.tensor(5.0 * record.step / steps))
        assert record.strength == pytest.approx(float(expected), abs=1e-6)
        assert record.domain_accuracy is not None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mixup": 0.2}, "expected mixup=0 for domain adaptation"),
        ({"sharding": "fsdp2"}, "expected sharding='ddp'"),
        ({"batch_size": 7, "accumulation": 2}, "expected batch_size as a multiple of 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        make_domain_trainer(net(), replace(PLAIN, **changes), tmp_path)


@pytest.mark.parametrize(
    "how",
    cases(
        [
            ["--method", "dann_norm", "--strategy", "lora", "--rank", "2", "--weighting", "importance"],
        ],
        [
            ["--method", "mmd", "--cache-features", "--strategy", "feature_extraction"],
            ["--method", "cdan_e", "--strategy", "gradual", "--separate-batch-norm"],
        ],
    ),
)
def test_a_run_is_written_whole_and_resumes(how: list[str], domains: list[object], tmp_path: Path) -> None:
    arguments = [*domains, *RESNET, *SHORT, *how, "--output", tmp_path]
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["target"]["last"]["epoch"] == 2
    assert report["pictures"] == {"train": 24, "validation": 8, "test": 0, "target": 20}
    answers = predict_files(load_run(tmp_path), [Path(str(domains[3]))])
    right = [answer["classes"][0][0] in Path(answer["path"]).parts for answer in answers]
    assert report["accuracy"] == pytest.approx(sum(right) / len(right))
    assert report["accuracy"] == report["target"]["kept"]["accuracy"]
    page = (tmp_path / "report.html").read_text()
    for text in ("Features before and after", "oracle", "proxy A-distance", "Recall"):
        assert text in page
    assert "{{" not in page
    weights = next(tmp_path.glob("**/*model.safetensors"))
    before = load_file(weights)
    assert invoke(*arguments, "--resume").exit_code == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(weights).items())
    refused = invoke(*arguments, "--resume", "--strength", "0.5")
    assert refused.exit_code == 2
    assert "strength was 1.0, is 0.5 now" in refused.stderr


@pytest.mark.full
def test_two_processes_learn_what_one_does(domains: list[object], tmp_path: Path) -> None:
    arguments = [*domains, *RESNET, *SHORT, "--method", "source_only", "--strategy", "feature_extraction"]
    arguments += ["--precision", "no", "--select", "last", "--output"]
    assert invoke(*arguments, tmp_path / "one").exit_code == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastlora.cli"]
    done = subprocess.run(
        [sys.executable, *command, "adapt", *map(str, arguments), str(tmp_path / "two"), "--json"],
        check=True,
        capture_output=True,
    )
    # the second process is silent
    assert json.loads(done.stdout)["steps"] == 6
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_target_without_labels_has_no_oracle(domains: list[object], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for number, picture in enumerate(Path(str(domains[3])).glob("*/*.png")):
        (bare / f"{number}.png").write_bytes(picture.read_bytes())
    arguments = [*domains[:2], "--target", bare, *RESNET, *SHORT, "--strategy", "feature_extraction"]
    result = invoke(*arguments, "--output", tmp_path / "run", "--json")
    report = json.loads(result.stdout)
    assert report["target"] is None
    assert report["evaluated_on"] == "validation"
    assert {epoch["target_accuracy"] for epoch in report["epochs"]} == {None}
    config = tmp_path / "run" / "config.toml"
    again = invoke("--config", config, "--output", tmp_path / "again", "--json")
    assert [e["dev"] for e in json.loads(again.stdout)["epochs"]] == [e["dev"] for e in report["epochs"]]


def test_both_domains_are_lists_with_columns_of_other_names(domains: list[object], tmp_path: Path) -> None:
    lists = []
    for name, folder in zip(
        ("source", "target"), (Path(str(domains[1])), Path(str(domains[3]))), strict=True
    ):
        lines = [f"{path},{path.parent.name}" for path in sorted(folder.glob("*/*.png"))]
        lists.append(tmp_path / f"{name}.csv")
        lists[-1].write_text("\n".join(["photo,kind", *lines]))
    columns = ["--image-column", "photo", "--label-column", "kind", "--cache-features"]
    arguments = ["--source", lists[0], "--target", lists[1], *columns, *RESNET, *SHORT]
    result = invoke(*arguments, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["evaluation"]["pictures"] == 20


def test_bad_input_is_told_in_one_line(domains: list[object], tmp_path: Path) -> None:
    other = write_pictures(tmp_path / "other", classes=("dark", "new"))
    (tmp_path / "empty").mkdir()
    cases = [
        ([*domains, "--method", "dan"], "did you mean 'dann'"),
        ([*domains, "--select", "oracle"], "oracle"),
        ([*domains, "--strength", "0"], "expected --strength above 0"),
        ([*domains, "--validation-share", "0.1"], "got 4 and 20; hold more out"),
        ([*domains[:2], "--target", other], "expected only classes that training has (dark, light), got new"),
        ([*domains[:2], "--target", tmp_path / "empty"], "found none"),
        ([*domains[:2], "--target", tmp_path / "nowhere"], "nowhere"),
    ]
    for arguments, told in cases:
        result = invoke(*arguments, *RESNET, "--output", tmp_path / "run")
        assert result.exit_code == 2, result.output
        assert told in result.stderr
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_model_without_a_linear_classifier_is_refused(domains: list[object], tmp_path: Path) -> None:
    result = invoke(*domains, "--model", "squeezenet1_0", "--weights", "none", "--output", tmp_path)
    assert result.exit_code == 2
    assert "expected a model with a linear classifier" in result.stderr
