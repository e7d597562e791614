"""One self-contained HTML page from what runs left behind: no scripts, nothing fetched, readable on paper.

Everything a file says is escaped. Paths, links, host and user names are left out, cases are numbered instead of named,
and without `with_images` no patient's image is even read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.report import clip_figures, figures
from medssl.report.collect import Json, Leftovers, Segmentation, collect, number, spacing_of
from medssl.report.elements import (
    PRIVATE_KEYS,
    Section,
    absent,
    charts,
    decimal,
    duration,
    image,
    interval_svg,
    plain,
    span_of,
    table,
    text,
    whole_page,
    written,
)
from medssl.report.headline import (
    BY_CASE,
    Comparison,
    Estimate,
    budget,
    comparisons,
    group_results,
    network_of,
    scores_of,
    verdict,
)
from medssl.weights import card_lines, write_atomic

log = logging.getLogger(__name__)

MAX_CASES = 3  # pictured per section: a page is read, not scrolled

# What of run.json may be shown. Host, user, paths and command lines are not among it.
_RUN_KEYS = {
    "status": "status",
    "message": "message",
    "name": "recipe",
    "recipe": "recipe",
    "recipe_name": "recipe",
    "recipe_hash": "recipe hash",
    "objective": "objective",
    "encoder": "encoder",
    "parameters": "parameters",
    "seed": "seed",
    "steps": "steps",
    "step": "steps done",
    "steps_done": "steps done",
    "started": "started",
    "finished": "finished",
    "ended": "finished",
    "seconds": "time",
    "world_size": "processes",
    "strategy": "strategy",
    "precision": "precision",
    "git": "git commit",
    "hardware": "hardware",
    "versions": "versions",
}
_MANIFEST_KEYS = {
    "objective": "objective",
    "encoder": "encoder",
    "run": "run",
    "image_size": "crop",
    "patch_size": "patch",
    "spacing_mm": "spacing (mm)",
    "intensity": "intensity",
    "step": "step",
    "licence": "licence",
    "weights_hash": "weights hash",
    "recipe_hash": "recipe hash",
}
_CONTROLS = ("random", "pixel", "intensity", "atlas", "scratch", "chance", "majority")


def report(run: Path, out: Path, *, with_images: bool = True) -> Path:
    """Write one HTML page about a run, an archive, or a demo folder that holds several results; return its path.

    Args:
        run: Folder with any of run.json, metrics.jsonl, figures/, weights/, results.json, evaluate.json, summary.json and
            demo.json, up to five levels deep. What is missing is said on the page; what is broken is listed at its top.
        out: File to write; replaced at once when the page is complete.
        with_images: Whether to show images of patients. Such a page is private (mode 0600); one without is made to share.

    Raises:
        RequestError: `run` is no folder, or `out` is one.
        StoreError: The page cannot be written.
    """
    run, out = Path(run), Path(out)
    if out.is_dir():
        raise RequestError(f"{out}: is a folder; name the HTML file to write, for instance {out / 'report.html'}")
    found = collect(run, with_images=with_images)
    for fault in found.faults:
        log.warning("report: %s", fault)
    write_atomic(out, render(found, with_images=with_images).encode(), mode=0o600 if with_images else 0o644)
    return out


def render(found: Leftovers, *, with_images: bool) -> str:
    """Return the page as text."""
    lines = comparisons(found)
    sections = [
        Section("result", "Result", _result(found, lines)),
        Section("ran", "What ran", _what_ran(found)),
        Section("curves", "Loss and monitors", _curves(found)),
        *_pictures(found, with_images),
        Section("probes", "Probes and controls", _probes(found)),
        Section("data", "Data", _data(found)),
        Section("caveats", "Before you use this", _caveats(found, lines, with_images)),
    ]
    privacy = "Private: shows images of patients." if with_images else "Without images of patients."
    about = [_name(found.manifest[key]) for key in ("objective", "encoder") if found.manifest.get(key)]
    subject = f": {', '.join(about)}" if about else ""
    lead = f"Self-supervised pretraining, and what it was worth. Research only, not for diagnosis. {privacy}"
    footer = "Made by medssl from the files of one folder."
    return whole_page("medssl report", f"medssl report{subject}", lead, sections, footer=footer, before=_faults(found))


def _pictures(found: Leftovers, with_images: bool) -> list[Section]:
    """Return the sections with pictures; a page about clips says nothing of volumes that are not there."""
    of_clips = bool(found.clips or found.regressions)
    sections = []
    if found.reconstructions or not of_clips:
        sections.append(Section("reconstructions", "Reconstructions", _reconstructions(found, with_images)))
    if found.segmentations or not of_clips:
        sections.append(Section("segmentation", "Segmentation", _segmentation(found, with_images)))
    return [*sections, Section("clips", "Clips", _clips(found))] if of_clips else sections


def _faults(found: Leftovers) -> str:
    if not found.faults:
        return ""
    items = "".join(f"<li>{text(fault)}</li>" for fault in found.faults)
    return f'<div class="fault" role="alert"><strong>Not everything could be read</strong><ul>{items}</ul></div>\n'


def _result(found: Leftovers, lines: Sequence[Comparison]) -> str:
    """Headline table and verdicts."""
    raw = found.demo.get("table")
    if not lines and not raw:
        how = "Run <code>medssl finetune</code> with the weights and with <code>--weights scratch</code>."
        return absent("No fine-tuning result was found in this folder.", how)
    if not lines:
        return f"<pre>{text(raw)}</pre>" if isinstance(raw, str) else _as_it_stands(raw)
    first, *others = (text(verdict(line, budget(found))) for line in lines[:6])
    sentences = f'<p class="verdict">{first}</p>' + "".join(f"<p>{sentence}</p>" for sentence in others)
    low, high = span_of(e for line in lines for e in (line.scratch, line.pretrained))
    several_arms = len({line.arm for line in lines}) > 1
    rows = []
    for line in lines:
        name = " ".join(part for part in (text(line.network), text(line.arm) if several_arms else "") if part)
        rows.append(
            [
                name or "segmentation",
                text(line.labels) or "–",
                written(line.scratch),
                written(line.pretrained),
                f"<b>{written(line.difference, sign=True)}</b>",
                interval_svg([("scratch", line.scratch), ("pretrained", line.pretrained)], low, high),
                plain(line.seeds),
                plain(line.n_test),
            ]
        )
    scale = f"<br><small>{decimal(low, 2)} … {decimal(high, 2)}</small>"
    drawing = f'<span class="key scratch">scratch</span> <span class="key pretrained">pretrained</span>{scale}'
    head = ["network", "labels", "scratch", "pretrained", "difference", drawing, "seeds", "test cases"]
    drawn_by = "case, as not all patients are known" if any(line.by_case for line in lines) else "patient"
    caption = (
        "Mean Dice over structures and test cases (1 = perfect overlap). Brackets: 95 % bootstrap interval, drawn by "
        f"{drawn_by}. The difference is paired: the same test cases, the same number of steps. Where scratch still gains at that "
        "number (validation Dice below), it is a difference in speed; quality is what is left at the plateau of scratch."
    )
    parts = [sentences, table(head, rows, caption=caption), _label_curves(found), _structures(found)]
    return "\n".join(part for part in parts if part)


def _as_it_stands(raw: Any) -> str:
    """Print a table whose columns the page does not know."""
    rows = [row for row in raw if isinstance(row, dict)] if isinstance(raw, list) else []
    if not rows:
        return absent("demo.json holds a table in a form that this page does not know.", "Its raw numbers are in that file.")
    columns = list(dict.fromkeys(key for row in rows for key in row if str(key).lower() not in PRIVATE_KEYS))
    return table([text(c) for c in columns], [[plain(row.get(c)) for c in columns] for row in rows])


def _label_curves(found: Leftovers) -> str:
    parts = []
    for curve in found.curves:
        arms: dict[str, list[Json]] = {}
        for row in curve["rows"]:
            if number(row.get("labels")) is not None and number(row.get("dice")) is not None:
                arms.setdefault(str(row.get("arm", "")), []).append(row)
        lines = []
        for k, (arm, rows) in enumerate(sorted(arms.items(), key=lambda item: item[0] == "scratch")):
            rows.sort(key=lambda row: float(row["labels"]))
            columns = {key: np.array([_or_nan(row.get(key)) for row in rows]) for key in ("labels", "dice", "low", "high")}
            colour = 1 if arm == "scratch" else (0, 2, 3, 4)[k % 4]
            lines.append(figures.Line(arm, columns["labels"], columns["dice"], columns["low"], columns["high"], colour))
        if lines and len(lines[0].x) > 1:
            chart = figures.Chart("mean Dice on test", lines, x_label="labelled training cases", log_x=True)
            parts.append(charts([chart], "Label curve: mean Dice against labelled cases", columns=1, panel=(5.4, 3.0)))
    return "".join(parts)


def _structures(found: Leftovers) -> str:
    """Return Dice and HD95 per structure, one table for each network and number of labels."""
    parts = []
    for (network, labels), arms in group_results(found.results).items():
        names = next((r.get("structures") for group in arms.values() for r in group if r.get("structures")), None)
        if not isinstance(names, list) or not names:
            continue
        order = sorted(arms, key=lambda arm: arm != "scratch")
        rows = []
        for k, name in enumerate(names):
            cells = [text(str(name).replace("_", " "))]
            for metric, digits in (("dice", 3), ("hd95_mm", 1)):
                for arm in order:
                    mean, missing = _structure_mean(arms[arm], names, k, metric)
                    note = f" <small>({missing} without)</small>" if missing and metric == "hd95_mm" else ""
                    cells.append(decimal(mean, digits) + note)
            rows.append(cells)
        head = ["structure", *(f"Dice {text(arm)}" for arm in order), *(f"HD95 mm {text(arm)}" for arm in order)]
        where = " at ".join(part for part in (text(network), f"{text(labels)} labels") if part)
        caption = (
            f"Per structure, {where}. HD95: 95th percentile of surface distances, lower is better; a case in which a "
            "structure was not found has none."
        )
        parts.append(table(head, rows, caption=caption))
    if len(parts) > 1:
        return f"<details><summary>Per structure ({len(parts)} tables)</summary>{''.join(parts)}</details>"
    return "".join(parts)


def _structure_mean(results: Sequence[Json], names: Sequence[Any], k: int, metric: str) -> tuple[float | None, int]:
    """Return the mean score of structure k over cases and seeds, and how many cases have none."""
    values, missing = [], 0
    for result in results:
        for case in result.get("cases") or []:
            scores = scores_of(case, [str(name) for name in names], metric) if isinstance(case, Mapping) else []
            value = scores[k] if k < len(scores) else None
            if value is None:
                missing += 1
            else:
                values.append(value)
    return (float(np.mean(values)) if values else None), missing


def _or_nan(value: Any) -> float:
    found = number(value)
    return math.nan if found is None else found


def _what_ran(found: Leftovers) -> str:
    parts = []
    rows = _facts(found.run, _RUN_KEYS)
    if found.metrics and not {"steps", "steps done"} & {name for name, _ in rows}:
        last = max((_or_nan(row.get("step")) for row in found.metrics), default=math.nan)
        rows += [("steps done", plain(int(last)))] if math.isfinite(last) else []
    if rows:
        parts.append(table(["pretraining", ""], rows, numeric=False))
    else:
        parts.append(absent("No run.json was found.", "<code>medssl pretrain</code> writes one; settings are unknown."))
    weights = _facts(found.manifest, _MANIFEST_KEYS)
    if weights:
        weights += _data_cards(found.manifest)
        parts.append(table(["weights", ""], weights, numeric=False))
    settings = _finetuning(found)
    if settings:
        parts.append(settings)
    stages = found.demo.get("timings") or found.demo.get("seconds")
    if isinstance(stages, Mapping):
        rows = [(text(name), duration(seconds)) for name, seconds in stages.items()]
        parts.append(table(["stage", "time"], rows, numeric=False))
    notes = "".join(f"<p>{text(note)}</p>" for note in found.notes)
    return f'<div class="columns">{"".join(parts)}</div>{notes}'


def _data_cards(manifest: Json) -> list[tuple[str, str]]:
    """Return (name, HTML) of the data cards that weights carry, and what their owner should know of them."""
    named = manifest.get("data_cards")
    cards = [card for card in named if isinstance(card, Mapping)] if isinstance(named, list) else []
    try:
        rows = [("data card", text(line)) for line in card_lines(cards)]
    except KeyError:  # a manifest that somebody wrote by hand
        return [("data card", "cannot be read")]
    notes = [note for card in cards for note in card.get("notes") or []]
    rows += [("note", f'<span class="warn">{text(note)}</span>') for note in notes]
    return rows or [("data card", "none was named in the recipe")]


def _facts(source: Json, known: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (name, HTML) of the known keys that are there, the first spelling of a name winning."""
    rows: dict[str, str] = {}
    for key, name in known.items():
        value = source.get(key)
        if value in (None, "", {}, []) or name in rows or (key == "message" and source.get("status") == "finished"):
            continue
        if key == "recipe" and isinstance(value, Mapping):  # a whole recipe names sources by path
            value = value.get("name")
            if not value:
                continue
        rows[name] = duration(value) if key == "seconds" else plain(value)
    return list(rows.items())


