"""Pairs of crops: the same place in two patients, two crops of one volume, or two crops of anything.

A draw is a pure function of its key. Matching a point is the work of a matcher that is handed in; with embeddings on disk it reads two
of them and looks at cells, nothing is trained or registered meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl.errors import RequestError, TrainingStopped, near
from medssl.sampling.samplers import item_at
from medssl.sampling.source import StoreSource, read_crop
from medssl.seeding import counter_rng
from medssl.types import Box, Draw, DrawKey, Views

KINDS = ("matched", "same_volume", "random")
WATCHED = 256
"""Candidates of a run after which it is stopped when over half of them were dropped."""
GUESSES = 64
"""Items looked at by chance for a partner before all of them are listed."""


@dataclass(frozen=True)
class PairDraw(Draw):
    """Two boxes, each of its own item or both of one.

    Args:
        score: Of the match; 1 where nothing was matched.
        weight: What the pair counts in a loss, 0 to 1; 0 where no candidate was good enough.
    """

    score: float = 1.0
    weight: float = 1.0


class Volume(Protocol):
    """What the sampler needs of `matching.base.MatchVolume`."""

    def to_world(self, item_mm: np.ndarray) -> np.ndarray:
        """Turn item mm (N, 3) into world mm."""
        ...

    def to_item(self, world_mm: np.ndarray) -> np.ndarray:
        """Turn world mm (N, 3) into item mm."""
        ...


class Matcher(Protocol):
    """What the sampler needs of a matcher (`matching.base.Matcher`)."""

    def match(self, source: Any, points_mm: np.ndarray, target: Any) -> Any:
        """Return `points_mm` (N, 3) world mm and `scores` (N,) in the target."""
        ...


def pair_weight(score: float) -> float:
    """Return what a pair counts: 0 up to a score of 0.5, then rising to 1 at 1 (card alice, section 11, row 12)."""
    return min(1.0, max(0.0, (score - 0.5) / 0.5))


class PairSampler:
    """Draws an item, a point in its body, and the crop that goes with it.

    `matched`: a volume of another patient, the crop around the same point there. `same_volume`: two crops of one volume, their
    centres moved apart. `random`: any body point of another patient.

    Both crops have one size in mm, and lie alike around the point: where the first was moved to stay inside its volume, the second
    is moved as much.

    Args:
        source: Name of the source.
        ids: Ids of its items, ascending.
        record: id -> store record.
        patients: id -> patient.
        box_size_mm: spacing -> size of the box that the views need; the same for every spacing.
        batch: Items per optimiser step.
        volumes: id -> what a matcher matches in (`matching.base.MatchVolume`).
        matcher: Needed for `matched`.
        regions: id -> body regions, as far as known; patients whose regions are known and differ are no partners.
        pairs: One of `KINDS`.
        min_score: Pairs below are dropped and counted.
        attempts: Candidates of a draw, one after the other, until one is good enough.
        shift: `same_volume`: how far each centre may lie from the point, as a share of the box along each axis.
    """

    def __init__(
        self,
        source: str,
        ids: Sequence[int],
        record: Callable[[int], Any],
        patients: Mapping[int, str],
        box_size_mm: Callable[[Sequence[float]], Sequence[float]],
        volumes: Callable[[int], Volume],
        *,
        batch: int,
        matcher: Matcher | None = None,
        regions: Mapping[int, frozenset[str]] | None = None,
        pairs: str = "matched",
        min_score: float = 0.5,
        attempts: int = 4,
        shift: float = 0.25,
    ) -> None:
        if pairs not in KINDS:
            raise RequestError(f'sampler.pairs: unknown kind "{pairs}"{near(str(pairs), KINDS)}; accepted: {", ".join(KINDS)}')
        if not 0 <= min_score < 1:
            raise RequestError(f"sampler.min_score is {min_score}; accepted: 0 up to, and without, 1")
        if attempts < 1 or not 0 <= shift < 0.5:
            raise RequestError(f"sampler: attempts is {attempts} and shift {shift}; accepted: attempts >= 1, 0 <= shift < 0.5")
        if pairs == "matched" and matcher is None:
            raise RequestError(
                "sampler.matcher: required where sampler.pairs is matched; for instance matcher: {name: embedding, weights: runs/matcher}, "
                "or body_axis, which needs no training"
            )
        self.source, self.ids, self.record, self.patients = source, list(ids), record, dict(patients)
        self.box_size_mm, self.volumes, self.batch, self.matcher = box_size_mm, volumes, batch, matcher
        self.regions = dict(regions or {})
        self.pairs, self.min_score, self.attempts, self.shift = pairs, float(min_score), int(attempts), float(shift)
        self.tried = self.dropped = 0
        self._lock = threading.Lock()
        if pairs != "same_volume" and len({self.patients[item] for item in self.ids}) < 2:
            raise RequestError(
                f"source {source} holds volumes of one patient only, and pairs: {pairs} takes two patients; index more of them, or set "
                "sampler.pairs: same_volume"
            )

    def draw(self, key: DrawKey) -> PairDraw:
        """Draw a pair; a pure function of the key.

        Raises:
            TrainingStopped: Over half of the candidates of this run were dropped.
        """
        item = self.ids[item_at(key, self.source, self.batch, len(self.ids))]
        if self.pairs == "same_volume":
            return self._same_volume(item, counter_rng(key.seed, key.step, key.position, self.source, "pair", 0))
        worst: PairDraw | None = None
        for attempt in range(self.attempts):
            rng = counter_rng(key.seed, key.step, key.position, self.source, "pair", attempt)
            found = self._pair(item, rng)
            self._count(found.weight == 0)
            if found.weight > 0:
                return found
            worst = found
        assert worst is not None
        return worst

    def audit(self, count: int = 32, seed: int = 0) -> None:
        """Draw some pairs before a run begins; every process draws the same and stops alike.

        Raises:
            RequestError: Over half of the candidates were dropped.
        """
        for number in range(count if self.pairs == "matched" else 0):
            self.draw(DrawKey(seed, number // self.batch, number % self.batch))
        tried, dropped, self.tried, self.dropped = self.tried, self.dropped, 0, 0
        if dropped * 2 > tried:
            raise RequestError(self._sentence(dropped, tried))

    def _count(self, dropped: bool) -> None:
        with self._lock:  # counted beside the draw: no draw depends on it
            self.tried += 1
            self.dropped += dropped
            if self.tried >= WATCHED and self.dropped * 2 > self.tried:
                raise TrainingStopped(self._sentence(self.dropped, self.tried))

    def _sentence(self, dropped: int, tried: int) -> str:
        return (
            f"source {self.source}: {dropped} of {tried} candidate pairs were dropped, because no partner shows the same part of the body "
            f"or its score was below {max(self.min_score, 0.5):g}; narrow the query to one body region, train the matcher longer or on "
            "these images, or take another matcher"
        )

    def _seed_point(self, record: Any, rng: np.random.Generator) -> np.ndarray:
        """Return a point of the body in item mm, anywhere in a foreground voxel."""
        spacing = np.asarray(record.spacing_mm, dtype=np.float64)
        if len(record.foreground) == 0:
            return np.asarray(rng.random(3) * np.asarray(record.shape) * spacing)
        return np.asarray((record.foreground[rng.integers(len(record.foreground))] + rng.random(3)) * spacing)

    def _partner(self, item: int, rng: np.random.Generator) -> int | None:
        """Return an item of another patient that may show the same part of the body, or None when there is none."""
        for number in rng.integers(len(self.ids), size=GUESSES):
            guess = self.ids[int(number)]
            if self._may_pair(item, guess):
                return guess
        partners = [other for other in self.ids if self._may_pair(item, other)]
        return partners[int(rng.integers(len(partners)))] if partners else None

    def _may_pair(self, item: int, other: int) -> bool:
        if self.patients[item] == self.patients[other]:
            return False
        mine, others = self.regions.get(item), self.regions.get(other)
        return not mine or not others or bool(mine & others)

    def _same_volume(self, item: int, rng: np.random.Generator) -> PairDraw:
        record = self.record(item)
        size = np.asarray(self.box_size_mm(record.spacing_mm), dtype=np.float64)
        point = self._seed_point(record, rng)
        extent = np.asarray(record.shape) * np.asarray(record.spacing_mm, dtype=np.float64)
        boxes = tuple(
            box_around(centre_inside(point + rng.uniform(-1, 1, 3) * self.shift * size, size, extent), size) for _ in range(2)
        )
        return PairDraw(self.source, (item, item), boxes)

    def _pair(self, item: int, rng: np.random.Generator) -> PairDraw:
        here = self.record(item)
        size = np.asarray(self.box_size_mm(here.spacing_mm), dtype=np.float64)
        point = self._seed_point(here, rng)
        extent = np.asarray(here.shape) * np.asarray(here.spacing_mm, dtype=np.float64)
        moved = centre_inside(point, size, extent) - point
        first = box_around(point + moved, size)
        other = self._partner(item, rng)
        if other is None:
            return PairDraw(self.source, (item, item), (first, first), score=0.0, weight=0.0)
        if self.pairs == "random":
            return PairDraw(self.source, (item, other), (first, box_around(self._seed_point(self.record(other), rng), size)))
        assert self.matcher is not None
        a, b = self.volumes(item), self.volumes(other)
        found = self.matcher.match(a, a.to_world(point[None]), b)
        score = float(found.scores[0])
        if not np.isfinite(found.points_mm).all():
            return PairDraw(self.source, (item, item), (first, first), score=0.0, weight=0.0)
        second = box_around(b.to_item(found.points_mm)[0] + moved, size)
        return PairDraw(self.source, (item, other), (first, second), score, pair_weight(score) if score >= self.min_score else 0.0)


def centre_inside(centre_mm: np.ndarray, size_mm: np.ndarray, extent_mm: np.ndarray) -> np.ndarray:
    """Return a centre moved so that its box lies inside the volume where it fits, and in the middle where it does not."""
    half = size_mm / 2
    return np.where(size_mm >= extent_mm, extent_mm / 2, np.clip(centre_mm, half, np.maximum(extent_mm - half, half)))


def box_around(centre_mm: np.ndarray, size_mm: np.ndarray) -> Box:
    """Return a box; it is not rounded to voxels, so that both crops of a pair lie alike around their points."""
    x, y, z = (float(v) for v in centre_mm - size_mm / 2)
    a, b, c = (float(v) for v in size_mm)
    return Box((x, y, z), (a, b, c))


class PairViewMaker(Protocol):
    """What a source of pairs needs of `views.pipeline.VolumeViews`."""

    name: str

    def margin_mm(self, spacing_mm: Sequence[float], key: DrawKey | None = None) -> Sequence[float]:
        """Extra mm on each side that the reader must fetch for the views of a key."""
        ...

    def draw(self, key: DrawKey, v: int) -> dict[str, Any]:
        """Draw the parameters of one view."""
        ...

    def apply(
        self, crops: Sequence[Any], params: Sequence[Sequence[Mapping[str, Any]]], device: torch.device | str
    ) -> dict[str, Tensor]:
        """Turn crops and parameters into views."""
        ...

    def keyed(self, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what of the result goes into a batch."""
        ...


