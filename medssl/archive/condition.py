"""Check an SQL condition that a user typed, before it meets the table.

The connection that runs it has external access off; this check comes first and is narrower: one expression, on the
columns of one table, with no other table and no table function in a subquery.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from medssl.errors import RequestError, near

TABLE = "series"
NEVER_UNKNOWN = frozenset({"reason", "pair_group", "quality_flags", "privacy_flags"})
"""Columns in which null or an empty list is an answer: not rejected, no twin, no flag."""


def check_condition(connection: Any, where: str, columns: Sequence[str]) -> list[str]:
    """Return the columns that a condition names, in their order in the table.

    Args:
        connection: DuckDB connection; the condition is parsed and not run.
        where: The condition.
        columns: Columns of the table.

    Raises:
        RequestError: It is more than one expression, cannot be parsed, or reads anything but the table `series`.
    """
    # An expression parses bare and in brackets. Text that closes the bracket early, adds a clause or opens a comment
    # without end fails one of the two, so that nothing typed can reach beyond its bracket.
    trees = [_parse(connection, f"SELECT 1 FROM {TABLE} WHERE {text}", where, columns) for text in (bare(where), inside(where))]
    if any(len(tree) != 1 for tree in trees):
        raise RequestError(f"where: {where!r} is more than one statement; give one condition")
    if any(tree[0]["node"]["type"] != "SELECT_NODE" or tree[0]["node"]["modifiers"] for tree in trees):
        raise refuse(where, "more than one expression", columns)
    named: set[str] = set()
    for node in _nodes(trees[1]):
        kind = node.get("type")
        if kind == "TABLE_FUNCTION":
            raise refuse(where, "a subquery may read only the table series, and no table function", columns)
        if kind == "BASE_TABLE" and (str(node["table_name"]).lower() != TABLE or node["schema_name"] or node["catalog_name"]):
            raise refuse(where, "a subquery may read only the table series", columns)
        if kind == "RECURSIVE_CTE_NODE":
            raise refuse(where, "a recursive query", columns)
        if kind in ("VALUE_PARAMETER", "PARAMETER"):
            raise refuse(where, "a parameter", columns)
        if kind == "COLUMN_REF":
            named.add(str(node["column_names"][-1]).lower())
    return [name for name in columns if name in named]


def bare(where: str) -> str:
    """Return the condition on lines of its own: a comment at its end reaches no further."""
    return f"\n{where}\n"


def inside(where: str) -> str:
    """Return the condition in brackets."""
    return f"(\n{where}\n)"


def refuse(where: str, why: str, columns: Sequence[str]) -> RequestError:
    """Return the error for a condition that cannot be used."""
    unknown = why.split('"')[1] if 'column "' in why else ""
    hint = near(unknown, columns)
    if unknown and not hint:  # modality = MR: SQL takes a bare word for a column
        hint = f"; if {unknown} is a value, write it in single quotes: '{unknown}'"
    return RequestError(f"where: {where!r} is not a condition that can be used ({why}){hint}; columns: {', '.join(columns)}")


def unknown_as_null(columns: Iterable[tuple[str, str]]) -> str:
    """Return the SELECT list under which every value that says nothing is null.

    Args:
        columns: (name, DuckDB type) of the table.
    """
    parts = []
    for name, kind in columns:
        if name in NEVER_UNKNOWN:
            parts.append(name)
        elif kind == "VARCHAR":
            parts.append(f"nullif({name}, 'unknown') AS {name}")
        elif kind.endswith("[]"):
            # ['unknown'] too, should a list ever say so
            parts.append(f"CASE WHEN len({name}) > 0 AND {name}::VARCHAR <> '[unknown]' THEN {name} END AS {name}")
        else:
            parts.append(name)
    return ", ".join(parts)


def _parse(connection: Any, query: str, where: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    text = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchone()[0]
    tree = json.loads(text)
    if tree.get("error"):
        raise refuse(where, str(tree.get("error_message", "syntax error")).splitlines()[0], columns)
    return list(tree["statements"])


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of a parse tree."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)
