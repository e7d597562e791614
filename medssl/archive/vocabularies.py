"""The closed vocabularies of the index: which words each text column of `series.parquet` may hold.

Not listed are ids (32 hex digits), `site` (what the user called a source) and `orientation` (three axis codes, one of R and L, A and P, S
and I each, in any order, or `unknown`).
"""

from __future__ import annotations

from medssl.archive.headers import slide_headers
from medssl.archive.headers.dicom_header import COMPRESSED, UNCOMPRESSED
from medssl.archive.headers.dicom_series import SPLIT_TAGS
from medssl.archive.headers.image_scale import FPS_SOURCES, REGION_TYPES, SPACING_SOURCES
from medssl.archive.reasons import FILE_REASONS, FLAGS, IMAGE_REASONS, PRIVACY_FLAGS
from medssl.archive.rows import attributes as a
from medssl.archive.rows.base import DOMAINS, DTYPES, PLANES
from medssl.archive.rows.dates import BANDS
from medssl.archive.rows.dicom_rows import PHOTOMETRICS
from medssl.archive.rows.roles import ROLES

IDS = ("series_id", "study_id", "patient_id", "scanner_id", "pair_group")
OPEN = (*IDS, "site", "orientation")
"""Text columns that are no vocabulary."""

VOCABULARIES: dict[str, tuple[str, ...]] = {
    "modality": (*sorted(a.MODALITIES), "other", "unknown"),
    "domain": (*dict.fromkeys(DOMAINS.values()), "other", "unknown"),
    "kind": ("volume", "volume_4d", "image", "cine", "slide"),
    "role": (*ROLES[:-1], "label", "overview", "unknown"),
    "subject_kind": a.SUBJECTS,
    "intent": a.INTENTS,
    "volume_axis": (*SPLIT_TAGS, "visit", "time", "block", "mosaic", "none"),
    "spacing_source": SPACING_SOURCES,
    "plane": (*PLANES.values(), "unknown"),
    "patient_position": a.POSITIONS,
    "fps_source": FPS_SOURCES,
    "stage": a.STAGES,
    "dtype": (*DTYPES, "rgb", "other", "unknown"),
    "photometric": (*sorted(PHOTOMETRICS), "other", "unknown"),
    "transfer_syntax": (*UNCOMPRESSED.values(), *dict.fromkeys(COMPRESSED.values()), "other", "none"),
    "units": ("HU", "arbitrary", "unknown"),
    "vendor": tuple(dict.fromkeys((*a.VENDORS, *slide_headers.VENDORS.values(), "other", "unknown"))),
    "model_class": (*a.MODEL_CLASSES, "other", "unknown"),
    "kernel_class": a.KERNEL_CLASSES,
    "recon_method": a.RECON_METHODS,
    "contrast_state": a.CONTRAST_STATES,
    "contrast_phase": a.CONTRAST_PHASES,
    "mr_type": a.MR_TYPES,
    "weighting": a.WEIGHTINGS,
    "component": a.COMPONENTS,
    "region_types": REGION_TYPES,
    "body_region": a.BODY_REGIONS,
    "body_region_source": ("tag", "text", "unknown"),
    "laterality": a.LATERALITIES,
    "view": a.VIEWS,
    "sex": ("F", "M", "O", "unknown"),
    "age_band": BANDS,
    "split": ("train", "val", "test", "unknown"),
    "quality_flags": tuple(FLAGS),
    "privacy_flags": tuple(PRIVACY_FLAGS),
    "status": ("ok", "flagged", "rejected"),
    "reason": tuple(dict.fromkeys((*IMAGE_REASONS, *FILE_REASONS))),
}
"""Column -> its words. Two tags that only together tell volumes apart stand in `volume_axis` joined by `+`."""
