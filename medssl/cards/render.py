"""A card for others to read: Markdown with the front matter of Hugging Face dataset cards, or Croissant JSON-LD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from medssl.cards.named import card_limits
from medssl.cards.schema import HIDDEN, WITHHELD, Card, CardNode, StatedCount, Statement, Table

HF_LICENCES = frozenset(
    [
        "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
        "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
        "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "pddl", "odbl", "odc-by", "mpl-2.0", "gpl-3.0", "unknown",
    ]
)  # fmt: skip
"""Licence identifiers that the Hub knows; anything else is `other` with its name and link."""

_HF_NAMES = {"pddl-1.0": "pddl", "odbl-1.0": "odbl", "gpl-3.0-only": "gpl-3.0"}
_SIZES = (
    (1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"),
)  # fmt: skip
_SIZE_KEYS = ("images", "volumes", "clips", "slides", "series", "patients")

CROISSANT = "http://mlcommons.org/croissant/1.1"
RAI = "http://mlcommons.org/croissant/RAI/1.0"
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The `@context` that the Croissant 1.1 specification asks for."""

_BASIS = {
    "source": "read where the set is published",
    "third_party": "read where others describe or redistribute the set",
    "memory": "stated from memory, not looked up",
    "owner": "stated by the owner",
    "unstated": "the source names no licence",
}


def markdown(card: Card) -> str:
    """Return the card as Markdown."""
    front = yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True, width=1000)
    blocks = [f"---\n{front}---", f"# {card.title}", _said(card.description)]
    about = {"Name": card.name, "Version": card.version, "Modalities": card.modalities, "Domains": card.domains}
    blocks.append(_bullets([(name, ", ".join(value) if isinstance(value, list) else value) for name, value in about.items()]))
    blocks += _section("Provenance", _bullets(_parts(card.provenance)))
    licence = card.licence
    basis = _BASIS[licence.basis] + (f": {licence.support}" if licence.support else "")
    limits = ", ".join(card_limits(card))
    blocks += _section(
        "Licence", _bullets([(licence.id, basis), ("Limits", limits), ("Text", licence.url), ("Note", licence.note)])
    )
    blocks += _section("Consent and ethics", _bullets(_parts(card.ethics)))
    blocks += _section("Collection", _bullets(_parts(card.collection)))
    blocks += _section("Known biases", _list(card.known_biases))
    blocks += _section("Intended use", _list(card.use.intended))
    blocks += _section("Out of scope", _list(card.use.out_of_scope))
    blocks += _section("Splits", _bullets(list(card.splits.items())))
    blocks += _section("Stated numbers", _bullets([(name, _number(n)) for name, n in card.stated.items()]))
    if card.files is not None:
        listed = ", ".join(f"{n} {suffix}" for suffix, n in card.files.by_suffix.items())
        blocks += _section("Files", f"{card.files.count} files, {card.files.bytes} bytes: {listed}.")
    blocks += _counts(card)
    hashes = [("Files", card.hashes.files), ("Index", card.hashes.index)]
    blocks += _section("Hashes", _bullets([(name, f"`{value}`" if value else None) for name, value in hashes]))
    return "\n\n".join(block for block in blocks if block) + "\n"


def front_matter(card: Card) -> dict[str, Any]:
    """Return the YAML header of a Hugging Face dataset card."""
    known = _HF_NAMES.get(card.licence.id.lower(), card.licence.id.lower())
    front: dict[str, Any] = {"pretty_name": card.title, "license": known if known in HF_LICENCES else "other"}
    if front["license"] == "other":
        front["license_name"] = card.licence.id
        if card.licence.url:
            front["license_link"] = card.licence.url
    front["tags"] = ["medical", *card.domains, *(modality for modality in card.modalities if modality.lower() not in card.domains)]
    size = _size(card)
    if size is not None:
        front["size_categories"] = [next((name for limit, name in _SIZES if size < limit), "n>10M")]
    return front


