"""The suite as a pytest plugin: its options, a case's threads, and the session's results file."""

import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.shapes import is_quick
from fastlora.bench.cases import Case
from fastlora.bench.page import PAGE, write_report
from fastlora.bench.results_file import Record, ResultsFile, as_json_row

_FILES = pytest.StashKey[dict[str, ResultsFile]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's own options."""
    group = parser.getgroup("fastlora")
    group.addoption(
        "--results", metavar="DIR", help="Write DIR/<device>-<date>.json and a report; else none."
    )
    group.addoption("--beside", default="nothing known of", help="What else runs here, for the file.")
    group.addoption("--quick", action="store_true", help="Only the cases that tell most.")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run without what times the cases."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "the benchmarks need the package pytest-benchmark, which is not installed; "
            'install it with: pip install "fastlora-triton[bench]"'
        )
    config.stash[_FILES] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ``--quick`` does."""
    if config.getoption("--quick"):
        items[:] = [item for item in items if (case := _case_of(item)) is not None and is_quick(case)]


def _case_of(item: pytest.Item) -> Case | None:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) else None


@pytest.fixture(autouse=True)
def on_its_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A CPU case runs on its own threads, beside its busy processes; a GPU case leaves no cached memory."""
    case: Case = request.getfixturevalue("case")
    threads = torch.get_num_threads()
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(case.busy)]
    yield
    for process in busy:
        process.kill()
        process.wait()
    torch.set_num_threads(threads)
    if case.device == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Record:
    """Keeps a case's row, with pytest-benchmark and in the results file."""

    def keep(case: Case, measured: dict[str, dict[str, Any]], **more: Any) -> None:
        row = as_json_row(case, measured, **more)
        benchmark.extra_info.update(row)
        file = _file_of(request.config, case)
        if file is not None:
            file.add(row)

    return keep


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep a failure in the file too."""
    report = yield
    case = _case_of(item)
    if report.failed and call.excinfo is not None and case is not None:
        file = _file_of(item.config, case)
        if file is not None:
            file.add_failure(f"{case.suite}: {case.id}", call.excinfo.exconly(tryshort=True))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Say in the files whether the run went through, and make their reports."""
    for file in session.config.stash[_FILES].values():
        file.finish(complete=exitstatus == pytest.ExitCode.OK)
        if file.has_rows:
            write_report(file.path)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say where the results are."""
    for file in config.stash[_FILES].values():
        terminalreporter.write_line(f"results: {file.path}")
        if file.has_rows:
            terminalreporter.write_line(f"report: {file.path.with_suffix('') / PAGE}")


def _file_of(config: pytest.Config, case: Case) -> ResultsFile | None:
    folder = config.getoption("--results")
    if folder is None:
        return None
    kind = "gpu" if case.device == "cuda" else "cpu"
    files = config.stash[_FILES]
    if kind not in files:
        files[kind] = ResultsFile.of_suite(Path(folder), kind, config.getoption("--beside"))
    return files[kind]
