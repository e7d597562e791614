"""Columns that headers fill: through files and the index, against pydicom."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from medssl.archive.index import index
from medssl.archive.reasons import FLAGS, PRIVACY_FLAGS
from medssl.archive.rows.attributes import VARYING, attributes, varying
from medssl.archive.rows.twins import pair_groups
from medssl.archive.scanning.scan import scan_file
from medssl.archive.table import Archive, SeriesRow
from medssl.domains.microscopy import Microscopy
from medssl.domains.wsi import WSI
from medssl.errors import ImageError
from tests.synthetic import oblique_volume, plain_affine, write_dicom_series, write_nifti
from tests.synthetic_mirax import write_mirax
from tests.synthetic_planar import radiograph, us_loop, write_planar_dicom

VOLUME = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)


def rows_of(source: Path, out: Path, **options: Any) -> list[SeriesRow]:
    index([source], out, **options)
    return Archive.open(out).select(rejected=True)


def series(folder: Path, modality: str, **tags: Any) -> Path:
    write_dicom_series(folder / "src", VOLUME, plain_affine((1.0, 1.0, 2.0)), modality=modality, extra=tags)
    return folder / "src"


@pytest.mark.parametrize(
    ("modality", "tags", "expected"),
    [
        ("CT", {"MultienergyCTAcquisition": "YES", "CTDIvol": 3.25}, {"dual_energy": True, "ctdi": 3.25}),
        ("CT", {"SeriesDescription": "Mono 70 keV", "ExposureInuAs": 4500}, {"dual_energy": True, "kev": 70, "mas": 4.5}),
        ("CT", {"MultienergyCTAcquisition": "NO"}, {"dual_energy": False, "kev": None}),
        ("CT", {"PixelPaddingValue": -2000, "PatientBreedDescription": "Beagle"}, {"padding_value": -2000, "subject_kind": "animal"}),
        ("MR", {"ComplexImageComponent": "PHASE", "HeartRate": 64}, {"component": "phase", "heart_rate": 64}),
        ("MR", {"AcquisitionContrast": "T2_STAR", "SpectrallySelectedSuppression": "NONE"}, {"weighting": "t2star", "fat_sat": False}),
        ("MR", {"SpectrallySelectedSuppression": "FAT", "InversionTime": 2500}, {"fat_sat": True, "ti": 2500}),
        ("MR", {"RecognizableVisualFeatures": "YES"}, {"face_possible": True}),
        ("MR", {"StudyDate": "", "SeriesDate": "20190305"}, {"year": 2019}),
        ("MR", {"StudyDate": "20190230", "SeriesDate": "20190305"}, {"year": None}),
        ("MG", {"BreastImplantPresent": "YES", "ViewPosition": "MLO", "PresentationIntentType": "FOR PROCESSING"},
         {"implant": True, "view": "oblique", "intent": "processing", "reason": "no_domain"}),
    ],
)  # fmt: skip
def test_columns__what_headers_say(tmp_path: Path, modality: str, tags: dict[str, Any], expected: dict[str, Any]) -> None:
    row = rows_of(series(tmp_path, modality, **tags), tmp_path / "out")[0]
    assert {name: getattr(row, name) for name in expected} == expected


def test_columns__of_ultrasound_and_radiographs(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    write_planar_dicom(tmp_path / "src" / "u.dcm", us_loop(3), modality="US", StageName="Peak Stress", HeartRate=131, FrameTime=20)
    write_planar_dicom(
        tmp_path / "src" / "x.dcm", radiograph(), bits_stored=12, Modality="RG", PresentationIntentType="FOR PRESENTATION", KVP=81
    )
    stress, film = sorted(rows_of(tmp_path / "src", tmp_path / "out"), key=lambda row: row.domain)
    assert (stress.stage, stress.heart_rate, stress.n_regions, stress.frame_time_ms) == ("stress", 131, 0, 20)
    assert (film.modality, film.domain, film.intent, film.kvp, film.units) == ("RG", "xray", "presentation", 81, "arbitrary")


@pytest.mark.parametrize(
    ("changes", "ready"),
    [
        ({}, True), ({"PatientWeight": None}, False), ({"RadionuclideTotalDose": None}, False), ({"RadionuclideHalfLife": None}, False),
        ({"RadionuclideHalfLife": None, "DecayCorrection": "ADMIN"}, True), ({"DecayCorrection": "NONE"}, False),
        ({"Units": "GML", "PatientWeight": None}, True), ({"Units": "CNTS"}, False), ({"Units": None}, None),
    ],
)  # fmt: skip
def test_suv_ready__needs_weight_dose_and_decay(tmp_path: Path, changes: dict[str, Any], ready: bool | None) -> None:
    tags = {"Units": "BQML", "DecayCorrection": "START", "PatientWeight": 71.5}
    tags |= {"RadionuclideTotalDose": 3.1e8, "RadionuclideHalfLife": 6586.2} | changes
    injection = Dataset()
    for name in ("RadionuclideTotalDose", "RadionuclideHalfLife"):
        value = tags.pop(name)
        if value is not None:
            setattr(injection, name, value)
    tags = {name: value for name, value in tags.items() if value is not None}
    source = series(tmp_path, "PT", RadiopharmaceuticalInformationSequence=Sequence([injection]), **tags)
    assert {row.suv_ready for row in rows_of(source, tmp_path / "out")} == {ready}


def test_b_values__private_zeros_alone_are_no_diffusion() -> None:
    ge = {"manufacturer": "GE MEDICAL SYSTEMS", "b_value_ge": ["0", "0"]}
    assert attributes([ge, ge], "MR")["b_values"] == ()
    assert attributes([ge, {**ge, "b_value_ge": ["800"]}], "MR")["b_values"] == (0, 800)
    assert attributes([{**ge, "series_description": "DWI b0"}], "MR")["b_values"] == (0,)
    assert attributes([{"b_value": 0.0}], "MR")["b_values"] == (0,)


def test_varying__recorded_and_not_split_on(tmp_path: Path) -> None:
    source = series(tmp_path, "CT", KVP=120)
    paths = sorted(source.rglob("*.dcm"))
    for k, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        ds.KVP, ds.AcquisitionNumber, ds.SliceThickness = 120 if k else 100, k, 2.0 + k * 1e-5
        ds.save_as(path)
    (row,) = rows_of(source, tmp_path / "out")
    assert [flag for flag in row.quality_flags if flag.startswith("varying")] == ["varying_acquisition_number", "varying_kvp"]
    assert row.n_slices == 4 and row.status == "flagged"
    assert {f"varying_{name}" for name in VARYING} == {name for name in FLAGS if name.startswith("varying_")}
    assert varying([{"kernel": ["B30f"]}, {"kernel": ["B30f"]}]) == () and varying([{"kernel": ["B30f"]}, {}]) == (
        "varying_kernel",
    )


@pytest.mark.data
def test_varying__the_tilted_head_has_21_acquisition_numbers(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "ct_ge_gantry_tilt"
    numbers = {str(pydicom.dcmread(path, stop_before_pixels=True).AcquisitionNumber) for path in source.rglob("*.dcm")}
    assert len(numbers) == 21
    rows = [row for row in rows_of(source, tmp_path / "out") if row.modality == "CT"]
    assert [row.n_slices for row in rows] == [14, 14]
    assert all("varying_acquisition_number" in row.quality_flags for row in rows)


def test_flags__are_all_explained() -> None:
    header = {"burned_in": "YES", "overlay": True, "private_tags": True, "body_part": "HEAD"}
    assert set(attributes([{}, header], "CT")["privacy_flags"]) == {"burned_in_stated", "overlay", "private_tags"}
    assert set(attributes([header], "CT")["privacy_flags"]) <= set(PRIVACY_FLAGS)


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big"])
@pytest.mark.parametrize(("private", "overlay"), [(False, False), (True, False), (False, True)])
def test_privacy_flags__private_elements_and_overlays(tmp_path: Path, syntax: str, private: bool, overlay: bool) -> None:
    path = write_planar_dicom(tmp_path / "x.dcm", radiograph())
    ds = pydicom.dcmread(path)
    if private:
        ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", b"Doe^Jane")
    if overlay:
        ds.add_new(0x60020010, "US", 60)
        ds.add_new(0x60020011, "US", 48)
    names = {"explicit": "ExplicitVRLittleEndian", "implicit": "ImplicitVRLittleEndian", "big": "ExplicitVRBigEndian"}
    ds.file_meta.TransferSyntaxUID = getattr(pydicom.uid, names[syntax])
    if syntax == "big":
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    pydicom.dcmwrite(path, ds, implicit_vr=syntax == "implicit", little_endian=syntax != "big")
    header = json.loads(scan_file(str(path))[0]["header"])
    assert (bool(header.get("private_tags")), bool(header.get("overlay"))) == (private, overlay)
    flags = attributes([header], "DX")["privacy_flags"]
    assert flags == (("overlay",) if overlay else ("private_tags",) if private else ())


def _holds(ds: Dataset) -> tuple[bool, bool]:
    private = any(element.tag.is_private and element.tag.group > 8 for element in ds)
    nested = any(_holds(item)[0] for element in ds if element.VR == "SQ" for item in element.value)
    return private or nested, any(element.tag.group >> 8 == 0x60 and element.tag.element == 0x10 for element in ds)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_privacy_flags__of_real_files_as_pydicom_walks_them(shared_data: Path) -> None:
    counts: dict[tuple[bool, bool], int] = {}
    for path in sorted((shared_data / "dicom_odd").rglob("*")):
        row = scan_file(str(path))[0] if path.is_file() else {"kind": "other"}
        if row["kind"] == "dicom" and row["reason"] is None:
            header = json.loads(row["header"])
            expected = _holds(pydicom.dcmread(path, force=True, stop_before_pixels=True))
            assert (bool(header.get("private_tags")), bool(header.get("overlay"))) == expected, path.name
            counts[expected] = counts.get(expected, 0) + 1
    assert len(counts) == 3  # neither, private elements, and both


def twins(folder: Path, *, source: bool = True, time: bool = False) -> Path:
    """Write a raw image, two made from it, and one of another exposure; each in a series of its own."""
    uids = {name: generate_uid(entropy_srcs=[name]) for name in ("raw", "shown", "again", "other")}
    for name, uid in uids.items():
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1.1", uids["raw"]
        tags: dict[str, Any] = {"SOPInstanceUID": uid, "SeriesInstanceUID": generate_uid(entropy_srcs=[name, "series"])}
        tags["PresentationIntentType"] = "FOR PROCESSING" if name == "raw" else "FOR PRESENTATION"
        if name in ("shown", "again") and source:
            tags["SourceImageSequence"] = [reference]
        if time and name in ("raw", "other"):
            tags["AcquisitionTime"] = "101500"
        pixels = radiograph(seed=len(name))
        write_planar_dicom(folder / f"{name}.dcm", pixels, **tags)
    return folder


@pytest.mark.parametrize("time", [False, True])
def test_twins__by_the_source_image_they_name(tmp_path: Path, time: bool) -> None:
    (tmp_path / "src").mkdir()
    twins(tmp_path / "src", time=time)
    index([tmp_path / "src"], tmp_path / "out")

    def groups() -> dict[str, str | None]:
        archive = Archive.open(tmp_path / "out")
        return {archive.files(row.series_id)[0].stem: row.pair_group for row in archive.select()}

    found = groups()
    together = ("raw", "shown", "again", "other") if time else ("raw", "shown", "again")
    assert len({found[name] for name in together}) == 1 and found["raw"] is not None
    assert time or found["other"] is None
    # Building one group again leaves the links between groups as they were.
    write_planar_dicom(tmp_path / "src" / "new.dcm", radiograph(seed=99), SeriesInstanceUID=generate_uid(entropy_srcs=["new"]))
    index([tmp_path / "src"], tmp_path / "out")
    assert {name: group for name, group in groups().items() if name != "new"} == found


def test_twins__of_an_image_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (twins(tmp_path / "src") / "raw.dcm").unlink()
    rows = rows_of(tmp_path / "src", tmp_path / "out")
    assert sorted(row.pair_group is None for row in rows) == [False, False, True]
    assert len({row.pair_group for row in rows}) == 2


def test_pair_groups__a_single_row_stays_as_it_is() -> None:
    alone = {"series_id": "a", "instance": "1", "made_from": "9", "pair_group": None}
    assert pair_groups([alone]) == {}
    chain = [{**alone, "made_from": None}, {**alone, "series_id": "b", "instance": "2", "made_from": "1", "pair_group": "0"}]
    assert pair_groups(chain) == {"a": "0"}


SIDECAR = {
    "Modality": "MR", "Manufacturer": "Siemens", "ManufacturersModelName": "Prisma", "MagneticFieldStrength": 3, "EchoTime": 0.03,
    "RepetitionTime": 2.2, "InversionTime": 0.9, "FlipAngle": 12, "SliceThickness": 0.8, "BodyPartExamined": "BRAIN",
    "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"], "ScanningSequence": "GR_IR", "ScanOptions": "FS", "PatientPosition": "HFS",
    "ProtocolName": "t1_mprage", "PatientName": "Doe^Jane", "PatientID": "4711", "AcquisitionDateTime": "2019-03-05T10:00:00",
    "ConversionSoftware": "dcm2niix",
}  # fmt: skip


def with_sidecar(folder: Path, sidecar: dict[str, Any]) -> Path:
    (folder / "src").mkdir()
    write_nifti(folder / "src" / "t1.nii.gz", *oblique_volume())
    (folder / "src" / "t1.json").write_text(json.dumps(sidecar))
    return folder / "src"


def test_sidecar__fills_columns_and_never_identity(tmp_path: Path) -> None:
    (row,) = rows_of(with_sidecar(tmp_path, SIDECAR), tmp_path / "out", modality="MR")
    expected = {
        "modality": "MR", "vendor": "siemens", "model_class": "prisma", "field_strength_t": 3, "te": 30, "tr": 2200, "ti": 900, "flip": 12,
        "slice_thickness_mm": 0.8, "body_region": ("head",), "component": "magnitude", "mr_type": "mixed", "fat_sat": True,
        "patient_position": "hfs", "weighting": "t1", "face_possible": True, "units": "arbitrary", "scanner_id": None, "year": None,
    }  # fmt: skip
    assert {name: getattr(row, name) for name in expected} == expected
    assert "patient_unknown" in row.quality_flags and "sidecar_conflict" not in row.quality_flags
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out" / "private" / "scan").glob("*.parquet"))
    assert b"4711" not in stored and b"Doe" not in stored and b"2019-03" not in stored


@pytest.mark.parametrize(
    ("changes", "modality", "conflict"),
    [
        ({"SpacingBetweenSlices": 2.51}, "MR", False),
        ({"SpacingBetweenSlices": 3.0}, "MR", True),
        ({}, "CT", True),
        ({}, "unknown", False),
        ({"EchoTime": 30, "RepetitionTime": "2.2", "FlipAngle": None, "ImageType": 3}, "MR", False),
    ],
)
def test_sidecar__contradictions_are_flagged(tmp_path: Path, changes: dict[str, Any], modality: str, conflict: bool) -> None:
    source = with_sidecar(tmp_path, {**SIDECAR, **changes})
    image = next(source.glob("*.nii.gz"))
    import nibabel

    stored = nibabel.load(image)
    stored.header.set_dim_info(slice=2)
    nibabel.save(stored, image)
    step = float(stored.header.get_zooms()[2])
    assert step == pytest.approx(2.5)
    (row,) = rows_of(source, tmp_path / "out", modality=modality)
    assert ("sidecar_conflict" in row.quality_flags) == conflict
    assert row.modality == "MR"
    if "EchoTime" in changes:  # in ms, as text, absent or of another type: left out
        assert (row.te, row.tr, row.flip, row.component) == (None, None, None, "unknown")


def test_mirax__companions_belong_to_the_slide(tmp_path: Path) -> None:
    openslide = pytest.importorskip("openslide", reason="the extra wsi is not installed")
    (tmp_path / "src").mkdir()
    path = write_mirax(tmp_path / "src" / "s.mrxs")
    summary = index([tmp_path / "src"], tmp_path / "out")
    assert (summary.n_files_seen, summary.n_files_used, summary.reasons) == (4, 4, {})
    archive = Archive.open(tmp_path / "out")
    (row,) = archive.select()
    assert row.n_files == 4 and row.bytes == sum(file.stat().st_size for file in (tmp_path / "src").rglob("*") if file.is_file())
    with openslide.OpenSlide(str(path)) as slide:
        assert row.shape == slide.dimensions[::-1] and row.mpp == float(slide.properties["openslide.mpp-x"])
        expected = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    sample = WSI(mpp=0.25).read(archive.files(row.series_id), series_id=row.series_id)
    np.testing.assert_array_equal(sample.image.transpose(1, 2, 0), expected)
    # Other data are another slide, though the first file is the same byte for byte.
    shutil.rmtree(path.with_suffix(""))
    first = path.read_bytes()
    path.unlink()
    write_mirax(path, seed=5)
    assert path.read_bytes() == first
    index([tmp_path / "src"], tmp_path / "out")
    (again,) = Archive.open(tmp_path / "out").select()
    assert again.series_id != row.series_id


def test_mirax__without_its_folder_is_truncated(tmp_path: Path) -> None:
    path = write_mirax(tmp_path / "s.mrxs")
    shutil.rmtree(path.with_suffix(""))
    assert scan_file(str(path))[0]["reason"] == "truncated"


def microscopy_dicom(path: Path, frames: np.ndarray, *, sop: str = "1.2.840.10008.5.1.4.1.1.77.1.2", modality: str = "GM") -> Path:
    return write_planar_dicom(path, frames, Modality=modality, SOPClassUID=sop, PixelSpacing=[0.0005, 0.0004])


@pytest.mark.parametrize(
    ("sop", "modality"),
    [("77.1.2", "GM"), ("77.1.2", "SM"), ("77.1.3", "SM"), ("77.1.3", "GM")],
)
def test_microscopy__dicom_of_one_picture_is_read(tmp_path: Path, sop: str, modality: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    (tmp_path / "src").mkdir()
    path = microscopy_dicom(tmp_path / "src" / "g.dcm", pixels, sop=f"1.2.840.10008.5.1.4.1.1.{sop}", modality=modality)
    (row,) = rows_of(tmp_path / "src", tmp_path / "out")
    assert (row.modality, row.domain, row.kind, row.reason) == ("GM", "microscopy", "image", None)
    sample = Microscopy().read([path], series_id=row.series_id)
    np.testing.assert_array_equal(sample.image.transpose(1, 2, 0), pydicom.dcmread(path).pixel_array)
    assert sample.meta.channels == ("red", "green", "blue") and row.spacing_mm == sample.spacing_mm == (0.0005, 0.0004)


def test_microscopy__dicom_of_several_frames_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = microscopy_dicom(tmp_path / "src" / "g.dcm", np.zeros((2, 40, 30, 3), np.uint8))
    (row,) = rows_of(tmp_path / "src", tmp_path / "out")
    assert (row.domain, row.reason) == ("microscopy", "multiframe")
    with pytest.raises(ImageError, match="2 frames") as caught:
        Microscopy().read([path], series_id=row.series_id)
    assert caught.value.reason == "multiframe"
