"""The tiers of `medssl evaluate --suite`: each asks one kind of question of the same labelled set, and says what it had to leave out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl import build, data_sources
from medssl.api import label_curve as run_curve
from medssl.archive.table import SERIES_COLUMNS
from medssl.errors import RequestError, TrainingStopped
from medssl.evaluation.bootstrap import Statistic, paired_bootstrap, paired_p
from medssl.evaluation.clinical import OPEN_COLUMNS
from medssl.evaluation.controls import control_features
from medssl.evaluation.corruptions import corrupt, relative_robustness
from medssl.evaluation.features import Batch, embed
from medssl.evaluation.frozen import few_shot, fewest, fit_probe, predicted
from medssl.evaluation.knn import knn_probe
from medssl.evaluation.linear_probe import linear_probe
from medssl.evaluation.retrieval import precisions, reidentified
from medssl.evaluation.scores import mae, mean_auc, r2, score_row
from medssl.evaluation.subgroups import POSITIVES, SMALLEST, subgroup_rows
from medssl.evaluation.suite_rows import CONTROLS, WEIGHTS, Row, row_of, skip
from medssl.evaluation.target_cases import Cases, few_label_order
from medssl.feature_statistics import alignment, effective_rank, uniformity
from medssl.recipe import CurveSection, FinetuneTargetsRecipe, Recipe, SourceSection, SuiteRecipe

LEAST = 5  # patients of a value for a leakage probe (its outer folds), and test cases of a held-out value; fewer say nothing
CHOSEN = "best and worst on these same data"
Features = dict[str, np.ndarray]


@dataclass
class Found:
    """What a tier brings: rows, what it skipped, and what only the owner may read.

    `again` says that something was skipped through an error that the user can correct: the tier is then not finished.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    private: dict[str, Any] = field(default_factory=dict)
    p_values: list[dict[str, Any]] = field(default_factory=list)
    again: bool = False