def _finetuning(found: Leftovers) -> str:
    if not found.results:
        return ""
    first = found.results[0]
    settings = _mapping(first.get("settings"))
    wanted = ("steps", "batch", "lr", "encoder_lr_scale", "freeze_steps", "transfer", "crop", "normalize", "precision")
    merged = {**{key: settings.get(key) for key in wanted}, **{k: first[k] for k in ("steps",) if k in first}}
    rows = [("network", plain(network_of(first)))] if network_of(first) else []
    rows += [(text(key.replace("_", " ")), plain(value)) for key, value in merged.items() if value is not None]
    arms = sorted({str(result.get("arm", "unknown")) for result in found.results})
    seeds = sorted({str(result.get("seed", "–")) for result in found.results})
    rows += [("runs", f"{len(found.results)} ({', '.join(map(text, arms))})"), ("seeds", ", ".join(map(text, seeds)))]
    return table(["fine-tuning", ""], rows, numeric=False)


def _curves(found: Leftovers) -> str:
    parts = []
    if found.metrics:
        keys = list(dict.fromkeys(key for row in found.metrics for key in row if key != "step"))
        columns = {key: np.array([_or_nan(row.get(key)) for row in found.metrics]) for key in keys}
        losses = [key for key in keys if key == "loss" or key.endswith("/loss") or key.startswith("loss/")]
        probes = [key for key in keys if key.startswith("probe/")]
        drawn = [key for key in keys if np.isfinite(columns[key]).any()]
        for group, alt in (
            (losses, "Loss against step"),
            (probes, "Live probes against step"),
            ([key for key in keys if key not in (*losses, *probes)], "Monitors against step"),
        ):
            shown = [key for key in group if key in drawn][:12]
            if shown:
                panel = (5.4, 2.8) if len(shown) == 1 else (3.3, 2.2)
                parts.append(charts([_chart(key, found.metrics) for key in shown], alt, panel=panel))
        logged = [row["loss"] for row in found.metrics if "loss" in row]
        holes = sum(number(loss) is None for loss in logged)
        if holes:
            parts.append(f'<p class="warn">{holes} of {len(logged)} logged losses were not finite.</p>')
    else:
        parts.append(absent("No metrics.jsonl was found.", "<code>medssl pretrain</code> writes one."))
    parts.append(_finetune_curves(found))
    return "".join(parts)


