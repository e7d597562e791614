"""recipe, runs, doctor: looking, never writing."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from medssl.cli import show
from medssl.errors import RecipeError, RequestError, near

recipe_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
runs_app = typer.Typer(help="Look at run folders.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


def find_recipe(name: str) -> Path:
    """Return a recipe by path or by shipped name."""
    from medssl.recipe import shipped

    if Path(name).is_file():
        return Path(name)
    known = shipped()
    matches = [path for key, path in known.items() if key == name or key.split("/")[-1] == name]
    if len(matches) == 1:
        return matches[0]
    raise RequestError(f'no recipe "{name}"{near(name, known)}; `medssl recipe ls` lists them')


@recipe_app.command("ls")
def recipe_ls(json: Json = False) -> None:
    """List the recipes that come with medssl."""
    from medssl.recipe import shipped

    rows = [[name, first_sentence(path.read_text())] for name, path in shipped().items()]
    show.result([{"name": name, "about": about} for name, about in rows], json, show.table(rows, ["recipe", "about"]))


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment that a recipe begins with, over as many lines as it has."""
    lines = (line.removeprefix("#").strip() if line.startswith("#") else "" for line in text.splitlines())
    paragraph = " ".join(itertools.takewhile(bool, lines))
    return re.split(r"(?<=\.) ", paragraph)[0]


@recipe_app.command("show")
def recipe_show(name: str) -> None:
    """Print a recipe as it is written, comments included; copy it with > mine.yaml."""
    typer.echo(find_recipe(name).read_text().rstrip())


@recipe_app.command("validate")
def recipe_validate(
    name: str,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes.")] = None,
    json: Json = False,
) -> None:
    """Check a recipe and report every fault at once."""
    from medssl import recipe_checks
    from medssl.recipe import apply_overrides, read_yaml, with_placeholders
    from medssl.yaml_models import REQUIRED_MARK, marked

    raw = apply_overrides(read_yaml(find_recipe(name)), overrides or [])
    open_keys = marked(raw)
    try:
        recipe_checks.check(recipe_checks.parse(with_placeholders(raw)))
    except RecipeError as err:
        raise RecipeError(err.faults) from None
    note = f"; still to be given ({REQUIRED_MARK}): {', '.join(open_keys)}" if open_keys else ""
    show.result({"valid": True, "to_be_given": open_keys}, json, f"{name}: valid{note}")


@recipe_app.command("schema")
def recipe_schema(kind: Annotated[str, typer.Argument(help="pretrain, finetune, evaluate or suite.")] = "pretrain") -> None:
    """Print the JSON Schema of a kind of recipe, for completion in editors."""
    import json as json_module

    from medssl.recipe import KINDS

    if kind not in KINDS:
        raise RequestError(f'kind "{kind}" is unknown{near(kind, KINDS)}; accepted: {", ".join(KINDS)}')
    typer.echo(json_module.dumps(KINDS[kind].model_json_schema(), indent=2))


@runs_app.command("ls")
def runs_ls(folder: Annotated[Path, typer.Argument(help="Folder to search.")] = Path("runs"), json: Json = False) -> None:
    """List runs below a folder, newest first."""
    from medssl.api import list_runs

    if not folder.is_dir():
        raise RequestError(f"no such folder: {folder}; give the folder that holds your runs")
    rows = list_runs(folder)
    columns = ("run", "kind", "status", "step", "loss", "seed", "started")
    cells = [["" if row[c] is None else f"{row[c]:.4g}" if c == "loss" else row[c] for c in columns] for row in rows]
    show.result(rows, json, show.table(cells, columns))


def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Recipe: measure a few steps and predict memory and hours.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes.")] = None,
    json: Json = False,
) -> None:
    """Say what this machine can do; with a recipe, predict its memory and hours from a few measured steps."""
    from medssl.doctor import machine, predict

    facts: dict[str, Any] = machine()
    if recipe:
        from medssl.recipe import apply_overrides, read_yaml, with_placeholders

        raw = apply_overrides(read_yaml(find_recipe(recipe)), overrides or [])
        facts["recipe"] = predict(with_placeholders(raw))
    lines = [f"{name}: {value}" for name, value in facts.items() if name != "recipe"]
    if recipe:
        lines += ["", f"{recipe}:"] + [f"  {name}: {value}" for name, value in facts["recipe"].items()]
    show.result(facts, json, "\n".join(lines))
