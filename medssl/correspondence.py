"""Embeddings of an archive, and corresponding points of two volumes: what `medssl embed` and `medssl match` do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl import data_sources
from medssl.archive.table import Archive
from medssl.errors import ImageError, RequestError, near
from medssl.matching.base import Matches, MatchVolume, body_mask, checked_points
from medssl.matching.embedding import EmbeddingMatcher
from medssl.matching.network import MatcherNetwork
from medssl.matching.store import EmbeddingReader, open_folder, write_embedding
from medssl.recipe import EvaluateBase, SourceSection
from medssl.registry import DOMAINS, MATCHERS, lookup
from medssl.store.manifest import store_key
from medssl.store.reader import StoreReader
from medssl.types import Sample
from medssl.weights import read_manifest, write_atomic

Progress = Callable[[int, int], None]
SERIES = re.compile(r"[0-9a-f]{32}")


@dataclass
class EmbedSummary:
    """What was done for one source.

    Args:
        folder: Where the embeddings lie.
        written: Embeddings written now.
        present: Embeddings that were there already.
        failed: series_id -> (reason, message) of volumes that could not be cached or embedded.
        bytes_per_volume: Mean on disk over all that are there.
        largest: Most bytes of one volume.
        step_mm: Between cells of the fine map.
    """

    folder: Path
    written: int = 0
    present: int = 0
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    bytes_per_volume: int = 0
    largest: int = 0
    step_mm: tuple[float, ...] = ()


def embed(
    recipe: Any,
    weights: Path | str,
    overrides: Sequence[str] = (),
    *,
    step_mm: float | None = None,
    spacing_mm: float | None = None,
    on_cache: Progress | None = None,
    on_embed: Progress | None = None,
) -> dict[str, EmbedSummary]:
    """Write the embeddings of a recipe's volumes into its stores; what is there and fits is left alone, so that it can be killed.

    Args:
        recipe: YAML path or loaded recipe whose sources name the volumes; its objective is not looked at.
        weights: Run of the objective `anatomical_embedding`.
        overrides: `key=value` assignments.
        step_mm: Between cells, the matcher's own step or two or four times that; None is its own.
        spacing_mm: Refuse weights that were not trained at this spacing.
        on_cache: Called with (volumes done, volumes in all) while the store is filled.
        on_embed: Called with (volumes done, volumes in all).

    Returns:
        Per source what was done.

    Raises:
        WeightsError: The weights are no matcher.
        RequestError: The recipe has no volumes, or the spacing or step does not fit the weights.
        StoreError: The disk is full or failing.
    """
    sources = _volume_sources(recipe, overrides)
    network = MatcherNetwork(weights, step_mm=step_mm, spacing_mm=spacing_mm, device=_device())
    done = {}
    for name, section in sources.items():
        shelf = data_sources.fill_shelf(name, section, on_progress=on_cache)
        series = [row.series_id for row in shelf.rows]
        done[name] = embed_store(network, shelf.reader, series, on_progress=on_embed)
        done[name].failed.update(shelf.summary.failed)
    return done


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _volume_sources(recipe: Any, overrides: Sequence[str]) -> dict[str, SourceSection]:
    """Return the sources of volumes of a recipe.

    The recipe may be one that needs these embeddings to run at all, so nothing but its sources is checked.
    """
    from medssl.recipe import Recipe

    loaded = Recipe.load(recipe, overrides) if isinstance(recipe, str | Path) else recipe
    sources = {"source": loaded.source} if isinstance(loaded, EvaluateBase) else dict(getattr(loaded, "sources", {}))
    found = {name: section for name, section in sources.items() if "volume" in data_sources.view_kind(section.views).items}
    if not found:
        raise RequestError(
            "this recipe has no source of volumes; embeddings are made of volumes: give a recipe with views of kind volume or pair"
        )
    return found


def embed_store(
    network: MatcherNetwork, reader: StoreReader, series: Sequence[str], *, on_progress: Progress | None = None
) -> EmbedSummary:
    """Embed items of a store.

    Args:
        network: The matcher's network.
        reader: The store.
        series: Its items.
        on_progress: Called with (done, total).
    """
    manifest = network.manifest(reader.key)
    folder = open_folder(reader.store, manifest)
    written = EmbeddingReader(folder)
    summary = EmbedSummary(folder, step_mm=manifest.step_mm)
    sizes = []
    for done, series_id in enumerate(series):
        version = reader.record(series_id).checksum
        if written.usable(series_id, version):
            summary.present += 1
        else:
            try:
                embedding = network.embed(MatchVolume.of_store(reader, series_id), reader.key)
            except (ImageError, RequestError) as err:
                summary.failed[series_id] = (getattr(err, "reason", "not_embedded"), str(err))
                continue
            write_embedding(folder, series_id, embedding, version)
            summary.written += 1
        record = written.record(series_id)
        sizes.append(0 if record is None else int(record["n_bytes"]))
        if on_progress is not None:
            on_progress(done + 1, len(series))
    summary.bytes_per_volume = int(np.mean(sizes)) if sizes else 0
    summary.largest = max(sizes, default=0)
    return summary


@dataclass
class MatchResult:
    """Corresponding points.

    Args:
        matcher: Its name.
        points: One row per point: `a` and `b` (x, y, z in world mm, RAS+; b is None without a match), `score`.
        picture: Path of the overlay; None when none was asked for.
    """

    matcher: str
    points: list[dict[str, Any]]
    picture: Path | None = None


def match(
    a: Path | str,
    b: Path | str,
    *,
    points: Sequence[Sequence[float]] | None = None,
    grid_mm: float | None = None,
    weights: Path | str | None = None,
    matcher: str | None = None,
    index: Path | str | None = None,
    domain: str | None = None,
    out: Path | str | None = None,
    step_mm: float | None = None,
    spacing_mm: float | None = None,
) -> MatchResult:
    """Find points of one volume in another.

    Args:
        a: Series id (32 hex digits, with `index`), a volume file, or a folder that holds one DICOM series.
        b: Likewise.
        points: Points in world mm (RAS+) of `a`.
        grid_mm: Take body points of `a` on a grid of this step instead.
        weights: Run of the objective `anatomical_embedding`; needed by the matcher `embedding`.
        matcher: `embedding`, `affine` or `body_axis`; None is `embedding` with weights and `affine` without.
        index: Archive that series ids refer to.
        domain: Domain that reads files; None is that of the weights when they know one only.
        out: PNG to write: matched points in both images and, with embeddings, the map of similarity for the first point (of a grid: the
            one in the middle). It shows patients and is made for its owner alone (mode 0600).
        step_mm: Step of embeddings; in an archive this chooses among those on disk.
        spacing_mm: Refuse weights that were not trained at this spacing.

    Raises:
        RequestError: Points, series, matcher or weights cannot be used.
        ImageError: A volume cannot be read.
    """
    name = matcher or ("embedding" if weights is not None else "affine")
    if name not in MATCHERS:
        raise RequestError(f'unknown matcher "{name}"{near(name, MATCHERS)}; accepted: {", ".join(sorted(MATCHERS))}')
    if name == "embedding" and weights is None:
        raise RequestError("the matcher embedding needs weights; give --weights RUN, or take --matcher affine or body_axis")
    if (points is None) == (grid_mm is None):
        raise RequestError("give points (--point x,y,z in world mm) or a grid (--grid), and not both")
    domains = read_manifest(weights, "encoder").get("domains", []) if weights is not None and domain is None else []
    chosen = domain or (domains[0] if len(domains) == 1 else None)
    source, store_a = _volume(a, "A", index, chosen)
    target, store_b = _volume(b, "B", index, chosen)
    asked = checked_points(points) if points is not None else grid_points(source, float(grid_mm or 0))
    inside = source.inside(source.to_item(asked))
    if points is not None and not inside.all():
        k = int(np.flatnonzero(~inside)[0])
        raise RequestError(
            f"point {k + 1} lies outside volume A, which spans {_span(source)} in world mm (RAS+: x grows to the patient's right, y to "
            "anterior, z to superior); give points inside it"
        )
    tool = _matcher(name, weights, store_a if store_a == store_b else None, step_mm, spacing_mm)
    found: Matches = tool.match(source, asked, target)
    picture = None
    if out is not None:
        picture = _picture(tool, source, target, asked, found, Path(out), grid=points is None)
    rows = [
        {
            "a": [round(float(v), 2) for v in p],
            "b": None if not np.isfinite(q).all() else [round(float(v), 2) for v in q],
            "score": round(float(s), 4),
        }
        for p, q, s in zip(asked, found.points_mm, found.scores)
    ]
    return MatchResult(name, rows, picture)


def _matcher(name: str, weights: Path | str | None, store: Path | None, step_mm: float | None, spacing_mm: float | None) -> Any:
    """Build a matcher; embeddings of a common store are used where they fit, else both volumes are embedded on the spot."""
    target = lookup("matcher", name)
    if name != "embedding":
        return target()
    given = {"step_mm": step_mm, "spacing_mm": spacing_mm, "device": _device()}
    if store is not None:
        try:
            return target(weights, store=store, **given)
        except RequestError:  # none that fit: the weights themselves are looked at again below
            pass
    return target(weights, **given)


def _volume(what: Path | str, letter: str, index: Path | str | None, domain: str | None) -> tuple[MatchVolume, Path | None]:
    """Open a volume, and say which store it lies in, if any."""
    text = str(what)
    if SERIES.fullmatch(text) and not Path(text).exists():
        if index is None:
            raise RequestError(f"volume {letter} is a series id, which an archive knows; give --index ARCHIVE")
        return _series(text, letter, Archive.open(Path(index)))
    path = Path(text)
    if not path.exists():
        raise RequestError(f"volume {letter}: no such file or folder, and no series id of 32 hex digits; give one of these")
    if domain is None:
        raise RequestError(f"volume {letter} is a file: say what it is with --domain ct or --domain mri")
    files = sorted(found for found in path.iterdir() if found.is_file()) if path.is_dir() else [path]
    reader = lookup("domain", domain)()
    return MatchVolume.of_sample(reader.read(files, series_id=letter), letter), None


def _series(series_id: str, letter: str, archive: Archive) -> tuple[MatchVolume, Path | None]:
    rows = archive.select(f"series_id = '{series_id}'")
    if not rows or rows[0].domain not in DOMAINS or rows[0].kind != "volume":
        raise RequestError(
            f"volume {letter}: the index {archive.path} has no usable volume with this series id; look with `medssl archive ls`"
        )
    reader = lookup("domain", rows[0].domain)()
    folder = archive.path / "store" / f"{reader.name}-{store_key(reader)}"
    if (folder / "manifest.json").is_file() and series_id in (store := StoreReader(folder)):
        return MatchVolume.of_store(store, series_id), folder
    sample: Sample = reader.read(archive.files(series_id), series_id=series_id, part=archive.part(series_id))
    return MatchVolume.of_sample(sample), None


def grid_points(volume: MatchVolume, step_mm: float) -> np.ndarray:
    """Return body points of a volume on a regular grid in its own axes, (N, 3) world mm.

    Raises:
        RequestError: The step is not positive, or no point of the grid lies in the body.
    """
    if not step_mm > 0:
        raise RequestError(f"the grid's step is {step_mm:g} mm; accepted: a number above 0")
    mask = body_mask(volume.read())
    axes = [np.arange(min(step_mm, extent) / 2, extent, step_mm) for extent in volume.extent_mm]
    items = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    voxel = np.minimum((items / volume.spacing_mm).astype(int), np.asarray(volume.shape) - 1)
    kept = items[mask[tuple(voxel.T)]]
    if len(kept) == 0:
        raise RequestError(f"no point of a grid of {step_mm:g} mm lies in the body of volume A; take a smaller step")
    return volume.to_world(kept)


def _span(volume: MatchVolume) -> str:
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * volume.extent_mm
    world = volume.to_world(corners)
    return ", ".join(f"{axis} {low:.0f} to {high:.0f}" for axis, low, high in zip("xyz", world.min(axis=0), world.max(axis=0)))


def _picture(
    tool: Any, source: MatchVolume, target: MatchVolume, asked: np.ndarray, found: Matches, out: Path, *, grid: bool
) -> Path:
    """Draw the matches into a private PNG."""
    from medssl.report.match_figure import matches_png, middle_point

    if out.suffix.lower() != ".png":
        raise RequestError(f"{out.name}: the overlay is a PNG; give a name that ends in .png")
    similarity = None
    matched = np.isfinite(found.points_mm).all(axis=1)
    focus = middle_point(asked, matched) if grid else int(matched.argmax())
    if isinstance(tool, EmbeddingMatcher) and matched[focus]:
        cells, origin, step = tool.similarity(source, asked[focus], target)
        similarity = on_voxels(cells, origin, step, target)
    images = tuple(volume.read().image[0].astype(np.float32) for volume in (source, target))
    places = tuple(
        volume.to_item(points) / volume.spacing_mm - 0.5 for volume, points in ((source, asked), (target, found.points_mm))
    )
    spacings = (source.spacing_mm.tolist(), target.spacing_mm.tolist())
    data = matches_png(
        (images[0], images[1]), spacings, (places[0], places[1]), focus=focus, similarity=similarity, scores=found.scores
    )
    write_private_file(out, data)
    return out


def write_private_file(path: Path, data: bytes) -> None:
    """Write a picture of patients that only its owner may read; the mode of a folder that exists stays as it is."""
    write_atomic(path, data)
    path.chmod(0o600)


def on_voxels(cells: np.ndarray, origin_mm: np.ndarray, step_mm: np.ndarray, volume: MatchVolume) -> np.ndarray:
    """Return a map of cells on the voxels of a volume, by nearest cell."""
    picks = []
    for axis, n in enumerate(volume.shape):
        places = (np.arange(n) + 0.5) * volume.spacing_mm[axis]
        picks.append(np.clip(np.rint((places - origin_mm[axis]) / step_mm[axis]).astype(int), 0, cells.shape[axis] - 1))
    return cells[np.ix_(*picks)]
