"""Labelled volumes in memory: reading them through their domain, cutting training crops, and preparing whole volumes.

Training crops are made by `VolumeViews`, so fine-tuning sees intensities, padding and augmentation exactly as
pretraining did.

A picture is a volume of one slice, (C, H, W, 1), until it reaches the network: crops of two axes have theirs taken away (`as_seen`).

In a label map 0 is background, -1 uncertain. `Volume.labelled` says which structures the map labels: in a map of liver alone, 0 is
"background, or a structure that nobody drew". Losses and scores of the others leave the case out.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.domains.label_files.base import UNCERTAIN, Grid, LabelMap, values_in
from medssl.domains.label_files.picture import read_picture_labels
from medssl.domains.label_files.read import frame_of_reference, read_labels
from medssl.domains.volume_files import GRID_TOLERANCE, volumes_in
from medssl.domains.volume_stack import size_text
from medssl.errors import GeometryError, ImageError, RequestError, near
from medssl.evaluation.cohort import Case, LabelRules
from medssl.registry import lookup
from medssl.seeding import counter_rng
from medssl.types import Box, DrawKey, Sample
from medssl.views.intensity import by_channel, normalization, normalize_
from medssl.views.pipeline import Crop, VolumeViews

VIEW = "finetune"
NOT_AUGMENTATION = ("name", "size", "spacing_mm", "count", "normalize", "mask")
POINTS = 4096  # voxels kept per structure to centre crops on
MAX_VALUE = 32767  # of a structure: maps are kept as int16


@dataclass(frozen=True)
class Volume:
    """A labelled volume, or a picture as a volume of one slice.

    Args:
        image: (C, X, Y, Z), stored dtype, RAS+; a picture is (C, H, W, 1).
        valid: (X, Y, Z) bool, True = real content, in all channels.
        label: (X, Y, Z) int16, -1 uncertain; where raters differ what most say. None when the case has none.
        spacing_mm: Voxel size; of a picture the steps between rows and between columns, and 1.
        affine: (4, 4) voxel centre index to RAS+ mm; of a picture it holds the steps alone.
        stats: Intensity statistics of the domain; of several channels those of channel k as `mean_k` and so on.
        channel_stats: Statistics of each channel of a volume that has several, by which each is normalised; empty for pictures, whose colours
            are normalised together.
        points: Structure to (K, 3) voxel indices inside it, at most `POINTS`, evenly taken.
        labelled: Structures that the map labels; None for all.
        raters: Maps of all raters where there are several.
        counts: What the label readers counted, see `domains.label_files.base.COUNTS`, and `rater_ties`.
        flags: Flags of the label readers.
        picture: Whether it is a picture.
        measured: Whether the spacing is known; a PNG or JPEG has none, and counts in pixels.
        repeated: Whether a grey picture was given the channels of the others.
    """

    image: np.ndarray
    valid: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    stats: Mapping[str, float]
    points: Mapping[int, np.ndarray] = field(default_factory=dict)
    labelled: tuple[int, ...] | None = None
    raters: tuple[np.ndarray, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    picture: bool = False
    measured: bool = True
    repeated: bool = False
    channel_stats: tuple[Mapping[str, float], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all voxels of all maps are sure and all structures labelled."""
        maps = self.raters or (() if self.label is None else (self.label,))
        return self.labelled is None and not any(bool((m < 0).any()) for m in maps)

    def labels(self, structure: int) -> bool:
        """Whether the label map says where a structure is, which may be nowhere."""
        return self.labelled is None or structure in self.labelled