def croissant(card: Card) -> dict[str, Any]:
    """Return the card as Croissant 1.1 JSON-LD, with the fields of Croissant RAI 1.0.

    The images themselves are not described as records: a card says how to get them, and gives no address of files. What is a record set
    are the counts, so that they can be read with any Croissant library.
    """
    provenance, labels = card.provenance, card.collection.labels
    private = [f"{name}: {_said(said)}" for name, said in _parts(card.ethics) if said]
    collected = [f"{name}: {_said(said)}" for name, said in _parts(card.collection) if said and said is not labels]
    values: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": [CROISSANT, RAI],
        "name": card.name,
        "alternateName": card.title,
        "description": _said(card.description),
        "version": card.version,
        "license": card.licence.url or card.licence.id,
        "url": _link(provenance.url),
        "citeAs": provenance.citation and provenance.citation.text,
        "keywords": ["medical imaging", *card.modalities, *card.domains],
        "isLiveDataset": False,
        "rai:dataCollection": " ".join(collected),
        "rai:dataAnnotationProtocol": labels and _said(labels),
        "rai:dataBiases": [_said(bias) for bias in card.known_biases],
        "rai:dataUseCases": [_said(use) for use in card.use.intended],
        "rai:dataLimitations": [_said(use) for use in card.use.out_of_scope],
        "rai:personalSensitiveInformation": private,
        "recordSet": _record_sets(card),
    }
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def _record_sets(card: Card) -> list[dict[str, Any]]:
    rows = [{"table": "stated", "cell": name, "unit": "stated", "count": str(n.value)} for name, n in card.stated.items()]
    if card.files is not None:
        rows += [{"table": "files", "cell": name, "unit": "files", "count": str(n)} for name, n in card.files.by_suffix.items()]
    if card.counts is not None:
        totals = ("patients", "studies", "series", "files")
        rows += [{"table": "total", "cell": name, "unit": name, "count": str(getattr(card.counts, name))} for name in totals]
        for unit, tables in (("series", card.counts.series_by), ("patients", card.counts.patients_by)):
            for table, cells in tables.items():
                if not isinstance(cells, str):
                    rows += [{"table": table, "cell": cell, "unit": unit, "count": str(n)} for cell, n in cells.items()]
    if not rows:
        return []
    fields = {
        "table": "What is counted by: a column of the index, `files`, `stated` or `total`",
        "cell": "Value of that column",
        "unit": "What is counted",
        "count": f"The number, or `{HIDDEN}` where it may not be shown",
    }
    named = [_field("counts", name, about) for name, about in fields.items()]
    data = [{f"counts/{name}": value for name, value in row.items()} for row in rows]
    about = "Counts of the data card; no cell is about fewer than k patients." if card.counts else "Counts of the data card."
    return [{"@type": "cr:RecordSet", "@id": "counts", "name": "counts", "description": about, "field": named, "data": data}]


def _field(record_set: str, name: str, about: str) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": f"{record_set}/{name}", "name": name, "description": about, "dataType": "sc:Text"}


def _link(url: str | None) -> str | None:
    return None if url is None else url.replace("doi:", "https://doi.org/", 1) if url.startswith("doi:") else url


def _size(card: Card) -> int | None:
    if card.counts is not None and isinstance(card.counts.series, int):
        return card.counts.series
    return next((card.stated[key].value for key in _SIZE_KEYS if key in card.stated), None)


def _said(said: Statement) -> str:
    if said.from_memory:
        return f"{said.text} (from memory)"
    return f"{said.text} (source: {said.support})" if said.support else said.text


def _number(count: StatedCount) -> str:
    return f"{count.value} (from memory)" if count.from_memory else f"{count.value} (source: {count.support})"


def _parts(section: CardNode) -> list[tuple[str, Any]]:
    """Return the fields of a section under their names as a heading."""
    return [(name.capitalize(), getattr(section, name)) for name in type(section).model_fields]


def _section(title: str, body: str) -> list[str]:
    return [f"## {title}", body] if body else []


def _bullets(pairs: list[tuple[str, Any]]) -> str:
    lines = [f"- **{name}**: {_said(value) if isinstance(value, Statement) else value}" for name, value in pairs if value]
    return "\n".join(lines)


def _list(said: list[Statement]) -> str:
    return "\n".join(f"- {_said(each)}" for each in said)


def _counts(card: Card) -> list[str]:
    counts = card.counts
    if counts is None:
        return []
    totals = ", ".join(f"{getattr(counts, name)} {name}" for name in ("patients", "studies", "series", "files"))
    blocks = [
        "## Counts",
        f"{totals}. No count is about fewer than {counts.k} patients: `{HIDDEN}` stands for a smaller one, or for one from which a "
        "smaller one would follow.",
    ]
    blocks += [_count_table(name, cells, counts.patients_by.get(name, {})) for name, cells in counts.series_by.items()]
    for domain, measures in counts.quartiles.items():
        lines = [f"| {name} | {low:g} | {middle:g} | {high:g} |" for name, (low, middle, high) in measures.items()]
        blocks.append("\n".join([f"| {domain} | 25 % | median | 75 % |", "|---|---|---|---|", *lines]))
    return blocks


def _count_table(name: str, series: Table, patients: Table) -> str:
    if isinstance(series, str):
        return f"By {name}: {WITHHELD}."
    people: Mapping[str, Any] = {} if isinstance(patients, str) else patients
    lines = [f"| {cell} | {n} | {people.get(cell, '')} |" for cell, n in series.items()]
    return "\n".join([f"| {name} | series | patients |", "|---|---|---|", *lines])