def _name(part: Any) -> str:
    """Return the name of an objective or encoder of a manifest without its arguments."""
    return plain(part["name"] if isinstance(part, dict) and "name" in part else part)


def _chart(key: str, metrics: Sequence[Json]) -> figures.Chart:
    """Return the chart of one metric: lines of other monitors leave no gap in it, a loss that was not finite does."""
    points = [(_or_nan(row.get("step", k)), _or_nan(row[key])) for k, row in enumerate(metrics) if key in row]
    points = [(step, value) for step, value in points if math.isfinite(step) and (math.isfinite(value) or key == "loss")]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    name = key.removeprefix("monitor/").replace("probe/", "probe ").replace("_", " ")
    return figures.Chart(name, [figures.Line("", steps, values)], smooth=True)


def _finetune_curves(found: Leftovers) -> str:
    """Return the fine-tuning losses and validation Dice of both arms, so that a plateau can be seen."""
    panels: dict[str, list[figures.Line]] = {}
    seen: set[tuple[str, str]] = set()
    for result in found.results:
        curve = [row for row in result.get("curve") or [] if isinstance(row, dict)]
        arm = str(result.get("arm", "unknown"))
        where = " at ".join(part for part in (network_of(result), f"{result.get('labels', '?')} labels") if part)
        if (where, arm) in seen:  # further seeds would only thicken the lines
            continue
        seen.add((where, arm))
        for key, title in (("loss", "fine-tuning loss"), ("val_dice", "validation Dice"), ("dice", "validation Dice")):
            points = [(_or_nan(row.get("step")), _mean_of(row.get(key))) for row in curve]
            points = [(step, value) for step, value in points if math.isfinite(step) and math.isfinite(value)]
            if len(points) > 1:
                x, y = (np.array(part) for part in zip(*points))
                lines = panels.setdefault(f"{title}, {where}", [])
                lines.append(figures.Line(arm, x, y, colour=1 if arm == "scratch" else (0, 2, 3)[len(lines) % 3]))
    if not panels:
        return ""
    parts = [figures.Chart(title, lines, smooth=True) for title, lines in list(panels.items())[:12]]
    return charts(parts, "Fine-tuning: loss and validation Dice against step", "Fine-tuning, first seed of each arm.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mean_of(value: Any) -> float:
    """Return a number, or the mean of the numbers in name -> value."""
    if isinstance(value, Mapping):
        kept = [v for v in map(number, value.values()) if v is not None]
        return float(np.mean(kept)) if kept else math.nan
    return _or_nan(value)


def _no_images() -> str:
    return absent("Left out.", "This page was made without images of patients, so that it can be shared.")


def _reconstructions(found: Leftovers, with_images: bool) -> str:
    if not with_images:
        return _no_images()
    parts: list[str] = []
    for arrays in found.reconstructions:
        for i in range(len(arrays["input"])):
            if len(parts) == MAX_CASES:
                break
            shown, hidden, output = arrays["input"][i], arrays["mask"][i].astype(bool), arrays["output"][i]
            share = f"{100 * hidden.mean():.0f} % hidden"
            error = hidden_error(shown, hidden, output)
            said = (
                ""
                if error is None
                else f"; error where hidden {decimal(error, 2)} of the variance there (1 = no better than the mean)"
            )
            png = figures.reconstruction_png(shown, hidden, output, spacing_of(arrays, i))
            caption = f"Volume {len(parts) + 1}: {share}{said}."
            parts.append(image(png, f"Input, masked input, completed image and error in three planes, {share}", caption=caption))
    if not parts:
        return absent("No figures/reconstruction.npz was found.", "<code>medssl pretrain</code> writes one at its end.")
    lead = (
        "Blue blocks were hidden. “Completed” keeps what was visible and shows the output where it was hidden: the loss "
        "looks nowhere else. Error: blue too dark, orange too bright. Right of the patient is on the left."
    )
    return f"<p>{lead}</p>" + "".join(parts)


def hidden_error(shown: np.ndarray, hidden: np.ndarray, output: np.ndarray) -> float | None:
    """Return the mean squared error at hidden voxels over the variance of the input there; None when undefined.

    Args:
        shown: (X, Y, Z) input.
        hidden: (X, Y, Z) bool.
        output: (X, Y, Z) prediction.
    """
    truth, guess = shown[hidden].astype(np.float64), output[hidden].astype(np.float64)
    if truth.size == 0 or not np.isfinite(guess).all() or truth.var() <= 0:
        return None
    return float(((guess - truth) ** 2).mean() / truth.var())


def _segmentation(found: Leftovers, with_images: bool) -> str:
    if not with_images:
        return _no_images()
    arms = _one_group(found.segmentations)
    cases = _paired_cases(arms)
    if not cases:
        return absent("No figures/segmentation.npz was found.", "<code>medssl finetune</code> writes one.")
    parts: list[str] = []
    for cuts, structures, dice in cases[:MAX_CASES]:
        said = ", ".join(f"{text(arm)} {decimal(value, 2)}" for arm, value in dice.items() if value is not None)
        caption = f"Test case {len(parts) + 1}" + (f": mean Dice {said}." if said else ".")
        alt = f"Label and predictions over the image{'' if figures.PICTURE in cuts else ' in three planes'}: {', '.join(dice)}"
        parts.append(image(figures.segmentation_png(cuts, structures), alt, caption=caption))
    labels, seed = (text(word) for word in arms[0].group)
    of = f"Fine-tuned with {labels} labelled cases, seed {seed}. " if labels else ""
    lead = f"{of}The first test cases in the order of the cohort, not chosen by their result."
    return f"<p>{lead}</p>" + "".join(parts)


def _clips(found: Leftovers) -> str:
    parts = []
    for place, clip in enumerate(found.clips[:MAX_CASES], start=1):
        branches = ", ".join(clip.prototypes)
        of = f", and the prototypes that its tokens were assigned to ({text(branches)})" if branches else ""
        alt = f"Frames of a clip over time{of}"
        parts.append(image(clip_figures.strip_png(clip), alt, caption=f"Clip {place}: frames over time{of}."))
    if parts:
        lead = "Black is outside the sector. Blue squares were hidden from the student, at all times alike. A prototype has one colour throughout."
        parts.insert(0, f"<p>{lead}</p>")
    for name, target, predicted in found.regressions[:MAX_CASES]:
        light, dark = (clip_figures.scatter_png(target, predicted, theme) for theme in (figures.LIGHT, figures.DARK))
        caption = f"{text(name)}: predictions on patients of other folds. Dotted: always saying the mean."
        parts.append(image(light, "Predicted over measured values", dark=dark, caption=caption))
    return "".join(parts)


def _one_group(found: Sequence[Segmentation]) -> list[Segmentation]:
    """Return the runs of one number of labels and one seed: where most arms are, then the first in the folder."""
    groups: dict[tuple[str, ...], dict[str, Segmentation]] = {}
    for part in found:
        groups.setdefault(part.group, {}).setdefault(part.arm, part)
    best = max(groups.values(), key=len, default={})
    return sorted(best.values(), key=lambda part: part.arm != "scratch")


def _paired_cases(
    arms: Sequence[Segmentation],
) -> list[tuple[dict[str, figures.Cut], list[str], dict[str, float | None]]]:
    """Put the arms of the same test case side by side: cuts with one map per arm, structures, Dice per arm."""
    cases: list[tuple[dict[str, figures.Cut], list[str], dict[str, float | None]]] = []
    for part in arms:
        names = part.structures or [f"structure {k}" for k in range(1, 1 + _largest(part))]
        for case in part.cases:
            known = next((c for c in cases if part.arm not in c[2] and _same_image(c[0], case.cuts)), None)
            if known is None:
                maps = {plane: {"label": cut.maps["label"]} for plane, cut in case.cuts.items()}
                known = ({p: figures.Cut(c.image, maps[p], c.spacing_mm) for p, c in case.cuts.items()}, names, {})
                cases.append(known)
            cuts, _, dice = known
            for plane, cut in case.cuts.items():
                old = cuts[plane]
                cuts[plane] = figures.Cut(old.image, {**old.maps, part.arm: cut.maps["prediction"]}, old.spacing_mm)
            dice[part.arm] = case.dice
    return cases


def _largest(part: Segmentation) -> int:
    return max((int(labels.max()) for case in part.cases for cut in case.cuts.values() for labels in cut.maps.values()), default=0)


def _same_image(a: Mapping[str, figures.Cut], b: Mapping[str, figures.Cut]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[p].image, b[p].image, equal_nan=True) for p in a)


