"""The page of an evaluation suite: all models side by side, tier by tier, and what was skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medssl.report.elements import Section, decimal, plain, table, text, whole_page, written
from medssl.report.headline import Estimate
from medssl.weights import stated_lines

_STYLE = """
table.numbers tbody th{min-width:200px}
td small{display:block}
ul.skipped{color:var(--soft);font-size:14px;margin:4px 0 0;padding-left:20px}
.insufficient{color:var(--soft);font-style:italic}
"""
_MODELS = {
    "weights": "these weights",
    "scratch": "scratch twin",
    "self-configuring": "self-configuring network",
    "random_init": "untrained encoder",
    "raw_pixels": "raw pixels",
    "intensity_statistics": "intensity statistics",
    "chance": "chance",
}
_WORDS = {"auroc": "AUC", "r2": "R²", "mae": "mean absolute error", "concordance": "concordance index"}
_SHOWN = 12  # lines of a table that are open at once


def suite_page(result: Mapping[str, Any]) -> str:
    """Return the page as text.

    Args:
        result: What `results.json` of a suite holds, and `tables` (`evaluation.suite_rows.tables`).
    """
    sections = [Section("overall", "Over all tasks", _overall(result))]
    sections += [
        Section(tier["tier"], str(tier["title"]), _tier(tier)) for tier in result["tables"] if tier["tables"] or tier["skipped"]
    ]
    sections += [
        Section("set", "What was evaluated on", _set(result)),
        Section("caveats", "Before you quote this", _caveats(result)),
    ]
    lead = f"Frozen and fine-tuned {text(result['encoder'])} beside its controls and its scratch twin. Research only, not for diagnosis."
    footer = "Made by medssl from one evaluation suite."
    return whole_page("medssl evaluation suite", "Evaluation suite", lead, sections, footer=footer, style=_STYLE)


def _model(name: Any) -> str:
    return text(_MODELS.get(str(name), str(name).replace("_", " ")))


def _overall(result: Mapping[str, Any]) -> str:
    cells = []
    for row in result["aggregate"]:
        cells.append(
            [
                _model(row["model"]),
                decimal(row["z"], 2, sign=True),
                decimal(row.get("z_modality"), 2, sign=True),  # earlier suites have none
                decimal(row["rank"], 1),
                plain(row["tasks"]),
                plain(row["missing"]),
            ]
        )
    caption = (
        "z: score minus the mean over models, over their standard deviation, signed so that higher is better; mean over tasks, and with "
        "modalities alike the mean over modalities of the means over their tasks. It depends on which models stand in the table. Missing "
        "cells are counted and not filled in."
    )
    parts = (
        [table(["model", "mean z", "modalities alike", "mean rank", "tasks", "missing"], cells, caption=caption)] if cells else []
    )
    lines = []
    for row in result["comparisons"]:
        words = {"win": "better", "loss": "worse"}.get(row["verdict"], row["verdict"])
        value = written(Estimate(row["value"], row["low"], row["high"]), sign=True)
        lines.append([f"{text(row['tier'])}: {text(row['task'])}", _model(row["against"]), value, text(words)])
    if lines:
        said = "Weights minus control, paired over test patients; all lines tested together (Holm, 5 %)."
        parts.append(table(["task", "against", "difference (95 % interval)", "these weights are"], lines, caption=said))
    two = "".join(
        f"<li>{text(entry['task'])}: {' minus '.join(map(_model, entry['models']))} {decimal(entry['difference'], sign=True)}</li>"
        for entry in result.get("pairs", ())
    )
    if two:
        parts.append(f'<p>Not in z and rank, because two models alone have it:</p><ul class="skipped">{two}</ul>')
    return "".join(parts) or '<p class="absent">No tier had a number that models can be compared by.</p>'


def _tier(tier: Mapping[str, Any]) -> str:
    parts = []
    for part in tier["tables"]:
        models = [str(name) for name in part["models"]]
        head = [f"<b>{text(part['task'])}</b>", *map(_model, models), "n", "patients", "seeds"]
        rows = [_line(line, models) for line in part["lines"]]
        parts.append(table(head, rows[:_SHOWN]))
        if len(rows) > _SHOWN:
            parts.append(f"<details><summary>{len(rows) - _SHOWN} further lines</summary>{table(head, rows[_SHOWN:])}</details>")
    parts += [f"<p>{text(sentence)}</p>" for sentence in tier.get("plans", ())]
    items = "".join(f"<li>{_skipped(entry)}</li>" for entry in tier["skipped"])
    return "".join(parts) + (f'<ul class="skipped">{items}</ul>' if items else "")


def _line(line: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    words = [_WORDS.get(word, word) for word in str(line["what"]).split(", ")]
    cells = [text(", ".join(words).replace("_", " "))]
    for model in models:
        cell = line["cells"].get(model)
        if cell is None:
            cells.append("–")
        elif cell["value"] is None:
            cells.append('<span class="insufficient">insufficient</span>')
        elif cell["low"] is None or cell["high"] is None:
            cells.append(
                decimal(cell["value"])
                if abs(cell["value"]) >= 0.001 or cell["value"] == 0
                else plain(float(f"{cell['value']:.1g}"))
            )
        else:
            cells.append(written(Estimate(cell["value"], cell["low"], cell["high"])))
        if cell is not None and "seeds" in cell:  # not those of the line
            cells[-1] += f" <small>[seeds: {plain(cell['seeds'])}]</small>"
    return [*cells, plain(line["n"]), plain(line["patients"]), plain(line["seeds"])]


def _skipped(entry: Mapping[str, str]) -> str:
    about = f"{text(entry['task'])}, " if entry["task"] else ""
    return f"skipped: {about}{text(entry['what'].replace('_', ' '))}: {text(entry['why'])}"


def _set(result: Mapping[str, Any]) -> str:
    rows = [
        [
            text(name),
            text(task["task"]),
            *(plain(task["cases"][split]) for split in ("train", "val", "test")),
            text(", ".join(task["classes"]) or "–"),
        ]
        for name, task in result["tasks"].items()
    ]
    said = f"Leakage check: {result['leakage_check']}. Seed {result['seed']}. Weights {str(result['weights'])[:16]}."
    stated = "".join(f'<p class="warn">{text(line)}</p>' for line in stated_lines(result))
    return stated + table(["task", "kind", "train", "val", "test", "classes"], rows, caption=text(said).replace("_", " "))


def _caveats(result: Mapping[str, Any]) -> str:
    said = [
        "Research only. Nothing here was tested for diagnosis.",
        "Fitted on training, chosen on validation, scored on test cases; neighbours, retrieval and leakage take validation and test cases.",
        "Brackets are 95 % intervals by bootstrap over patients: chance among these patients, not other hospitals.",
        "Subgroups with fewer than 50 cases, or 10 of either class, have no number. A gap without a number is no evidence of fairness.",
        "The groups of a gap or an equalised-odds difference were picked on these same data, which makes it too large; its interval leaves that out.",
        "Equalised odds: the larger difference in true- or false-positive rate, at the threshold of 95 % specificity on validation cases.",
        "The scratch twin exists where a network is fine-tuned; in frozen tables its fine-tuned score stands in the last lines.",
    ]
    if "not checked" in str(result["leakage_check"]):
        said.append("Whether the weights have seen these patients could not be checked.")
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in said) + "</ul>"
