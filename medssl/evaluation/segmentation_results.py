"""What a fine-tuning run for segmentation leaves: scores of cases, and the files beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.label_files.base import Grid
from medssl.domains.label_files.write import check_source, in_file_axes, need_highdicom, write_dicom_seg
from medssl.errors import RequestError
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.metrics import areas_mm2, dice, hd95_mm, mean_score, volumes_ml
from medssl.evaluation.volumes import CaseReader, Volume, cut
from medssl.weights import write_atomic, write_private

FIGURE_SIZE = 128  # voxels per axis that a figure keeps at most
PICTURE_SIZE = 256  # pixels per axis of a picture, which is shown whole


@dataclass(frozen=True)
class CaseScore:
    """Scores of one test case, per structure name; None where the structure is in neither map, or not labelled (volumes).

    Volumes in ml are of the prediction (`volume_ml`) and of the label map (`reference_ml`). A picture has areas (`area_mm2`,
    `reference_mm2`) in their place; where it does not say how large its pixels are they are in pixels (`area_px`, `reference_px`), and it has
    no distances. `outside` says in
    what the case lies outside the training range (`evaluation.outside`); None where nobody looked. `facts` are those of its series in the index.
    `patient` is None where the index does not know whose series it is.
    """

    id: str
    patient: str | None
    dice: dict[str, float | None]
    hd95_mm: dict[str, float | None]
    volume_ml: dict[str, float | None] = field(default_factory=dict)
    reference_ml: dict[str, float | None] = field(default_factory=dict)
    outside: list[dict[str, str]] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    area_mm2: dict[str, float | None] = field(default_factory=dict)
    reference_mm2: dict[str, float | None] = field(default_factory=dict)
    area_px: dict[str, float | None] = field(default_factory=dict)
    reference_px: dict[str, float | None] = field(default_factory=dict)

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the structures that have one, NaN when none has."""
        return mean_score({i: v for i, v in enumerate(self.dice.values()) if v is not None})


@dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves, as in `results.json`.

    Args:
        arm: Name of the weights, or `scratch`.
        labels: Labelled training cases used.
        seed: Seed.
        structures: Names of the structures.
        cases: Scores of every test case.
        curve: Lines of `curve.jsonl`.
        loaded: Counts of the weight loading; None from scratch.
        choice: Which state was scored and which labels chose it.
        seconds: Wall time of training, and per step (median).
        settings: Settings used.
        training_range: What the training cases span, see `outside.TrainingRange.facts`; empty in results of earlier versions.
        forced: How the images differ from those of the pretraining, where the settings forced it.
        adapted: What was changed of the weights for the channels of the images.
        channel_names: Channels of the volumes where they have several, as the list of the cohort names them.
        fold: The fold that was tested, of `of_folds`; None where the splits were given.
        of_folds: Number of folds.
        without_dicom_seg: Test cases whose series was resampled (gantry tilt, uneven slices), so that they have NIfTI for DICOM-SEG.
    """

    arm: str
    labels: int
    seed: int
    structures: list[str]
    cases: list[CaseScore]
    curve: list[dict[str, Any]]
    loaded: dict[str, int] | None
    choice: str
    seconds: dict[str, float]
    settings: dict[str, Any]
    training_range: dict[str, Any] = field(default_factory=dict)
    forced: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    channel_names: list[str] = field(default_factory=list)
    fold: int | None = None
    of_folds: int | None = None
    without_dicom_seg: list[str] = field(default_factory=list)

    def mean(self, metric: str = "dice") -> dict[str, float]:
        """Return the mean of `dice` or `hd95_mm` per structure over the test cases that have it."""
        means = {}
        for name in self.structures:
            values = [getattr(case, metric)[name] for case in self.cases]
            kept = [value for value in values if value is not None]
            means[name] = float(np.mean(kept)) if kept else float("nan")
        return means

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN is null."""
        content = asdict(self)
        content["n_test"] = len(self.cases)
        content["mean"] = {metric: {k: plain(v) for k, v in self.mean(metric).items()} for metric in ("dice", "hd95_mm")}
        content["mean_dice"] = plain(float(np.nanmean([case.mean_dice for case in self.cases])) if self.cases else math.nan)
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FinetuneResult:
        """Read what `to_json` made."""
        values = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        values["cases"] = [CaseScore(**case) for case in values["cases"]]
        return cls(**values)


