"""How many parameters a model has, how many train, and what training them keeps in memory."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.text import common_name, readable_bytes, readable_percent, text_table
from fastlora.anatomy.names import clean_name, unwrap
from fastlora.parameters._kept import kept_by_module
from fastlora.parameters._stored import Stored, scalars, size, stored_weights

SampleInput = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class ModuleRow:
    """One module that has parameters of its own or keeps something for backward.

    Attributes:
        name: The module's name in the model; empty for the model itself.
        kind: The name of its class.
        parameters: Number of scalars it holds itself, not in its children; shared ones where they come first.
        trainable_parameters: How many of these train.
        kept_bytes: What its forward keeps for backward, children left out; None without a ``sample_input``.
    """

    name: str
    kind: str
    parameters: int
    trainable_parameters: int
    kept_bytes: int | None


@dataclass(frozen=True)
class ParameterReport:
    """What :func:`parameter_report` found; ``print`` it. Sizes are in bytes.

    Attributes:
        total_parameters: Number of scalars, shared ones once.
        trainable_parameters: How many of them train.
        weight_bytes: All parameters, frozen ones included; quantised ones as they are stored.
        buffer_bytes: What else the model carries: BatchNorm's statistics, for example.
        gradient_bytes: One gradient for every trainable parameter, in its dtype.
        optimizer_bytes: What ``torch.optim.AdamW`` keeps: two moments in the parameter's dtype and a step
            count for each trainable parameter.
        kept_bytes: What a forward pass keeps for backward, at most where layers compute together; None
            without a ``sample_input``.
        modules: One row for each module, in the model's order; their numbers add up to those above.
    """

    total_parameters: int
    trainable_parameters: int
    weight_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kept_bytes: int | None
    modules: tuple[ModuleRow, ...]

    @property
    def trainable_percent(self) -> float:
        """Share of the parameters that train, in percent."""
        return 100.0 * self.trainable_parameters / max(self.total_parameters, 1)

    @property
    def training_bytes(self) -> int:
        """Weights, buffers, gradients, optimiser state and, if known, kept activations together."""
        model = self.weight_bytes + self.buffer_bytes
        return model + self.gradient_bytes + self.optimizer_bytes + (self.kept_bytes or 0)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and dictionaries."""
        derived = {"trainable_percent": self.trainable_percent, "training_bytes": self.training_bytes}
        return asdict(self) | derived | {"modules": [asdict(row) for row in self.modules]}

    def __str__(self) -> str:
        """A table of the modules, alike ones added up in one row, and two lines of sums."""
        sizes = {
            "weights": self.weight_bytes,
            "buffers": self.buffer_bytes,
            "gradients": self.gradient_bytes,
            "AdamW": self.optimizer_bytes,
        }
        if self.kept_bytes is not None:
            sizes["kept for backward"] = self.kept_bytes
        listed = " + ".join(f"{name} {readable_bytes(size)}" for name, size in sizes.items())
        heading = ("Module", "Kind", "Parameters", "Trainable", "Kept")
        return (
            f"{text_table([heading, *folded(self.modules)])}\n"
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train "
            f"({readable_percent(self.trainable_percent)} %)\n"
            f"{listed} = {readable_bytes(self.training_bytes)}"
        )


