"""Checkpoints that are whole or not there: written aside, checked by their digest, the last two kept."""

import hashlib
import io
import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

_LOG = logging.getLogger("fastlora")
_KEPT = 2
_STATE, _MANIFEST, _PREFIX = "state.pt", "manifest.json", "step-"


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
        target = self.folder / f"{_PREFIX}{step:08d}"
        aside = self.folder / f".{target.name}.{uuid.uuid4().hex}.tmp"
        try:
            aside.mkdir(parents=True)
            _write(aside / _STATE, content)
            manifest = {"step": step, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _write(aside / _MANIFEST, json.dumps(manifest).encode())
            _remove(target)
            os.replace(aside, target)
            _settle(self.folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(error.errno, self._not_written(error, len(content))) from error
        self._tidy()
        return target

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint: its step and state. Torn ones are told by a warning.

        Raises:
            ValueError: There are checkpoints, and none is whole.
        """
        found = self._found()
        for folder in reversed(found):
            try:
                return _read(folder)
            except (OSError, ValueError, KeyError) as error:
                _LOG.warning("checkpoint %s is damaged (%s); it is skipped", folder, error)
        if found:
            raise ValueError(
                f"expected a whole checkpoint in {self.folder}, all {len(found)} are damaged; "
                "start again in another folder"
            )
        return None

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*")) if self.folder.is_dir() else []

    def _tidy(self) -> None:
        for old in self._found()[:-_KEPT]:
            _remove(old)
        # what a killed process left
        for left in self.folder.glob(f".{_PREFIX}*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def _not_written(self, error: OSError, size: int) -> str:
        kept = self._found()
        last = f"the last one is whole: {kept[-1]}" if kept else "there is none before it"
        free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
        return (
            f"expected room for a checkpoint of {size / 2**20:,.1f} MiB in {self.folder}, "
            f"{free / 2**20:,.1f} MiB are free ({error.strerror}); {last}; make room, then go on with resume"
        )


def _read(folder: Path) -> tuple[int, dict[str, Any]]:
    manifest = json.loads((folder / _MANIFEST).read_text())
    content = (folder / _STATE).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise ValueError(
            f"expected {manifest['bytes']:,} bytes as they were written, got {len(content):,} others"
        )
    return int(manifest["step"]), torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _settle(folder: Path) -> None:
    # a rename outlives a power cut only once its folder is on the disk
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        # out of sight first: a half-removed folder must not look like a torn checkpoint
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
