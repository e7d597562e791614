"""How far from the truth points are matched between test patients: label centroids of the hippocampus, or organ centres of phantoms.

    python -m benchmarks.match_accuracy hippocampus ../shared/data --run embedding=runs/hippocampus/matcher
    python -m benchmarks.match_accuracy phantoms --train --folder runs/match_phantoms

The centroid of a label in A is looked for in B; the error is the distance of the match to the centroid of the same label in B. Labels are
used for this measurement alone. Pairs of patients are drawn once, by seed, and are the same for every matcher. Matchers that are trained
come as runs (`--run NAME=FOLDER`, several); `affine` and `body_axis` train nothing. Two baselines stand for no matching at all:

- `same_world`: the same world coordinates;
- `same_from_middle`: as far from the middle of volume B, along its own axes, as the point lies from the middle of A.

Intervals are percentile bootstraps by patient: patients are drawn again, and a pair counts as often as both of its patients were drawn
together (product of the two counts). Errors are over points that a matcher matched, the share that it did not is beside them; differences
to the embedding are over the points that both matched. What a matcher found is kept in `--folder`, pair by pair, so that the script can
be killed and started again. `--train` writes the phantoms and trains their matchers first (one per seed), resumable as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, markdown, rounded
from medssl import api
from medssl.domains.mri import MRI
from medssl.evaluation.cohort import Case, Cohort
from medssl.matching.affine import AffineMatcher
from medssl.matching.base import Matches, MatchVolume
from medssl.matching.body_axis import BodyAxisMatcher
from medssl.matching.cells import VolumeEmbedding
from medssl.matching.embedding import match_embeddings
from medssl.matching.network import MatcherNetwork
from medssl.phantoms import make_cohort
from medssl.seeding import counter_rng
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import write_atomic

DRAWS = 2000
EVERY = 10
"""Pairs after which what was found is written."""
BASELINES = ("same_world", "same_from_middle")
REGISTRATION_MM = {"hippocampus": 1.0, "phantoms": 4.0}
"""Voxel at which volumes are registered and bodies found: about a fiftieth of the volume; set before anything was measured."""
PHANTOM_RECIPE = Path(__file__).parent / "recipes" / "anatomical_embedding_phantoms.yaml"

Find = Callable[["Patient", "Patient"], Matches]


@dataclass(frozen=True)
class Patient:
    """A test patient.

    Args:
        name: Place in the cohort's table.
        volume: The image.
        points_mm: (L, 3) centroid of each label in world mm; NaN where the label is absent.
    """

    name: str
    volume: MatchVolume
    points_mm: np.ndarray


# --- patients


def centroids(label: Path, values: Sequence[int]) -> np.ndarray:
    """Return the centroids of labels in world mm, (L, 3); NaN where a label is absent."""
    import nibabel

    image: Any = nibabel.load(label)  # type: ignore[attr-defined]
    array = np.asarray(image.dataobj)
    rows = []
    for value in values:
        voxels = np.argwhere(array == value)
        rows.append(voxels.mean(axis=0) @ image.affine[:3, :3].T + image.affine[:3, 3] if len(voxels) else np.full(3, np.nan))
    return np.asarray(rows)


def read_patient(case: Case, values: Sequence[int]) -> Patient:
    """Read one case; a series is called by its place in the table."""
    files = sorted(case.image.iterdir()) if case.image.is_dir() else [case.image]
    sample = MRI().read(files, series_id=case.id)
    assert case.label is not None
    return Patient(case.id, MatchVolume.of_sample(sample, case.id), centroids(case.label, values))


def draw_pairs(count: int, patients: int, seed: int) -> list[tuple[int, int]]:
    """Return distinct ordered pairs of different patients, all of them where there are no more than asked for."""
    every = [(a, b) for a in range(patients) for b in range(patients) if a != b]
    order = counter_rng("match accuracy", seed).permutation(len(every))[:count]
    return [every[int(k)] for k in sorted(order)]


# --- matchers


def same_world(a: Patient, b: Patient) -> Matches:
    return Matches(a.points_mm, np.ones(len(a.points_mm)))


def same_from_middle(a: Patient, b: Patient) -> Matches:
    offsets = a.volume.to_item(a.points_mm) - a.volume.extent_mm / 2
    return Matches(b.volume.to_world(b.volume.extent_mm / 2 + offsets), np.ones(len(a.points_mm)))


def by_embedding(run: Path) -> Find:
    """Return a matcher that embeds each patient once."""
    network = MatcherNetwork(run)
    made: dict[str, VolumeEmbedding] = {}

    def of(patient: Patient) -> VolumeEmbedding:
        if patient.name not in made:
            made[patient.name] = network.embed(patient.volume)
        return made[patient.name]

    return lambda a, b: match_embeddings(of(a), a.volume, a.points_mm, of(b), b.volume)


def finders(cohort: str, runs: Mapping[str, Path]) -> dict[str, tuple[str, Callable[[], Find]]]:
    """Return name -> (what its results depend on, how to make it)."""
    step = REGISTRATION_MM[cohort]

    def tool(made: Any) -> Find:
        return lambda a, b: made.match(a.volume, a.points_mm, b.volume)

    found: dict[str, tuple[str, Callable[[], Find]]] = {
        "same_world": ("", lambda: same_world),
        "same_from_middle": ("", lambda: same_from_middle),
        "body_axis": (f"{step:g}", lambda: tool(BodyAxisMatcher(step))),
        "affine": (f"{step:g}", lambda: tool(AffineMatcher(step))),
    }
    for name, run in runs.items():
        found[name] = (run_hash(run), lambda run=run: by_embedding(run))  # type: ignore[misc]
    return found


def run_hash(run: Path) -> str:
    """Return a hash of a run's weights."""
    return str(MatcherNetwork(run).manifest().key)


