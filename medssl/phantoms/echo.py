"""Draw labelled echocardiograms: a beating left ventricle in a sector, of known ejection fraction, with speckle that moves with tissue.

The view is an apical one: probe at the top, apex of the heart below it, then cavity, mitral valve and left atrium, a right ventricle to the
left as a decoy. In the heart's own axes (zeta along the long axis from the apex, v across), the cavity is half an ellipse,

    w(zeta) = a sqrt(1 - (1 - zeta / L)^2),  0 < zeta <= L,

whose half-width a and length L shorten from end diastole (ED) to end systole (ES) while the apex stays. Volumes are those of discs stacked
on the long axis, as single-plane Simpson has them: without a wall-motion anomaly 2/3 pi a^2 L. An anomaly holds a part of one wall back.

Pictures are made as a scanner makes them: scatterers that ride on the tissue, blurred by a beam that does not, attenuation, time gain
compensation, electronic noise, logarithmic compression, scan conversion. Gain, compression, depth, place, size and tilt change from clip to
clip, so that no pixel and no mean tells the ejection fraction.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.phantoms.folder import write_whole
from medssl.seeding import counter_rng, derive_seed

ECHO_LABELS = ("background", "lv_cavity", "lv_myocardium", "left_atrium")
WALL_MOTION = ("normal", "hypokinetic", "akinetic")
SEGMENTS = ("none", "septal_apical", "septal_basal", "lateral_apical", "lateral_basal")
FORMAT = 1
DISCS = 400
_HALF_GRID = 160
BEAMS, SAMPLES = 80, 128
BLUR = (0.7, 0.9)
"""Standard deviation of the beam along and across, in samples and beams: it widens with depth, as a sector's does."""
SCATTERER_MM = 0.8
BORDER_DB, LEAFLET_DB = -3.0, -5.0
WHITE_DB = 22.0
"""Echo strength that a scanner of middling gain shows as white."""
TOP, BOTTOM, ECG = 0.08, 0.16, 0.08
"""Shares of the screen above and below the sector, and of the ECG at the bottom."""
ED, ES = 0.0, 1.0


@dataclass(frozen=True)
class EchoHeart:
    """What belongs to a patient.

    Args:
        half_width_mm: a at end diastole.
        length_mm: L at end diastole.
        wall_mm: Thickness of the myocardium at end diastole.
        shorten_width: Share of a lost at end systole where the wall moves normally.
        shorten_length: Share of L lost.
        wall_motion: Of `WALL_MOTION`.
        segment: Of `SEGMENTS`; `none` for normal wall motion.
        heart_rate: Beats per minute.
        right_mm: Width of the right ventricle.
        atrium_mm: Length of the left atrium.
        wall_db: Echo strength of the myocardium.
        seed: Of what is drawn beside these: texture.
    """

    half_width_mm: float
    length_mm: float
    wall_mm: float
    shorten_width: float
    shorten_length: float
    wall_motion: str
    segment: str
    heart_rate: float
    right_mm: float
    atrium_mm: float
    wall_db: float
    seed: int

    def held_back(self, u: np.ndarray, side: np.ndarray) -> np.ndarray:
        """Return how much of the normal inward motion a place of the wall makes, 0 to 1.

        Args:
            u: Place along the long axis, 0 apex to 1 base.
            side: Below 0 septal, else lateral.
        """
        if self.segment == "none":
            return np.ones(np.broadcast(u, side).shape)
        wall, level = self.segment.split("_")
        middle = 0.3 if level == "apical" else 0.72
        on_side = (side < 0) if wall == "septal" else (side >= 0)
        depth = 1.0 if self.wall_motion == "akinetic" else 0.6
        held: np.ndarray = 1 - depth * on_side * np.exp(-0.5 * ((u - middle) / 0.2) ** 2)
        return held

    def volume_ml(self, contraction: float) -> float:
        """Return the cavity's volume by discs at a state between `ED` and `ES`."""
        u = (np.arange(DISCS) + 0.5) / DISCS
        length = self.length_mm * (1 - self.shorten_length * contraction)
        shape = self.half_width_mm * np.sqrt(1 - (1 - u) ** 2)
        walls = [self.held_back(u, np.full(DISCS, side)) for side in (-1.0, 1.0)]
        across = shape * (2 - self.shorten_width * contraction * (walls[0] + walls[1]))
        return float((math.pi / 4 * across**2).mean() * length / 1000)

    @property
    def ejection_fraction(self) -> float:
        """Percent of the end-diastolic volume that is pumped out."""
        return 100 * (1 - self.volume_ml(ES) / self.volume_ml(ED))

    @property
    def systole(self) -> float:
        """Share of the beat from ED to ES; it grows with the rate, because systole shortens less than diastole."""
        return float(np.clip(0.35 + 0.0015 * (self.heart_rate - 60), 0.3, 0.5))

    def contraction(self, phase: np.ndarray | float) -> np.ndarray:
        """Return the state, 0 (`ED`) to 1 (`ES`), at phases of the beat counted in beats from an ED.

        Reference:
            The three parts of filling: early, 70 %; diastasis; the atrium's kick.
        """
        place = np.mod(np.asarray(phase, dtype=np.float64), 1.0)
        systole = self.systole
        rest = np.clip((place - systole) / (1 - systole), 0, 1)
        filled = 0.7 * _smooth(rest / 0.45) + 0.3 * _smooth((rest - 0.75) / 0.25)
        found: np.ndarray = np.where(place < systole, 0.5 - 0.5 * np.cos(np.pi * place / systole), 1 - filled)
        return found


