"""What an epoch of adaptation gave."""

from dataclasses import dataclass

from fastlora.transfer.training.records import EpochRecord


@dataclass(frozen=True)
class DomainRecord(EpochRecord):
    """What an epoch gave; validation is held-out source pictures.

    Attributes:
        target_accuracy: Accuracy on the target where labels exist, 0 to 1: an oracle, not to select by.
        target_balanced_accuracy: Mean over the classes of the target, where labels exist: an oracle too.
        domain_accuracy: How often the method's domain classifier is right on held-out source and target
            pictures, each domain counted alike, 0 to 1; None of methods without one.
        strength: λ, the strength of the reversal or the weight of the method's term.
        a_distance: Proxy A-distance of the features, 0 (alike) to 2.
        information_maximisation: How confident and diverse the answers on the target are; it and the scores
            below need no target labels, and higher is better (:mod:`fastlora.domain.selection`).
        negative_entropy: How confident the answers on the target are.
        soft_neighbourhood_density: How near the answers on the target lie to each other (SND).
        importance_weighted: Minus the source's held-out loss, weighted to look like the target (IWV).
        dev: Minus that loss with a control variate (deep embedded validation).
    """

    target_accuracy: float | None
    target_balanced_accuracy: float | None
    domain_accuracy: float | None
    strength: float
    a_distance: float
    information_maximisation: float
    negative_entropy: float
    soft_neighbourhood_density: float
    importance_weighted: float
    dev: float

    def score(self, monitor: str) -> tuple[float, float]:
        """Of a name in :data:`fastlora.domain.training.settings.Select`; higher is better."""
        if monitor == "last":
            return float(self.epoch), 0.0
        return float(getattr(self, monitor.replace("source_", ""))), -self.validation_loss

    def scalars(self) -> dict[str, float]:
        """What a log draws over the epochs."""
        mine = set(vars(self)) - set(EpochRecord.__dataclass_fields__)
        own = {name: value for name, value in vars(self).items() if name in mine and value is not None}
        return super().scalars() | own
