"""The fields of a data card: YAML in, validated model out, all faults in one report.

What a card says in words is a `Statement`: a text and where it is known from. In YAML a bare string is short for a statement that the
author of the card answers for. Numbers come from three places that are kept apart: `stated` (what the source says), `files` (counted in
a folder) and `counts` (counted in an index, with small cells hidden).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from medssl.errors import RequestError, near

FORMAT = 1
TO_FILL = "???"
"""Marks what a human must fill, as in recipes."""
HIDDEN: Literal["hidden"] = "hidden"
"""Stands for a count that may not be shown."""
WITHHELD: Literal["withheld"] = "withheld"
"""Stands for a table of which nothing may be shown."""

Count = Annotated[int, Field(ge=0)] | Literal["hidden"]
Table = dict[str, Count] | Literal["withheld"]
Domain = Literal["ct", "mri", "xray", "ultrasound", "wsi", "microscopy", "other", "unknown"]


class CardError(RequestError):
    """One or more faults of a data card, all reported together.

    Args:
        faults: One sentence each, starting with the dotted path of the key.
    """

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class Node(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, str_strip_whitespace=True)


class Statement(Node):
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


class StatedCount(Node):
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


class Provenance(Node):
    """Where the set comes from."""

    source: Fact = Field(description="Who made it, or from which systems it was taken")
    url: str | None = Field(None, pattern=r"^(https?://|doi:)\S+$|^\?\?\?$")
    citation: Fact | None = Field(None, description="What to cite")
    obtain: Fact = Field(description="How somebody else gets it, or that nobody does")


class Licence(Node):
    """What the owner allows."""

    id: str = Field(min_length=1, description="SPDX identifier, else the name of the agreement, `unknown` when nothing is stated")
    url: str | None = Field(None, pattern=r"^https?://\S+$")
    basis: Literal["source", "third_party", "memory", "owner", "unstated"] = Field(
        description="source: read where the set is published; third_party: read where others describe or redistribute it; memory: "
        "believed, not looked up; owner: the card's author decides; unstated: the source names none"
    )
    support: str | None = Field(None, min_length=1, description="Where it was read; required for `source` and `third_party`")
    note: str | None = None

    @model_validator(mode="after")
    def _basis(self) -> Licence:
        if self.basis in ("source", "third_party") and self.support is None:
            raise ValueError(f"basis is `{self.basis}`: say in `support` where the licence was read, or choose `memory`")
        if self.basis == "unstated" and self.id != "unknown":
            raise ValueError(f"basis is `unstated` but id is {self.id!r}; write `unknown`")
        return self


class Ethics(Node):
    """Under which permission the images were taken and are used."""

    consent: Fact | None = None
    review: Fact | None = Field(None, description="Ethics committee or its waiver")
    deidentification: Fact | None = Field(None, description="What was removed from headers and pixels, and by whom")


class Collection(Node):
    """How the images came to be."""

    dates: Fact | None = None
    sites: Fact | None = None
    devices: Fact | None = None
    population: Fact | None = None
    labels: Fact | None = Field(None, description="What was annotated, by whom, how")


class Use(Node):
    """What the set is for."""

    intended: list[Fact] = Field(default_factory=list)
    out_of_scope: list[Fact] = Field(default_factory=list)


class FileCounts(Node):
    """What a folder holds, by `medssl card build --files`."""

    count: int = Field(ge=0)
    bytes: int = Field(ge=0)
    by_suffix: dict[str, int] = Field(description="Closed list of file-name endings, `none` and `other`")


class IndexCounts(Node):
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


class Hashes(Node):
    """Digests over the content of the whole set; see `medssl.cards.count`."""

    files: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Over the SHA-256 of all files of a folder")
    index: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Over the digests of all files of the usable series")


class Card(Node):
    """A data card."""

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    title: str = Field(min_length=1)
    version: str = Field("unversioned", min_length=1, description="Version or state of the set, as its source calls it")
    description: Fact
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


def parse_card(raw: Any, place: str = "card") -> Card:
    """Validate a mapping.

    Raises:
        CardError: With every fault found.
    """
    if not isinstance(raw, Mapping):
        raise CardError([f"{place}: a card is a YAML mapping; found {type(raw).__name__}; see data_cards/template.yaml"])
    version = raw.get("format", FORMAT)
    if version != FORMAT:
        raise CardError([f"format: {version!r} is not read by this version; accepted: {FORMAT}"])
    try:
        return Card.model_validate(raw)
    except ValidationError as err:
        raise CardError(_fault(error) for error in err.errors()) from None


def load_card(path: Path | str) -> Card:
    """Read and validate a card.

    Raises:
        CardError: The file is absent, not YAML, or not a card; with every fault found.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise CardError(
            [f"{path}: {err.strerror}; give the path of a card (data_cards/template.yaml is one to start from)"]
        ) from err
    except UnicodeDecodeError as err:
        raise CardError([f"{path}: not UTF-8 text; save the card as UTF-8"]) from err
    except yaml.YAMLError as err:
        raise CardError([f"{path}: not valid YAML ({' '.join(str(err).split())})"]) from err
    return parse_card(raw, str(path))


