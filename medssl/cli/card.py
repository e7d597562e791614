"""card: draft, check and render data cards."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from medssl.cli import show
from medssl.errors import RequestError

card_app = typer.Typer(help="Data cards: what a data set is, and how many of what it holds.", no_args_is_help=True)
COMPARED = {"weights": "card that the weights carry"}
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


class Target(str, Enum):
    """What a card can be rendered to."""

    markdown = "markdown"
    croissant = "croissant"


@card_app.command("build")
def build(
    archive: Annotated[Path, typer.Argument(help="Archive folder made by `medssl index`.")],
    out: Annotated[Path, typer.Option(help="YAML file to write; never replaced.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the card: lower-case letters, digits, _ . -  [default: that of the file]")
    ] = None,
    k: Annotated[int, typer.Option(help="Hide every count about fewer than k patients.")] = 10,
    where: Annotated[str | None, typer.Option(help="SQL condition, where the index holds several sets: \"site = 'msd'\".")] = None,
    files: Annotated[Path | None, typer.Option(help="Also count and hash the files of this folder.")] = None,
    json: Json = False,
) -> None:
    """Draft a card: counts and hashes from the index, ??? where you must write."""
    from medssl.cards.build import draft_card, write_card
    from medssl.cards.schema import HIDDEN, open_fields

    card = draft_card(archive, name or out.stem, k=k, where=where, files=files)
    write_card(card, out)
    left = open_fields(card)
    text = f"{out}: drafted; {len(left)} fields are yours to fill: {', '.join(left)}"
    if card.counts is not None and card.counts.patients == HIDDEN:
        text += f"\nfewer than {k} patients, so every count is hidden; a set that is public anyway can be counted with --k 1"
    show.result({"card": str(out), "open_fields": left}, json, text)


@card_app.command("check")
def check(
    card: Annotated[str, typer.Argument(help="YAML file, or the name of a card that comes with medssl.")],
    archive: Annotated[Path | None, typer.Option(help="Compare with this index.")] = None,
    where: Annotated[
        str | None, typer.Option(help="With --archive: SQL condition, where the index holds other sets as well.")
    ] = None,
    files: Annotated[Path | None, typer.Option(help="Compare with the files of this folder.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Run folder or safetensors file: was the card changed since it was written into them?")
    ] = None,
    json: Json = False,
) -> int:
    """Validate a card, name what is left to fill, compare it with data or with the weights that name it."""
    from medssl.cards.check import check_card
    from medssl.cards.schema import card_hash, find_card, load_card
    from medssl.weights import read_manifest

    if where is not None and archive is None:
        raise RequestError("--where says which series of an index to compare with; give --archive too")
    loaded = load_card(find_card(card))
    manifest = None if weights is None else read_manifest(weights)
    found = check_card(loaded, archive=archive, where=where, files=files, weights=manifest)
    lines = [f"to fill: {path}" for path in found.open_fields] + found.differences
    with_what = f", equal to the {' and the '.join(COMPARED.get(name, name) for name in found.compared)}" if found.compared else ""
    summary = f"{card}: {len(lines)} to look at" if lines else f"{card}: valid{with_what}"
    result = {
        "valid": True,
        "hash": card_hash(loaded),
        "differences": found.differences,
        "open_fields": found.open_fields,
        "compared": list(found.compared),
    }
    show.result(result, json, "\n".join([*lines, summary]))
    return 0 if found.ok else 1


@card_app.command("render")
def render(
    card: Annotated[str, typer.Argument(help="YAML file, or the name of a card that comes with medssl.")],
    to: Annotated[Target, typer.Option(help="markdown (Hugging Face front matter) or croissant (JSON-LD).")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    json: Json = False,
) -> None:
    """Write a card as Markdown or as Croissant 1.1 JSON-LD."""
    import json as json_module

    from medssl.cards import render as renderers
    from medssl.cards.schema import TO_FILL, find_card, load_card, open_fields

    loaded = load_card(find_card(card))
    if to is Target.markdown:
        text = renderers.markdown(loaded)
    else:
        text = json_module.dumps(renderers.croissant(loaded), indent=1, ensure_ascii=False) + "\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as err:
        raise RequestError(f"{out} cannot be written ({err.strerror}); name a file in a folder that you may write to") from err
    left = open_fields(loaded)
    draft = f"; the card is a draft, {len(left)} fields still say {TO_FILL}" if left else ""
    show.result({"card": loaded.name, "out": str(out), "to": to.value, "open_fields": left}, json, f"{out}: written{draft}")
