"""From a recipe's sources to objects: what is selected, cached, drawn from, and shown to probes.

Views come in five kinds (`views.kind` of a source): `volume` crops of volumes; `pair` two crops of volumes that belong together, under
the key `volume` as well; `image` pictures, single slices and frames; `stack` slices of a volume or frames of a clip, in order; `clip`
ultrasound cines sampled by time.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.archive.table import Archive, SeriesRow
from medssl.cards.named import SourceCards
from medssl.errors import ImageError, RequestError, near
from medssl.recipe import Component, SourceSection
from medssl.registry import argument_faults, component_faults, lookup
from medssl.sampling.clips import ClipSampler, ClipSource, MiddleClips, check_clip
from medssl.sampling.items import Item, freeze
from medssl.sampling.pairs import PairSampler, PairSource
from medssl.sampling.planes import MiddlePlanes, PlaneSampler, PlaneSource, slice_axis
from medssl.sampling.samplers import CentreSampler, CropSampler
from medssl.sampling.source import ImageSource
from medssl.store.manifest import store_key
from medssl.store.reader import StoreReader
from medssl.store.writer import CacheSummary, cache_items
from medssl.types import Box, ClipBatch, DrawKey, Stack, Views, ViewsMeta, ViewSpec
from medssl.views.clips import ClipFrames, ClipViews
from medssl.views.pipeline import Crop, VolumeViews
from medssl.views.planes import Planes, PlaneViews

Progress = Callable[[int, int], None]
ViewMaker = VolumeViews | PlaneViews | ClipViews
ImageLike = ImageSource | PlaneSource | ClipSource | PairSource


@dataclass(frozen=True)
class ViewKind:
    """One kind of views.

    Args:
        items: Values of the index column `kind` that such views can be made of.
        maker: Class of the view maker.
        sampler: Name and class of its sampler.
        given: Arguments of the sampler that the source gives.
        plain: Arguments of the maker that evaluation keeps.
    """

    items: tuple[str, ...]
    maker: type[VolumeViews] | type[PlaneViews] | type[ClipViews]
    sampler: tuple[str, type[CropSampler] | type[PlaneSampler] | type[ClipSampler] | type[PairSampler]]
    given: tuple[str, ...]
    plain: tuple[str, ...]


_PLAIN_PLANES = ("size", "slices", "normalize", "channels")
VIEW_KINDS: dict[str, ViewKind] = {
    "volume": ViewKind(
        ("volume",),
        VolumeViews,
        ("crops", CropSampler),
        ("source", "ids", "record", "box_size_mm", "batch"),
        ("size", "spacing_mm", "normalize"),
    ),
    "pair": ViewKind(
        ("volume",),
        VolumeViews,
        ("pairs", PairSampler),
        ("source", "ids", "record", "patients", "box_size_mm", "volumes", "regions", "batch"),
        ("size", "spacing_mm", "normalize"),
    ),
    "image": ViewKind(
        ("image", "volume", "cine"),
        PlaneViews,
        ("planes", PlaneSampler),
        ("source", "ids", "record", "slices", "batch"),
        _PLAIN_PLANES,
    ),
    "stack": ViewKind(
        ("volume", "cine"), PlaneViews, ("planes", PlaneSampler), ("source", "ids", "record", "slices", "batch"), _PLAIN_PLANES
    ),
    "clip": ViewKind(
        ("cine",),
        ClipViews,
        ("clips", ClipSampler),
        ("source", "ids", "record", "frames", "fps", "count", "fill", "batch"),
        ("size", "frames", "fps", "clip_seconds", "fill", "normalize", "channels"),
    ),
}


def view_kind(views: Mapping[str, Any]) -> ViewKind:
    """Return the kind of views that a `views` section asks for; `volume` when it does not say."""
    return VIEW_KINDS[str(views.get("kind", "volume"))]


def make_views(views: Mapping[str, Any]) -> ViewMaker:
    """Build the view maker of a `views` section; its key in a batch is the name of its kind, and `volume` for pairs."""
    kind = str(views.get("kind", "volume"))
    given = {key: value for key, value in views.items() if key != "kind"}
    if kind == "pair":
        return VolumeViews("volume", count=2, **given)
    return VIEW_KINDS[kind].maker(kind, **given)


def specs(maker: Any) -> dict[str, ViewSpec]:
    """Return what a maker puts into a batch, by key."""
    return maker.specs if isinstance(maker, PlaneViews) else {maker.name: maker.spec}


def plain_views(views: Mapping[str, Any]) -> ViewMaker:
    """Build the evaluation views of a `views` section: its size, spacing and normalisation, and nothing random."""
    keep = view_kind(views).plain if views.get("kind") == "pair" else ("kind", *view_kind(views).plain)
    return make_views({key: value for key, value in views.items() if key in keep})


def view_faults(path: str, views: Mapping[str, Any]) -> list[str]:
    """Check the arguments of the views, their values included."""
    if path == "source.views":  # evaluation takes the rest from the weights
        views = {"size": 16, **(with_timing(views, 16, 16.0) if views.get("kind") == "clip" else views)}
    kind = views.get("kind", "volume")
    if kind not in VIEW_KINDS:
        return [f'{path}.kind: unknown kind "{kind}"{near(str(kind), VIEW_KINDS)}; accepted: {", ".join(VIEW_KINDS)}']
    given = {key: value for key, value in views.items() if key != "kind"}
    faults = argument_faults(path, VIEW_KINDS[kind].maker, given, given=("name", "count") if kind == "pair" else ("name",))
    if kind == "pair" and views.get("spacing_mm") is None:
        faults.append(f"{path}.spacing_mm: required for kind: pair (both crops must cover the same millimetres)")
    if kind in ("image", "stack") and (kind == "stack") != (views.get("slices") is not None):
        wanted = "required for" if kind == "stack" else "only for"
        faults.append(f"{path}.slices: {wanted} kind: stack (planes per view)")
    if faults:
        return faults
    try:
        make_views(views)
    except (RequestError, TypeError, ValueError) as err:
        return [f"{path}.{err}"]
    return []


def with_timing(views: Mapping[str, Any], frames: int, fps: float) -> dict[str, Any]:
    """Return the views of clips with the rate, then the number of frames given here, until two of `frames`, `fps`, `clip_seconds` are given."""
    given = [key for key in ("frames", "fps", "clip_seconds") if views.get(key) is not None]
    lacking = [pair for pair in (("fps", fps), ("frames", frames)) if pair[0] not in given]
    return {**views, **dict(lacking[: max(0, 2 - len(given))])}


def views_path(path: str) -> str:
    """Return the dotted path of a source's views: those of the only one, `data`, stand at the top of a recipe."""
    return "views" if path == "data" else f"{path}.views"


