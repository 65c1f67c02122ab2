"""What an epoch of adaptation gave."""

from dataclasses import dataclass

from fastlora.transfer.training.records import EpochRecord


@dataclass(frozen=True)
class DomainRecord(EpochRecord):
    """What an epoch gave; validation is held-out source pictures.

    Attributes:
        target_accuracy: Where labels exist: an oracle, not to select by.
        target_balanced_accuracy: An oracle too.
        domain_accuracy: Of the method's domain classifier on held-out source and target pictures, each
            domain counted alike; None of methods without one.
        strength: λ.
        a_distance: Proxy A-distance of the features.
        information_maximisation: To select by without target labels, as all that follow; higher is better.
        negative_entropy: See :mod:`fastlora.domain.selection`.
        soft_neighbourhood_density: See there.
        importance_weighted: See there.
        dev: See there.
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
