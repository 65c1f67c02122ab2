"""The percentages that are usually quoted for each method, held against computed ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastlora._core.text import readable_percent
from fastlora.transfer.costs.counting import StrategyCost


@dataclass(frozen=True)
class Claim:
    """What is usually said.

    Attributes:
        method: For readers.
        quoted: As it is usually written.
        lowest: Percent from which we call it right: half of a single figure.
        highest: Percent up to which we call it right: twice a single figure.
        strategies: The machine names of what it is about.
    """

    method: str
    quoted: str
    lowest: float
    highest: float
    strategies: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds for one strategy on one model.

    Attributes:
        method: The claim's.
        quoted: The claim's.
        strategy: Machine name.
        title: The strategy for readers.
        percent: What the strategy adds, without a head, in percent of all parameters.
        holds: Whether that is in the claim's range.
    """

    method: str
    quoted: str
    strategy: str
    title: str
    percent: float
    holds: bool


CLAIMS = (
    Claim("LoRA", "about 0.1 %", 0.05, 0.2, ("lora", "lora_attention")),
    Claim("Adapters", "1 to 5 %", 1.0, 5.0, ("adapters",)),
    Claim("Prompts", "about 0.01 %", 0.005, 0.02, ("prompts", "deep_prompts")),
)


def verdicts(costs: Sequence[StrategyCost]) -> list[Verdict]:
    """One for each strategy that a claim is about and that changes more of the model than its head."""
    found = []
    for claim in CLAIMS:
        for cost in costs:
            percent = cost.added_percent
            if cost.strategy in claim.strategies and cost.adapts_body and percent is not None:
                holds = claim.lowest <= percent <= claim.highest
                found.append(Verdict(claim.method, claim.quoted, cost.strategy, cost.title, percent, holds))
    return found


def sentences(found: Sequence[Verdict]) -> list[str]:
    """The verdicts in words, one sentence for each method.

    Example:
        >>> sentences([Verdict("Prompts", "about 0.01 %", "prompts", "Prompts, 10 shallow", 0.0006, False)])
        ['Prompts, usually about 0.01 %: not for 0.00060 % (Prompts, 10 shallow).']
    """
    lines = []
    for claim in CLAIMS:
        ours = [verdict for verdict in found if verdict.method == claim.method]
        right, wrong = ([_one(v) for v in ours if v.holds is holds] for holds in (True, False))
        parts = [
            f"{verb} {', '.join(ones)}" for verb, ones in (("holds for", right), ("not for", wrong)) if ones
        ]
        if parts:
            lines.append(f"{claim.method}, usually {claim.quoted}: {'; '.join(parts)}.")
    return lines


def _one(verdict: Verdict) -> str:
    return f"{readable_percent(verdict.percent)} % ({verdict.title})"
