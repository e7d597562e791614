"""Four 64^3 patches per volume, ready to train on: our source and views beside bare Blosc2 and MONAI's PersistentDataset.

    python -m benchmarks.patches

Ready means a float32 tensor (4, 1, 64, 64, 64), standardised with the statistics of its volume. One turn passes over
all volumes. All three run in this process on one thread, from a warm page cache:

- ours: `ImageSource.fetch` and `ImageSource.views`, as the training loop calls them, with the shipped sampler;
- bare Blosc2: open the volume, four crops, subtract the mean, divide by the standard deviation (both known);
- MONAI: LoadImaged, EnsureChannelFirstd, NormalizeIntensityd (these three cached as .pt) and RandSpatialCropSamplesd.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    Check,
    Result,
    finish,
    interleave,
    milliseconds,
    parser,
    synthetic_ct,
    times_faster,
    without_monai_warnings,
)
from benchmarks.crops import open_bare, write_bare
from medssl.domains.ct import CT
from medssl.sampling.samplers import CropSampler
from medssl.sampling.source import ImageSource
from medssl.store.reader import StoreReader
from medssl.store.writer import cache_items
from medssl.types import DrawKey
from medssl.views.pipeline import Crop, VolumeViews

OURS, BARE, MONAI = "medssl source and views", "bare Blosc2", "MONAI PersistentDataset"
PER_VOLUME = 4
CPU = torch.device("cpu")


class Files:
    """What `cache_items` needs of an archive: the volumes of this benchmark."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths

    def files(self, series_id: str) -> list[Path]:
        """Return the file of a volume."""
        return [self.paths[series_id]]

    def source_tag(self, series_id: str) -> str:
        """Return nothing: the files do not change."""
        return ""

    def part(self, series_id: str) -> dict[str, Any] | None:
        """Return None: an item is all of its file."""
        return None


def write_volumes(folder: Path, count: int, shape: list[int]) -> dict[str, Path]:
    """Write synthetic volumes as .nii.gz and return them by series id."""
    import nibabel

    paths = {}
    for number in range(count):
        path = folder / f"volume_{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(synthetic_ct(shape, number), np.eye(4), dtype=np.int16), path)
        paths[f"{number:032x}"] = path
    return paths


def make_source(store: Path, paths: dict[str, Path], crop: int) -> ImageSource:
    """Cache the volumes and return a source as `build.training_source` makes it, without augmentation."""
    rows = [SimpleNamespace(series_id=series_id, patient_id=series_id) for series_id in paths]
    summary = cache_items(Files(paths), rows, CT(), store)
    if summary.failed:
        raise RuntimeError(f"caching failed: {summary.failed}")
    reader = StoreReader(store)
    series = dict(enumerate(sorted(paths)))
    views = VolumeViews(size=crop, normalize="zscore")
    sampler = CropSampler("main", sorted(series), lambda item: reader.record(series[item]), views.box_size_mm, batch=PER_VOLUME)
    return ImageSource("main", "ct", reader, series, sampler, views, item=Crop)


class BareVolumes:
    """Bare Blosc2 files with known mean and standard deviation; the least that random patches cost.

    Args:
        paths: One Blosc2 file per volume.
        scales: (mean, std) of each.
        crop: Edge of a patch in voxels.
    """

    def __init__(self, paths: list[Path], scales: list[tuple[float, float]], crop: int) -> None:
        self.paths, self.scales, self.crop = paths, scales, crop
        self.rng = np.random.default_rng(2)

    def patch(self, array: Any, start: tuple[int, ...], scale: tuple[float, float]) -> np.ndarray:
        """Return one standardised patch."""
        x: np.ndarray = array[tuple(slice(first, first + self.crop) for first in start)].astype(np.float32)
        x -= np.float32(scale[0])
        x /= np.float32(scale[1])
        return x

    def patches(self, number: int) -> Tensor:
        """Return four random patches of a volume, (4, 1, *size)."""
        array = open_bare(self.paths[number])
        starts = [tuple(int(self.rng.integers(0, n - self.crop + 1)) for n in array.shape) for _ in range(PER_VOLUME)]
        return torch.from_numpy(np.stack([self.patch(array, start, self.scales[number])[None] for start in starts]))