@dataclass
class Bench:
    """The labelled set, the weights, and the features of both, computed when a tier first needs them.

    Args:
        recipe: The suite.
        weights: Where the weights lie.
        manifest: Of the weights.
        section: Source with the views of the weights.
        shelf: The cached series.
        tasks: Name -> labelled cases; `ids` are places in `series`.
        series: Series of any task, in the order of their ids.
        names: Task -> (classes in the table, public names).
    """

    recipe: SuiteRecipe
    weights: Path
    manifest: Mapping[str, Any]
    section: SourceSection
    shelf: data_sources.Shelf
    tasks: dict[str, Cases]
    series: list[str]
    names: dict[str, tuple[list[str], list[str]]]

    @cached_property
    def device(self) -> torch.device:
        """Where encoders run."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def encoder(self) -> Any:
        """The encoder of the weights."""
        return build.load_encoder(self.weights).to(self.device)

    @cached_property
    def features(self) -> Features:
        """Features of all series: of the weights and of the controls."""
        return self.look(range(len(self.series)))

    def look(self, places: Iterable[int], change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Features:
        """Return the features of series under every model, the images changed first where asked."""
        wanted = [self.series[place] for place in places]
        source = data_sources.evaluation_source("source", self.shelf, self.section, wanted)

        def batches() -> Iterator[Batch]:
            for images, ids in data_sources.images_and_ids(source, self.device, self.recipe.batch):
                if change is not None and not isinstance(images, torch.Tensor):
                    raise TypeError("corruptions are defined for images and volumes, and these are stacks or clips")
                yield (images if change is None else change(images)), ids  # type: ignore[arg-type]

        own, _ = embed(self.encoder, batches())

        def untrained() -> Any:
            return build.build_encoder(self.manifest["encoder"])

        return {WEIGHTS: own, **control_features(untrained, batches, seed=self.recipe.seed, device=self.device)}

    def of(self, task: str) -> Features:
        """Return the features of the cases of a task, in their order."""
        return {model: values[self.tasks[task].ids] for model, values in self.features.items()}

    def column(self, name: str) -> list[str] | None:
        """Return the value of a column of the index, or of the table of labels, for every series; None where there is no such column."""
        if name in SERIES_COLUMNS:
            known = {row.series_id: getattr(row, name) for row in self.shelf.rows}
            return [_word(known[series]) for series in self.series]
        try:
            found = data_sources.read_targets(self.recipe.table, self.recipe.file_column, name, self.shelf)
        except RequestError:
            return None
        return [found.get(series, "unknown") for series in self.series]

    def public(self, column: str, values: Sequence[str]) -> list[str]:
        """Return values under the names that may be published: those of a closed list, those that the recipe lists, else group_1 ..."""
        if column in OPEN_COLUMNS:
            return list(values)
        listed = self.recipe.groups.get(column, [])
        others = sorted({value for value in values if value != "unknown" and value not in listed})
        return [v if v == "unknown" or v in listed else f"group_{others.index(v) + 1}" for v in values]

    def unseen(self, task: str) -> np.ndarray:
        """Return the rows of the validation and test cases of a task."""
        return np.flatnonzero(np.isin(self.tasks[task].split, ("val", "test")))

    def row(self, name: str) -> list[Any]:
        """Return a column of the index for every series, as it is."""
        known = {row.series_id: getattr(row, name) for row in self.shelf.rows}
        return [known[series] for series in self.series]


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) and value else "unknown" if value in (None, "", ()) else str(value)


@contextmanager
def _or_skip(done: Found, task: str, what: str) -> Iterator[None]:
    """Turn the refusal of a probe into a skipped part: too few patients for one number must not cost the others."""
    try:
        yield
    except RequestError as err:
        done.skipped.append(skip(task, what, str(err)))


def smoke(bench: Bench, _out: Path) -> Found:
    """Rank, uniformity, alignment and neighbours of the features of unseen patients."""
    done = Found()
    for name, cases in bench.tasks.items():
        rows = bench.unseen(name)
        if len(rows) < 4:
            done.skipped.append(skip(name, "smoke metrics", f"{len(rows)} validation and test cases; four or more are needed"))
            continue
        features, patients = bench.of(name), cases.patients(rows)
        try:
            noisy = bench.look(cases.ids[rows], lambda images: corrupt(images, "noise", 1, bench.recipe.seed))
        except TypeError as err:
            noisy = {}
            done.skipped.append(skip(name, "alignment", str(err)))
        for model, values in features.items():
            x = torch.from_numpy(np.asarray(values[rows], dtype=np.float64))
            numbers = {"smooth_rank": float(effective_rank(x)), "uniformity": float(uniformity(x))}
            if model in noisy:
                numbers["alignment"] = float(alignment(x, torch.from_numpy(np.asarray(noisy[model], dtype=np.float64))))
            for metric, value in numbers.items():
                score = {"name": model, "metric": metric, "value": value if np.isfinite(value) else None, "low": None, "high": None}
                score |= {"n_images": len(rows), "n_patients": None if patients is None else len(set(patients))}
                done.rows.append(row_of(score, "smoke", name, ""))
        with _or_skip(done, name, "neighbours"):
            done.rows += _neighbours(bench, "smoke", name, [k for k in (1, 5, 20) if k < len(rows)])
    return done


def _neighbours(bench: Bench, tier: str, name: str, ks: Sequence[int]) -> list[Row]:
    cases, rows = bench.tasks[name], bench.unseen(name)
    found = []
    for model, values in bench.of(name).items():
        for k in ks:
            scores = knn_probe(
                values[rows], cases.targets[rows], cases.patients(rows), task=cases.task, name=model, k=k, draws=bench.recipe.draws,
                seed=bench.recipe.seed,
            )  # fmt: skip
            found += [row_of(score, tier, name, f"{k} nearest") for score in scores]
    return found


def frozen(bench: Bench, _out: Path) -> Found:
    """Neighbours, logistic probe with the penalty chosen on validation, and few-label probes, of classes."""
    done = Found()
    for name, cases in _classes(bench):
        if why := _cannot_fit(cases):
            done.skipped.append(skip(name, "frozen probes", why))
            continue
        features = bench.of(name)
        with _or_skip(done, name, "neighbours"):
            done.rows += _neighbours(bench, "frozen", name, [k for k in bench.recipe.k if k < len(bench.unseen(name))])
        with _or_skip(done, name, "logistic probe"):
            tables = probe_tables(bench, name)
            done.rows += _probe_rows(bench, "frozen", name, tables, "logistic", {"auroc": mean_auc}, main="auroc")
            done.p_values += _against_controls(bench, "frozen", name, tables, mean_auc)
        test = cases.where("test")
        for shots in bench.recipe.shots:
            if (least := fewest(cases)) < shots:
                done.skipped.append(skip(name, f"{shots} per class", f"the rarest class has {least} training cases"))
                continue
            for model, values in features.items():
                table, ids = few_shot(values, cases, shots, range(bench.recipe.shot_seeds))
                score = score_row(
                    model, "", "auroc", table, cases.patients(test), statistic=_mean_of(mean_auc), draws=bench.recipe.draws,
                    seed=bench.recipe.seed,
                )  # fmt: skip
                done.rows.append(row_of(score, "frozen", name, f"{shots} per class", seeds=bench.recipe.shot_seeds))
                done.private[f"{name}, {shots} per class"] = [[bench.series[n] for n in drawn] for drawn in ids]
    return done


def _classes(bench: Bench) -> list[tuple[str, Cases]]:
    return [(name, cases) for name, cases in bench.tasks.items() if cases.task == "classification"]


def _cannot_fit(cases: Cases) -> str:
    """Return why nothing can be fitted and scored, or an empty string."""
    for split in ("train", "test"):
        if not len(cases.where(split)):
            return f"no labelled case is marked {split}"
    if cases.task == "classification":
        for split in ("train", "test"):
            absent = len(cases.classes) - len(set(cases.targets[cases.where(split)].tolist()))
            if absent:
                return f"{absent} of {len(cases.classes)} classes have no {split} case"
    return ""


def probe_tables(bench: Bench, name: str) -> Features:
    """Return target and prediction of the test cases of a task under every model."""
    cases = bench.tasks[name]
    train, test = cases.where("train"), cases.where("test")
    return {
        model: predicted(fit_probe(values, cases, train, bench.recipe.seed), values, cases, test)
        for model, values in bench.of(name).items()
    }


def _probe_rows(
    bench: Bench, tier: str, name: str, tables: Features, setting: str, metrics: Mapping[str, Statistic], *, main: str = ""
) -> list[Row]:
    cases = bench.tasks[name]
    patients = cases.patients(cases.where("test"))
    found = []
    for metric, statistic in metrics.items():
        for model, table in tables.items():
            score = score_row(
                model, "", metric, table, patients, statistic=statistic, draws=bench.recipe.draws, seed=bench.recipe.seed
            )
            found.append(row_of(score, tier, name, setting, main=metric == main))
    return found


def _against_controls(bench: Bench, tier: str, name: str, tables: Features, statistic: Statistic) -> list[dict[str, Any]]:
    """Return the paired differences of the weights to every control, with p-values for Holm."""
    cases, draws, seed = bench.tasks[name], bench.recipe.draws, bench.recipe.seed
    patients = cases.patients(cases.where("test"))
    found = []
    for control in CONTROLS:
        pair = tables[WEIGHTS], tables[control], patients
        value, low, high = paired_bootstrap(*pair, statistic=statistic, draws=draws, seed=seed)
        p = paired_p(*pair, statistic=statistic, draws=draws, seed=seed)
        row = {
            "tier": tier,
            "task": name,
            "against": control,
            "value": _finite(value),
            "low": _finite(low),
            "high": _finite(high),
            "p": _finite(p),
        }
        found.append(row)
    return found


def _mean_of(statistic: Statistic) -> Statistic:
    return lambda rows: float(np.mean([statistic(rows[:, seed]) for seed in range(rows.shape[1])]))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def classification(bench: Bench, out: Path) -> Found:
    """Label curves of classes: the weights and the scratch twin fine-tuned, the controls probed on the same cases."""
    section = bench.recipe.classification
    if section is None:
        return _not_named("classification", "label curves")
    if section.recipe is not None:
        return _curve("classification", section, Recipe.load(section.recipe, section.overrides), bench, out, "")
    done = Found()
    for name, cases in _classes(bench):
        if why := _cannot_fit(cases):
            done.skipped.append(skip(name, "label curves", why))
            continue
        counts = budgets(section, len(cases.where("train")), least=len(cases.classes))
        _join(done, _curve("classification", section, _own_recipe(bench, section, name), bench, out, name, counts))
        with _or_skip(done, name, f"label curves of {', '.join(CONTROLS)}"):
            _join(done, _control_curves(bench, name, counts, section.seeds))
    return done


def budgets(section: CurveSection, cases: int, least: int = 1) -> list[int]:
    """Return the numbers of labels of a curve, in rising order."""
    wanted = section.counts or [round(share * cases) for share in section.fractions]
    return sorted({min(max(count, least), cases) for count in wanted})


def _own_recipe(bench: Bench, section: CurveSection, name: str) -> FinetuneTargetsRecipe:
    task = bench.recipe.tasks[name]
    return FinetuneTargetsRecipe(
        task=task.task, source=bench.recipe.source, table=bench.recipe.table, file_column=bench.recipe.file_column, target=task.column,
        settings=section.settings, classes=task.classes,
    )  # fmt: skip


def _control_curves(bench: Bench, name: str, counts: Sequence[int], seeds: Sequence[int]) -> Found:
    """Return the logistic probes of the controls on the labels that the fine-tuned arms have."""
    cases, found, what = bench.tasks[name], Found(), f"label curves of {', '.join(CONTROLS)}"
    test = cases.where("test")
    if not len(cases.where("val")):
        return Found(skipped=[skip(name, what, "no labelled case is marked val, and few labels leave none to choose the penalty")])
    for count in counts:
        trains = [few_label_order(cases, seed)[:count] for seed in seeds]
        usable = [rows for rows in trains if len(set(cases.targets[rows].tolist())) == len(cases.classes)]
        if lacking := len(trains) - len(usable):
            why = f"the labels of {lacking} of {len(trains)} seeds lack a class; controls have {len(usable)} seeds here"
            found.skipped.append(skip(name, f"{what}, {count} labels", why))
        for model, values in bench.of(name).items():
            if model == WEIGHTS or not usable:
                continue
            table = np.stack([predicted(fit_probe(values, cases, rows), values, cases, test) for rows in usable], axis=1)
            score = score_row(
                model, "", "auroc", table, cases.patients(test), statistic=_mean_of(mean_auc), draws=bench.recipe.draws,
                seed=bench.recipe.seed,
            )  # fmt: skip
            row = row_of(score, "classification", name, f"{count} labels", seeds=len(usable), main=count == max(counts))
            found.rows.append(row)
    return found


def _not_named(tier: str, what: str) -> Found:
    return Found(skipped=[skip("", what, f"the recipe names no fine-tuning (key {tier})")])


def _join(done: Found, more: Found) -> None:
    done.rows += more.rows
    done.skipped += more.skipped
    done.again |= more.again


def _curve(
    tier: str, section: CurveSection, recipe: Any, bench: Bench, out: Path, name: str, counts: Sequence[int] | None = None
) -> Found:
    """Run a label curve and return its rows; one that cannot run is a skipped part, not a lost suite.

    A refused request (a folder that is not there, weights that do not fit) can be corrected, so it is tried again by the next run. A
    training that a monitor stopped would stop again; the cells that were done before it stay in the table.
    """
    folder = out / tier / (name or "curve")
    task = name or Path(str(section.recipe)).stem
    stopped: list[dict[str, str]] = []
    try:
        recipe = recipe.model_copy(update={"out": str(folder)})
        counts = list(counts or _counts_of(section, recipe))
        summary = run_curve(recipe, bench.weights, counts=counts, seeds=section.seeds, twin=True)
    except RequestError as err:
        return Found(skipped=[skip(task, "fine-tuning", f"{err}; the next run tries again")], again=True)
    except TrainingStopped as err:
        path = folder / "summary.json"
        if not path.is_file():
            return Found(skipped=[skip(task, "fine-tuning", str(err))])
        summary = json.loads(path.read_text())
        cells = summary["cells"]
        stopped = [skip(task, f"fine-tuning, {cells['planned'] - cells['done']} of {cells['planned']} cells", str(err))]
    rows = _curve_rows(summary, tier, task, _patients_of(folder))
    if tier != "classification":
        stopped.append(skip(task, ", ".join(CONTROLS), "a control makes no such prediction; the twin stands beside"))
    return Found(rows=rows, skipped=stopped)


def _curve_rows(summary: Mapping[str, Any], tier: str, task: str, patients: int | None) -> list[Row]:
    """Return the rows of a curve from its summary."""
    rows = []
    for entry in summary["rows"]:
        score = {
            "name": entry["arm"],
            "metric": entry.get("metric", "dice"),
            "value": entry.get("value", entry.get("dice")),
            "low": entry["low"],
            "high": entry["high"],
            "n_images": entry["n_test"],
            "n_patients": patients,
        }
        most = entry["labels"] == max(row["labels"] for row in summary["rows"])
        rows.append(row_of(score, tier, task, f"{entry['labels']} labels", seeds=len(entry["seeds"]), main=most))
    return rows


def _counts_of(section: CurveSection, recipe: Any) -> list[int]:
    """Return the label budgets of a curve with a recipe of its own."""
    if section.counts:
        return list(section.counts)
    if getattr(recipe, "cohort", None) is None:
        raise RequestError("fractions are taken of a cohort, and this recipe has none; give counts")
    return budgets(section, _training_cases(recipe, section.seeds))


def _training_cases(recipe: Any, seeds: Sequence[int]) -> int:
    """Return how many training cases every cell of a curve over a cohort has at least."""
    from medssl.evaluation.cohort import Cohort
    from medssl.evaluation.label_curve import deals

    cohort = Cohort.load(recipe.cohort.path)
    if recipe.folds is None or recipe.task != "detection":
        return min(len(one.split("train")) for one in deals(cohort, recipe.folds, seeds).values())
    # folds of detection are alike in their boxes, which nobody has looked for yet: the two that do not train have no more than these patients
    sizes = sorted(Counter(case.patient for case in cohort.cases if case.label is not None).values(), reverse=True)
    return sum(sizes[2 * -(-len(sizes) // recipe.folds) :])


def _patients_of(folder: Path) -> int | None:
    """Return the number of test patients of a curve: those of the cells of one arm, number of labels and seed, of all its folds."""
    found: dict[str, set[str | None]] = {}
    for path in sorted(folder.glob("cells/*/results.json")):
        own = [case.get("patient") or case.get("patient_id") for case in json.loads(path.read_text()).get("cases", [])]
        found.setdefault(re.sub(r"_f[0-9]+$", "", path.parent.name), set()).update(own)
    most = max(found.values(), key=len, default=set())
    return len(most) if most and None not in most else None


def segmentation(bench: Bench, out: Path) -> Found:
    """Label curves of a segmentation network."""
    section = bench.recipe.segmentation
    if section is None or section.recipe is None:
        return _not_named("segmentation", "label curves of Dice")
    return _curve("segmentation", section, Recipe.load(section.recipe, section.overrides), bench, out, "")


def detection(bench: Bench, out: Path) -> Found:
    """Label curves of a detector."""
    section = bench.recipe.detection
    if section is None or section.recipe is None:
        return _not_named("detection", "label curves of mAP")
    return _curve("detection", section, Recipe.load(section.recipe, section.overrides), bench, out, "")


def retrieval(bench: Bench, _out: Path) -> Found:
    """Precision among the nearest images of other patients, and how often a patient is found again in another study."""
    done = Found()
    for name, cases in _classes(bench):
        rows = bench.unseen(name)
        if len(rows) < 4:
            done.skipped.append(skip(name, "retrieval", f"{len(rows)} validation and test cases; four or more are needed"))
            continue
        targets, patients = cases.targets[rows].astype(np.int64), cases.patients(rows)
        ks = [k for k in bench.recipe.k if k < len(rows)]
        for model, values in bench.of(name).items():
            try:
                hits, chance = precisions(values[rows], targets, patients, ks)
            except RequestError as err:  # the same for all models: too few patients
                done.skipped.append(skip(name, "retrieval", str(err)))
                break
            for k in ks:
                for who, found in ((model, hits[k]), *((("chance", chance),) if model == WEIGHTS else ())):
                    score = score_row(who, "", f"precision@{k}", found, patients, draws=bench.recipe.draws, seed=bench.recipe.seed)
                    done.rows.append(row_of(score, "retrieval", name, "", main=who != "chance" and k == (5 if 5 in ks else ks[0])))
    _join(done, _again(bench))
    return done


def _again(bench: Bench) -> Found:
    what = "patients found again"
    scored = sorted({int(n) for name, cases in bench.tasks.items() for n in cases.ids[bench.unseen(name)]})
    if any("patient_unknown" in flags for flags in bench.row("quality_flags")):
        return Found(skipped=[skip("", what, "patients are not known")])
    patients, studies = ([bench.row(key)[n] for n in scored] for key in ("patient_id", "study_id"))
    rows = []
    for model, values in bench.features.items():
        places, hits, chance = reidentified(values[scored], patients, studies)
        if not len(places):
            return Found(skipped=[skip("", what, "no patient of the validation and test cases has two studies")])
        own = [patients[k] for k in places]
        for who, found in ((model, hits), *((("chance", chance),) if model == WEIGHTS else ())):
            score = score_row(who, "", "reidentified", found, own, draws=bench.recipe.draws, seed=bench.recipe.seed)
            rows.append(row_of(score, "retrieval", "privacy", "nearest of another study"))
    return Found(rows=rows)


def regression(bench: Bench, out: Path) -> Found:
    """Numbers: ridge with the penalty chosen on validation, neighbours, and fine-tuning where the recipe asks."""
    done = Found()
    for name, cases in bench.tasks.items():
        if cases.task != "regression":
            continue
        if why := _cannot_fit(cases):
            done.skipped.append(skip(name, "ridge", why))
            continue
        bench.of(name)
        with _or_skip(done, name, "ridge"):
            tables = probe_tables(bench, name)
            done.rows += _probe_rows(bench, "regression", name, tables, "ridge", {"r2": r2, "mae": mae}, main="mae")
            done.p_values += _against_controls(bench, "regression", name, tables, r2)
        with _or_skip(done, name, "neighbours"):
            done.rows += _neighbours(bench, "regression", name, [k for k in bench.recipe.k if k < len(bench.unseen(name))])
        if bench.recipe.regression is None:
            done.skipped.append(skip(name, "fine-tuning", "the recipe names none (key regression)"))
        else:
            section = bench.recipe.regression
            counts = budgets(section, len(cases.where("train")), least=2)
            more = _curve("regression", section, _own_recipe(bench, section, name), bench, out, name, counts)
            done.rows += [{**row, "setting": f"fine-tuned, {row['setting']}"} for row in more.rows]
            done.skipped += more.skipped
            done.again |= more.again
    done.skipped.append(skip("", "survival", "no table of times and events"))
    return done


def ood(bench: Bench, _out: Path) -> Found:
    """Sites and scanners held out in turn, and test images corrupted at rising levels."""
    done = Found()
    for name, cases in bench.tasks.items():
        if why := _cannot_fit(cases):
            done.skipped.append(skip(name, "robustness", why))
            continue
        bench.of(name)
        for column in bench.recipe.left_out:
            with _or_skip(done, name, f"{column} held out"):
                _join(done, _held_out(bench, name, column))
        try:
            with _or_skip(done, name, "corruptions"):
                _join(done, _corrupted(bench, name))
        except TypeError as err:
            done.skipped.append(skip(name, "corruptions", str(err)))
    return done


def _statistic(cases: Cases) -> tuple[str, Statistic, float]:
    """Return the metric of out-of-distribution tables, and what chance has."""
    return ("auroc", mean_auc, 0.5) if cases.task == "classification" else ("r2", r2, 0.0)


def _held_out(bench: Bench, name: str, column: str) -> Found:
    """Fit on the cases with other values of a column, score on the test cases with this one."""
    cases, values = bench.tasks[name], bench.column(column)
    if values is None:
        return Found(skipped=[skip(name, f"{column} held out", f"no attached labels for {column}")])
    own = np.array(bench.public(column, values))[cases.ids]
    known = sorted(set(own.tolist()) - {"unknown"})
    if len(known) < 2:
        why = f"{len(known)} known value of {column} among {len(own)} cases; it takes two"
        return Found(skipped=[skip(name, f"{column} held out", why)])
    metric, statistic, _ = _statistic(cases)
    found = Found()
    for value in known:
        test = np.array([row for row in cases.where("test") if own[row] == value])
        rest = replace(cases, split=np.where((own == value) & (cases.split != "test"), "none", cases.split))
        seen = np.array([row for row in cases.where("test") if own[row] != value])
        if (
            len(test) < LEAST
            or len(seen) < LEAST
            or _cannot_fit(rest)
            or (cases.classes and len(set(cases.targets[test].tolist())) < 2)
        ):
            found.skipped.append(
                skip(name, f"{column} {value} held out", f"{len(test)} test cases with it, {len(seen)} without: too few")
            )
            continue
        for model, x in bench.of(name).items():
            probe = fit_probe(x, rest, rest.where("train"), bench.recipe.seed)
            for what, rows in (("held out", test), ("the others", seen)):
                table = predicted(probe, x, cases, rows)
                score = score_row(
                    model,
                    "",
                    metric,
                    table,
                    cases.patients(rows),
                    statistic=statistic,
                    draws=bench.recipe.draws,
                    seed=bench.recipe.seed,
                )
                found.rows.append(row_of(score, "ood", name, f"{column} {what}", subgroup=value))
    return found


def _corrupted(bench: Bench, name: str) -> Found:
    """Score the test cases under every corruption and level with the probe of clean training images."""
    cases = bench.tasks[name]
    train, test = cases.where("train"), cases.where("test")
    metric, statistic, chance = _statistic(cases)
    features = bench.of(name)
    probes = {model: fit_probe(x, cases, train, bench.recipe.seed) for model, x in features.items()}
    clean = {model: statistic(predicted(probe, features[model], cases, test)) for model, probe in probes.items()}
    patients, found = cases.patients(test), Found()
    scores: dict[str, list[float]] = {model: [] for model in probes}
    for kind in bench.recipe.corruptions.kinds:
        for level in bench.recipe.corruptions.levels:

            def change(images: torch.Tensor, kind: str = kind, level: int = level) -> torch.Tensor:
                return corrupt(images, kind, level, bench.recipe.seed)

            changed = bench.look(cases.ids[test], change)
            for model, probe in probes.items():
                whole = features[model].copy()
                whole[test] = changed[model]
                table = predicted(probe, whole, cases, test)
                score = score_row(
                    model, "", metric, table, patients, statistic=statistic, draws=bench.recipe.draws, seed=bench.recipe.seed
                )
                if score["value"] is not None:
                    scores[model].append(float(score["value"]))
                found.rows.append(row_of(score, "ood", name, f"{kind}, level {level}"))
    for model, values in scores.items():
        value = _finite(relative_robustness(clean[model], values, chance))
        score = {"name": model, "metric": "relative_robustness", "value": value, "low": None, "high": None}
        score |= {"n_images": len(test), "n_patients": None if patients is None else len(set(patients))}
        found.rows.append(row_of(score, "ood", name, "all corruptions"))  # no main row: it rewards what is near chance
        if value is None:
            found.skipped.append(skip(name, f"relative robustness of {model}", "its clean score is at chance"))
    return found


def fairness(bench: Bench, _out: Path) -> Found:
    """Scores by subgroup with the rule of the smallest group, gaps, and what frozen features say of site, sex and scanner."""
    done = Found()
    for name, cases in bench.tasks.items():
        if why := _cannot_fit(cases):
            done.skipped.append(skip(name, "subgroups", why))
            continue
        bench.of(name)
        with _or_skip(done, name, "subgroups"):
            tables = probe_tables(bench, name)
            for column in bench.recipe.subgroups:
                _join(done, _by_group(bench, name, column, tables))
    for column in bench.recipe.leakage:
        _join(done, _leakage(bench, column))
    done.private["groups"] = {
        column: dict(sorted(set(zip(bench.public(column, values), values))))
        for column in {*bench.recipe.subgroups, *bench.recipe.left_out}
        if column not in OPEN_COLUMNS and (values := bench.column(column)) is not None
    }
    return done


def _by_group(bench: Bench, name: str, column: str, tables: Features) -> Found:
    cases, values = bench.tasks[name], bench.column(column)
    if values is None:
        return Found(skipped=[skip(name, f"subgroups by {column}", f"no attached labels for {column}")])
    test = cases.where("test")
    kinds = np.array(bench.public(column, values))[cases.ids][test]
    if set(kinds.tolist()) <= {"unknown"}:
        return Found(skipped=[skip(name, f"subgroups by {column}", f"{column} is not known of any test case")])
    metric, statistic = ("auroc", mean_auc) if cases.task == "classification" else ("mae", mae)
    sign = 1.0 if metric == "auroc" else -1.0
    positives = cases.targets[test] == 1 if len(cases.classes) == 2 else None
    patients, found = cases.patients(test), Found()
    for model, table in tables.items():
        rows = subgroup_rows(
            model, "", metric, table, kinds.tolist(), patients, statistic=statistic, positives=positives, draws=bench.recipe.draws,
            seed=bench.recipe.seed,
        )  # fmt: skip
        found.rows += [row_of(row, "fairness", name, f"by {column}", subgroup=row["group"]) for row in rows]
        usable = [row for row in rows if row["value"] is not None and row["group"] != "unknown"]
        if len(usable) < 2:
            continue
        ordered = sorted(usable, key=lambda row: sign * row["value"])
        best, worst = ordered[-1]["group"], ordered[0]["group"]
        marked = np.concatenate([table, (kinds == best)[:, None], (kinds == worst)[:, None]], axis=1)

        def gap(rows: np.ndarray) -> float:  # signed, or no interval could hold 0
            inside = [rows[rows[:, k] > 0, :-2] for k in (-2, -1)]
            return sign * (statistic(inside[0]) - statistic(inside[1])) if all(map(len, inside)) else float("nan")

        score = score_row(
            model, "", f"gap of {metric}", marked, patients, statistic=gap, draws=bench.recipe.draws, seed=bench.recipe.seed
        )
        found.rows.append(row_of(score, "fairness", name, f"by {column}", subgroup=f"{best} against {worst}, {CHOSEN}"))
    if any(row["value"] is None for row in found.rows):
        why = (
            f"a group needs {SMALLEST} cases, and {POSITIVES} of either of two classes; some have fewer and are called insufficient"
        )
        found.skipped.append(skip(name, f"some subgroups by {column}", why))
    return found


def _leakage(bench: Bench, column: str) -> Found:
    """Predict a column from frozen features across patients; near 1 is a shortcut that a network may take."""
    what = f"leakage of {column}"
    values = bench.column(column)
    if values is None:
        return Found(skipped=[skip("", what, f"no attached labels for {column}")])
    scored = sorted({int(n) for name, cases in bench.tasks.items() for n in cases.ids[bench.unseen(name)]})
    unknown = any("patient_unknown" in flags for flags in bench.row("quality_flags"))
    known = list(map(str, range(len(bench.series)))) if unknown else bench.row("patient_id")
    # patients, not series: folds are of patients, and a value of one patient is learnt from its other images or not at all
    holders = {v: len({known[n] for n in scored if values[n] == v}) for v in {values[n] for n in scored} - {"unknown"}}
    kept = [n for n in scored if holders.get(values[n], 0) >= LEAST]
    kinds = len({values[n] for n in kept})
    if kinds < 2:
        whom = "series" if unknown else "patients"
        why = f"{kinds} value of {column} has {LEAST} or more {whom} among the validation and test cases; it takes two"
        return Found(skipped=[skip("", what, why)])
    patients = None if unknown else [known[n] for n in kept]
    target = [values[n] for n in kept]
    done, features = Found(), bench.features
    with _or_skip(done, "", what):
        for model, x in features.items():
            scores = linear_probe(
                x[kept], target, patients, task="classification", name=model, seed=bench.recipe.seed, draws=bench.recipe.draws
            )
            score = next(row for row in scores if row["metric"] == "balanced_accuracy")
            done.rows.append(row_of({**score, "metric": "balanced accuracy"}, "fairness", what, f"chance {1 / kinds:.2f}"))
    return done


RUN: dict[str, Callable[[Bench, Path], Found]] = {
    "smoke": smoke,
    "frozen": frozen,
    "classification": classification,
    "segmentation": segmentation,
    "detection": detection,
    "retrieval": retrieval,
    "regression": regression,
    "ood": ood,
    "fairness": fairness,
}
"""What runs each tier."""
