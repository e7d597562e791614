"""The whole files that `mutants` damages: one or more of every format that the archive reads, generated and, where they are, real."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.conftest import SHARED_DATA
from tests.synthetic import SYNTAXES, oblique_affine, oblique_volume, write_dicom_series, write_itk, write_nifti
from tests.synthetic_multiframe import write_enhanced
from tests.synthetic_planar import radiograph, us_loop, us_region, write_gif, write_planar_dicom, write_video
from tests.synthetic_slides import write_dicom_wsi, write_ome, write_pyramid, write_svs

REAL = {
    "dicom_odd/pydicom": (
        "MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "CT_small.dcm", "MR_small_jp2klossless.dcm",
        "JPGExtended.dcm", "image_dfl.dcm", "no_meta.dcm", "SC_rgb_jpeg_dcmtk.dcm", "DICOMDIR-empty.dcm", "reportsi.dcm",
        "rtdose.dcm", "nested_priv_SQ.dcm", "ExplVR_BigEndNoMeta.dcm",
    ),
    "dicom_odd/pydicom-data": (
        "emri_small.dcm", "emri_small_RLE.dcm", "emri_small_jpeg_ls_lossless.dcm", "emri_small_big_endian.dcm",
        "color-px.dcm", "parametric_map_float.dcm", "JPEG-LL.dcm",
    ),
    "nifti_misc": ("lesion.nii.gz",),
    "nrrd_pyradiomics": ("breast1_image.nrrd",),
    "fluorescence_ht29": ("AS_09125_050116030001_D03f00d0.tif",),
    "wsi": ("CMU-1-Small-Region.svs",),
    "us_lung_video/cc-by-nc": ("Pneu_northumbria_0409_set1_vid1.avi",),
    "us_lung_video/cc-by": (
        "Reg_Image_182106_crop.mp4", "Reg_pat3Image_134811.mpeg",
    ),
}  # fmt: skip


def sources(folder: Path) -> dict[str, Path]:
    """Write the generated files and return all by a name that says what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    found = dict(_generated(folder))
    real = [SHARED_DATA / place / name for place, names in REAL.items() for name in names]
    found |= {f"real-{path.name}": path for path in real if path.is_file()}
    mosaic = next(iter(sorted((SHARED_DATA / "mr_dicom_nih").glob("20180918Si/*/*.dcm"))), None)
    if mosaic is not None:
        found["real-mosaic.dcm"] = mosaic
    return found


def _generated(folder: Path) -> Iterator[tuple[str, Path]]:
    array, affine = oblique_volume((12, 10, 6))
    for name in sorted(SYNTAXES):
        modality = "CT" if name in ("explicit", "rle") else "MR"
        yield f"dicom-{name}", write_dicom_series(folder / name, array, affine, syntax=name, modality=modality)[1]
    mosaic = {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}
    yield "dicom-mosaic", write_dicom_series(folder / "mosaic", array, affine, extra=mosaic)[1]
    frames = np.arange(12 * 6 * 7, dtype=np.uint16).reshape(12, 6, 7)
    for name, syntax, undefined in (
        ("explicit", "explicit", False),
        ("undefined", "explicit", True),
        ("implicit", "implicit", True),
    ):
        path = folder / f"enhanced-{name}.dcm"
        yield (
            f"frames-{name}",
            write_enhanced(path, frames, oblique_affine(), range(12), syntax=SYNTAXES[syntax], undefined=undefined),
        )
    yield "dicom-dx", write_planar_dicom(folder / "dx.dcm", radiograph(), WindowCenter="2000", WindowWidth="1000")
    regions = [us_region((0, 60, 0, 80))]
    loop = np.repeat(us_loop(4, (60, 80))[..., None], 3, axis=-1)
    yield (
        "dicom-us",
        write_planar_dicom(folder / "us.dcm", loop, modality="US", SequenceOfUltrasoundRegions=regions, FrameTime="33"),
    )
    yield "dicom-us-rle", write_planar_dicom(folder / "us_rle.dcm", loop, modality="US", syntax="rle")
    yield "dicom-wsi", write_dicom_wsi(folder / "wsi.dcm", size=(128, 96), tile=64)
    yield from _volumes(folder, array, affine)
    yield from _pictures(folder)
    yield from _containers(folder)