def source_faults(path: str, source: SourceSection) -> list[str]:
    """Check one source."""
    faults = component_faults(f"{path}.domain", "domain", source.domain)
    broken = view_faults(views_path(path), source.views)
    if broken:
        return faults + broken
    kind = view_kind(source.views)
    name, sampler = kind.sampler
    if source.sampler.name != name:
        return [*faults, f'{path}.sampler.name: "{source.sampler.name}" does not go with these views; accepted: {name}']
    faults += argument_faults(f"{path}.sampler", sampler, source.sampler.args, kind.given)
    return faults + (matcher_faults(f"{path}.sampler.matcher", source.sampler.args) if sampler is PairSampler else [])


def matcher_faults(path: str, args: Mapping[str, Any]) -> list[str]:
    """Check the matcher of a sampler of pairs."""
    matcher = args.get("matcher")
    if args.get("pairs", "matched") != "matched":
        return [] if matcher is None else [f"{path}: used only where sampler.pairs is matched; leave it out"]
    if not isinstance(matcher, Mapping) or "name" not in matcher:
        return [
            f"{path}: required for pairs: matched; give {{name: embedding, weights: RUN}}, {{name: affine}} or {{name: body_axis}}"
        ]
    return component_faults(path, "matcher", Component(**matcher), ("store", "device"))


