"""The parts of the clinical page that are of detection alone: sensitivity at fixed false positives, and the worst cases with their boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl.report.box_figures import BoxCut, boxes_png
from medssl.report.elements import charts, decimal, image, plain, table, text, written
from medssl.report.figures import Chart, Line
from medssl.report.headline import Estimate

Facts = Mapping[str, Any]
HEAD = ["case", "F1", "objects", "found", "missed", "found for nothing", "outside the training range"]
_EARLIER = "these results are of an earlier medssl, which fitted none"


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate(row.get("value"), row.get("low"), row.get("high"))


def sensitivity(facts: Facts, names: Mapping[str, str]) -> str:
    """Return FROC as a table and a chart, and what the fitted threshold gives on test cases.

    Args:
        facts: What `evaluation.clinical.clinical_facts` returned.
        names: Arm -> what it is called on the page.
    """
    found, unit = facts["sensitivity"], str(facts["unit"])
    arms = {row["arm"]: row for row in found["froc"]}
    first = found["froc"][0]
    lines = [[f"at most {text(rate)}", *(written(_estimate(row["at"][rate])) for row in arms.values())] for rate in first["at"]]
    lines.append(["<b>mean of these</b>", *(written(_estimate(row)) for row in arms.values())])
    head = [f"false positives per {unit}", *(f"sensitivity, {text(names[arm])} (95 % interval)" for arm in arms)]
    caption = (
        f"Share of the {plain(first['n_boxes'])} objects in {plain(first['n'])} test {unit}s that is found, all classes together, where the score "
        f"threshold allows so many false positives. An object counts as found from an overlap (IoU) of {plain(found['overlap'])}."
    )
    return table(head, lines, caption=caption) + _chart(arms, names, unit) + _operating(found, names, unit)


def _chart(arms: Mapping[str, Any], names: Mapping[str, str], unit: str) -> str:
    lines = []
    for k, (arm, row) in enumerate(arms.items()):
        x = np.array([float(rate) for rate in row["at"]])
        y, low, high = (
            np.array([np.nan if at[key] is None else at[key] for at in row["at"].values()]) for key in ("value", "low", "high")
        )
        lines.append(Line(names[arm], x, y, low, high, colour=1 if arm == "scratch" else 0 if not k else 2))
    chart = Chart("sensitivity", lines, x_label=f"false positives per {unit}", log_x=True)
    alt = "Sensitivity over false positives with bands of its 95 % intervals; the same numbers as in the table above"
    return charts([chart], alt, columns=1, panel=(4.6, 2.6))


def _operating(found: Facts, names: Mapping[str, str], unit: str) -> str:
    if not found["rows"]:
        why = "not every network had validation cases" if found.get("asked", True) else _EARLIER
        return f"<p>No threshold was fitted: {why}. Each line above has thresholds of its own, read from these same test cases.</p>"
    words = {"sensitivity": "sensitivity", "false_positives": f"false positives per {unit}"}
    cells = [[words[row["metric"]], text(names[row["arm"]]), written(_estimate(row)), plain(row["n"])] for row in found["rows"]]
    scores = ", ".join(f"{text(names[arm])} {_scores(values)}" for arm, values in found["threshold"].items())
    caption = (
        f"At one score threshold (by network: {scores}), fitted on validation cases alone to at most {plain(found['rate'])} false positive per "
        f"{unit} there; on the test cases the false positives are what came of it, so read both lines together."
    )
    return table(["", "network", "on test (95 % interval)", f"{unit}s"], cells, caption=caption)


def _scores(values: Sequence[float]) -> str:
    return decimal(values[0], 3) if len(values) == 1 else f"{decimal(min(values), 3)} to {decimal(max(values), 3)} over the folds"


def worst_cells(row: Mapping[str, Any], place: int) -> list[str]:
    """Return the cells of one of the worst cases, as of `HEAD`."""
    counts = [plain(row[key]) for key in ("objects", "right", "missed", "wrong")]
    return [f"{place}. {text(row['case'])}", decimal(row["f1"], 2), *counts, text("; ".join(row["outside"])) or "–"]


def threshold_sentence(facts: Facts) -> str:
    """Say at which threshold single cases were counted."""
    rows, unit = facts["worst"]["rows"], facts["unit"]
    if not rows:
        return ""
    if all(row["fitted"] for row in rows):
        how = "at the score threshold that was fitted on validation cases"
    else:
        why = "as there were no validation cases" if all(row["asked"] for row in rows) else f"as {_EARLIER}"
        how = f"at the score threshold at which these test cases have at most one false positive per {unit}, {why}"
    return (
        f" Counted {how}. F1: twice what was found rightly over objects and found boxes together; 1 is without error. Cases in which an object "
        "is missed come first, of equal ones those with most errors. An object found as another class is missed, and found for nothing."
    )


def worst_picture(row: Mapping[str, Any], cuts: Mapping[str, BoxCut]) -> str:
    """Return the picture of one of the worst cases."""
    said = f"{row['case']}: {row['missed']} missed, {row['wrong']} found for nothing."
    if "picture" not in cuts:
        said += " Slices through an object that was missed, else through one found for nothing."
    return image(boxes_png(dict(cuts)), f"Boxes that are there and boxes found in {row['case']}", caption=text(said))