def parameter_report(
    model: nn.Module, *, sample_input: SampleInput | None = None, execute: bool = False
) -> ParameterReport:
    """Count a model's parameters and what training them with AdamW keeps in memory.

    Counting works wherever the parameters are, the meta device included. With a ``sample_input`` a forward
    pass is run too, to see what autograd keeps for backward: on a copy of the model that has shapes and no
    values, so that it costs neither memory nor arithmetic. The model, its gradients, its BatchNorm statistics
    and torch's random state stay as they are. Weights on the meta device are taken to be on the CPU, where
    attention runs fused; elsewhere the copy keeps its device.

    **Covered**: whatever goes through autograd's saved tensors, custom Functions included, as long as it is
    still held when the forward pass ends. A storage counts once, for the module that saved it first, and
    whole, since keeping a slice keeps all of it. What a module computes without calling a layer, such as
    ``nn.MultiheadAttention`` its output projection, is in its own row. The input counts where a layer keeps
    it. Train and eval mode, checkpointing (only what is kept between its segments) and a surrounding
    ``torch.autocast`` (16-bit copies of the weights count as kept) are as they would be.

    **Not covered**: the loss, parameters and buffers (they are counted as such), what a Function keeps as an
    attribute instead of saving it, sparse tensors, and what lives only for a moment: workspaces, the
    activations' gradients, the optimiser's temporaries. A parameter object counts once; two that share
    memory count as two. What layers save by computing together (:func:`fastlora.apply_lora`,
    :func:`fastlora.accelerate`) is not subtracted: in a run that is watched each computes by itself, and of
    such a model the number is an upper bound.

    Args:
        model: Any model. Forward hooks on it run, with the copy's modules.
        sample_input: What ``model`` is called with: a tensor; a shape, for a tensor in the model's dtype; a
            tuple or list of positional arguments; or a mapping of keyword arguments. Tensors may be on the
            meta device. None leaves the forward pass out.
        execute: Run the forward pass with real values on the model's own device, for models that decide by
            them what to compute. Buffers and random state are put back afterwards.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``sample_input`` is nothing to call it with.
        ValueError: A parameter has no shape yet, ``execute`` with weights or inputs on the meta device, or
            the forward pass fails.

    Example:
        >>> import fastlora
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> print(fastlora.parameter_report(model, sample_input=(4, 8)))
        Module  Kind    Parameters  Trainable   Kept
        0       Linear         144        144  128 B
        1       ReLU             0          0  256 B
        2       Linear          34         34    0 B
        178 of 178 parameters train (100 %)
        weights 712 B + buffers 0 B + gradients 712 B + AdamW 1.4 KiB + kept for backward 384 B = 3.2 KiB
    """
    root = unwrap(model)
    check_shapes_known(root)
    kept = None if sample_input is None else kept_by_module(root, sample_input, execute=execute)
    stored = stored_weights(root)
    parameters = list(root.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return ParameterReport(
        total_parameters=sum(scalars(p, stored) for p in parameters),
        trainable_parameters=sum(p.numel() for p in trainable),
        weight_bytes=sum(size(p, stored) for p in parameters),
        buffer_bytes=_bytes(list(root.buffers())),
        gradient_bytes=_bytes(trainable),
        optimizer_bytes=2 * _bytes(trainable) + len(trainable) * _step_bytes(),
        kept_bytes=None if kept is None else sum(kept.values()),
        modules=tuple(_rows(root, kept, stored)),
    )


def check_shapes_known(model: nn.Module) -> None:
    """Refuse a lazy module's parameters, which have no shape before the first batch.

    Raises:
        ValueError: There are some.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"expected parameters with shapes, got {len(lazy)} of lazy modules, {lazy[0]!r} first; "
            "run one batch through the model before"
        )


def _rows(model: nn.Module, kept: Mapping[str, int] | None, stored: dict[int, Stored]) -> list[ModuleRow]:
    seen: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        kept_bytes = None if kept is None else kept.get(name, 0)
        if own or kept_bytes:
            trainable = sum(p.numel() for p in own if p.requires_grad)
            kind = type(module).__name__
            total = sum(scalars(p, stored) for p in own)
            rows.append(ModuleRow(clean_name(name), kind, total, trainable, kept_bytes))
    return rows


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def _step_bytes() -> int:
    # AdamW counts steps in a scalar tensor per parameter: float32, or float64 where that is the default
    return 8 if torch.get_default_dtype() == torch.float64 else 4


def folded(rows: Sequence[ModuleRow]) -> list[tuple[str, ...]]:
    """Name, kind, parameters, trainable ones and kept bytes as text; alike modules in one row, added up."""
    groups: dict[tuple[object, ...], list[ModuleRow]] = {}
    for row in rows:
        pattern = re.sub(r"\d+", "0", row.name)
        key = (pattern, row.kind, row.parameters, row.trainable_parameters, row.kept_bytes)
        groups.setdefault(key, []).append(row)
    return [_line(group) for group in groups.values()]


def _line(group: Sequence[ModuleRow]) -> tuple[str, ...]:
    first, count = group[0], len(group)
    name = common_name([row.name for row in group]) or "(the model)"
    return (
        name + (f" x {count}" if count > 1 else ""),
        first.kind,
        f"{count * first.parameters:,}",
        f"{count * first.trainable_parameters:,}",
        "" if first.kept_bytes is None else readable_bytes(count * first.kept_bytes),
    )