@dataclass(frozen=True)
class EchoClip:
    """One cine.

    Args:
        frames: (T, H, W) uint8, the screen: sector, ruler, text and the trace of an ECG.
        labels: (T, H, W) uint8, places in `ECHO_LABELS`.
        sector: (H, W) bool, True = inside.
        pixel_mm: Edge of a pixel.
        frame_times_ms: (T,) start of each frame, from 0.
        volumes_ml: (T,) volume of the cavity.
        ed_frames: Frames nearest to each end of diastole.
        es_frames: Frames nearest to each end of systole.
        box: Rows and columns (start, stop, start, stop) of the sector's region.
        ecg_box: The same of the ECG strip.
        axis: Apex (row, column) of the heart in pixels and direction (row, column) of its long axis, of the first frame.
        heart: The patient's heart.
    """

    frames: np.ndarray
    labels: np.ndarray
    sector: np.ndarray
    pixel_mm: float
    frame_times_ms: np.ndarray
    volumes_ml: np.ndarray
    ed_frames: tuple[int, ...]
    es_frames: tuple[int, ...]
    box: tuple[int, int, int, int]
    ecg_box: tuple[int, int, int, int]
    axis: tuple[tuple[float, float], tuple[float, float]]
    heart: EchoHeart


def draw_heart(seed: int, *, anomaly: float = 0.3) -> EchoHeart:
    """Draw a patient's heart; ejection fraction and size are independent.

    Args:
        seed: Everything depends on it.
        anomaly: Share of hearts with a wall-motion anomaly.
    """
    rng = counter_rng("echo_heart", seed)
    ejected = rng.uniform(0.2, 0.72)
    shorten_length = 0.25 * ejected
    motion, segment = "normal", "none"
    if rng.random() < anomaly:
        motion = WALL_MOTION[1 + int(rng.integers(2))]
        segment = SEGMENTS[1 + int(rng.integers(len(SEGMENTS) - 1))]
    return EchoHeart(
        half_width_mm=float(rng.uniform(19, 28)),
        length_mm=float(rng.uniform(70, 95)),
        wall_mm=float(rng.uniform(8, 13)),
        shorten_width=float(1 - math.sqrt((1 - ejected) / (1 - shorten_length))),
        shorten_length=float(shorten_length),
        wall_motion=motion,
        segment=segment,
        heart_rate=float(rng.uniform(50, 110)),
        right_mm=float(rng.uniform(12, 24)),
        atrium_mm=float(rng.uniform(28, 45)),
        wall_db=float(rng.normal(-10, 2)),
        seed=derive_seed("echo_texture", seed),
    )


