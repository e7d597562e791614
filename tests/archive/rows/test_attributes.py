"""Columns from header values: known cases, closed vocabularies whatever the tags hold, real headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.dicom_tags import TAGS
from medssl.archive.headers.image_scale import FPS_SOURCES, SPACING_SOURCES, frame_step, planar_spacing
from medssl.archive.reasons import FLAGS, PRIVACY_FLAGS
from medssl.archive.rows import attributes as a
from medssl.archive.rows.dates import BANDS
from medssl.archive.rows.roles import ROLES, role_of, sop_kind, sop_modality
from medssl.archive.table import SERIES_COLUMNS

VOCABULARIES = {
    "vendor": {*a.VENDORS, "other", "unknown"}, "model_class": {*a.MODEL_CLASSES, "other", "unknown"}, "patient_position": {*a.POSITIONS},
    "contrast_state": {*a.CONTRAST_STATES}, "contrast_phase": {*a.CONTRAST_PHASES}, "subject_kind": {*a.SUBJECTS}, "intent": {*a.INTENTS},
    "laterality": {*a.LATERALITIES}, "view": {*a.VIEWS}, "kernel_class": {*a.KERNEL_CLASSES}, "recon_method": {*a.RECON_METHODS},
    "mr_type": {*a.MR_TYPES}, "weighting": {*a.WEIGHTINGS}, "component": {*a.COMPONENTS}, "stage": {*a.STAGES}, "age_band": {*BANDS},
    "sex": {"F", "M", "O", "unknown"}, "body_region_source": {"tag", "text", "unknown"},
}  # fmt: skip
LISTS = {"body_region": {*a.BODY_REGIONS}, "privacy_flags": {*PRIVACY_FLAGS}, "flags": {*FLAGS}}


def closed(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name in VOCABULARIES:
            assert value in VOCABULARIES[name], name
        elif name in LISTS:
            assert set(value) <= LISTS[name], name
        else:
            assert value is None or isinstance(value, bool | int | float) or all(isinstance(part, float) for part in value), name
            assert name in SERIES_COLUMNS


texts = st.text(max_size=20) | st.sampled_from(["YES", "CT", "B30f", "t1_mprage post gd", "HEAD", "^|^", "NaN", "1e999", "-1"])
values = {
    "text": texts,
    "texts": st.lists(texts, max_size=3),
    "number": st.floats() | st.just(0.0),
    "numbers": st.lists(st.floats(), max_size=3),
    "integer": st.integers(-10, 10**6),
    "binary": st.integers(0, 65535),
    "double": st.floats(),
    "single": st.floats(),
}
headers = st.fixed_dictionaries({}, optional={name: values[kind] for name, (_, kind) in TAGS.items()})


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(headers, st.sampled_from(sorted(a.MODALITIES)))
def test_attributes__stay_in_their_vocabularies_whatever_the_tags_hold(header: dict[str, Any], modality: str) -> None:
    closed(a.attributes([header], modality))
    assert planar_spacing(header)[1] in SPACING_SOURCES and frame_step(header, 3)[0] in FPS_SOURCES
    a.twin_key(header, modality)
    assert role_of(header.get("image_type") or (), header.get("sop_class_uid") or "") in ROLES


@pytest.mark.parametrize(
    ("maker", "kernel", "expected"),
    [
        ("siemens", "B30s", "soft"), ("siemens", "D40s", "soft"), ("siemens", "B60f", "bone"), ("siemens", "B50f", "lung"),
        ("siemens", "Bl57d\\3", "lung"), ("siemens", "Br40f", "soft"), ("siemens", "Hr38", "head"), ("siemens", "H70h", "bone"),
        ("siemens", "B70f", "lung"), ("ge", "STANDARD", "soft"), ("ge", "STD+", "soft"), ("ge", "BONEPLUS", "bone"), ("ge", "LUNG", "lung"),
        ("philips", "B", "soft"), ("philips", "YA", "lung"), ("canon", "FC13", "soft"), ("canon", "FC52", "lung"), ("other", "11", "unknown"),
    ],
)  # fmt: skip
def test_kernel_class__by_the_vendors_naming(maker: str, kernel: str, expected: str) -> None:
    assert a.kernel_class(maker, kernel) == expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"series_description": "t1_mprage_sag_p2"}, "t1"), ({"series_description": "T2 FLAIR ax"}, "flair"),
        ({"series_description": "ep2d_diff_b1000"}, "dwi"), ({"series_description": "DWI b1000"}, "dwi"),
        ({"series_description": "AX", "b_value": 1000.0}, "dwi"), ({"protocol": "TOF_3D"}, "angio"), ({"series_description": "T1 and T2"}, "unknown"),
        ({"scanning_sequence": ["SE"], "repetition_time": 500.0, "echo_time": 12.0}, "t1"),
        ({"scanning_sequence": ["SE"], "repetition_time": 4000.0, "echo_time": 100.0}, "t2"),
        ({"scanning_sequence": ["SE"], "repetition_time": 4000.0, "echo_time": 45.0}, "unknown"),
        ({"scanning_sequence": ["GR"], "repetition_time": 500.0, "echo_time": 12.0}, "unknown"),
        ({"image_type": ["DERIVED", "PRIMARY", "ADC"]}, "adc"), ({"series_description": "MARTIN ADCOCK"}, "unknown"),
    ],
)  # fmt: skip
def test_weighting__words_then_times(header: dict[str, Any], expected: str) -> None:
    assert a.attributes([header], "MR")["weighting"] == expected


def test_b_values__standard_and_vendors() -> None:
    ge = {"manufacturer": "GE MEDICAL SYSTEMS", "b_value_ge": ["1000000800", "8", "0", "0"]}
    assert a.attributes([{"b_value": 0.0}, {"b_value_siemens": 1000.0}, {"b_value_philips": 500.0}, ge], "MR")["b_values"] == (
        0,
        500,
        800,
        1000,
    )
    assert a.attributes([{"b_value_ge": ["800"]}], "MR")["b_values"] == ()  # another vendor's private element


@pytest.mark.parametrize(
    ("header", "state", "phase"),
    [
        ({"contrast_agent": "ISOVUE300/100"}, "given", "unknown"), ({"contrast_agent": "NONE"}, "none", "unknown"),
        ({"series_description": "Abd nativ 5mm"}, "none", "native"), ({"series_description": "Leber arteriell KM"}, "given", "arterial"),
        ({"series_description": "5/5mm Plain"}, "none", "native"), ({"series_description": "portal + delayed"}, "given", "unknown"),
        ({"series_description": "Thorax"}, "unknown", "unknown"),
    ],
)  # fmt: skip
def test_contrast__tag_then_words(header: dict[str, Any], state: str, phase: str) -> None:
    found = a.attributes([header], "CT")
    assert (found["contrast_state"], found["contrast_phase"]) == (state, phase)


def test_body_region__tag_before_text_and_several_at_once() -> None:
    assert a.body_region({"body_part": "CHEST_TO_PELVIS"}) == {"body_region": ("chest", "pelvis"), "body_region_source": "tag"}
    assert a.body_region({"body_part": "HIP"})["body_region"] == ("limb",)
    assert a.body_region({"study_description": "CT Thorax/Abdomen"}) == {
        "body_region": ("chest", "abdomen"),
        "body_region_source": "text",
    }
    assert a.body_region({"body_part": "QUUX"})["body_region"] == ("other",)
    assert a.body_region({"study_description": "Mr Armstrong"}) == {"body_region": (), "body_region_source": "unknown"}
    assert a.face_possible(()) is None and a.face_possible(("head",)) and not a.face_possible(("chest",))


def test_twin_key__shared_by_processing_and_presentation() -> None:
    one = {
        "study_uid": "1.2",
        "series_uid": "1.2.1",
        "view_position": "PA",
        "acquisition_time": "101500",
        "intent": "FOR PROCESSING",
    }
    two = {**one, "series_uid": "1.2.2", "intent": "FOR PRESENTATION"}
    assert a.twin_key(one, "DX") == a.twin_key(two, "DX") is not None
    assert a.twin_key({**two, "view_position": "LL"}, "DX") != a.twin_key(one, "DX") and a.twin_key(one, "CT") is None


@pytest.mark.parametrize(
    ("uid", "kind", "modality"),
    [("2", "image", "CT"), ("88.11", "report", None), ("481.3", "rt", None), ("66.4", "segmentation", None), ("13.1.3", "image", "MG"),
     ("128", "image", "PT"), ("7.4", "screenshot", None), ("77.1.6", "image", "SM"), ("104.1", "document", None)],
)  # fmt: skip
def test_sop_class__says_what_the_object_is(uid: str, kind: str, modality: str | None) -> None:
    full = f"1.2.840.10008.5.1.4.1.1.{uid}"
    assert (sop_kind(full), sop_modality(full)) == (kind, modality)


@pytest.mark.data
def test_real_headers__against_pydicom(shared_data: Path) -> None:
    import pydicom

    def one(pattern: str) -> tuple[dict[str, Any], Any]:
        path = sorted(shared_data.glob(pattern))[0]
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        return a.attributes([read_header(path)], dataset.Modality), dataset

    found, dataset = one("ct_ge_gantry_tilt/**/*.dcm")
    assert (found["vendor"], found["model_class"], found["kernel_class"]) == ("ge", "hispeed", "soft")
    assert found["kvp"] == float(dataset.KVP) and found["patient_position"] == dataset.PatientPosition.lower()
    assert found["body_region"] == ("head",) and found["face_possible"] and "face_possible" in found["privacy_flags"]
    found, dataset = one("ct_covid_ct_md/**/*.dcm")
    assert (found["vendor"], found["model_class"], found["kernel_class"]) == ("siemens", "somatom", "soft")
    assert found["body_region"] == ("chest",) and found["face_possible"] is False
    found, dataset = (
        one("mr_dicom_nih/**/*GE*/**/*.dcm")
        if list(shared_data.glob("mr_dicom_nih/**/*GE*/**/*.dcm"))
        else one("mr_dicom_nih/**/*.dcm")
    )
    assert found["year"] == int(dataset.StudyDate[:4]) and found["mr_type"] in ("mixed", "ep")
    assert found["te"] == float(dataset.EchoTime) and found["flip"] == float(dataset.FlipAngle)
    found, dataset = one("mr_dicom_t1_studyforrest/**/*.dcm")
    assert str(dataset.PatientAge) == "42" and found["age_band"] == "40-49" and "age_conflict" in found["flags"]
    assert found["weighting"] == "t1"
    found, dataset = one("cine_mr_sunnybrook/**/*.dcm")
    assert str(dataset.StudyDate) == "20120000" and found["year"] is None and "date_invalid" in found["flags"]
