"""Damage that files of a hospital have, and damage that somebody would do on purpose: seeded mutations of whole files.

`mutate` knows where a format keeps its elements and lengths (`anatomy`), so that most mutants get past the first check of a parser:
checksums of PNG and tar are put right again, and what gzip holds is mutated before it is packed.
"""

from __future__ import annotations

import contextlib
import gzip
import random
import struct
import zlib
from dataclasses import dataclass, field

SPECIAL = (
    0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x10000, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE,
    0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1,
)  # fmt: skip
WORDS = (
    b"", b"0", b"-1", b"1", b"nan", b"inf", b"-inf", b"1e999", b"99999999999999999999", b"4294967295", b"65535 65535 65535", b"1A",
    b"\xff\xfe\xfd", b"%s%n", b"\\\\\\", b"LIST", b"../../../etc/passwd",
)  # fmt: skip
LONG_VR = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV")


@dataclass
class Anatomy:
    """Where a file keeps what.

    Args:
        chunks: (start, stop) of elements, entries, boxes or lines.
        numbers: (place, bytes, byte order) of lengths, counts, offsets and types.
        text: Chunks are lines of text.
    """

    chunks: list[tuple[int, int]] = field(default_factory=list)
    numbers: list[tuple[int, int, str]] = field(default_factory=list)
    text: bool = False


