"""What commands say of options that make no sense: in the words of options, in one line, exit code 2."""

from pathlib import Path

import pytest
import torch

from fastlora._core.memory import check_fits
from fastlora.cli._errors import in_options
from tests.finetune_models import write_pictures
from tests.run_folders import PROBE, RESNET, refused

OPTIONS: dict[str, tuple[str, str | None]] = {
    name: (f"--{name.replace('_', '-')}", None) for name in ("batch_size", "lr", "epochs", "weights")
}
OPTIONS |= {"strategy": ("--strategy", None), "rank": ("--rank", None), "flip": ("--flip", "--no-flip")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("words") / "pictures", count=3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("expected batch_size of at least 1, got 0", "expected --batch-size of at least 1, got 0"),
        ("expected lr above 0, got nan", "expected --lr above 0, got nan"),
        ("expected epochs >= 2 for lp_ft", "expected --epochs >= 2 for lp_ft"),
        ("begun with, but epochs was 1, is 3 now", "begun with, but --epochs was 1, is 3 now"),
        ("or take random weights with weights=None", "or take random weights with --weights none"),
        ("give its path as weights, say", "give its path as --weights, say"),
        ("expected flip=False here", "expected --no-flip here"),
        ("expected no option 'rank' for strategy 'full'", "expected no --rank for --strategy full"),
        # paths and English stay
        ("expected weights of ResNet in /a/batch_size/x", "expected weights of ResNet in /a/batch_size/x"),
        ("found none at epochs.csv, lr.txt", "found none at epochs.csv, lr.txt"),
    ],
)
def test_errors_speak_of_options(text: str, told: str) -> None:
    assert in_options(text, OPTIONS) == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--hidden 999999999999", "expected --hidden of at most 65,536, got 999,999,999,999"),
        ("--image-size 100000", "expected --image-size of at most 8,192"),
        ("--batch-size 1000000000000", "expected --batch-size of at most 2,147,483,647"),
        ("--epochs 0", "expected --epochs as an integer of at least 1"),
        ("--seed 4294967296", "expected --seed from 0 to 4,294,967,295"),
        ("--workers 100000", "expected --workers from 0 to 1,024, got 100,000"),
        ("--mixup nan", "expected --mixup from 0"),
        ("--ema inf", "expected --ema from 0 to 1"),
        ("--strategy lora --rank 0", "expected --rank as an integer >= 1"),
        ("--strategy lora --rank 999999", "expected --rank of at most 65,536"),
        ("--validation-share nan", "expected --validation-share between 0 and 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_their_option(
    data: Path, tmp_path: Path, arguments: str, told: str
) -> None:
    refused("finetune", data, *RESNET, "--output", tmp_path / "run", *arguments.split(), told=told)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--strategy prompt", "expected a VisionTransformer"),
        ("--strategy adapter", "choose another strategy or model"),
        ("--lr nan --strategy full", "expected --lr to be finite, got nan"),
    ],
)
def test_what_the_model_can_not_have_is_refused(
    data: Path, tmp_path: Path, arguments: str, told: str
) -> None:
    refused("finetune", data, *RESNET, "--output", tmp_path / "run", *arguments.split(), told=told)


def test_a_size_that_the_model_can_not_take_is_refused(data: Path, tmp_path: Path) -> None:
    model = ["--model", "vit_b_16", "--weights", "none", "--image-size", 32, "--output", tmp_path / "run"]
    refused(
        "finetune", data, *model, told="expected --image-size as one that a VisionTransformer takes, got 32"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["finetune", "data", "--output", ""], "expected a value for --output, got an empty text"),
        (["finetune", "data", "--output="], "expected a value for --output, got an empty text"),
        (["demo", "--output", " "], "expected a value for --output, got an empty text"),
        (["finetune", ""], "got an empty text"),
        (["params", "resnet18", "--batch-size", "1000000000000"], "expected sizes that fit into memory"),
        (["params", "resnet18", "--batch-size", "9" * 30], "expected a smaller number for --batch-size"),
        (["plan", "--gpu", "H100", "--shape", "16x16x16", "--rank", "9" * 30], "a smaller number for --rank"),
    ],
)
def test_empty_texts_and_endless_numbers_are_refused(arguments: list[str], told: str) -> None:
    refused(*arguments, told=told)


def test_an_output_that_is_empty_in_a_config_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('output = ""\n')
    refused(
        "finetune", data, *PROBE, "--config", tmp_path / "config.toml", told="expected --output as a name"
    )


def test_what_can_not_fit_is_refused_before_it_is_tried() -> None:
    check_fits(2**20, torch.device("cpu"))
    with pytest.raises(ValueError, match="lower batch_size or image_size, or raise accumulation"):
        check_fits(2**60, torch.device("cpu"))