class CaseReader:
    """Reads cases through their domain and keeps them in memory up to a budget.

    Args:
        domain: Registered domain name.
        args: Arguments of the domain.
        budget_bytes: Volumes beyond this are read again at each use.
        channels: Channels that pictures are to have: grey ones are repeated (a blank field of a colour set is stored grey), others refused.
            None takes them as they are.

    Attributes:
        label_facts: Case id to what its label readers counted (`counts`, `flags`) and which structures it labels (`labelled`, None
            for all), for the cases where there is something to say.
    """

    def __init__(
        self, domain: str, args: Mapping[str, Any] | None = None, budget_bytes: int = 8 << 30, channels: int | None = None
    ) -> None:
        self.domain = lookup("domain", domain)(**(args or {}))
        self.channels = channels
        self.left = budget_bytes
        self.kept: dict[str, Volume] = {}
        self.label_facts: dict[str, dict[str, Any]] = {}

    def __call__(self, case: Case) -> Volume:
        """Return a case.

        Raises:
            ImageError: The image cannot be used, or the label map holds values that stand for no structure.
            GeometryError: The label map lies on another grid than the image, by more than a tenth of the smallest voxel edge, or
                in another frame of reference.
        """
        if case.id in self.kept:
            return self.kept[case.id]
        volume = self._read(case)
        maps = [m for m in (volume.label, *volume.raters) if m is not None]
        size = volume.image.nbytes + volume.valid.nbytes + sum(m.nbytes for m in maps)
        if size <= self.left:
            self.left -= size
            self.kept[case.id] = volume
        return volume

    def _read(self, case: Case) -> Volume:
        channels = case.channels
        files, part = channels[0]
        if len(channels) > 1:
            samples = [self._channel(case, k) for k in range(len(channels))]
            sample, volume = samples[0], joined_channels(samples, case.id)
            return self._labelled(volume, sample, case, files)
        try:
            sample = self.domain.read(files, series_id=case.series_id or case.id, part=part)
        except ImageError as err:
            if err.reason == "not_3d" and part is None:
                more = "; a file whose volumes are channels is read from a Decathlon JSON that names these as modality"
                raise ImageError(err.reason, f"{err}{more}") from None
            raise
        if sample.meta.kind == "clip":
            raise ImageError(
                "unsupported_format", f"case {case.id}: a clip of {len(sample.image)} frames; give single pictures or volumes"
            )
        volume = whole_volume(sample) if sample.meta.kind == "volume" else self._picture(sample, case)
        return self._labelled(volume, sample, case, files)

    def _channel(self, case: Case, k: int) -> Sample:
        """Return one channel of a volume that has several.

        Raises:
            ImageError: It cannot be used, or is no volume.
        """
        channels = case.channels
        files, part = channels[k]
        at = f"case {case.id}: channel {k} of {len(channels)}"
        if k == 0 and case.volumes > 1 and (found := volumes_in(files[0])) != case.volumes:
            raise ImageError(
                "not_3d",
                f"case {case.id}: its file has {found} volume(s), the list names {case.volumes} channels (modality); correct the list, or the file",
            )
        try:
            sample: Sample = self.domain.read(files, series_id=case.id, part=part)
        except ImageError as err:
            text = f"{at}: {str(err).removeprefix(f'series {case.id}: ')}"
            raise (GeometryError(text, err.reason) if isinstance(err, GeometryError) else ImageError(err.reason, text)) from None
        if sample.meta.kind != "volume":
            raise ImageError("unsupported_format", f"{at}: {sample.meta.kind}; channels in files of their own are read of volumes")
        return sample

    def _labelled(self, volume: Volume, sample: Sample, case: Case, files: Sequence[Path]) -> Volume:
        """Return the volume with the label maps of its case, on the grid of a sample."""
        if case.label is None:
            return volume
        read: Callable[[Path], LabelMap]
        if volume.picture:
            read = partial(read_picture_labels, shape=volume.image.shape[1:3])
        else:
            grid = Grid.of(sample, frame_of_reference(files[0]))
            read = partial(read_labels, grid=grid, structures=case.rules.names or None)
        volume = _with_labels(volume, case, read)
        labelled = None if volume.labelled is None else list(volume.labelled)
        if volume.counts or volume.flags or labelled is not None:
            self.label_facts[case.id] = {"counts": dict(volume.counts), "flags": list(volume.flags), "labelled": labelled}
        return volume

    def _picture(self, sample: Sample, case: Case) -> Volume:
        volume, found = picture_volume(sample), len(sample.image)
        if self.channels in (None, found):
            return volume
        if found == 1:
            return replace(volume, image=np.repeat(volume.image, self.channels, axis=0), repeated=True)
        raise ImageError(
            "unsupported_pixels",
            f"case {case.id}: a picture of {found} channels, the encoder takes {self.channels}; make it grey, or take an encoder with "
            f"in_channels {found}",
        )