def score_case(
    case: Case, volume: Volume, found: np.ndarray, label: np.ndarray, scored: Mapping[int, str], structures: Iterable[str]
) -> CaseScore:
    """Return the scores of a prediction against the label map of its case, both without uncertain voxels.

    Args:
        case: Which.
        volume: Its image, for the size of voxels.
        found: Prediction, of the shape of the label map.
        label: (X, Y, Z), of a picture (H, W, 1).
        scored: Value to name of the structures that can be scored.
        structures: Names of all; those that cannot be scored have None.
    """
    overlap, distance = dice(found, label, scored), dict[int, float]()
    volumes: tuple[dict[int, float], ...] = ({}, {})  # of the prediction, of the label map
    areas: tuple[dict[int, float], ...] = ({}, {})
    counts: tuple[dict[int, float], ...] = ({}, {})
    if not volume.picture:
        distance = hd95_mm(found, label, scored, volume.spacing_mm)
        volumes = (volumes_ml(found, scored, volume.affine), volumes_ml(label, scored, volume.affine))
    elif volume.measured:  # in the plane: along a single slice every pixel would lie on a surface
        distance = hd95_mm(found[..., 0], label[..., 0], scored, volume.spacing_mm[:2])
        areas = (areas_mm2(found, scored, volume.spacing_mm), areas_mm2(label, scored, volume.spacing_mm))
    else:
        counts = (areas_mm2(found, scored, (1.0, 1.0)), areas_mm2(label, scored, (1.0, 1.0)))
    values, names = {name: value for value, name in scored.items()}, list(structures)

    def by_name(of: Mapping[int, float]) -> dict[str, float | None]:
        return {name: plain(of.get(values.get(name, -1), math.nan)) for name in names}

    def sizes(of: Mapping[int, float]) -> dict[str, float | None]:
        return {scored[value]: size for value, size in of.items()}

    return CaseScore(
        id=case.id,
        patient=case.patient_id if case.patient_known else None,
        dice=by_name(overlap),
        hd95_mm=by_name(distance),
        volume_ml=sizes(volumes[0]),
        reference_ml=sizes(volumes[1]),
        facts=dict(case.facts),
        area_mm2=sizes(areas[0]),
        reference_mm2=sizes(areas[1]),
        area_px=sizes(counts[0]),
        reference_px=sizes(counts[1]),
    )


def check_dicom_seg(cases: Sequence[Case]) -> None:
    """Refuse a run that could not write its predictions as DICOM-SEG, before the first step.

    Raises:
        RequestError: highdicom is missing, or an image is no DICOM series of single slices.
    """
    need_highdicom()
    for case in cases:
        try:
            check_source(case.first_files)
        except RequestError as err:
            raise RequestError(f"case {case.id}: {err}") from None


def write_dicom_prediction(path: Path, label: np.ndarray, volume: Volume, case: Case, structures: Mapping[int, str]) -> None:
    """Write a label map as DICOM-SEG on the slices of its series, for the owner alone; see `label_files.write.write_dicom_seg`."""
    from medssl import __version__

    x, y, z = label.shape
    write_dicom_seg(path, label, Grid(volume.affine, (x, y, z)), case.first_files, structures, version=__version__)


