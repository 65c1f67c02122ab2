"""Measured choices: found again, kept on disk, refused when they don't fit, the same on every rank."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlora.ops import tuned_file
from fastlora.ops.tuned_file import keep
from fastlora_kernels.choose import tuned
from fastlora_kernels.tile import Tile
from tests.launching import in_two_processes
from tests.tuning_models import CALL, GPU, SMALL_CARD, record

TILE = Tile(64, 64, 64, 16, 4, 3, persistent=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_pinned", {})
    return tmp_path


def find(rows: int, *, dropping: bool = False) -> tuned.Record | None:
    return tuned.find(GPU, replace(CALL.shape, m=rows), torch.float16, dropping=dropping)


def test_the_nearest_number_of_rows_within_a_factor_of_two() -> None:
    near, far = record(), record(replace(CALL, rows=120))
    tuned.pin(GPU, [far, near])
    assert find(40) is find(20) is find(60) is near
    assert find(100) is find(240) is far
    assert find(19) is find(241) is find(40, dropping=True) is None
    assert tuned.find(GPU, CALL.shape, torch.bfloat16, dropping=False) is None
    assert tuned.find(GPU, replace(CALL.shape, r=8), torch.float16, dropping=False) is None
    assert tuned.find(GPU, replace(CALL.shape, aligned=False), torch.float16, dropping=False) is None
    assert tuned.find("another-card-8", CALL.shape, torch.float16, dropping=False) is None


def test_records_of_weights_that_are_stored_otherwise_stand_apart() -> None:
    dense, nf4 = record(), replace(record(path="split"), weight="nf4")
    for each in (dense, nf4):
        keep(each, GPU)
    assert tuned_file.read(tuned_file.path_of(GPU), GPU) == [dense, nf4]
    for weight, found in ((None, dense), ("nf4", nf4), ("int8", None), ("other", None)):
        assert tuned.find(GPU, CALL.shape, torch.float16, dropping=False, weight=weight) == found


def test_a_file_from_before_weights_were_told_apart_is_of_dense_ones() -> None:
    keep(record(), GPU)
    path = tuned_file.path_of(GPU)
    content = json.loads(path.read_text())
    assert content["records"][0].pop("weight", "absent") is None
    path.write_text(json.dumps(content))
    assert tuned_file.read_or_warn(GPU, SMALL_CARD) == [record()]


def test_a_file_gives_back_what_was_kept(folder: Path) -> None:
    first, second = record(), record(replace(CALL, rows=500), path="split", tile=TILE)
    keep(first, GPU)
    keep(second, GPU)
    again = record(path="epilogue", from_host="library")
    keep(again, GPU)
    assert tuned_file.read(tuned_file.path_of(GPU), GPU) == [second, again]
    assert tuned.pinned(GPU) == [second, again]
    assert [path.name for path in folder.iterdir()] == [f"tuned-{GPU}.json"]


def test_a_crash_while_writing_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    keep(record(), GPU)
    before = tuned_file.path_of(GPU).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        keep(record(path="split"), GPU)
    assert tuned_file.path_of(GPU).read_bytes() == before
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "got a damaged file"),
        (lambda text: "[]", "got a damaged file"),
        (lambda text: text.replace('"fastlora": "', '"fastlora": "9.'), r"expected fastlora \d.*got 9\.0"),
        (lambda text: text.replace(GPU, "another-card-8"), "expected gpu a-card-7.*got another-card-8"),
        (lambda text: text.replace('"dropping"', '"droping"'), "got a damaged file"),
    ],
    ids=["cut", "other JSON", "version", "gpu", "field"],
)
def test_a_file_that_does_not_fit_is_ignored_with_a_warning(change, message: str) -> None:  # type: ignore[no-untyped-def]
    keep(record(), GPU)
    path = tuned_file.path_of(GPU)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        tuned_file.read(path, GPU)
    with pytest.warns(UserWarning, match=r"predicted instead of measured.*run fastlora tune again"):
        assert tuned_file.read_or_warn(GPU, SMALL_CARD) == []
    # and the next measurement replaces it
    keep(record(), GPU)
    assert json.loads(path.read_text())["gpu"] == GPU


def test_a_file_from_before_hosts_were_timed_is_read() -> None:
    keep(record(), GPU)
    path = tuned_file.path_of(GPU)
    content = json.loads(path.read_text())
    assert content["records"][0].pop("from_host", "absent") is None
    path.write_text(json.dumps(content))
    assert tuned_file.read_or_warn(GPU, SMALL_CARD) == [record()]


@pytest.mark.parametrize(
    "stale",
    [
        record(path="folded"),
        record(from_host="folded"),
        record(path="split", tile=TILE),
        record(replace(CALL, dropout=0.1), path="single"),
    ],
    ids=["path", "path in eager mode", "tile", "no dropout in it"],
)
def test_a_choice_that_the_plans_do_not_offer_is_not_taken(stale: tuned.Record) -> None:
    keep(record(), GPU)
    keep(stale, GPU)
    with pytest.warns(
        UserWarning, match=r"1 of \d choices.*name paths or tiles that the plans for sm_80 don't have"
    ):
        taken = tuned_file.read_or_warn(GPU, SMALL_CARD)
    assert taken == []


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ('"dtype": "float16"', '"dtype": "float17"'),
        ('"dtype": "float16"', '"dtype": 16'),
        ('"weight": null', '"weight": "nf5"'),
    ],
)
def test_an_edited_record_is_ignored_with_a_warning(written: str, wrong: str) -> None:
    keep(record(), GPU)
    path = tuned_file.path_of(GPU)
    assert written in path.read_text()
    path.write_text(path.read_text().replace(written, wrong))
    with pytest.warns(UserWarning, match="predicted instead of measured"):
        assert tuned_file.read_or_warn(GPU, SMALL_CARD) == []


def test_no_file_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert tuned_file.read_or_warn(GPU, SMALL_CARD) == []
    assert not recwarn.list


@pytest.mark.full
def test_two_processes_take_what_the_first_has() -> None:
    in_two_processes("tests.tuning_processes")
