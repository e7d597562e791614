"""Rows of files that are a series of their own: NIfTI, NRRD, MetaImage, pictures, clips, slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import volume_fault
from medssl.archive.headers.sidecars import contradicts, sidecar_header
from medssl.archive.ids import IdKey
from medssl.archive.rows.attributes import MODALITIES, attributes
from medssl.archive.rows.base import UNITLESS, Group, Placed, Scanned, canonical, domain_of, patient_of, place, stored_type, unique
from medssl.archive.table import SeriesRow


def add_volume(
    out: Group,
    file: Scanned,
    data: Sequence[Scanned],
    placed: Mapping[str, Placed],
    key: IdKey,
    sidecar: Mapping[str, Any],
    taken: set[str],
) -> None:
    """Add the volume in a NIfTI, NRRD or MetaImage file, or each volume of a four-dimensional one."""
    header, choice = file.header, file.choice
    members = [file, *data]
    identity = file.digest  # covers detached data files
    flags = list(header["flags"])
    patient, unknown = patient_of(key, choice, placeholder=True, issuer=choice.site, value="", fallback=f"file {identity}")
    if unknown:
        flags.append("patient_unknown")
    affine = None if header["affine"] is None else np.array(header["affine"])
    shape, reason = tuple(header["shape"]), header["reason"]
    n_volumes = 1
    if len(shape) == 4 and shape[3] > 1 and reason == "not_3d":
        n_volumes, shape = shape[3], shape[:3]
        reason = volume_fault(shape, affine)
    geometry: dict[str, Any] = {"shape": shape}
    if affine is not None and len(shape) == 3:
        geometry = {**canonical(affine, shape, header["slice_axis"]), "spacing_source": "header"}
    beside = sidecar_header(sidecar)
    modality = str(beside.get("modality", choice.modality)).upper()
    modality = modality if modality in MODALITIES else ("other" if beside else "unknown")
    known: dict[str, Any] = {}
    if beside:
        known = attributes([beside], modality)
        flags.extend(known.pop("flags"))
        known["slice_thickness_mm"] = beside.get("slice_thickness")
        if contradicts(beside, choice.modality, geometry.get("spacing_mm"), geometry.get("slice_axis")):
            flags.append("sidecar_conflict")
    for k in range(n_volumes):
        row = SeriesRow(
            series_id=unique(key.make("series", "file", identity if n_volumes == 1 else f"{identity} {k}"), key, taken),
            study_id=key.make("study", "file", identity),
            patient_id=patient,
            modality=modality,
            domain=domain_of(modality),
            kind="volume_4d" if len(shape) > 3 else ("image" if len(shape) < 3 else "volume"),
            n_slices=None if geometry.get("slice_axis") is None else geometry["shape"][geometry["slice_axis"]],
            n_volumes=n_volumes,
            volume_index=k,
            volume_axis="time" if n_volumes > 1 else "none",
            dtype=stored_type(header["dtype"]),
            bits=_bits(stored_type(header["dtype"])),
            units="arbitrary" if domain_of(modality) in UNITLESS else "unknown",
            n_files=len(members),
            bytes=sum(member.size for member in members),
            site=choice.site,
            split=choice.split,
            quality_flags=tuple(flags),
            status="rejected" if reason else ("flagged" if flags else "ok"),
            reason=reason,
            **known,
            **geometry,
        )
        place(out, row, members, placed, key, part={"volume": k} if n_volumes > 1 else None)


def _bits(dtype: str) -> int | None:
    """Return the bits of a stored type such as `int16`, None for others."""
    digits = dtype.lstrip("uintfloa")
    return int(digits) if digits.isdigit() else None


def add_picture(
    out: Group, file: Scanned, data: Sequence[Scanned], placed: Mapping[str, Placed], key: IdKey, taken: set[str]
) -> None:
    """Add an image, a clip or a slide that is one file and says nothing of a patient."""
    header, choice = file.header, file.choice
    members = [file, *data]
    flags = [*header.get("flags", ())]
    patient, unknown = patient_of(key, choice, placeholder=True, issuer=choice.site, value="", fallback=f"file {file.digest}")
    if unknown:
        flags.append("patient_unknown")
    kind = header["kind"]
    modality = "SM" if kind == "slide" and choice.modality == "unknown" else choice.modality
    spacing = header.get("spacing_mm")
    reason = header.get("reason")
    row = SeriesRow(
        series_id=unique(key.make("series", "file", file.digest), key, taken),
        study_id=key.make("study", "file", file.digest),
        patient_id=patient,
        modality=modality,
        domain=domain_of(modality),
        kind=kind,
        shape=tuple(header["shape"]),
        spacing_mm=None if spacing is None else tuple(spacing),
        extent_mm=None if spacing is None else tuple(round(n * step, 3) for n, step in zip(header["shape"][-2:], spacing)),
        spacing_source="unknown" if spacing is None else "header",
        mpp=header.get("mpp"),
        frame_time_ms=header.get("frame_time_ms"),
        fps_source=header.get("fps_source") or "unknown",
        dtype=stored_type(header.get("dtype")),
        bits=header.get("bits"),
        photometric=header.get("photometric") or "unknown",
        lossy=True if "lossy" in flags else header.get("lossy"),
        units="arbitrary" if domain_of(modality) in UNITLESS else "unknown",
        n_slices={"image": 1, "cine": header["shape"][0]}.get(kind),
        vendor=header.get("vendor", "unknown"),
        n_files=len(members),
        bytes=sum(member.size for member in members),
        site=choice.site,
        split=choice.split,
        quality_flags=tuple(dict.fromkeys(flags)),
        privacy_flags=tuple(header.get("privacy_flags", ())),
        status="rejected" if reason else ("flagged" if flags else "ok"),
        reason=reason,
    )
    place(out, row, members, placed, key)
    add_associated(out, row, header.get("associated", ()), members, placed, key)


def add_associated(
    out: Group,
    slide: SeriesRow,
    pictures: Sequence[Mapping[str, Any]],
    members: Sequence[Scanned],
    placed: Mapping[str, Placed],
    key: IdKey,
) -> None:
    """Add rows for the label and overview of a slide: private pictures that no selection takes."""
    for picture in pictures:
        if picture["role"] not in ("label", "overview"):
            continue
        row = SeriesRow(
            series_id=key.make("series", slide.series_id, picture["role"]),
            study_id=slide.study_id,
            patient_id=slide.patient_id,
            modality=slide.modality,
            domain=slide.domain,
            kind="image",
            role=picture["role"],
            shape=tuple(picture["shape"] or ()),
            n_files=len(members),
            bytes=0,
            site=slide.site,
            split=slide.split,
            privacy_flags=("label_image",),
            status="rejected",
            reason="label_image",
        )
        place(out, row, members, placed, key, part={"member": picture["member"]})
