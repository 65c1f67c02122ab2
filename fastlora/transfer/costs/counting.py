"""Ways to fine-tune a model, each applied to a fresh one and counted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastlora.anatomy.stages import head as find_head
from fastlora.parameters import ParameterReport, parameter_report
from fastlora.transfer.costs.quantised import saved_bytes
from fastlora.transfer.costs.rows import ROWS, CostSettings, find_row
from fastlora.transfer.models.weightless import ModelSpec, build, sample_input


@dataclass(frozen=True)
class Measured:
    """What training took.

    Attributes:
        peak_bytes: Peak memory of two steps over an idle process.
        step_seconds: One further step: forward, backward and optimiser.
    """

    peak_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class StrategyCost:
    """What one way to fine-tune costs.

    Attributes:
        strategy: Name of its row in ``rows.ROWS``.
        title: Name for readers.
        adds: Whether it adds parameters to a frozen model.
        report: The model's numbers, or None where the strategy can't be applied.
        head_parameters: Scalars of a head that trains whole beside what the strategy adds.
        adapts_body: Whether anything but the head trains.
        note: What is special about this model, or why the strategy can't be applied; may be empty.
        measured: Peak memory and time of real training steps, or None if not measured.
    """

    strategy: str
    title: str
    adds: bool
    report: ParameterReport | None
    head_parameters: int = 0
    adapts_body: bool = False
    note: str = ""
    measured: Measured | None = None

    @property
    def added_percent(self) -> float | None:
        """Share of all parameters that the strategy itself added, without the head, in percent."""
        if self.report is None or not self.adds:
            return None
        added = self.report.trainable_parameters - self.head_parameters
        return 100.0 * added / max(self.report.total_parameters, 1)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers, strings and lists; without a report only names, note and ``null``."""
        own = {
            "strategy": self.strategy,
            "title": self.title,
            "note": self.note,
            "head_parameters": self.head_parameters,
            "adapts_body": self.adapts_body,
            "added_percent": self.added_percent,
            "measured_bytes": None if self.measured is None else self.measured.peak_bytes,
            "measured_step_seconds": None if self.measured is None else self.measured.step_seconds,
        }
        return own | {"report": None if self.report is None else self.report.as_json()}


def compare(
    spec: ModelSpec, settings: CostSettings, rows: Iterable[str] | None = None
) -> Iterator[StrategyCost]:
    """Apply each strategy to a model without memory and count; one by one, as they are done.

    Args:
        spec: The model and its batch.
        settings: Sizes of what is added.
        rows: Names out of ``rows.ROWS``; None stands for all of them.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> spec = ModelSpec("resnet18", batch_size=1)
        >>> costs = compare(spec, CostSettings(), ["full", "feature_extraction"])
        >>> [cost.report.trainable_parameters for cost in costs]
        [11689512, 513000]
    """
    for row in map(find_row, ROWS if rows is None else rows):
        model, title, adds = build(spec), row.title(settings), row.strategy.adds
        try:
            remark = row.apply(model, settings, new_head=not spec.is_text)
        except ValueError as error:
            yield StrategyCost(row.name, title, adds, None, note=f"not possible: {error}")
            continue
        notes = [remark]
        # what is frozen now goes to eval mode
        model.train()
        try:
            report = parameter_report(model, sample_input=sample_input(spec, model))
        except ValueError as error:
            report = parameter_report(model)
            notes.append(f"kept activations unknown, {error}")
        notes.append(_uncalled(report))
        head_name, head = find_head(model)
        if settings.weight is not None:
            saved = saved_bytes(model, head, settings.weight)
            report = replace(report, weight_bytes=report.weight_bytes - saved)
        whole = sum(p.numel() for p in head.parameters() if p.requires_grad) if adds else 0
        body = any(module.trainable_parameters and module.name != head_name for module in report.modules)
        yield StrategyCost(row.name, title, adds, report, whole, body, "; ".join(filter(None, notes)))


def _uncalled(report: ParameterReport) -> str:
    """A warning about LoRA layers whose weights a model reads without calling the layer."""
    lora = [row for row in report.modules if row.kind.startswith("LoRA") and row.trainable_parameters]
    # one that is called keeps S at least
    idle = [row.name for row in lora if row.kept_bytes == 0]
    if not idle:
        return ""
    return f"{len(idle)} of {len(lora)} LoRA layers are never called and train nothing, {idle[0]} first"
