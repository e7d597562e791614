"""Compare a card with an index or with a folder of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive.table import Archive
from medssl.cards.count import count_files, count_index
from medssl.cards.schema import Card, card_hash, open_fields
from medssl.errors import RequestError


@dataclass(frozen=True)
class CheckResult:
    """What `check_card` found.

    Args:
        differences: One sentence each: dotted path, what the card says, what was found.
        open_fields: Dotted paths that a human must still fill.
        compared: What the card was compared with: `index`, `files`, `weights`.
    """

    differences: list[str] = field(default_factory=list)
    open_fields: list[str] = field(default_factory=list)
    compared: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs and nothing is left to fill."""
        return not self.differences and not self.open_fields


def check_card(
    card: Card,
    *,
    archive: Archive | Path | str | None = None,
    where: str | None = None,
    files: Path | str | None = None,
    weights: Mapping[str, Any] | None = None,
) -> CheckResult:
    """Compare the counts and hashes of a card with data or with the weights that name it, and name its open fields.

    Args:
        card: The card.
        archive: Index of the same set; any id key will do.
        where: SQL condition on the index, where it holds other sets as well.
        files: Folder with the files of the set.
        weights: Manifest of weights.

    Raises:
        RequestError: The card holds no numbers of that kind.
    """
    differences: list[str] = []
    compared: list[str] = []
    if archive is not None:
        if card.counts is None:
            raise RequestError(f"card {card.name} has no `counts` to compare with an index; draft them with `medssl card build`")
        archive = archive if isinstance(archive, Archive) else Archive.open(archive)
        counts, digest = count_index(archive, card.counts.k, where)
        differences += _differences(_plain(card.counts), _plain(counts), "counts")
        if card.hashes.index is not None:
            differences += _differences(card.hashes.index, digest, "hashes.index")
        compared.append("index")
    if files is not None:
        if card.files is None and card.hashes.files is None:
            raise RequestError(
                f"card {card.name} has no `files` to compare with a folder; draft them with `medssl card build --files`"
            )
        found, digest = count_files(files)
        if card.files is not None:
            differences += _differences(_plain(card.files), _plain(found), "files")
        if card.hashes.files is not None:
            differences += _differences(card.hashes.files, digest, "hashes.files")
        compared.append("files")
    if weights is not None:
        differences += _weights_differences(card, weights)
        compared.append("weights")
    return CheckResult(differences, open_fields(card), tuple(compared))


def _weights_differences(card: Card, manifest: Mapping[str, Any]) -> list[str]:
    named = {entry["name"]: entry for entry in manifest.get("data_cards") or []}
    if card.name not in named:
        return [f"weights: they do not name this card; they name {', '.join(sorted(named)) or 'no card'}"]
    then, now = named[card.name], card_hash(card)
    if then["card_hash"] == now:
        return []
    return [
        f"weights: they carry version {then['version']} of this card with hash {then['card_hash']}; it was changed since, "
        f"and is now version {card.version} with hash {now}"
    ]


def _plain(model: Any) -> Any:
    return model.model_dump(mode="json")


def _differences(said: Any, found: Any, path: str) -> list[str]:
    if isinstance(said, Mapping) and isinstance(found, Mapping):
        keys = [*said, *(key for key in found if key not in said)]
        return [line for key in keys for line in _differences(said.get(key), found.get(key), f"{path}.{key}")]
    return [] if said == found else [f"{path}: the card says {_word(said)}, found {_word(found)}"]


def _word(value: Any) -> str:
    if value is None:
        return "nothing"
    return "a table" if isinstance(value, Mapping) else str(value)
