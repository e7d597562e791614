"""Match by affine registration of the two volumes (SimpleITK). Trains nothing; a second or so per pair."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.matching.base import Matches, MatchVolume, block_mean, body_mask, checked_points, filled, no_matches

BINS = 32


class AffineMatcher:
    """Registers the target to the source: mutual information, centres of mass first, then all twelve numbers.

    The score of a pair is the correlation of intensities over the common body after registration, 0 when it is negative; a point that
    lands outside the target's body scores 0. Other contrasts correlate less: lower `min_score` for them.

    Args:
        step_mm: Voxel size at which volumes are registered.
        iterations: Steps of the optimiser at each of two scales.
        remember: Registrations kept in memory.
    """

    name = "affine"

    def __init__(self, step_mm: float = 4.0, iterations: int = 100, remember: int = 1024) -> None:
        if step_mm <= 0 or iterations < 1:
            raise RequestError(f"matcher affine: step_mm is {step_mm} and iterations {iterations}; accepted are positive numbers")
        self.step_mm, self.iterations = float(step_mm), int(iterations)
        self._images = lru_cache(maxsize=64)(self._image)
        self._pairs = lru_cache(maxsize=int(remember))(self._register)
        self._lock = threading.Lock()  # registering a pair twice would cost more than waiting

    def match(self, source: MatchVolume, points_mm: np.ndarray, target: MatchVolume) -> Matches:
        """See `base.Matcher`."""
        points = checked_points(points_mm)
        with self._lock:
            matrix, score = self._pairs(source, target)
            _, body_a, edge_a, _ = self._images(source)
            _, body_b, edge_b, _ = self._images(target)
        found = points @ matrix[:3, :3].T + matrix[:3, 3]
        good = _in_body(source, points, body_a, edge_a) & _in_body(target, found, body_b, edge_b)
        result = no_matches(len(points))
        result.points_mm[good] = found[good]
        result.scores[good] = score
        return result

    def _image(self, volume: MatchVolume) -> tuple[Any, np.ndarray, np.ndarray, Any]:
        """Return a coarse SimpleITK image in RAS+ mm, its body (X, Y, Z) bool, the edges of its voxels in mm, and the body's image.

        SimpleITK's frame is only a name here: both images lie in RAS+ alike.
        """
        import SimpleITK as sitk

        sample = volume.read()
        edge = [max(1, round(self.step_mm / s)) for s in volume.spacing_mm]
        mask = body_mask(sample)
        body = filled(block_mean(mask, edge) >= 0.5)
        mean, std = sample.meta.stats.get("mean", 0.0), sample.meta.stats.get("std", 1.0) or 1.0
        painted = np.where(mask, (sample.image[0].astype(np.float32) - mean) / std, np.float32(-2.0))
        # air at one value, so that a dark lung and the room differ no more than they do in the body
        image = sitk.GetImageFromArray(np.ascontiguousarray(block_mean(painted, edge).T))
        inside = sitk.GetImageFromArray(np.ascontiguousarray(body.T.astype(np.uint8)))
        steps = np.asarray(edge) * volume.spacing_mm
        for made in (image, inside):
            made.SetSpacing(steps.tolist())
            made.SetOrigin(volume.to_world(steps[None] / 2)[0].tolist())
            made.SetDirection((_orthogonal(volume.affine[:3, :3] / volume.spacing_mm)).ravel().tolist())
        return image, body, steps, inside

    def _register(self, source: MatchVolume, target: MatchVolume) -> tuple[np.ndarray, float]:
        """Return (4, 4), world mm of the source to world mm of the target, and the score."""
        import SimpleITK as sitk

        fixed, body, _, fixed_body = self._images(source)
        moving, _, _, moving_body = self._images(target)
        if min(fixed.GetSize()) < 4 or min(moving.GetSize()) < 4:
            raise RequestError(
                f"series {source.name} and {target.name}: {fixed.GetSize()} and {moving.GetSize()} voxels of {self.step_mm:g} mm are too few "
                "to register; give the matcher affine a smaller step_mm"
            )
        transform: Any = sitk.AffineTransform(3)
        start = sitk.CenteredTransformInitializer(
            sitk.Cast(fixed_body, sitk.sitkFloat32),
            sitk.Cast(moving_body, sitk.sitkFloat32),
            transform,
            sitk.CenteredTransformInitializerFilter.MOMENTS,
        )
        method = sitk.ImageRegistrationMethod()
        method.SetNumberOfThreads(1)  # sums in another order give other last digits, and a draw must be a pure function
        method.SetMetricAsMattesMutualInformation(BINS)
        method.SetMetricSamplingStrategy(method.NONE)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, self.iterations, 0.6)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(start, inPlace=False)
        method.SetShrinkFactorsPerLevel([2 if min(fixed.GetSize()) >= 16 else 1, 1])
        method.SetSmoothingSigmasPerLevel([1.0, 0.0])
        try:
            found = method.Execute(fixed, moving)
        except RuntimeError:  # no overlap at the start: the volumes stay where their centres are
            found = start
        affine = sitk.AffineTransform(sitk.CompositeTransform(found).GetBackTransform()) if _composite(found) else found
        affine = sitk.AffineTransform(affine)
        linear = np.asarray(affine.GetMatrix()).reshape(3, 3)
        centre, shift = np.asarray(affine.GetCenter()), np.asarray(affine.GetTranslation())
        matrix = np.eye(4)
        matrix[:3, :3] = linear
        matrix[:3, 3] = centre + shift - linear @ centre
        moved = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, affine, sitk.sitkLinear, -2.0)).T
        there = sitk.GetArrayFromImage(sitk.Resample(moving_body, fixed, affine, sitk.sitkNearestNeighbor, 0)).T > 0
        return matrix, _correlation(sitk.GetArrayFromImage(fixed).T, moved, body & there, int(body.sum()))


def _composite(transform: Any) -> bool:
    return "Composite" in str(transform.GetName())


def _correlation(a: np.ndarray, b: np.ndarray, common: np.ndarray, whole: int) -> float:
    """Return the correlation over the common body, 0 where less than a quarter of the body is common."""
    if common.sum() < max(8, whole / 4):
        return 0.0
    x, y = a[common].astype(np.float64), b[common].astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return max(0.0, float((x * y).sum()) / length) if length > 0 else 0.0


def _in_body(volume: MatchVolume, world_mm: np.ndarray, body: np.ndarray, edge_mm: np.ndarray) -> np.ndarray:
    item = volume.to_item(world_mm)
    block = np.clip((item / edge_mm).astype(int), 0, np.asarray(body.shape) - 1)
    within: np.ndarray = volume.inside(item) & body[tuple(block.T)]
    return within


def _orthogonal(direction: np.ndarray) -> np.ndarray:
    """Return the nearest rotation: headers round their direction cosines, and SimpleITK insists."""
    left, _, right = np.linalg.svd(direction)
    return np.asarray(left @ right)
