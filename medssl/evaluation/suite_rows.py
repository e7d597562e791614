"""The rows of a suite: one number each, with its interval; tables of models side by side, and what was skipped and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medssl.evaluation.aggregate import aggregate
from medssl.evaluation.aggregate import pairs as pairs_of

WEIGHTS, TWIN = "weights", "scratch"
CONTROLS = ("random_init", "raw_pixels", "intensity_statistics")
MODELS = (WEIGHTS, TWIN, *CONTROLS)
BASELINE = "self-configuring"
"""Stands in the table of its task alone; models are not aggregated with it, so that switching it on moves no other number."""
LOWER = ("mae", "brier", "ece", "hd95_mm", "alignment", "uniformity", "reidentified", "leakage")
"""Metrics of which less is better."""
TIERS = {
    "smoke": "Smoke: rank of features, uniformity, alignment, neighbours",
    "frozen": "Frozen: neighbours, logistic probe, few labels",
    "classification": "Fine-tuned: label curves of classes",
    "segmentation": "Segmentation",
    "detection": "Detection",
    "retrieval": "Retrieval, other patients only",
    "regression": "Numbers and survival",
    "ood": "Other sites, other scanners, corrupted images",
    "fairness": "Subgroups, and what features leak",
}
"""The nine tiers, in the order of the card evaluation-protocols, section D."""

Row = dict[str, Any]


def row_of(
    score: Mapping[str, Any],
    tier: str,
    task: str,
    setting: str,
    *,
    seeds: int = 1,
    subgroup: str | None = None,
    main: bool = False,
) -> Row:
    """Return a row of the suite from one of `scores.score_row`; `main` rows are what models are aggregated by."""
    model = WEIGHTS if score["name"] in ("encoder", "pretrained") else str(score["name"])
    return {
        "task": task,
        "tier": tier,
        "setting": setting,
        "metric": score["metric"],
        "model": model,
        "subgroup": subgroup,
        "value": score["value"],
        "low": score["low"],
        "high": score["high"],
        "n": score["n_images"],
        "patients": score["n_patients"],
        "seeds": seeds,
        "main": main,
    }


def skip(task: str, what: str, why: str) -> dict[str, str]:
    """Return an entry of what was left out."""
    return {"task": task, "what": what, "why": why}


def tables(
    rows: Sequence[Row], skipped: Mapping[str, Sequence[Mapping[str, str]]], plans: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Return one entry per tier: its tables (one per task, models side by side, controls and scratch twin in each), what was skipped, and plans.

    A frozen table has the fine-tuned score of the same task below it, where there is one: the scratch twin has no other.
    """
    found = []
    for tier, title in TIERS.items():
        own = [row for row in rows if row["tier"] == tier]
        parts = []
        for task in dict.fromkeys(row["task"] for row in own):
            lines = _lines([row for row in own if row["task"] == task])
            if tier not in ("classification", "segmentation", "detection"):
                twin = [r for r in rows if r["task"] == task and r["model"] == TWIN and r["main"] and r["tier"] != tier]
                about = {(r["tier"], r["setting"], r["metric"]) for r in twin}
                again = [r for r in rows if r["task"] == task and (r["tier"], r["setting"], r["metric"]) in about]
                lines += [{**line, "what": f"for comparison, fine-tuned: {line['what']}"} for line in _lines(again)]
            others = {row["model"] for row in own if row["task"] == task} - set(MODELS)
            models = [WEIGHTS, TWIN, *({BASELINE} & others), *CONTROLS, *sorted(others - {BASELINE})]
            parts.append({"task": task, "models": models, "lines": lines})
        said = [_planned(plan, plans) for plan in plans if plan["tier"] == tier]
        left_out = [dict(s) for s in skipped.get(tier, ())]
        found.append({"tier": tier, "title": title, "tables": parts, "skipped": left_out, "plans": said})
    return found


def _planned(plan: Mapping[str, Any], plans: Sequence[Mapping[str, Any]]) -> str:
    """Return a plan as words, with the number of its cells where others of as many labels have another plan, as folds may."""
    alike = [other for other in plans if (other["task"], other["labels"]) == (plan["task"], plan["labels"])]
    several = f", {plan['cells']} of {sum(other['cells'] for other in alike)} trainings" if len(alike) > 1 else ""
    return f"{plan['task']}, {plan['labels']} labels{several}: {plan['sentence']}"


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["setting"], row["metric"], row["subgroup"] or "")
        words = [part for part in (row["setting"], row["metric"], row["subgroup"] or "") if part]
        line = lines.setdefault(
            key, {"what": ", ".join(words), "n": row["n"], "patients": row["patients"], "seeds": row["seeds"], "cells": {}}
        )
        line["cells"][row["model"]] = {name: row[name] for name in ("value", "low", "high")}
        if row["seeds"] != line["seeds"]:
            line["cells"][row["model"]]["seeds"] = row["seeds"]
    return list(lines.values())


