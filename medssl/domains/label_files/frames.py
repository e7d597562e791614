"""Labels of single frames of a cine: a label map over time, or a folder of pictures, one per labelled frame.

Frames count from 0, as those of the cine do. Rows and columns are those of its screen:

    .npz         `labels` (T, H, W), or (n, H, W) with `frames` (n,), their numbers
    .nii .nii.gz (columns, rows, T), or (columns, rows, 1, T), as pictures are stacked by the common tools
    a folder     one PNG, TIFF or BMP per labelled frame; the last number of its name is that of the frame
"""

from __future__ import annotations

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medssl.errors import RequestError

SUFFIXES = (".npz", ".nii", ".nii.gz")
PICTURES = (".png", ".tif", ".tiff", ".bmp")
LARGEST = 255


@dataclass(frozen=True)
class FrameLabels:
    """The labels of a cine.

    Args:
        path: File or folder.
        frames: (n,) numbers of the labelled frames, ascending.
        values: Values that occur in them.
        shape: (T, H, W) of the cine.
    """

    path: Path
    frames: np.ndarray
    values: frozenset[int]
    shape: tuple[int, int, int]

    def read(self) -> np.ndarray:
        """Return (n, H, W) uint8 labels of `frames`."""
        numbers, labels = _load(self.path, self.shape)
        return labels[np.searchsorted(numbers, self.frames)]


def find_frame_labels(folder: Path, name: str) -> Path | None:
    """Return the label file, or the folder of pictures, that a table names; None when there is none inside the folder."""
    for candidate in (name, *(f"{name}{suffix}" for suffix in SUFFIXES)):
        path = folder / candidate
        if path.exists() and path.resolve().is_relative_to(folder.resolve()) and path.resolve() != folder.resolve():
            return path
    return None


def read_frame_labels(path: Path, shape: tuple[int, int, int], *, drawn: bool = False) -> FrameLabels:
    """Read the labels of a cine and hold them against its shape.

    Args:
        path: See the module's text.
        shape: (T, H, W) of the cine.
        drawn: Take only frames on which something is drawn as labelled.

    Raises:
        RequestError: What is wrong with the file, without its name, so that equal faults can be counted.
    """
    numbers, labels = _load(path, shape)
    if drawn:
        some = labels.reshape(len(labels), -1).any(axis=1)
        numbers, labels = numbers[some], labels[some]
    return FrameLabels(path, numbers, frozenset(int(value) for value in np.unique(labels)), shape)


def _load(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    try:
        if path.is_dir():
            numbers, labels = _pictures(path)
        elif path.suffix == ".npz":
            numbers, labels = _npz(path, shape[0])
        elif path.name.endswith((".nii", ".nii.gz")):
            numbers, labels = _nifti(path, shape[0])
        else:
            raise RequestError(f"of unknown form; accepted: {', '.join(SUFFIXES)}, or a folder of {', '.join(PICTURES)}")
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as err:
        if isinstance(err, RequestError):
            raise
        raise RequestError("damaged, or not what its ending says; write it again") from err
    if labels.shape[1:] != shape[1:]:
        raise RequestError(f"frames of {labels.shape[1]} x {labels.shape[2]} pixels, the cine has {shape[1]} x {shape[2]}")
    if len(np.unique(numbers)) < len(numbers) or (len(numbers) and (numbers.min() < 0 or numbers.max() >= shape[0])):
        raise RequestError(f"frames that come twice, or that a cine of {shape[0]} frames does not have; they count from 0")
    if labels.size and (labels.min() < 0 or labels.max() > LARGEST or (labels != np.round(labels)).any()):
        raise RequestError(f"values that are no whole numbers from 0 to {LARGEST}")
    order = np.argsort(numbers)
    return numbers[order], labels[order].astype(np.uint8)


def _npz(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        labels = found["labels"]
        numbers = found["frames"].astype(np.int64) if "frames" in found else None
    return _numbered(labels, numbers, count)


def _nifti(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        array = np.asarray(nibabel.load(path).dataobj)
    except ImageFileError as err:
        raise ValueError("no NIfTI file") from err
    if array.ndim == 4 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _numbered(array.transpose() if array.ndim == 3 else array, None, count)  # (T, rows, columns)


def _numbered(labels: np.ndarray, numbers: np.ndarray | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    if labels.ndim != 3:
        raise RequestError(f"an array of {labels.ndim} axes; accepted: frames, rows, columns")
    if numbers is None and len(labels) != count:
        raise RequestError(
            f"labels of {len(labels)} frames, the cine has {count}; say which ones they are (.npz with `frames`, or pictures)"
        )
    if numbers is not None and numbers.shape != (len(labels),):
        raise RequestError(f"{len(labels)} labels and {numbers.size} frame numbers")
    return np.arange(count) if numbers is None else numbers, labels


def _pictures(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    numbers, labels = [], []
    for path in sorted(folder.iterdir()):
        digits = re.findall(r"\d+", path.stem)
        if path.suffix.lower() not in PICTURES or not digits:
            continue
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "P", "I;16", "I"):
                raise RequestError(f"pictures of mode {picture.mode}; accepted: one value per pixel, grey or palette")
            labels.append(np.asarray(picture).astype(np.int64))
        numbers.append(int(digits[-1]))
    if not labels:
        raise RequestError("no picture whose name ends in the number of its frame")
    if len({label.shape for label in labels}) > 1:
        raise RequestError("pictures of different sizes")
    return np.array(numbers), np.stack(labels)
