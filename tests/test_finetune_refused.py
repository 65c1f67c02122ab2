"""What ``fastlora finetune`` refuses: options, pictures, files and weights that don't fit, in one line."""

import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from tests.finetune_models import write_pictures
from tests.finetune_runs import RESNET, SHORT, finetuned, invoke, report_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "resnte18"], r"did you mean 'resnet18'"),
        (["--strategy", "loar"], r"did you mean 'lora'\?"),
        (["--strategy", "full", "--rank", "4"], r"expected no --rank for --strategy full"),
        (["--strategy", "lora", "--cache-features"], r"only frozen features stay the same"),
        (["--strategy", "lp_ft", "--epochs", "1"], r"expected --epochs >= 2 for lp_ft"),
        (["--validation-share", "1.5"], r"expected --validation-share between 0 and 1, got 1.5"),
        (["--batch-size", "0"], r"expected --batch-size as an integer of at least 1, got 0"),
        (["--validation", "nowhere"], r"found nothing at nowhere"),
        (["--config", "nowhere.toml"], r"expected a TOML file at nowhere.toml"),
    ],
)
def test_bad_input_is_told_in_one_line(data: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    given = [data, *RESNET, "--output", tmp_path / "run", *arguments]
    result = invoke(*given)
    assert result.exit_code == 2
    assert re.search(told, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert not list((tmp_path / "run").glob("*"))


def test_bad_pictures_are_told(data: Path, tmp_path: Path) -> None:
    one = write_pictures(tmp_path / "one", classes=("only",))
    result = invoke(one, *RESNET, "--output", tmp_path / "run")
    assert (result.exit_code, "two classes" in result.stderr) == (2, True), result.stderr
    (tmp_path / "empty").mkdir()
    result = invoke(tmp_path / "empty", *RESNET, "--output", tmp_path / "run")
    assert (result.exit_code, "empty" in result.stderr) == (2, True), result.stderr
    other = write_pictures(tmp_path / "other", classes=("dark", "light", "new"))
    result = invoke(data, *RESNET, "--test", other, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "expected only classes that training has (dark, light), got new" in result.stderr
    broken = write_pictures(tmp_path / "broken")
    (broken / "dark" / "00.png").write_bytes(b"no picture")
    result = invoke(broken, *RESNET, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "dark/00.png" in result.stderr
    arguments = [*RESNET, *SHORT, "--on-corrupt", "skip", "--strategy", "feature_extraction"]
    finetuned(broken, *arguments, "--output", tmp_path / "skipped")
    assert sum(report_of(tmp_path / "skipped")["pictures"].values()) == 23


def test_weights_that_cannot_be_fetched_are_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: object, **more: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    result = invoke(data, "--model", "resnet18", "--output", tmp_path / "run")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "the weights of resnet18 could not be downloaded" in result.stderr


def test_a_config_with_an_unknown_name_is_refused(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('stratgy = "lora"\n')
    result = invoke(data, "--config", config)
    assert result.exit_code == 2
    assert "did you mean 'strategy'?" in result.stderr
    config.write_text("strategy = lora\n")
    assert "expected TOML" in invoke(data, "--config", config).stderr


def test_weights_of_another_architecture_are_refused(data: Path, tmp_path: Path) -> None:
    from torchvision.models import resnet34

    torch.save(resnet34().state_dict(), tmp_path / "weights.pt")
    weights = ["--weights", tmp_path / "weights.pt"]
    result = invoke(data, "--model", "resnet18", *weights, "--image-size", 32, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "weights.pt" in result.stderr
