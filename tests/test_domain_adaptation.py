"""Adaptation on features: every method trains, a seed gives the same bits, and what is reported is true."""

from typing import Any

import numpy as np
import pytest
import torch

from fastlora.domain.adaptation import METHODS, AdaptSettings, adapt_features
from fastlora.domain.registry import find_method

SHORT = AdaptSettings(epochs=6, batch_size=16, hidden=32, lr=1e-2)


def turned(seed: int, count: int = 200, shift: float = 0.0) -> tuple[Any, Any]:
    """Two classes along the first axis; the target is moved along it and scaled."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    points = generator.normal(size=(count, 6)) * 0.4
    points[:, 0] += 2.0 * labels - 1.0
    return points * (1 + shift) + shift, labels


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_reports(method: str) -> None:
    source, labels = turned(0)
    target, truth = turned(1, shift=0.2)
    result = adapt_features(source, labels, target, method, SHORT, target_labels=truth)
    last = result.history[-1]
    assert len(result.history) == 6
    assert last.source_accuracy > 0.9
    assert last.target_accuracy == (result.target_logits.argmax(1).numpy() == truth).mean()
    assert last.target_accuracy is not None
    assert last.target_accuracy > 0.8
    assert last.strength == pytest.approx(1.0, abs=1e-3)
    assert (last.domain_accuracy is not None) == method.startswith(("dann", "cdan"))
    for score in last.scores:
        assert result.selected(score) in result.history


def test_the_same_seed_gives_the_same_bits() -> None:
    source, labels = turned(0)
    target, _ = turned(1, shift=0.2)
    logits = []
    for seed in (0, 0, 1):
        torch.rand(1)
        settings = AdaptSettings(epochs=2, hidden=16, seed=seed)
        logits.append(adapt_features(source, labels, target, "dann", settings).target_logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_normalisation_by_domain_undoes_an_affine_shift() -> None:
    source, labels = turned(0)
    target, truth = turned(1, shift=3.0)
    plain, normal = (
        adapt_features(source, labels, target, name, SHORT, target_labels=truth).history[-1].target_accuracy
        for name in ("source_only", "domain_norm")
    )
    assert plain is not None
    assert normal is not None
    assert normal > 0.95 > plain


def test_without_target_labels_there_is_no_oracle() -> None:
    source, labels = turned(0)
    history = adapt_features(source, labels, turned(1)[0], "mmd", SHORT).history
    assert {epoch.target_accuracy for epoch in history} == {None}


def test_bad_input_is_refused() -> None:
    source, labels = turned(0)
    with pytest.raises(ValueError, match=r"did you mean 'dann' or 'dann_norm'\?|did you mean 'dann'"):
        find_method("dan")
    with pytest.raises(ValueError, match=r"labels that the source has \(\[0, 1\]\), got \[2\] too"):
        adapt_features(source, labels, source, "mmd", SHORT, target_labels=labels * 2)
    with pytest.raises(ValueError, match="at least two classes in the source"):
        adapt_features(source, labels * 0, source, "mmd", SHORT)
    broken = source.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 200 examples"):
        adapt_features(source, labels, broken, "mmd", SHORT)
