"""Advice: the usual table's four rows, and reasons that name the numbers they rest on."""

from typing import Any

import pytest

from fastlora.transfer.recommend import recommend_strategy
from fastlora.transfer.strategies import STRATEGIES

CASES: list[tuple[int, int, dict[str, Any], str]] = [
    (120, 5, {}, "feature_extraction"),
    (900, 100, {}, "feature_extraction"),
    (2000, 5, {}, "lora"),
    (2000, 5, {"transformer": False}, "fine_tuning"),
    (2000, 5, {"transformer": False, "domain": "far"}, "lp_ft"),
    (50_000, 10, {}, "lp_ft"),
    (50_000, 10, {"domain": "far"}, "full"),
    (50_000, 10, {"total_parameters": 7_000_000_000}, "lora"),
    (50_000, 10, {"target_is_unlabelled": True}, "domain_adaptation"),
]


@pytest.mark.parametrize(("examples", "classes", "settings", "strategy"), CASES)
def test_advice(examples: int, classes: int, settings: dict[str, Any], strategy: str) -> None:
    advice = recommend_strategy(examples, classes, **settings)
    assert advice.strategy == strategy
    assert {strategy, *advice.alternatives} <= {*STRATEGIES, "domain_adaptation"}
    assert strategy not in advice.alternatives
    assert advice.sources


def test_reasons_name_their_numbers() -> None:
    assert "2,000 examples" in recommend_strategy(2000, 5).reason
    assert "9 a class" in recommend_strategy(900, 100).reason
    assert "104.3 GiB" in recommend_strategy(50_000, 10, total_parameters=7_000_000_000).reason


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one example and two classes, got 0 and 2"):
        recommend_strategy(0, 2)
    with pytest.raises(ValueError, match="'near', 'far' or 'unknown', got 'mars'"):
        recommend_strategy(10, 2, domain="mars")  # type: ignore[arg-type]