def found_by(
    name: str, version: str, make: Callable[[], Find], patients: Sequence[Patient], pairs: Sequence[tuple[int, int]], folder: Path
) -> dict[str, np.ndarray]:
    """Return errors (P, L) in mm, NaN without a match, and scores (P, L) of one matcher; computed once and kept."""
    asked = hashlib.sha256(json.dumps([name, version, list(pairs), [p.name for p in patients]]).encode()).hexdigest()
    path = folder / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows: list[dict[str, Any]] = kept["rows"] if kept.get("asked") == asked else []
    find = make() if len(rows) < len(pairs) else None
    for number in range(len(rows), len(pairs)):
        assert find is not None
        a, b = (patients[k] for k in pairs[number])
        matches = find(a, b)
        errors = np.linalg.norm(matches.points_mm - b.points_mm, axis=1)
        rows.append({"error_mm": [None if np.isnan(e) else float(e) for e in errors], "score": [float(s) for s in matches.scores]})
        if (number + 1) % EVERY == 0 or number + 1 == len(pairs):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"asked": asked, "rows": rows}).encode())
    errors = np.array([[np.nan if e is None else e for e in row["error_mm"]] for row in rows], dtype=float)
    return {"error_mm": errors, "score": np.array([row["score"] for row in rows], dtype=float)}


# --- the table


def weights_of(pairs: Sequence[tuple[int, int]], patients: int, draws: int, seed: int) -> np.ndarray:
    """Return how often each pair counts in each draw of patients, (draws, P)."""
    rng = counter_rng("match accuracy bootstrap", seed)
    counts = np.stack([np.bincount(rng.integers(patients, size=patients), minlength=patients) for _ in range(draws)])
    first, second = np.asarray(pairs).T
    return np.asarray(counts[:, first] * counts[:, second])


