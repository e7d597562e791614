"""A page of pictures: matched points across test patients, and where in them it looks like one query point.

    python -m benchmarks.match_page hippocampus ../shared/data --run runs/hippocampus/matcher --page runs/hippocampus/matches.html
    python -m benchmarks.match_page phantoms --folder runs/match_phantoms --run runs/match_phantoms/matcher/0 --page matches.html

Points are those of a regular grid in the body; the query point of the similarity maps is the centroid of the first label in the first
patient. Patients are numbered in the order of the cohort's table, and nothing else of them is written. The page of real images is for its
owner (mode 0600); that of phantoms shows no patient.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.match_accuracy import Patient, draw_pairs, phantom_archive, read_patient
from medssl.correspondence import grid_points, on_voxels
from medssl.evaluation.cohort import Cohort
from medssl.matching.embedding import EmbeddingMatcher
from medssl.report.elements import PAGE, STYLE, image
from medssl.report.match_figure import matches_png, middle_point
from medssl.weights import write_atomic


def voxels(patient: Patient, points_mm: np.ndarray) -> np.ndarray:
    """Return fractional voxel indices of world points."""
    return np.asarray(patient.volume.to_item(points_mm) / patient.volume.spacing_mm - 0.5)


def picture(matcher: EmbeddingMatcher, a: Patient, b: Patient, points_mm: np.ndarray, focus: int | None, *, similar: bool) -> bytes:
    """Draw the matches of points of A in B; the planes go through one of them (None: the matched one nearest to the middle)."""
    found = matcher.match(a.volume, points_mm, b.volume)
    matched = np.isfinite(found.points_mm).all(axis=1)
    chosen = middle_point(points_mm, matched) if focus is None else focus
    layer = None
    if similar and matched[chosen]:
        layer = on_voxels(*matcher.similarity(a.volume, points_mm[chosen], b.volume), b.volume)
    images = tuple(p.volume.read().image[0].astype(np.float32) for p in (a, b))
    spacings = (a.volume.spacing_mm.tolist(), b.volume.spacing_mm.tolist())
    places = (voxels(a, points_mm), voxels(b, found.points_mm))
    return matches_png((images[0], images[1]), spacings, places, focus=chosen, similarity=layer, scores=found.scores)


def page(matcher: EmbeddingMatcher, patients: Sequence[Patient], *, pairs: int, others: int, grid_mm: float, real: bool) -> str:
    """Return the page as text."""
    matches = []
    for a, b in draw_pairs(pairs, len(patients), 0):
        points = grid_points(patients[a].volume, grid_mm)
        png = picture(matcher, patients[a], patients[b], points, None, similar=False)
        said = f"Patient {a + 1} (A) and patient {b + 1} (B)"
        matches.append(image(png, f"Matched points of patient {a + 1} and patient {b + 1} in three planes", caption=said))
    first = patients[0]
    query = first.points_mm[:1]
    maps = []
    for n, other in enumerate(patients[1 : others + 1], start=2):
        png = picture(matcher, first, other, query, 0, similar=True)
        found = matcher.match(first.volume, query, other.volume)
        error = float(np.linalg.norm(found.points_mm[0] - other.points_mm[0]))
        said = f"Patient 1 (A) and patient {n} (B): score {found.scores[0]:.2f}"
        said += f", {error:.1f} mm from the centroid of the same label in B" if np.isfinite(error) else ", no match"
        maps.append(image(png, f"Similarity to the query point in patient {n}", caption=said))
    privacy = "Private: shows images of patients." if real else "Shows phantoms; no patients."
    parts = (
        (
            "points",
            "Matched points",
            f"Body points {grid_mm:g} mm apart in A, and where the matcher finds them in B; equal numbers belong together.",
        ),
        (
            "maps",
            "Similarity maps",
            "The cross marks the query point in A and its match in B; the third column shows how like it every place is.",
        ),
    )
    nav = " ".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in parts)
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2><p>{below}</p>{"".join(figures)}</section>'
        for (name, heading, below), figures in zip(parts, (matches, maps))
    )
    title = "Matched points across patients"
    return PAGE.format(title=title, heading=title, lead="", style=STYLE, nav=nav, body=body, footer=privacy)


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cohort", choices=("hippocampus", "phantoms"))
    parser.add_argument("shared", type=Path, nargs="?", default=Path("../shared/data"), help="only for hippocampus")
    parser.add_argument("--run", type=Path, required=True, help="run of the objective anatomical_embedding")
    parser.add_argument("--folder", type=Path, default=Path("runs/match_phantoms"), help="of the phantoms")
    parser.add_argument("--phantoms", type=int, default=80)
    parser.add_argument("--page", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--others", type=int, default=4, help="patients in which the query point is looked for")
    parser.add_argument("--grid", type=float, help="mm between points; default 8 (hippocampus) or 32")
    options = parser.parse_args(argv)
    real = options.cohort == "hippocampus"
    data = options.shared / "msd_hippocampus" if real else phantom_archive(options.folder, options.phantoms)
    cohort = Cohort.load(data)
    cases = cohort.split("test")[: max(options.others + 1, 8)]
    patients = [read_patient(case, sorted(cohort.structures) or [1, 2]) for case in cases]
    grid = options.grid or (8.0 if real else 32.0)
    text = page(EmbeddingMatcher(options.run), patients, pairs=options.pairs, others=options.others, grid_mm=grid, real=real)
    write_atomic(options.page, text.encode(), mode=0o600 if real else 0o644)
    print(f"{options.page} written" + ("; it shows patients, for your eyes only" if real else ""))
    return Path(options.page)


if __name__ == "__main__":
    main()
