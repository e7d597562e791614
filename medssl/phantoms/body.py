"""Draw a labelled, anatomy-like torso: no patient, no download, tens of milliseconds.

A phantom is a tapered body with skin, fat and muscle, a spine, six labelled organs and unlabelled decoys (stomach,
psoas, aorta, bowel) in the same intensity range. Position, size, shape, rotation and brightness of every organ, the
bias field, noise, voxel size and overall contrast change from patient to patient, so that a threshold cannot find an
organ and a mean atlas only roughly. It is about half the size of an adult. `toy_phantoms` is the much smaller
reference of the masked-autoencoder card (section A10.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medssl.seeding import counter_rng

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Structure:
    """One closed surface in body coordinates: right, anterior and superior are +1 at the body's edge.

    Args:
        name: `liver` and so on.
        centre: Mean position.
        radii: Mean half-axes.
        brightness: Mean and standard deviation between patients; fat is about 0.9, muscle about 0.45.
        jitter: Standard deviation of the position.
        exponent: Superellipsoid exponent; 2 is an ellipsoid, more is boxier.
        bend: Bends the third axis towards +right (a kidney's bean), in local units.
        wedge: Thins the shape towards the patient's left (the liver's left lobe), 0 to 1.
    """

    name: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    brightness: tuple[float, float]
    jitter: float = 0.045
    exponent: float = 2.2
    bend: float = 0.0
    wedge: float = 0.0


# Labelled organs: value in the label map = place in this table + 1.
ORGANS: tuple[Structure, ...] = (
    Structure("liver", (0.30, 0.08, 0.40), (0.50, 0.50, 0.34), (0.50, 0.08), exponent=2.4, wedge=0.45),
    Structure("spleen", (-0.58, -0.20, 0.34), (0.17, 0.30, 0.27), (0.52, 0.09), bend=0.25),
    Structure("kidney_left", (-0.40, -0.40, -0.14), (0.17, 0.18, 0.27), (0.56, 0.09), bend=0.35),
    Structure("kidney_right", (0.40, -0.40, -0.22), (0.17, 0.18, 0.27), (0.56, 0.09), bend=-0.35),
    Structure("heart", (-0.12, 0.22, 0.90), (0.32, 0.36, 0.24), (0.50, 0.09)),
    Structure("bladder", (0.0, 0.16, -0.78), (0.27, 0.30, 0.20), (0.62, 0.16)),
)
ORGAN_NAMES: tuple[str, ...] = tuple(organ.name for organ in ORGANS)

# Unlabelled, but as bright as the organs: what makes position and shape matter.
DECOYS: tuple[Structure, ...] = (
    Structure("stomach", (-0.34, 0.30, 0.34), (0.24, 0.26, 0.26), (0.54, 0.16), jitter=0.07, bend=0.5),
    Structure("psoas_left", (-0.20, -0.50, -0.55), (0.11, 0.13, 0.42), (0.44, 0.05)),
    Structure("psoas_right", (0.20, -0.50, -0.55), (0.11, 0.13, 0.42), (0.44, 0.05)),
    Structure("aorta", (-0.05, -0.36, 0.0), (0.07, 0.08, 1.6), (0.60, 0.15), jitter=0.03, exponent=3.0),
)

_SHAPE_NOISE = 0.10  # how far a surface waves in and out, as a share of its radius
_WARP = 0.05  # standard deviation of the displacement shared by the whole anatomy, body coordinates


@dataclass(frozen=True)
class Phantom:
    """A drawn torso.

    Args:
        image: (X, Y, Z) float32, at least 0, tissue about 0.3 to 1.2 in arbitrary units.
        labels: (X, Y, Z) uint8, 0 = none, k = `ORGAN_NAMES[k - 1]`.
        spacing_mm: Voxel size along X, Y, Z.
        attributes: Ground truth that a classification probe may predict: `small_kidney` (one kidney much smaller than
            the other) and `fatty` (thick fat under the skin).
    """

    image: np.ndarray
    labels: np.ndarray
    spacing_mm: tuple[float, float, float]
    attributes: dict[str, bool]

    def organ_ml(self) -> dict[str, float]:
        """Return the volume of each organ in millilitres."""
        counts = np.bincount(self.labels.ravel(), minlength=len(ORGANS) + 1)[1:]
        return {name: float(n * np.prod(self.spacing_mm) / 1000) for name, n in zip(ORGAN_NAMES, counts)}


@lru_cache(maxsize=64)
def _spline_basis(length: int, knots: int) -> np.ndarray:
    """Return the (length, knots) float32 matrix of a uniform cubic B-spline over the whole length."""
    position = np.linspace(1, knots - 2, length)[:, None]
    distance = np.abs(position - np.arange(knots)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def smooth_field(rng: np.random.Generator, size: Size, knots: Sequence[int]) -> np.ndarray:
    """Return a (X, Y, Z) float32 field of mean 0 and standard deviation 1, smooth over about size / knots voxels.

    Args:
        rng: Source of the coefficients.
        size: Voxels along each axis.
        knots: Spline knots along each axis, at least 4.
    """
    field = rng.standard_normal(tuple(knots), dtype=np.float32)
    for axis in range(3):
        field = np.moveaxis(np.tensordot(_spline_basis(size[axis], knots[axis]), field, axes=(1, axis)), 0, axis)
    field -= field.mean()
    return np.ascontiguousarray(field / max(float(field.std()), 1e-6), dtype=np.float32)


def rotation(degrees: np.ndarray) -> np.ndarray:
    """Return the 3x3 matrix that rotates about X, then Y, then Z by the (3,) angles given in degrees."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _body_coordinates(
    rng: np.random.Generator, size: Size, spacing: np.ndarray, half_axes: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Return the warped (3, X, Y, Z) body coordinates and the straight ones as three vectors (for bounding boxes)."""
    shift = rng.normal(0, 0.02, 3)
    turn = rotation(rng.normal(0, 5.0, 3)).astype(np.float32)
    axes = [((np.arange(n) + 0.5 - n / 2) * s).astype(np.float32) for n, s in zip(size, spacing)]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    warped = np.empty((3, *size), np.float32)
    for k in range(3):
        warped[k] = (turn[k, 0] * grid[0] + turn[k, 1] * grid[1] + turn[k, 2] * grid[2]) / half_axes[k] - shift[k]
        warped[k] += _WARP * smooth_field(rng, size, (5, 5, 5))
    return warped, tuple(axis / half for axis, half in zip(axes, half_axes))


def _level(
    rng: np.random.Generator, structure: Structure, warped: np.ndarray, straight: Sequence[np.ndarray], scale: float
) -> tuple[tuple[slice, ...], np.ndarray]:
    """Return where a structure may lie and its level function there: under 1 inside, growing outwards."""
    centre = np.asarray(structure.centre) + rng.normal(0, structure.jitter, 3)
    radii = np.asarray(structure.radii) * np.exp(rng.normal(0, 0.10, 3)) * np.exp(rng.normal(0, 0.06)) * scale
    turn = rotation(rng.normal(0, 10.0, 3)).astype(np.float32)
    exponent = float(np.clip(structure.exponent + rng.normal(0, 0.2), 1.7, 3.5))
    reach = radii.max() * 1.2 + 0.3 if radii.max() > 1 else radii * 1.5 + 0.3
    box = tuple(
        slice(int(np.searchsorted(axis, c - r)), int(np.searchsorted(axis, c + r)))
        for axis, c, r in zip(straight, centre, np.broadcast_to(reach, 3))
    )
    offset = warped[(slice(None), *box)] - centre[:, None, None, None].astype(np.float32)
    local = np.tensordot(turn.T, offset, axes=1) / radii[:, None, None, None].astype(np.float32)
    if structure.bend:
        local[0] += structure.bend * (local[2] ** 2 - 0.3)
    if structure.wedge:
        local[1:] /= np.clip(1 - structure.wedge * (0.3 - local[0]) / 1.3, 0.2, 1.3)
    level = (np.abs(local) ** exponent).sum(axis=0) ** np.float32(1 / exponent)
    return box, level


def draw_phantom(seed: int, *, size: Size = (64, 56, 48), small_kidney: bool | None = None, fatty: bool | None = None) -> Phantom:
    """Draw one torso; equal arguments give equal voxels.

    Args:
        seed: Names the patient.
        size: Voxels along X, Y, Z; at least 16 each. Voxel size follows, so that the body fills the volume.
        small_kidney: Whether one kidney is much smaller; None leaves it to chance.
        fatty: Whether the fat layer is thick; None leaves it to chance.
    """
    from scipy.ndimage import gaussian_filter

    if min(size) < 16:
        raise ValueError(f"phantom size {tuple(size)}: at least 16 voxels are needed along each axis; choose a larger size")
    rng = counter_rng("phantom", seed)
    chance = rng.random(2) < 0.5
    small_kidney = bool(chance[0]) if small_kidney is None else small_kidney
    fatty = bool(chance[1]) if fatty is None else fatty

    width = rng.uniform(62, 76)
    half_axes = np.array([width, width * rng.uniform(0.74, 0.86), rng.uniform(58, 68)])
    margin = rng.uniform(1.06, 1.20)
    in_plane = max(2 * half_axes[0] * margin / size[0], 2 * half_axes[1] * margin / size[1])
    spacing = np.round([in_plane, in_plane, 2 * half_axes[2] * rng.uniform(1.02, 1.12) / size[2]], 3)
    warped, straight = _body_coordinates(rng, size, spacing, half_axes)

    taper = 1 + 0.10 * warped[2] ** 4
    radius = (np.abs(warped[0]) ** 2.3 + np.abs(warped[1]) ** 2.3) ** np.float32(1 / 2.3) * taper
    fat = rng.uniform(0.11, 0.17) if fatty else rng.uniform(0.03, 0.07)
    cavity = radius < 1 - fat - rng.uniform(0.07, 0.11)
    # Organs hang in what the fat leaves free.
    warped *= np.float32(1.0 / (1.06 - fat))

    structure, depth, capsule = _place_structures(rng, size, warped, straight, cavity, small_kidney)
    labels = np.where(structure <= len(ORGANS), structure, 0).astype(np.uint8)
    signal = _signal(rng, size, structure, depth, capsule, radius, cavity, warped, fat)

    signal = gaussian_filter(signal, rng.uniform(0.45, 0.75), truncate=2.5)  # partial volume
    bias = smooth_field(rng, size, (4, 4, 4))
    signal *= np.exp(rng.uniform(0.10, 0.25) * bias / max(float(np.abs(bias).max()), 1e-6) * 1.5)
    sigma = np.float32(rng.uniform(0.03, 0.06))
    noise = rng.standard_normal((2, *size), dtype=np.float32) * sigma
    image = np.hypot(signal + noise[0], noise[1])  # magnitude images have Rician noise
    return Phantom(
        image=image.astype(np.float32, copy=False),
        labels=labels,
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        attributes={"small_kidney": small_kidney, "fatty": fatty},
    )


def _place_structures(
    rng: np.random.Generator,
    size: Size,
    warped: np.ndarray,
    straight: Sequence[np.ndarray],
    cavity: np.ndarray,
    small_kidney: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each voxel's structure (uint8: organs, decoys, 0 = none), its level (float32), and fat round organs."""
    structure = np.zeros(size, np.uint8)
    capsule = np.zeros(size, bool)
    depth = np.full(size, np.inf, np.float32)
    wave = np.exp(np.float32(_SHAPE_NOISE) * smooth_field(rng, size, (9, 9, 9)))
    shrunk = ("kidney_left", "kidney_right")[int(rng.random() < 0.5)] if small_kidney else ""
    for index, item in enumerate(ORGANS + DECOYS, start=1):
        box, level = _level(rng, item, warped, straight, scale=0.72 if item.name == shrunk else 1.0)
        level = level * wave[box]
        # An organ keeps its voxels against a decoy; between organs the one whose middle is closer wins.
        free = cavity[box] & (level < 1) & (level < depth[box])
        if index > len(ORGANS):
            free &= structure[box] == 0
        structure[box][free] = index
        depth[box][free] = level[free]
        capsule[box] |= cavity[box] & (level >= 1) & (level < 1.14)
    return structure, depth, capsule & (structure == 0)


