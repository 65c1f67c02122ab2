"""The site: its reference has every public name, and what its pages show runs."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.tools import figures, matrix, notebooks, pages, steps, traffic
from fastlora_kernels.choose.explain import explain
from fastlora_kernels.targets import find_card
from fastlora_kernels.tile import Shape
from tests.cases import cases
from tests.code_blocks import blocks, run, stand_in
from tests.hf_models import llama

DOCS = Path(__file__).parents[1] / "docs"
# modules whose __all__ is what users may rely on
PUBLIC = [
    "fastlora",
    "fastlora.functional",
    "fastlora.nn",
    "fastlora.init",
    "fastlora.parameters",
    "fastlora.distributed",
    "fastlora.tuning",
    "fastlora.transfer.costs",
    "fastlora.transfer.data",
    "fastlora.transfer.demo",
    "fastlora.transfer.finetune",
    "fastlora.transfer.strategies",
    "fastlora.transfer.training",
    "fastlora.domain.adaptation",
    "fastlora.domain.methods",
]


def named(path: str) -> Any:
    """What a dotted name of the reference stands for."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ModuleNotFoundError):
        return importlib.import_module(path)


def shown() -> dict[str, Any]:
    """What each page of the reference shows, by the name that it has there."""
    pages = (page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    return {name: named(name) for page in pages for name in re.findall(r"^::: (\S+)$", page, re.M)}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module: str) -> None:
    found = importlib.import_module(module)
    # under whichever of its names it is there; modules have pages, not entries
    there = {id(value) for value in shown().values()}
    modules = {name for name in found.__all__ if f"{module}.{name}" in PUBLIC}
    lacking = [n for n in found.__all__ if n not in modules and id(getattr(found, n)) not in there]
    assert lacking == []


# what they do with a folder of pictures, notebooks/pictures.ipynb shows; the demos take minutes
WITH_FOLDERS = {"finetune", "load_run", "export_run", "predict_files", "run_demo", "run_language_demo"}


def test_every_public_function_has_an_example() -> None:
    functions = [(name, value) for name, value in shown().items() if inspect.isfunction(value)]
    lacking = [name for name, value in functions if "Example:" not in (inspect.getdoc(value) or "")]
    assert [name for name in lacking if name.rpartition(".")[2] not in WITH_FOLDERS] == []


def test_every_module_with_public_names_is_looked_at() -> None:
    """A new ``__all__`` must be added above, or its names would be nowhere."""
    package = DOCS.parent / "fastlora"
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    with_names = {path for path, text in texts.items() if re.search(r"^__all__ =", text, re.M)}
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in with_names
    }
    assert modules == set(PUBLIC)