def whole_volume(sample: Sample) -> Volume:
    """Return a volume as its domain delivers it."""
    assert sample.spacing_mm is not None and sample.affine is not None
    x, y, z = sample.spacing_mm
    return Volume(
        image=sample.image,
        valid=np.ones(sample.image.shape[1:], dtype=bool) if sample.valid is None else sample.valid,
        label=None,
        spacing_mm=(x, y, z),
        affine=sample.affine,
        stats=sample.meta.stats,
    )


def joined_channels(samples: Sequence[Sample], case: str) -> Volume:
    """Return a volume of several channels on one grid.

    A voxel is valid where it is valid in all channels; the statistics of each channel are those of its own valid voxels.

    Args:
        samples: One for each channel, (1, X, Y, Z).
        case: Id for messages.

    Raises:
        GeometryError: Other shapes, or corner voxels more than a tenth of the smallest voxel edge apart.
    """
    volumes = [whole_volume(sample) for sample in samples]
    first = volumes[0]
    shape = first.image.shape[1:]
    ends = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    limit = GRID_TOLERANCE * min(first.spacing_mm)
    for k, volume in enumerate(volumes[1:], start=1):
        own = volume.image.shape[1:]
        if own != shape:
            found = f"{size_text(own)} voxels, channel 0 has {size_text(shape)}"
        elif (apart := float(np.linalg.norm(ends @ (volume.affine - first.affine).T, axis=1).max())) > limit:
            found = f"lies up to {apart:.2f} mm away from channel 0; at most {limit:.2f} mm is accepted"
        else:
            continue
        raise GeometryError(
            f"case {case}: channel {k} of {len(volumes)}: {found}; all channels must share one grid: resample it to channel 0",
            reason="geometry",
        )
    return replace(
        first,
        image=np.concatenate([volume.image for volume in volumes]),  # of the narrowest type that holds all of them
        valid=np.logical_and.reduce([volume.valid for volume in volumes]),
        stats={f"{name}_{k}": value for k, volume in enumerate(volumes) for name, value in volume.stats.items()},
        channel_stats=tuple(volume.stats for volume in volumes),
    )


def picture_volume(sample: Sample) -> Volume:
    """Return a picture (C, H, W) as a volume of one slice; without spacing it counts in pixels."""
    rows, columns = sample.spacing_mm or (1.0, 1.0)
    shape = sample.image.shape[1:]
    valid = np.ones(shape, dtype=bool) if sample.valid is None else sample.valid
    return Volume(
        image=sample.image[..., None],
        valid=valid[..., None],
        label=None,
        spacing_mm=(float(rows), float(columns), 1.0),
        affine=np.diag([float(rows), float(columns), 1.0, 1.0]),
        stats=sample.meta.stats,
        picture=True,
        measured=sample.spacing_mm is not None,
    )