class Pair(NamedTuple):
    """Two fetched crops of one draw, and what the pair counts."""

    first: Any
    second: Any
    weight: float

    @property
    def id(self) -> int:
        """The first item."""
        return int(self.first.id)

    @property
    def key(self) -> DrawKey:
        """The key of the draw."""
        found: DrawKey = self.first.key
        return found


class PairSource(StoreSource):
    """Pairs of crops: two views per item, v = 0 of the first crop and v = 1 of the second; crops are `views.pipeline.Crop`.

    Beside the views a batch holds `<name>_pair_weight` (B,), what each pair counts (`pair_weight`), and `<name>_partner` (B,) int64, the id
    of the second item.
    """

    view_maker: PairViewMaker

    def read(self, key: DrawKey) -> list[Pair]:
        """Read the two boxes that are drawn."""
        draw = self.sampler.draw(key)
        first, second = (
            read_crop(self.reader, self.series[item], self.view_maker.margin_mm, box, crop=self.item, key=key, id=item)
            for item, box in zip(draw.ids, draw.boxes)
        )
        return [Pair(first, second, getattr(draw, "weight", 1.0))]

    def views(self, fetched: list[Pair], device: torch.device) -> Views:
        """Make views on the device."""
        crops: list[Any] = [pair[v] for v in range(2) for pair in fetched]
        params = [[self.view_maker.draw(crop.key, n // len(fetched))] for n, crop in enumerate(crops)]
        out = {key: in_pairs(value) for key, value in self.view_maker.apply(crops, params, device).items()}
        name = self.view_maker.name
        data = self.view_maker.keyed(out)
        data[f"{name}_pair_weight"] = torch.tensor([pair.weight for pair in fetched], dtype=torch.float32).to(device)
        data[f"{name}_partner"] = torch.tensor([pair.second.id for pair in fetched], dtype=torch.int64)
        return self.bundle(fetched, data, *({name: out[key]} for key in ("valid", "spacing_mm", "positions_mm")))


def in_pairs(rows: Tensor) -> Tensor:
    """Return (B, 2, ...) of (2 B, 1, ...): first crops, then second ones."""
    halves = rows[:, 0].reshape(2, len(rows) // 2, *rows.shape[2:])
    return halves.transpose(0, 1).contiguous()