def draw_clip(
    heart: EchoHeart, seed: int, *, size: tuple[int, int] = (128, 160), seconds: float = 2.0, steady: bool = True
) -> EchoClip:
    """Draw one cine of a heart.

    Args:
        heart: The patient's heart.
        seed: Everything else depends on it: scanner settings, place, tilt, rate, phase, noise.
        size: Rows and columns of the screen.
        seconds: Length.
        steady: Whether frames are evenly spaced; otherwise each step is up to a third longer or shorter.
    """
    rng = counter_rng("echo_clip", seed)
    fps = float(rng.integers(25, 51))
    n = max(2, round(seconds * fps))
    steps = np.full(n - 1, 1000 / fps) * (1.0 if steady else rng.uniform(2 / 3, 4 / 3, n - 1))
    times = np.concatenate([[0.0], np.cumsum(np.round(steps, 3))])
    phase = rng.random() + times / 1000 * heart.heart_rate / 60
    state = heart.contraction(phase)
    screen = _Screen.draw(rng, size)
    tilt = math.radians(rng.normal(0, 9))
    apex = np.array([rng.uniform(0.08, 0.2) * screen.depth_mm, rng.normal(0, 0.05) * screen.depth_mm])
    breath = 2.5 * np.sin(2 * math.pi * (0.25 * times / 1000 + rng.random()))
    poses = [_Pose(heart, float(c), apex + np.array([float(b), 0.0]), tilt) for c, b in zip(state, breath)]
    frames = screen.render(rng, heart, poses, state, phase)
    labels = np.zeros((n, *size), np.uint8)
    for k, pose in enumerate(poses):
        labels[k][screen.sector] = pose.regions(screen.points).labels
    marks = {name: _marks(phase, offset) for name, offset in (("ed", 0.0), ("es", heart.systole))}
    top = np.array(screen.origin) + poses[0].apex / screen.pixel_mm
    return EchoClip(
        frames, labels, screen.sector, screen.pixel_mm, times, np.array([heart.volume_ml(float(c)) for c in state]),
        marks["ed"], marks["es"], screen.box, screen.ecg_box,
        ((float(top[0]), float(top[1])), (math.cos(tilt), math.sin(tilt))), heart,
    )  # fmt: skip


def _marks(phase: np.ndarray, offset: float) -> tuple[int, ...]:
    """Return the frames nearest to each passing of a phase; only passings that lie within the clip."""
    whole = np.arange(math.ceil(phase[0] - offset), math.floor(phase[-1] - offset) + 1) + offset
    return tuple(int(np.abs(phase - mark).argmin()) for mark in whole)


