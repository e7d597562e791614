"""From scores to the headline: pretrained against scratch, intervals by patient, and a sentence that claims no more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.report.collect import Json, Leftovers, number
from medssl.seeding import counter_rng

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where unknown."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


BY_CASE = "by image"
"""What rows of results say of intervals that are drawn by case, as patients are not known."""


@dataclass(frozen=True)
class Comparison:
    """One line of the headline table.

    Args:
        network: Name of the network, may be empty.
        labels: Labelled training cases, as written.
        arm: What scratch is compared with.
        scratch: Mean Dice from scratch.
        pretrained: Mean Dice of the arm.
        difference: Pretrained minus scratch, paired by case.
        seeds: Training seeds averaged, None when unknown.
        n_test: Test cases, None when unknown.
        by_case: Whether intervals are drawn by case, since not all patients are known.
    """

    network: str
    labels: str
    arm: str
    scratch: Estimate
    pretrained: Estimate
    difference: Estimate
    seeds: int | None = None
    n_test: int | None = None
    by_case: bool = False


def comparisons(found: Leftovers) -> list[Comparison]:
    """Return the headline lines from what knows best: the demo's own table, else the label curve, else the results."""
    return from_table(found.demo.get("table")) or from_curves(found.curves) or from_results(found.results)


def budget(found: Leftovers) -> int | None:
    """Return the fine-tuning steps that all results share; None when they differ or are unknown."""
    settings = [result.get("settings") for result in found.results]
    steps = [values.get("steps") if isinstance(values, Mapping) else None for values in settings]
    return steps[0] if steps and isinstance(steps[0], int) and all(value == steps[0] for value in steps) else None


def verdict(line: Comparison, steps: int | None = None) -> str:
    """Say in one sentence what a comparison shows, and what it does not; `steps` is the fine-tuning budget, if known."""
    where = (f" at {line.labels} labels" if line.labels else "") + (f" and {steps:,} steps" if line.labels and steps else "")
    difference = line.difference
    if difference.value is None:
        return f"No paired difference{where}: one of the two arms is missing."
    size = f"{_points(difference.value)} Dice points"
    if difference.low is None or difference.high is None:
        return f"{size}{where}, without an interval: no conclusion."
    interval = f"{size}{where} (95 % interval {_points(difference.low)} to {_points(difference.high)})"
    if difference.low > 0:
        return f"Pretraining helped: {interval}."
    if difference.high < 0:
        return f"Pretraining hurt: {interval}."
    return f"No difference shown: {interval} includes zero."


def _points(dice: float) -> str:
    return f"{dice * 100:+.1f}".replace("-", "−")


