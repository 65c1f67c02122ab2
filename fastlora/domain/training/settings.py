"""The domain to adapt to, and how."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastlora._core.option_checks import check_count, check_flag, check_positive
from fastlora.domain.names import Weighting

Select = Literal[
    "information_maximisation",
    "negative_entropy",
    "soft_neighbourhood_density",
    "importance_weighted",
    "dev",
    "source_accuracy",
    "last",
]

# of the settings of fine-tuning: what makes no sense here, or has another name
UNUSED = ("data", "test", "mixup", "monitor", "sharding")


@dataclass(frozen=True, kw_only=True)
class DomainSettings:
    """The domain to adapt to, and how; ``FinetuneSettings`` says what is adapted.

    Attributes:
        source: Labelled pictures: a folder with a folder for each class, or a .csv file.
        target: The domain to adapt to: a folder of pictures, class folders with the source's names, or a .csv
            file like the source's; labels are only used to show how good the model is.
        method: source_only, domain_norm, mmd, mmd_norm, jan, jan_norm, coral, mcc, dann, dann_norm, cdan or
            cdan_e; norm stands for statistics of its own for each domain.
        hidden: Width of the layer between the model's features and the classifier: what becomes alike is what
            it gives.
        strength: What λ goes towards: the strength of the reversal, or the weight of other terms.
        gamma: How early λ rises: it is strength · tanh(gamma · progress / 2), with progress from 0 to 1.
        weighting: Weigh the source's pictures: by importance (density ratio of their features), or by the
            class shares that the target seems to have (label_shift).
        select: What chooses the epoch to keep; none of them looks at the target's labels.
        separate_batch_norm: Give every BatchNorm statistics of its own for each domain.

    Raises:
        ValueError: A number out of range or an unknown choice.
    """

    source: str
    target: str
    method: str = "dann"
    hidden: int = 256
    strength: float = 1.0
    gamma: float = 10.0
    weighting: Weighting = "none"
    select: Select = "information_maximisation"
    separate_batch_norm: bool = False

    def __post_init__(self) -> None:
        """Check every value that needs no look at the pictures."""
        for name, choices in (("weighting", Weighting), ("select", Select)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"expected {name} out of {', '.join(get_args(choices))}, got {value!r}")
        for name in ("strength", "gamma"):
            check_positive(name, getattr(self, name), "leave it out for the usual")
        check_count("hidden", self.hidden, "256 is usual")
        check_flag("separate_batch_norm", self.separate_batch_norm)

    def compared(self) -> dict[str, Any]:
        """What a resumed run must share, beside what its data show."""
        names = ("method", "strength", "gamma", "weighting", "select", "separate_batch_norm")
        return {name: getattr(self, name) for name in names}
