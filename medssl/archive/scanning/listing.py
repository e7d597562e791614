"""What lies under the sources now: paths, sizes, times. No file is opened."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.archive.paths import to_text
from medssl.archive.scanning.scan import os_reason, short_hash
from medssl.errors import RequestError

LISTING_COLUMNS = {
    "path": "VARCHAR",
    "source_id": "BIGINT",
    "folder": "VARCHAR",
    "size": "BIGINT",
    "mtime_ns": "BIGINT",
    "reason": "VARCHAR",
    "folder_mtime_ns": "BIGINT",
}
"""`private/listing.parquet`: every file and link met, with the reason of those that cannot be opened. A row with the reason
`folder` is a folder itself, with its time of change; it is not counted as a file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, link or folder.

    Args:
        path: Absolute path.
        size: Bytes.
        mtime_ns: Time of change.
        reason: Why it is not opened, `folder` for folders, or None.
    """

    path: str
    size: int = 0
    mtime_ns: int = 0
    reason: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the row of `LISTING_COLUMNS`."""
        return {
            "path": to_text(self.path),
            "source_id": short_hash(self.path),
            "folder": to_text(os.path.dirname(self.path)),
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "reason": self.reason,
        }


def walk(root: Path, skip: Path, *, known: Mapping[str, tuple[int, Sequence[Entry]]] | None = None) -> Iterator[Entry]:
    """Yield everything under a root in sorted order; links to folders stay closed, so that loops end.

    Args:
        root: Folder or file.
        skip: Folder that is left out: the index's own.
        known: folder -> (its time of change when it was last listed, its files then). A folder whose time is the same is not listed
            again: its files are taken as they were, and a file rewritten in place goes unseen.
    """
    if not root.is_dir():
        yield look(str(root))
        return
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        try:
            changed = os.stat(folder).st_mtime_ns
            before = None if known is None else known.get(folder)
            if before is not None and before[0] == changed:
                entries = list(before[1])
                yield Entry(folder, 0, changed, "folder")
                yield from (entry for entry in entries if entry.reason != "folder")
                pending.extend(entry.path for entry in reversed(entries) if entry.reason == "folder" and entry.path != str(skip))
                continue
            with os.scandir(folder) as scan:
                found = sorted(scan, key=lambda item: item.name)
        except OSError as err:
            yield Entry(folder, reason=os_reason(err))
            continue
        yield Entry(folder, 0, changed, "folder")
        folders = []
        for item in found:
            try:
                is_folder = item.is_dir(follow_symlinks=False)
            except OSError as err:
                yield Entry(item.path, reason=os_reason(err))
                continue
            if is_folder:
                if item.path != str(skip):
                    folders.append(item.path)
            elif item.is_symlink() and os.path.isdir(item.path):
                yield Entry(item.path, reason="linked_folder")
            else:
                yield look(item.path)
        pending.extend(reversed(folders))


def look(path: str) -> Entry:
    """Return what the file system says of one path."""
    try:
        status = os.stat(path)
    except OSError as err:
        return Entry(path, reason="broken_link" if os.path.islink(path) else os_reason(err))
    if not stat.S_ISREG(status.st_mode):
        return Entry(path, reason="not_image")  # a pipe or device: opening it may block for ever
    return Entry(path, status.st_size, status.st_mtime_ns)


def settled(entries: Iterable[Entry], seconds: float) -> Iterator[Entry]:
    """Give files that changed within the last seconds the reason `arriving`: another system may still be writing them."""
    limit = time.time_ns() - int(seconds * 1e9)
    for entry in entries:
        if seconds > 0 and entry.reason is None and entry.mtime_ns > limit:
            yield Entry(entry.path, entry.size, entry.mtime_ns, "arriving")
        else:
            yield entry


def read_list(path: Path, roots: Sequence[Path]) -> list[str]:
    """Return the paths that a listing of a PACS or file server names.

    Args:
        path: Text file, one path a line, absolute or relative to the one source.
        roots: The sources; every path must lie under one of them.

    Raises:
        RequestError: The file cannot be read, or names a path outside the sources.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()]
    except OSError as err:
        raise RequestError(f"list {path} cannot be read ({err.strerror}); give a text file with one path a line") from err
    found = []
    for number, line in enumerate(lines, 1):
        full = os.path.normpath(line if os.path.isabs(line) else os.path.join(str(roots[0]), line))
        for root in roots:
            tidy = os.path.normpath(root)
            if full == tidy or full.startswith(f"{tidy}{os.sep}"):
                found.append(f"{root}{full[len(tidy) :]}")  # as the source is called in the index
                break
        else:
            raise RequestError(
                f"list {path}: line {number} lies outside the sources; name its folder as a source, or drop the line"
            )
    return found
