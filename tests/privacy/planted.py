"""Identifiers of a person who does not exist, files full of them, and a search for them in whatever a program leaves behind.

`KINDS` holds the 18 kinds of identifiers of the HIPAA safe-harbour list. `Searcher` looks for each of them in every encoding that a
careless program could have used, in every container that medssl writes.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import html
import io
import json
import re
import tarfile
import unicodedata
import urllib.parse
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

UID_ROOT = "1.2.826.0.1.3680043.8.498.77344120916"
PERSON = "Thistlewaite"
"""A name that stands in fields for names of persons only, never in a path or an id: not even `private/` has a use for it."""

KINDS: dict[str, tuple[str, ...]] = {
    "names": ("Quillfeather", "Zebediah", "Grünschnabel", "Quillfeather^Zebediah", PERSON),
    "geographic": ("Wexcombe Hollow", "90417-6620"),
    "dates": ("19570312", "20190817", "134237.518", "20190817134237"),
    "telephone": ("617-555-0148",),
    "fax": ("617-555-0193",),
    "email": ("zq.feather@wexmail.example",),
    "social_security": ("904-71-3358",),
    "medical_record": ("MRN83641957",),
    "health_plan": ("HPBN-5520-9917",),
    "account": ("ACCT-7741-0092",),
    "licence": ("LICMD-448120",),
    "vehicle": ("VIN1HGQF82633A",),
    "device": ("SNRDX-771034",),
    "url": ("https://wexrecords.example/zq",),
    "ip": ("198.51.100.77",),
    "biometric": ("FPRINT-9F3A77C2",),
    "photograph": ("portrait_zq_8841",),
    "other": ("ACCN201955217", UID_ROOT, "StudyIdent-5519Q"),
}
"""Kind -> strings; each is long enough not to occur by chance, also in base64 and in compressed data."""

ALL = " ".join(text for texts in KINDS.values() for text in texts if text != PERSON)

DATE_FORMATS = (
    "%Y-%m-%d", "%Y.%m.%d", "%Y/%m/%d", "%Y_%m_%d", "%Y %m %d", "%d.%m.%Y", "%d-%m-%Y", "%d/%m/%Y", "%m/%d/%Y", "%m-%d-%Y", "%d%m%Y",
    "%m%d%Y", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%Y, %-m, %-d",
)  # fmt: skip


def forms(text: str) -> set[str]:
    """Return how the same identifier may be written."""
    found = {text, text.lower(), text.upper()}
    if re.fullmatch(r"(19|20)\d{6}", text):
        day = datetime.strptime(text, "%Y%m%d")
        found |= {day.strftime(form) for form in DATE_FORMATS}
    elif re.fullmatch(r"\d{6}\.\d+", text):
        found |= {f"{text[:2]}:{text[2:4]}:{text[4:]}"}
    else:
        found |= {re.sub(r"[-^ ]", mark, text) for mark in (".", "_", "-", " ", "/", ", ", "")}
    found.add(unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode())
    found |= {unicodedata.normalize("NFD", text), text.replace("ü", "?")}
    if re.search("[a-z]", text):
        found.add(text[::-1])
    return {form for form in found if len(form) >= 7 and not re.fullmatch(r"[\d.]{1,7}", form)}


def encodings(text: str) -> set[bytes]:
    """Return the bytes that a form can have on disk or in a pipe."""
    found = {
        json.dumps(text)[1:-1].encode(),
        html.escape(text).encode(),
        urllib.parse.quote(text).encode(),
        ascii(text)[1:-1].encode(),
    }
    for codec in ("utf-8", "latin-1", "utf-16-le", "utf-16-be"):
        raw = text.encode(codec, "ignore")
        if len(raw) < 7:
            continue
        found |= {raw, raw.hex().encode(), raw.hex("-").encode(), raw.hex(":").encode()}
        found |= set(base64_inside(raw))
    found.add(base64.b32encode(text.encode()).rstrip(b"=")[:-1])
    for digest in (hashlib.md5, hashlib.sha1, hashlib.sha256):  # a hash without a key is undone by trying all dates or numbers
        found.add(digest(text.encode()).hexdigest()[:12].encode())
    for size in (6, 8, 16, 20, 32):
        found.add(hashlib.blake2b(text.encode(), digest_size=size).hexdigest()[:12].encode())
    return found


def base64_inside(raw: bytes) -> Iterator[bytes]:
    """Yield the base64 characters that `raw` decides wherever it lies in a longer encoded text."""
    for offset in range(3):
        start, stop = -(-offset * 8 // 6), (offset + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(b"\0" * offset + raw + b"\0\0")[start:stop]


def needles() -> dict[bytes, str]:
    """Return lower-cased bytes -> what they are."""
    found: dict[bytes, str] = {}
    for kind, texts in KINDS.items():
        for text in texts:
            for form in forms(text):
                for raw in encodings(form):
                    found.setdefault(raw.lower(), f"{kind}: {form!r} as {raw!r}")
    return found


class Searcher:
    """Finds thousands of needles in one pass.

    Args:
        extra: More strings to look for, by name, in their plain bytes only (paths, digests of files).
    """

    def __init__(self, extra: Mapping[str, str] | None = None) -> None:
        all_needles = {
            **needles(),
            **{text.lower().encode("utf-8", "surrogateescape"): f"{name}: {text!r}" for text, name in (extra or {}).items()},
        }
        self._first = np.zeros(1 << 24, dtype=bool)
        self._buckets: dict[bytes, list[tuple[bytes, str]]] = {}
        for needle, what in all_needles.items():
            head = needle[:3]
            self._first[head[0] | head[1] << 8 | head[2] << 16] = True
            self._buckets.setdefault(head, []).append((needle, what))

    def find(self, data: bytes) -> set[str]:
        """Return what of the planted is in the data, whatever the case of its letters."""
        low = data.lower()
        array = np.frombuffer(low, dtype=np.uint8)
        if len(array) < 3:
            return set()
        windows = array[:-2].astype(np.int32)
        windows |= array[1:-1].astype(np.int32) << 8
        windows |= array[2:].astype(np.int32) << 16
        found = set()
        for place in np.flatnonzero(self._first[windows]).tolist():
            for needle, what in self._buckets[low[place : place + 3]]:
                if low.startswith(needle, place) and not (needle.isdigit() and _inside_number(low, place, len(needle))):
                    found.add(what)
        return found

    def search(self, root: Path, *, skip: Iterable[Path] = ()) -> list[str]:
        """Return one line for everything found below a folder, in names, contents and inside containers; `private/` is left out."""
        skipped = set(skip)
        hits = []
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            if "private" in relative.parts or any(part in skipped for part in (path, *path.parents)):
                continue
            for what in self.find(str(relative).encode("utf-8", "surrogateescape")):
                hits.append(f"the name of {relative} holds {what}")
            if path.is_symlink():
                layers: Iterable[tuple[str, bytes]] = [("link", str(path.readlink()).encode())]
            elif path.is_file():
                layers = unwrap(path.name, path.read_bytes())
            else:
                continue
            for layer, data in layers:
                hits += [f"{relative} ({layer}) holds {what}" for what in self.find(data)]
        return hits


def _inside_number(data: bytes, place: int, size: int) -> bool:
    """Return whether digits go on before or after: eight of a float's decimals may be a date by chance."""
    return data[max(place - 1, 0) : place].isdigit() or data[place + size : place + size + 1].isdigit()