def persistent_dataset(paths: list[Path], crop: int, folder: Path) -> Any:
    """Return MONAI's dataset; its cache is filled on the first pass."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensityd, RandSpatialCropSamplesd

    steps = [
        LoadImaged(keys="image", image_only=True),
        EnsureChannelFirstd(keys="image"),
        NormalizeIntensityd(keys="image"),
        RandSpatialCropSamplesd(keys="image", roi_size=(crop,) * 3, num_samples=PER_VOLUME, random_size=False),
    ]
    return PersistentDataset([{"image": str(path)} for path in paths], Compose(steps), cache_dir=folder)


def check_equal(source: ImageSource, bare: BareVolumes) -> None:
    """Compare one batch of ours with bare patches of the same boxes."""
    fetched = source.fetch([DrawKey(0, 0, position) for position in range(PER_VOLUME)])
    ours = source.views(fetched, CPU)["volume"][:, 0, 0].numpy()
    for patch, crop in zip(ours, fetched, strict=True):
        start = tuple(round(edge / spacing) for edge, spacing in zip(crop.box.start_mm, crop.spacing_mm, strict=True))
        theirs = bare.patch(open_bare(bare.paths[crop.id]), start, bare.scales[crop.id])
        np.testing.assert_allclose(patch, theirs, rtol=1e-4, atol=1e-5)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--volumes", type=int, default=6)
    options_parser.add_argument("--shape", type=int, nargs=3, default=[256, 256, 128])
    options_parser.add_argument("--crop", type=int, default=64)
    options = options_parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_volumes(folder, options.volumes, options.shape)
        source = make_source(folder / "store", paths, options.crop)
        samples = [source.reader.read(source.series[item]) for item in range(options.volumes)]
        bare = BareVolumes(
            [write_bare(sample.image[0], folder / f"{number}.b2nd") for number, sample in enumerate(samples)],
            [(sample.meta.stats["mean"], sample.meta.stats["std"]) for sample in samples],
            options.crop,
        )
        del samples
        check_equal(source, bare)
        with without_monai_warnings():
            dataset = persistent_dataset(list(paths.values()), options.crop, folder / "monai")
        step = 0

        def ours() -> None:
            nonlocal step
            for _ in range(options.volumes):
                source.views(source.fetch([DrawKey(0, step, position) for position in range(PER_VOLUME)]), CPU)
                step += 1

        def theirs() -> None:
            for number in range(options.volumes):
                bare.patches(number)

        def monai() -> None:
            for number in range(options.volumes):
                torch.stack([item["image"] for item in dataset[number]])

        seconds = interleave({OURS: ours, BARE: theirs, MONAI: monai}, repeats=options.repeats)
        on_disk = {
            OURS: sum(path.stat().st_size for path in (folder / "store" / "items").iterdir()),
            BARE: sum(path.stat().st_size for path in bare.paths),
            MONAI: sum(path.stat().st_size for path in (folder / "monai").iterdir()),
        }
    patches = PER_VOLUME * options.volumes
    rows = [
        {
            "pipeline": name,
            "patches_per_s": patches / statistics.median(seconds[name]),
            **milliseconds(seconds, name),
            "mb_on_disk": on_disk[name] / 1e6,
            "ours_is_times_faster": times_faster(seconds, OURS, name),
        }
        for name in seconds
    ]
    checks = [
        Check("rate against bare Blosc2", times_faster(seconds, OURS, BARE), 0.8),
        Check("rate against MONAI PersistentDataset", times_faster(seconds, OURS, MONAI), 1.6),
    ]
    notes = [
        "the reader keeps the last 16 frames open, so that 6 volumes are opened once; with many more volumes each patch opens its own",
        f"times are per pass over {options.volumes} volumes ({patches} patches), one thread",
        "ours equals bare Blosc2 on the same boxes (checked before timing)",
        "ours draws its four patches as a batch of the shipped sampler: any volume, three of four around foreground",
    ]
    return finish(Result("patches", rows, checks, vars(options), notes, {"seconds": seconds}), options.out)


if __name__ == "__main__":
    main()
