"""The percentages that are usually quoted for each method, held against computed ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastlora._core.text import readable_percent
from fastlora.transfer.costs.counting import StrategyCost

# method, what is usually said of it, from and up to which percentage that is right (half and twice a single
# figure), and the strategies that it is about
_CLAIMS = (
    ("LoRA", "about 0.1 %", 0.05, 0.2, ("lora", "lora_attention")),
    ("Adapters", "1 to 5 %", 1.0, 5.0, ("adapter",)),
    ("Prompts", "about 0.01 %", 0.005, 0.02, ("prompt_shallow", "prompt")),
)


@dataclass(frozen=True)
class Verdict:
    """Whether what is usually said holds for one strategy on one model.

    Attributes:
        method: What it is said of.
        quoted: The percentage, as it is usually written.
        strategy: Name of the strategy.
        title: The strategy for readers.
        percent: What the strategy adds, without a head, in percent of all parameters.
        holds: Whether that is what is said.
    """

    method: str
    quoted: str
    strategy: str
    title: str
    percent: float
    holds: bool


def verdicts(costs: Sequence[StrategyCost]) -> list[Verdict]:
    """One for each strategy that something is usually said of and that the model can have.

    Args:
        costs: Of one model.
    """
    return [
        Verdict(method, quoted, cost.strategy, cost.title, percent, lowest <= percent <= highest)
        for method, quoted, lowest, highest, strategies in _CLAIMS
        for cost in costs
        if cost.strategy in strategies and (percent := cost.added_percent) is not None
    ]


def sentences(found: Sequence[Verdict]) -> list[str]:
    """The verdicts in words, one sentence for each method.

    Args:
        found: See :func:`verdicts`.

    Example:
        >>> sentences([Verdict("Prompts", "about 0.01 %", "prompt", "Prompts, 10 deep", 0.11, False)])
        ['Prompts, usually about 0.01 %: not for 0.11 % (Prompts, 10 deep).']
    """
    lines = []
    for method, quoted in dict.fromkeys((verdict.method, verdict.quoted) for verdict in found):
        parts = []
        for verb, holds in (("holds for", True), ("not for", False)):
            ones = [verdict for verdict in found if (verdict.method, verdict.holds) == (method, holds)]
            shown = (f"{readable_percent(one.percent)} % ({one.title})" for one in ones)
            parts += [f"{verb} {', '.join(shown)}"] * bool(ones)
        lines.append(f"{method}, usually {quoted}: {'; '.join(parts)}.")
    return lines
