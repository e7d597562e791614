"""The fields of a data card: YAML in, validated model out, all faults in one report.

What a card says in words is a `Statement`: a text and where it is known from. In YAML a bare string is short for a statement that the
author of the card answers for. Numbers come from three places that are kept apart: `stated` (what the source says), `files` (counted in
a folder) and `counts` (counted in an index, with small cells hidden).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from medssl.errors import CardError, RequestError, near
from medssl.yaml_models import REQUIRED_MARK, Node, fault, marked, read_mapping, shipped_folder

FORMAT = 1
TO_FILL = REQUIRED_MARK
"""Marks what a human must fill, as in recipes."""
HIDDEN: Literal["hidden"] = "hidden"
"""Stands for a count that may not be shown."""
WITHHELD: Literal["withheld"] = "withheld"
"""Stands for a table of which nothing may be shown."""

Count = Annotated[int, Field(ge=0)] | Literal["hidden"]
Table = dict[str, Count] | Literal["withheld"]
Domain = Literal["ct", "mri", "xray", "ultrasound", "wsi", "microscopy", "other", "unknown"]


Limit = Literal["non-commercial", "research-only", "share-alike", "no-derivatives", "no-redistribution"]


class CardNode(Node):
    """Base of the sections of a card."""

    model_config = ConfigDict(str_strip_whitespace=True)


class Statement(CardNode):
    """A fact in words. With neither `support` nor `from_memory` the author of the card answers for it."""

    text: str = Field(min_length=1)
    support: str | None = Field(None, min_length=1, description="Where it was read: address, citation, or what was measured")
    from_memory: bool = Field(False, description="True: believed, but not looked up")

    @model_validator(mode="after")
    def _one_basis(self) -> Statement:
        if self.from_memory and self.support is not None:
            raise ValueError("give `support` or `from_memory: true`, not both")
        return self

    @model_serializer
    def _short(self) -> Any:
        values = {"text": self.text, "support": self.support, "from_memory": self.from_memory or None}
        given = {name: value for name, value in values.items() if value is not None}
        return self.text if len(given) == 1 else given


def _statement(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


Fact = Annotated[Statement, BeforeValidator(_statement)]


class StatedCount(CardNode):
    """A number that the source states or that was counted by hand."""

    value: int = Field(ge=0)
    support: str | None = Field(None, min_length=1)
    from_memory: bool = False

    @model_validator(mode="after")
    def _has_basis(self) -> StatedCount:
        if self.from_memory == (self.support is not None):
            raise ValueError("a stated number needs either `support` or `from_memory: true`")
        return self

    @model_serializer
    def _short(self) -> dict[str, Any]:
        return {"value": self.value, **({"from_memory": True} if self.from_memory else {"support": self.support})}


class Provenance(CardNode):
    """Where the set comes from."""

    source: Fact = Field(description="Who made it, or from which systems it was taken")
    url: str | None = Field(None, pattern=r"^(https?://|doi:)\S+$|^\?\?\?$")
    citation: Fact | None = Field(None, description="What to cite")
    obtain: Fact = Field(description="How somebody else gets it, or that nobody does")


class Licence(CardNode):
    """What the owner allows."""

    id: str = Field(min_length=1, description="SPDX identifier, else the name of the agreement, `unknown` when nothing is stated")
    url: str | None = Field(None, pattern=r"^https?://\S+$")
    basis: Literal["source", "third_party", "memory", "owner", "unstated"] = Field(
        description="source: read where the set is published; third_party: read where others describe or redistribute it; memory: "
        "believed, not looked up; owner: the card's author decides; unstated: the source names none"
    )
    support: str | None = Field(None, min_length=1, description="Where it was read; required for `source` and `third_party`")
    limits: list[Limit] = Field(
        default_factory=list,
        description="What the terms forbid or demand; those that a Creative Commons identifier spells out need no entry",
    )
    note: str | None = None

    @model_validator(mode="after")
    def _basis(self) -> Licence:
        if self.basis in ("source", "third_party") and self.support is None:
            raise ValueError(f"basis is `{self.basis}`: say in `support` where the licence was read, or choose `memory`")
        if self.basis == "unstated" and self.id != "unknown":
            raise ValueError(f"basis is `unstated` but id is {self.id!r}; write `unknown`")
        return self


class Ethics(CardNode):
    """Under which permission the images were taken and are used."""

    consent: Fact | None = Field(None, description="Whether people agreed, and to what, or why nobody had to be asked")
    review: Fact | None = Field(None, description="Ethics committee or its waiver")
    deidentification: Fact | None = Field(None, description="What was removed from headers and pixels, and by whom")


class Collection(CardNode):
    """How the images came to be."""

    dates: Fact | None = Field(None, description="From when to when, in years")
    sites: Fact | None = Field(None, description="How many, of which kind; names only where the source publishes them")
    devices: Fact | None = Field(None, description="Makers, models, protocols")
    population: Fact | None = Field(None, description="Who was imaged, why, and who was left out")
    labels: Fact | None = Field(None, description="What was annotated, by whom, how")


class Use(CardNode):
    """What the set is for."""

    intended: list[Fact] = Field(default_factory=list)
    out_of_scope: list[Fact] = Field(default_factory=list)


class FileCounts(CardNode):
    """What a folder holds, by `medssl card build --files`."""

    count: int = Field(ge=0)
    bytes: int = Field(ge=0)
    by_suffix: dict[str, int] = Field(description="Closed list of file-name endings, `none` and `other`")


class IndexCounts(CardNode):
    """What the usable series of an index are, by `medssl card build`: no number is about fewer than k patients."""

    k: int = Field(ge=1)
    patients: Count
    studies: Count
    series: Count
    files: Count
    series_by: dict[str, Table] = Field(description="column -> value -> series")
    patients_by: dict[str, Table] = Field(description="column -> value -> patients")
    quartiles: dict[str, dict[str, tuple[float, float, float]]] = Field(
        default_factory=dict, description="domain -> measure -> 25, 50 and 75 percent point over its series"
    )


class Hashes(CardNode):
    """Digests over the content of the whole set; see `medssl.cards.count`."""

    files: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Over the SHA-256 of all files of a folder")
    index: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Over the digests of all files of the usable series")


def _card_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", value):
        raise ValueError(f"lower-case letters, digits, _ . and -, the first a letter or digit; found {value!r}")
    return value


class Card(CardNode):
    """A data card."""

    format: Literal[1] = 1
    name: Annotated[str, AfterValidator(_card_name)]
    title: str = Field(min_length=1, description="What the set is called elsewhere")
    version: str = Field("unversioned", min_length=1, description="Version or state of the set, as its source calls it")
    description: Fact = Field(description="What it is: images, patients, labels")
    provenance: Provenance
    licence: Licence
    ethics: Ethics = Ethics()
    collection: Collection = Collection()
    known_biases: list[Fact] = Field(default_factory=list)
    use: Use = Use()
    modalities: list[str] = Field(default_factory=list, description="DICOM modalities")
    domains: list[Domain] = Field(default_factory=list)
    splits: dict[str, Fact] = Field(default_factory=dict)
    stated: dict[str, StatedCount] = Field(default_factory=dict)
    files: FileCounts | None = None
    counts: IndexCounts | None = None
    hashes: Hashes = Hashes()


def parse_card(raw: Mapping[str, Any]) -> Card:
    """Validate a mapping.

    Raises:
        CardError: With every fault found.
    """
    version = raw.get("format", FORMAT)
    if version != FORMAT:
        raise CardError([f"format: {version!r} is not read by this version; accepted: {FORMAT}"])
    try:
        return Card.model_validate(raw)
    except ValidationError as err:
        missing = f"required and missing; write {TO_FILL} where it is not known yet"
        raise CardError(fault(Card, error, missing=missing) for error in err.errors()) from None


def load_card(path: Path | str) -> Card:
    """Read and validate a card.

    Raises:
        CardError: The file is absent, not YAML, or not a card; with every fault found.
    """
    start = "give the path of a card (data_cards/template.yaml is one to start from)"
    return parse_card(read_mapping(path, CardError, what="a card", absent=start))


def content(card: Card) -> dict[str, Any]:
    """Return what a card says as plain values; what is absent or empty is left out."""
    values: dict[str, Any] = _without_empty(card.model_dump(mode="json", exclude_none=True))
    return values


def dump_card(card: Card) -> str:
    """Return a card as YAML; what is absent is left out."""
    return yaml.dump(content(card), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that keeps a list of numbers on one line."""


