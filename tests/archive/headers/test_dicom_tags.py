"""The table of tags against pydicom's dictionary, and values of headers against pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, keyword_for_tag

from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.dicom_tags import TAGS
from tests.synthetic import plain_affine, write_dicom_series

KEYWORDS = {
    "sop_class_uid": "SOPClassUID", "sop_instance_uid": "SOPInstanceUID", "accession": "AccessionNumber", "issuer": "IssuerOfPatientID",
    "birth_date": "PatientBirthDate", "sex": "PatientSex", "patient_id": "PatientID", "body_part": "BodyPartExamined", "kvp": "KVP",
    "echo_number": "EchoNumbers", "field_strength": "MagneticFieldStrength", "gantry_tilt": "GantryDetectorTilt", "b_value": "DiffusionBValue",
    "study_uid": "StudyInstanceUID", "series_uid": "SeriesInstanceUID", "position": "ImagePositionPatient", "frame_of_reference_uid":
    "FrameOfReferenceUID", "orientation": "ImageOrientationPatient", "temporal_position": "TemporalPositionIdentifier",
    "n_temporal_positions": "NumberOfTemporalPositions", "photometric": "PhotometricInterpretation", "n_frames": "NumberOfFrames",
    "padding": "PixelPaddingValue", "padding_limit": "PixelPaddingRangeLimit", "intercept": "RescaleIntercept", "slope": "RescaleSlope",
    "lossy": "LossyImageCompression", "protocol": "ProtocolName", "model": "ManufacturerModelName", "serial": "DeviceSerialNumber",
    "age": "PatientAge", "species": "PatientSpeciesDescription", "deidentified": "PatientIdentityRemoved", "contrast_agent": "ContrastBolusAgent",
    "magnification": "EstimatedRadiographicMagnificationFactor", "exposure_mas": "Exposure", "detector_spacing": "ImagerPixelSpacing",
    "kernel": "ConvolutionKernel", "kev": "MonoenergeticEnergyEquivalent", "ctdi": "CTDIvol", "recon_algorithm": "ReconstructionAlgorithm",
    "component": "ComplexImageComponent", "spacing_calibration": "PixelSpacingCalibrationType", "burned_in": "BurnedInAnnotation",
    "implant": "BreastImplantPresent", "lossy_ratio": "LossyImageCompressionRatio", "intent": "PresentationIntentType", "stage": "StageName",
    "recommended_rate": "RecommendedDisplayFrameRate", "scanned_spacing": "NominalScannedPixelSpacing", "breed": "PatientBreedDescription",
    "weight": "PatientWeight", "recognisable": "RecognizableVisualFeatures", "exposure_uas": "ExposureInuAs",
    "multi_energy": "MultienergyCTAcquisition", "suppression": "SpectrallySelectedSuppression", "contrast_type": "AcquisitionContrast",
}  # fmt: skip
"""Names that are not the keyword in snake case."""
KINDS = {
    "number": {"DS", "IS"}, "numbers": {"DS", "IS"}, "integer": {"IS", "US"}, "double": {"FD"}, "binary": {"US or SS"},
    "text": {"CS", "LO", "SH", "UI", "DA", "TM", "AS"}, "texts": {"CS", "SH"},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, (tag, _) in TAGS.items() if not (tag >> 16) % 2])
def test_tag__is_the_one_its_name_says(name: str) -> None:
    tag, kind = TAGS[name]
    assert keyword_for_tag(tag) == KEYWORDS.get(name, "".join(word.capitalize() for word in name.split("_")))
    assert dictionary_VR(tag) in KINDS[kind]


@pytest.mark.parametrize("implicit", [False, True])
def test_binary_floats__are_read_whatever_the_syntax(tmp_path: Path, implicit: bool) -> None:
    path = write_dicom_series(tmp_path, np.zeros((4, 5, 2), np.int16), plain_affine())[0]
    ds = pydicom.dcmread(path)
    ds.CTDIvol, ds.DiffusionBValue, ds.MonoenergeticEnergyEquivalent = 3.25, 800.0, 70.0
    ds.add_new(0x20010010, "LO", "Philips Imaging DD 001")
    ds.add_new(0x20011003, "FL", 1000.0)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=True)
    header = read_header(path)
    assert (header["ctdi"], header["b_value"], header["kev"], header["b_value_philips"]) == (3.25, 800, 70, 1000)
    ds.CTDIvol = float("nan")
    pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=True)
    assert "ctdi" not in read_header(path)
