"""What the tuning tests share: records, and a card that the interpreter can stand in for."""

from dataclasses import replace

import pytest
import torch

from fastlora.ops import tuned_file
from fastlora.tuning.calls import LayerCall, SharedCall
from fastlora_kernels import targets
from fastlora_kernels.choose import tuned
from fastlora_kernels.choose.tuned import Choice, Record, SharedRecord, Winners
from fastlora_kernels.tile import Tile

GPU = "a-card-7"
CALL = LayerCall(rows=40, inputs=32, outputs=48, rank=16, dtype="float16")
SHARED = SharedCall((CALL, replace(CALL, outputs=16), replace(CALL, outputs=32)))
# few large tiles, so that the interpreter is done soon
SMALL_CARD = replace(targets.TARGETS["sm_80"], multiprocessors=2)


def record(
    call: LayerCall = CALL, path: str = "single", tile: Tile | None = None, *, from_host: str | None = None
) -> Record:
    """A record of which ``path`` won in CUDA graphs and, where it is given, ``from_host`` in eager mode."""
    took, second = {"step": {"eager": 2.0}}, Choice("split")
    host = None if from_host is None else Winners(Choice(from_host), second, took)
    return Record(call.shape, call.dtype, call.dropout > 0, Choice(path, tile), second, took, host)


def shared_record(
    in_graph: Choice, from_host: Choice, call: SharedCall = SHARED, *, dropping: bool = False
) -> SharedRecord:
    """A record of layers that share their input."""
    took = {run: {"separate": 2.0} for run in ("graph", "host")}
    return SharedRecord(call.shapes, CALL.dtype, dropping, in_graph, from_host, took)


def pretend(monkeypatch: pytest.MonkeyPatch, target: targets.Target = SMALL_CARD) -> None:
    """Let whatever is here pass for a GPU with tiles of its own; what was pinned before comes back."""
    monkeypatch.setattr(targets, "detect", lambda device: target)
    monkeypatch.setattr(tuned, "_pinned", {})
    monkeypatch.setattr(tuned_file, "gpu_of", lambda device: GPU)


def device() -> torch.device:
    """Where the kernels run: through the interpreter where there is no GPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
