"""Small-cell suppression: which counts of a table may be shown when the total is shown too."""

from __future__ import annotations

from collections.abc import Mapping

from medssl.errors import RequestError


def suppress_small(counts: Mapping[str, int], k: int) -> dict[str, int | None]:
    """Return the counts with None where a number may not be shown.

    The counts are taken as a partition whose total the reader knows, and the reader is taken to know this rule as well.

    1. Every count under `k` is hidden, zeros too.
    2. The hidden counts together must not be a small cell themselves, and the total minus what is shown must not pin one of them.
       So there are at least two, their sum is at least `k`, and where all are small it is neither the smallest nor the largest that
       as many small positive counts can have (m ones; m times k - 1). While that fails, the smallest count still shown is hidden
       with all that equal it. Equal counts go together so that the choice depends on the values alone and their names say nothing.

    Then each hidden count has at least two values that lead to the same output. Where everything is hidden, rule 2 may have had
    nothing left to hide: leave such a table out altogether,
    since the number of its cells may already tell (twelve cells and a total of twelve).

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
