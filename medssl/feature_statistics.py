"""Numbers that show a collapse, from features alone: no labels, no pairs of images but for `alignment`.

Used by the monitors of a run and by the evaluation tables, so it depends on torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def feature_std(features: Tensor) -> Tensor:
    """Return the standard deviation over images of each L2-normalised feature, averaged over the E features.

    Near 1 / sqrt(E) when directions spread evenly over the sphere, 0 when all images have one feature.

    Args:
        features: (N, E), N of 2 or more.

    Returns:
        Scalar, 0 to about 1 / sqrt(E).

    Reference:
        Chen and He 2021 (SimSiam), section 4.1.
    """
    return _normalised(features).std(dim=0, correction=0).mean()


def effective_rank(features: Tensor, eps: float = 1e-7) -> Tensor:
    """Return RankMe, the exponential of the entropy of the singular values of the feature matrix.

    Between 1 (all features on one line) and min(N, E) (all singular values equal). Compare only values of equal N.

    Args:
        features: (N, E), not centred, as in the paper.
        eps: Added to each share of a singular value.

    Returns:
        Scalar.

    Reference:
        Garrido, Balestriero, Najman and LeCun 2023 (RankMe), equation 1.
    """
    singular = torch.linalg.svdvals(_at_least_float32(features))
    tiny = torch.finfo(singular.dtype).tiny
    shares = singular / singular.sum().clamp_min(tiny) + eps
    return torch.exp(-(shares * shares.log()).sum())


def alignment(a: Tensor, b: Tensor, alpha: float = 2.0) -> Tensor:
    """Return the mean distance between the normalised features of two views of the same images; 0 is best.

    Args:
        a: (N, E) features of one view.
        b: (N, E) features of the other view, in the same order.
        alpha: Power of the distance.

    Returns:
        Scalar, 0 to 2 ** alpha.

    Reference:
        Wang and Isola 2020, section 4.1.1.
    """
    distance: Tensor = torch.linalg.vector_norm(_normalised(a) - _normalised(b), dim=1)
    return distance.pow(alpha).mean()


def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    """Return the log of the mean Gaussian potential of pairs of normalised features; low is uniform, 0 is collapse.

    Args:
        features: (N, E), N of 2 or more.
        t: Sharpness of the potential.

    Returns:
        Scalar, -4 t to 0.

    Reference:
        Wang and Isola 2020, section 4.1.2; pairs i < j, as in the authors' listing.
    """
    return torch.pdist(_normalised(features)).pow(2).mul(-t).exp().mean().log()


def _at_least_float32(features: Tensor) -> Tensor:
    """Half precision has neither the range nor the kernels for these sums."""
    return features if features.dtype == torch.float64 else features.float()


def _normalised(features: Tensor) -> Tensor:
    return functional.normalize(_at_least_float32(features), dim=1)