PAGES = [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md")) if blocks(page)]


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_examples_run(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, as a reader goes down the page."""
    stand_in(tmp_path, monkeypatch)
    torch.manual_seed(0)
    # what a reader has: a path that all processes see, a folder with a model
    names = {"store": tmp_path / "store", "path": tmp_path / "model"}
    if "from_pretrained(\n    path" in (DOCS / page).read_text():
        llama().to(torch.bfloat16).save_pretrained(names["path"])
    for block in blocks(DOCS / page):
        run(block, page, names, capsys)


def sentences(source: Path) -> set[str]:
    """The texts in a module as a reader sees them, with ``…`` for what is filled in."""

    def said(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(said, node.values))
        text = node.value if isinstance(node, ast.Constant) else "…"
        return re.sub(r"%[sdr]|%\.\d\w", "…", text) if isinstance(text, str) else ""

    return {said(node) for node in ast.walk(ast.parse(source.read_text()))}


def test_what_troubleshooting_quotes_is_what_the_code_says() -> None:
    page = (DOCS / "guides" / "troubleshooting.md").read_text()
    quoted = [text.strip("… ") for text in re.findall(r"^\*\*`(.*)`\*\*$", page, re.M)]
    said = [text for path in (DOCS.parent / "fastlora").rglob("*.py") for text in sentences(path)]
    assert len(quoted) > 20
    assert [text for text in quoted if not any(text in one for one in said)] == []


def test_readme_has_the_measured_steps() -> None:
    """After a new measurement: ``python -m docs.tools.steps`` prints the table."""
    assert steps.table() in (DOCS.parent / "README.md").read_text()


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_code_is_no_wider_than_a_page(page: Path) -> None:
    code = re.findall(r"^```.*?\n(.*?)^```", page.read_text(), re.S | re.M)
    assert [line for block in code for line in block.splitlines() if len(line) > 98] == []


def test_pictures_of_reports_are_small_and_shown() -> None:
    """After a change of the reports: ``python -m docs.tools.screenshots``."""
    shown = {
        page
        for path in DOCS.rglob("*.md")
        for page in re.findall(r"\(reports/(\w+)\.png\)", path.read_text())
    }
    there = {path.name: path.stat().st_size for path in (DOCS / "guides" / "reports").iterdir()}
    assert there.keys() == {f"{name}{dark}.png" for name in shown for dark in ("", "-dark")}
    assert max(there.values()) < 150_000


def test_a_picture_is_shown_dark_where_there_is_a_dark_one(tmp_path: Path) -> None:
    (tmp_path / "a-dark.png").touch()
    shown = pages.with_dark_pictures("![A](a.png) ![B](b.png)", tmp_path)
    assert shown == "![A](a.png#only-light) ![A](a-dark.png#only-dark) ![B](b.png)"


def test_numbers_and_names_in_tables_break_where_a_reader_would() -> None:
    numbers = pages.with_whole_numbers("| 1.8 ± 0.2 | 12 % of 3 |\n1.8 ± 0.2")
    assert numbers == "| 1.8\xa0±\xa00.2 | 12\xa0% of 3 |\n1.8 ± 0.2"
    name = "<code>fastlora.apply_lora</code>"
    broken = "<td><code>fastlora.<wbr>apply_<wbr>lora</code></td>"
    assert pages.with_breaks(f"<p>{name}</p><td>{name}</td>") == f"<p>{name}</p>{broken}"


@pytest.mark.parametrize("name", figures.NAMES)
def test_figures_are_those_of_the_kernels(name: str) -> None:
    """After a change of kernels: ``python -m docs.tools.figures``."""
    assert (figures.FOLDER / f"{name}.svg").read_text() == figures.draw(name)


def test_what_a_kernel_reads_and_writes() -> None:
    found = {tensor.name: tensor.written for tensor in traffic.tensors("lora", "lora_grad_x_a")}
    reads = ["dy", "weight", "ds", "lora_a", "mask", "x"]
    assert found == dict.fromkeys(reads, False) | {"dx": True, "da_partial": True}


# one that takes everything, one that refuses some
QUICK = ["resnet18", "LlamaForCausalLM"]


@pytest.mark.parametrize(
    "model", cases(QUICK, [m for m in (*matrix.PICTURES, *matrix.HUGGING_FACE) if m not in QUICK])
)
def test_the_matrix_says_what_models_carry(model: str) -> None:
    """After a change: ``python -m docs.tools.matrix``."""
    assert matrix.row(model) in matrix.PAGE.read_text().splitlines()


def test_the_predicted_table_is_what_plan_predicts() -> None:
    page = (DOCS / "concepts" / "paths.md").read_text()
    rows = re.findall(r"^\| (\d+) × (\d+) × (\d+) \| ([\d.]+)×", page, re.M)
    assert len(rows) == 3
    for m, k, n, shown_ratio in rows:
        found = explain(
            "lora_linear", Shape(int(m), int(n), int(k), 16), torch.bfloat16, find_card("H100"), dropout=0.1
        )
        assert f"{found.overhead:.2f}" == shown_ratio


@pytest.mark.parametrize("name", cases(["peft_model"], ["two_domains", "pictures"]))
def test_a_notebook_prints_what_it_shows(name: str) -> None:
    """But for its figures, which a machine decides, and what libraries of some versions print beside it.

    After a change: ``python -m docs.tools.notebooks``.
    """

    def lines(text: str) -> list[str]:
        return re.sub(r"\d", "0", text).splitlines()

    notebook = notebooks.read(name)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell, printed in zip(cells, notebooks.run(notebook), strict=True):
        assert [line for line in lines(notebooks.shown(cell)) if line not in lines(printed)] == []


LINKED = [*DOCS.parent.glob("*.md"), *DOCS.rglob("*.md"), *DOCS.parent.glob("[!.]*/README.md")]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_links_lead_to_files(page: Path) -> None:
    """Those within the repository; ``make docs`` looks at anchors, too."""
    links = re.findall(r"\]\((?!https?:)([^)\s#]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    assert [link for link in links if not (page.parent / link).exists()] == []