def weighted(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return mean and median of values (N,) that count as often as weights (N,) say."""
    if weights.sum() == 0:
        return {"mean": float("nan"), "median": float("nan")}
    drawn = np.repeat(values, weights)
    return {"mean": float(drawn.mean()), "median": float(np.median(drawn))}


def statistics(values: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Return mean and median of (P, L) errors over what is no NaN, with intervals over draws of patients (draws, P)."""
    usable = np.isfinite(values)
    kept = values[usable]
    rows = np.nonzero(usable)[0]
    if len(kept) == 0:
        return {name: None for name in ("mean", "mean_interval", "median", "median_interval")}
    drawn = [weighted(kept, row[rows]) for row in weights]
    result: dict[str, Any] = {}
    for name in ("mean", "median"):
        result[name] = weighted(kept, np.ones(len(kept), dtype=int))[name]
        samples = np.array([draw[name] for draw in drawn])
        result[f"{name}_interval"] = np.quantile(samples[np.isfinite(samples)], [0.025, 0.975]).tolist()
    return result


def summarise(
    found: Mapping[str, Mapping[str, np.ndarray]], pairs: Sequence[tuple[int, int]], patients: int, *, draws: int, seed: int
) -> dict[str, Any]:
    """Return a row per matcher, and the differences of the trained ones to every other on the points that both matched."""
    weights = weights_of(pairs, patients, draws, seed)
    truth = np.isfinite(found["same_world"]["error_mm"])  # both patients have the label
    rows = []
    for name, values in found.items():
        errors, matched = values["error_mm"], np.isfinite(values["error_mm"])
        row = {"matcher": name, **statistics(errors, weights), "points": int(truth.sum())}
        row["unmatched"] = float(1 - matched.sum() / truth.sum())
        row["p90"] = float(np.quantile(errors[matched], 0.9)) if matched.any() else None
        row["within_2mm"] = float((errors[matched] <= 2).sum() / truth.sum())
        if name not in BASELINES and matched.any():
            scores = values["score"][matched]
            row["score"] = float(scores.mean())
            row["score_error_rank_correlation"] = rank_correlation(scores, errors[matched])
        row["median_by_label"] = [float(np.nanmedian(column)) if np.isfinite(column).any() else None for column in errors.T]
        rows.append(row)
    trained = [name for name in found if name not in ("affine", "body_axis", *BASELINES)]
    differences = []
    for name in trained:
        for other in found:
            if other != name:
                apart = found[name]["error_mm"] - found[other]["error_mm"]
                differences.append({"matcher": name, "minus": other, **statistics(apart, weights)})
    plain = {name: next(row["mean"] for row in rows if row["matcher"] == name) for name in BASELINES}
    return {"rows": rows, "differences": differences, "stronger_baseline": min(plain, key=lambda name: plain[name])}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Spearman's rank correlation; None where one of both does not vary."""
    from scipy.stats import rankdata

    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


# --- phantoms


def phantom_archive(folder: Path, patients: int, seed: int = 0) -> Path:
    """Write a cohort of phantoms and its index; return the folder."""
    data = make_cohort(folder / "data", patients=patients, seed=seed)
    if not (folder / "archive" / "series.parquet").exists():
        api.index(data / "images", folder / "archive", splits=data / "split.csv", modality="MR")  # NIfTI files do not say it
    return data


def train_matchers(folder: Path, seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, Path]:
    """Train a matcher per seed on the phantoms' training volumes, or go on with it."""
    runs = {}
    for seed in seeds:
        run = runs[f"embedding_s{seed}"] = folder / "matcher" / str(seed)
        if not finished(run):
            changes = [*overrides, f"data.index={folder / 'archive'}", f"train.seed={seed}", f"out={run}"]
            result = api.pretrain(PHANTOM_RECIPE, changes, resume=True)
            if result.status != "finished":
                raise SystemExit(f"matcher {seed}: {result.status}; start again to go on")
    return runs


def finished(run: Path) -> bool:
    """Whether a run has ended well."""
    return (run / "run.json").exists() and json.loads((run / "run.json").read_text()).get("status") == "finished"


def facts_of_run(run: Path) -> dict[str, Any]:
    """Return seed, steps and recipe hash of a run."""
    facts = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tail = [line for line in lines if line.get("fine_error_mm") is not None][-20:]
    return {
        **{key: facts.get(key) for key in ("status", "seed", "items", "recipe_hash")},
        "steps": max(line["step"] for line in lines) if lines else 0,
        "last_fine_error_mm": float(np.mean([line["fine_error_mm"] for line in tail])) if tail else None,
        "last_coarse_error_mm": float(np.mean([line["coarse_error_mm"] for line in tail])) if tail else None,
    }


# --- the command


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cohort", choices=("hippocampus", "phantoms"))
    parser.add_argument("shared", type=Path, nargs="?", default=Path("../shared/data"), help="only for hippocampus")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER", help="trained matcher; several allowed")
    parser.add_argument("--train", action="store_true", help="phantoms: write them and train matchers first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the phantoms' matchers")
    parser.add_argument("--overrides", nargs="*", default=[], help="changes to the phantoms' recipe, for trials")
    parser.add_argument("--phantoms", type=int, default=80, help="phantoms, a quarter of them for testing")
    parser.add_argument("--folder", type=Path, help="where matches are kept; default runs/match_<cohort>")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the list of pairs and of the bootstrap")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    folder: Path = options.folder or Path("runs") / f"match_{options.cohort}"
    runs = {}
    for text in options.run:
        name, _, run = text.partition("=")
        if not run or name in (*BASELINES, "affine", "body_axis"):
            parser.error("--run takes NAME=FOLDER with a name of its own, for instance embedding=runs/hippocampus/matcher")
        runs[name] = Path(run)
    if options.cohort == "phantoms":
        data = phantom_archive(folder, options.phantoms)
        if options.train:
            runs |= train_matchers(folder, options.seeds, options.overrides)
    else:
        data = options.shared / "msd_hippocampus"
    cohort = Cohort.load(data)
    values = sorted(cohort.structures) or [1, 2]
    patients = [read_patient(case, values) for case in cohort.split(options.split)]
    pairs = draw_pairs(options.pairs, len(patients), options.seed)
    found = {}
    for name, (version, make) in finders(options.cohort, runs).items():
        found[name] = found_by(name, version, make, patients, pairs, folder / "matches" / options.split)
        print(f"{now()} {name} done", flush=True)
    summary = summarise(found, pairs, len(patients), draws=options.draws, seed=options.seed)
    name = f"match_accuracy_{options.cohort}" + ("" if options.split == "test" else f"_{options.split}")
    content: dict[str, Any] = rounded(
        {
            "benchmark": name,
            "when": now(),
            "settings": {
                "split": options.split,
                "pairs": len(pairs),
                "patients": len(patients),
                "labels": [cohort.structures.get(value, str(value)) for value in values],
                "seed": options.seed,
                "draws": options.draws,
                "registration_mm": REGISTRATION_MM[options.cohort],
            },
            **summary,
            "runs": {key: facts_of_run(run) for key, run in runs.items()},
            **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")},
        }
    )
    show = ("matcher", "mean", "mean_interval", "median", "median_interval", "p90", "within_2mm", "unmatched", "score")
    print(markdown([{key: span(row.get(key)) for key in show} for row in content["rows"]]) + "\n")
    print(markdown([{key: span(value) for key, value in row.items()} for row in content["differences"]]) + "\n")
    print(f"stronger baseline: {content['stronger_baseline']}")
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    return content


def span(value: Any) -> Any:
    """Write an interval as text."""
    return f"{value[0]:.2f} to {value[1]:.2f}" if isinstance(value, list) and len(value) == 2 else value


if __name__ == "__main__":
    main()
