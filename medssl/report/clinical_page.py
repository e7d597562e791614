"""The page of a fine-tuned network for those who would use it: how sure the number is first, then where it fails.

It draws what `evaluation.clinical` computed. Cases go by code; nothing on the page is a name, and without pictures it shows no image of
a patient. Its rows are of single patients all the same, so it is for those who may see the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.report import clinical_boxes, clinical_figures, figures
from medssl.report.elements import Section, absent, decimal, image, interval_svg, plain, span_of, table, text, whole_page, written
from medssl.report.headline import Estimate

Facts = Mapping[str, Any]

_STYLE = """
#glance .main{font-size:22px;font-weight:600;margin:0 0 2px}
#glance .how{color:var(--soft);margin:0 0 14px}
.flag{border:1px solid var(--warn);color:var(--warn);border-radius:8px;padding:0 6px;white-space:nowrap}
table td.long{white-space:normal;min-width:260px}
"""
_NAMES = {
    "sex": "sex",
    "age_band": "age (years)",
    "vendor": "scanner vendor",
    "site": "site",
    "field_strength_t": "field strength (tesla)",
    "contrast_state": "contrast agent",
    "kernel_class": "kernel",
    "body_region": "body region",
    "view": "view",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "spacing": "voxel size",
    "knn": "distance to the training cases",
}


_FEW = 10  # groups below it are not counted out
_OPEN, _PICTURED = 6, 3  # plots and pictures that are not folded away
_FIXED = {"detection": "fixed false positives"}
_NOT_ASKED = {
    "segmentation": ("sensitivity", "calibration"),
    "classification": ("structures", "agreement"),
    "regression": ("structures", "sensitivity", "calibration"),
    "detection": ("structures", "agreement", "calibration"),
}
"""Questions that a task has no answer to: the last section says so in one line."""


def clinical_page(facts: Facts, *, pictures: Mapping[str, Mapping[str, Any]] | None = None, structures: Sequence[str] = ()) -> str:
    """Return the page as text.

    Args:
        facts: What `evaluation.clinical.clinical_facts` returned.
        pictures: Case code -> plane -> slice of the worst cases: with the maps `label` and `prediction` (`figures.Cut`), or with boxes
            (`box_figures.BoxCut`); None shows no patient.
        structures: Names of the label values from 1, for pictures.
    """
    asked = [
        Section("structures", "Structures", _structures(facts)),
        Section("agreement", _title_of_agreement(facts), _agreement(facts)),
        Section("sensitivity", f"Sensitivity at {_FIXED.get(facts['task'], 'a fixed operating point')}", _sensitivity(facts)),
        Section("calibration", "Calibration", _calibration(facts)),
    ]
    sections = [
        Section("glance", "At a glance", _glance(facts)),
        *(part for part in asked if part.id not in _NOT_ASKED[facts["task"]]),
        Section("worst", "The ten worst cases", _worst(facts, pictures, structures)),
        Section("subgroups", "Failures by subgroup", _subgroups(facts)),
        Section("outside", "Cases outside the training range", _outside(facts)),
        Section("caveats", "Before you use this", _caveats(facts, pictures is not None)),
    ]
    privacy = "Private: shows images of patients." if pictures is not None else "Without images of patients."
    lead = f"A fine-tuned network on its test patients. Research only, not for diagnosis. {privacy}"
    footer = "Made by medssl from the results of one fine-tuning."
    return whole_page(
        f"medssl {facts['task']}",
        f"{text(str(facts['task']).capitalize())}: what to expect of this network",
        lead,
        sections,
        footer=footer,
        style=_STYLE,
    )


def read_worst(path: Path) -> tuple[dict[str, dict[str, figures.Cut]], list[str]]:
    """Return the pictures in a `figures/worst.npz`, by case code and plane, and the structures; nothing where the file cannot be read."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        values = [int(v) for v in arrays["values"]]
        found: dict[str, dict[str, figures.Cut]] = {}
        for place, case in enumerate(arrays["case"]):
            cuts = {}
            for plane in [figures.PICTURE] if f"{place}_{figures.PICTURE}_image" in arrays else figures.PLANES:
                image_, label, guess, spacing = (
                    arrays[f"{place}_{plane}_{part}"] for part in ("image", "label", "prediction", "spacing_mm")
                )
                maps = {"label": _ranked(label, values), "prediction": _ranked(guess, values)}
                cuts[plane] = figures.Cut(image_, maps, (float(spacing[0]), float(spacing[1])))
            found[str(case)] = cuts
        return found, [str(name) for name in arrays["structures"]]
    except Exception:  # zip, npy header, a missing array: a page without these pictures is still a page
        return {}, []