def unwrap(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (layer, bytes) of a file's content: as it is, and as what is packed inside it."""
    yield "bytes", data
    if data[:4] == b"PAR1":
        yield from _parquet(data)
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                yield "zip entry", member.filename.encode() + b" " + member.comment + b" " + archive.comment
                yield from _deeper(member.filename, archive.read(member))
    elif data[:2] == b"\x1f\x8b":
        with contextlib.suppress(OSError, EOFError, zlib.error):  # broken on purpose
            yield from _deeper(name.removesuffix(".gz"), gzip.decompress(data))
    elif data[:6] == b"\x93NUMPY":
        yield from _numpy(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n" or data[:3] in (b"\xff\xd8\xff", b"GIF") or data[:4] in (b"II*\0", b"MM\0*"):
        yield from _picture(data)
    elif name.endswith(".b2nd") or b"b2frame\0" in data[:32]:
        yield from _blosc(data)
    elif name.endswith((".json", ".jsonl")):
        for line in [data] if name.endswith(".json") else data.splitlines():
            yield "JSON", _flat(_json(line))
    elif name.endswith((".html", ".svg")):
        text = data.decode()
        yield "HTML text", html.unescape(re.sub(r"<[^>]*>", "", text)).encode()
        yield "HTML unescaped", urllib.parse.unquote(html.unescape(text)).encode()
        for mime, inner in re.findall(r"data:([\w/+.-]*)[\w=;-]*;base64,([A-Za-z0-9+/=]+)", text):
            yield from _deeper(mime, base64.b64decode(inner))


def _deeper(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    for layer, inner in unwrap(name, data):
        yield f"{name}: {layer}", inner


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a line that a kill cut short
        return None


def _flat(value: Any) -> bytes:
    """Return every key and value of nested data as text, without escapes."""
    if isinstance(value, Mapping):
        return b"\n".join(_flat(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set):
        return b"\n".join(_flat(part) for part in value)
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def _parquet(data: bytes) -> Iterator[tuple[str, bytes]]:
    import tempfile

    import duckdb

    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        file.write(data)
        file.flush()
        for what in ("read_parquet", "parquet_metadata", "parquet_kv_metadata"):
            found = duckdb.sql(f"SELECT * FROM {what}('{file.name}')")
            names, rows = found.columns, found.fetchall()
            kept = [k for k, name in enumerate(names) if name != "file_name"]  # the name of our own temporary file
            yield what, _flat([names, [[row[k] for k in kept] for row in rows]])


def _numpy(data: bytes) -> Iterator[tuple[str, bytes]]:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    yield "values", _flat(array.tolist()) if array.dtype.kind in "US" or array.size < 10_000 else array.tobytes()


def _picture(data: bytes) -> Iterator[tuple[str, bytes]]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        yield "picture metadata", _flat([image.info, getattr(image, "text", {}), dict(image.getexif())])


def _blosc(data: bytes) -> Iterator[tuple[str, bytes]]:
    import blosc2

    array = blosc2.ndarray_from_cframe(data)
    meta = {name: array.schunk.meta[name] for name in array.schunk.meta}
    yield "Blosc2 metadata", _flat([meta, dict(array.schunk.vlmeta.getall())])
    yield "Blosc2 voxels", np.ascontiguousarray(array[:]).tobytes()


# Files full of identifiers.


SHAPE = (28, 24, 12)
TEXT_TAGS: dict[str, Any] = {
    "PatientBirthDate": "19570312", "StudyDate": "20190817", "SeriesDate": "20190817", "AcquisitionDate": "20190817",
    "ContentDate": "20190817", "StudyTime": "134237.518", "AcquisitionTime": "134237.518", "AcquisitionDateTime": "20190817134237.518",
    "InstanceCreationDate": "20190817", "PatientAge": "062Y", "OtherPatientNames": f"Grünschnabel^{PERSON}", "PatientBirthName": PERSON,
    "PatientMotherBirthName": "Grünschnabel", "OtherPatientIDs": "904-71-3358", "IssuerOfPatientID": "Wexcombe Hollow",
    "PatientAddress": "17 Wexcombe Hollow 90417-6620", "PatientTelephoneNumbers": "617-555-0148", "InstitutionName": "Wexcombe Hollow",
    "InstitutionAddress": "Wexcombe Hollow 90417-6620 fax 617-555-0193", "InstitutionalDepartmentName": "Wexcombe Hollow",
    "StationName": "198.51.100.77", "AccessionNumber": "ACCN201955217", "StudyID": "StudyIdent-5519Q", "StudyDescription": "MR Quillfeather",
    "SeriesDescription": "T1 Quillfeather head MRN83641957", "ProtocolName": "Quillfeather brain 1957-03-12", "BodyPartExamined": "ZEBEDIAH HEAD",
    "ReferringPhysicianName": f"{PERSON}^Doctor", "PerformingPhysicianName": "Grünschnabel", "OperatorsName": "Zebediah",
    "PhysiciansOfRecord": "Quillfeather", "NameOfPhysiciansReadingStudy": "Quillfeather", "RequestingPhysician": "Quillfeather",
    "PatientComments": "call 617-555-0148 or zq.feather@wexmail.example, licence LICMD-448120, car VIN1HGQF82633A",
    "ImageComments": "see https://wexrecords.example/zq and portrait_zq_8841.jpg", "AdditionalPatientHistory": ALL[:1000],
    "AdmissionID": "ACCT-7741-0092", "DeviceSerialNumber": "SNRDX-771034",
    "DeviceID": "SNRDX-771034", "DeviceUID": f"{UID_ROOT}.3", "DetectorID": "SNRDX-771034", "MilitaryRank": "Quillfeather",
    "Occupation": "FPRINT-9F3A77C2",
    "EthnicGroup": "Zebediah", "ContrastBolusAgent": "Quillfeather", "ScanOptions": "QUILLFEATHER", "SequenceName": "ZEBEDIAH",
    "ScanningSequence": "QUILLFEATHER", "SoftwareVersions": "MRN83641957", "ManufacturerModelName": "Quillfeather 904-71-3358",
    "Manufacturer": "Quillfeather SIEMENS", "ConvolutionKernel": "ZEBEDIAH", "RequestedProcedureDescription": "Quillfeather",
    "PerformedProcedureStepDescription": "Quillfeather", "AcquisitionDeviceProcessingDescription": "Zebediah",
    "DeidentificationMethod": "by Quillfeather",
    "ImageType": ["ORIGINAL", "PRIMARY", "ZEBEDIAH", "QUILLFEATHER"], "PatientSex": "Zebediah", "PatientPosition": "ZEBEDIAH",
    "ViewPosition": "ZEBEDIAH", "Laterality": "QUILLFEATHER", "PresentationIntentType": "QUILLFEATHER", "RescaleType": "ZEBEDIAH",
}  # fmt: skip


@functools.cache
def identifiers() -> Any:
    """Return a data set of identifiers: in text tags, in sequence items, in private blobs and in an overlay."""
    import pydicom
    from pydicom.dataset import Dataset

    ds = Dataset()
    with pydicom.config.disable_value_validation():
        ds.SpecificCharacterSet = "ISO_IR 192"
        for keyword, value in TEXT_TAGS.items():
            setattr(ds, keyword, value)
        item, plan, nested = Dataset(), Dataset(), Dataset()
        item.PatientID, item.IssuerOfPatientID, item.PatientName = "MRN83641957", "904-71-3358", PERSON
        plan.CodeValue, plan.CodeMeaning = "HPBN-5520-9917", "HPBN-5520-9917"
        nested.PatientName, nested.StudyDate = "Quillfeather^Zebediah", "20190817"
        ds.OtherPatientIDsSequence, ds.PatientInsurancePlanCodeSequence = [item], [plan]
        block = ds.private_block(0x0009, "QUILLFEATHER VENDOR", create=True)
        block.add_new(0x01, "LO", "Quillfeather^Zebediah")
        block.add_new(0x02, "OB", ALL.encode("latin-1") + ALL.encode("utf-16-le"))
        block.add_new(0x03, "UN", base64.b64encode(ALL.encode()) + ALL.encode().hex().encode())
        block.add_new(0x04, "SQ", [nested])
        ds.add_new(0x60000022, "LO", "Quillfeather")
        ds.add_new(0x60003000, "OW", ALL.encode("latin-1").ljust(2048, b"\0"))
    return ds


def add_identifiers(path: Path, series: str) -> None:
    """Put identifiers into a DICOM file, whose UIDs begin with `UID_ROOT` and the number of its series."""
    import pydicom

    ds = pydicom.dcmread(path)
    ds.update(identifiers())
    with pydicom.config.disable_value_validation():
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{UID_ROOT}.{series}.1{path.stem}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{UID_ROOT}.{series}.2", f"{UID_ROOT}.{series}.3"
        ds.FrameOfReferenceUID = f"{UID_ROOT}.{series}.4"
        ds.file_meta.SourceApplicationEntityTitle = "QUILLFEATHER"
        pydicom.dcmwrite(path, ds, enforce_file_format=True)


def write_dicom(
    folder: Path, *, seed: int, slices: int = 4, modality: str = "MR", patient: str = "MRN83641957", syntax: str = "explicit"
) -> list[Path]:
    from tests.synthetic import oblique_volume, write_dicom_series

    array, affine = oblique_volume((*SHAPE[:2], slices), seed=seed)
    paths = write_dicom_series(
        folder,
        array,
        affine,
        modality=modality,
        patient_id=patient,
        patient_name=f"Quillfeather^Zebediah {PERSON}",
        uid_seed=f"{seed}",
        syntax=syntax,
    )
    for path in paths:
        add_identifiers(path, str(seed))
    return paths


def nifti_bytes(seed: int) -> bytes:
    """Return a NIfTI-1 file with identifiers in every free-text field and two extensions."""
    import nibabel as nib

    from tests.synthetic import oblique_volume

    array, affine = oblique_volume(SHAPE, seed=seed)
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm", "sec")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header["descrip"], header["aux_file"] = f"Quillfeather^{PERSON} 1957-03-12 MRN83641957".encode(), b"portrait_zq_8841"
    header["intent_name"], header["db_name"], header["data_type"] = b"904-71-3358", b"ACCN201955217", b"19570312"
    blocks = b""
    for code, content in ((6, ALL.encode()), (2, ALL.encode("utf-16-le"))):
        size = -(-(len(content) + 8) // 16) * 16
        blocks += size.to_bytes(4, "little") + code.to_bytes(4, "little") + content.ljust(size - 8, b"\0")
    header["magic"], header["vox_offset"] = b"n+1", 352 + len(blocks)
    data: bytes = header.binaryblock + b"\1\0\0\0" + blocks + array.tobytes(order="F")
    return data


def zipped(data: bytes, name: str) -> bytes:
    """Return gzip bytes that name the file they came from."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename=name, mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(data)
    return buffer.getvalue()


def nrrd_bytes(seed: int, sizes: str | None = None) -> bytes:
    from tests.synthetic import oblique_volume

    array, _ = oblique_volume(SHAPE, seed=seed)
    lines = [
        "NRRD0005", "# Quillfeather^Zebediah 904-71-3358", "type: short", "dimension: 3", "space: right-anterior-superior",
        f"sizes: {sizes or ' '.join(map(str, SHAPE))}", "space directions: (1.5,0,0) (0,1.5,0) (0,0,2.5)", "space origin: (1,2,3)",
        "encoding: raw", "endian: little", "content: Quillfeather", f"PatientName:=Quillfeather^{PERSON}", f"note:={ALL}", "", "",
    ]  # fmt: skip
    return "\n".join(lines).encode() + array.tobytes(order="F")


def mha_bytes(seed: int, size: str | None = None) -> bytes:
    from tests.synthetic import oblique_volume

    array, _ = oblique_volume(SHAPE, seed=seed)
    lines = [
        "ObjectType = Image", "NDims = 3", f"Comment = Quillfeather^{PERSON} 19570312", "Name = Quillfeather", f"PatientNote = {ALL}",
        "PatientID = MRN83641957",
        "BinaryData = True", "BinaryDataByteOrderMSB = False", "CompressedData = False", "TransformMatrix = 1 0 0 0 1 0 0 0 1",
        "Offset = 1 2 3", "ElementSpacing = 1.5 1.5 2.5", f"DimSize = {size or ' '.join(map(str, SHAPE))}", "ElementType = MET_SHORT",
        "ElementDataFile = LOCAL", "",
    ]  # fmt: skip
    return "\n".join(lines).encode() + array.tobytes(order="F")


def write_archive(root: Path, n: int = 6) -> Path:
    """Write a tree with everything in it: good images of several formats, odd and broken ones, all full of identifiers.

    Returns:
        The source folder, whose own name is an identifier. `split.csv` lies beside it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the values that no scanner should write
        return _write_archive(root, n)


def _write_archive(root: Path, n: int) -> Path:
    source = root / "Quillfeather_Zebediah"
    person = source / "MRN83641957" / "1957-03-12"
    person.mkdir(parents=True)
    write_dicom(person / "20190817" / "ACCN201955217", seed=1, slices=10)
    write_dicom(person / "ct", seed=2, modality="CT")
    rows = ["file,split,patient,finding,volume"]
    for k in range(n):
        name = f"Quillfeather_Zebediah_{k}.nii.gz"
        (person / name).write_bytes(zipped(nifti_bytes(10 + k), name[:-3]))
        rows.append(f"{name},{('train', 'train', 'val', 'test')[k % 4]},MRN83641957_{k},{k % 2},{k}")
    sidecar = {
        "Modality": "MR",
        "Manufacturer": "Quillfeather",
        "SeriesDescription": ALL,
        "PatientName": f"Grünschnabel^{PERSON}",
        "PatientBirthDate": "1957-03-12",
    }
    (person / "Quillfeather_Zebediah_0.json").write_text(json.dumps(sidecar))
    (person / "Zebediah.nrrd").write_bytes(nrrd_bytes(30))
    (person / "Zebediah.mha").write_bytes(mha_bytes(31))
    write_video(person / "Zebediah_Quillfeather.avi")
    write_dicomdir(source / "DICOMDIR")
    write_odd(person / "Zebediah_odd")
    (root / "split.csv").write_text("\n".join(rows) + "\n")
    return source


def write_small(root: Path) -> Path:
    """Write a tree with a few images only, and `split.csv` beside it."""
    source = root / "Quillfeather_Zebediah"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_dicom(source / "MRN83641957" / "20190817", seed=1)
    (source / "Zebediah_0.nii.gz").write_bytes(zipped(nifti_bytes(10), "Zebediah_0.nii"))
    (source / "Quillfeather.txt").write_text(ALL)
    (root / "split.csv").write_text("file,split,patient\nZebediah_0.nii.gz,train,MRN83641957_0\n")
    return source


def write_odd(folder: Path) -> None:
    """Write what provokes errors and warnings, at the scan or when voxels are read."""
    import pydicom

    folder.mkdir()
    first = write_dicom(folder / "rle_19570312", seed=3, syntax="rle", patient="Quillfeather")[0]
    data = bytearray(first.read_bytes())
    at = bytes(data).rindex(b"\xfe\xff\x00\xe0") + 8 + 64
    data[at:] = b"\x7f" * (len(data) - at)  # runs that go past their end: the header is fine, decoding fails
    first.write_bytes(bytes(data))
    good = write_dicom(folder / "few", seed=4, patient="904-71-3358")
    whole = good[0].read_bytes()
    (folder / "Quillfeather_cut.dcm").write_bytes(whole[: len(whole) - 300])
    (folder / "Quillfeather_cut_in_header.dcm").write_bytes(whole[:700])
    (folder / "Quillfeather_no_preamble").write_bytes(whole[132:])
    for number, (keyword, value) in enumerate(
        {
            "SpecificCharacterSet": "QUILLFEATHER", "Rows": b"Zebediah", "NumberOfFrames": "Quillfeather", 
            "PixelSpacing": "Quillfeather\\MRN83641957",
            "ImagePositionPatient": "Zebediah\\1\\2", "RescaleSlope": "19570312^", "BitsAllocated": b"MRN8", "PatientAge": "Zebediah",
            "PhotometricInterpretation": "QUILLFEATHER", "StudyDate": "Quillfeather", "Modality": "ZEBEDIAH", "InstanceNumber": "MRN83641957",
            "SOPClassUID": "Quillfeather", "PatientName": "Gr\xfcnschnabel",
        }.items()
    ):  # fmt: skip
        ds = pydicom.dcmread(good[number % len(good)])
        ds.SeriesInstanceUID = ds.StudyInstanceUID = f"{UID_ROOT}.9.{number}"
        raw = value if isinstance(value, bytes) else value.encode("latin-1")
        (folder / f"Quillfeather_{number}.dcm").write_bytes(spliced(ds, keyword, raw))
    for name, make in {"SR": "1.2.840.10008.5.1.4.1.1.88.11", "PDF": "1.2.840.10008.5.1.4.1.1.104.1"}.items():
        ds = pydicom.dcmread(good[1])
        for keyword in ("PixelData", "Rows", "Columns"):
            del ds[keyword]
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = make
        ds.Modality, ds.TextValue, ds.DocumentTitle = name[:2], ALL[:400], "Quillfeather"
        pydicom.dcmwrite(folder / f"MRN83641957_{name}", ds, enforce_file_format=True)
    plain = nifti_bytes(40)
    (folder / "Zebediah_cut.nii").write_bytes(plain[:-500])
    packed = bytearray(zipped(nifti_bytes(41), "Quillfeather"))
    packed[-2000:-1000] = b"Quillfeather" * 84  # the header can be read, the voxels cannot
    (folder / "Zebediah_broken.nii.gz").write_bytes(bytes(packed[:-992]) + bytes(packed[-1000:]))
    (folder / "Zebediah_type.nii").write_bytes(plain[:70] + b"\x39\x30" + plain[72:])
    (folder / "Zebediah_constant.nii").write_bytes(plain[: -int(np.prod(SHAPE)) * 2] + bytes(int(np.prod(SHAPE)) * 2))
    (folder / "Zebediah_sizes.nrrd").write_bytes(nrrd_bytes(42, sizes="Quillfeather 19570312 3"))
    (folder / "Zebediah_sizes.mha").write_bytes(mha_bytes(43, size="Zebediah MRN83641957 3"))
    (folder / "Zebediah_short.mha").write_bytes(mha_bytes(43)[:-900])
    write_pictures(folder)
    with zipfile.ZipFile(folder / "Quillfeather.zip", "w") as archive:
        archive.comment = ALL.encode()[:60000]
        archive.writestr("Zebediah/MRN83641957.dcm", whole)
        archive.writestr("Zebediah/Quillfeather.nii", nifti_bytes(44))
    with tarfile.open(folder / "Quillfeather.tar", "w") as tar:
        tar.add(good[0], "Quillfeather/19570312.dcm")
    (folder / "Quillfeather.nii.gz").write_bytes(b"\x1f\x8b\x08\x08\0\0\0\0\0\3Quillfeather\0" + b"MRN83641957" * 20)
    (folder / "Quillfeather.avi").write_bytes(b"RIFF" + (4000).to_bytes(4, "little") + b"AVI LIST" + b"INAMQuillfeather" * 50)
    (folder / "Quillfeather.txt").write_text(ALL)
    (folder / "MRN83641957_empty.dcm").touch()
    (folder / "link_Quillfeather").symlink_to(folder / "gone_MRN83641957")
    (folder / "loop_Quillfeather").symlink_to(folder)
    with open(bytes(folder) + b"/Gr\xfcnschnabel.nii", "wb") as stream:
        stream.write(nifti_bytes(45))


def write_video(path: Path) -> None:
    """Write a clip whose name and title are a patient's, where PyAV is there to write it."""
    try:
        import av
    except ImportError:
        return
    with av.open(str(path), "w") as container:
        container.metadata["title"] = container.metadata["artist"] = f"Quillfeather {PERSON} 1957-03-12"
        stream = container.add_stream("mjpeg", rate=25, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for k in range(6):
            grey = ((np.arange(48 * 64).reshape(48, 64) + 9 * k) % 251).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, axis=2), format="rgb24")))
        container.mux(stream.encode())


def write_cines(root: Path, n: int = 6) -> Path:
    """Write ultrasound loops, the last one without frame times, a video and a damaged one, all full of identifiers.

    Returns:
        The source folder, whose own name is an identifier. `split.csv` lies beside it: two patients are trained on.
    """
    from tests.synthetic_planar import us_loop, write_planar_dicom

    source = root / "Quillfeather_Zebediah"
    source.mkdir(parents=True)
    rows = ["file,split,volume"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the values that no scanner should write
        for k in range(n):
            who = {"PatientID": f"MRN83641957_{k}", "PatientName": f"Quillfeather^Zebediah {PERSON}"}
            timed = {} if k == n - 1 else {"FrameTime": 40}
            path = write_planar_dicom(source / f"{k}.dcm", us_loop(10, (64, 80), seed=k), modality="US", **who, **timed)
            add_identifiers(path, f"7{k}")
            name = f"Quillfeather_Zebediah_{k}.dcm"
            path.rename(source / name)
            rows.append(f"{name},{'train' if k < 2 else 'test'},{k}")
    write_video(source / "Zebediah_Quillfeather.avi")
    if (source / "Zebediah_Quillfeather.avi").exists():
        whole = (source / "Zebediah_Quillfeather.avi").read_bytes()
        (source / "MRN83641957_cut.avi").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "split.csv").write_text("\n".join(rows) + "\n")
    return source


def write_dicomdir(path: Path) -> None:
    """Write the table of contents of a disc: a patient, by name, and nothing else."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    ds, record = Dataset(), Dataset()
    record.DirectoryRecordType, record.PatientID, record.PatientName = "PATIENT", "MRN83641957", f"Quillfeather^{PERSON}"
    record.PatientBirthDate, record.OffsetOfTheNextDirectoryRecord, record.RecordInUseFlag = "19570312", 0, 0xFFFF
    record.OffsetOfReferencedLowerLevelDirectoryEntity = 0
    ds.FileSetID, ds.DirectoryRecordSequence = "QUILLFEATHER", [record]
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", f"{UID_ROOT}.77"
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def spliced(ds: Any, keyword: str, value: bytes) -> bytes:
    """Return a DICOM file whose element has exactly these bytes, which no library would write."""
    import pydicom
    from pydicom.dataset import Dataset

    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    value += b" " * (len(value) % 2)
    head = tag.to_bytes(4, "big")
    element = head[1::-1] + head[:1:-1] + pydicom.datadict.dictionary_VR(tag).encode() + len(value).to_bytes(2, "little") + value
    before, after = io.BytesIO(), io.BytesIO()
    low, high = ds[:tag], Dataset({item.tag: item for item in ds if item.tag > tag})
    low.file_meta, low.preamble = ds.file_meta, b"\0" * 128
    pydicom.dcmwrite(before, low, enforce_file_format=True)
    pydicom.dcmwrite(after, high, implicit_vr=False, little_endian=True)
    return before.getvalue() + element + after.getvalue()


def write_pictures(folder: Path) -> None:
    """Write PNG, JPEG, TIFF and GIF with identifiers in their text fields."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture = Image.fromarray((np.arange(64 * 64) % 251).astype(np.uint8).reshape(64, 64))
    info = PngInfo()
    info.add_text("Patient", ALL.encode("latin-1"))
    info.add_text("Comment", ALL.encode("latin-1"), zip=True)
    info.add_itxt("Name", "Grünschnabel")
    picture.save(folder / "portrait_zq_8841.png", pnginfo=info)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = "Quillfeather", "Zebediah"
    picture.save(folder / "portrait_zq_8841.jpg", exif=exif, comment=b"Quillfeather MRN83641957")
    picture.save(folder / "Quillfeather.tif", description="Quillfeather 904-71-3358")
    picture.save(folder / "Quillfeather.gif", comment=b"Quillfeather 19570312")


def write_cohort(root: Path, name: str, n: int = 6) -> Path:
    """Write a labelled cohort whose file names and tables are identifiers."""
    from tests.synthetic import oblique_volume, write_nifti

    folder = root / name
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    rows = ["file,split,patient"]
    for k in range(n):
        name = f"Quillfeather_Zebediah_{k}.nii.gz"
        array, affine = oblique_volume((32, 32, 32), seed=60 + k)
        write_nifti(folder / "images" / name, array, affine)
        write_nifti(folder / "labels" / name, (array > 120).astype(np.uint8), affine)
        rows.append(f"{name},{('train', 'train', 'val', 'test')[k % 4]},MRN83641957_{k}")
    (folder / "split.csv").write_text("\n".join(rows) + "\n")
    return folder
