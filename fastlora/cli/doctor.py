"""``fastlora doctor``: what is installed and usable here, what is missing, and how to get it."""

import importlib
import json
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastlora._core.words import visible
from fastlora._version import __version__
from fastlora.cli._console import make_console
from fastlora.cli._errors import of_another_torch

_DISTRIBUTION = "fastlora-triton"
_CORE = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "safetensors",
    "peft",
    "transformers",
    "timm",
    "accelerate",
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
) -> None:
    """Show versions, devices, backends and measured choices, and which extras lack packages.

    Where bitsandbytes is installed, every 4-bit code is decoded on every device and compared.

    Exit code 1 when the backend that is asked for can't run here. Put the output into bug reports.

    [bold]Example[/bold]: fastlora doctor
    """
    found = findings()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found, make_console())
    if found["problem"]:
        typer.echo(f"error: {visible(found['problem'])}", err=True)
        raise typer.Exit(1)


def findings() -> dict[str, Any]:
    """Everything that is shown."""
    # slow to import
    from fastlora._core import backend

    return {
        "versions": {"fastlora": __version__, "python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "devices": _devices(),
        "backend": backend.selected(),
        "problem": _problem(),
        "cache": str(backend.cache_folder()),
        "broken": _broken(),
        "missing": _missing(),
    }


def _versions() -> dict[str, str | None]:
    return {name: _installed(name) for name in _CORE}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = torch.device("cpu")
    found: list[dict[str, Any]] = [
        {"device": "cpu", "auto": "torch", "threads": torch.get_num_threads()} | _four_bits(cpu)
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        found.append(_gpu(device) | _four_bits(device))
    return found


def _four_bits(device: Any) -> dict[str, str]:
    """Whether bitsandbytes, and on a GPU our kernel, decode each byte of NF4 as the table has it."""
    if _installed("bitsandbytes") is None:
        return {}
    import torch

    from fastlora._core import backend
    from fastlora.ops.weights.four_bit import FourBitWeight

    packed = torch.arange(256, dtype=torch.uint8)
    factors = torch.arange(1.0, 9.0)
    try:
        from bitsandbytes.functional import get_4bit_type

        codes = torch.stack((packed >> 4, packed & 15), 1).view(8, 64)
        expected = get_4bit_type("nf4", device="cpu")[codes.int()] * factors[:, None]
        stored = packed.to(device), factors.to(device)
        weight = FourBitWeight(codes.shape, *stored, None, blocksize=64, quant_type="nf4")
        for name in ("torch", "auto"):
            with backend.use_backend(name):
                if not torch.equal(weight.dense(torch.float32).cpu(), expected):
                    return {"nf4": f"wrong by the backend {name}"}
    # libraries and drivers raise what they like
    except Exception as error:
        return {"nf4": f"fails: {' '.join(str(error).split())[:200]}"}
    return {"nf4": "right"}


def _gpu(device: Any) -> dict[str, Any]:
    import torch

    from fastlora._core import backend
    from fastlora.ops import tuned_file
    from fastlora_kernels import targets

    target, gpu = targets.detect(device), tuned_file.gpu_key(device)
    failure = (
        backend.launch_failure() if backend.triton_available() else "the package triton is not installed"
    )
    pinned = target.tiles != "default" and not failure
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device),
        "target": target.name,
        "plans": f"as {target.card}" if pinned else "none: library products",
        "auto": "triton" if pinned else "torch",
        "measured": len(tuned_file.read_or_warn(gpu, target)),
    } | ({"kernels": failure} if failure else {})


def _problem() -> str:
    """Why the backend that is asked for can't run; empty where it can."""
    import torch

    from fastlora._core import backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        backend.resolve(device, torch.float32)
    except ValueError as error:
        return str(error)
    return ""


def _broken() -> dict[str, str]:
    """Packages that are installed and can't be imported, with the reason."""
    if _installed("torchvision") is None:
        return {}
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        return {"torchvision": of_another_torch(error) or str(error)}
    return {}


def _missing() -> dict[str, list[str]]:
    """For each extra that lacks something, the requirements that are not met."""
    from packaging.requirements import Requirement

    lacking: dict[str, list[str]] = {}
    try:
        texts = requires(_DISTRIBUTION) or ()
    except PackageNotFoundError:
        # run from a checkout that is not installed
        return lacking
    for text in texts:
        requirement = Requirement(text)
        extra = _extra_of(requirement)
        if extra is None or requirement.name == _DISTRIBUTION:
            continue
        installed = _installed(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            lacking.setdefault(extra, []).append(f"{requirement.name}{requirement.specifier}")
    return lacking


def _extra_of(requirement: Any) -> str | None:
    """The extra that a requirement belongs to; None for the package's own, or where it isn't needed here."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    names = [name for name in str(requirement.marker).split('"') if name and " " not in name]
    return next((name for name in names if requirement.marker.evaluate({"extra": name})), None)


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in found["versions"].items():
        table.add_row(name, value or Text("not installed", style="dim"))
    table.add_row("platform", found["platform"])
    table.add_row("backend", found["backend"])
    for device in found["devices"]:
        facts = ", ".join(f"{name} {value}" for name, value in device.items() if name != "device")
        table.add_row(device["device"], facts)
    if len(found["devices"]) == 1:
        table.add_row("GPU", "none: fastlora plan predicts for GPUs that are elsewhere")
    else:
        table.add_row("check", "python -m fastlora.bench.gpu_check holds every kernel against float64 there")
    table.add_row("cache", found["cache"])
    console.print(table)
    for reason in found["broken"].values():
        console.print(reason, soft_wrap=True)
    for extra, requirements in found["missing"].items():
        console.print(
            f'extra {extra} lacks {", ".join(requirements)}: pip install "{_DISTRIBUTION}[{extra}]"'
        )
