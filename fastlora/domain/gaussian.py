"""Gaussian kernels between all pairs of a pooled sample, and the discrepancy read off them."""

from collections.abc import Sequence

from torch import Tensor

BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


def squared_distances(points: Tensor) -> Tensor:
    """``[n, n]`` of points ``[n, F]``, never negative."""
    norms = points.square().sum(dim=1)
    return (norms[:, None] + norms[None, :] - 2 * points @ points.T).clamp_min(0)


def gaussian_kernels(distances: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Mean of exp(−d² / 2σ²) over σ² = bandwidth · mean d² of different points.

    Args:
        distances: Squared distances ``[n, n]``.
        bandwidths: The multiples.
    """
    count = len(distances)
    # what is far follows from the sample, and isn't learned
    scale = distances.detach().sum() / max(count * (count - 1), 1)
    scale = scale.clamp_min(1e-12)
    parts = [(-distances / (2 * bandwidth * scale)).exp() for bandwidth in bandwidths]
    return sum(parts[1:], parts[0]) / len(parts)


def mmd_of(kernel: Tensor, source: int) -> Tensor:
    """Squared MMD (biased, Gretton et al. 2012) of the first ``source`` points and the rest."""
    within_source, within_target = kernel[:source, :source].mean(), kernel[source:, source:].mean()
    return within_source + within_target - 2 * kernel[:source, source:].mean()