@dataclass
class Shelf:
    """The selected rows of one source, cached: what is ready to be drawn from.

    Args:
        name: Name of the source.
        archive: The opened archive.
        rows: Rows that are in the store, sorted by series_id.
        domain: The domain.
        reader: The store.
        summary: What caching did and what it could not use.
    """

    name: str
    archive: Archive
    rows: list[SeriesRow]
    domain: Any
    reader: StoreReader
    summary: CacheSummary


def store_folder(source: SourceSection, domain: Any) -> Path:
    """Return the folder of a source's store: same key, same bytes."""
    root = Path(source.store) if source.store else Path(source.index) / "store"
    return root / f"{domain.name}-{store_key(domain)}"


def select_rows(source: SourceSection, domain_name: str, archive: Archive, where: str | None = None) -> list[SeriesRow]:
    """Return the series of a source that its views can be made of.

    Raises:
        RequestError: The selection is empty; the message counts what each condition left.
    """
    condition = where or source.where
    rows = archive.select(condition)
    kinds = view_kind(source.views).items
    usable = [r for r in rows if r.domain == domain_name and r.kind in kinds and r.status != "rejected"]
    if not usable:
        unknown = sum(row.domain == "unknown" for row in rows)
        hint = f"{unknown} do not say what they are: index them again with --modality; " if unknown else ""
        every = archive.select(None)
        if "split" in (condition or "") and (n := sum(row.split == "unknown" for row in every)):
            hint += f"{n} of all series have split 'unknown', as their patients are not known or no split was made (`medssl archive split`); "
        others = Counter(row.kind for row in rows if row.domain == domain_name and row.status != "rejected")
        for kind, n in sorted(others.items()):
            shown = " or ".join(name for name, view in VIEW_KINDS.items() if kind in view.items)
            hint += f"{n} are of kind {kind}, which views.kind: {shown} shows; "
        raise RequestError(
            f"the selection is empty: {condition!r} matches {len(rows)} of {len(every)} series in {source.index}, "
            f"none of them a usable {domain_name} {' or '.join(kinds)}; {hint}look with `medssl archive ls {source.index}`"
        )
    return sorted(usable, key=lambda row: row.series_id)


def fill_shelf(name: str, source: SourceSection, where: str | None = None, on_progress: Progress | None = None) -> Shelf:
    """Select the rows of a source and write what the store lacks.

    Raises:
        RequestError: No item is left; failures are counted by reason.
    """
    domain = lookup("domain", source.domain.name)(**source.domain.args)
    archive = Archive.open(Path(source.index))
    rows = select_rows(source, domain.name, archive, where)
    folder = store_folder(source, domain)
    summary = cache_items(archive, rows, domain, folder, on_progress=on_progress)
    reader = StoreReader(folder)
    if view_kind(source.views).maker is ClipViews:
        summary.failed.update(unusable_clips(reader, [row for row in rows if row.series_id not in summary.failed]))
    kept = [row for row in rows if row.series_id not in summary.failed]
    if not kept:
        reasons = sorted({reason for reason, _ in summary.failed.values()})
        raise RequestError(f"source {name}: none of {len(rows)} series could be cached ({', '.join(reasons)}); nothing to train on")
    return Shelf(name, archive, kept, domain, reader, summary)


def unusable_clips(reader: StoreReader, rows: Sequence[SeriesRow]) -> dict[str, tuple[str, str]]:
    """Return the cines that cannot be sampled by time, or hold no motion: series_id -> reason and message."""
    found = {}
    for row in rows:
        try:
            check_clip(reader.record(row.series_id))
        except ImageError as err:
            found[row.series_id] = (err.reason, str(err))
    return found


