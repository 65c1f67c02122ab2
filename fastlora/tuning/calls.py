"""Which layer calls to tune: named in a JSON file, or those that a model makes."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    def shapes(self) -> tuple[Shape]:
        """The same, as of several layers."""
        return (self.shape,)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The layer's dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class SharedCall:
    """One call of LoRA linear layers that share their input.

    Attributes:
        layers: A call of each, with dense weights and the same rows, inputs, dropout and dtype.

    Raises:
        ValueError: There are fewer than two layers, or they differ in one of these.
    """

    layers: tuple[LayerCall, ...]

    def __post_init__(self) -> None:
        """Check every layer."""
        # all but what may differ
        alike = {replace(layer, outputs=1, rank=1) for layer in self.layers}
        if len(self.layers) < 2 or len(alike) > 1 or self.layers[0].weight is not None:
            raise ValueError(
                "expected at least two layers with dense weights and the same rows, inputs, dropout and "
                f"dtype, got {self.layers!r}"
            )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """As the kernels' plans have them."""
        return tuple([layer.shape for layer in self.layers])


Call = LayerCall | SharedCall


def read_calls(path: Path) -> list[Call]:
    """The calls of a JSON file: a list of objects with the fields of :class:`LayerCall`.

    An object may also have ``sharing``, a list of outputs of further layers on the same input: it stands for
    each of these layers alone, and for all of them together. Those that share come last.

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
    calls = [
        call for number, entry in enumerate(entries, 1) for call in _calls(entry, f"entry {number} of {path}")
    ]
    return _in_order(calls)


def calls_of_model(
    model: nn.Module,
    batch: Tensor | Mapping[str, Tensor],
    *,
    rank: int,
    dropout: float,
    dtype: str,
    weight: Stored | None = None,
) -> list[Call]:
    """The different calls of a model's LoRA layers, ``all-linear``, on one batch.

    With dense weights also those that share their input as :func:`fastlora.accelerate` finds them, last.

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
    made: dict[nn.Module, list[LayerCall]] = {}

    def note(module: nn.Module, op: Callable[..., Tensor], x: Tensor, frozen: Tensor, *rest: Any) -> Tensor:
        sizes = (x.shape[:-1].numel(), frozen.shape[1], frozen.shape[0])
        made.setdefault(module, []).append(LayerCall(*sizes, rank, dropout, dtype, weight))
        return op(x, frozen, *rest)

    for module in model.modules():
        if isinstance(module, LoRAModule):
            # all linear layers and attentions go through it
            vars(module)["_lora_linear"] = functools.partial(note, module, module._lora_linear)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    alone = sorted(
        {call for calls in made.values() for call in calls},
        key=lambda call: (call.rows, call.inputs, call.outputs),
    )
    return _in_order([*alone, *(_sharing(model, made) if weight is None else ())])


def _sharing(model: nn.Module, made: Mapping[nn.Module, Sequence[LayerCall]]) -> list[SharedCall]:
    """Calls of the layers that their module's forward calls with one variable.

    Rows differ where one of them is called more often, with something else: it then shares nothing.
    """
    from fastlora.nn import LoRALinear
    from fastlora.together.sources import sharing

    return [
        SharedCall(layers)
        for module in model.modules()
        for names in sharing(module, LoRALinear)
        # as often as each of them was called
        for layers in zip(*(made.get(module.get_submodule(name), ()) for name in names), strict=False)
        if len({layer.rows for layer in layers}) == 1
    ]


def _in_order(calls: Iterable[Call]) -> list[Call]:
    """Each once, and those that share last: layers by themselves are among their candidates."""
    return sorted(dict.fromkeys(calls), key=lambda call: isinstance(call, SharedCall))


def _calls(entry: Any, where: str) -> list[Call]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object as {where}, got {entry!r}")
    _refuse_unknown(entry, [*LayerCall.__dataclass_fields__, "sharing"], where)
    missing = [name for name in ("rows", "inputs", "outputs") if name not in entry]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in {where}, got {dict(entry)!r}")
    own, further = dict(entry), entry.get("sharing", [])
    own.pop("sharing", None)
    if not isinstance(further, list):
        raise ValueError(f"expected a list of outputs as sharing in {where}, got {further!r}")
    try:
        first = LayerCall(**own)
        layers = [first, *(replace(first, outputs=outputs) for outputs in further)]
        return [*layers, *([SharedCall(tuple(layers))] if further else [])]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _refuse_unknown(entry: Iterable[str], fields: Iterable[str], where: str) -> None:
    for name in entry:
        if name not in fields:
            hint = did_you_mean(name, fields, count=1)
            raise ValueError(f"{hint}expected only {', '.join(fields)} in {where}, got {name!r}")
