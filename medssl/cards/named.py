"""Cards that a recipe names: which series each is about, what weights say of it, and what their owner should know.

A reference is what the recipe says: the name of a card that comes with medssl, or the path of a YAML file. From there on a card goes by
its own `name`; a path never reaches items, run folder or weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from medssl.archive.table import Archive, SeriesRow
from medssl.cards.check import check_card
from medssl.cards.schema import TO_FILL, Card, Limit, card_hash, find_card, load_card, open_fields
from medssl.errors import FaultsError, RequestError

MEANING: dict[str, str] = {
    "non-commercial": "may not be used commercially",
    "research-only": "may be used for research only",
    "share-alike": "must be passed on under the same licence",
    "no-derivatives": "may not be passed on changed",
    "no-redistribution": "may not be passed on",
}
"""What is said of the data under each limit."""

_CREATIVE_COMMONS: dict[str, Limit] = {"NC": "non-commercial", "SA": "share-alike", "ND": "no-derivatives"}


@dataclass(frozen=True)
class SourceCards:
    """The cards of one source.

    Args:
        cards: By their own names.
        conditions: Name -> SQL condition on the index; None means every series.
        of_series: series_id -> name, for all series of the index that a card is about.
    """

    cards: Mapping[str, Card]
    conditions: Mapping[str, str | None]
    of_series: Mapping[str, str]


def open_references(path: str, references: Iterable[str]) -> tuple[list[Card], list[str]]:
    """Return the cards, and the faults of those that cannot be loaded.

    Args:
        path: Dotted path in the recipe that each fault starts with.
        references: Names or paths.
    """
    cards: list[Card] = []
    faults: list[str] = []
    for reference in references:
        try:
            cards.append(load_card(find_card(reference)))
        except FaultsError as err:
            faults += [f"{path}: {reference}: {fault}" for fault in err.faults]
        except RequestError as err:
            faults.append(f"{path}: {err}")
    return cards, faults


def name_faults(path: str, cards: Iterable[Card]) -> list[str]:
    """Return a fault for each name that two different cards have: items and weights tell cards apart by name."""
    hashes: dict[str, set[str]] = {}
    for card in cards:
        hashes.setdefault(card.name, set()).add(card_hash(card))
    twice = [name for name, found in hashes.items() if len(found) > 1]
    return [f'{path}: two different cards have the name "{name}"; change the `name` inside one of them' for name in twice]


def assign(archive: Archive, conditions: Mapping[str, str | None], source: str) -> SourceCards:
    """Say which card each series of an index is about.

    Args:
        archive: The index.
        conditions: Reference -> SQL condition on the index; None means every series.
        source: Name of the source, for messages.

    Raises:
        RequestError: A condition is no SQL on the index, or a series meets two.
    """
    cards: dict[str, Card] = {}
    own_conditions: dict[str, str | None] = {}
    of_series: dict[str, str] = {}
    for reference, condition in conditions.items():
        card = load_card(find_card(reference))
        if card.name in cards:
            raise RequestError(f"source {source} names the card {card.name} twice; join its conditions with `or`")
        cards[card.name], own_conditions[card.name] = card, condition
        for row in archive.select(condition):
            if of_series.setdefault(row.series_id, card.name) != card.name:
                raise RequestError(
                    f"source {source}: series {row.series_id} meets the conditions of the cards {of_series[row.series_id]} and {card.name}; "
                    "a series has one card, so write conditions that exclude each other"
                )
    return SourceCards(cards, own_conditions, of_series)


def source_notes(source: str, key: str, cards: SourceCards, rows: Sequence[SeriesRow], domain: str) -> list[str]:
    """Return what is missing or does not fit, one sentence each.

    Args:
        source: Name of the source.
        key: Dotted path of its `card` in the recipe.
        cards: What `assign` found.
        rows: The selected series.
        domain: Domain that reads them.
    """
    if not cards.cards:
        return [
            f"source {source} names no data card, so the weights will not say what they were trained on; "
            f"draft one with `medssl card build ARCHIVE --out NAME.yaml`, and give {key}=NAME.yaml"
        ]
    notes = []
    counts = {name: sum(cards.of_series.get(row.series_id) == name for row in rows) for name in cards.cards}
    if (without := len(rows) - sum(counts.values())) > 0:
        notes.append(f"source {source}: {without} of {len(rows)} selected series have no data card; see {key}")
    for name, card in cards.cards.items():
        if counts[name] == 0:
            notes.append(f"source {source}: none of the selected series is of card {name}; see its condition in {key}")
        if card.domains and domain not in card.domains:
            notes.append(f"source {source}: card {name} is about {', '.join(card.domains)}, the source reads {domain}")
    return notes


def index_notes(cards: SourceCards, archive: Archive) -> list[str]:
    """Return a sentence for each card whose counts are not those of its part of the index; one without counts says nothing.

    Args:
        cards: What `assign` found.
        archive: The index.
    """
    notes = []
    for name, card in cards.cards.items():
        condition = cards.conditions[name]
        if card.counts is None or name not in cards.of_series.values():
            continue
        found = check_card(card, archive=archive, where=condition).differences
        if found:
            part = "" if condition is None else f' --where "{condition}"'
            notes.append(
                f"card {name} and the index differ in {len(found)} places, for instance {found[0]}; "
                f"`medssl card check CARD --archive {archive.path}{part}` lists them"
            )
    return notes


def card_notes(card: Card, licence: str) -> list[str]:
    """Return what the owner of weights should know of a card: open fields, and terms that the licence of the weights does not keep.

    Only what the card says counts. Whether weights fall under the terms of the data is for the owner to find out.

    Args:
        card: The card.
        licence: Licence of the weights, `unknown` when the recipe says none.
    """
    notes = []
    if left := open_fields(card):
        notes.append(f"card {card.name} is a draft with {len(left)} fields to fill; `medssl card check` names them")
    if card.licence.id in (TO_FILL, "unknown"):
        notes.append(f"card {card.name} names no licence, so it is not known whether weights may be passed on")
    for limit in card_limits(card):
        same = licence.lower() == card.licence.id.lower()
        if not same and (limit == "share-alike" or limit not in limits_of(licence)):
            notes.append(
                f"card {card.name} ({card.licence.id}, {limit}): the data {MEANING[limit]}; the licence of the weights is {licence}"
            )
    return notes


def card_limits(card: Card) -> list[str]:
    """Return the limits that a card states, and those that its licence identifier spells out."""
    found = {*card.licence.limits, *limits_of(card.licence.id)}
    return [limit for limit in get_args(Limit) if limit in found]


def limits_of(licence: str) -> set[str]:
    """Return what a licence identifier spells out: the parts of a Creative Commons one, or a limit in words."""
    parts = re.split(r"[^A-Z]+", licence.upper())
    found: set[str] = {limit for part, limit in _CREATIVE_COMMONS.items() if "CC" in parts and part in parts}
    return found | {limit for limit in get_args(Limit) if re.search(limit.replace("-", "[- ]?"), licence, re.IGNORECASE)}


def card_facts(card: Card) -> dict[str, str]:
    """Return what results and weights say of a card."""
    return {"name": card.name, "version": card.version, "licence": card.licence.id, "card_hash": card_hash(card)}
