"""Clips out of the store: which frames of a cine a draw means, by time and never by count, and how they are read.

The rate of a cine is what its frame times say, frame by frame; a file without them has no place here (reason `no_frame_time`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl.domains.ultrasound import frames_at
from medssl.errors import ImageError, RequestError
from medssl.sampling.planes import pixel_mm
from medssl.sampling.samplers import item_at
from medssl.sampling.source import StoreSource
from medssl.seeding import counter_rng
from medssl.types import DrawKey, Views

TUBELET = 2
"""Frames that a video encoder takes together: a clip with fewer holds no motion (reason `too_short`)."""


@dataclass(frozen=True)
class PickedFrames:
    """The frames of one view.

    Args:
        frames: (T,) frame numbers.
        valid: (T,) bool, False = filled in; true frames come first.
        time_s: (T,) seconds since the first.
    """

    frames: np.ndarray
    valid: np.ndarray
    time_s: np.ndarray


@dataclass(frozen=True)
class ClipDraw:
    """Which frames of which item.

    Args:
        id: Row number in `items.parquet`.
        views: Frames of each view.
        speed: Playback speed of each view.
    """

    id: int
    views: tuple[PickedFrames, ...]
    speed: tuple[float, ...]


def own_step_ms(times_ms: Sequence[float] | np.ndarray) -> float:
    """Return the median step between frames; 0 for one frame."""
    return float(np.median(np.diff(np.asarray(times_ms, dtype=np.float64)))) if len(times_ms) > 1 else 0.0


def pick_frames(
    times_ms: Sequence[float] | np.ndarray, fps: float, count: int, start_ms: float = 0.0, fill: str = "pingpong"
) -> PickedFrames:
    """Pick the frames that show a clip at a rate, each frame of the file at most once; what is missing is filled in.

    For each wanted time the nearest frame is taken. Where the file is slower than the rate, at large or for a while, a frame would
    come twice: it is left out and later ones follow, so that `time_s` and not the place in the clip says when a frame was seen.
    Where the file ends, the frames picked so far run backwards and forwards again (`pingpong`) or start again (`loop`), never a
    frozen tail; they are marked not valid, and the clock goes on.

    Args:
        times_ms: Start of each frame, rising.
        fps: Wanted frames per second.
        count: Frames (T).
        start_ms: Wanted time of the first frame.
        fill: `pingpong` or `loop`.
    """
    times = np.asarray(times_ms, dtype=np.float64)
    rate = min(fps, 1000 / step) if (step := own_step_ms(times)) > 0 else fps
    wanted = frames_at(times.tolist(), rate, start_ms=start_ms)
    picked = np.unique(wanted if len(wanted) else np.array([len(times) - 1]))[:count]
    n = len(picked)
    when = times[picked] - times[picked[0]]
    if n == count:
        return PickedFrames(picked, np.ones(count, dtype=bool), when / 1000)
    turn = max(1, 2 * (n - 1)) if fill == "pingpong" else n
    place = np.arange(count) % turn
    order = np.minimum(place, turn - place) if fill == "pingpong" and n > 1 else place
    laps = np.arange(count) // turn
    # One lap of a loop lasts until the frame after the last one would come.
    lap_ms = 2 * when[-1] if fill == "pingpong" and n > 1 else when[-1] + 1000 / rate
    along = np.where(place < n, when[order], 2 * when[-1] - when[order]) if fill == "pingpong" and n > 1 else when[order]
    return PickedFrames(picked[order], np.arange(count) < n, (laps * lap_ms + along) / 1000)


class ClipSampler:
    """Clips that start anywhere in a cine.

    Args:
        source: Name of the source.
        ids: Ids of its items, ascending.
        record: id -> store record.
        frames: Frames per view.
        fps: Frames per second.
        count: Views per item, each with a start of its own.
        fill: See `pick_frames`.
        batch: Items per optimiser step.
        speeds: Playback speeds to draw from; 2 covers twice the time. All views of an item have one speed, but the last of several has
            another where there are several speeds: an anchor, one like it, and one unlike it (RSPNet). Prefer speeds above 1: a cine is
            never shown slower than its own rate.
    """

    def __init__(
        self,
        source: str,
        ids: Sequence[int],
        record: Callable[[int], Any],
        frames: int,
        fps: float,
        count: int,
        fill: str,
        *,
        batch: int,
        speeds: Sequence[float] = (1.0,),
    ) -> None:
        good = isinstance(speeds, (list, tuple)) and len(speeds) > 0
        if not good or not all(isinstance(s, (int, float)) and s > 0 for s in speeds) or len(set(speeds)) < len(speeds):
            raise RequestError(f"sampler.speeds is {speeds!r}; accepted: different numbers above 0, for instance [1, 2]")
        self.source, self.ids, self.record, self.batch = source, list(ids), record, batch
        self.frames, self.fps, self.count, self.fill = frames, fps, count, fill
        self.speeds = tuple(float(speed) for speed in speeds)

    def draw(self, key: DrawKey) -> ClipDraw:
        """Draw one item and the frames of its views; a pure function of the key."""
        item = self.ids[item_at(key, self.source, self.batch, len(self.ids))]
        times = known_times(self.record(item))
        rng = counter_rng(key.seed, key.step, key.position, self.source, "clips")
        order = rng.permutation(len(self.speeds))
        speed = [self.speeds[order[0]]] * self.count
        if self.count > 1 and len(self.speeds) > 1:
            speed[-1] = self.speeds[order[1]]
        views = tuple(self._pick(times, self.fps / s, float(rng.random())) for s in speed)
        return ClipDraw(item, views, tuple(speed))

    def _pick(self, times: np.ndarray, fps: float, place: float) -> PickedFrames:
        return pick_frames(times, fps, self.frames, place * clip_room_ms(times, fps, self.frames), self.fill)


class MiddleClips:
    """The middle of each cine, for monitors and probes; several views lie evenly from its start to its end: item number `position`.

    Args:
        source: Name of the source.
        ids: Ids, ascending.
        record: See `ClipSampler`.
        frames: See `ClipSampler`.
        fps: See `ClipSampler`.
        count: Views per item.
        fill: See `pick_frames`.
    """

    def __init__(
        self,
        source: str,
        ids: Sequence[int],
        record: Callable[[int], Any],
        frames: int,
        fps: float,
        count: int = 1,
        fill: str = "pingpong",
    ) -> None:
        self.source, self.ids, self.record = source, list(ids), record
        self.frames, self.fps, self.count, self.fill = frames, fps, count, fill

    def draw(self, key: DrawKey) -> ClipDraw:
        """Return the views of item number `key.position`."""
        item = self.ids[key.position]
        times = known_times(self.record(item))
        room = clip_room_ms(times, self.fps, self.frames)
        starts = [0.5 * room] if self.count == 1 else np.linspace(0, room, self.count).tolist()
        return ClipDraw(
            item, tuple(pick_frames(times, self.fps, self.frames, start, self.fill) for start in starts), (1.0,) * self.count
        )


def clip_room_ms(times_ms: Sequence[float] | np.ndarray, fps: float, count: int) -> float:
    """Return how much later than the first frame a clip may start without being cut short by the end of its file."""
    step = max(1000 / fps, own_step_ms(times_ms))
    return max(0.0, float(times_ms[-1]) - float(times_ms[0]) - (count - 1) * step)


def known_times(record: Any) -> np.ndarray:
    """Return the frame times of a record in ms.

    Raises:
        RequestError: Nobody knows them.
    """
    if record.frame_times_ms is None:
        raise RequestError(f"series {record.series_id} has no frame times; leave it out of the query (frame_time_ms is not null)")
    return np.asarray(record.frame_times_ms, dtype=np.float64)


def check_clip(record: Any) -> None:
    """Refuse a cine that cannot be sampled by time, or holds no motion.

    Raises:
        ImageError: `no_frame_time`, or `too_short`.
    """
    if record.frame_times_ms is None:
        raise ImageError(
            "no_frame_time", f"series {record.series_id}: no frame times, and clips are sampled by time; a rate is not guessed"
        )
    if record.shape[0] < TUBELET:
        raise ImageError("too_short", f"series {record.series_id}: {record.shape[0]} frame; a clip needs {TUBELET}; leave it out")


class ClipViewMaker(Protocol):
    """What a source needs of `views.clips.ClipViews`."""

    name: str

    def batch(
        self, items: Sequence[Any], device: torch.device | str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return data, and valid and spacing_mm by view."""
        ...