def freeze_items(shelves: Sequence[Shelf], sources: Mapping[str, SourceSection], cards: Mapping[str, SourceCards]) -> list[Item]:
    """Number the items of all sources; one without a card goes by the name of its index folder."""
    return freeze(
        [
            (
                shelf.name,
                cards[shelf.name].of_series.get(row.series_id, Path(sources[shelf.name].index).name),
                row.series_id,
                row.patient_id,
                row.split,
            )
            for shelf in shelves
            for row in shelf.rows
        ]
    )


def check_items(shelf: Shelf, section: SourceSection, encoders: Sequence[Any]) -> None:
    """Refuse items that no encoder of the run takes, from what the store says of them: before a run is made.

    Args:
        shelf: The items.
        section: Their source.
        encoders: Encoders of the run.

    Raises:
        RequestError: Channels do not fit, or a stack of frames whose times nobody knows.
    """
    records = [shelf.reader.record(row.series_id) for row in shelf.rows]
    one = section.views.get("channels", "mean" if view_kind(section.views).maker is ClipViews else "keep") == "mean"
    found = Counter(1 if one else record.channels for record in records)
    accepted = {encoder.in_channels for encoder in encoders if hasattr(encoder, "in_channels")}
    wrong = sorted(set(found) - accepted)
    if accepted and wrong:
        grey = "" if view_kind(section.views).maker is VolumeViews else "set views.channels: mean (one grey channel), "
        raise RequestError(
            f"source {shelf.name}: {sum(found[n] for n in wrong)} of {len(records)} items have {' or '.join(map(str, wrong))} channels, "
            f"the encoder takes {' or '.join(map(str, sorted(accepted)))}; {grey}give the encoder that in_channels, or leave them out by `where`"
        )
    timeless = sum(record.kind == "clip" and record.frame_times_ms is None for record in records)
    if timeless and section.views.get("kind") == "stack":
        raise RequestError(
            f"source {shelf.name}: {timeless} of {len(records)} clips have no frame times, and a stack needs them; leave them out of "
            "the query (where: frame_time_ms is not null), or draw single frames (views.kind: image)"
        )


def without_place(shelf: Shelf, section: SourceSection) -> tuple[str, int, int]:
    """Return the key of a source's views, how many of its items are single pictures, which lie at no place of a volume, and all items."""
    pictures = sum(slice_axis(shelf.reader.record(row.series_id)) is None for row in shelf.rows)
    return make_views(section.views).name, pictures, len(shelf.rows)


def training_source(shelf: Shelf, section: SourceSection, items: Sequence[Item], batch: int) -> ImageLike:
    """Build the source that the loop draws from."""
    series = {item.id: item.series_id for item in items if item.source == shelf.name}
    views = make_views(section.views)

    def record(item: int) -> Any:
        return shelf.reader.record(series[item])

    if section.sampler.name == "pairs":
        assert isinstance(views, VolumeViews)
        pairs = pair_sampler(shelf, section, items, views, batch)
        return PairSource(shelf.name, shelf.domain.name, shelf.reader, series, pairs, views, item=Crop, weight=section.weight)
    if isinstance(views, VolumeViews):
        crops = CropSampler(shelf.name, sorted(series), record, views.box_size_mm, batch=batch, **section.sampler.args)
        return ImageSource(shelf.name, shelf.domain.name, shelf.reader, series, crops, views, item=Crop, weight=section.weight)
    if isinstance(views, ClipViews):
        timing = (views.frames, views.fps, views.count, views.fill)
        clips = ClipSampler(shelf.name, sorted(series), record, *timing, batch=batch, **section.sampler.args)
        return ClipSource(shelf.name, shelf.domain.name, shelf.reader, series, clips, views, item=ClipFrames, weight=section.weight)
    planes = PlaneSampler(shelf.name, sorted(series), record, views.slices, batch=batch, **section.sampler.args)
    return PlaneSource(shelf.name, shelf.domain.name, shelf.reader, series, planes, views, item=Planes, weight=section.weight)


