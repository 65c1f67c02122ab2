"""What commands print: names as they are, whatever they hold, and progress that ends, in logs too."""

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from fastlora._core.words import shortened, visible
from fastlora.cli import app
from fastlora.cli._console import make_console
from fastlora.cli._progress import LiveReporter
from fastlora.cli.diagnose import _shares
from tests.finetune_models import write_pictures

# Rich's markup, mathtext, a colour, a link, a bell, a forged line, text read backwards, a smiley's code
CLASSES = ("[bold]a", "[]b\x1b[31m", "$5^$\n:smile:", "\x1b]8;;x\x07\u202ec")
SHOWN = ("[bold]a", r"[]b\x1b[31m", r"$5^$\n:smile:", r"\x1b]8;;x\x07\u202ec")
QUICK = [
    "--model",
    "resnet18",
    "--weights",
    "none",
    "--image-size",
    "32",
    "--epochs",
    "1",
    "--precision",
    "no",
]
RAW = ("\x1b", "\x07", "\u202e")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", count=5, classes=CLASSES)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("runs") / "run[/b]\x1b[1m"
    return output, invoke("finetune", data, *QUICK, "--strategy", "feature_extraction", "--output", output)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def check_plain(printed: str, *parts: str) -> None:
    assert not [raw for raw in RAW if raw in printed]
    assert not [part for part in parts if part not in printed], printed


def test_visible_text() -> None:
    assert [visible(name) for name in CLASSES] == list(SHOWN)
    # of names in any script nothing is lost
    for name in (
        "naïve",
        "猫　犬",
        "‏قط‏".strip("\u200f"),
        "می\u200cخواهم",
        "👩\u200d🔬",
        "a\u00a0b",
        "\\x1b",
        "%s {0}",
    ):
        assert visible(name) == name
    assert visible(Path("\udc80")) == r"\udc80"
    assert len(shortened("x" * 1000, 40)) == 40
    assert shortened("short", 5) == "short"


def test_the_console_shows_strings_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    table = Table(*CLASSES, title=CLASSES[1], caption=CLASSES[2])
    table.add_row(*CLASSES)
    console.print(table)
    console.print(f"Wrote {CLASSES[3]} [/b]")
    with LiveReporter(console) as reporter:
        reporter.show("[/b]", 1, 1, "[/i]")
        reporter.note("[/u]")
    check_plain(capsys.readouterr().out, *SHOWN, "[/b]: 1 of 1", "[/i]", "[/u]")


def test_a_run_and_its_answers_show_the_classes(data: Path, trained: tuple[Path, Any]) -> None:
    output, result = trained
    assert result.exit_code == 0, result.output
    check_plain(result.output, r"run[/b]\x1b[1m")
    dry = invoke("finetune", data, *QUICK, "--dry-run")
    check_plain(dry.output, ", ".join(sorted(SHOWN, key=lambda name: CLASSES[SHOWN.index(name)])))
    picture = data / CLASSES[1] / "00.png"
    answer = invoke("predict", output, picture, "--top", 4)
    check_plain(answer.output, *SHOWN)
    exported = invoke("export", output, "--format", "state_dict")
    check_plain(exported.output, r"run[/b]\x1b[1m")


def test_a_plan_is_json_too(data: Path) -> None:
    plan = json.loads(invoke("finetune", data, *QUICK, "--dry-run", "--json").stdout)
    assert set(plan["classes"]) == set(CLASSES)
    assert plan["plan"]["Classes"].startswith("4: ")
    assert plan["parameters"]["total_parameters"] > 0


def test_machines_get_the_names_themselves(data: Path, trained: tuple[Path, Any]) -> None:
    arguments = ("predict", trained[0], data / CLASSES[1] / "00.png", "--top", 4)
    answers = json.loads(invoke(*arguments, "--json").stdout)
    assert answers == json.loads(invoke(*arguments, "--format", "json").stdout)
    assert {name for name, _ in answers[0]["classes"]} == set(CLASSES)
    rows = list(csv.DictReader(io.StringIO(invoke(*arguments, "--format", "csv").stdout)))
    assert {row["class"] for row in rows} == set(CLASSES)


@pytest.mark.parametrize(
    "arguments",
    [
        ("finetune", CLASSES[3]),
        ("finetune", ".", "--model", CLASSES[3]),
        ("adapt", "--source", ".", "--target", CLASSES[3]),
        ("diagnose", "--source", CLASSES[3], "--target", "."),
        ("predict", CLASSES[3], "x"),
        ("export", CLASSES[3]),
        ("params", CLASSES[3]),
        ("plan", "--gpu", CLASSES[3], "--shape", "8x8x8"),
        ("kernels", "--gpu", CLASSES[3]),
        ("bench", "report", CLASSES[3]),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_error_is_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where a command's default output folder may be made
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    check_plain(result.stderr, "error: ")
    assert len(result.stderr.splitlines()) == 1


def test_warnings_are_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(path: Path) -> None:
        logging.getLogger("fastlora").warning("%s is skipped", path)
        raise ValueError("none is left")

    monkeypatch.setattr("fastlora.bench.results.load_results", warn)
    result = invoke("bench", "report", CLASSES[2])
    assert result.stderr == f"warning: {SHOWN[2]} is skipped\nerror: none is left\n"


def lines_of(steps: list[float], total: int, *, fail: bool = False) -> list[str]:
    """What a log shows of a task whose steps end at these seconds."""
    log, now = io.StringIO(), [0.0]
    reporter = LiveReporter(Console(file=log, width=40), clock=lambda: now[0])
    try:
        with reporter:
            for done, second in enumerate(steps, 1):
                now[0] = second
                reporter.advance("train", done, total, 0.5, memory=2**20)
            if fail:
                raise ValueError
    except ValueError:
        pass
    return log.getvalue().splitlines()


def test_a_log_has_a_line_now_and_then() -> None:
    lines = lines_of([0.1 * step for step in range(1, 201)], 200)
    assert lines[0] == "train: 1 of 200 (0 %), loss 0.500  1 MiB"
    assert lines[1].startswith("train: 51 of 200 (26 %), 10.0/s, 15 s left, loss 0.500")
    assert lines[-1].startswith("train: 200 of 200 (100 %)")
    assert len(lines) == 5


def test_what_ends_early_is_done_unless_it_failed() -> None:
    assert lines_of([1, 2, 3], 10)[-1].startswith("train: 3 of 3 (100 %)")
    assert lines_of([1, 2, 3], 10, fail=True) == ["train: 1 of 10 (10 %), loss 0.500  1 MiB"]


def test_a_terminal_has_bars_that_end() -> None:
    screen = io.StringIO()
    with LiveReporter(Console(file=screen, width=100, force_terminal=True)) as reporter:
        reporter.advance("train", 1, 10, None)
    assert "1/1" in screen.getvalue()


def test_a_table_of_hundreds_of_classes_shows_what_changes_most(capsys: pytest.CaptureFixture[str]) -> None:
    classes = [
        {"class": f"class {number}", "source": 0.1, "target": 0.1 + number / 1000, "interval": [0.0, 1.0]}
        for number in range(200)
    ]
    make_console().print(_shares(classes))
    shown = capsys.readouterr().out
    assert "class 199 " in shown
    assert "class 159 " not in shown
    assert "The 40 of 200 classes that change most" in shown