class Sampler(Protocol):
    """Anything with a pure `draw` of clips."""

    def draw(self, key: DrawKey) -> ClipDraw:
        """Return which frames a key means."""
        ...


class ClipSource(StoreSource):
    """Cines: the sampler draws frames, the items are `views.clips.ClipFrames`."""

    view_maker: ClipViewMaker

    def read(self, key: DrawKey) -> list[Any]:
        """Read the frames that are drawn, each once."""
        draw: ClipDraw = self.sampler.draw(key)
        series_id = self.series[draw.id]
        record = self.reader.record(series_id)
        frame = np.stack([view.frames for view in draw.views])
        used, order = np.unique(frame, return_inverse=True)
        image, sector = self.reader.read_frames(series_id, used.tolist())
        clip = self.item(
            image=image,
            sector=sector,
            pixel_mm=pixel_mm(record, 0),
            order=order.reshape(frame.shape),
            valid=np.stack([view.valid for view in draw.views]),
            time_s=np.stack([view.time_s for view in draw.views]),
            frame=frame,
            speed=np.asarray(draw.speed),
            stats=record.stats,
            key=key,
            id=draw.id,
        )
        return [clip]

    def views(self, fetched: list[Any], device: torch.device) -> Views:
        """Make views on the device."""
        return self.bundle(fetched, *self.view_maker.batch(fetched, device))