class LabelledDraws:
    """Training batches of labelled series, with augmentation; what they are drawn from is made once for the same cases.

    Args:
        shelf: The cached series.
        section: Their source.
        augment: What is added to its views.
        series: id -> series_id.
    """

    def __init__(self, shelf: Shelf, section: SourceSection, augment: Mapping[str, Any], series: Mapping[int, str]) -> None:
        self.shelf, self.series = shelf, series
        self.section = section.model_copy(update={"views": {**section.views, **augment}})
        self._made: tuple[tuple[int, ...], int, ImageLike] | None = None

    def batch(self, ids: Sequence[int], step: int, seed: int, batch: int, device: torch.device) -> tuple[Views, str]:
        """Return the views of a batch of `ids`, a function of (ids, step, seed), and their key."""
        wanted = tuple(ids)
        if self._made is None or self._made[:2] != (wanted, batch):
            items = [Item(number, self.shelf.name, "", self.series[number], "", "train") for number in ids]
            self._made = (wanted, batch, training_source(self.shelf, self.section, items, batch))
        source = self._made[2]
        keys = [DrawKey(seed, step, place) for place in range(batch)]
        return source.views(source.fetch(keys), device), source.view_maker.name


def pair_sampler(shelf: Shelf, section: SourceSection, items: Sequence[Item], views: VolumeViews, batch: int) -> PairSampler:
    """Build the sampler of pairs, and try some pairs before the run begins.

    Raises:
        RequestError: Embeddings are missing or stale, there is one patient only, or over half of the pairs tried were dropped.
    """
    from medssl.matching.base import MatchVolume

    mine = {item.id: item for item in items if item.source == shelf.name}
    known = {row.series_id: frozenset(row.body_region or ()) - {"unknown", "other"} for row in shelf.rows}
    volumes = {number: MatchVolume.of_store(shelf.reader, item.series_id) for number, item in mine.items()}
    args = dict(section.sampler.args)
    component = args.pop("matcher", None)
    sampler = PairSampler(
        shelf.name,
        sorted(mine),
        lambda number: shelf.reader.record(mine[number].series_id),
        {number: item.patient_id for number, item in mine.items()},
        views.box_size_mm,
        volumes.__getitem__,
        batch=batch,
        matcher=None if component is None else make_matcher(component, shelf.reader.store, volumes.values()),
        regions={number: known.get(item.series_id, frozenset()) for number, item in mine.items()},
        **args,
    )
    sampler.audit()
    return sampler


def make_matcher(component: Mapping[str, Any], store: Path, volumes: Iterable[Any]) -> Any:
    """Build a matcher for the items of a store; one that reads embeddings must find them all.

    Raises:
        RequestError: Embeddings are missing or stale.
    """
    args = {key: value for key, value in component.items() if key != "name"}
    target = lookup("matcher", str(component["name"]))
    if "store" in inspect.signature(target).parameters:
        args["store"] = store
    matcher = target(**args)
    if hasattr(matcher, "require"):
        matcher.require({volume.name: volume.version for volume in volumes})
    return matcher


def evaluation_source(
    name: str, shelf: Shelf, section: SourceSection, series: Sequence[str], views: ViewMaker | None = None
) -> ImageLike:
    """Build a source that shows the middle of each series (a stack: all of it, evenly), in the order given."""
    numbered = dict(enumerate(series))
    views = views or plain_views(section.views)

    def record(item: int) -> Any:
        return shelf.reader.record(numbered[item])

    if isinstance(views, VolumeViews):
        centre = CentreSampler(name, sorted(numbered), record, views.box_size_mm)
        return ImageSource(name, shelf.domain.name, shelf.reader, numbered, centre, views, item=Crop)
    if isinstance(views, ClipViews):
        clips = MiddleClips(name, sorted(numbered), record, views.frames, views.fps, views.count, views.fill)
        return ClipSource(name, shelf.domain.name, shelf.reader, numbered, clips, views, item=ClipFrames)
    middle = MiddlePlanes(name, sorted(numbered), record, views.slices, section.sampler.args.get("axis", "auto"))
    return PlaneSource(name, shelf.domain.name, shelf.reader, numbered, middle, views, item=Planes)