def _ranked(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    found = np.zeros(label.shape, dtype=np.int64)
    for place, value in enumerate(values, start=1):
        found[label == value] = place
    return found


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate(row.get("value"), row.get("low"), row.get("high"))


def _arm(name: Any) -> str:
    return {"scratch": "from scratch"}.get(str(name), str(name))


def headline(row: Mapping[str, Any], metric: str) -> str:
    """Return one score in words, how wide its interval is before how many patients it is of."""
    value = _number(row["value"], metric)
    n = row["n_patients"]
    who = f"{n} patient{'' if n == 1 else 's'}" if n is not None else f"{row['n_cases']} cases (not all patients known)"
    if row["low"] is None or row["high"] is None:
        return f"{metric} {value}, no interval, {who}"
    low, high, width = (_number(v, metric) for v in (row["low"], row["high"], width_of(row, metric)))
    return f"{metric} {value}, interval {low} to {high} (width {width}), {who}"


def width_of(row: Mapping[str, Any], metric: str) -> float | None:
    """Return the width of an interval, between its ends as they are written."""
    if row["low"] is None or row["high"] is None:
        return None
    digits = 6 if metric == "Mean absolute error" else 2
    return float(round(row["high"], digits) - round(row["low"], digits))


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return plain(float(value)) if metric == "Mean absolute error" else decimal(value, 2)


def _glance(facts: Facts) -> str:
    metric, rows = str(facts["metric"]), facts["headlines"]
    main = next(row for row in rows if row["arm"] == facts["arm"] and row["labels"] == facts["labels"])
    seeds = f"{main['seeds']} seed{'' if main['seeds'] == 1 else 's'}"
    units = "patients" if main["n_patients"] is not None else "cases, as not all patients are known"
    how = f"{_arm(main['arm'])}, fine-tuned on {main['labels']} labelled cases, {seeds}. 95 % interval by bootstrap over {units}."
    if facts.get("folds"):
        how += f" The test cases of {facts['folds']} folds are taken together; each was tested by the network that had not seen its patient."
    how += " A wide interval means: with other patients of the same kind this number could have been any of these."
    parts = [f'<p class="main">{text(headline(main, metric))}</p><p class="how">{text(how)}</p>']
    low, high = span_of(_estimate(row) for row in rows)
    if metric != "Mean absolute error":
        low, high = max(low, 0.0), min(high, 1.0)
    cells = []
    for row in rows:
        width = width_of(row, metric)
        kind = "scratch" if row["arm"] == "scratch" else "pretrained"
        cells.append(
            [
                f"{text(row['labels'])} labels, {text(_arm(row['arm']))}",
                _number(width, metric),
                written(_estimate(row)),
                interval_svg([(kind, _estimate(row))], low, high),
                plain(row["n_patients"]),
                plain(row["n_cases"]),
                plain(row["seeds"]),
            ]
        )
    scale = f"<small>{decimal(low, 2)} … {decimal(high, 2)}</small>"
    head = ["network", "interval width", f"{text(metric)} (95 % interval)", scale, "patients", "cases", "seeds"]
    outside = facts["outside"]
    if "n" in outside:
        flagged = len(outside["rows"])
        parts.append(f'<p>{flagged} of {outside["n"]} test cases lie <a href="#outside">outside the training range</a>.</p>')
    parts += [f'<p class="warn">{text(line)}</p>' for line in facts.get("forced", ())]
    return "".join([parts[0], table(head, cells), *parts[1:]])


def _title_of_agreement(facts: Facts) -> str:
    """Return the heading: volumes, areas of pictures, or agreement of numbers."""
    if facts["task"] != "segmentation":
        return "Agreement"
    found = facts["agreement"]
    flat = any(row["unit"] == "mm2" for row in found.get("rows", [])) or "pictures" in found.get("why", "")
    return "Areas" if flat else "Volumes"


def _structures(facts: Facts) -> str:
    cells: list[list[str]] = []
    if "why" in facts["structures"]:
        return absent("Not shown:", text(facts["structures"]["why"]))
    for row in facts["structures"]["rows"]:
        dice, distance = row["dice"], row["hd95_mm"]
        cells.append(
            [
                text(str(row["structure"]).replace("_", " ")),
                text(_arm(row["arm"])),
                written(_estimate(dice)),
                written_mm(distance),
                plain(dice["n"]),
                *("–" if row[key] is None else plain(row[key]) for key in ("not_found", "invented")),
            ]
        )
    head = [
        "structure",
        "network",
        "Dice (95 % interval)",
        "HD95 mm (95 % interval)",
        "cases",
        "missed wholly",
        "predicted where none is",
    ]
    caption = (
        f"At {facts['labels']} labelled cases, mean over test cases and seeds. HD95: 95th percentile of the distance between surfaces, lower is "
        "better; where only one of label and prediction has a structure the diagonal of the image stands in, so a few of these make it very large. "
        "Missed wholly: the label has it, and not one voxel of it was found; predicted where none is: the label lacks it. "
        f"Cases of seed {facts['seed']}."
    )
    said = "".join(f"<li>{text(sentence)}</li>" for sentence in facts.get("label_facts") or [])
    about = f"<p>Of the label maps, in training, validation and test:</p><ul>{said}</ul>" if said else ""
    return table(head, cells, caption=text(caption)) + about


def written_mm(row: Mapping[str, Any]) -> str:
    """Return a distance with its interval in mm."""
    if row["value"] is None:
        return "–"
    if row["low"] is None:
        return f"{decimal(row['value'], 1)} <small>(no interval)</small>"
    return f"{decimal(row['value'], 1)} <small>({decimal(row['low'], 1)} to {decimal(row['high'], 1)})</small>"


def _agreement(facts: Facts) -> str:
    found = facts["agreement"]
    if "why" in found:
        return absent("Not shown:", text(found["why"]))
    cells, plots = [], []
    order = list(dict.fromkeys(row["what"] for row in found["rows"]))
    arms = len({row["arm"] for row in found["rows"]})
    for row in sorted(found["rows"], key=lambda row: order.index(row["what"])):
        unit = f" {row['unit']}" if row["unit"] else ""
        lines = [_three(row[key], unit) for key in ("bias", "lower", "upper")]
        grows = "–" if row["slope"][1] is None else "yes" if row["slope"][1] > 0 or row["slope"][2] < 0 else "not shown"
        what = str(row["what"]).replace("_", " ")
        cells.append([text(what), text(_arm(row["arm"])), *lines, grows, plain(row["n"])])
        title, colour = f"{what}, {_arm(row['arm'])}", 1 if row["arm"] == "scratch" else 0
        pairs = np.array(row["reference"], dtype=np.float64), np.array(row["measured"], dtype=np.float64)
        plots.append(clinical_figures.AgreementPlot(title, row["unit"], *pairs, row["bias"], row["lower"], row["upper"], colour))
    columns = 2 if arms == 2 else 3
    open_, more = plots[:_OPEN], plots[_OPEN:12]
    left = f" The first 12 of {len(plots)} are drawn." if len(plots) > 12 else ""
    caption = (
        f"Bland-Altman: each point is one case, seed {text(facts['seed'])}. Solid: bias; dashed: limits of agreement; bands: their 95 % "
        f"intervals.{left}"
    )
    picture = _plots(open_, columns, caption)
    if more:
        picture += f"<details><summary>{len(more)} further plots</summary>{_plots(more, columns, '')}</details>"
    nowhere = [
        f"{str(row['what']).replace('_', ' ')} {row['neither']}" + (f" ({_arm(row['arm'])})" if arms > 1 else "")
        for row in found["rows"]
        if row.get("neither")
    ]
    head = ["what", "network", "bias", "lower limit", "upper limit", "error grows with size", "cases"]
    caption = (
        "Bias: mean of network minus reference. Between the limits of agreement lie about 95 % of the differences. Brackets: 95 % intervals. "
        "Where the error grows with size, one pair of limits does not hold for small and large alike."
    )
    if nowhere:
        caption += f" Cases with the structure in neither label nor prediction are left out: {', '.join(nowhere)}."
    return table(head, cells, caption=text(caption)) + picture


def _plots(plots: Sequence[clinical_figures.AgreementPlot], columns: int, caption: str) -> str:
    light, dark = (clinical_figures.agreement_png(plots, theme, columns=columns) for theme in (figures.LIGHT, figures.DARK))
    alt = f"Difference between network and reference over their mean, with bias and limits of agreement: {', '.join(p.title for p in plots)}"
    return image(light, alt, dark=dark, caption=caption)


def _three(values: Sequence[float | None], unit: str) -> str:
    value, low, high = values
    if value is None:
        return "–"
    if low is None:
        return f"{measured(value)}{unit}"
    return f"{measured(value)}{unit} <small>({measured(low)} to {measured(high)})</small>"


def measured(value: float | None) -> str:
    """Return a measurement with as many decimals as its size bears."""
    size = abs(value or 0.0)
    return decimal(value, 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 4)


def _class(facts: Facts, k: int) -> str:
    names = facts["classes"]
    return str(names[k]).replace("_", " ") if k < len(names) else f"class {k + 1}"


def _sensitivity(facts: Facts) -> str:
    found = facts["sensitivity"]
    if "why" in found:
        return absent("Not shown:", text(found["why"]))
    if "froc" in found:
        return clinical_boxes.sensitivity(facts, {row["arm"]: _arm(row["arm"]) for row in found["froc"]})
    cells = [
        [f"{text(_NAMES.get(row['metric'], row['metric']))}", text(_arm(row["arm"])), written(_estimate(row)), plain(row["n"])]
        for row in found["rows"]
    ]
    wanted = f"{100 * found['specificity']:.0f} %"
    each = " Each fold has a threshold of its own, used on its own test cases." if facts.get("folds") else ""
    caption = (
        f"The finding is {text(_class(facts, 1))}. The threshold was fitted on validation cases alone, to a specificity of {wanted} there; on the "
        "test cases the specificity is what came "
        f"of it, so read both lines together.{each} Cases: those with the finding for sensitivity, those without for specificity."
    )
    return table(["", "network", "on test (95 % interval)", "cases"], cells, caption=caption)


def _temperature(value: float | Sequence[float | None] | None) -> str:
    """Write a temperature, or those of the folds."""
    if isinstance(value, Sequence):
        return "by fold " + " ".join(_temperature(one) for one in value)
    return "none" if value is None else plain(value)


def _calibration(facts: Facts) -> str:
    found = facts["calibration"]
    if "why" in found:
        return absent("Not shown:", text(found["why"]))
    cells = [
        [text(_NAMES.get(row["metric"], row["metric"])), text(_arm(row["arm"])), written(_estimate(row))] for row in found["rows"]
    ]
    most = found["most_bins"]
    fitted = [f"{_arm(arm)} {_temperature(t)}" for arm, t in found["temperature"].items()]
    caption = (
        f"Temperature and threshold were fitted on validation cases only (temperature: {', '.join(fitted)}); no test case had a part in it. "
        f"Both scores: lower is better. The calibration error sorts cases by stated probability into {most} bins of as equal numbers of cases as can "
        "be, equal probabilities in one bin. Of few cases it is never 0, even for perfect probabilities"
        + (
            f"; with {found['n']} cases, no more than bins, it says how unsure the network is and no more."
            if found["n"] <= most
            else "."
        )
    )
    parts = [table(["", "network", "on test (95 % interval)"], cells, caption=text(caption))]
    bins = {_arm(arm): rows for arm, rows in found["bins"].items() if rows}
    if bins:
        colours = {arm: 1 if arm == "from scratch" else 0 for arm in bins}
        light, dark = (clinical_figures.reliability_png(bins, theme, colours) for theme in (figures.LIGHT, figures.DARK))
        said = (
            f"Reliability, {found['n']} test cases: on the diagonal, what is stated is what happens. Each point is one of up to {most} bins "
            "of as equal numbers of cases as can be; a larger point holds many cases of one probability."
        )
        parts.append(image(light, "Share of cases called rightly over the stated probability", dark=dark, caption=said))
    return "".join(parts)


def _worst(facts: Facts, pictures: Mapping[str, Mapping[str, Any]] | None, structures: Sequence[str]) -> str:
    found, task = facts["worst"], facts["task"]
    if "why" in found:
        return absent("Not shown:", text(found["why"]))
    if not found["rows"]:
        return f"<p>None of {found['n']} test cases has an error.</p>"
    cells = []
    for place, row in enumerate(found["rows"], start=1):
        flags = "; ".join(row["outside"])
        case = f"{place}. {text(row['case'])}"
        if task == "segmentation":
            scores = ", ".join(f"{name.replace('_', ' ')} {decimal(v, 2)}" for name, v in row["dice"].items() if v is not None)
            far = ", ".join(f"{name.replace('_', ' ')} {decimal(v, 1)}" for name, v in row["hd95_mm"].items() if v is not None)
            cells.append([case, decimal(1 - row["bad"], 2), text(scores), text(far), text(flags) or "–"])
        elif task == "detection":
            cells.append(clinical_boxes.worst_cells(row, place))
        elif task == "classification":
            true, called = (_class(facts, row[key]) for key in ("target", "called"))
            cells.append([case, decimal(row["p"], 3), text(true), text(called), text(flags) or "–"])
        else:
            cells.append([case, plain(row["bad"]), plain(row["target"]), plain(row["prediction"]), text(flags) or "–"])
    heads = {
        "segmentation": ["case", "mean Dice", "Dice", "HD95 mm", "outside the training range"],
        "detection": clinical_boxes.HEAD,
        "classification": ["case", "probability of the true class", "true", "called", "outside the training range"],
        "regression": ["case", "absolute error", "reference", "network", "outside the training range"],
    }
    caption = (
        f"Of {found['n']} test cases, seed {facts['seed']}. Codes are those of the results; the owner of the cohort finds the images by "
        "them in private/cases.csv, or in the index."
    )
    caption += clinical_boxes.threshold_sentence(facts) if task == "detection" else ""
    parts = [table(heads[task], cells, caption=text(caption), numeric=task != "segmentation")]
    if task not in ("segmentation", "detection"):
        return parts[0]
    if pictures is None:
        return parts[0] + absent("Left out:", "images. <code>--with-images</code> adds them.")
    drawn = []
    for row in found["rows"]:
        cuts = pictures.get(row["case"])
        if cuts and task == "detection":
            drawn.append(clinical_boxes.worst_picture(row, cuts))
        elif cuts:
            which = "" if figures.PICTURE in cuts else " Slices in which label and prediction differ most."
            said = f"{row['case']}: mean Dice {decimal(1 - row['bad'], 2)}.{which}"
            png = figures.segmentation_png(cuts, [name.replace("_", " ") for name in structures])
            planes = "" if figures.PICTURE in cuts else " in three planes"
            drawn.append(image(png, f"Label and prediction of {row['case']}{planes}", caption=text(said)))
    parts += drawn[:_PICTURED]
    if drawn[_PICTURED:]:
        rest = drawn[_PICTURED:]
        parts.append(f"<details><summary>Pictures of {len(rest)} further cases</summary>{''.join(rest)}</details>")
    if len(parts) == 1:
        parts.append(
            absent("No figures/worst.npz was found.", "<code>medssl finetune</code> writes one where settings.figures is above 0.")
        )
    return "".join(parts)


def _count(n: int | None) -> str:
    """Write how many a group has; of a handful only that it is one."""
    return f"fewer than {_FEW}" if n is not None and n < _FEW else plain(n)


def _subgroups(facts: Facts) -> str:
    found = facts["subgroups"]
    if "why" in found:
        return absent("Not shown:", text(found["why"]))
    parts = []
    n, positives = found["smallest"]
    counted = {"failed": "failed"}
    if facts["task"] == "detection":
        counted["alarms"] = "without an object, something found"
    for name, rows in found["tables"].items():
        cells = []
        for row in rows:
            group = text(row["group"]).replace("_", " ")
            counts = [_count(row["n_images"]), _count(row["n_patients"])]
            if row["sufficient"]:
                cells.append([group, *counts, *(plain(row[key]) for key in counted), written(_estimate(row))])
            else:
                cells.append([group, *counts, *("insufficient" for _ in counted), "insufficient"])
        head = [text(_NAMES.get(name, name)), "cases", "patients", *counted.values(), f"{text(facts['metric'])} (95 % interval)"]
        parts.append(table(head, cells))
    needs = f"{n} cases" + (f" and {positives} with and without the finding" if facts["task"] == "classification" else "")
    said = (
        f"Failed: {found['failure']}. A group needs {needs} to have a number of its own; below that it is “insufficient”, which is no all-clear. "
        "Differences between groups are not evidence of a cause."
    )
    return f"<p>{text(said)}</p>" + "".join(parts)


def _outside(facts: Facts) -> str:
    found = facts["outside"]
    if "why" in found:
        return absent("Not shown:", text(found["why"]))
    lead = _range_of_folds(facts["folds"]) if facts.get("folds") else _range(found["range"])
    if not found["rows"]:
        return f"<p>{text(lead)}</p><p>None of {found['n']} test cases lies outside.</p>"
    counts = ", ".join(f"{count} by {_NAMES.get(by, by)}" for by, count in sorted(found["counts"].items()))
    cells = [
        [
            text(row["case"]),
            " ".join(f'<span class="flag">{text(_NAMES.get(f["by"], f["by"]))}</span>' for f in row["flags"]),
            text("; ".join(f["reason"] for f in row["flags"])),
        ]
        for row in found["rows"]
    ]
    body = table(["case", "flag", "why"], cells, numeric=False)
    if len(cells) > 20:
        body = f"<details><summary>All {len(cells)} flagged cases</summary>{body}</details>"
    return f"<p>{text(lead)}</p><p><b>{len(cells)} of {found['n']} test cases are flagged</b>: {text(counts)}.</p>{body}"


def _range_of_folds(folds: int) -> str:
    return (
        f"Each test case was compared with the training cases of its own fold; these differ between the {folds} folds, so no one range is "
        "given here. Features are those of the encoder before fine-tuning."
    )


def _range(span: Mapping[str, Any]) -> str:
    """Say what the training cases span."""
    said = []
    if span.get("spacing_mm"):
        low, high = span["spacing_mm"]
        said.append(
            "voxel size " + " × ".join(f"{a:.3g}" if a == b else f"({a:.3g} to {b:.3g})" for a, b in zip(low, high)) + " mm"
        )
    said.append(f"vendors {', '.join(span['vendors'])}" if span.get("vendors") else "vendors not known")
    if span.get("knn_limit") is not None:
        left = "patient" if span.get("n_patients") else "case"
        said.append(
            f"mean cosine distance to the {span['neighbours']} nearest training cases up to {span['knn_limit']:.3g} (99th percentile, leave one "
            f"{left} out)"
        )
    else:
        said.append("too few training patients for distances")
    n, patients = span.get("n"), span.get("n_patients")  # results of an earlier medssl counted cases alone
    of, what = (patients, "patients") if patients else (n, "cases")
    chance = ""
    if span.get("knn_limit") is not None and of and of < 100:
        chance = f" By chance alone about 1 in {of + 1} test {what} lies above the distance."
    whose = f" of {patients} patient{'' if patients == 1 else 's'}" if patients else ""
    return f"Training range of {n} cases{whose}: {'; '.join(said)}. Features are those of the encoder before fine-tuning.{chance}"


def _not_asked(facts: Facts) -> str:
    names = {
        "sensitivity": "sensitivity at a fixed operating point",
        "calibration": "calibration",
        "agreement": "agreement of volumes",
    }
    left = [names[key] for key in _NOT_ASKED[facts["task"]] if key in names]
    return f"Not on this page: {' and '.join(left)}; a network for {facts['task']} gives no answer to that." if left else ""


def _caveats(facts: Facts, with_images: bool) -> str:
    said = [
        "Research only. Nothing here was tested for diagnosis, and no number here is a claim about patients elsewhere.",
        "Intervals describe chance among these test patients. They know nothing of other scanners, sites or readers.",
        f"Which state of the network was scored: {facts['choice']}." if facts.get("choice") else "",
        "A flag says that a case is unlike the training cases. No flag does not say that the prediction is right.",
        _not_asked(facts),
        "Results are pseudonymised personal data unless their source was public or generated. This page has rows of single patients: keep it "
        "where the results may be."
        + (" It also shows images of patients: keep it where those images may be." if with_images else ""),
    ]
    main = next(row for row in facts["headlines"] if row["arm"] == facts["arm"] and row["labels"] == facts["labels"])
    n, units = (main["n_cases"], "cases") if main["n_patients"] is None else (main["n_patients"], "patients")
    if n < 20:
        said.insert(1, f"Only {n} test {units}: every number here may well be quite another with the next twenty.")
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in said if line) + "</ul>"
