"""pretrain, finetune, label-curve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medssl.cli import show
from medssl.errors import RequestError

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value changes, for instance train.steps=100.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Weights = Annotated[str, typer.Option("--weights", help="Run folder, safetensors file, or `scratch`.")]


def pretrain(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML), or a run folder together with --resume.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the recipe's out folder; start it when there is none.")
    ] = False,
    json: Json = False,
) -> None:
    """Pretrain an encoder. Under torchrun or SLURM the same command trains on several processes."""
    from medssl import api
    from medssl.training.distributed import environment

    quiet = json or environment()[0] != 0
    with show.progress("cache", quiet=quiet) as cached, show.progress("pretrain", quiet=quiet) as stepped:
        done = api.pretrain(
            recipe, overrides or [], resume=resume, on_note=lambda note: show.say(note, quiet), on_cache=cached, on_step=stepped
        )
    if environment()[0] != 0:
        return
    lines = [f"{done.status}: {done.items} items, run folder {done.path}"]
    if done.failed:
        lines += [f"{len(done.failed)} items could not be used:", *show.failures(done.failed)]
    if done.status == "interrupted":
        lines.append(f"continue with: medssl pretrain {done.path} --resume")
    value = {"run": str(done.path), "status": done.status, "items": done.items, "failed": {k: v[0] for k, v in done.failed.items()}}
    show.result(value, json, "\n".join(lines))


def finetune(
    recipe: Recipe,
    overrides: Overrides = None,
    weights: Weights = "scratch",
    twin: Annotated[bool, typer.Option("--twin", help="Also train the matched scratch twin.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of start weights and draws.")] = 0,
    json: Json = False,
) -> None:
    """Fine-tune on a labelled cohort: a MONAI segmentation network, or an encoder for classes, numbers or boxes (`task` of the recipe)."""
    from medssl import api

    with show.progress("finetune", quiet=json) as update:
        summary = api.finetune(recipe, weights, overrides or [], seed=seed, twin=twin, on_step=update)
    show.result(summary, json, summary_table(summary))


def label_curve(
    recipe: Recipe,
    overrides: Overrides = None,
    weights: Weights = "scratch",
    labels: Annotated[str, typer.Option(help="Numbers of labelled volumes, comma-separated.")] = "5,20",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    json: Json = False,
) -> None:
    """Fine-tune at several label budgets and seeds, pretrained against scratch; finished cells are kept, so it can be killed and run again."""
    from medssl import api

    counts, seed_list = numbers("--labels", labels), numbers("--seeds", seeds)

    def cell(done: int, total: int, what: Any, result: Any) -> None:
        show.say(f"cell {done}/{total} {what.name}: {headline(result)}", json)

    with show.progress("cell", quiet=json) as update:
        summary = api.label_curve(recipe, weights, overrides or [], counts=counts, seeds=seed_list, on_cell=cell, on_step=update)
    show.result(summary, json, summary_table(summary))


def numbers(option: str, text: str) -> list[int]:
    """Parse a comma-separated list of whole numbers."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as err:
        raise RequestError(f"{option} {text!r}: give whole numbers separated by commas, for instance {option} 5,20") from err


def headline(result: Any) -> str:
    """Return the main score of a cell."""
    if isinstance(result, dict):
        row = result["rows"][0]
        return f"{row['metric']} {row['value']:.3f}"
    dice = result.mean("dice")
    return f"Dice {sum(dice.values()) / len(dice):.3f}"


def summary_table(summary: dict[str, Any]) -> str:
    """Return a label-curve summary as text."""
    from medssl.weights import stated_lines

    segmentation = "metric" not in summary or summary["metric"].startswith("mean Dice")
    key, name = ("dice", "Dice") if segmentation else ("value", summary["metric"])
    rows = [
        [
            row["labels"],
            row["arm"],
            f"{row[key]:.3f}",
            "-" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",  # one test case has no interval
            len(row["seeds"]),
            row["n_test"],
        ]
        for row in summary["rows"]
    ]
    text = show.table(rows, ["labels", "arm", name, "95 % interval", "seeds", "test cases"])
    for row in summary["differences"]:
        interval = "" if row["low"] is None else f" ({row['low']:+.3f} to {row['high']:+.3f}, paired over test patients)"
        text += f"\n{row['labels']} labels: {row['arm']} minus {row['against']} {row['difference']:+.3f}{interval}"
    if resampled := summary.get("without_dicom_seg"):
        text += f"\n{len(resampled)} test case(s) have NIfTI for DICOM-SEG, as their series was resampled: {', '.join(resampled)}"
    for sentence in summary.get("label_facts", []):
        text += f"\nlabels: {sentence}"
    return "\n".join([text, *stated_lines(summary.get("shared", {}))])