def _signal(
    rng: np.random.Generator,
    size: Size,
    structure: np.ndarray,
    depth: np.ndarray,
    capsule: np.ndarray,
    radius: np.ndarray,
    cavity: np.ndarray,
    warped: np.ndarray,
    fat: float,
) -> np.ndarray:
    """Return the noise-free signal (float32): 0 in air, otherwise brightness with texture."""
    fat_value, muscle = np.float32(rng.normal(0.90, 0.06)), np.float32(rng.normal(0.46, 0.05))
    gut = smooth_field(rng, size, (12, 11, 10))
    signal = np.where(radius < 1 - fat, muscle, fat_value)
    signal[radius > 0.985] = 0.55  # skin
    filling = np.where(gut > 0.3, rng.normal(0.52, 0.10), rng.normal(0.70, 0.08)).astype(np.float32)
    signal = np.where(cavity, filling, signal).astype(np.float32)
    signal[capsule] = fat_value * np.float32(rng.uniform(0.75, 1.0))
    spine = (warped[0] / 0.14) ** 2 + ((warped[1] + 0.66) / 0.18) ** 2
    disc = np.sin(warped[2] * rng.uniform(9, 12) + rng.uniform(0, 6))
    signal = np.where(spine < 1, np.where(disc > 0.6, 0.35, rng.normal(0.66, 0.08)), signal).astype(np.float32)

    values = [max(0.25, rng.normal(*item.brightness)) for item in ORGANS + DECOYS]
    values[3] = values[2] * float(np.exp(rng.normal(0, 0.03)))  # both kidneys look alike
    table = np.concatenate([[0], values]).astype(np.float32)
    inside = structure > 0
    signal = np.where(inside, table[structure], signal)
    for kidney in (3, 4):  # medulla
        signal[(structure == kidney) & (depth < 0.6)] *= np.float32(rng.uniform(0.75, 0.95))
    texture = smooth_field(rng, size, tuple(max(4, n // 3) for n in size))
    signal *= 1 + np.float32(rng.uniform(0.05, 0.10)) * texture
    signal = np.clip(signal, 0, None) ** np.float32(rng.uniform(0.8, 1.3))  # contrast differs between scanners
    return np.where(radius < 1, signal, np.float32(0.01)).astype(np.float32)


def phantom_volume(seed: int, *, size: Size = (64, 56, 48)) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Return image (X, Y, Z) float32, labels (X, Y, Z) uint8 (`ORGAN_NAMES`) and spacing in mm of one torso.

    Args:
        seed: Names the patient.
        size: Voxels along X, Y, Z.
    """
    phantom = draw_phantom(seed, size=size)
    return phantom.image, phantom.labels, phantom.spacing_mm


# Toy organs: centre, radius, brightness, in units of half the volume. Patients differ first in size, which body and organs
# share, then in each organ's place: what is seen of a patient tells about the rest, as in the reference run of card A10.4
# (mean atlas 0.177 to 0.198, autoencoder 0.206 after 300 steps and 0.096 after 2,000). Where organs move on their own alone,
# little of a hidden patch can be inferred (`mae` then reached 0.174 after 2,000 steps, atlas 0.187).
_TOY_ORGANS = (((0.30, 0.05, 0.15), 0.42, 0.90), ((-0.36, 0.10, -0.05), 0.36, 0.75), ((0.02, -0.36, -0.25), 0.34, 0.15))
_TOY_BODY = 0.40
_TOY_SIZE_SD, _TOY_JITTER, _TOY_RADIUS_SD = 0.09, 0.045, 0.05


def _ellipsoid(line: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return where an axis-aligned ellipsoid lies in the cube that `line` spans along each axis."""
    x, y, z = (((line - c) / r) ** 2 for c, r in zip(centre.astype(np.float32), radii.astype(np.float32)))
    return np.asarray(x[:, None, None] + y[None, :, None] + z[None, None, :] < 1)


def labelled_toy_phantoms(n: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return n cubes with a body ellipsoid and three organs that scale with it and jitter, and their labels.

    Args:
        n: Number of phantoms. The first k are the same whatever n is.
        size: Voxels along each edge.
        seed: Another seed gives other patients.

    Returns:
        Images (N, 1, size, size, size) float32, each of mean 0 and standard deviation 1; labels (N, size, size, size)
        uint8, 0 to 3.

    Reference:
        Card A10.4: 32^3, body ellipsoid and three organs, noise 0.03, z-scored.
    """
    line = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    images = np.empty((n, 1, size, size, size), np.float32)
    labels = np.zeros((n, size, size, size), np.uint8)
    for i in range(n):
        rng = counter_rng("toy_phantom", seed, i)
        scale = np.exp(rng.normal(0, _TOY_SIZE_SD))
        body = _ellipsoid(line, np.zeros(3), scale * np.array([0.86, 0.74, 0.90]))
        image = np.where(body, np.float32(_TOY_BODY), np.float32(0.0))
        for k, (centre, radius, brightness) in enumerate(_TOY_ORGANS, start=1):
            middle = scale * np.asarray(centre) + rng.normal(0, _TOY_JITTER, 3)
            radii = scale * radius * np.exp(rng.normal(0, _TOY_RADIUS_SD, 3))
            inside = _ellipsoid(line, middle, radii) & body
            image[inside] = brightness
            labels[i][inside] = k
        image += np.float32(0.03) * rng.standard_normal(image.shape, dtype=np.float32)
        images[i, 0] = (image - image.mean()) / image.std()
    return images, labels


def toy_phantoms(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Return the images of `labelled_toy_phantoms`, (N, 1, size, size, size) float32.

    Args:
        n: Number of phantoms.
        size: Voxels along each edge.
        seed: Another seed gives other patients.
    """
    return labelled_toy_phantoms(n, size, seed)[0]