def _with_labels(volume: Volume, case: Case, read: Callable[[Path], LabelMap]) -> Volume:
    """Return the volume with the label maps of a case."""
    rules = case.rules
    maps: list[np.ndarray] = []
    said: list[frozenset[int] | None] = []
    counts: Counter[str] = Counter()
    flags: list[str] = []
    for path in case.maps:
        try:
            found = read(path)
            maps.append(_sure(found.array, replace(rules, ignore=None) if found.named else rules))  # names were read as such
        except ImageError as err:  # its text holds the file's name, which may be a patient's
            text = f"case {case.id}: {str(err).replace(path.name, 'map')}"
            raise (GeometryError(text) if isinstance(err, GeometryError) else ImageError(err.reason, text)) from None
        said.append(_said(case, found))
        counts.update(found.counts)
        flags += found.flags
    known = [structures for structures in said if structures is not None]
    labelled = None if len(known) == 0 else tuple(sorted(frozenset.intersection(*known)))
    if labelled is not None and rules.values is not None and rules.values <= set(labelled):
        labelled = None
    if labelled is not None:
        for array in maps:  # a few voxels of a structure that is not labelled throughout
            array[~np.isin(array, (0, *labelled))] = UNCERTAIN
    label, ties = majority(maps)
    if ties:
        counts["rater_ties"] += ties
    if unsure := int((label == UNCERTAIN).sum()):
        counts["uncertain_voxels"] += unsure
    return replace(
        volume,
        label=label,
        points=structure_points(label),
        labelled=labelled,
        raters=tuple(maps) if len(maps) > 1 else (),
        counts=dict(counts),
        flags=tuple(dict.fromkeys(flags)),
    )


def _said(case: Case, found: LabelMap) -> frozenset[int] | None:
    """Return the structures that one map labels, after the map and after the table; None for all."""
    own = frozenset(found.names) if found.named else None
    table = None if case.labelled is None else frozenset(case.labelled)
    return table if own is None else own if table is None else own & table


def _sure(array: np.ndarray, rules: LabelRules) -> np.ndarray:
    """Return a map as int16 with uncertain voxels -1, after checking its values.

    Raises:
        ImageError: It holds values that stand for nothing.
    """
    array = array.copy() if rules.ignore is None else np.where(array == rules.ignore, UNCERTAIN, array)
    values = values_in(array)
    unknown = [
        v for v in values if v < UNCERTAIN or v > MAX_VALUE or (rules.values is not None and v > 0 and v not in rules.values)
    ]
    if unknown:
        listed = ", ".join(map(str, sorted(rules.values))) if rules.values is not None else f"1 to {MAX_VALUE}"
        raise ImageError(
            "unsupported_pixels",
            f"its label map holds the value{'s' * (len(unknown) > 1)} {', '.join(map(str, unknown[:5]))}"
            f"{' and others' * (len(unknown) > 5)}, which stand{'s' * (len(unknown) == 1)} for no structure; structures are {listed}, "
            "background 0, uncertain -1: list the structure in dataset.json, or correct the map",
        )
    return np.ascontiguousarray(array, dtype=np.int16)


def known_values(volume: Volume, structures: Iterable[int], case: Case) -> None:
    """Refuse a map with structures that no training label has, where the cohort lists none.

    Raises:
        ImageError: It has one.
    """
    unknown = sorted(structure_values(volume) - set(structures))
    if unknown:
        raise ImageError(
            "unsupported_pixels",
            f"case {case.id}: its label map holds the value{'s' * (len(unknown) > 1)} {', '.join(map(str, unknown[:5]))}, which no "
            "training label has; list the structures in dataset.json, or correct the map",
        )


def structure_values(volume: Volume) -> set[int]:
    """Return the structures that the label map of a volume has, and those of its raters."""
    found = set(volume.points)
    for one in volume.raters:
        found |= {int(value) for value in np.unique(one) if value > 0}
    return found


