"""Checkpoints that are whole or not there: written aside, checked by their digest, the last two kept."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastlora._core.files import aside, read_json, remove_folder, room_wanted, settle, write_through
from fastlora._core.interruption import Interrupted
from fastlora._core.log import logger

CHECKPOINTS = "checkpoints"
_KEPT = 2
_STATE, _MANIFEST, PREFIX = "state.pt", "manifest.json", "step-"


class Checkpoints:
    """The checkpoints of a run, one folder each, named by their step.

    Args:
        folder: Holds them; made by the first :meth:`save`.
    """

    def __init__(self, folder: Path) -> None:
        """See the class."""
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and remove all but the last two.

        Args:
            step: Optimiser steps done.
            state: Tensors, numbers, strings and containers of them.

        Returns:
            Its folder.

        Raises:
            OSError: It couldn't be written, on a full disk for instance; those before are kept.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        target = self.folder / f"{PREFIX}{step:08d}"
        manifest = {"step": step, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        try:
            with aside(target) as new:
                new.mkdir(parents=True)
                write_through(new / _STATE, content)
                write_through(new / _MANIFEST, json.dumps(manifest).encode())
                remove_folder(target)
                new.replace(target)
            settle(self.folder)
        except OSError as error:
            raise OSError(error.errno, self._not_written(error, len(content))) from error
        self._tidy()
        return target

    def latest(
        self, check: Callable[[dict[str, Any]], None] = lambda state: None
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint: its step and state. Damaged ones are told by a warning.

        Args:
            check: Raises a ``ValueError`` at a state that lacks something, as if it were damaged.

        Raises:
            ValueError: There are checkpoints, and none is whole.
        """
        found = self._found()
        for folder in reversed(found):
            try:
                step, state = _read(folder)
                check(state)
                return step, state
            except (OSError, ValueError) as error:
                logger.warning("checkpoint %s is damaged (%s); it is skipped", folder, error)
        if found:
            raise ValueError(
                f"expected a whole checkpoint in {self.folder}, all {len(found)} are damaged; "
                "start again in another folder"
            )
        return None

    def interrupted(self, number: int, step: int) -> Interrupted:
        """What to raise for a signal once the checkpoint of a step is written."""
        return Interrupted(number, f"the checkpoint of step {step} is in {self.folder}")

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*")) if self.folder.is_dir() else []

    def _tidy(self) -> None:
        for old in self._found()[:-_KEPT]:
            remove_folder(old)
        # what a killed process left
        for left in self.folder.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def _not_written(self, error: OSError, size: int) -> str:
        kept = self._found()
        last = f"the last one is whole: {kept[-1]}" if kept else "there is none before it"
        return f"{room_wanted(self.folder / _STATE, size, error)}; {last}; make room, then go on with resume"


def _read(folder: Path) -> tuple[int, dict[str, Any]]:
    manifest = read_json(folder / _MANIFEST)
    step, digest = (manifest.get(name) if isinstance(manifest, dict) else None for name in ("step", "sha256"))
    if type(step) is not int or not isinstance(digest, str):
        raise ValueError(f"expected a step and a digest in {folder / _MANIFEST}, got something else")
    content = (folder / _STATE).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"expected a file as it was written, got {len(content):,} other bytes")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # what isn't a checkpoint makes PyTorch's reader fail in any way; it runs nothing, and its advice is long
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"expected a state of tensors and numbers, got something else ({kind})") from error
    if not isinstance(state, dict):
        raise ValueError(f"expected a state with names, got {type(state).__name__}")
    return step, state
