"""Logs of a run: CSV files and TensorBoard, cut back to the checkpoint that a run is resumed from."""

import csv
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fastlora._core.files import write_file
from fastlora._core.log import logger
from fastlora.transfer.training.records import EpochRecord

_COLUMNS = ("step", "epoch", "loss", "lr", "gradient_norm")
EPOCHS, STEPS, TENSORBOARD = "epochs.csv", "steps.csv", "tensorboard"


class RunLogs:
    """``epochs.csv``, ``steps.csv``, and ``tensorboard/`` where its package is installed.

    Args:
        folder: The run's folder.
        step: Steps done before; what the logs say of later ones is dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """See the class."""
        self._folder = folder
        self._steps = _open_steps(folder / STEPS, step)
        self._writer = csv.writer(self._steps, lineterminator="\n")
        self._board = _open_board(folder / TENSORBOARD, step)

    def step(self, step: int, epoch: int, loss: float, lr: float, norm: float | None) -> None:
        """Add an optimiser step."""
        self._writer.writerow([step, epoch, repr(loss), repr(lr), "" if norm is None else repr(norm)])
        values = {"loss": loss, "lr": lr} | ({} if norm is None else {"gradient_norm": norm})
        self._scalars("train", values, step)

    def epoch(self, history: Sequence[EpochRecord]) -> None:
        """Write the epochs anew, the last one is new."""
        rows = [asdict(record) for record in history]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self._folder / EPOCHS, text.getvalue().encode())
        self._scalars("validation", history[-1].scalars(), history[-1].step)

    def flush(self) -> None:
        """Hand what was logged to the operating system, before a checkpoint says it happened."""
        self._steps.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Finish the files."""
        self._steps.close()
        if self._board is not None:
            self._board.close()

    def _scalars(self, kind: str, values: dict[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)


class NoLogs:
    """The logs of a process that isn't the main one."""

    def __getattr__(self, name: str) -> Any:
        """Take any call."""
        return lambda *values: None


def _open_steps(path: Path, step: int) -> IO[str]:
    rows: list[list[str]] = []
    if step and path.is_file():
        with path.open(newline="") as file:
            # a killed process may have left half a row
            rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row[0].isdigit()]
    kept = [list(_COLUMNS), *(row for row in rows if int(row[0]) <= step)]
    write_file(path, "".join(",".join(row) + "\n" for row in kept).encode())
    return path.open("a", newline="")


def _open_board(folder: Path, step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        logger.info('no TensorBoard log: pip install "fastlora-triton[train]" brings it')
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
