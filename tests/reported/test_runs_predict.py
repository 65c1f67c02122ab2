"""``fastlora predict``: what can't be read costs no other answer, and what is written is safe to open."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from fastlora._core.files import safe_cell
from fastlora.transfer.finetune import load_run
from fastlora.transfer.finetune.predict import predict_files
from tests.finetune_models import write_pictures
from tests.run_folders import PROBE, invoke, refused


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, two of them damaged, and a run whose classes are no plain words."""
    folder = tmp_path_factory.mktemp("predict")
    write_pictures(folder / "pictures", count=5, classes=("=1+1", "-0.5"))
    run = invoke("finetune", folder / "pictures", *PROBE, "--epochs", 1, "--output", folder / "run")
    assert run.exit_code == 0, run.output
    new = folder / "new"
    new.mkdir()
    for index, picture in enumerate(sorted(folder.glob("pictures/*/*.png"))):
        shutil.copy(picture, new / f"{index:02}.png")
    (new / "03.png").write_bytes(b"")
    (new / "07.png").write_bytes((new / "06.png").read_bytes()[:200])
    return folder


def test_damaged_pictures_are_listed_and_the_others_answered(place: Path) -> None:
    result = invoke("predict", place / "run", place / "new", "--format", "json", "--batch-size", 3)
    assert result.exit_code == 1
    assert "error: 2 of 10 pictures have no answer: " in result.stderr
    answers = json.loads(result.stdout)
    assert [Path(answer["path"]).name for answer in answers] == [f"{index:02}.png" for index in range(10)]
    unread = [index for index, answer in enumerate(answers) if answer["error"] is not None]
    assert unread == [3, 7]
    assert all(bool(answer["classes"]) is (answer["error"] is None) for answer in answers)
    assert "cannot identify image file" in answers[3]["error"]


def test_damaged_pictures_change_no_other_answer(place: Path) -> None:
    run = load_run(place / "run")
    good = [path for path in sorted((place / "new").iterdir()) if path.stem not in ("03", "07")]
    expected = predict_files(run, good, top=2, batch_size=8)
    found = predict_files(run, [place / "new"], top=2, batch_size=4, workers=1)
    for ours, theirs in zip([each for each in found if each["error"] is None], expected, strict=True):
        assert ours["path"] == theirs["path"]
        assert dict(ours["classes"]) == pytest.approx(dict(theirs["classes"]), abs=1e-5)


def test_csv_is_no_formula_and_has_a_column_for_errors(place: Path, tmp_path: Path) -> None:
    for name in ("@a.png", "+b.png", "\tc.png", "d.png"):
        shutil.copy(place / "new" / "00.png", tmp_path / name)
    folder = os.getcwd()
    try:
        os.chdir(tmp_path)
        printed = invoke(
            "predict", place / "run", "@a.png", "+b.png", "\tc.png", "d.png", "--format", "csv"
        ).stdout
    finally:
        os.chdir(folder)
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["path"] for row in rows] == ["'@a.png", "'+b.png", "'\tc.png", "d.png"]
    # "-0.5" is a number, and stays one
    assert {row["class"] for row in rows} <= {"'=1+1", "-0.5"}
    assert all(float(row["probability"]) >= 0.5 for row in rows)
    assert {row["error"] for row in rows} == {""}


@pytest.mark.parametrize("text", ["=A1", "+1 and", "-cmd", "@x", "\t1", "\r=", "\n=", "-", "=-1"])
def test_cells_that_begin_a_formula_are_quoted(text: str) -> None:
    assert safe_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-1", "+0.5", "-1e-3", "cat", "a=b", "", "'=A1"])
def test_other_cells_stay(text: str) -> None:
    assert safe_cell(text) == text


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_answers_go_into_a_file(place: Path, tmp_path: Path, form: str) -> None:
    picture, file = place / "new" / "00.png", tmp_path / "answers"
    result = invoke("predict", place / "run", picture, "--format", form, "--output", file)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "00.png" in file.read_text().replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]


def test_a_file_that_can_not_be_written_is_told_before_the_work(place: Path, tmp_path: Path) -> None:
    typed = ["predict", "nowhere", place / "new", "--output"]
    refused(*typed, tmp_path, told="expected a file to write, got the folder")
    refused(*typed, tmp_path / "no" / "answers.csv", told="make it first")
    (tmp_path / "file").touch()
    refused(*typed, tmp_path / "file" / "answers.csv", told="got the file")
    refused(*typed, "", told="expected a value for --output, got an empty text")


def test_names_that_are_no_utf8_are_printed_as_escapes(place: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        Path(os.fsdecode(name)).write_bytes((place / "new" / "00.png").read_bytes())
    except OSError:
        # some file systems have no such names
        return
    for form in ("csv", "table", "json"):
        result = invoke("predict", place / "run", tmp_path, "--format", form)
        assert (result.exit_code, "udcff.png" in result.stdout.replace("\n", "")) == (0, True), result.output


def test_scores_that_are_not_finite_are_no_answer(place: Path) -> None:
    run = load_run(place / "run")
    run.model.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    (answer,) = predict_files(run, [place / "new" / "00.png"])
    assert answer["classes"] == []
    assert "not finite" in answer["error"]
