"""embed, match."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medssl.cli import show
from medssl.errors import RequestError

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Spacing = Annotated[float | None, typer.Option("--spacing", help="Refuse weights that were not trained at this spacing, in mm.")]
Step = Annotated[
    float | None, typer.Option("--step", help="Between embedded cells, in mm: the matcher's own step, or 2 or 4 times it.")
]


def embed(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML) whose sources name the volumes.")],
    weights: Annotated[Path, typer.Option("--weights", help="Run of the objective anatomical_embedding.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes.")] = None,
    step: Step = None,
    spacing: Spacing = None,
    json: Json = False,
) -> None:
    """Write the anatomical embeddings of a recipe's volumes into its store; run it again to write what is new or changed."""
    from medssl.correspondence import embed as run

    with show.progress("cache", quiet=json) as cached, show.progress("embed", quiet=json) as embedded:
        done = run(recipe, weights, overrides or [], step_mm=step, spacing_mm=spacing, on_cache=cached, on_embed=embedded)
    lines = []
    for name, facts in done.items():
        lines.append(
            f"{name}: {facts.written} written, {facts.present} present, {len(facts.failed)} failed; {facts.bytes_per_volume / 1e6:.2f} MB "
            f"per volume, {facts.largest / 1e6:.2f} MB the largest; {facts.folder}"
        )
        lines += show.failures(facts.failed)
    value = {name: {**asdict(facts), "folder": str(facts.folder)} for name, facts in done.items()}
    show.result(value, json, "\n".join(lines))


def match(
    a: Annotated[str, typer.Argument(help="Volume A: series id (with --index), file, or folder of one DICOM series.")],
    b: Annotated[str, typer.Argument(help="Volume B, likewise.")],
    point: Annotated[
        list[str] | None, typer.Option("--point", help="x,y,z in world mm of A (RAS+); may be given several times.")
    ] = None,
    grid: Annotated[
        float | None, typer.Option("--grid", help="Match body points of A on a grid of this step in mm instead.")
    ] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Run of the objective anatomical_embedding.")] = None,
    matcher: Annotated[
        str | None,
        typer.Option("--matcher", help="embedding (needs --weights), affine or body_axis; default embedding, or affine."),
    ] = None,
    index: Annotated[Path | None, typer.Option("--index", help="Archive that series ids refer to.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="What files are: ct or mri.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="PNG to draw: matched points in both images, and similarity.")] = None,
    step: Step = None,
    spacing: Spacing = None,
    json: Json = False,
) -> None:
    """Find points of one volume in another: world mm in, world mm out, with a score."""
    from medssl.correspondence import match as run

    points = [parse_point(text) for text in point] if point else None
    found = run(
        a,
        b,
        points=points,
        grid_mm=grid,
        weights=weights,
        matcher=matcher,
        index=index,
        domain=domain,
        out=out,
        step_mm=step,
        spacing_mm=spacing,
    )
    rows = [
        [
            n,
            *(f"{v:.1f}" for v in row["a"]),
            *(("-",) * 3 if row["b"] is None else [f"{v:.1f}" for v in row["b"]]),
            f"{row['score']:.3f}",
        ]
        for n, row in enumerate(found.points, start=1)
    ]
    text = show.table(rows, ["point", "A x", "A y", "A z", "B x", "B y", "B z", "score"])
    text += (
        f"\nmatcher {found.matcher}; world mm, RAS+; - is a point without a match (outside the body of A, or nothing like it in B)"
    )
    if found.picture is not None:
        text += f"\n{found.picture}: shows patients, for your eyes only"
    value = {**asdict(found), "picture": None if found.picture is None else str(found.picture)}
    show.result(value, json, text)


def parse_point(text: str) -> tuple[float, float, float]:
    """Parse x,y,z.

    Raises:
        RequestError: The text is not three numbers.
    """
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError as err:
        raise RequestError("--point: give three numbers x,y,z in world mm, for instance --point 12.5,-40,88") from err
    return x, y, z