def majority(maps: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return per voxel the value that most raters give, and the number of voxels where no value leads.

    A voxel without a leading value is uncertain. A rater who is uncertain has no vote.
    """
    if len(maps) == 1:
        return maps[0], 0
    best, votes = np.full(maps[0].shape, UNCERTAIN, dtype=np.int16), np.zeros(maps[0].shape, dtype=np.int16)
    tied = np.zeros(maps[0].shape, dtype=bool)
    for value in np.unique(np.concatenate([np.unique(m) for m in maps])):
        if value == UNCERTAIN:
            continue
        own = np.sum([m == value for m in maps], axis=0, dtype=np.int16)
        tied = np.where(own > votes, False, tied | ((own == votes) & (own > 0)))
        best = np.where(own > votes, value, best)
        votes = np.maximum(own, votes)
    best[tied] = UNCERTAIN
    return best, int(tied.sum())


def comparable(found: np.ndarray, volume: Volume, structures: Iterable[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return prediction and label map without uncertain voxels, and the structures that can be scored on this case.

    Uncertain voxels become background in both, so that nothing there counts for or against. Structures that the map does not
    label are left out: it does not say that they are absent.
    """
    assert volume.label is not None
    doubt = volume.label < 0
    if doubt.any():
        found, label = np.where(doubt, 0, found), np.where(doubt, 0, volume.label)
    else:
        label = volume.label
    return found, label, [s for s in structures if volume.labels(s)]


def labelled_classes(volumes: Sequence[Volume], values: Sequence[int]) -> Tensor | None:
    """Return (B, K) bool, which classes each volume labels, None where all of them label everything.

    Args:
        volumes: With label maps.
        values: What each class is in these maps; 0, background, first.
    """
    if all(volume.complete for volume in volumes):
        return None
    return torch.tensor([[k == 0 or volume.labels(k) for k in values] for volume in volumes])


def structure_points(label: np.ndarray) -> dict[int, np.ndarray]:
    """Return label value to (K, 3) voxel indices, K at most `POINTS`, taken evenly in scan order."""
    points = {}
    for value in np.unique(label):
        if value > 0:
            inside = np.flatnonzero(label == value)
            if len(inside) > POINTS:
                inside = inside[np.linspace(0, len(inside) - 1, POINTS).astype(np.int64)]
            points[int(value)] = np.stack(np.unravel_index(inside, label.shape), axis=1)
    return points


class TrainingCrops:
    """Random crops of labelled volumes, a function of (seed, step, position) alone.

    Args:
        size: Crop in voxels, or (H, W) in pixels of pictures.
        spacing_mm: Voxel size of the crops, one number per axis; None keeps each volume's own.
        normalize: As in `VolumeViews`.
        augment: Geometric and intensity operations of `VolumeViews`, of pictures see `picture_augment`.
        foreground: Share of crops centred on a voxel of a structure.
        seed: Seed.
        device: Where crops are made.
        raters: Which map a crop takes where there are several: `majority`, or `draw`, one rater's at random for each crop.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        spacing_mm: Sequence[float] | None,
        normalize: str | Mapping[str, Any],
        augment: Mapping[str, Any],
        foreground: float,
        seed: int,
        device: torch.device,
        raters: str = "majority",
    ) -> None:
        known = [name for name in inspect.signature(VolumeViews).parameters if name not in NOT_AUGMENTATION]
        unknown = [f"{name}{near(name, known)}" for name in augment if name not in known]
        if unknown:
            raise RequestError(f"augment: unknown key {', '.join(unknown)}; accepted are {', '.join(known)}; correct it")
        self.axes = 2 if not isinstance(size, int) and len(size) == 2 else 3
        if self.axes == 2:
            augment = picture_augment(augment)
        own = None if spacing_mm is None else one_slice(spacing_mm)
        self.views = VolumeViews(VIEW, size=one_slice(size), spacing_mm=own, normalize=normalize, **augment)
        self.foreground = foreground
        self.seed = seed
        self.device = device
        self.raters = raters

    def batch(self, volumes: Sequence[Volume], step: int) -> tuple[Tensor, Tensor]:
        """Cut one crop from each volume.

        Returns:
            Images (B, C, *size) float32 and labels (B, 1, *size) int64.
        """
        crops, labels = [], []
        for position, volume in enumerate(volumes):
            crop, label = self.cut(volume, DrawKey(self.seed, step, position))
            crops.append(crop)
            labels.append(label)
        params = [[self.views.draw(crop.key, 0)] for crop in crops]
        out = self.views.apply(crops, params, self.device, labels=labels)
        return as_seen(out[VIEW][:, 0], self.axes), as_seen(out["labels"], self.axes)

    def cut(self, volume: Volume, key: DrawKey) -> tuple[Crop, np.ndarray]:
        """Draw a box and cut it out with the margin that the views need, zero-padded outside the volume."""
        assert volume.label is not None
        box = self.draw_box(volume, key)
        spacing = np.asarray(volume.spacing_mm)
        margin = np.asarray(self.views.margin_mm(volume.spacing_mm))
        low = np.floor((np.asarray(box.start_mm) - margin) / spacing + 1e-6).astype(int)
        high = np.ceil((np.asarray(box.start_mm) + np.asarray(box.size_mm) + margin) / spacing - 1e-6).astype(int)
        crop = Crop(
            image=cut(volume.image, low, high),
            valid=cut(volume.valid, low, high),
            spacing_mm=volume.spacing_mm,
            origin_mm=tuple(float(v) for v in low * spacing),
            box=box,
            stats=volume.stats,
            key=key,
            id=key.position,
            channel_stats=volume.channel_stats,
        )
        label = volume.label
        if self.raters == "draw" and volume.raters:
            rng = counter_rng(key.seed, key.step, key.position, VIEW, "rater")
            label = volume.raters[int(rng.integers(len(volume.raters)))]
        return crop, cut(label, low, high)

    def draw_box(self, volume: Volume, key: DrawKey) -> Box:
        """Draw where to cut: on a structure, each as often as the others, or anywhere.

        The box lies inside the volume along axes where it fits; along shorter axes it holds the whole volume, shifted
        at random. Its corner is on a voxel corner, so that without geometric augmentation voxels are copied.
        """
        rng = counter_rng(key.seed, key.step, key.position, VIEW, "box")
        spacing = np.asarray(volume.spacing_mm)
        size = np.asarray(self.views.box_size_mm(volume.spacing_mm))
        room = np.asarray(volume.label.shape if volume.label is not None else volume.valid.shape) * spacing - size
        low, high = np.minimum(room, 0.0), np.maximum(room, 0.0)
        u = rng.random(3)
        if volume.points and rng.random() < self.foreground:
            points = volume.points[sorted(volume.points)[int(rng.integers(len(volume.points)))]]
            centre = (points[int(rng.integers(len(points)))] + 0.5) * spacing
            start = np.clip(centre - size / 2, low, high)
            short = room < 0  # a fixed place would repeat the same crop: along short axes the shift stays free
            start = np.where(short, low + u * (high - low), start)
        else:
            start = low + u * (high - low)
        start = np.rint(start / spacing) * spacing
        return Box((float(start[0]), float(start[1]), float(start[2])), (float(size[0]), float(size[1]), float(size[2])))


def one_slice(sizes: float | Sequence[float]) -> tuple[Any, ...]:
    """Return sizes along three axes: those of a picture, and 1 for its slice; one number stands for all axes of a volume."""
    if isinstance(sizes, int | float):
        return (sizes,) * 3
    return (*sizes, 1) if len(sizes) == 2 else tuple(sizes)


def as_seen(x: Tensor, axes: int) -> Tensor:
    """Return a batch (B, C, *size) of volumes as the network takes it: pictures, of two axes, without their slice axis."""
    return x[..., 0] if axes == 2 else x


def picture_augment(augment: Mapping[str, Any]) -> dict[str, Any]:
    """Return operations of `VolumeViews` that stay in the plane of a picture: one angle turns it about its normal.

    Raises:
        RequestError: An operation would leave the plane.
    """
    found = dict(augment)
    for key in ("rotate_deg", "flip"):
        value: Any = found.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = (0, 0, value) if key == "rotate_deg" else (value, value, 0)
        elif value is not None and key == "rotate_deg":
            raise RequestError(f"augment.rotate_deg: {value}; a picture turns by one angle: give one number")
        elif isinstance(value, list | tuple):
            found[key] = (*value, 0) if len(value) == 2 else value
    if found.get("warp") is not None:
        raise RequestError(
            "augment.warp: its displacements leave the plane of a picture; leave it out, rotate_deg and scale are there"
        )
    return found


def cut(array: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the last three axes from `low` to `high`, zero-padded outside."""
    shape = np.asarray(array.shape[-3:])
    inner_low, inner_high = np.clip(low, 0, shape), np.clip(high, 0, shape)
    out = np.zeros((*array.shape[:-3], *(high - low)), dtype=array.dtype)
    if (inner_high > inner_low).all():
        tx, ty, tz = (slice(a, b) for a, b in zip(inner_low - low, inner_high - low))
        sx, sy, sz = (slice(a, b) for a, b in zip(inner_low, inner_high))
        out[..., tx, ty, tz] = array[..., sx, sy, sz]
    return out


def whole_image(
    volume: Volume,
    normalize: str | Mapping[str, Any],
    spacing_mm: Sequence[float] | None,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Return a whole volume of one channel, or a picture, as `whole_channels` does, and the one value that stands for padding."""
    image, (padding,) = whole_channels(volume, normalize, spacing_mm, device)
    return image, padding


def whole_channels(
    volume: Volume,
    normalize: str | Mapping[str, Any],
    spacing_mm: Sequence[float] | None,
    device: torch.device,
) -> tuple[Tensor, tuple[float, ...]]:
    """Return a whole volume as the network sees it.

    Args:
        volume: The volume. Where it has `channel_stats` each channel is normalised by its own; a window is the same for all.
        normalize: As in `VolumeViews`.
        spacing_mm: Voxel size wanted, two numbers for pictures; None keeps the volume's own.
        device: Where it goes.

    Returns:
        (1, C, X, Y, Z) float32, of pictures (1, C, H, W, 1), and the value that stands for padding, of all channels or of each.
    """
    name, window = (normalize, None) if isinstance(normalize, str) else ("window", tuple(normalize["window"]))
    ways = [normalization(name, window, stats, 0) for stats in volume.channel_stats or (volume.stats,)]
    image = torch.from_numpy(volume.image.astype(np.float32)).to(device)
    outside = ~torch.from_numpy(volume.valid).to(device)
    for part, how in by_channel(image, ways):
        normalize_(part, how).masked_fill_(outside, how.padding)
    image = image[None]
    if spacing_mm is not None and not np.allclose(one_slice(spacing_mm), volume.spacing_mm, rtol=1e-6):
        shape = [max(1, round(n * own / new)) for n, own, new in zip(image.shape[2:], volume.spacing_mm, one_slice(spacing_mm))]
        image = nn.functional.interpolate(image, size=shape, mode="trilinear", align_corners=False)
    return image, tuple(how.padding for how in ways)


def padded(image: Tensor, size: Sequence[int], padding: Sequence[float]) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad an image to a size on both sides, half of what lacks before it (rounded down), each channel with its own value.

    Args:
        image: (1, C, *n).
        size: Least size along each of the axes.
        padding: Value of all channels, or of each.

    Returns:
        (1, C, *max(n, size)), and where the image lies in it, for the last axes of any tensor.
    """
    spare = [max(0, wanted - n) for wanted, n in zip(size, image.shape[2:])]
    at = tuple(slice(n // 2, n // 2 + have) for n, have in zip(spare, image.shape[2:]))
    if not any(spare):
        return image, at
    values = torch.tensor(padding, dtype=image.dtype, device=image.device).expand(image.shape[1])
    shape = (image.shape[0], image.shape[1], *(have + n for have, n in zip(image.shape[2:], spare)))
    whole = values.view(1, -1, *[1] * (image.ndim - 2)).repeat(shape[0], 1, *shape[2:])
    where: tuple[Any, ...] = (..., *at)
    whole[where] = image
    return whole, at
