"""Read a 200-slice 512x512 CT series to Hounsfield units: ours beside SimpleITK and MONAI.

    python -m benchmarks.read_series

Uncompressed 12-bit slices whose file names are not in slice order, warm page cache. Ours reads the headers, checks the
geometry, orders the slices and reorients to RAS; MONAI sorts by itself; SimpleITK is given the names in two ways: in
the right order (so that it does no more than read), and as its GDCM sorter finds them in the folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster, without_monai_warnings
from medssl.domains.volume_files import read_volume
from tests.synthetic import write_dicom_series

OURS, KNOWN, SORTED, MONAI = "medssl read_volume", "SimpleITK, order known", "SimpleITK, GDCM sorts", "MONAI LoadImage (pydicom)"


def write_series(folder: Path, shape: list[int]) -> list[Path]:
    """Write the series and return its files in slice order."""
    stored = np.random.default_rng(0).integers(0, 4096, tuple(shape)).astype(np.uint16)
    affine = np.diag([-0.7, -0.7, 1.0, 1.0])
    return write_dicom_series(folder, stored, affine, modality="CT", intercept=-1024, bits_stored=12)


Read = Callable[[], tuple[np.ndarray, Any]]


def readers(folder: Path, files: list[Path]) -> dict[str, Read]:
    """Return what is timed; each gives an array in memory, in its own axis order, and what owns that memory."""
    import SimpleITK as sitk
    from monai.transforms import LoadImage

    with without_monai_warnings():
        load = LoadImage(reader="PydicomReader", image_only=True)
    names = [str(file) for file in files]

    def itk(order: list[str] | tuple[str, ...]) -> tuple[np.ndarray, Any]:
        image = sitk.ReadImage(list(order))
        return sitk.GetArrayViewFromImage(image), image  # the view dies with its image

    def ours() -> tuple[np.ndarray, Any]:
        return read_volume(files[::-1]).array, None

    return {
        OURS: ours,
        KNOWN: lambda: itk(names),
        SORTED: lambda: itk(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))),
        MONAI: lambda: (np.asarray(load(str(folder))), None),
    }


def check_equal(calls: dict[str, Read]) -> None:
    """Compare all readers in RAS order; the series is stored LPS, and MONAI keeps its storage order as (X, Y, Z)."""
    ours, _ = calls[OURS]()
    for name in (KNOWN, SORTED):
        theirs, owner = calls[name]()
        np.testing.assert_array_equal(ours, theirs.transpose(2, 1, 0)[::-1, ::-1], err_msg=name)
        del theirs, owner
    np.testing.assert_array_equal(ours, calls[MONAI]()[0][::-1, ::-1], err_msg=MONAI)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 200], help="columns, rows, slices")
    options = options_parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "series"
        files = write_series(folder, options.shape)
        calls = readers(folder, files)
        check_equal(calls)
        seconds = interleave(calls, repeats=options.repeats)
    rows = [
        {"reader": name, **milliseconds(seconds, name), "ours_is_times_faster": times_faster(seconds, OURS, name)}
        for name in seconds
    ]
    checks = [
        Check("speed against SimpleITK, order known", times_faster(seconds, OURS, KNOWN), 1.0),
        Check("speed against MONAI LoadImage", times_faster(seconds, OURS, MONAI), 6.0),
    ]
    notes = [
        "all readers give equal values (checked before timing)",
        "read_volume may use several threads; SimpleITK and MONAI run as they are called by default",
        "SimpleITK hands out a view of its image, which saves it the copy that most users make",
    ]
    return finish(Result("read_series", rows, checks, vars(options), notes, {"seconds": seconds}), options.out)


if __name__ == "__main__":
    main()
