"""Join projection images that are one exposure in two forms, by the source image that one of them names.

FOR PRESENTATION images name the FOR PROCESSING image that they were made from in SourceImageSequence. Both lie in series of their
own, so that neither row can know of the other when it is built: they are joined when all rows are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def join_twins(connection: Any) -> int:
    """Give rows of the table `s` that are made from each other, by `instance` and `made_from` of `p`, one `pair_group`.

    Args:
        connection: DuckDB, with the tables `s` (series rows) and `p` (their private half).

    Returns:
        How many rows changed.
    """
    # The second half brings in rows that share a pair group with those, and would be left behind when it is renamed.
    query = """WITH named AS (SELECT DISTINCT unnest(string_split(made_from, ' ')) AS uid FROM p WHERE made_from IS NOT NULL),
    linked AS (SELECT p.series_id, p.instance, p.made_from, s.pair_group FROM p JOIN s USING (series_id)
               WHERE p.made_from IS NOT NULL OR p.instance IN (SELECT uid FROM named))
    FROM linked UNION SELECT p.series_id, p.instance, p.made_from, s.pair_group FROM p JOIN s USING (series_id)
    WHERE s.pair_group IN (SELECT pair_group FROM linked)"""
    rows = [dict(zip(("series_id", "instance", "made_from", "pair_group"), row)) for row in connection.execute(query).fetchall()]
    changed = pair_groups(rows)
    if changed:
        connection.execute(
            """UPDATE s SET pair_group = t.pair FROM (SELECT unnest(?::VARCHAR[]) AS series_id, unnest(?::VARCHAR[]) AS pair) t
            WHERE s.series_id = t.series_id""",
            [list(changed), list(changed.values())],
        )
    return len(changed)


def pair_groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return series_id -> new pair group for rows with `series_id`, `instance`, `made_from` and `pair_group`.

    Rows hang together when one was made from the other, both from the same image, or when they share a pair group already. An
    image whose source is not there stays as it is.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    def join(a: str, b: str) -> None:
        a, b = sorted((root(a), root(b)))
        parent[b] = a

    for row in rows:
        for other in (*(row["made_from"] or "").split(), row["pair_group"]):
            if other:
                join(row["instance"] or row["series_id"], other)
    members: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        members.setdefault(root(row["instance"] or row["series_id"]), []).append(row)
    return {
        row["series_id"]: name for name, group in members.items() if len(group) > 1 for row in group if row["pair_group"] != name
    }
