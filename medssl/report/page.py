"""One self-contained HTML page from what runs left behind: no scripts, nothing fetched, readable on paper.

Everything a file says is escaped. Paths, links, host and user names are left out, cases are numbered instead of named,
and without `with_images` no patient's image is even read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.report.collect import Json, Leftovers, collect, number
from medssl.report.elements import (
    PRIVATE_KEYS,
    Section,
    absent,
    decimal,
    duration,
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
from medssl.report.page_curves import label_curves, training_curves
from medssl.report.page_pictures import pictures
from medssl.weights import card_lines, stated_lines, write_atomic

log = logging.getLogger(__name__)

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
    shown = pictures(found, with_images)
    probed = Section("probes", "Probes and controls", _probes(found))
    if found.only_evaluated:
        sections = [probed, *shown]
    else:
        training = [
            Section("result", "Result", _result(found, lines)),
            Section("ran", "What ran", _what_ran(found)),
            Section("curves", "Loss and monitors", training_curves(found)),
        ]
        sections = [*training, *shown, probed, Section("data", "Data", _data(found))]
    sections.append(Section("caveats", "Before you use this", _caveats(found, lines, with_images)))
    privacy = "Private: shows images of patients." if with_images else "Without images of patients."
    about = [_name(found.manifest[key]) for key in ("objective", "encoder") if found.manifest.get(key)]
    subject = f": {', '.join(about)}" if about else ""
    lead = f"Self-supervised pretraining, and what it was worth. Research only, not for diagnosis. {privacy}"
    footer = "Made by medssl from the files of one folder."
    return whole_page("medssl report", f"medssl report{subject}", lead, sections, footer=footer, before=_faults(found))


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
    facts = dict.fromkeys(str(sentence) for curve in found.curves for sentence in curve.get("label_facts") or ())
    said = "".join(f"<li>{text(sentence)}</li>" for sentence in facts)
    about = f"<p>Of the label maps, in training, validation and test:</p><ul>{said}</ul>" if said else ""
    parts = [sentences, table(head, rows, caption=caption), about, label_curves(found), _structures(found)]
    return "\n".join(part for part in parts if part)


def _as_it_stands(raw: Any) -> str:
    """Print a table whose columns the page does not know."""
    rows = [row for row in raw if isinstance(row, dict)] if isinstance(raw, list) else []
    if not rows:
        return absent("demo.json holds a table in a form that this page does not know.", "Its raw numbers are in that file.")
    columns = list(dict.fromkeys(key for row in rows for key in row if str(key).lower() not in PRIVATE_KEYS))
    return table([text(c) for c in columns], [[plain(row.get(c)) for c in columns] for row in rows])


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


def _what_ran(found: Leftovers) -> str:
    parts = []
    rows = _facts(found.run, _RUN_KEYS)
    if found.metrics and not {"steps", "steps done"} & {name for name, _ in rows}:
        steps = [step for row in found.metrics if (step := number(row.get("step"))) is not None]
        rows += [("steps done", plain(int(max(steps))))] if steps else []
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


def _name(part: Any) -> str:
    """Return the name of an objective or encoder of a manifest without its arguments."""
    return plain(part["name"] if isinstance(part, dict) and "name" in part else part)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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
        by_image = [row.get("by") == BY_CASE for row in rows]
        caption += (
            ". Intervals by image, as not all patients are known."
            if all(by_image)
            else ". Intervals by patient; by image in the rows without a number of patients, where not all are known."
            if any(by_image)
            else ". Intervals by patient."
        )
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
    every = [*found.results, *found.evaluations]
    said += stated_lines({key: [one for result in every for one in result.get(key) or ()] for key in ("forced", "adapted")})
    said.append(
        "Runs, stores and weights are pseudonymised personal data unless their source was public or generated."
        + (" This page shows images of patients: keep it where those images may be." if with_images else "")
    )
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in said) + "</ul>"
