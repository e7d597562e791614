"""evaluate, export, report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from medssl.cli import show
from medssl.errors import RequestError

FORMS = (  # medssl.export.write.EXPORTS, which would import torch for --help
    *(
        "safetensors",
        "unetr",
        "segresnet",
        "swin-unetr",
        "monai-bundle",
        "nnunet",
        "timm",
        "torchvision",
        "resnet",
        "flexible-unet",
        "retinanet",
    ),
    *("joint", "aggregator", "onnx", "hf"),
)
NO_CARD = "no data card; name one in the recipe (data.card), and the weights carry it"
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    weights: Annotated[Path, typer.Option("--weights", help="Run folder or safetensors file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes.")] = None,
    suite: Annotated[
        bool, typer.Option("--suite", help="Run the tiers of a suite recipe (kind: suite); finished tiers are kept.")
    ] = False,
    json: Json = False,
) -> None:
    """Probe frozen features with kNN and a linear probe, beside the controls; with --suite the whole protocol."""
    if suite:
        return _suite(recipe, weights, overrides or [], json)
    from medssl import api
    from medssl.weights import card_lines, forced_lines

    with show.progress("cache", quiet=json) as update:
        done = api.evaluate(recipe, weights, overrides or [], on_cache=update)
    rows = [
        [
            r["name"],
            r["probe"],
            r["metric"],
            _number(r["value"]),
            f"{_number(r['low'])} to {_number(r['high'])}",
            r["n_images"],
            r["by"],
        ]
        for r in done["rows"]
    ]
    lines = [show.table(rows, ["features", "probe", "metric", "value", "95 % interval", "images", "by"])]
    lines += [f"weights pretrained on: {line}" for line in card_lines(done["data_cards"]["weights"]) or [NO_CARD]]
    lines += [f"evaluated on: {line}" for line in card_lines(done["data_cards"]["evaluation"])]
    lines += forced_lines(done["forced"])
    show.result(done, json, "\n".join(lines))


def _suite(recipe: Path, weights: Path, overrides: Sequence[str], json: bool) -> None:
    from medssl.suite import run_suite
    from medssl.weights import forced_lines

    def tier(name: str, done: int, total: int) -> None:
        show.say(f"tier {done + 1}/{total}: {name}", json)

    with show.progress("cache", quiet=json) as update:
        done = run_suite(recipe, weights, overrides, on_cache=update, on_tier=tier)
    rows = [
        [
            row["model"],
            "-" if row["z"] is None else f"{row['z']:+.2f}",
            "-" if row["z_modality"] is None else f"{row['z_modality']:+.2f}",
            "-" if row["rank"] is None else f"{row['rank']:.1f}",
            row["tasks"],
            row["missing"],
        ]
        for row in done["aggregate"]
    ]
    lines = [show.table(rows, ["model", "mean z", "modalities alike", "mean rank", "tasks", "missing"])]
    lines += [
        f"skipped: {s['tier']}: {' '.join(part for part in (s['task'], s['what']) if part)}: {s['why']}" for s in done["skipped"]
    ]
    lines += forced_lines(done["forced"])
    lines.append(f"{len(done['rows'])} rows in {done['out']}: results.json, table.md, page.html")
    show.result(done, json, "\n".join(lines))


def export(
    run: Annotated[Path, typer.Argument(help="Run folder or safetensors file; for monai-bundle also a folder of fine-tuning.")],
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(FORMS)}; see docs/export.md.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    channels: Annotated[
        int | None, typer.Option(help="Input channels, where not those of the weights: grey from or to several.")
    ] = None,
    decoder: Annotated[bool, typer.Option("--decoder", help="Add a pretrained decoder, where the run has one.")] = False,
    dims: Annotated[int | None, typer.Option(help="2 or 3 spatial axes of MONAI's ResNet, FlexibleUNet, RetinaNet.")] = None,
    inflation: Annotated[str, typer.Option(help="How 2D kernels get a depth: repeat or centre.")] = "repeat",
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="Of a ViT of volumes, for instance 128,128,96: its positions are resized.")
    ] = None,
    membership: Annotated[
        Path | None, typer.Option("--membership", help="Result of `medssl membership`; its AUC goes into the manifest.")
    ] = None,
    json: Json = False,
) -> None:
    """Write weights in the layout of another library, reload them there and compare features before saying done."""
    from medssl.export.segmentation_bundle import find_network
    from medssl.export.write import export_weights
    from medssl.weights import card_lines, read_manifest

    how: dict[str, Any] = {"channels": channels, "dims": dims, "inflation": inflation}
    size = show.numbers("--image-size", image_size)
    how["image_size"] = None if size is None else [int(n) for n in size]
    done = export_weights(run, to, out, decoder=decoder, membership=membership, **how)
    cards = read_manifest(find_network(run)).get("data_cards") or []
    worst = done.max_feature_difference
    same = "features equal bit by bit" if worst == 0 else f"features equal within {worst:.1e}"
    text = "\n".join(
        [
            f"{to}: {len(done.matched)} tensors matched, {len(done.missing)} missing, {len(done.unexpected)} unexpected; {same}",
            *_groups("missing (they keep their random start)", done.missing),
            *_groups("unexpected", done.unexpected),
            *done.notes,
            *map(str, done.files),
        ]
    )
    lines = [f"pretrained on: {line}" for line in card_lines(cards) or [NO_CARD]]
    lines += [note for card in cards for note in card.get("notes", [])]
    show.result({**asdict(done), "data_cards": cards}, json, "\n".join([text, *lines]))


def membership(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")],
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", help="SQL condition of images that were not trained on; default: those of val and test."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Source of the recipe; default the first.")] = None,
    images: Annotated[int, typer.Option(help="Images per side at most.")] = 200,
    views: Annotated[int, typer.Option(help="Views of each image.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of views, images and bootstrap.")] = 0,
    json: Json = False,
) -> None:
    """Measure how well training images can be told from held-out ones by the encoder (AUC, 0.5 is chance)."""
    from medssl.membership import membership as measure

    done = measure(run, held_out=held_out, source=source, images=images, views=views, seed=seed, out=out)
    interval = f"{done['low']:.3f} to {done['high']:.3f}"
    text = (
        f"membership inference: AUC {done['auc']:.3f} (95 % {interval}), {done['members']} trained and {done['non_members']} held-out "
        f"patients; 0.5 is chance\n{out}"
    )
    show.result(done, json, text)


def _groups(what: str, keys: Sequence[str]) -> list[str]:
    """Return one line that counts keys by their first name, none without keys."""
    counts = Counter(key.partition(".")[0] for key in keys)
    return [f"{what}: " + ", ".join(f"{name} {count}" for name, count in counts.items())] if counts else []


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, demo folder or archive.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; default RUN/report.html.")] = None,
    with_images: Annotated[bool, typer.Option(help="Include pictures of patients: the page is private then.")] = False,
    json: Json = False,
) -> None:
    """Draw one self-contained HTML page."""
    if (run / "series.parquet").is_file():
        path = _archive_report(run, out or run / "report.html", with_images, quiet=json)
    elif (run / "suite.json").is_file():
        from medssl.suite import draw_page

        path = draw_page(run, out or run / "report.html")
    elif any((run / name).is_file() for name in ("label_curve.json", "target_curve.json", "results.json")):
        path = _clinical_report(run, out or run / "report.html", with_images)
    else:
        from medssl.report.collect import collect, holds_nothing
        from medssl.report.page import report as draw

        if holds_nothing(collect(run, with_images=False)):  # it would write a page into a folder of images
            raise RequestError(
                f"{run}: nothing there that medssl wrote; give the run folder, archive or demo folder that a report is for"
            )
        path = draw(run, out or run / "report.html", with_images=with_images)
    show.result({"report": str(path)}, json, str(path))


def _archive_report(archive: Path, out: Path, with_images: bool, *, quiet: bool) -> Path:
    from medssl.archive.operations.facts import collect_facts
    from medssl.archive.table import Archive
    from medssl.cli.thumbnails import draw_pictures
    from medssl.report.archive_page import archive_report

    opened = Archive.open(archive)
    facts, pictures = collect_facts(opened), None
    if with_images:
        with show.progress("pictures", quiet=quiet) as update:
            pictures = draw_pictures(opened, on_progress=update)
    return archive_report(facts, out, pictures=pictures)


def _clinical_report(folder: Path, out: Path, with_images: bool) -> Path:
    """Draw the page of one fine-tuning: what `finetune` and `label-curve` left in a folder."""
    import json

    from medssl.evaluation.clinical import clinical_facts, code_of
    from medssl.evaluation.label_facts import label_sentences
    from medssl.report import box_figures
    from medssl.report.clinical_page import clinical_page, read_worst
    from medssl.weights import write_atomic

    if out.is_dir():
        raise RequestError(f"{out}: is a folder; name the HTML file to write, for instance {out / 'report.html'}")
    files = sorted(folder.glob("cells/*/results.json")) or [folder / "results.json"]
    results = {file.parent: json.loads(file.read_text()) for file in files if file.is_file()}
    if not results:
        raise RequestError(
            f"{folder}: no cell is done yet; run the same `medssl finetune` or `label-curve` again, it goes on where it stopped"
        )
    facts = {**clinical_facts(list(results.values())), "label_facts": label_sentences(folder)}
    pictures: dict[str, Any] | None = None
    structures: list[str] = []
    if with_images:
        pictures = {}
        chosen = (facts["arm"], facts["labels"], facts["seed"])
        own = [f for f, result in results.items() if (result["arm"], result["labels"], result["seed"]) == chosen]
        for file in [cell / "figures" / "worst.npz" for cell in own]:  # of folds each has its own
            if facts["task"] == "detection":
                found = box_figures.read_worst(file)
                pictures |= {code_of({"series_id": name, "case": name}, 0): cuts for name, cuts in found.items()}
            else:
                more, names = read_worst(file)
                pictures |= more
                structures = structures or names  # a fold without pictures has none
    page = clinical_page(facts, pictures=pictures, structures=structures)
    write_atomic(out, page.encode(), mode=0o600)  # without pictures too it has rows of single patients
    return out


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
