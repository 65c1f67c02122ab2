"""Packages that only some commands need: imported on use, with an error that says how to get them."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any


def require(
    module: str, *, distribution: str, purpose: str, extra: str = "demo", command: str | None = None
) -> Any:
    """Import an optional package.

    Args:
        module: What to import, for example ``"onnx"``.
        distribution: Name of the package on the package index.
        purpose: What needs it, in the words of the error.
        extra: The extra of ours that installs it.
        command: What installs it where no extra alone does.

    Raises:
        ImportError: It isn't installed.

    Example:
        >>> require("json", distribution="json", purpose="the example").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(_missing(distribution, purpose, extra, command)) from error


def package_folder(
    module: str, *, distribution: str, purpose: str, extra: str = "demo", command: str | None = None
) -> Path:
    """The folder of an optional package, without importing it: for packages that are used for their files.

    Args:
        module: Name of the module as Python imports it.
        distribution: Name of the package on the package index.
        purpose: What needs it, in the words of the error.
        extra: The extra of ours that installs it.
        command: What installs it where no extra alone does.

    Raises:
        ImportError: It isn't installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(_missing(distribution, purpose, extra, command))
    return Path(spec.origin).parent


def _missing(distribution: str, purpose: str, extra: str, command: str | None = None) -> str:
    command = command or f'pip install "fastlora-triton[{extra}]"'
    return f"{purpose} needs the package {distribution}, which is not installed; install it with: {command}"
