"""Draft a card from an index: what can be counted is counted, the rest is marked for a human."""

from __future__ import annotations

from pathlib import Path

from medssl.archive.table import Archive
from medssl.cards.count import count_files, count_index
from medssl.cards.schema import (
    HIDDEN,
    TO_FILL,
    WITHHELD,
    Card,
    Collection,
    Ethics,
    Hashes,
    IndexCounts,
    Licence,
    Provenance,
    dump_card,
    parse_card,
)
from medssl.errors import RequestError

HEADER = f"""\
# Data card, drafted by `medssl card build`. Replace every {TO_FILL}; `medssl card check` names those that are left.
# Licence: basis `owner` means that you decide; `source` or `third_party` need `support`, where you read it.
# A statement is a text, or a mapping: {{text: ..., support: where it was read}} or {{text: ..., from_memory: true}}.
# {HIDDEN}: a count about fewer than k patients, or one from which such a count would follow. {WITHHELD}: a table of such counts.
"""


def draft_card(
    archive: Archive | Path | str, name: str, *, k: int = 10, where: str | None = None, files: Path | str | None = None
) -> Card:
    """Return a card with counts and hashes, and `???` where a human must write.

    Args:
        archive: Index to count in.
        name: Name of the card: lower-case letters, digits, `_`, `.` and `-`.
        k: Smallest number of patients that a count may be about.
        where: SQL condition on the index, where it holds several sets.
        files: Folder whose files are counted and hashed as well; meant for sets that are passed on as they are.

    Raises:
        RequestError: `k` under 1, nothing to count, an unusable name.
    """
    if k < 1:
        raise RequestError(f"k is {k}; a count is shown when it is about at least k patients, so give 1 or more (10 is common)")
    archive = archive if isinstance(archive, Archive) else Archive.open(archive)
    counts, digest = count_index(archive, k, where)
    in_folder, folder_digest = (None, None) if files is None else count_files(files)
    fill = [TO_FILL]
    raw = {
        "name": name,
        "title": TO_FILL,
        "version": TO_FILL,
        "description": TO_FILL,
        "provenance": {"source": TO_FILL, "obtain": TO_FILL},
        "licence": {"id": TO_FILL, "basis": "owner"},
        "ethics": dict.fromkeys(("consent", "review", "deidentification"), TO_FILL),
        "collection": dict.fromkeys(("dates", "sites", "devices", "population", "labels"), TO_FILL),
        "known_biases": fill,
        "use": {"intended": fill, "out_of_scope": fill},
        "modalities": _values(counts, "modality"),
        "domains": _values(counts, "domain"),
        "splits": {} if counts.series_by["split"] == WITHHELD else dict.fromkeys(_values(counts, "split"), TO_FILL),
        "files": in_folder,
        "counts": counts,
        "hashes": Hashes(files=folder_digest, index=digest),
    }
    return parse_card(raw)


def write_card(card: Card, out: Path | str) -> Path:
    """Write a draft with its header of explanations; an existing file is never replaced.

    Raises:
        RequestError: The file exists, or the folder cannot be written.
    """
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "x", encoding="utf-8") as handle:
            handle.write(HEADER + with_hints(dump_card(card)))
    except FileExistsError as err:
        raise RequestError(f"{out} exists and may hold what somebody wrote; name another file, or move it away") from err
    except OSError as err:
        raise RequestError(f"{out} cannot be written ({err.strerror}); name a file in a folder that you may write to") from err
    return out


def with_hints(text: str) -> str:
    """Return a draft with a comment behind each open field: what belongs there."""
    sections = (Card, Provenance, Licence, Ethics, Collection)
    about = {name: field.description for section in sections for name, field in section.model_fields.items() if field.description}
    lines = []
    for line in text.splitlines():
        name, mark, rest = line.strip().partition(f": {TO_FILL}")
        hint = about.get(name) if mark and not rest else None
        lines.append(f"{line}  # {hint}" if hint else line)
    return "\n".join(lines) + "\n"


def _values(counts: IndexCounts, column: str) -> list[str]:
    table = counts.series_by[column]
    return [] if isinstance(table, str) else [value for value in table if value != "unknown"]
