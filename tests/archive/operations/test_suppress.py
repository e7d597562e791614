"""No hidden count may follow from the total, what is shown, and the rule itself."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.archive.operations.suppress import suppress_partitions, suppress_small
from medssl.errors import RequestError

COUNTS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(0, 60), max_size=8)


def test_no_small_cell__all_shown() -> None:
    assert suppress_small({"CT": 10, "MR": 25}, 10) == {"CT": 10, "MR": 25}
    assert suppress_small({}, 10) == {}


def test_one_small_cell__hides_the_next_smallest_too() -> None:
    assert suppress_small({"CT": 40, "MR": 3, "US": 12, "CR": 90}, 10) == {"CT": 40, "MR": None, "US": None, "CR": 90}


def test_two_small_cells__need_no_third() -> None:
    assert suppress_small({"CT": 40, "MR": 4, "US": 8}, 10) == {"CT": 40, "MR": None, "US": None}


def test_hidden_sum_under_k__hides_more() -> None:
    assert suppress_small({"CT": 40, "MR": 4, "US": 3, "CR": 90}, 10) == {"CT": None, "MR": None, "US": None, "CR": 90}


def test_equal_complements__go_together() -> None:
    assert suppress_small({"a": 12, "b": 3, "c": 12, "d": 20}, 10) == {"a": None, "b": None, "c": None, "d": 20}


def test_two_cells_of_k_minus_1__are_not_pinned_by_a_shown_k() -> None:
    assert suppress_small({"a": 9, "b": 9, "c": 10, "d": 30}, 10) == {"a": None, "b": None, "c": None, "d": 30}


def test_wrong_arguments__say_so() -> None:
    with pytest.raises(RequestError, match="k is 0"):
        suppress_small({"a": 1}, 0)
    with pytest.raises(RequestError, match="negative"):
        suppress_small({"a": -1}, 3)


@settings(deadline=None)
@given(COUNTS, st.integers(1, 20))
def test_whatever_the_counts__nothing_small_is_shown_or_left_over(counts: dict[str, int], k: int) -> None:
    shown = suppress_small(counts, k)
    assert list(shown) == list(counts)
    assert all(value is None or (value == counts[name] and value >= k) for name, value in shown.items())
    hidden = [counts[name] for name, value in shown.items() if value is None]
    if hidden and len(hidden) < len(counts):
        assert len(hidden) >= 2 and sum(hidden) >= k
    if all(count >= k for count in counts.values()):
        assert hidden == []


@settings(deadline=None)
@given(COUNTS, st.integers(1, 20), st.randoms())
def test_names_and_order__do_not_matter(counts: dict[str, int], k: int, random: object) -> None:
    names = list(counts)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert suppress_small({name: counts[name] for name in names}, k) == suppress_small(counts, k)


@pytest.mark.parametrize(("k", "cells", "largest"), [(2, 4, 5), (3, 3, 9), (3, 4, 6), (4, 3, 9)])
def test_reader_who_knows_the_rule__cannot_pin_a_hidden_count(k: int, cells: int, largest: int) -> None:
    """All tables of positive counts, grouped by what is published (shown cells and total): each hidden cell must stay open.

    Tables with a count at the edge of the enumeration may lack partners beyond it and are not judged.
    """
    names = [str(i) for i in range(cells)]
    groups: dict[tuple[object, ...], list[tuple[int, ...]]] = defaultdict(list)
    for values in product(range(1, largest + 1), repeat=cells):
        shown = suppress_small(dict(zip(names, values)), k)
        groups[(*shown.values(), sum(values))].append(values)
    judged = 0
    for (*pattern, _total), tables in groups.items():
        hidden = [i for i, value in enumerate(pattern) if value is None]
        if not hidden or len(hidden) == cells:
            continue
        judged += 1
        for i in hidden:
            assert len({values[i] for values in tables}) >= 2, (pattern, tables)
    assert judged > 10


def test_partitions__a_small_cell_does_not_follow_from_another_column() -> None:
    """kind hides slide and image, domain hides wsi and ct; xray = image would give slide = total - volume - xray."""
    rows = [("wsi", "slide")] * 6 + [("ct", "volume")] * 15 + [("xray", "image")] * 20 + [("mri", "volume")] * 40
    people = [str(i) for i in range(len(rows))]
    columns = {"domain": [row[0] for row in rows], "kind": [row[1] for row in rows]}
    assert suppress_small({"wsi": 6, "ct": 15, "xray": 20, "mri": 40}, 10)["xray"] == 20
    assert suppress_small({"slide": 6, "image": 20, "volume": 55}, 10)["volume"] == 55
    shown = suppress_partitions(columns, people, 10)
    assert not ("volume" in shown["kind"] and "xray" in shown["domain"])
    assert not derivable(columns, people, shown, 10)


def test_partitions__people_count_and_not_rows() -> None:
    columns = {"modality": ["CT"] * 30 + ["MR"] * 30 + ["US"] * 30}
    people = [f"a{i}" for i in range(30)] + ["b"] * 30 + [f"c{i % 15}" for i in range(30)]
    assert suppress_partitions(columns, people, 10) == {"modality": {"CT"}}


def derivable(columns: dict[str, list[str]], people: list[str], shown: dict[str, set[str]], k: int) -> list[tuple[str, str]]:
    """Return small cells whose count is fixed by the shown counts and the total, by exact rational elimination over rows."""
    combinations = sorted(set(zip(*columns.values())))
    cells = [(name, value) for name, values in columns.items() for value in dict.fromkeys(values)]

    def vector(cell: tuple[str, str]) -> list[Fraction]:
        at = list(columns).index(cell[0])
        return [Fraction(int(combination[at] == cell[1])) for combination in combinations]

    basis: list[list[Fraction]] = []

    def reduced(values: list[Fraction]) -> list[Fraction]:
        for row in basis:
            pivot = next(i for i, value in enumerate(row) if value)
            values = [a - values[pivot] / row[pivot] * b for a, b in zip(values, row)]
        return values

    for known in [[Fraction(1)] * len(combinations), *(vector(cell) for cell in cells if cell[1] in shown[cell[0]])]:
        rest = reduced(known)
        if any(rest):
            basis.append(rest)
    groups = {cell: {p for p, value in zip(people, columns[cell[0]]) if value == cell[1]} for cell in cells}
    return [cell for cell in cells if len(groups[cell]) < k and not any(reduced(vector(cell)))]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("pqr"), st.sampled_from("xy"), st.integers(0, 12)), min_size=4),
    st.integers(2, 4),
)
def test_partitions__no_small_cell_is_derivable(rows: list[tuple[str, str, str, int]], k: int) -> None:
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("one", "two", "three"))}
    people = [str(row[3]) for row in rows]
    if len(set(people)) < k:
        return  # then nothing is shown, the total neither
    shown = suppress_partitions(columns, people, k)
    assert derivable(columns, people, shown, k) == []
    for name, values in shown.items():
        for value in values:
            assert len({p for p, v in zip(people, columns[name]) if v == value}) >= k