def evaluation_batches(source: ImageLike, device: torch.device, batch: int = 4, seed: int = 0) -> Iterable[Views]:
    """Yield views of all items of an evaluation source, in id order."""
    for first in range(0, len(source), batch):
        keys = [DrawKey(seed, 0, place) for place in range(first, min(first + batch, len(source)))]
        yield source.views(source.fetch(keys), device)


def images_and_ids(
    source: ImageLike, device: torch.device, batch: int = 4
) -> Iterable[tuple[Tensor | Stack | ClipBatch, list[int]]]:
    """Yield (B, C, *size) images, stacks or clips, and ids, as `evaluation.features.embed` takes them."""
    for views in evaluation_batches(source, device, batch):
        yield first_view(views, source.view_maker.name), views.meta.ids.tolist()


def first_view(views: Views, name: str) -> Tensor | Stack | ClipBatch:
    """Return the first view of each item: what an encoder takes."""
    if f"{name}_sector" in views:
        return ClipBatch.of(views, name)
    if f"{name}_depth" not in views or views[name].dim() != 6:
        return views[name][:, 0]
    valid = views.meta.valid[name][:, 0].flatten(2).any(dim=2)
    return Stack(views[name][:, 0], valid, views[f"{name}_depth"][:, 0])


def random_views(maker: ViewMaker, batch: int, channels: int, device: torch.device) -> Views:
    """Return training views of noise, for measuring a step."""
    rng = np.random.default_rng(0)
    stats = {"mean": 0.5, "std": 0.3, "p00_5": 0.0, "p99_5": 1.0, "min": 0.0}
    keys = tuple(DrawKey(0, 0, place) for place in range(batch))
    if isinstance(maker, VolumeViews):
        spacing = maker.view_spacing_mm((1.0, 1.0, 1.0))
        box = Box((0.0, 0.0, 0.0), maker.box_size_mm(spacing))
        crops = [
            Crop(
                rng.random((channels, *maker.size), np.float32),
                np.ones(maker.size, bool),
                spacing,
                (0.0, 0.0, 0.0),
                box,
                stats,
                key,
                n,
            )
            for n, key in enumerate(keys)
        ]
        data, seen, _, _ = maker.batch(crops, device)
        valid = {maker.name: seen}
    elif isinstance(maker, ClipViews):
        shape = (maker.frames, channels, *maker.size)
        order = np.broadcast_to(np.arange(maker.frames), (maker.count, maker.frames))
        shown = np.ones(order.shape, bool)
        speed = np.ones(maker.count)
        sector = np.ones(maker.size, bool)
        times = order / maker.fps
        stats["max"] = 1.0
        clips = [
            ClipFrames(rng.random(shape, np.float32), sector, None, order, shown, times, order, speed, stats, key, n)
            for n, key in enumerate(keys)
        ]
        data, valid, _ = maker.batch(clips, device)
    else:
        n = maker.slices or 1
        shape = (n, channels, *maker.size)
        depth = np.arange(n, dtype=float)
        items = [
            Planes(
                rng.random(shape, np.float32), np.ones((n, *maker.size), bool), None, depth, depth / max(n - 1, 1), stats, key, k
            )
            for k, key in enumerate(keys)
        ]
        data, valid, _ = maker.batch(items, device)
    meta = ViewsMeta("doctor", "none", torch.arange(batch), {}, {}, valid, keys)
    return Views(data, meta)
