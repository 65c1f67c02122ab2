"""The results file ``<device>-<date>.json``: written after each case, so that what was measured stays."""

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fastlora._core.environment import processor
from fastlora._core.files import write_report
from fastlora.bench.cases import Case
from fastlora.bench.results import SCHEMA
from fastlora.bench.turns import environment

_CLOCKS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"


class Record(Protocol):
    """Takes one case's row."""

    def __call__(self, case: Case, measured: dict[str, dict[str, Any]], **more: Any) -> None:
        """Times and bytes by candidate, and what else is known of the case."""


class ResultsFile:
    """One run on one device.

    Args:
        path: The file.
        kind: ``cpu`` or ``gpu``.
        name: The device's.
        environment: Versions, and what else is needed to judge the times.
    """

    def __init__(self, path: Path, kind: str, name: str, environment: Mapping[str, Any]) -> None:
        """See the class."""
        self.path = path
        self._content: dict[str, Any] = {
            "schema": SCHEMA,
            "device": {"name": name, "kind": kind},
            "environment": dict(environment),
            # until the last case is through
            "complete": False,
            "failed": [],
            "rows": [],
        }

    @classmethod
    def of_suite(cls, folder: Path, kind: str, beside: str) -> "ResultsFile":
        """The file ``<device>-<date>.json`` of the suite on this machine.

        Args:
            folder: Where the file goes.
            kind: ``cpu`` or ``gpu``.
            beside: What else ran on the machine, in words.
        """
        name = processor() if kind == "cpu" else torch.cuda.get_device_name()
        path = folder / f"{slug(name)}-{time.strftime('%Y-%m-%d')}.json"
        return cls(path, kind, name, environment_of(kind) | {"beside": beside})

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to report."""
        return bool(self._content["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self._content["rows"].append(row)
        self._write()

    def add_failure(self, case: str, error: str) -> None:
        """Keep the word of a case that failed."""
        self._content["failed"].append({"case": case, "error": error})
        self._write()

    def put(self, **entries: Any) -> None:
        """Keep what is no row: entries of the whole file, by name."""
        self._content |= entries
        self._write()

    def finish(self, complete: bool) -> None:
        """Note whether all cases went through, and a GPU's clocks after them."""
        self._content["complete"] = complete
        self._content["environment"]["load_after"] = _load()
        if self._content["device"]["kind"] == "gpu":
            self._content["environment"]["clocks_after"] = gpu_clocks()
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_report(self.path, self._content)


def slug(name: str) -> str:
    """A device's name for a file.

    Example:
        >>> slug("NVIDIA H100 80GB HBM3")
        'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_clocks() -> dict[str, str] | str:
    """The current GPU's driver, clocks, power limit and temperature by ``nvidia-smi``, or why unknown."""
    try:
        # its number here is another one there where CUDA_VISIBLE_DEVICES hides or reorders some
        gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", f"--id={gpu}"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    # torch without CUDA asserts that it has it; a GPU that is lost raises RuntimeErrors
    except (OSError, subprocess.SubprocessError, AssertionError, RuntimeError) as error:
        return f"unknown ({type(error).__name__})"
    return dict(zip(_CLOCKS.split(","), (value.strip() for value in told.split(",")), strict=False))


def environment_of(kind: str) -> dict[str, Any]:
    """Versions, commit and load of this machine; of a GPU its driver and clocks.

    Args:
        kind: ``cpu`` or ``gpu``.
    """
    found = environment("peft", "transformers", "timm", "triton", "pytest-benchmark")
    found |= {"commit": _commit(), "load_before": _load()}
    if kind == "gpu":
        found |= {"cuda": torch.version.cuda or torch.version.hip, "clocks_before": gpu_clocks()}
    return found


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def _commit() -> str:
    # installed, the package may lie inside of somebody's repository
    ours = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    told = ""
    try:
        for command in (ours, describe):
            ran = subprocess.run(
                command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            )
            told = ran.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told


def as_json_row(case: Case, measured: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A row of the file; what a suite doesn't measure is empty."""
    empty: dict[str, Any] = {"median_ms": {}, "spread_ms": {}, "kept_bytes": {}, "peak_bytes": {}}
    row = case.as_row() | {"flops": None, "least_bytes": None, "left_out": {}} | empty | measured | more
    # numbers that JSON can't hold fail here and not in a reader's hands
    json.dumps(row, allow_nan=False)
    return row
