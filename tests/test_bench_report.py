"""``fastlora bench report``: what the page says of a results file, and how it refuses others."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastlora.bench import page, predictions
from fastlora.bench.figures import speed_up_figure
from fastlora.bench.results import load_results
from fastlora.bench.work import lora_flops, lora_least_bytes
from fastlora.cli import app
from fastlora.transfer.report.style import png

ROW: dict[str, Any] = {
    "suite": "layers",
    "name": "ViT-B attention",
    "m": 4096,
    "k": 768,
    "n": 768,
    "rank": 16,
    "dtype": "bf16",
    "dropout": 0.1,
    "threads": 2,
    "pass": "forward_backward",
    "median_ms": {"frozen": 10.0, "reference": 15.0, "peft": 22.0, "addmm": 13.0, "fastlora": 11.0},
    "spread_ms": {"frozen": 1.0, "reference": 1.0, "peft": 1.0, "addmm": 1.0, "fastlora": 1.0},
    "kept_bytes": {},
    "peak_bytes": {},
    "flops": lora_flops(4096, 768, 768, 16, backward=True),
    "least_bytes": lora_least_bytes(4096, 768, 768, 16, itemsize=2, dropout=True, backward=True),
}
# two rivals are faster here, one of them by less than the noise
LOST = ROW | {
    "name": "Lost layer",
    "median_ms": {"frozen": 10.0, "reference": 15.0, "peft": 8.0, "addmm": 11.9, "fastlora": 12.0},
}
MEMORY = ROW | {
    "suite": "memory",
    "median_ms": {},
    "spread_ms": {},
    "kept_bytes": {"reference": 2 << 20, "fastlora": 1 << 18},
    "peak_bytes": {"reference": 9 << 20, "fastlora": 4 << 20},
}


def content(*rows: dict[str, Any], kind: str = "cpu", name: str = "Some CPU") -> dict[str, Any]:
    environment = {"cores": 2, "date": "2026-11-26", "torch": "2.14", "fastlora": "0.1", "beside": "nothing"}
    device = {"name": name, "kind": kind}
    return {"schema": 1, "device": device, "environment": environment, "complete": True, "rows": list(rows)}


def write(folder: Path, whole: object) -> Path:
    path = folder / "some-cpu-2026-11-26.json"
    path.write_text(json.dumps(whole))
    return path


def run(path: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["bench", "report", str(path), *options])


def test_page_and_figures(tmp_path: Path) -> None:
    path = write(tmp_path, content(ROW, LOST, MEMORY))
    result = run(path)
    assert result.exit_code == 0, result.output
    folder = path.with_suffix("")
    text = (folder / "report.html").read_text("utf-8")
    names = ["speedup-layers-forward-backward", "overhead-layers", "memory-layers"]
    for name in names:
        png = (folder / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
    # the page needs no other file
    assert "http" not in text.replace("http-equiv", "")
    assert text.count('src="data:image/png;base64,') == text.count("<img") >= len(names)
    assert "Some CPU" in text
    # √(11/10 · 12/10) and √(22/10 · 8/10) over the frozen layer
    assert "<b>1.15×</b> the time of the frozen layer alone with fastlora" in text
    assert "1.33× with PEFT" in text


def test_losses_are_all_there_and_noise_is_told(tmp_path: Path) -> None:
    results = load_results(write(tmp_path, content(ROW, LOST)))
    losses = results.losses()
    assert [(loss.rival, loss.within_spread) for loss in losses] == [("peft", False), ("addmm", True)]
    text = page.render(results, None, {})
    table = text[text.index("Where fastlora is slower") :]
    assert table.index("Lost layer") < table.index("50.0 %") < table.index("0.8 %") < table.index(">within")
    assert "A rival was faster in 2 of\n6 comparisons" in text


def test_no_loss_says_none(tmp_path: Path) -> None:
    text = page.render(load_results(write(tmp_path, content(ROW))), None, {})
    assert "<p>none</p>" in text[text.index("Where fastlora is slower") :]


def test_predicted_is_marked_as_predicted(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="predictions read the launch plan, which needs Triton")
    path = write(tmp_path, content(ROW))
    assert run(path, "--gpu", "rtx4090", "--output", str(tmp_path / "page")).exit_code == 0
    text = (tmp_path / "page" / "report.html").read_text("utf-8")
    assert "this page holds no measurement on a GPU" in text
    assert "Every point is\npredicted; none was measured." in text
    assert "on RTX 4090" in text
    assert "<th>Layer, predicted</th>" in text
    assert "<th>Card, predicted</th>" in text
    assert all(f"<td>{card}</td>" in text for card in ("A100", "H100", "MI300X"))
    assert (tmp_path / "page" / "roofline.png").exists()


def test_measured_on_a_gpu_has_measured_points_beside_predicted_ones(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="predictions read the launch plan, which needs Triton")
    row = ROW | {"threads": None}
    path = write(tmp_path, content(row, kind="gpu", name="NVIDIA H200"))
    assert run(path).exit_code == 0
    text = (path.with_suffix("") / "report.html").read_text("utf-8")
    assert "Filled markers were measured on NVIDIA H200, hollow dashed ones are predicted." in text
    assert "holds no measurement" not in text
    # the card's own roof, found by the device's name
    assert "r = 16, on H200" in text


def test_without_triton_predictions_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "triton_available", lambda: False)
    path = write(tmp_path, content(ROW))
    assert run(path).exit_code == 0
    text = (path.with_suffix("") / "report.html").read_text("utf-8")
    assert "predictions need the package triton, which is not installed" in text
    assert not (path.with_suffix("") / "roofline.png").exists()


def test_a_run_that_stopped_says_so(tmp_path: Path) -> None:
    stopped = content(ROW) | {"complete": False, "failed": [{"case": "layers: x", "error": "Error: <y>"}]}
    text = page.render(load_results(write(tmp_path, stopped)), None, {})
    assert "This run did not go through:</b> 1 case\nfailed" in text
    assert "layers: x: Error: &lt;y&gt;" in text


def test_a_busy_machine_is_told(tmp_path: Path) -> None:
    for load, told in ((0.4, False), (3.2, True)):
        busy = content(ROW)
        busy["environment"]["load_before"] = load
        text = page.render(load_results(write(tmp_path, busy)), None, {})
        assert ("The machine was busy with other work" in text) is told


def without(name: str) -> dict[str, Any]:
    return content({key: value for key, value in ROW.items() if key != name})


@pytest.mark.parametrize(
    ("whole", "told"),
    [
        ([], 'a results file with "schema": 1'),
        ({"rows": []}, "got None"),
        (content(ROW) | {"schema": 2}, "got 2; make it anew"),
        (content(), "at least one row"),
        (content(ROW, kind="tpu"), '"cpu" or "gpu"'),
        (without("median_ms"), "expected 'median_ms' in"),
        (content(ROW | {"m": "many"}), "'m' of type int"),
        (content(ROW | {"pass": "sideways"}), "forward_backward, step as pass"),
        (content(ROW | {"median_ms": {"fastlora": 0}}), "expected a time in ms for fastlora"),
        (content(7), "expected an object as"),  # type: ignore[arg-type]
    ],
    ids=["list", "none", "schema", "empty", "kind", "key", "type", "pass", "time", "row"],
)
def test_other_json_is_refused(whole: object, told: str, tmp_path: Path) -> None:
    result = run(write(tmp_path, whole))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: expected")
    assert told in result.stderr
    assert not (tmp_path / "some-cpu-2026-11-26").exists()


def test_bad_files_and_cards_are_refused(tmp_path: Path) -> None:
    missing = run(tmp_path / "missing.json")
    assert missing.exit_code == 2
    assert "does not exist" in missing.stderr
    assert "make bench" in missing.stderr
    (tmp_path / "text.json").write_text("no JSON")
    assert "expected JSON in" in run(tmp_path / "text.json").stderr
    assert "got a folder" in run(tmp_path).stderr
    unnamed = CliRunner().invoke(app, ["bench", "report"])
    assert unnamed.exit_code == 2
    assert "Missing argument" in unnamed.stderr
    pytest.importorskip("triton", reason="the known cards are with the kernels")
    card = run(write(tmp_path, content(ROW)), "--gpu", "H10")
    assert card.exit_code == 2
    assert "H100" in card.stderr


def test_work_by_hand() -> None:
    # x·Wᵀ 2·5·3·7, S 2·5·3·2, S·Bᵀ 2·5·7·2; backward dX, dS, dB, dA, dS·A
    forward = 2 * 5 * (3 * 7 + 3 * 2 + 7 * 2)
    backward = 2 * 5 * (3 * 7 + 2 * 7 * 2 + 2 * 3 * 2)
    assert lora_flops(5, 3, 7, 2, backward=True) == forward + backward
    # fp32 x, y, W, A, B and S, each once
    once = 4 * (5 * 3 + 5 * 7 + 3 * 7 + 2 * 3 + 7 * 2 + 5 * 2)
    assert lora_least_bytes(5, 3, 7, 2, itemsize=4, dropout=False, backward=False) == once
    # dY, x, dX, W, A, B, S, dA, dB
    again = 4 * (5 * 7 + 2 * 5 * 3 + 3 * 7 + 2 * (2 * 3 + 7 * 2) + 5 * 2)
    assert lora_least_bytes(5, 3, 7, 2, itemsize=4, dropout=False, backward=True) == once + again


def test_names_of_cases_are_drawn_as_they_are_and_of_hundreds_not_all(tmp_path: Path) -> None:
    rows = [ROW | {"name": f"_$5^$ {number}"} for number in range(130)]
    whole, one = (load_results(write(tmp_path, content(*some))) for some in (rows, rows[:1]))
    figure = speed_up_figure(whole, "layers", "forward_backward")
    assert figure is not None
    assert "the first 120 of 130 cases" in figure.get_suptitle()
    assert len(figure.axes[0].get_yticks()) == 120
    figure = speed_up_figure(one, "layers", "forward_backward")
    assert figure is not None
    assert png(figure)
