"""Methods that make statistics of the features alike."""

from collections.abc import Sequence

from torch import Tensor

from fastlora._core.option_checks import check_positive
from fastlora.domain.gaussian import BANDWIDTHS, gaussian_kernels, mmd_of, squared_distances
from fastlora.domain.methods.alignment import Alignment, Domains


class MultiKernelMMD(Alignment):
    """Squared maximum mean discrepancy of the features (DAN, Long et al. 2015, arXiv 1502.02791).

    With a mean of Gaussian kernels whose bandwidths are multiples of the mean squared distance in the batch.

    Args:
        bandwidths: The multiples.
    """

    def __init__(self, bandwidths: Sequence[float] = BANDWIDTHS) -> None:
        """See the class."""
        super().__init__()
        self.bandwidths = _checked(bandwidths)

    def forward(self, domains: Domains) -> Tensor:
        """The biased estimate, never negative."""
        distances = squared_distances(domains.features())
        return mmd_of(gaussian_kernels(distances, self.bandwidths), len(domains.source_features))


class JointMMD(Alignment):
    """Squared MMD of features and predictions together (JAN, Long et al. 2017, arXiv 1605.06636).

    The kernel is the product of one on the features and one on the class probabilities.

    Args:
        bandwidths: Multiples of the features' mean squared distance that the Gaussian kernels are wide.
        class_bandwidth: Squared distance of class probabilities that counts as far.
    """

    def __init__(self, bandwidths: Sequence[float] = BANDWIDTHS, class_bandwidth: float = 1.68) -> None:
        """See the class."""
        super().__init__()
        self.bandwidths = _checked(bandwidths)
        self.class_bandwidth = check_positive("class_bandwidth", class_bandwidth, "1.68 is the paper's")

    def forward(self, domains: Domains) -> Tensor:
        """The biased estimate, never negative."""
        features = gaussian_kernels(squared_distances(domains.features()), self.bandwidths)
        apart = squared_distances(domains.logits().softmax(dim=1))
        classes = (-apart / (2 * self.class_bandwidth)).exp()
        return mmd_of(features * classes, len(domains.source_features))


class DeepCORAL(Alignment):
    """Squared distance of the covariances (Sun & Saenko 2016, arXiv 1607.01719)."""

    def forward(self, domains: Domains) -> Tensor:
        """‖C_S − C_T‖² / 4F²."""
        size = domains.source_features.shape[1]
        difference = covariance(domains.source_features) - covariance(domains.target_features)
        return difference.square().sum() / (4 * size**2)


def _checked(bandwidths: Sequence[float]) -> tuple[float, ...]:
    if isinstance(bandwidths, str) or not isinstance(bandwidths, Sequence) or not bandwidths:
        raise TypeError(f"expected bandwidths as a list of numbers, got {bandwidths!r}; leave it out, say")
    return tuple(check_positive("a bandwidth", each, "1.0 is the mean distance") for each in bandwidths)


def covariance(features: Tensor) -> Tensor:
    """``[F, F]`` of ``[n, F]``, divided by n − 1."""
    centred = features - features.mean(dim=0)
    return centred.T @ centred / max(len(features) - 1, 1)
