"""Known shifts are found and measured; bad features are refused."""

from typing import Any

import numpy as np
import pytest
import torch

from fastlora.domain.bound import ben_david_bound
from fastlora.domain.divergence import coral_distance, mmd_distance, proxy_a_distance
from fastlora.domain.selection import (
    deep_embedded_validation,
    importance_weighted_score,
    information_maximisation,
    negative_entropy,
    soft_neighbourhood_density,
)
from fastlora.domain.shift import diagnose_shift, estimate_label_shift
from fastlora.domain.weighting import importance_weights

CENTRES = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])


def draw(shares: Any, count: int, seed: int, shift: float = 0.0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, count, p=shares)
    return CENTRES[labels] + generator.normal(size=(count, 3)) + [0, 0, shift], labels


EVEN = (1 / 3, 1 / 3, 1 / 3)


@pytest.mark.parametrize("shares", [(0.7, 0.2, 0.1), (0.1, 0.1, 0.8), EVEN])
def test_bbse_recovers_known_priors(shares: Any) -> None:
    source, labels = draw(EVEN, 1500, 0)
    target, truth = draw(shares, 1500, 1)
    found = estimate_label_shift(source, labels, target)
    real = np.bincount(truth) / len(truth)
    np.testing.assert_allclose(found.target, real, atol=0.05)
    assert ((found.interval[:, 0] <= real + 0.01) & (real - 0.01 <= found.interval[:, 1])).all()
    assert found.shifted == (shares != EVEN)
    weights = found.weights(labels)
    assert weights.mean() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("shares", "shift", "kind"),
    [
        (EVEN, 0.0, "none"),
        (EVEN, 1.5, "covariate shift"),
        ((0.7, 0.2, 0.1), 0.0, "label shift"),
        ((0.7, 0.2, 0.1), 1.5, "both"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_kind_of_shift_is_told(shares: Any, shift: float, kind: str, seed: int) -> None:
    source, labels = draw(EVEN, 900, 10 + seed)
    target, _ = draw(shares, 900, 20 + seed, shift)
    found = diagnose_shift(source, labels, target, seed=seed)
    assert found.kind == kind, found
    assert found.remedy


def test_importance_weights_move_the_mean() -> None:
    generator = np.random.default_rng(0)
    source, target = generator.normal(size=(4000, 2)), generator.normal(size=(4000, 2)) + np.array([0.7, 0.0])
    found = importance_weights(source, target)
    moved = (source * found.weights[:, None]).mean(axis=0)
    np.testing.assert_allclose(moved, [0.7, 0.0], atol=0.1)
    assert found.weights.mean() == pytest.approx(1.0)
    # exp(0.49) is E[w²] for this shift
    assert found.effective_sample_size == pytest.approx(4000 / np.exp(0.49), rel=0.15)
    far = importance_weights(source, target + np.array([4.0, 0.0]), limit=5.0)
    assert far.clipped > 0
    assert far.effective_sample_size < found.effective_sample_size
    with pytest.raises(ValueError, match="expected limit above 1"):
        importance_weights(source, target, limit=1.0)


def test_the_bound_adds_up() -> None:
    source, labels = draw(EVEN, 600, 0)
    target, truth = draw(EVEN, 600, 1, shift=1.0)
    found = ben_david_bound(source, labels, target, truth)
    assert found.joint_error is not None
    assert found.total == pytest.approx(found.source_error + found.distance.value / 2 + found.joint_error)
    assert found.target_error is not None
    assert found.total is not None
    assert found.target_error <= found.total
    text = str(found)
    for words in ("source error", "observed target error", "no virtue", "no harm", "no guarantee"):
        assert words in text
    blind = ben_david_bound(torch.from_numpy(source), torch.from_numpy(labels), target)
    assert (blind.joint_error, blind.total, blind.target_error) == (None, None, None)
    assert "unknown (needs target labels)" in str(blind)


def test_selection_prefers_the_better_model() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    good = 4 * torch.nn.functional.one_hot(labels, 3) + 0.3 * torch.randn(90, 3, generator=generator)
    poor = torch.randn(90, 3, generator=generator)
    collapsed = torch.tensor([9.0, 0.0, 0.0]).repeat(90, 1)
    for score in (negative_entropy, information_maximisation, soft_neighbourhood_density):
        assert score(good) > score(poor), score
    assert information_maximisation(good) > information_maximisation(collapsed)
    # entropy alone falls for a model that always says the same: known, and why it is never alone
    assert negative_entropy(collapsed) > negative_entropy(good)


def test_dev_has_the_weighted_scores_mean_and_less_variance() -> None:
    generator = np.random.default_rng(0)
    plain, controlled = [], []
    for _ in range(300):
        weights = torch.from_numpy(generator.exponential(size=100))
        losses = 1.0 + 0.1 * torch.from_numpy(generator.normal(size=100))
        plain.append(importance_weighted_score(losses, weights))
        controlled.append(deep_embedded_validation(losses, weights))
    assert np.mean(plain) == pytest.approx(-1.0, abs=0.03)
    assert np.mean(controlled) == pytest.approx(-1.0, abs=0.03)
    assert np.std(controlled) < 0.5 * np.std(plain)
    assert deep_embedded_validation(torch.ones(5), torch.ones(5)) == -1.0


GOOD = np.random.default_rng(0).normal(size=(60, 3))
LABELS = np.arange(60) % 2


@pytest.mark.parametrize("measure", [proxy_a_distance, mmd_distance, coral_distance])
@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        (GOOD, GOOD[:, :2], "expected features of one size, got 3 of the source and 2 of the target"),
        (GOOD, GOOD[:1], "expected at least . examples in target, got 1"),
        (GOOD[:0], GOOD, "expected at least . examples in source, got 0"),
        (np.where(GOOD > 2, np.nan, GOOD), GOOD, "NaN or infinity in . of 60 examples"),
        (GOOD[:, 0], GOOD, r"expected source as features \[n, F\], got shape \(60,\)"),
    ],
)
def test_bad_features_are_refused(measure: Any, source: Any, target: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        measure(source, target)


def test_bad_labels_and_constant_features_are_refused() -> None:
    with pytest.raises(ValueError, match="expected features that vary, got 3 constant ones"):
        proxy_a_distance(np.ones((20, 3)), np.ones((20, 3)))
    for measure in (diagnose_shift, estimate_label_shift, ben_david_bound):
        with pytest.raises(ValueError, match="at least two classes in the source, got only 1"):
            measure(GOOD, np.ones(60), GOOD)
        with pytest.raises(ValueError, match="expected a label for each of 60 examples of source"):
            measure(GOOD, np.ones(59), GOOD)
    with pytest.raises(ValueError, match=r"labels that the source has \(\[0, 1\]\), got \[2\] too"):
        ben_david_bound(GOOD, LABELS, GOOD, LABELS * 2)
    rare = np.zeros(60)
    rare[:3] = 1
    with pytest.raises(ValueError, match="at least 4 examples of each class in the source, got 3 of class 1"):
        diagnose_shift(GOOD, rare, GOOD)