def _smooth(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    smooth: np.ndarray = x * x * (3 - 2 * x)
    return smooth


class _Pose:
    """A heart at one moment, in the scanner's plane: points are (depth, lateral) in mm from the probe."""

    def __init__(self, heart: EchoHeart, contraction: float, apex: np.ndarray, tilt: float) -> None:
        self.heart, self.c, self.apex = heart, contraction, apex
        self.along = np.array([math.cos(tilt), math.sin(tilt)])
        self.across = np.array([-math.sin(tilt), math.cos(tilt)])
        self.length = heart.length_mm * (1 - heart.shorten_length * contraction)

    def outlines(self, zeta: np.ndarray, side: np.ndarray, length: float, contraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the half-widths of cavity and of the outer border of the wall along the long axis; beyond the base those of the base."""
        heart = self.heart
        u = np.clip(zeta / length, 0, 1)
        held = heart.held_back(u, side)
        half = heart.half_width_mm * (1 - heart.shorten_width * contraction * held)
        wall = heart.wall_mm * (1 + 1.2 * heart.shorten_width * contraction * held)
        inner = half * np.sqrt(1 - (1 - u) ** 2)
        back = np.clip((length - np.minimum(zeta, length)) / (length + wall), 0, 1)
        outer = (half + wall) * np.sqrt(1 - back**2)
        return inner, outer

    def regions(self, points: np.ndarray) -> _Regions:
        """Return which part of the heart each point (N, 2) lies in."""
        heart = self.heart
        from_apex = points - self.apex.astype(points.dtype)
        zeta, v = from_apex @ self.along.astype(points.dtype), from_apex @ self.across.astype(points.dtype)
        inner, outer = self.outlines(zeta, v, self.length, self.c)
        reach, below = np.abs(v), zeta - self.length
        in_heart = below <= 0
        cavity = in_heart & (zeta > 0) & (reach < inner)
        long, wide = heart.atrium_mm * (1 + 0.2 * self.c), 0.9 * heart.half_width_mm * (1 + 0.1 * self.c)
        atrium = ~in_heart & ((below / long) ** 2 + (v / wide) ** 2 < 1)
        return _Regions(zeta, v, inner, outer, cavity, in_heart & ~cavity & (reach < outer), atrium)

    def at_ed(self, found: _Regions) -> np.ndarray:
        """Return where each point of the tissue lay at end diastole, (N, 2): its scatterers are found there."""
        zeta, inner, outer, reach = found.zeta, found.inner, found.outer, np.abs(found.v)
        below, stretch = zeta - self.length, self.heart.length_mm / self.length
        inner_ed, outer_ed = self.outlines(zeta * stretch, found.v, self.heart.length_mm, ED)
        fade = (self.heart.length_mm - self.length) * np.exp(-np.clip(below, 0, None) / 40)
        zeta_ed = np.where((below <= 0) & (zeta > 0), zeta * stretch, zeta + fade * (below > 0))
        share = np.clip((reach - inner) / np.maximum(outer - inner, 1e-6), 0, 1)
        outside = reach + (outer_ed - outer) * np.exp(-np.clip(reach - outer, 0, None) / 15)
        in_wall = inner_ed + share * (outer_ed - inner_ed)
        reach_ed = np.where(reach < inner, reach * inner_ed / np.maximum(inner, 1e-6), np.where(reach < outer, in_wall, outside))
        home: np.ndarray = zeta_ed[:, None] * self.along + (np.sign(found.v) * reach_ed)[:, None] * self.across
        return home

    def right_ventricle(self, found: _Regions) -> np.ndarray:
        """Return the points in the right ventricle."""
        bulge = np.sqrt(np.clip(1 - ((found.zeta / self.length - 0.72) / 0.55) ** 2, 0, 1)) * self.heart.right_mm
        reach = -found.v - found.outer
        inside: np.ndarray = (found.zeta <= self.length) & (reach >= 0) & (reach < bulge * (1 - 0.25 * self.c))
        return inside

    def border(self, found: _Regions) -> np.ndarray:
        """Return the points on the outer border of the wall."""
        near = np.abs(np.abs(found.v) - found.outer) < 1.2
        on: np.ndarray = near & (found.zeta <= self.length) & (found.zeta > -self.heart.wall_mm)
        return on

    def leaflets(self, found: _Regions) -> np.ndarray:
        """Return the points within a millimetre or so of the mitral leaflets: shut in systole, open when the heart fills."""
        half = self.heart.half_width_mm * (1 - self.heart.shorten_width * self.c)
        open_deg = 75 * (1 - self.c)
        near = np.flatnonzero((np.abs(found.zeta - self.length) < half) & (np.abs(found.v) < half))
        zeta, v = found.zeta[near], found.v[near]
        on = np.zeros(len(near), dtype=bool)
        for side in (-1.0, 1.0):
            foot = np.array([self.length, side * 0.92 * half])
            tip = np.array([-math.sin(math.radians(open_deg)), -side * math.cos(math.radians(open_deg))]) * 0.85 * half
            rest = np.stack([zeta - foot[0], v - foot[1]], axis=1)
            along = np.clip(rest @ tip / (tip @ tip), 0, 1)
            on |= np.hypot(*(rest - along[:, None] * tip).T) < 1.3
        mask = np.zeros(len(found.v), dtype=bool)
        mask[near] = on
        return mask


@dataclass(frozen=True)
class _Regions:
    """Points in the heart's axes, and the parts of the heart they lie in."""

    zeta: np.ndarray
    v: np.ndarray
    inner: np.ndarray
    outer: np.ndarray
    cavity: np.ndarray
    wall: np.ndarray
    atrium: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Places in `ECHO_LABELS`."""
        labels: np.ndarray = (self.cavity + 2 * self.wall + 3 * self.atrium).astype(np.uint8)
        return labels


@dataclass(frozen=True)
class _Screen:
    """Scanner settings of a clip, and the geometry of its screen.

    Args:
        size: Rows and columns.
        depth_mm: Depth setting.
        half_deg: Half the sector's angle.
        pixel_mm: Edge of a pixel.
        origin: Row and column of the probe.
        sector: (H, W) bool.
        points: (N, 2) depth and lateral position in mm of the pixels inside.
        box: The sector's box.
        ecg_box: The box of the ECG.
    """

    size: tuple[int, int]
    depth_mm: float
    half_deg: float
    pixel_mm: float
    origin: tuple[float, float]
    sector: np.ndarray
    points: np.ndarray
    box: tuple[int, int, int, int]
    ecg_box: tuple[int, int, int, int]

    @classmethod
    def draw(cls, rng: np.random.Generator, size: tuple[int, int]) -> _Screen:
        height, width = size
        depth, half = float(rng.uniform(135, 190)), float(rng.uniform(33, 41))
        pixel = depth / ((1 - TOP - BOTTOM) * height)
        origin = (TOP * height, width / 2 + float(rng.uniform(-0.06, 0.06)) * width)
        row, column = np.meshgrid(np.arange(height) + 0.5 - origin[0], np.arange(width) + 0.5 - origin[1], indexing="ij")
        radius, angle = np.hypot(row, column) * pixel, np.degrees(np.arctan2(column, row))
        sector = (radius > 3) & (radius <= depth) & (np.abs(angle) <= half)
        points = np.stack([row[sector], column[sector]], axis=1) * pixel
        rows, columns = np.flatnonzero(sector.any(axis=1)), np.flatnonzero(sector.any(axis=0))
        box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        return cls(size, depth, half, pixel, origin, sector, points, box, (round((1 - ECG) * height), height, 2, width // 2))

    def render(
        self, rng: np.random.Generator, heart: EchoHeart, poses: list[_Pose], state: np.ndarray, phase: np.ndarray
    ) -> np.ndarray:
        """Return the screen (T, H, W) uint8."""
        from scipy import ndimage

        radius = (np.arange(SAMPLES) + 0.5) / SAMPLES * self.depth_mm
        angle = np.radians(((np.arange(BEAMS) + 0.5) / BEAMS * 2 - 1) * self.half_deg)
        beam = np.stack([np.outer(radius, trigonometric(angle)).ravel() for trigonometric in (np.cos, np.sin)], axis=1)
        scatterers, patchy = _scatterers(heart.seed, 0.6), _scatterers(heart.seed, 10.0)[0]
        slope = rng.uniform(-14, 4) * np.linspace(0, 1, SAMPLES)
        tgc = np.interp(np.linspace(0, 7, SAMPLES), np.arange(8), rng.normal(0, 2.5, 8))
        dropout = np.interp(np.linspace(0, 9, BEAMS), np.arange(10), np.minimum(rng.normal(0, 3.5, 10), 3))
        gain = 10 ** ((slope[:, None] + tgc[:, None] + dropout[None] + rng.uniform(-6, 6)) / 20)
        range_db = rng.uniform(48, 66)
        blood, outside = rng.uniform(-36, -28), rng.uniform(-20, -13)
        to_screen = self._scan_conversion()
        frames = np.zeros((len(poses), *self.size), np.uint8)
        for k, pose in enumerate(poses):
            found = pose.regions(beam)
            cell = (pose.at_ed(found) / SCATTERER_MM + _HALF_GRID).T
            rest = outside + 4 * ndimage.map_coordinates(patchy, cell, order=1, mode="wrap")
            dark = found.cavity | found.atrium | pose.right_ventricle(found)
            level = np.where(found.wall, heart.wall_db, np.where(dark, blood, rest))
            level[pose.border(found)] = BORDER_DB
            level[pose.leaflets(found)] = LEAFLET_DB
            real, imaginary = (ndimage.map_coordinates(part, cell, order=1, mode="wrap") for part in scatterers)
            echo = 10 ** (level / 20) * (real + 1j * imaginary)
            echo = echo.reshape(SAMPLES, BEAMS)
            echo = ndimage.gaussian_filter(echo.real, BLUR) + 1j * ndimage.gaussian_filter(echo.imag, BLUR)
            noise = rng.normal(0, 10 ** (-46 / 20), (2, SAMPLES, BEAMS))
            envelope = np.abs(echo * gain * 3 + noise[0] + 1j * noise[1])
            grey = 255 * np.clip(1 + (20 * np.log10(envelope + 1e-9) - WHITE_DB) / range_db, 0, 1)
            frames[k][self.sector] = np.round(to_screen(grey)).astype(np.uint8)
        self._furnish(rng, frames, phase)
        return frames

    def _scan_conversion(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the bilinear map from beams to the pixels inside."""
        sample = np.hypot(*self.points.T) / self.depth_mm * SAMPLES - 0.5
        beam = (np.degrees(np.arctan2(self.points[:, 1], self.points[:, 0])) / self.half_deg + 1) / 2 * BEAMS - 0.5
        row, column = np.clip(sample, 0, SAMPLES - 1.001), np.clip(beam, 0, BEAMS - 1.001)
        first, second = row.astype(int), column.astype(int)
        down, right = row - first, column - second

        def convert(polar: np.ndarray) -> np.ndarray:
            upper = polar[first, second] * (1 - right) + polar[first, second + 1] * right
            lower = polar[first + 1, second] * (1 - right) + polar[first + 1, second + 1] * right
            shown: np.ndarray = upper * (1 - down) + lower * down
            return shown

        return convert

    def _furnish(self, rng: np.random.Generator, frames: np.ndarray, phase: np.ndarray) -> None:
        """Draw what stands beside the sector: letters, a depth ruler, and the ECG as a sweep that grows."""
        width = self.size[1]
        letters = rng.random((4, width // 8)) < 0.5
        frames[:, 1:5, 2 : 2 + width // 8] = np.where(letters, 200, 0)
        ticks = np.arange(round(self.origin[0]), self.box[1], max(2, round(10 / self.pixel_mm)))
        frames[:, ticks, width - 3 :] = 150
        top, bottom, left, right = self.ecg_box
        columns = np.arange(left, right)
        for k in range(len(frames)):
            drawn = columns[: 1 + int((len(columns) - 1) * k / max(1, len(frames) - 1))]
            beat = np.mod(np.interp((drawn - left) / (right - left), np.linspace(0, 1, len(phase)), phase), 1.0)
            spike = np.exp(-0.5 * ((np.minimum(beat, 1 - beat)) / 0.03) ** 2) + 0.25 * np.exp(-0.5 * ((beat - 0.4) / 0.06) ** 2)
            frames[k, np.clip(np.round(bottom - 2 - spike * (bottom - top - 3)).astype(int), top, bottom - 1), drawn] = 220


def _scatterers(seed: int, smooth: float) -> np.ndarray:
    """Return real and imaginary part of a periodic Gaussian field of variance 1 on a grid of `SCATTERER_MM`."""
    from scipy import ndimage

    rng = counter_rng("echo_scatterers", seed, str(smooth))
    field = rng.normal(size=(2, 2 * _HALF_GRID, 2 * _HALF_GRID))
    field = np.stack([ndimage.gaussian_filter(part, smooth, mode="wrap") for part in field])
    scaled: np.ndarray = (field / field.std()).astype(np.float32)
    return scaled


def make_echo_cohort(
    out: Path,
    *,
    patients: int = 60,
    clips: int = 1,
    seed: int = 0,
    size: tuple[int, int] = (128, 160),
    seconds: float = 2.0,
    dicom_fraction: float = 0.5,
    anomaly: float = 0.3,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a cohort of echocardiograms and return its folder; equal arguments give equal bytes.

    Layout::

        OUT/images/echo_0000_0.dcm   Ultrasound Multi-frame Image Storage, regions in cm; FrameTime, or FrameTimeVector for one in three
        OUT/images/echo_0001_0.avi   Motion JPEG, no spacing
        OUT/labels/echo_0000_0.npz   `labels` (T, H, W) uint8 (`ECHO_LABELS`), `sector` (H, W) bool, `volumes_ml` (T,), `frame_times_ms` (T,)
        OUT/split.csv                one row per clip: ef, heart_rate, wall_motion, segment, ed_frames, es_frames ...
        OUT/echo.json                parameters

    The folder appears under its name only when it is complete. A folder that holds this very cohort is left as it is.

    Args:
        out: Folder to make; must not exist, or be empty, or hold the same cohort.
        patients: Number of patients, at least 3.
        clips: Cines of each patient, of one heart with other settings.
        seed: Another seed gives other patients.
        size: Rows and columns; AVI needs even numbers.
        seconds: Length of a cine.
        dicom_fraction: Share of the patients written as DICOM; the rest is AVI (extra `video`).
        anomaly: Share of hearts with a wall-motion anomaly.
        on_progress: Called with (patients written, patients).

    Raises:
        RequestError: The folder holds something else, or an argument is out of range.
    """
    out = Path(out)
    if patients < 3 or clips < 1:
        raise RequestError(f"patients={patients}, clips={clips}: give 3 or more patients, and a clip of each")
    if not 0 <= dicom_fraction <= 1 or not 0 <= anomaly <= 1:
        raise RequestError(f"dicom_fraction={dicom_fraction}, anomaly={anomaly}: expected shares from 0 to 1")
    if min(size) < 64 or any(n % 2 for n in size):
        raise RequestError(f"size={size}: expected even numbers from 64")
    parameters: dict[str, Any] = {
        "format": FORMAT, "patients": patients, "clips": clips, "seed": seed, "size": list(size), "seconds": seconds,
        "dicom_fraction": dicom_fraction, "anomaly": anomaly, "labels": list(ECHO_LABELS),
    }  # fmt: skip

    def write(folder: Path) -> None:
        rows = _write_patients(folder, parameters, on_progress)
        with (folder / "split.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    return write_whole(out, "echo.json", parameters, write, what="echo cohort")


def _write_patients(
    folder: Path, parameters: dict[str, Any], on_progress: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    patients, seed = parameters["patients"], parameters["seed"]
    order = counter_rng("echo_cohort", seed, "split").permutation(patients)
    n_test, n_val = max(1, round(0.25 * patients)), max(1, round(0.15 * patients))
    split = dict.fromkeys(order[:n_test].tolist(), "test") | dict.fromkeys(order[n_test : n_test + n_val].tolist(), "val")
    as_dicom = counter_rng("echo_cohort", seed, "format").permutation(patients)[: round(patients * parameters["dicom_fraction"])]
    rank = {int(patient): k for k, patient in enumerate(order[n_test + n_val :], start=1)}
    rows = []
    for patient in range(patients):
        name = f"echo_{patient:04d}"
        heart = draw_heart(derive_seed("echo_cohort", seed, patient), anomaly=parameters["anomaly"])
        for number in range(parameters["clips"]):
            key = ("echo_cohort", seed, patient, "clip", number)
            dicom = patient in as_dicom
            steady = not (dicom and counter_rng(*key, "rate").random() < 1 / 3)
            size = (int(parameters["size"][0]), int(parameters["size"][1]))
            clip = draw_clip(heart, derive_seed(*key), size=size, seconds=parameters["seconds"], steady=steady)
            stem = f"{name}_{number}"
            file = folder / "images" / f"{stem}.{'dcm' if dicom else 'avi'}"
            if dicom:
                write_echo_dicom(file, clip, patient_id=name, number=number, seed=seed, steady=steady)
            else:
                write_echo_avi(file, clip)
            np.savez_compressed(
                folder / "labels" / f"{stem}.npz",
                labels=clip.labels, sector=clip.sector, volumes_ml=clip.volumes_ml, frame_times_ms=clip.frame_times_ms,
            )  # fmt: skip
            rows.append(
                {
                    "file": file.name,
                    "label": f"{stem}.npz",
                    "split": split.get(patient, "train"),
                    "patient": name,
                    "few_label_rank": rank.get(patient, ""),
                    "ef": f"{heart.ejection_fraction:.2f}",
                    "heart_rate": f"{heart.heart_rate:.1f}",
                    "edv_ml": f"{heart.volume_ml(ED):.2f}",
                    "wall_motion": heart.wall_motion,
                    "segment": heart.segment,
                    "abnormal": int(heart.wall_motion != "normal"),
                    "ed_frames": " ".join(map(str, clip.ed_frames)),
                    "es_frames": " ".join(map(str, clip.es_frames)),
                }
            )
        if on_progress is not None:
            on_progress(patient + 1, patients)
    return rows


def write_echo_dicom(path: Path, clip: EchoClip, *, patient_id: str, number: int = 0, seed: int = 0, steady: bool = True) -> None:
    """Write a cine as Ultrasound Multi-frame Image Storage (uncompressed, explicit little endian).

    Args:
        path: File to write.
        clip: The cine.
        patient_id: Phantom id; also the patient's name.
        number: Which cine of the patient.
        seed: Enters the UIDs.
        steady: Write FrameTime; otherwise FrameTimeVector.
    """
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

    ids = {
        kind: f"2.25.{derive_seed('echo_uid', seed, patient_id, *([] if kind == 'study' else [number]), kind)}"
        for kind in ("study", "series", "image")
    }
    base = pydicom.Dataset()
    base.file_meta = pydicom.dataset.FileMetaDataset()
    base.file_meta.MediaStorageSOPClassUID = base.SOPClassUID = UltrasoundMultiFrameImageStorage
    base.file_meta.MediaStorageSOPInstanceUID = base.SOPInstanceUID = ids["image"]
    base.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    base.ImageType = ["ORIGINAL", "PRIMARY", "TTE", "0001"]
    base.Modality, base.Manufacturer = "US", "medssl phantom"
    base.PatientName, base.PatientID = f"{patient_id}^Phantom", patient_id
    base.PatientBirthDate = base.PatientSex = base.AccessionNumber = base.StudyTime = base.StudyID = ""
    base.StudyDate = "20000101"  # phantoms were never scanned
    base.StudyInstanceUID, base.SeriesInstanceUID = ids["study"], ids["series"]
    base.SeriesNumber, base.InstanceNumber = number + 1, 1
    base.HeartRate = round(clip.heart.heart_rate)
    steps = np.diff(clip.frame_times_ms)
    if steady:
        base.FrameTime = f"{steps.mean():.6f}"
        base.FrameIncrementPointer = 0x00181063
    else:
        base.FrameTimeVector = ["0", *(f"{step:.3f}" for step in steps)]
        base.FrameIncrementPointer = 0x00181065
    base.SequenceOfUltrasoundRegions = [
        _region(clip.box, data=1, cm=clip.pixel_mm / 10), _region(clip.ecg_box, data=10, cm=None),
    ]  # fmt: skip
    base.SamplesPerPixel, base.PhotometricInterpretation = 1, "MONOCHROME2"
    base.NumberOfFrames, base.Rows, base.Columns = clip.frames.shape
    base.BitsAllocated, base.BitsStored, base.HighBit, base.PixelRepresentation = 8, 8, 7, 0
    pixels = clip.frames.tobytes()
    base.PixelData = pixels + b"\0" * (len(pixels) % 2)
    base["PixelData"].VR = "OB"
    base.save_as(path, enforce_file_format=True)


def _region(box: tuple[int, int, int, int], *, data: int, cm: float | None) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = (1 if data == 1 else 0), data, 0
    item.RegionLocationMinY0, item.RegionLocationMaxY1 = box[0], box[1] - 1
    item.RegionLocationMinX0, item.RegionLocationMaxX1 = box[2], box[3] - 1
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 0 if cm is None else 3
    if cm is not None:
        item.PhysicalDeltaX = item.PhysicalDeltaY = cm
    return item


def write_echo_avi(path: Path, clip: EchoClip) -> None:
    """Write a cine of evenly spaced frames as Motion JPEG in AVI; a container of video has no spacing.

    Raises:
        RequestError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as err:
        raise RequestError('AVI files need PyAV; install the extra with `pip install "medssl[video]"`') from err
    rate = Fraction(1000 / float(np.diff(clip.frame_times_ms).mean())).limit_denominator(1000)
    with av.open(str(path), mode="w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("mjpeg", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *clip.frames.shape[1:], "yuvj420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.qmin = stream.codec_context.qmax = 3
        for frame in clip.frames:
            picture = av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuvj420p")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