def _list_node(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flow = bool(values) and all(isinstance(value, int | float) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)


_Dumper.add_representer(list, _list_node)


def card_hash(card: Card) -> str:
    """Return the SHA-256 of what a card says: its content as JSON in UTF-8, keys sorted, no spaces, nothing absent or empty.

    Comments, order and line breaks of the file do not count, and a card keeps its hash when this format gains a field.
    """
    text = json.dumps(content(card), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def open_fields(card: Card) -> list[str]:
    """Return the dotted paths that a human still has to fill."""
    return [path.removesuffix(".text") for path in marked(content(card))]


def shipped_cards() -> dict[str, Path]:
    """Return the shipped cards by name, for instance msd; the template is none."""
    root = shipped_folder("data_cards")
    return {} if root is None else {path.stem: path for path in sorted(root.rglob("*.yaml")) if path.name != "template.yaml"}


def find_card(name: str) -> Path:
    """Return a card by shipped name or by path; a bare name is a shipped card before it is a file.

    Raises:
        RequestError: There is none.
    """
    known = shipped_cards()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.name != name:
        raise RequestError(f"no card file {name}; draft one with `medssl card build ARCHIVE --out {path.name}`")
    hint = near(name, known) or f": {', '.join(known) or 'none are installed'}"
    raise RequestError(f'no card "{name}"; give the YAML file of your own card, or the name of one that comes with medssl{hint}')


def _without_empty(values: Any) -> Any:
    """Drop empty sections, which are the defaults."""
    if not isinstance(values, dict):
        return values
    return {name: kept for name, value in values.items() if (kept := _without_empty(value)) not in ({}, [])}
