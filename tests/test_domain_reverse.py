"""Reverse validation: high where the way back is found, low where the classes were lost on the way."""

import numpy as np
import pytest

from fastlora.domain.adaptation import AdaptSettings
from fastlora.domain.reverse import reverse_validation
from tests.test_domain_adaptation import turned

SHORT = AdaptSettings(epochs=6, batch_size=16, hidden=32, lr=1e-2)


def test_a_shift_that_normalisation_undoes_is_found_by_its_way_back() -> None:
    source, labels = turned(0)
    target, _ = turned(1, shift=3.0)
    plain, normal = (
        reverse_validation(source, labels, target, name, SHORT) for name in ("source_only", "domain_norm")
    )
    assert normal > 0.95
    assert plain < normal - 0.2


def test_one_class_on_the_target_scores_its_share() -> None:
    source, labels = turned(0)
    # all of the target lies far on the side of class 1
    target = np.random.default_rng(2).normal(size=(40, 6)) * 0.1 + [30.0, 0, 0, 0, 0, 0]
    assert reverse_validation(source, labels, target, "source_only", SHORT) == pytest.approx(0.5)


def test_held_out_source_labels_are_not_used() -> None:
    source, labels = turned(0)
    target, _ = turned(1, shift=0.2)
    shuffled = np.random.default_rng(3).permutation(labels)
    # where labels mean nothing, the way back cannot find them
    assert 0.25 < reverse_validation(source, shuffled, target, "source_only", SHORT) < 0.75


def test_bad_input_is_refused() -> None:
    source, labels = turned(0)
    with pytest.raises(ValueError, match="at least two classes in the source"):
        reverse_validation(source, labels * 0, source, "mmd", SHORT)
    with pytest.raises(ValueError, match="did you mean 'mmd'"):
        reverse_validation(source, labels, source, "mdm", SHORT)
    with pytest.raises(ValueError, match="expected weighting out of none, importance, label_shift"):
        AdaptSettings(weighting="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected epochs >= 1, got 0"):
        AdaptSettings(epochs=0)
