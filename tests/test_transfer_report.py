"""Scores, memory, files and pictures of a report."""

import json
import mmap
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora._core.environment import environment
from fastlora._core.files import check_output_folder, write_file, write_report
from fastlora._core.memory import PeakMemory
from fastlora.transfer.metrics import (
    accuracy,
    accuracy_interval,
    accuracy_standard_error,
    balanced_accuracy,
    confusion_matrix,
)
from fastlora.transfer.plots import accuracy_figure, draw_accuracies, draw_confusions, draw_curves
from tests.cases import cases


def test_scores_against_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, predictions = torch.randint(0, 4, (2, 300), generator=generator)
    confusion = confusion_matrix(labels, predictions, 5)
    for true in range(5):
        for predicted in range(5):
            count = sum(1 for pair in zip(labels, predictions, strict=True) if pair == (true, predicted))
            assert confusion[true, predicted] == count
    right = labels == predictions
    recalls = [right[labels == label].double().mean().item() for label in range(4)]
    assert accuracy(confusion) == pytest.approx(right.double().mean().item())
    # the fifth class has no examples and does not count
    assert balanced_accuracy(confusion) == pytest.approx(sum(recalls) / 4)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident set is read from /proc")
def test_peak_memory_sees_what_is_gone_again() -> None:
    peak = PeakMemory(torch.device("cpu"))
    with peak:
        # the system's own pages: malloc may have some that an earlier test freed, and keeps them
        block = mmap.mmap(-1, 200_000_000)
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        # until the sampler has had its turn, however busy the machine is
        for _ in range(6_000):
            if peak.bytes is not None and peak.bytes >= _resident():
                break
            time.sleep(0.01)
        block.close()
    assert peak.bytes is not None
    # beside what is left, not what was there before: other tests' memory may have gone meanwhile, none comes
    assert peak.bytes - _resident() > 150e6
    assert peak.bytes < 1.1 * _most_resident()
    highest = peak.bytes
    with peak:
        pass
    assert peak.bytes == highest


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _most_resident() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def test_write_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_report(path, {"run": 1})
    assert json.loads(path.read_text()) == {"run": 1}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"half")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert json.loads(path.read_text()) == {"run": 1}


def test_check_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_environment_names_versions() -> None:
    facts = environment(torch.device("cpu"), "bf16")
    assert facts["versions"]["torch"] in torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    json.dumps(facts)


def method(title: str, parameters: int, right: int, *, of: int = 240, classes: int = 2) -> dict[str, Any]:
    """As in the demo's report."""
    labels = torch.arange(of) % classes
    predictions = labels.clone()
    predictions[right:] = (predictions[right:] + 1) % classes
    confusion = confusion_matrix(labels, predictions, classes)
    return {
        "title": title,
        "trainable_parameters": parameters,
        "accuracy": accuracy(confusion),
        "accuracy_interval": accuracy_interval(confusion),
        "balanced_accuracy": balanced_accuracy(confusion),
        "confusion": confusion.tolist(),
        "seconds": 1.0,
        "epochs": epochs(3),
    }


def epochs(count: int) -> list[dict[str, float]]:
    return [{"epoch": n, "train_loss": 1 / n, "accuracy": n / count} for n in range(1, count + 1)]


def test_standard_error_is_that_of_draws() -> None:
    confusion = torch.tensor(method("", 1, 36, of=40)["confusion"])
    draws = torch.rand(20_000, 40, generator=torch.Generator().manual_seed(0)) < 0.9
    spread = draws.double().mean(dim=1).std().item()
    assert accuracy_standard_error(confusion) == pytest.approx(spread, rel=0.02)


@pytest.mark.parametrize(("count", "classes"), cases([(1, 2), (5, 10)], [(1, 10), (5, 2)]))
def test_every_method_is_drawn(count: int, classes: int) -> None:
    methods = [method(f"Method {n}", 10 ** (n + 1), 200 + n, classes=classes) for n in range(count)]
    names = [str(label) for label in range(classes)]
    for picture in (
        draw_curves(methods, "curves"),
        draw_accuracies(methods, "accuracies"),
        draw_confusions(methods, names, "confusion"),
    ):
        assert picture.startswith(b"\x89PNG")


SPREAD = [(770, 222), (46_850, 220), (590_000, 223), (1_190_000, 224), (21_670_000, 224)]
CROWDED = {
    "spread": SPREAD,
    "one-method": SPREAD[:1],
    "all-in-one-place": [(1000, 200)] * 5,
    "close": [(1000 * 2**n, 200 + n % 2) for n in range(5)],
    "all-right": [(parameters, 240) for parameters, _ in SPREAD],
}


@pytest.mark.parametrize("places", CROWDED.values(), ids=CROWDED)
def test_accuracy_plot_has_a_point_and_a_readable_label_for_each(places: list[tuple[int, int]]) -> None:
    titles = ["Linear probe", "Visual prompts", "LoRA, fused", "Bottleneck adapters", "Full fine-tuning"]
    methods = [method(title, *place) for title, place in zip(titles, places, strict=False)]
    figure = accuracy_figure(methods, "cells")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    # what savefig will do
    figure.draw_without_rendering()
    for result, bar, label in zip(methods, axes.containers, axes.texts, strict=True):
        right = 100 * result["accuracy"]
        low, high = (100 * limit for limit in result["accuracy_interval"])
        point, _, (line,) = bar
        assert point.get_xydata().tolist() == [[result["trainable_parameters"], pytest.approx(right)]]
        ends = line.get_segments()[0][:, 1].tolist()
        assert ends == pytest.approx([low, high])
        assert label.get_text() == f"{result['title']}\n{right:.1f} % ({low:.1f} to {high:.1f})"
    boxes = [label.get_window_extent() for label in axes.texts]
    for n, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:n])
        assert all(axes.bbox.contains(x, y) for x, y in box.corners())


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("number", [1, 30])
def test_pictures_of_any_size(classes: int, number: int) -> None:
    result = method("Probe", 1, classes, of=3 * classes, classes=classes) | {"epochs": epochs(number)}
    names = [str(label) for label in range(classes)]
    for picture in (
        draw_curves([result, result], "curves"),
        draw_confusions([result, result], names, "confusion"),
    ):
        assert picture.startswith(b"\x89PNG")