def write_prediction(path: Path, label: np.ndarray, volume: Volume, case: Case) -> None:
    """Write a label map on the grid of its image, atomically: as NIfTI, of a picture as PNG of its values.

    Where the image is one file, or one for each channel, axes run as they do in the (first) file; for a DICOM series they are canonical (RAS).
    """
    if volume.picture:
        write_atomic(path, _png(label[..., 0]))
        return
    import gzip

    import nibabel

    image = nibabel.Nifti1Image(*in_file_axes(label, volume.affine, case.first_files))
    image.header.set_xyzt_units("mm")
    write_atomic(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _png(label: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(label.astype(np.uint8 if label.max(initial=0) < 256 else np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_case_names(path: Path, cases: Sequence[Case]) -> None:
    """Write case id, image name and patient for the owner alone (mode 0600 in a folder of mode 0700)."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["case", "image", "patient"])
    for case in cases:
        images = "; ".join(image.name for image in (case.image, *case.further))
        writer.writerow([case.id, case.series_id or images, case.patient])
    write_private(path, text.getvalue().encode())


def write_label_counts(out: Path, reader: CaseReader, cohort: Cohort, cases: Iterable[Case] | None = None) -> None:
    """Write what the label readers counted, and for the owner alone the structure names of files where the cohort lists none.

    Args:
        out: Folder of the results.
        reader: What has read the cases.
        cohort: The labelled set.
        cases: Those of this run; None for all.
    """
    used = cohort.cases if cases is None else cases
    rows = {case.id: reader.label_facts[case.id] for case in used if case.id in reader.label_facts}
    if rows:
        names = {str(value): name for value, name in cohort.structures.items()}  # `labelled` has values alone
        content = {"overlap": "the higher value has the voxel", "structures": names, "cases": rows}
        write_atomic(out / "labels.json", json.dumps(content, indent=1).encode())
    if cohort.file_names:
        import csv
        import io

        text = io.StringIO()
        csv.writer(text).writerows([["value", "name"], *([str(value), name] for value, name in cohort.file_names.items())])
        write_private(out / "private" / "structures.csv", text.getvalue().encode())


def write_figures(path: Path, pictures: Sequence[tuple[Volume, np.ndarray, float]], structures: Mapping[int, str]) -> None:
    """Write a few cases as `segmentation.npz`, cut around their structures to one common size; pictures whole, with fewer pixels.

    `image` (N, X, Y, Z) float32, `label` and `prediction` (N, X, Y, Z) uint8 with structure k as k-th name,
    `spacing_mm` (N, 3), `dice` (N,), `structures` (K,) str, `picture` bool: the cases are pictures (N, H, W, 1). Of several channels the
    first alone.
    """
    import io

    pictures = [(thinned(volume), found[thin(volume)], score) for volume, found, score in pictures]
    shapes = np.array([volume.image.shape[1:] for volume, _, _ in pictures])
    size = np.minimum(shapes.max(axis=0), PICTURE_SIZE if pictures[0][0].picture else FIGURE_SIZE)
    rank = np.zeros(max(structures) + 1, dtype=np.uint8)
    rank[list(structures)] = np.arange(1, len(structures) + 1)
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for volume, found, _ in pictures:
        assert volume.label is not None
        where = np.argwhere(volume.label > 0)
        shape = np.array(volume.label.shape)
        centre = where.mean(axis=0).round().astype(int) if len(where) else shape // 2
        low = np.where(shape <= size, -((size - shape) // 2), np.clip(centre - size // 2, 0, np.maximum(shape - size, 0)))
        darkest = np.float32((volume.image if volume.picture else volume.image[0]).min())
        images.append(cut(volume.image[0].astype(np.float32) - darkest, low, low + size) + darkest)
        for kept, array in ((labels, volume.label), (predictions, found)):
            values = cut(array, low, low + size)
            kept.append(rank[np.where((values >= 0) & (values < len(rank)), values, 0)])
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        image=np.stack(images),
        label=np.stack(labels),
        prediction=np.stack(predictions),
        spacing_mm=np.array([volume.spacing_mm for volume, _, _ in pictures]),
        dice=np.array([score for _, _, score in pictures]),
        structures=np.array(list(structures.values())),
        picture=np.array(pictures[0][0].picture),
    )
    write_atomic(path, buffer.getvalue())


def thin(volume: Volume) -> tuple[slice, ...]:
    """Return which rows and columns of a picture a figure keeps, evenly taken; everything of a volume."""
    step = -(-max(volume.image.shape[1:]) // PICTURE_SIZE) if volume.picture else 1
    return (slice(None, None, step), slice(None, None, step), slice(None))


def thinned(volume: Volume) -> Volume:
    """Return a picture with the rows and columns that a figure keeps; a volume as it is."""
    if not volume.picture or volume.label is None:
        return volume
    kept = thin(volume)
    step = int(kept[0].step)
    rows, columns, depth = volume.spacing_mm
    return replace(
        volume, image=volume.image[(slice(None), *kept)], label=volume.label[kept], valid=volume.valid[kept],
        spacing_mm=(rows * step, columns * step, depth),
    )  # fmt: skip


def plain(value: float) -> float | None:
    """Return a number for JSON; NaN is null."""
    return None if math.isnan(value) else float(value)
