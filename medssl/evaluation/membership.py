"""How well can one tell from an encoder whose images it was trained on: the area under the ROC curve of a membership score.

The score of an image is how alike the encoder makes several views of it: an encoder that has learnt its training images by heart maps their
views closer together than those of images it has not seen. It needs nothing but the encoder, so anybody who has the exported weights and
candidate images can compute it. 0.5 is chance; it bounds no stronger attack.

Reference:
    Liu, Jia, Qu and Gong 2021, "EncoderMI: Membership Inference against Pre-trained Encoders in Contrastive Learning" (arXiv 2108.11023),
    the threshold attack of section 4.3: mean cosine similarity of the views of an image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.seeding import counter_rng

SCORE = "mean cosine similarity of the features of the views of an image (EncoderMI-T)"
MIN_PATIENTS = 5  # on either side: an interval over fewer says nothing, and one patient could be told from it
FIELDS = ("auc", "low", "high", "members", "non_members", "score")


def view_similarity(features: np.ndarray) -> np.ndarray:
    """Return for every image the mean cosine similarity of all pairs of its views.

    Args:
        features: (V, N, E), the same N images in V views, V at least 2.

    Returns:
        (N,) from -1 to 1.

    Raises:
        RequestError: There is one view, or the views of every image are one and the same.
    """
    views = len(features)
    if views < 2:
        raise RequestError(f"membership: {views} view(s) of an image; two or more are compared; ask for more views")
    if (features == features[:1]).all():
        raise RequestError(
            "membership: all views of an image give the same features; the views of the recipe draw nothing at random, so there is "
            "nothing to compare; give them augmentation"
        )
    unit = features.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=2, keepdims=True), 1e-12)
    total: np.ndarray = (unit.sum(axis=0) ** 2).sum(axis=1) - (unit**2).sum(axis=(0, 2))  # of all ordered pairs of two views
    return total / (views * (views - 1))


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Return the probability that a member scores above a non-member, ties counted half (Mann-Whitney)."""
    first, second = np.asarray(members, dtype=np.float64), np.sort(np.asarray(others, dtype=np.float64))
    below = np.searchsorted(second, first, side="left")
    ties = np.searchsorted(second, first, side="right") - below
    return float((below + 0.5 * ties).sum() / (len(first) * len(second)))


def membership_auc(
    members: Iterable[tuple[str, float]],
    others: Iterable[tuple[str, float]],
    *,
    samples: int = 2000,
    seed: int = 0,
    score: str = SCORE,
) -> dict[str, Any]:
    """Return the AUC of membership scores with its 95 % interval, patients resampled on both sides.

    Args:
        members: (patient, score) of images that the encoder was trained on; higher means "more like a member".
        others: The same of images of patients that it has not seen.
        samples: Bootstrap samples.
        seed: Seed of these.
        score: What the score is, in words.

    Returns:
        `auc`, `low`, `high`, numbers of patients (`members`, `non_members`) and of images, `score`, `samples`, `seed`.

    Raises:
        RequestError: Fewer than `MIN_PATIENTS` patients on a side, a patient on both sides, or a score that is no number.
    """
    sides = [_by_patient(side) for side in (members, others)]
    shared = sides[0].keys() & sides[1].keys()
    if shared:
        raise RequestError(
            f"membership: {len(shared)} patient(s) have images on both sides; a held-out patient must be one that the encoder has not seen"
        )
    if min(map(len, sides)) < MIN_PATIENTS:
        raise RequestError(
            f"membership: {len(sides[0])} trained and {len(sides[1])} held-out patients; at least {MIN_PATIENTS} of each are needed"
        )
    if not all(np.isfinite(scores).all() for side in sides for scores in side.values()):
        raise RequestError("membership: a score is no number; check the features of the encoder")
    rng = counter_rng(seed, "membership", "bootstrap")
    lists = [list(side.values()) for side in sides]
    drawn = np.empty(samples)
    for number in range(samples):
        again = [[side[i] for i in rng.integers(len(side), size=len(side))] for side in lists]
        drawn[number] = auc(np.concatenate(again[0]).tolist(), np.concatenate(again[1]).tolist())
    low, high = np.quantile(drawn, [0.025, 0.975])
    whole = [np.concatenate(side).tolist() for side in lists]
    return {
        "auc": auc(*whole),
        "low": float(low),
        "high": float(high),
        "members": len(lists[0]),
        "non_members": len(lists[1]),
        "member_images": len(whole[0]),
        "non_member_images": len(whole[1]),
        "score": score,
        "samples": samples,
        "seed": seed,
    }


def _by_patient(side: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for patient, score in side:
        result.setdefault(patient, []).append(score)
    return result


def read_membership(path: Path | str) -> dict[str, Any]:
    """Read the JSON file of a membership result, and keep what an export may carry: numbers, no patients.

    Raises:
        RequestError: It is no such file, or its numbers cannot be.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as err:
        raise RequestError(f"{path} is no membership result ({err}); write one with `medssl membership`") from err
    return checked(content, str(path))


def checked(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a membership result that go into a manifest, after checking them."""
    missing = [name for name in FIELDS if not isinstance(content, Mapping) or name not in content]
    if missing:
        raise RequestError(f"{where} lacks {', '.join(missing)}; a membership result has {', '.join(FIELDS)}")
    numbers = [content[name] for name in ("low", "auc", "high")]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not plain or not 0 <= numbers[0] <= numbers[2] <= 1 or not 0 <= numbers[1] <= 1:
        raise RequestError(f"{where}: low, auc and high are {numbers}; accepted: numbers from 0 to 1, low not above high")
    kept = (*FIELDS, "member_images", "non_member_images", "samples", "seed", "weights_hash")
    return {name: content[name] for name in kept if name in content}
