"""Which image file a name in somebody's table means: by the end of its path, then by a name that only one file has."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from medssl.errors import RequestError

Parts = tuple[str, ...]


def plain_name(name: str, folder: Path) -> str:
    """Return a name as `join_names` compares it: parts with `/`; one that climbs (`../`) as seen from the folder of its table."""
    return "/".join(_parts(name, folder))


def is_fixed(name: str) -> bool:
    """Say whether a name means one place alone: an absolute path, or one that climbs (`../`)."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or (path.parts[:1] != () and path.parts[0].endswith(":"))


def join_names(
    listed: Iterable[str], files: Sequence[Path], folder: Path, *, fixed: Collection[str] = (), chosen: Sequence[bool] | None = None
) -> list[str | None]:
    """Return for each file the listed name that is its own, with or without its suffix; None where there is none.

    A name is that of the files whose path ends so; of several the one that lies there seen from the folder of the table, and one with just
    this suffix before those that have another. A name with folders in which no file lies counts without them, if one file and one name
    alone have it.

    Args:
        listed: Names as of `plain_name`.
        files: All files that a name could mean, also those that nobody asks for: a name is not unique because the others were left out.
        folder: Of the table.
        fixed: Listed names that mean one place alone (`is_fixed`), which never count without their folders.
        chosen: Whether each file is asked for; None for all. Doubts about others are no fault.

    Raises:
        RequestError: A name with folders in which no file lies is that of several files, or of several names.
    """
    by_path = {tuple(name.split("/")): name for name in listed}
    paths = [_parts(os.path.abspath(file), folder) for file in files]
    found = _by_path(by_path, paths, folder)
    taken = set(found)
    loose: dict[str, list[str]] = {}
    for parts, name in by_path.items():
        if name not in taken and len(parts) > 1 and name not in fixed:
            loose.setdefault(parts[-1], []).append(name)
    for number, name in _by_name(loose, paths, found, chosen).items():
        found[number] = name
    return found


def _by_path(by_path: Mapping[Parts, str], paths: Sequence[Parts], folder: Path) -> list[str | None]:
    """Return for each file the longest listed name that its path ends with."""
    ends = [next((end for end in _ends(path) if end in by_path), None) for path in paths]
    exact = {end for end, path in zip(ends, paths) if end is not None and end[-1] == path[-1]}
    found = [by_path[end] if end and (end not in exact or end[-1] == path[-1]) else None for end, path in zip(ends, paths)]
    for name in [name for name, n in Counter(found).items() if name is not None and n > 1]:
        there = _parts(os.path.abspath(folder / name), folder)
        if there in paths:  # of several whose paths end so, the one that is seen from the table
            found = [None if own == name and path != there else own for own, path in zip(found, paths)]
    return found


def _by_name(
    loose: Mapping[str, Sequence[str]], paths: Sequence[Parts], found: Sequence[str | None], chosen: Sequence[bool] | None
) -> dict[int, str]:
    """Return for files without a name, by number, the one that is theirs without its folders.

    Args:
        loose: Last part -> listed names with folders in which no file lies.
        paths: Of all files.
        found: Names that files have.
        chosen: See `join_names`.

    Raises:
        RequestError: See `join_names`.
    """
    free: dict[str, list[int]] = {}
    alike = Counter(form for path in paths for form in set(_last(path)))
    for number, path in enumerate(paths):
        if found[number] is None and (form := next((form for form in _last(path) if form in loose), None)) is not None:
            free.setdefault(form, []).append(number)
    asked = {form: numbers for form, numbers in free.items() if chosen is None or any(chosen[number] for number in numbers)}
    claims = {form: [n for own in dict.fromkeys(_last(paths[k[0]])) for n in loose.get(own, ())] for form, k in asked.items()}
    unclear = [form for form in asked if alike[form] > 1 or len(claims[form]) > 1]
    if unclear:
        raise RequestError(
            f"{sum(len(claims[form]) for form in unclear)} images are listed with a folder in which no image file lies, and their names are "
            "those of several files or lines; write paths that end as those of the image files do, or relative to the table"
        )
    return {numbers[0]: loose[form][0] for form, numbers in asked.items()}


def _parts(name: str, folder: Path) -> Parts:
    """Return the parts of a path; one that climbs (`../`) is seen from the folder of the table."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts:
        parts = PurePosixPath(os.path.abspath(folder / name)).parts
    return tuple(part for part in parts if part != "/")


def _last(path: Parts) -> tuple[str, str]:
    """Return the name of a file with and without its suffix."""
    return path[-1], PurePosixPath(path[-1]).stem


def _ends(path: Parts) -> Iterator[Parts]:
    """Yield the ends of a path, the longest first, each with and without suffix."""
    for begin in range(len(path)):
        for form in _last(path):
            yield (*path[begin:-1], form)
