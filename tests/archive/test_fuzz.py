"""Ten thousand damaged files: no crash, no hang over 5 s, at most 1 GB of address space above the start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from medssl.archive.headers.file_headers import HEAD_BYTES, KINDS, sniff
from medssl.archive.reasons import FILE_REASONS, IMAGE_REASONS
from medssl.archive.scanning.scan import SCAN_COLUMNS, scan_file

COUNT = 10_000
SIGNATURES = [
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
    b"GIF89a", b"BM" + b"\0" * 8 + b"\x36\0\0\0\x28\0\0\0", b"NRRD0004\n", b"ObjectType = Image\nNDims = 3\n", b"\x5c\x01\0\0",
    b"\0" * 128 + b"DICM", b"\x08\0\x05\0CS\x0a\0ISO_IR 100", b"PK\x03\x04", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", b"BZh9", b"\xfd7zXZ\0",
    b"RIFF\0\0\0\0AVI ", b"\0\0\0\x14ftypisom", b"\0\0\x01\xba", b"\x1aE\xdf\xa3", b'{"Modality": ',
]  # fmt: skip
"""Without them random bytes would never get past `sniff`."""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.sampled_from([b"", *SIGNATURES]), st.binary(max_size=600))
@example(b"\x5c\x01\0\0" + bytes(340) + b"n+1\0", b"")
def test_random_bytes__a_kind_and_rows_never_an_exception(tmp_path: Path, signature: bytes, rest: bytes) -> None:
    data = signature + rest
    assert sniff(data[:HEAD_BYTES]) in KINDS
    path = tmp_path / "file"
    path.write_bytes(data)
    rows = scan_file(str(path))
    for row in rows:
        assert set(row) == set(SCAN_COLUMNS)
        assert isinstance(json.loads(row["header"]), dict)
        assert row["reason"] is None or row["reason"] in FILE_REASONS.keys() | IMAGE_REASONS.keys()
        assert row["reason"] not in ("io_error", "io_retry", "timeout")  # the disk is well


@pytest.mark.slow
def test_ten_thousand_mutants__bounded_and_without_surprise(tmp_path: Path) -> None:
    """Prints what docs/archive.md quotes; `python -m tests.archive.fuzz --case NAME:NUMBER` runs one of them again."""
    for package in ("tifffile", "openslide", "av", "imagecodecs"):
        pytest.importorskip(package)
    progress = tmp_path / "progress"
    command = [
        sys.executable,
        "-m",
        "tests.archive.fuzz",
        "--folder",
        str(tmp_path),
        "--count",
        str(COUNT),
        "--progress",
        str(progress),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], check=False, errors="replace", timeout=580
    )
    last = progress.read_text().split()[1] if progress.exists() else "none"
    assert done.returncode == 0, f"status {done.returncode} at case {last}: {done.stderr[-2000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({name: value for name, value in result.items() if name not in ("whole", "by_source")}, indent=1))
    assert result["files"] == COUNT
    assert result["unexpected"] == {}
    assert result["slowest"][0][0] < 5 and result["address_space_mb"] <= 1024
    # Mutants get past the first check of parsers, and readers have something to do.
    outcomes = result["outcomes"]
    assert all(
        outcomes[name] >= COUNT // 50 for name in ("dicom", "volume", "image", "container", "truncated", "unreadable", "read")
    )
    # C libraries complain on stderr; none of them may quote what a file holds.
    assert not re.search(r"Phantom|P000[17]|Doe", done.stderr)


def test_mutants__are_those_of_their_seed() -> None:
    from tests.mutants import mutate

    data = bytes(128) + b"DICM" + b"\x08\0\x60\0CS\x02\0MR" * 40
    assert [mutate(data, f"x:{k}") for k in range(50)] == [mutate(data, f"x:{k}") for k in range(50)]
    assert len({mutate(data, f"x:{k}")[0] for k in range(50)}) > 40
