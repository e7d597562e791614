"""What a converter's JSON file (dcm2niix, BIDS) says of the NIfTI file beside it, in the names that DICOM headers use.

It fills columns and never identity: names, ids, dates and serial numbers in it are not even kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TEXTS = {
    "Modality": "modality", "Manufacturer": "manufacturer", "ManufacturersModelName": "model", "SeriesDescription": "series_description",
    "ProtocolName": "protocol", "BodyPartExamined": "body_part", "PatientPosition": "patient_position", "SequenceName": "sequence_name",
    "ContrastBolusIngredient": "contrast_agent", "Units": "units", "DecayCorrection": "decay_correction",
}  # fmt: skip
LISTS = {
    "ImageType": "image_type", "ScanningSequence": "scanning_sequence", "SequenceVariant": "sequence_variant", "ScanOptions": "scan_options",
    "ConvolutionKernel": "kernel",
}  # fmt: skip
NUMBERS = {
    "MagneticFieldStrength": "field_strength", "FlipAngle": "flip_angle", "SliceThickness": "slice_thickness", "KVP": "kvp",
    "SpacingBetweenSlices": "spacing_between", "XRayExposure": "exposure_mas",
}  # fmt: skip
SECONDS = {"EchoTime": ("echo_time", 2.0), "RepetitionTime": ("repetition_time", 60.0), "InversionTime": ("inversion_time", 20.0)}
"""Key -> (name, highest plausible value). They are seconds; a larger number was written in ms by something else, and is left out."""
KEYS = (*TEXTS, *LISTS, *NUMBERS, *SECONDS)
STEP_TOLERANCE = 0.05
"""Relative difference of slice steps from which file and sidecar contradict each other."""


def sidecar_header(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return header values, in the names and units of `dicom_tags.TAGS`; what has the wrong type counts as absent."""
    header: dict[str, Any] = {}
    for key, name in TEXTS.items():
        if isinstance(values.get(key), str):
            header[name] = values[key]
    for key, name in LISTS.items():
        value = values.get(key)
        if isinstance(value, str):
            # dcm2niix writes several values of a sequence as GR_IR; scan options have underscores inside.
            header[name] = re.split(r"[\\_]" if name.endswith(("sequence", "variant")) else r"\\", value)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            header[name] = value
    for key, name in NUMBERS.items():
        if _is_number(values.get(key)):
            header[name] = float(values[key])
    for key, (name, most) in SECONDS.items():
        if _is_number(values.get(key)) and 0 < values[key] <= most:
            header[name] = float(values[key]) * 1000
    return header


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def contradicts(header: Mapping[str, Any], modality: str, spacing_mm: Sequence[float] | None, slice_axis: int | None) -> bool:
    """Return whether a sidecar contradicts what is known otherwise.

    Args:
        header: What `sidecar_header` returned.
        modality: What the user said these files are, or `unknown`.
        spacing_mm: Of the volume, in the order of its axes.
        slice_axis: The axis along which its slices lie.
    """
    stated = str(header.get("modality") or "").upper()
    if stated and modality != "unknown" and stated != modality:
        return True
    step = header.get("spacing_between")
    if not step or step <= 0 or spacing_mm is None or slice_axis is None:
        return False
    return bool(abs(spacing_mm[slice_axis] - step) > STEP_TOLERANCE * step)