def bootstrap_mean(values: Sequence[float], patients: Sequence[str], name: str) -> Estimate:
    """Return the mean and its 95 % percentile interval, drawing patients with replacement.

    Args:
        values: One value per case.
        patients: Patient of each case; all cases of a patient are drawn together.
        name: Keys the generator, so that a page is the same each time.
    """
    if not values:
        return Estimate()
    people = sorted(set(patients))
    place = {patient: k for k, patient in enumerate(people)}
    sums, counts = np.zeros(len(people)), np.zeros(len(people))
    for value, patient in zip(values, patients):
        sums[place[patient]] += value
        counts[place[patient]] += 1
    mean = float(sums.sum() / counts.sum())
    if len(people) < 2:
        return Estimate(mean)
    drawn = counter_rng("report", name).integers(0, len(people), (RESAMPLES, len(people)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean, float(low), float(high))


def scores_of(case: Mapping[str, Any], structures: Sequence[str], metric: str) -> list[float | None]:
    """Return the score of each structure of a case, written as a list or as name -> value."""
    values = case.get(metric)
    if isinstance(values, Mapping):
        return [number(values.get(name)) for name in structures]
    if isinstance(values, list):
        return [number(value) for value in values]
    return []


def network_of(result: Json) -> str:
    """Return the network a result belongs to."""
    settings = result.get("settings")
    inner = settings.get("network") if isinstance(settings, Mapping) else None
    return str(result.get("network") or inner or "")


def group_results(results: Iterable[Json]) -> dict[tuple[str, str], dict[str, list[Json]]]:
    """Return (network, labels) -> arm -> results of its seeds."""
    groups: dict[tuple[str, str], dict[str, list[Json]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        labels = "all" if result.get("labels") is None else str(result["labels"])
        groups[network_of(result), labels][str(result.get("arm", "unknown"))].append(result)
    return groups


def from_results(results: Sequence[Json]) -> list[Comparison]:
    """Compare every arm with scratch at the same network and number of labels; seeds are averaged case by case."""
    lines = []
    for (network, labels), arms in sorted(group_results(results).items(), key=lambda item: _by_labels(item[0])):
        scratch = _by_case(arms.get("scratch", []))
        others = [arm for arm in arms if arm != "scratch"] or ["pretrained"]
        for arm in others:
            pretrained = _by_case(arms.get(arm, []))
            both = [case for case in pretrained if case in scratch]
            key = f"{network}|{labels}|{arm}"
            lines.append(
                Comparison(
                    network=network,
                    labels=labels,
                    arm=arm,
                    scratch=_estimate(scratch, arms.get("scratch", []), key + "|scratch"),
                    pretrained=_estimate(pretrained, arms.get(arm, []), key),
                    difference=bootstrap_mean(
                        [pretrained[case][0] - scratch[case][0] for case in both],
                        _people({case: pretrained[case] for case in both}),
                        key + "|difference",
                    ),
                    seeds=max(len(arms.get(arm, [])), len(arms.get("scratch", []))),
                    n_test=len(both) or max(len(pretrained), len(scratch)),
                    by_case=any(patient is None for found in (pretrained, scratch) for _, patient in found.values()),
                )
            )
    return lines


def _by_labels(key: tuple[str, str]) -> tuple[str, float, str]:
    network, labels = key
    return network, float(labels) if labels.isdigit() else float("inf"), labels


def _by_case(results: Sequence[Json]) -> dict[str, tuple[float, str | None]]:
    """Return case -> (mean Dice over structures and seeds, patient; None where not known)."""
    values: dict[str, list[float]] = defaultdict(list)
    patients: dict[str, str | None] = {}
    for result in results:
        structures = [str(name) for name in result.get("structures") or []]
        for place, case in enumerate(result.get("cases") or []):
            if not isinstance(case, Mapping):
                continue
            dice = [value for value in scores_of(case, structures, "dice") if value is not None]
            if dice:
                name = str(case.get("id", place))
                values[name].append(float(np.mean(dice)))
                patients[name] = None if case.get("patient") is None else str(case["patient"])
    return {name: (float(np.mean(found)), patients[name]) for name, found in values.items()}


def _people(cases: Mapping[str, tuple[float, str | None]]) -> list[str]:
    """Return the patient of each case, or the cases themselves where one is not known: they are then drawn one by one."""
    known = [patient for _, patient in cases.values() if patient is not None]
    return known if len(known) == len(cases) else list(cases)


def _estimate(cases: Mapping[str, tuple[float, str | None]], results: Sequence[Json], key: str) -> Estimate:
    """Return the mean Dice of an arm; a single run's own interval is taken as it stands."""
    if len(results) == 1 and (given := _interval(results[0].get("dice_interval"))):
        return Estimate(number(results[0].get("mean_dice")), *given)
    if not cases and len(results) == 1:
        return Estimate(number(results[0].get("mean_dice")))
    return bootstrap_mean([dice for dice, _ in cases.values()], _people(cases), key)


def _interval(value: Any) -> tuple[float, float] | None:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        low, high = number(value[0]), number(value[1])
        if low is not None and high is not None:
            return low, high
    return None


def from_curves(curves: Sequence[Json]) -> list[Comparison]:
    """Read the rows and differences of label curves."""
    lines = []
    for curve in curves:
        by_labels: dict[str, dict[str, Json]] = defaultdict(dict)
        for row in curve["rows"]:
            by_labels[str(row.get("labels"))][str(row.get("arm", "pretrained"))] = row
        network = _network_of_curve(curve)
        name = " ".join(part for part in (network, str(curve.get("name") or "") if len(curves) > 1 else "") if part)
        for labels, arms in sorted(by_labels.items(), key=lambda item: _by_labels(("", item[0]))):
            for arm in [key for key in arms if key != "scratch"] or ["pretrained"]:
                difference: Json = next(
                    (row for row in curve["differences"] if str(row.get("labels")) == labels and str(row.get("arm", arm)) == arm),
                    {},
                )
                row = arms.get(arm) or arms.get("scratch") or {}
                seeds = difference.get("seeds", row.get("seeds", curve.get("seeds")))
                lines.append(
                    Comparison(
                        network=name,
                        labels=labels,
                        arm=arm,
                        scratch=_of_row(arms.get("scratch", {}), "dice"),
                        pretrained=_of_row(arms.get(arm, {}), "dice"),
                        difference=_of_row(difference, "difference"),
                        seeds=_count(seeds),
                        n_test=_count(row.get("n_test", curve.get("n_test"))),
                        by_case=row.get("by") == BY_CASE,
                    )
                )
    return lines


def _network_of_curve(curve: Json) -> str:
    """Return the network that all cells of a curve share."""
    shared = curve.get("shared")
    return network_of({**curve, **shared} if isinstance(shared, Mapping) else curve)


def _of_row(row: Mapping[str, Any], key: str) -> Estimate:
    """Read `key` beside `low`/`high`, `key_low`/`key_high` or `key_interval`; [value, low, high] is read as well."""
    value = row.get(key)
    if isinstance(value, (list, tuple)) and len(value) == 3:
        return Estimate(*(number(part) for part in value))
    interval = _interval(row.get(f"{key}_interval")) or _interval([row.get(f"{key}_low"), row.get(f"{key}_high")])
    if interval is None and key in ("dice", "difference", "value"):
        interval = _interval([row.get("low"), row.get("high")])
    return Estimate(number(value), *(interval or (None, None)))


def _count(value: Any) -> int | None:
    if isinstance(value, list):
        return len(value)
    found = number(value)
    return None if found is None else int(found)


def from_table(table: Any) -> list[Comparison]:
    """Read a demo table: one row per comparison (scratch, pretrained, difference) or one per arm (arm, dice).

    Returns nothing when the rows hold something else; the page then prints them as they are.
    """
    rows = [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []
    if rows and all("arm" in row and "dice" in row for row in rows):
        by_network: dict[str, list[Json]] = defaultdict(list)
        for row in rows:
            by_network[str(row.get("network") or "")].append(row)
        curves = [{"network": name, "rows": part, "differences": _differences(part)} for name, part in by_network.items()]
        return from_curves(curves)
    if not rows or not all("scratch" in row and "pretrained" in row for row in rows):
        return []
    return [
        Comparison(
            network=str(row.get("network") or ""),
            labels=str(row.get("labels", "")),
            arm="pretrained",
            scratch=_of_row(row, "scratch"),
            pretrained=_of_row(row, "pretrained"),
            difference=_of_row(row, "difference"),
            seeds=_count(row.get("seeds")),
            n_test=_count(row.get("n_test")),
        )
        for row in rows
    ]


def _differences(rows: Sequence[Json]) -> list[Json]:
    """Return the rows of a per-arm table that carry the paired difference."""
    keys = ("difference", "difference_interval", "difference_low", "difference_high", "seeds", "n_test")
    return [{"labels": row.get("labels"), **{k: row[k] for k in keys if k in row}} for row in rows if "difference" in row]
