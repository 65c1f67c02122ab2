"""The usual ways to fine-tune, each applied to a fresh model and counted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora.anatomy import attention as anatomy
from fastlora.anatomy.stages import head as find_head
from fastlora.inject.adapters import apply_adapters
from fastlora.inject.lora import apply_lora
from fastlora.inject.prompts import apply_prompts
from fastlora.parameters.report import ParameterReport, parameter_report
from fastlora.transfer.models.weightless import ModelSpec, build, sample_input


@dataclass(frozen=True)
class TuningSettings:
    """Sizes of what is added to a frozen model.

    Attributes:
        rank: Of every LoRA update.
        adapter_size: Width of every bottleneck.
        prompts: Number of prompt tokens.
    """

    rank: int = 16
    adapter_size: int = 64
    prompts: int = 10


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
        strategy: Machine name.
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


@dataclass(frozen=True)
class Strategy:
    """One way to fine-tune.

    Attributes:
        name: Machine name.
        title: For readers, with ``{rank}``, ``{adapter_size}`` and ``{prompts}`` to fill in.
        adds: Whether it adds parameters to a frozen model.
        apply: Changes the model in place: which parameters train. Returns a remark for readers, maybe empty.
    """

    name: str
    title: str
    adds: bool
    apply: Callable[[nn.Module, ModelSpec, TuningSettings], str]


def apply_strategy(name: str, model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    """Choose what trains in a fresh model, in place.

    Returns:
        A remark for readers, maybe empty.

    Raises:
        ValueError: An unknown strategy, or one that this model can't have.
        TypeError: One that this model can't have.

    Example:
        >>> spec = ModelSpec("resnet18")
        >>> model = build(spec)
        >>> apply_strategy("linear_probe", model, spec, TuningSettings())
        ''
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['fc.weight', 'fc.bias']
    """
    check_strategy(name)
    return STRATEGIES[name].apply(model, spec, settings)


def check_strategy(name: str) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: It is none of :data:`STRATEGIES`.
    """
    if name not in STRATEGIES:
        raise ValueError(f"expected a strategy, one of {', '.join(STRATEGIES)}, got {name!r}")


def compare(
    spec: ModelSpec, settings: TuningSettings, strategies: Iterable[str] | None = None
) -> Iterator[StrategyCost]:
    """Apply each strategy to a model without memory and count; one by one, as they are done.

    Example:
        >>> costs = compare(ModelSpec("resnet18", batch_size=1), TuningSettings(), ["full", "linear_probe"])
        >>> [cost.report.trainable_parameters for cost in costs]
        [11689512, 513000]
    """
    for name in STRATEGIES if strategies is None else strategies:
        strategy, model = STRATEGIES[name], build(spec)
        title = strategy.title.format(**vars(settings))
        try:
            note = apply_strategy(name, model, spec, settings)
        except (TypeError, ValueError) as error:
            yield StrategyCost(name, title, strategy.adds, None, note=f"not possible: {error}")
            continue
        try:
            report = parameter_report(model, sample_input=sample_input(spec, model))
        except ValueError as error:
            report = parameter_report(model)
            note = "; ".join(filter(None, [note, f"kept activations unknown, {error}"]))
        note = "; ".join(filter(None, [note, _uncalled(report)]))
        head_name, head = find_head(model)
        whole = anatomy.trained_whole(head) if strategy.adds else 0
        body = any(row.trainable_parameters and row.name != head_name for row in report.modules)
        yield StrategyCost(name, title, strategy.adds, report, whole, body, note)


def _uncalled(report: ParameterReport) -> str:
    """A warning about LoRA layers whose weights a model reads without calling the layer."""
    lora = [row for row in report.modules if row.kind.startswith("LoRA") and row.trainable_parameters]
    # one that is called keeps S at least
    idle = [row.name for row in lora if row.kept_bytes == 0]
    if not idle:
        return ""
    return f"{len(idle)} of {len(lora)} LoRA layers are never called and train nothing, {idle[0]} first"


def _full(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    _train_only(model, [model])
    return ""


def _last_layers(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    (head_name, head), (name, stage) = find_head(model), anatomy.last_stage(model)
    _train_only(model, [stage, head])
    return f"trains {name} and {head_name}"


def _linear_probe(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    _train_only(model, [find_head(model)[1]])
    return ""


def _lora(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    head_name, head = find_head(model)
    if anatomy.linear_layers(model) == [head]:
        apply_lora(model, target_modules=[head_name], rank=settings.rank)
        return f"{head_name} is the only linear layer; convolutions can't carry LoRA yet"
    apply_lora(model, rank=settings.rank, modules_to_save=_new_head(model, spec))
    return ""


def _lora_attention(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    targets, note = anatomy.attention_targets(model, settings.rank)
    head = _new_head(model, spec)
    apply_lora(model, target_modules=targets, rank=settings.rank, modules_to_save=head)
    return note


def _adapters(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    head = _new_head(model, spec)
    apply_adapters(model, adapter_size=settings.adapter_size, modules_to_save=head)
    return ""


def _prompts(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    apply_prompts(model, num_tokens=settings.prompts, modules_to_save=_new_head(model, spec))
    return ""


def _deep_prompts(model: nn.Module, spec: ModelSpec, settings: TuningSettings) -> str:
    head = _new_head(model, spec)
    apply_prompts(model, num_tokens=settings.prompts, deep=True, modules_to_save=head)
    return ""


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("full", "Full fine-tuning", False, _full),
        Strategy("last_layers", "Last layers", False, _last_layers),
        Strategy("lora", "LoRA r={rank}, all linear", True, _lora),
        Strategy("lora_attention", "LoRA r={rank}, attention", True, _lora_attention),
        Strategy("adapters", "Adapters, {adapter_size} wide", True, _adapters),
        Strategy("prompts", "Prompts, {prompts} shallow", True, _prompts),
        Strategy("deep_prompts", "Prompts, {prompts} deep", True, _deep_prompts),
        Strategy("linear_probe", "Linear probe", False, _linear_probe),
    )
}


def _train_only(model: nn.Module, chosen: Sequence[nn.Module]) -> None:
    model.requires_grad_(False)
    for module in chosen:
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def _new_head(model: nn.Module, spec: ModelSpec) -> list[str] | None:
    # another image task needs another classifier; a language model keeps its vocabulary
    return None if spec.is_text else [find_head(model)[0]]