def anatomy(data: bytes) -> Anatomy:
    """Return what a file consists of, as far as it is understood."""
    for matches, look in (
        (data[128:132] == b"DICM" or data[:2] in (b"\x08\0", b"\x02\0", b"\0\x08"), _dicom),
        (data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
        (data[:4] == b"\x89PNG", _png),
        (data[:3] == b"\xff\xd8\xff", _jpeg),
        (data[:4] == b"RIFF", _riff),
        (data[4:8] == b"ftyp", _boxes),
        (data[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0"), _nifti),
        (data[:4] == b"NRRD" or b"NDims" in data[:200], _lines),
        (data[:2] == b"PK", _zip),
    ):
        if matches:
            found = Anatomy()
            with contextlib.suppress(
                struct.error, IndexError, OverflowError
            ):  # a mutant of a mutant: what was found so far will do
                look(data, found)
            return found
    # GIF, BMP, MPEG and the like: all words of the first bytes are as good as any.
    return Anatomy(numbers=[(place, size, "<") for place in range(2, min(64, len(data) - 4), 2) for size in (2, 4)])


def _dicom(data: bytes, found: Anatomy) -> None:
    pos = 132 if data[128:132] == b"DICM" else 0
    order = ">" if data[pos : pos + 2] == b"\0\x08" else "<"
    meta_end = pos
    while pos + 8 <= len(data) and len(found.chunks) < 600:
        group, element = struct.unpack_from(f"{order}HH", data, pos)
        if group != 2 and meta_end == 0:
            meta_end = pos
        if group == 0x7FE0 and element == 0x10:
            found.numbers.append((pos + 4, 8, order))
            found.chunks.append((pos, len(data)))
            return
        vr = data[pos + 4 : pos + 6]
        if group == 0xFFFE or not (vr.isalpha() and vr.isupper()):
            head, size = 8, 4
        else:
            head, size = (12, 4) if vr in LONG_VR else (8, 2)
        (length,) = struct.unpack_from(f"{order}{'I' if size == 4 else 'H'}", data, pos + head - size)
        inside = group == 0xFFFE or vr == b"SQ" or (size == 4 and length == 0xFFFFFFFF)
        stop = pos + head + (0 if inside else length)
        found.numbers.append((pos + head - size, size, order))
        found.chunks.append((pos, min(stop, len(data))))
        pos = stop
        if group == 2 and data[pos : pos + 2] == b"\0\x08":
            order = ">"


def _tiff(data: bytes, found: Anatomy) -> None:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    word, count, entry, code = (8, 8, 20, "Q") if big else (4, 2, 12, "I")
    place = 8 if big else 4
    for _ in range(12):
        found.numbers.append((place, word, order))
        (start,) = struct.unpack_from(f"{order}{code}", data, place)
        if not start:
            return
        (n,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
        found.numbers.append((start, count, order))
        for k in range(min(n, 60)):
            at = start + count + k * entry
            found.chunks.append((at, at + entry))
            found.numbers += [(at, 2, order), (at + 2, 2, order), (at + 4, word, order), (at + 4 + word, word, order)]
        place = start + count + n * entry


def _png(data: bytes, found: Anatomy) -> None:
    pos = 8
    while pos + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, pos)
        found.numbers.append((pos, 4, ">"))
        if data[pos + 4 : pos + 8] == b"IHDR":
            found.numbers += [(pos + 8, 4, ">"), (pos + 12, 4, ">"), (pos + 16, 2, ">")]
        found.chunks.append((pos, min(pos + 12 + length, len(data))))
        pos += 12 + length


def _jpeg(data: bytes, found: Anatomy) -> None:
    pos = 2
    while pos + 4 <= len(data) and data[pos] == 0xFF:
        (length,) = struct.unpack_from(">H", data, pos + 2)
        found.numbers += [(pos + 2, 2, ">"), (pos + 5, 2, ">"), (pos + 7, 2, ">"), (pos, 2, ">")]
        found.chunks.append((pos, min(pos + 2 + length, len(data))))
        pos += 2 + length
        if data[pos - 2 - length + 1] == 0xDA:
            return


def _riff(data: bytes, found: Anatomy) -> None:
    pos = 12
    while pos + 8 <= len(data) and len(found.chunks) < 60:
        (length,) = struct.unpack_from("<I", data, pos + 4)
        found.numbers.append((pos + 4, 4, "<"))
        inside = data[pos : pos + 4] == b"LIST" and data[pos + 8 : pos + 12] != b"movi"
        found.chunks.append((pos, min(pos + 8 + length, len(data))))
        found.numbers += [(place, 4, "<") for place in range(pos + 8, min(pos + 64, pos + 8 + length, len(data) - 4), 4)]
        pos += 12 if inside else 8 + length + length % 2


def _boxes(data: bytes, found: Anatomy, start: int = 0, stop: int | None = None, depth: int = 0) -> None:
    pos, stop = start, len(data) if stop is None else stop
    while pos + 8 <= stop:
        (length,) = struct.unpack_from(">I", data, pos)
        found.numbers.append((pos, 4, ">"))
        end = min(pos + max(length, 8), stop)
        found.chunks.append((pos, end))
        if data[pos + 4 : pos + 8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl") and depth < 8:
            _boxes(data, found, pos + 8, end, depth + 1)
        elif data[pos + 4 : pos + 8] != b"mdat":
            found.numbers += [(place, 4, ">") for place in range(pos + 8, min(pos + 40, end - 4), 4)]
        pos = end


def _nifti(data: bytes, found: Anatomy) -> None:
    order = ">" if data[:2] == b"\0\0" else "<"
    if data[0] == 0x1C or data[3] == 0x1C:
        found.numbers = [(place, 2, order) for place in (12, 14)] + [(place, 8, order) for place in range(16, 176, 8)]
        found.numbers += [(place, 8, order) for place in range(344, 508, 8)] + [(500, 4, order)]
    else:
        found.numbers = [(place, 2, order) for place in (*range(40, 56, 2), 68, 70, 72, 120, 252, 254)]
        found.numbers += [(place, 4, order) for place in (*range(76, 120, 4), *range(256, 344, 4))]
    found.chunks = [(place, place + size) for place, size, _ in found.numbers]


def _lines(data: bytes, found: Anatomy) -> None:
    pos = 0
    for line in data[:8192].split(b"\n"):
        if any(byte > 126 or (byte < 32 and byte not in (9, 13)) for byte in line[:200]):
            break
        found.chunks.append((pos, min(pos + len(line) + 1, len(data))))
        pos += len(line) + 1
    found.text = True


def _zip(data: bytes, found: Anatomy) -> None:
    for mark, places in (
        (b"PK\3\4", (4, 6, 8, 18, 22, 26)),
        (b"PK\1\2", (8, 10, 20, 24, 28, 30, 42)),
        (b"PK\5\6", (8, 10, 12, 16)),
    ):
        pos = data.find(mark)
        while pos >= 0 and len(found.numbers) < 120:
            found.numbers += [
                (pos + place, 2 if place in (4, 6, 8, 26, 28, 30) and mark != b"PK\5\6" else 4, "<") for place in places
            ]
            found.chunks.append((pos, min(pos + 46, len(data))))
            pos = data.find(mark, pos + 4)


def mutate(data: bytes, seed: str) -> tuple[bytes, str]:
    """Return a damaged copy and what was done to it, for instance `delete,flip`; the same for the same seed."""
    rng = random.Random(seed)
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.6:
        inner, name = mutate(gzip.decompress(data), f"{seed}.")
        return gzip.compress(inner, 1, mtime=0), f"inner:{name}"
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        parts = anatomy(data)
        usual = [_flip, _run, _cut, _remove, _repeat, _grow]
        if parts.numbers:
            usual += [_inflate] * 4
        if parts.chunks:
            usual += [_delete, _delete, _duplicate, _scribble, _swap]
        if parts.text and parts.chunks:
            usual += [_word] * 6
        if data[128:132] == b"DICM":
            usual += [_nest, _nest, _lie]
        act = rng.choice(usual)
        names.append(act.__name__.strip("_"))
        data = act(data, parts, rng)
    if data[:4] == b"\x89PNG" and rng.random() < 0.9:
        data = _png_sums(data)
    if data[257:262] == b"ustar" and rng.random() < 0.8:
        block = data[:148] + b" " * 8 + data[156:512]
        data = data[:148] + b"%06o\0 " % sum(block) + data[156:]
    return data, ",".join(names)


def _place(data: bytes, rng: random.Random) -> int:
    """Return a place, most often near the start, where headers are."""
    return rng.randrange(max(1, min(len(data), rng.choice((32, 512, 2048, 8192, len(data) or 1)))))


def _flip(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 32)) if out else 0):
        out[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _run(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    at, n = _place(data, rng), rng.choice((1, 2, 4, 8, 64, 512))
    filling = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))
    return data[:at] + filling + data[at + n :]


def _cut(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    if parts.chunks and rng.random() < 0.5:
        return data[: sum(rng.choice(parts.chunks)) // 2]
    return data[: _place(data, rng)]


def _remove(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 256, 4096)) :]


def _repeat(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    at, n = _place(data, rng), rng.choice((1, 2, 16, 256, 4096))
    return data[: at + n] + data[at : at + n] * rng.choice((1, 2, 50)) + data[at + n :]


def _grow(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    at, n = _place(data, rng), rng.choice((1, 3, 64, 1024, 70000))
    return data[:at] + rng.choice((bytes(n), rng.randbytes(n), b"\xff" * n)) + data[at:]


def _inflate(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    at, size, order = rng.choice(parts.numbers)
    value = rng.choice((*SPECIAL, len(data), len(data) - at, rng.getrandbits(32)))
    if rng.random() < 0.2:
        value = int.from_bytes(data[at : at + size], "little" if order == "<" else "big") + rng.choice((-2, -1, 1, 2))
    value %= 1 << (8 * size)
    return data[:at] + value.to_bytes(size, "little" if order == "<" else "big") + data[at + size :]


def _delete(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    start, stop = rng.choice(parts.chunks)
    return data[:start] + data[stop:]


def _duplicate(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    start, stop = rng.choice(parts.chunks)
    times = rng.choice((1, 2, 30, 2000)) if stop - start < 100 else 1
    return data[:stop] + data[start:stop] * times + data[stop:]


def _scribble(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    """Keep the frame of a chunk and replace its content."""
    start, stop = rng.choice(parts.chunks)
    at = min(start + rng.choice((4, 8, 12)), stop)
    n = min(stop - at, 4096)
    filling = rng.choice((rng.randbytes(n), bytes(n), b"\xff" * n, (rng.choice(WORDS[1:]) * n)[:n]))
    return data[:at] + filling + data[at + n :]


def _swap(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    (a, b), (c, d) = sorted((rng.choice(parts.chunks), rng.choice(parts.chunks)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _word(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    """Replace one of the values of a line of text."""
    start, stop = rng.choice(parts.chunks)
    words = data[start:stop].rstrip(b"\n").split(b" ")
    words[rng.randrange(len(words))] = rng.choice((*WORDS, b"9" * 5000, b"1 " * 20000))
    return data[:start] + b" ".join(words) + b"\n" + data[stop:]


def _nest(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    """Put a sequence in a sequence, and so on, in front of an element."""
    at = rng.choice(parts.chunks)[0] if parts.chunks else 132
    tag = rng.choice((0x00081140, 0x52009229, 0x52009230, 0x00209113, 0x00186011, 0x00091001, 0x7FE00010))
    depth = rng.choice((1, 2, 20, 100, 3000))
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + rng.choice((b"SQ\0\0", b"UN\0\0", b"OB\0\0")) + b"\xff\xff\xff\xff"
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return data[:at] + (head + item) * depth + rng.choice((b"", ends * depth, ends * (depth // 2))) + data[at:]


def _lie(data: bytes, parts: Anatomy, rng: random.Random) -> bytes:
    """Put an element with another value in front of where it would be: the first or the last of the two will count."""
    tag, vr, value = rng.choice(
        (
            (0x00280008, b"IS", rng.choice((b"1A", b"0 ", b"-5", b"20000 ", b"999999", b"2147483647 ", b"99999999999 "))),
            (0x00280010, b"US", struct.pack("<H", rng.choice((0, 1, 65535)))),
            (0x00280011, b"US", struct.pack("<H", rng.choice((0, 1, 65535)))),
            (0x00280100, b"US", struct.pack("<H", rng.choice((0, 1, 7, 64, 65535)))),
            (0x00280101, b"US", struct.pack("<H", rng.choice((0, 1, 17, 65535)))),
            (0x00280002, b"US", struct.pack("<H", rng.choice((0, 2, 3, 65535)))),
            (0x00280030, b"DS", rng.choice((b"0\\0 ", b"-1\\1", b"1e-300\\1 ", b"nan\\1 ", b"1 "))),
            (0x00200032, b"DS", rng.choice((b"1\\2 ", b"1e300\\1e300\\1e300 ", b"nan\\nan\\nan "))),
            (0x00200037, b"DS", rng.choice((b"0\\0\\0\\0\\0\\0 ", b"1\\0\\0\\1\\0\\0 ", b"1e300\\0\\0\\0\\1\\0 ", b"1 "))),
            (0x00281053, b"DS", rng.choice((b"0 ", b"1e308 ", b"-1", b"nan "))),
            (0x00280004, b"CS", rng.choice((b"RGB ", b"PALETTE COLOR ", b"MONOCHROME1 ", b"YBR_FULL_422"))),
            (0x00080008, b"CS", b"ORIGINAL\\PRIMARY\\M\\MOSAIC "),
            (0x00080060, b"CS", rng.choice((b"CT", b"MR", b"US", b"DX", b"SM", b"SEG ", b"\xff\xff"))),
        )
    )
    element = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr + struct.pack("<H", len(value)) + value
    at = next(
        (a for a, _ in parts.chunks if a > 132 and struct.unpack_from("<HH", data, a) >= (tag >> 16, tag & 0xFFFF)), len(data)
    )
    return data[:at] + element + data[at:]


def _png_sums(data: bytes) -> bytes:
    out, pos = bytearray(data), 8
    while pos + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, pos)
        if pos + 12 + length > len(out):
            break
        struct.pack_into(">I", out, pos + 8 + length, zlib.crc32(out[pos + 4 : pos + 8 + length]))
        pos += 12 + length
    return bytes(out)
