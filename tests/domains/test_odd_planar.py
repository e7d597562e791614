"""Every odd DICOM file ends with a sample or with a reason, whichever planar domain is pointed at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl.archive.reasons import IMAGE_REASONS
from medssl.domains.ultrasound import Ultrasound
from medssl.domains.xray import XRay
from medssl.errors import ImageError


def fault_of(domain: XRay | Ultrasound, path: Path) -> ImageError | None:
    try:
        domain.read([path], series_id="0" * 32)
    except ImageError as err:
        return err
    return None


@pytest.mark.parametrize(("domain", "at_least"), [(XRay(), 3), (Ultrasound(), 8)], ids=["xray", "ultrasound"])
def test_odd_files__a_sample_or_a_reason(
    domain: XRay | Ultrasound,
    at_least: int,
    shared_data: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = sorted(path for path in (shared_data / "dicom_odd").rglob("*") if path.is_file())
    assert len(files) == 125
    faults = {path: fault_of(domain, path) for path in files}
    reasons = {fault.reason for fault in faults.values() if fault is not None}
    assert {"no_domain", "not_image"} <= reasons <= set(IMAGE_REASONS)
    assert list(faults.values()).count(None) >= at_least
    assert not any(fault is not None and path.stem in str(fault) for path, fault in faults.items())
    assert capfd.readouterr() == ("", "") and caplog.text == ""