def _probes(found: Leftovers) -> str:
    if not found.evaluations:
        return absent(
            "No evaluate.json was found.", "<code>medssl evaluate</code> writes kNN and linear probes with their controls."
        )
    groups: dict[tuple[str, str, str], list[Json]] = {}
    for row in found.evaluations:
        about = (str(row.get("target") or row.get("task") or ""), str(row.get("probe") or ""), str(row.get("metric") or ""))
        groups.setdefault(about, []).append(row)
    parts = []
    for about, rows in groups.items():
        estimates = [Estimate(*(number(row.get(key)) for key in ("value", "low", "high"))) for row in rows]
        low, high = span_of(estimates)
        cells = []
        for row, estimate in zip(rows, estimates):
            control = any(word in str(row.get("name", "")).lower() for word in _CONTROLS)
            name = text(row.get("name", "–")) + (' <small class="tag">control</small>' if control else "")
            kind = "scratch" if control else "pretrained"
            drawing = interval_svg([(kind, estimate)], low, high)
            counts = [plain(row.get("n_images")), plain(row.get("n_patients"))]
            cells.append([name, written(estimate), drawing, *counts])
        scale = f"<small>{decimal(low, 2)} … {decimal(high, 2)}</small>"
        caption = ", ".join(text(part.replace("_", " ")) for part in about if part)
        by_image = any(row.get("by") == BY_CASE for row in rows)
        caption += ". Intervals by image: no patients are known." if by_image else ". Intervals by patient."
        parts.append(table(["features", "value", scale, "images", "patients"], cells, caption=caption))
    if not any(word in str(row.get("name", "")).lower() for row in found.evaluations for word in _CONTROLS):
        parts.append('<p class="warn">No control is among these rows: compare with random weights before reading them.</p>')
    return "".join(parts)


