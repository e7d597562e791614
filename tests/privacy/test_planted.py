"""The search must find what is there: every kind, in every encoding, in every container; and the guard must stop what tries to leave."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.privacy import planted

NAME = "Grünschnabel"


@pytest.fixture(scope="module")
def searcher() -> planted.Searcher:
    return planted.Searcher({"19/some folder/0001.dcm": "path"})


def test_kinds__are_the_eighteen() -> None:
    assert len(planted.KINDS) == 18 and all(planted.KINDS.values())


@pytest.mark.parametrize("kind", planted.KINDS)
def test_searcher__finds_every_kind_in_noise(searcher: planted.Searcher, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    assert searcher.find(noise) == set()
    for text in planted.KINDS[kind]:
        for written in (text, text.upper(), text.lower()):
            assert any(what.startswith(kind) for what in searcher.find(noise + b"|" + written.encode() + b"|" + noise)), written


@pytest.mark.parametrize(
    "written",
    [
        b"1957-03-12", b"12.03.1957", b"03/12/1957", b"12031957", b"datetime.date(1957, 3, 12)", b"12 Mar 1957", b"2019_08_17", b"t=13:42:37.518",
        b"904713358", b"904.71.3358", b"617 555 0148", b"QUILLFEATHER", b"Zebediah, Quillfeather", "Gr\u00fcnschnabel".encode(),
        NAME.encode("latin-1"), NAME.upper().encode(), NAME.encode("utf-16-le"), NAME.upper().encode("utf-16-be"), b"Grunschnabel",
        b"Gr\\u00fcnschnabel", b"Gr%C3%BCnschnabel", b"MRN83641957".hex().encode(), b"MRN83641957".hex().upper().encode(),
        "MRN83641957".encode("utf-16-le").hex().encode(), b"rehtaeflliuQ", b"1.2.826.0.1.3680043.8.498.77344120916.5.6",
        b"x19/Some Folder/0001.dcm", *(base64.b64encode(b"x" * k + b"Quillfeather, born 1957") for k in range(6)),
        *(base64.urlsafe_b64encode(b"?" * k + b"904-71-3358~~") for k in range(3)), base64.b32encode(b"Quillfeather"),
        b"5d7d1d" + __import__("hashlib").md5(b"MRN83641957").hexdigest().encode(),
        __import__("hashlib").blake2b(b"19570312", digest_size=8).hexdigest().encode(),
    ],
)  # fmt: skip
def test_searcher__finds_every_encoding(searcher: planted.Searcher, written: bytes) -> None:
    assert searcher.find(b"some text before " + written + b" and after")


@pytest.mark.parametrize(
    "harmless", [b"0.195703125", b"loss 119570312.5", b"year 2019, age_band 60-69", b"0f3a" * 500, b"IMR head"]
)
def test_searcher__keeps_quiet_about_the_rest(searcher: planted.Searcher, harmless: bytes) -> None:
    assert searcher.find(harmless) == set()


def parquet(folder: Path, select: str) -> None:
    import duckdb

    duckdb.sql(f"COPY (SELECT {select} AS a FROM range(500)) TO '{folder / 'x.parquet'}' (FORMAT parquet, COMPRESSION zstd)")


def archive(folder: Path, text: str) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("inner.gz", gzip.compress(text.encode() * 3))


def png(text: str, compressed: bool) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info, stream = PngInfo(), io.BytesIO()
    info.add_text("Comment", text.encode("latin-1"), zip=compressed)
    Image.new("L", (8, 8)).save(stream, "png", pnginfo=info)
    return stream.getvalue()


def jpeg(folder: Path, text: str) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x010E] = text
    Image.new("L", (8, 8)).save(folder / "x.jpg", exif=exif)


def safetensors(folder: Path, text: str) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, str(folder / "x.safetensors"), metadata={"who": text})


def blosc(folder: Path, text: str, where: str) -> None:
    import blosc2

    content = np.frombuffer(text.encode().ljust(64), np.uint8) if where == "voxels" else np.zeros(64, np.uint8)
    meta = {"meta": {"who": text.encode() * 9}} if where == "meta" else {}
    array = blosc2.asarray(content, cparams={"codec": blosc2.Codec.ZSTD}, contiguous=True, **meta)
    if where == "vlmeta":
        array.schunk.vlmeta["who"] = text * 9
    (folder / "x.b2nd").write_bytes(array.to_cframe())


def events(folder: Path, text: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        board.add_text("who", text)


def checkpoint(folder: Path, text: str) -> None:
    import torch

    torch.save({"who": text}, folder / "x.pt")


CONTAINERS: dict[str, Callable[[Path, str], object]] = {
    "text": lambda folder, text: (folder / "x.log").write_text(text),
    "file name": lambda folder, text: (folder / f"{text}.bin").touch(),
    "folder name": lambda folder, text: (folder / text).mkdir(),
    "link": lambda folder, text: (folder / "x").symlink_to(f"/nowhere/{text}"),
    "JSON": lambda folder, text: (folder / "x.json").write_text(json.dumps({"a": [{"b": text}]})),
    "JSON key": lambda folder, text: (folder / "x.json").write_text(json.dumps({text: 1})),
    "JSON lines": lambda folder, text: (folder / "x.jsonl").write_text(
        json.dumps({"a": 1}) + "\n" + json.dumps({"a": text}) + '\n{"cut'
    ),
    "Parquet": lambda folder, text: parquet(folder, f"'{text}'"),
    "Parquet list": lambda folder, text: parquet(folder, f"['x', '{text}']"),
    "Parquet blob": lambda folder, text: parquet(folder, f"'{text}'::VARCHAR::BLOB" if text.isascii() else f"encode('{text}')"),
    "gzip": lambda folder, text: (folder / "x.gz").write_bytes(gzip.compress(text.encode() * 3)),
    "zip of gzip": archive,
    "npz": lambda folder, text: np.savez_compressed(folder / "x.npz", a=np.array([text] * 9), b=np.zeros(3)),
    "npz name": lambda folder, text: np.savez_compressed(folder / "x.npz", **{text: np.zeros(3)}),
    "npz bytes": lambda folder, text: np.savez_compressed(folder / "x.npz", a=np.frombuffer(text.encode() * 9000, np.uint8)),
    "PNG": lambda folder, text: (folder / "x.png").write_bytes(png(text, False)),
    "PNG compressed": lambda folder, text: (folder / "x.png").write_bytes(png(text, True)),
    "JPEG": jpeg,
    "safetensors": safetensors,
    "Blosc2 vlmeta": lambda folder, text: blosc(folder, text, "vlmeta"),
    "Blosc2 meta": lambda folder, text: blosc(folder, text, "meta"),
    "Blosc2 voxels": lambda folder, text: blosc(folder, text, "voxels"),
    "HTML": lambda folder, text: (folder / "x.html").write_text(f"<b>{text[:4]}</b>{text[4:]}"),
    "HTML picture": lambda folder, text: (folder / "x.html").write_text(
        f'<img src="data:image/png;base64,{base64.b64encode(png(text, True)).decode()}">'
    ),
    "event file": events,
    "torch": checkpoint,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_search__finds_the_planted_in_every_container(tmp_path: Path, searcher: planted.Searcher, container: str) -> None:
    for name, text in {"clean": "an image", "planted": NAME, "also": "904-71-3358"}.items():
        (tmp_path / name).mkdir()
        CONTAINERS[container](tmp_path / name, text)
    assert searcher.search(tmp_path / "clean") == []
    assert any("names: " in line for line in searcher.search(tmp_path / "planted"))
    assert any("social_security" in line for line in searcher.search(tmp_path / "also"))


@pytest.mark.parametrize(
    "select", ["DATE '1957-03-12'", "19570312", "19570312.0", "TIMESTAMP '1957-03-12 10:00:00'", "{'day': '19570312'}"]
)
def test_search__finds_dates_of_every_column_type(tmp_path: Path, searcher: planted.Searcher, select: str) -> None:
    parquet(tmp_path, select)
    assert any("dates" in line for line in searcher.search(tmp_path))


def test_search__leaves_private_out(tmp_path: Path, searcher: planted.Searcher) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / NAME).write_text(NAME)
    assert searcher.search(tmp_path) == []


def test_archive__every_file_holds_identifiers(tmp_path: Path, searcher: planted.Searcher) -> None:
    source = planted.write_archive(tmp_path, n=2)
    for path in (path for path in source.rglob("*") if path.is_file() and path.stat().st_size):
        found = {what.split(":")[0] for _, data in planted.unwrap(path.name, path.read_bytes()) for what in searcher.find(data)}
        assert found, path
        if path.parent.name == "ACCN201955217":  # the DICOM slices that are good in every other way hold all of them
            assert found == set(planted.KINDS)


def guarded(tmp_path: Path, code: str) -> tuple[str, str]:
    log = tmp_path / "attempts"
    env = {**os.environ, "PYTHONPATH": str(Path(planted.__file__).parent / "guard"), "MEDSSL_TEST_ATTEMPTS": str(log)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    return done.stdout.strip(), log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('192.0.2.1', 80), 1)",
        "socket.getaddrinfo('updates.example', 443)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "__import__('urllib.request').request.urlopen('https://192.0.2.1/')",
    ],
)
def test_guard__stops_and_records_what_leaves_the_machine(tmp_path: Path, attempt: str) -> None:
    code = f"import socket\ntry:\n    {attempt}\nexcept OSError as err:\n    print('stopped', 'unreachable' in str(err))"
    said, log = guarded(tmp_path, code)
    assert said == "stopped True" and log.startswith("socket.")


def test_guard__lets_loopback_be(tmp_path: Path) -> None:
    code = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
print(socket.getaddrinfo("localhost", 80) != [])
"""
    assert guarded(tmp_path, code) == ("True", "")
