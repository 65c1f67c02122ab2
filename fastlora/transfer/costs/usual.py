"""The percentages that are usually quoted for each method, held against computed ones."""

from collections.abc import Sequence
from typing import Any

from fastlora._core.text import readable_percent
from fastlora.transfer.costs.counting import StrategyCost

# method, what is usually said of it, from and up to which percentage that is right (half and twice a single
# figure), and the strategies that it is about
_CLAIMS = (
    ("LoRA", "about 0.1 %", 0.05, 0.2, ("lora", "lora_attention")),
    ("Adapters", "1 to 5 %", 1.0, 5.0, ("adapter",)),
    ("Prompts", "about 0.01 %", 0.005, 0.02, ("prompt_shallow", "prompt")),
)


def verdicts(costs: Sequence[StrategyCost]) -> list[dict[str, Any]]:
    """Whether what is usually said of a method holds for a model, for each strategy that it can have.

    Args:
        costs: What strategies cost on one model.

    Returns:
        Records of ``method``, ``quoted`` (the percentage, as it is usually written), ``strategy``, its
        ``title``, the ``percent`` of all parameters that it adds without a head, and whether that ``holds``.
    """
    return [
        {
            "method": method,
            "quoted": quoted,
            "strategy": cost.strategy,
            "title": cost.title,
            "percent": percent,
            "holds": lowest <= percent <= highest,
        }
        for method, quoted, lowest, highest, strategies in _CLAIMS
        for cost in costs
        if cost.strategy in strategies and (percent := cost.added_percent) is not None
    ]


def sentences(found: Sequence[dict[str, Any]]) -> list[str]:
    """The verdicts in words, one sentence for each method.

    Args:
        found: Records of :func:`verdicts`.
    """
    lines = []
    for method, quoted in dict.fromkeys((each["method"], each["quoted"]) for each in found):
        parts = []
        for verb, holds in (("holds for", True), ("not for", False)):
            ones = [each for each in found if (each["method"], each["holds"]) == (method, holds)]
            shown = (f"{readable_percent(each['percent'])} % ({each['title']})" for each in ones)
            parts += [f"{verb} {', '.join(shown)}"] * bool(ones)
        lines.append(f"{method}, usually {quoted}: {'; '.join(parts)}.")
    return lines
