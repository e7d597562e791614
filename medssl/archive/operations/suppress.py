"""Small-cell suppression: which counts of a table may be shown when the total is shown too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from medssl.errors import RequestError

Cell = tuple[str, str]
"""Column and value."""


def suppress_small(counts: Mapping[str, int], k: int) -> dict[str, int | None]:
    """Return the counts with None where a number may not be shown.

    The counts are taken as a partition whose total the reader knows, and the reader is taken to know this rule as well.

    1. Every count under `k` is hidden, zeros too.
    2. The hidden counts together must not be a small cell themselves, and the total minus what is shown must not pin one of them.
       So there are at least two, their sum is at least `k`, and where all are small it is neither the smallest nor the largest that
       as many small positive counts can have (m ones; m times k - 1). While that fails, the smallest count still shown is hidden
       with all that equal it. Equal counts go together so that the choice depends on the values alone and their names say nothing.

    Then each hidden count has at least two values that lead to the same output. Where everything is hidden, rule 2 may have had
    nothing left to hide: leave such a table out altogether, since the number of its cells may tell (twelve cells, total twelve).

    Args:
        counts: Name of the cell -> people (or whatever must not be singled out) in it, at least 0.
        k: Smallest count that may be shown, at least 1; 1 hides nothing but zeros and their complement.

    Returns:
        The same names in the same order.

    Raises:
        RequestError: `k` under 1, or a negative count.
    """
    if k < 1:
        raise RequestError(f"k is {k}; the smallest count that may be shown is at least 1 (10 is common)")
    if any(count < 0 for count in counts.values()):
        raise RequestError("a negative count; counts are 0 or more")
    hidden = {name for name, count in counts.items() if count < k}
    while hidden and len(hidden) < len(counts) and _tells([counts[name] for name in hidden], k):
        smallest = min(count for name, count in counts.items() if name not in hidden)
        hidden |= {name for name, count in counts.items() if count == smallest}
    return {name: None if name in hidden else count for name, count in counts.items()}


def _tells(hidden: list[int], k: int) -> bool:
    """Return whether the number of hidden counts and their sum give one of them away."""
    n, total = len(hidden), sum(hidden)
    return n < 2 or total < k or (max(hidden) < k and total in (n, n * (k - 1)))


def suppress_partitions(columns: Mapping[str, Sequence[str]], people: Sequence[str | None], k: int) -> dict[str, set[str]]:
    """Return which values of each column may be shown with their counts, when all columns are shown beside each other.

    A value is small when fewer than `k` people have it, however many rows they have. Each column is treated by `suppress_small`. Then
    the columns are taken together: knowing which combinations of values occur (every X-ray is an image, say), a reader can add and
    subtract counts of several columns. As long as a small count is such a combination of shown counts and the total, the shown count
    with the fewest people among those needed for it is hidden too.

    Args:
        columns: Name -> value of each row. Each column is a partition of the same rows.
        people: Who each row is about; None: nobody knows, so it may be any of the others, and adds nobody to them (see `count_people`).
        k: Smallest number of people that a count may be about.

    Returns:
        Column -> values that may be shown. An empty set: leave the column out, with its values (see `suppress_small`).
    """
    if not people:
        return {column: set() for column in columns}
    groups: dict[Cell, set[str | None]] = {}
    for column, values in columns.items():
        for value, person in zip(values, people):
            groups.setdefault((column, value), set()).add(person)
    count = {cell: count_people(group) for cell, group in groups.items()}
    shown: set[Cell] = set()
    for column in columns:
        of_column = {value: n for (name, value), n in count.items() if name == column}
        shown |= {(column, value) for value, n in suppress_small(of_column, k).items() if n is not None}
    small = [cell for cell, n in count.items() if n < k]
    occurring = dict(zip(columns, np.array(sorted(set(zip(*columns.values()))), dtype=object).T))
    holds = [(occurring[column] == value).astype(np.float64) for column, value in count]
    everything = np.ones_like(holds[0])
    # QR keeps all lengths and angles of these vectors, so that what follows does not grow with the number of combinations.
    *short, total = np.linalg.qr(np.stack([*holds, everything], axis=1)).R.T
    vectors = dict(zip(count, short))
    while needed := next((found for cell in small if (found := _derivation(vectors[cell], shown, vectors, total))), None):
        shown.remove(min(needed, key=lambda cell: (count[cell], cell)))
    return {column: {value for name, value in shown if name == column} for column in columns}


def count_people(people: Iterable[str | None]) -> int:
    """Return how many people these are at least; those whom nobody knows (None) may all be one, and one of the others."""
    group = set(people)
    return len(group - {None}) or len(group)


def _derivation(secret: np.ndarray, shown: set[Cell], vectors: Mapping[Cell, np.ndarray], total: np.ndarray) -> list[Cell]:
    """Return the shown cells from which, and the total, a count can be computed; nothing when it cannot."""
    cells = sorted(shown)
    known = np.stack([vectors[cell] for cell in cells] + [total], axis=1)
    weights = np.linalg.lstsq(known, secret, rcond=None)[0]
    if np.linalg.norm(known @ weights - secret) > 1e-6:
        return []
    return [cell for cell, weight in zip(cells, weights) if abs(weight) > 1e-6]
