"""Which layer calls to tune: named in a JSON file, or those that a model makes."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastlora._core.backend import KERNEL_DTYPES
from fastlora._core.files import read_json
from fastlora._core.words import did_you_mean
from fastlora_kernels.choose.quantised import Stored
from fastlora_kernels.tile import Shape


@dataclass(frozen=True)
class LayerCall:
    """One call of a LoRA linear layer.

    Attributes:
        rows: Rows of the input: everything but the last dimension.
        inputs: Input features.
        outputs: Output features.
        rank: Rank of the update.
        dropout: Probability.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        weight: How the frozen weight is stored: ``nf4``, ``int8``, ``fp8`` or ``fp8-rows``; None: dense.

    Raises:
        ValueError: A size is below 1, or the dropout, dtype or weight is none of these.
    """

    rows: int
    inputs: int
    outputs: int
    rank: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"
    weight: Stored | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("rows", "inputs", "outputs", "rank"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {size!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected a dropout probability in [0, 1), got {self.dropout!r}")
        if self.dtype not in KERNEL_DTYPES:
            raise ValueError(f"expected a dtype out of {', '.join(KERNEL_DTYPES)}, got {self.dtype!r}")
        if self.weight is not None and self.weight not in get_args(Stored):
            raise ValueError(f"expected a weight out of {', '.join(get_args(Stored))}, got {self.weight!r}")

    @property
    def shape(self) -> Shape:
        """As the kernels' plans have it."""
        aligned = self.inputs % 16 == 0 and self.outputs % 16 == 0
        return Shape(self.rows, self.outputs, self.inputs, self.rank, aligned=aligned)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The layer's dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def read_calls(path: Path) -> list[LayerCall]:
    """The calls of a JSON file: a list of objects with the fields of :class:`LayerCall`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such list; the message names the entry.
    """
    expected = 'expected a JSON list such as [{"rows": 8192, "inputs": 4096, "outputs": 4096, "rank": 16}]'
    try:
        entries = read_json(path)
    except OSError as error:
        raise FileNotFoundError(f"{expected} at {path}, got no file ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{expected}; {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{expected} in {path}, got {type(entries).__name__}")
    return [_call(entry, f"entry {number} of {path}") for number, entry in enumerate(entries, 1)]


def calls_of_model(
    model: nn.Module,
    batch: Tensor | Mapping[str, Tensor],
    *,
    rank: int,
    dropout: float,
    dtype: str,
    weight: Stored | None = None,
) -> list[LayerCall]:
    """The different calls of a model's LoRA layers, ``all-linear``, on one batch.

    Args:
        model: Module that takes LoRA here; weights may be on the meta device.
        batch: Input of the model, or inputs by name.
        rank: Rank of every update.
        dropout: Probability, noted in the calls.
        dtype: Noted in the calls: ``bfloat16``, ``float16`` or ``float32``.
        weight: Noted in the calls: how frozen weights are stored, None for dense ones.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastlora.inject.lora import apply_lora
    from fastlora.nn import LoRAModule

    model = apply_lora(model, rank=rank)
    seen: dict[LayerCall, None] = {}

    def note(op: Callable[..., Tensor], x: Tensor, frozen: Tensor, *rest: Any) -> Tensor:
        rows = x.shape[:-1].numel()
        seen[LayerCall(rows, frozen.shape[1], frozen.shape[0], rank, dropout, dtype, weight)] = None
        return op(x, frozen, *rest)

    for module in model.modules():
        if isinstance(module, LoRAModule):
            # all linear layers and attentions go through it
            vars(module)["_lora_linear"] = functools.partial(note, module._lora_linear)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    return sorted(seen, key=lambda call: (call.rows, call.inputs, call.outputs))


def _call(entry: Any, where: str) -> LayerCall:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object as {where}, got {entry!r}")
    fields = LayerCall.__dataclass_fields__
    _refuse_unknown(entry, fields, where)
    missing = [name for name in ("rows", "inputs", "outputs") if name not in entry]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in {where}, got {dict(entry)!r}")
    try:
        return LayerCall(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _refuse_unknown(entry: Iterable[str], fields: Iterable[str], where: str) -> None:
    for name in entry:
        if name not in fields:
            hint = did_you_mean(name, fields, count=1)
            raise ValueError(f"{hint}expected only {', '.join(fields)} in {where}, got {name!r}")