def _data(found: Leftovers) -> str:
    parts = []
    for summary in found.archives:
        reasons = _mapping(summary.get("reasons"))
        rows = [("files seen", plain(summary.get("n_files_seen"))), ("files used", plain(summary.get("n_files_used")))]
        rows += [(f"left out: {text(name).replace('_', ' ')}", plain(count)) for name, count in reasons.items()]
        rows.append(("image series", plain(summary.get("n_series"))))
        for key in ("domains", "splits"):
            if _mapping(summary.get(key)):
                rows.append((key, plain(summary[key])))
        parts.append(table(["index", ""], rows, numeric=False))
        total = [number(v) for v in (summary.get("n_files_used"), *reasons.values())]
        seen = number(summary.get("n_files_seen"))
        if seen is not None and None not in total and sum(v for v in total if v is not None) != seen:
            parts.append('<p class="warn">Files used and files left out do not add up to files seen: index again.</p>')
    items = _mapping(found.run.get("items"))
    if items:
        rows = [(f"items {key}" if key == "used" else text(key), plain(items[key])) for key in ("used", "patients") if key in items]
        rows += [(f"failed: {text(name).replace('_', ' ')}", plain(count)) for name, count in _mapping(items.get("failed")).items()]
        parts.append(table(["pretraining", ""], rows, numeric=False))
    for cache in found.caches:
        failed = _mapping(cache.get("failed"))
        counts: dict[str, int] = {}
        for reason in failed.values():
            name = str(reason[0]) if isinstance(reason, (list, tuple)) and reason else str(reason)
            counts[name] = counts.get(name, 0) + 1
        rows = [(key, plain(cache.get(key))) for key in ("written", "present")]
        rows += [(f"failed: {text(name).replace('_', ' ')}", plain(count)) for name, count in counts.items()]
        parts.append(table(["store", ""], rows, numeric=False))
    for key in ("index", "cache", "data", "cohort"):
        value = found.demo.get(key)
        if isinstance(value, Mapping):
            rows = [(text(str(k).replace("_", " ")), plain(v)) for k, v in value.items() if str(k).lower() not in PRIVATE_KEYS]
            parts.append(table([key, ""], rows, numeric=False))
    if not parts:
        return absent("No index or store summary was found.", "Counts of files used and left out are unknown to this page.")
    return f'<div class="columns">{"".join(parts)}</div>'


def _caveats(found: Leftovers, lines: Sequence[Comparison], with_images: bool) -> str:
    said = [
        "Research only. Nothing here was tested for diagnosis, and no number here is a claim about patients elsewhere.",
        "Intervals describe chance among these test patients. They know nothing of other scanners, sites or readers.",
    ]
    few = min((line.n_test for line in lines if line.n_test), default=None)
    if few is not None and few < 20:
        said.append(f"Only {few} test cases: a difference of one or two Dice points may well be chance with so few.")
    if lines and all((line.seeds or 1) < 3 for line in lines):
        said.append("Fewer than 3 training seeds: with few labels the seed alone can move Dice by more than the method.")
    status = found.run.get("status")
    if status and status not in ("finished", "done"):
        said.append(f"The pretraining run is not finished (status: {status}); what came after it used what there was.")
    if any(result.get("overlap") or result.get("leakage") for result in [*found.results, *found.evaluations]):
        said.append("Patients or images are in both pretraining and test data; the result was asked for all the same.")
    said.append(
        "Runs, stores and weights are pseudonymised personal data unless their source was public or generated."
        + (" This page shows images of patients: keep it where those images may be." if with_images else "")
    )
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in said) + "</ul>"
