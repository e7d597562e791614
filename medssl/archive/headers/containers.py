"""Images inside .zip, .tar and .gz: members are read one by one, never unpacked by their own names."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medssl.archive.headers.file_headers import is_tar
from medssl.errors import ImageError

SEPARATOR = "!/"
"""Between a container's path and a member's name in the index's private tables."""
MAX_MEMBER_BYTES = 4 << 30
MAX_TOTAL_BYTES = 1 << 40
MAX_RATIO = 2000
"""No image compresses further; a bomb does."""
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Member:
    """One file inside a container.

    Args:
        name: Its name there; of a single compressed file, the container's without its last suffix (private).
        size: Bytes; -1 when the container does not say.
        reason: Why it is not read, or None.
    """

    name: str
    size: int
    reason: str | None = None


def members(path: Path, kind: str) -> Iterator[tuple[Member, IO[bytes] | None]]:
    """Yield the files inside a container, each with a stream to read it from before the next is asked for.

    What cannot be read is yielded with a reason: `encrypted`, `container_limit` (a bomb), `unreadable` (damaged: the rest is lost),
    `broken_link` (links).

    Args:
        path: The container.
        kind: zip, tar, gzip, bzip2 or xz, as `sniff` says.
    """
    total = 0
    try:
        for member, stream in _open(path, kind):
            total += max(0, member.size)
            if total > MAX_TOTAL_BYTES:
                yield Member(member.name, member.size, "container_limit"), None
                return
            yield member, stream
    except _DAMAGE as err:
        _raise_if_storage(err)
        yield Member("", -1, "unreadable"), None


def _raise_if_storage(err: Exception) -> None:
    """Let errors of the storage pass: unpackers raise OSError for damage too, without a number or for a place before the start."""
    if isinstance(err, OSError) and err.errno not in (None, errno.EINVAL):
        raise err


def _open(path: Path, kind: str) -> Iterator[tuple[Member, IO[bytes] | None]]:
    if kind == "zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                reason = None
                if info.flag_bits & 1:
                    reason = "encrypted"
                elif info.file_size > MAX_MEMBER_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1024):
                    reason = "container_limit"
                if reason is None:
                    try:
                        opened = archive.open(info)
                    except _DAMAGE as err:
                        _raise_if_storage(err)
                        reason = "unreadable"
                if reason is not None:
                    yield Member(info.filename, info.file_size, reason), None
                    continue
                with opened as stream:
                    yield Member(info.filename, info.file_size), stream
        return
    if kind == "tar" or _holds_tar(path, kind):
        with tarfile.open(path, "r:" if kind == "tar" else "r:*") as tar:
            for item in tar:
                if item.isdir():
                    continue
                if not item.isfile():
                    yield Member(item.name, item.size, "broken_link"), None
                elif item.size > MAX_MEMBER_BYTES:
                    yield Member(item.name, item.size, "container_limit"), None
                else:
                    yield Member(item.name, item.size), tar.extractfile(item)
        return
    with _inflating(path, kind) as stream:
        yield Member(path.stem, -1), stream


def _inflating(path: Path, kind: str) -> Any:
    opener: Any = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[kind]
    return opener(path, "rb")


def _holds_tar(path: Path, kind: str) -> bool:
    with _inflating(path, kind) as stream:
        return is_tar(_block(stream, 512) or b"")


def copy_limited(stream: IO[bytes], target: int, limit: int = MAX_MEMBER_BYTES) -> str | None:
    """Copy a member to a file descriptor and return why it cannot be used (`container_limit`, `unreadable`), or None."""
    written = 0
    while block := _block(stream):
        written += len(block)
        if written > limit:
            return "container_limit"
        os.write(target, block)
    return None if block is not None else "unreadable"


def _block(stream: IO[bytes], size: int = 1 << 20) -> bytes | None:
    """Return the next bytes of a member, or None where it is damaged."""
    try:
        return stream.read(size)
    except _DAMAGE as err:
        _raise_if_storage(err)
        return None


@contextlib.contextmanager
def in_memory() -> Iterator[tuple[int, str]]:
    """Give a file that exists in memory only, with a path to open it by: it is gone whatever stops the process. Linux only."""
    descriptor = os.memfd_create("member")
    try:
        yield descriptor, f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def unpack(path: str, folder: Path) -> Path:
    """Write the member that a private path `container!/name` names to a folder, once per state of the container; return the file.

    Raises:
        KeyError: The container holds no such member any more.
        ImageError: `unreadable`: the member is damaged.
    """
    from medssl.archive.headers.file_headers import sniff

    container, _, name = path.partition(SEPARATOR)
    now = os.stat(container)
    state = f"{path}\0{now.st_size}\0{now.st_mtime_ns}"  # what was unpacked of a container that has changed is not used
    target = folder / hashlib.blake2b(state.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(container, "rb") as handle:
        kind = sniff(handle.read(4096))
    for member, stream in members(Path(container), kind):
        if member.name == name and stream is not None:
            aside = target.with_name(f".tmp-{os.getpid()}-{target.name}")
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                reason = copy_limited(stream, descriptor)
            finally:
                os.close(descriptor)
            if reason is not None:
                aside.unlink()
                raise ImageError("unreadable", "a member of a container is damaged; copy the container again from its source")
            os.replace(aside, target)
            return target
    raise KeyError(name)


def forget_unpacked(folder: Path) -> None:
    """Delete what `unpack` wrote; it is written again when it is needed.

    Raises:
        OSError: It cannot be deleted.
    """
    if folder.is_dir():
        shutil.rmtree(folder)