def overall(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return mean z-score and mean rank of each model over the main rows, with tasks that it has and misses (see `aggregate`).

    `z` weighs tasks alike; `z_modality` is the mean over modalities of the means over their tasks, so that one with many tasks weighs no more
    than another. The modality of a row is the domain that read its images.
    """
    table, kinds = _main(rows), {_name(row): str(row.get("modality")) for row in rows}
    higher = {name: name.rpartition(", ")[2] not in LOWER for name in table}
    alike = {row["model"]: row["z"] for row in aggregate(table, higher, kinds)}
    return [{**row, "z_modality": alike[row["model"]]} for row in aggregate(table, higher)]


def pairs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the differences of main rows that two models alone have, which `overall` leaves out (see `aggregate.pairs`)."""
    return pairs_of(_main(rows))


def _main(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return task, setting and metric -> model -> value of the main rows."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["main"] and row["subgroup"] is None and row["value"] is not None and row["model"] in MODELS:
            table.setdefault(_name(row), {})[row["model"]] = row["value"]
    return table


def _name(row: Row) -> str:
    words = [part for part in (row["task"], row["setting"], row["metric"]) if part]
    return f"{row['tier']}: {', '.join(words)}"


def markdown(
    tiers: Sequence[Mapping[str, Any]],
    totals: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    two: Sequence[Mapping[str, Any]] = (),
    stated: Sequence[str] = (),
) -> str:
    """Render tables, aggregate, comparisons, the tasks of two models and sentences on weights and images (`stated_lines`) as Markdown."""
    lines = [
        "# Evaluation suite",
        "",
        "Research only. Brackets: 95 % interval by patient. A dash: not run, see below each table.",
        "",
        *(part for line in stated for part in (line, "")),
    ]
    lines += [
        "## Over all tasks",
        "",
        "| model | mean z | mean z, modalities alike | mean rank | tasks | missing |",
        "|---" * 6 + "|",
    ]
    for row in totals:
        z = f"{_signed(row['z'])} | {_signed(row.get('z_modality'))}"
        lines.append(f"| {row['model']} | {z} | {_plain(row['rank'], 1)} | {row['tasks']} | {row['missing']} |")
    lines += [""] if two else []
    lines += [f"- not in z and rank, of two models only: {_pair(entry)}" for entry in two]
    if comparisons:
        lines += ["", "| weights against | task | difference (95 % interval) | after Holm |", "|---|---|---|---|"]
    for row in comparisons:
        lines.append(f"| {row['against']} | {row['task']} | {_cell(row)} | {row['verdict']} |")
    for tier in tiers:
        lines += ["", f"## {tier['title']}", ""]
        for part in tier["tables"]:
            models = part["models"]
            lines += [
                f"**{part['task']}**",
                "",
                f"| score | {' | '.join(models)} | n | patients | seeds |",
                "|---" * (len(models) + 4) + "|",
            ]
            for line in part["lines"]:
                cells = " | ".join(
                    _cell(line["cells"][m]) + _seeds(line["cells"][m]) if m in line["cells"] else "-" for m in models
                )
                lines.append(f"| {line['what']} | {cells} | {line['n']} | {_plain(line['patients'], 0)} | {line['seeds']} |")
            lines.append("")
        lines += [f"- {sentence}" for sentence in tier["plans"]]
        lines += [f"- skipped: {s['task'] + ', ' if s['task'] else ''}{s['what']}: {s['why']}" for s in tier["skipped"]]
        if not tier["tables"] and not tier["skipped"]:
            lines.append("- not run: the recipe leaves this tier out (key tiers)")
    return "\n".join(lines)


def _pair(entry: Mapping[str, Any]) -> str:
    """Return a task of two models as words."""
    first, second = entry["models"]
    return f"{entry['task']}: {first} minus {second} {entry['difference']:+.3f}"


def _cell(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return "insufficient"
    if cell["low"] is None or cell["high"] is None:
        return f"{cell['value']:.3f}"
    return f"{cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})"


def _seeds(cell: Mapping[str, Any]) -> str:
    """Return how many seeds a cell has, where that is not what its line has."""
    return f" [seeds: {cell['seeds']}]" if "seeds" in cell else ""


def _plain(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
