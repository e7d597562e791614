"""The items of a run, frozen: which image has which id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from medssl.errors import StoreError
from medssl.weights import disk_error


@dataclass(frozen=True)
class Item:
    """One row of items.parquet.

    Args:
        id: Row number, globally unique in the run; samplers, banks and checkpoints speak in ids.
        source: Name of the source.
        card: Data card of the set, or the archive's name where it has no card.
        series_id: Pseudonymous series.
        patient_id: Pseudonymous patient.
        split: `train`, `val`, `test` or `unknown`.
    """

    id: int
    source: str
    card: str
    series_id: str
    patient_id: str
    split: str


def freeze(rows: Sequence[tuple[str, str, str, str, str]]) -> list[Item]:
    """Number the items over all sources, sorted by (card, series_id, source).

    Args:
        rows: (source, card, series_id, patient_id, split) in any order.
    """
    ordered = sorted(rows, key=lambda row: (row[1], row[2], row[0]))
    return [Item(number, *row) for number, row in enumerate(ordered)]


def items_hash(items: Sequence[Item]) -> str:
    """Return a digest of the table; a checkpoint made with another one is refused."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(("\x1f".join(str(value) for value in astuple(item)) + "\x1e").encode())
    return digest.hexdigest()


def write(items: Sequence[Item], path: Path) -> None:
    """Write items.parquet, aside and renamed."""
    import duckdb

    aside = path.with_name(f".{path.name}.tmp")
    try:
        with duckdb.connect() as base:
            base.execute(
                "CREATE TABLE items (id BIGINT, source VARCHAR, card VARCHAR, series_id VARCHAR, patient_id VARCHAR, split VARCHAR)"
            )
            base.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)", [astuple(item) for item in items])
            base.execute(f"COPY (SELECT * FROM items ORDER BY id) TO '{str(aside).replace(chr(39), chr(39) * 2)}' (FORMAT parquet)")
        aside.replace(path)
    except OSError as err:
        raise disk_error(err, path) from err
    except duckdb.Error as err:
        raise StoreError(f"cannot write {path.name} in {path.parent}: {type(err).__name__}; nothing was left half-written") from err
    finally:
        aside.unlink(missing_ok=True)


def read(path: Path) -> list[Item]:
    """Read items.parquet."""
    import duckdb

    names = ", ".join(field.name for field in fields(Item))
    with duckdb.connect() as base:
        rows = base.execute(f"SELECT {names} FROM read_parquet(?) ORDER BY id", [str(path)]).fetchall()
    return [Item(*row) for row in rows]