def _volumes(folder: Path, array: np.ndarray, affine: np.ndarray) -> Iterator[tuple[str, Path]]:
    import nibabel as nib

    for name in ("v.nii", "v.nii.gz"):
        yield name, write_nifti(folder / name, array, affine, slope=2.0, intercept=1.0)
    for name, shape in (("v2.nii", array.shape), ("v4.nii", (*array.shape[:2], 3, 2))):
        image: object = (nib.Nifti2Image if name == "v2.nii" else nib.Nifti1Image)(array.reshape(shape), affine)
        nib.save(image, folder / name)
        yield name, folder / name
    for name in ("v.nrrd", "v.mha"):
        yield name, write_itk(folder / name, array, affine)
    yield "vz.nrrd", write_itk(folder / "vz.nrrd", array, affine, compress=True)
    yield "vz.mha", write_itk(folder / "vz.mha", array, affine, compress=True)


def _pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    import tifffile
    from PIL import Image

    grey = (radiograph((48, 40)) >> 4).astype(np.uint8)
    colour = np.stack([grey, grey[::-1], 255 - grey], axis=-1)
    for name in ("g.png", "c.png", "g.bmp", "c.jpg", "p.tif", "lzw.tif"):
        Image.fromarray(grey if name[0] in "gpl" else colour).save(
            folder / name, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {})
        )
        yield name, folder / name
    Image.fromarray(radiograph((48, 40))).save(folder / "d.png")
    yield "d.png", folder / "d.png"
    Image.fromarray(colour).convert("P").save(folder / "pal.png")
    yield "pal.png", folder / "pal.png"
    yield "a.gif", write_gif(folder / "a.gif", list(us_loop(4, (40, 48))), [40] * 4)
    deep = radiograph((64, 80))
    tifffile.imwrite(folder / "be.tif", deep, byteorder=">", tile=(16, 16), compression="zlib")
    tifffile.imwrite(folder / "big.tif", colour, bigtiff=True, photometric="rgb")
    tifffile.imwrite(folder / "ij.tif", np.stack([deep] * 3), imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(
        folder / "stack.ome.tif", np.stack([deep] * 2), metadata={"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    )
    for name in ("be.tif", "big.tif", "ij.tif", "stack.ome.tif"):
        yield name, folder / name
    yield "pyramid.tif", write_pyramid(folder / "pyramid.tif", size=(512, 384), factors=(1.0, 4.0), tile=128)
    yield "slide.ome.tif", write_ome(folder / "slide.ome.tif", size=(512, 384))
    yield "slide.svs", write_svs(folder / "slide.svs", size=(256, 192))
    clip = np.repeat(us_loop(6, (48, 64))[..., None], 3, axis=-1)
    for name in ("v.avi", "v.mp4", "v.mkv"):
        yield name, write_video(folder / name, clip)
    yield "v.mpg", write_video(folder / "v.mpg", clip, codec="mpeg1video")


def _containers(folder: Path) -> Iterator[tuple[str, Path]]:
    members = [folder / "explicit", folder / "v.nii", folder / "g.png"]
    files = [next(iter(sorted(path.iterdir()))) if path.is_dir() else path for path in members]
    with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.name)
    for name, mode in (("all.tar", "w"), ("all.tar.gz", "w:gz"), ("all.tar.xz", "w:xz"), ("all.tar.bz2", "w:bz2")):
        with tarfile.open(folder / name, mode, format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for path in files:
                info = tarfile.TarInfo(path.name)
                info.size = path.stat().st_size
                tar.addfile(info, io.BytesIO(path.read_bytes()))
    for name in ("all.zip", "all.tar", "all.tar.gz", "all.tar.xz", "all.tar.bz2"):
        yield name, folder / name