def dump_card(card: Card) -> str:
    """Return a card as YAML; what is absent is left out."""
    values = card.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(_without_empty(values), sort_keys=False, allow_unicode=True, width=120)


def card_hash(card: Card) -> str:
    """Return a digest of everything a card says, for recipes, run folders and weights."""
    content = card.model_dump(mode="json", exclude_none=True)
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_fields(card: Card) -> list[str]:
    """Return the dotted paths that a human still has to fill."""
    return _marked(card.model_dump(mode="json", exclude_none=True), "")


def card_folder() -> Path | None:
    """Return the folder of the cards that come with medssl: beside the package in a checkout, under share/ when installed."""
    import sys

    import medssl

    for folder in (Path(medssl.__file__).parents[1] / "data_cards", Path(sys.prefix) / "share" / "medssl" / "data_cards"):
        if folder.is_dir():
            return folder
    return None


def shipped_cards() -> dict[str, Path]:
    """Return the shipped cards by name, for instance msd; the template is none."""
    root = card_folder()
    return {} if root is None else {path.stem: path for path in sorted(root.rglob("*.yaml")) if path.name != "template.yaml"}


def find_card(name: str) -> Path:
    """Return a card by path or by shipped name.

    Raises:
        RequestError: There is none.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped_cards()
    if name in known:
        return known[name]
    raise RequestError(f'no card "{name}"{near(name, known)}; give a YAML file or the name of a card in data_cards/')


def _without_empty(values: Any) -> Any:
    """Drop empty sections, which are the defaults."""
    if not isinstance(values, dict):
        return values
    return {name: kept for name, value in values.items() if (kept := _without_empty(value)) not in ({}, [])}


def _marked(value: Any, path: str) -> list[str]:
    if value == TO_FILL:
        return [path.removesuffix(".text")]
    if isinstance(value, Mapping):
        return [found for key, child in value.items() for found in _marked(child, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        return [found for i, child in enumerate(value) for found in _marked(child, f"{path}.{i}")]
    return []


def _fault(error: Any) -> str:
    """Turn one pydantic error into a sentence that starts with the dotted path."""
    location = tuple(part for part in error["loc"] if "[" not in str(part))  # names of union members and validators
    path = ".".join(str(part) for part in location)
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key{near(str(location[-1]), known_keys(location[:-1]))}"
    if kind == "missing":
        return f"{path}: required and missing; write {TO_FILL} where it is not known yet"
    if kind == "value_error":
        return f"{path or 'card'}: {error['msg'].removeprefix('Value error, ')}"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}; found {error['input']!r}"


def known_keys(location: Sequence[Any]) -> list[str]:
    """Return the keys that are allowed at a place in a card."""
    here: Any = Card
    for part in location:
        if here is not None and str(part) in here.model_fields:
            here = _section_of(here.model_fields[str(part)].annotation)
    return [] if here is None else list(here.model_fields)


def _section_of(annotation: Any) -> Any:
    """Return the model inside an annotation such as `dict[str, Fact]` or `FileCounts | None`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in getattr(annotation, "__args__", ()) if (found := _section_of(argument)) is not None), None)
