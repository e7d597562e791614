"""Images inside .zip, .tar and .gz: members are read one by one, never unpacked by their own names."""

from __future__ import annotations

import bz2
import contextlib
import errno
import functools
import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from medssl.archive.headers.file_headers import is_tar
from medssl.errors import ImageError
from medssl.weights import disk_error

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
                reason = _zip_reason(info)
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


def _zip_reason(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & 1:
        return "encrypted"
    limit = min(MAX_MEMBER_BYTES, MAX_RATIO * max(info.compress_size, 1024))
    return "container_limit" if info.file_size > limit else None


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


def unpack(path: str, folder: Path, used: Callable[[], Iterable[str]] = tuple) -> Path:
    """Write the member that a private path `container!/name` names to a folder, once per state of the container; return the file.

    Where members lie in a tar or zip file is remembered. A compressed tar file can only be read from its start: one pass unpacks all
    members that are used, because a pass for each would read the file as often as it has members.

    Args:
        path: The private path.
        folder: Where members are unpacked to.
        used: Returns the private paths of the members of this container that will be asked for.

    Raises:
        KeyError: The container holds no such member any more.
        ImageError: `unreadable`: the member is damaged.
        StoreError: The disk is full, or the folder cannot be written.
    """
    container, _, name = path.partition(SEPARATOR)
    state = _state(container)
    target = _place(path, state, folder)
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as err:
        raise disk_error(err, folder) from err
    kind = _kind(container)
    if kind in ("zip", "tar"):
        with opened(path) as stream:
            reason = _write(stream, target)
    else:
        places = {_key(other.partition(SEPARATOR)[2]): _place(other, state, folder) for other in (*used(), path)}
        reason = _unpack_all(Path(container), kind, places, _key(name))
    if reason is not None:
        raise ImageError("unreadable", "a member of a container is damaged; copy the container again from its source")
    if not target.exists():
        raise KeyError(name)
    return target


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """Open the member that a private path `container!/name` names; in a compressed tar file everything before it is read.

    Raises:
        KeyError: The container holds no such member any more.
        ImageError: `unreadable`: the member is damaged.
    """
    container, _, name = path.partition(SEPARATOR)
    kind = _kind(container)
    if kind in ("zip", "tar"):
        with (_zip_member if kind == "zip" else _tar_member)(_state(container), _key(name)) as found:
            yield found
        return
    for member, stream in members(Path(container), kind):
        if stream is not None and _key(member.name) == _key(name):
            yield stream
            return
    raise KeyError(name)


def _kind(container: str) -> str:
    from medssl.archive.headers.file_headers import sniff

    with open(container, "rb") as handle:
        return sniff(handle.read(4096))


State = tuple[str, int, int]
"""Path, size and time of change of a container."""


def _state(container: str) -> State:
    now = os.stat(container)
    return (container, now.st_size, now.st_mtime_ns)


def _place(path: str, state: State, folder: Path) -> Path:
    known = f"{path}\0{state[1]}\0{state[2]}"  # what was unpacked of a container that has changed is not used
    return folder / hashlib.blake2b(known.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _key(name: str) -> str:
    """Return a member's name as a path writes it: `./a` and `/a` are stored by some packers, and a `Path` keeps neither."""
    return str(PurePosixPath(name.lstrip("/")))


def _write(stream: IO[bytes], target: Path) -> str | None:
    """Write a member to its place, or return why it cannot be used."""
    aside = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as err:
        raise disk_error(err, target) from err
    try:
        reason = copy_limited(stream, descriptor)
        if reason is None:
            os.replace(aside, target)
        return reason
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):  # others may come from the container
            raise disk_error(err, target) from err
        raise
    finally:
        os.close(descriptor)
        aside.unlink(missing_ok=True)


def _unpack_all(container: Path, kind: str, places: dict[str, Path], asked: str) -> str | None:
    """Unpack members in one pass; return why the one that was asked for cannot be used."""
    failed = None
    for member, stream in members(container, kind):
        if stream is None or _key(member.name) not in places:
            continue
        target = places.pop(_key(member.name))  # the first of a name
        reason = None if target.exists() else _write(stream, target)
        if _key(member.name) == asked:
            failed = reason
        if not places:
            break
    return failed


@functools.lru_cache(maxsize=2)
def _tar_places(state: State) -> dict[str, tarfile.TarInfo]:
    """Return what can be read of a tar file, by name; behind damage nothing is known."""
    found: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(state[0], "r:") as tar:
            for item in tar:
                if item.isfile() and item.size <= MAX_MEMBER_BYTES:
                    found.setdefault(_key(item.name), item)
    except _DAMAGE as err:
        _raise_if_storage(err)
    return found


@contextlib.contextmanager
def _tar_member(state: State, key: str) -> Iterator[IO[bytes]]:
    info = _tar_places(state)[key]
    with tarfile.open(state[0], "r:") as tar:
        stream = tar.extractfile(info)
        assert stream is not None
        yield stream


@functools.lru_cache(maxsize=2)
def _zip_places(state: State, _process: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Return an open zip file, for this process alone: forked ones share the place in a file. Its directory is read once."""
    archive = zipfile.ZipFile(state[0])
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not info.is_dir() and _zip_reason(info) is None:
            found.setdefault(_key(info.filename), info)
    return archive, found


@contextlib.contextmanager
def _zip_member(state: State, key: str) -> Iterator[IO[bytes]]:
    try:
        archive, found = _zip_places(state, os.getpid())
        stream = archive.open(found[key])
    except KeyError:
        raise
    except _DAMAGE as err:
        _raise_if_storage(err)
        raise ImageError("unreadable", "a member of a container is damaged; copy the container again from its source") from err
    with stream:
        yield stream


def forget_unpacked(folder: Path) -> None:
    """Delete what `unpack` wrote; it is written again when it is needed.

    Raises:
        OSError: It cannot be deleted.
    """
    if folder.is_dir():
        shutil.rmtree(folder)
