"""Read AVI, MP4, MOV and MPEG clips through PyAV (extra `video`), and moving GIFs through Pillow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.planar import RawPlanar, check_size, frame_indices, os_fault
from medssl.errors import ImageError

CHROMA_NOISE = 24
"""Distance of U and V from 128 up to which a sample counts as grey.

Measured on the lung clips of `shared/data`: at most 9 in tinted ones, at most 1 in the others.
"""
CONFLICT = 0.10
LEAST = 2
"""Frames that a damaged clip must have before the damage."""
MISSING = 0.05
"""Share of the frames a container counts that may be missing; counts are off by one or two where they are estimates."""
PLANAR_YUV = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")
FULL_RANGE = 2
"""AVCOL_RANGE_JPEG of FFmpeg."""
VIDEO_RANGE = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8).tobytes()
"""What each byte of video-range luminance is in full range."""


def read_video_file(path: Path, part: Mapping[str, Any] | None = None) -> RawPlanar:
    """Read a clip.

    Frames come as grey where no frame has colour, else as RGB, and upright where the container says how to turn them. Where
    decoding breaks off, or a frame is damaged, the frames before it are used, at least two, and `prefix_only` is flagged. Times
    are the container's time stamps where every frame has one and they rise, else its average rate; where the two disagree by
    more than a tenth, `frame_time_conflict` is flagged.

    Args:
        path: The file.
        part: Which frames, see `domains.base.Domain.read`; the first of them has time 0.

    Returns:
        (T, 1 or 3, H, W) uint8.

    Raises:
        ImageError: `no_decoder` without PyAV, `unreadable`, `truncated`, `unsupported_pixels`.
    """
    try:
        import av
    except ImportError as err:
        raise ImageError("no_decoder", 'video files need PyAV; install the extra with `pip install "medssl[video]"`') from err
    try:
        frames, times, rate, whole = _decode(av, path, "gray")
        if frames is None:
            frames, times, rate, whole = _decode(av, path, "rgb24")
    except ImageError:
        raise
    except OSError as err:
        raise os_fault(err) if type(err) in (FileNotFoundError, PermissionError) else _fault(err) from err
    except Exception as err:  # PyAV's own classes, whose texts name the file
        raise _fault(err) from err
    if frames is None or not times:
        raise ImageError("truncated", "a video without frames; copy it again from its source")
    indices = frame_indices(part, len(times))
    if part is not None:
        frames = frames[indices]
    raw = RawPlanar(frames[:, None] if frames.ndim == 3 else frames.transpose(0, 3, 1, 2), kind="clip")
    _set_times(raw, times, rate, indices)
    raw.flag("lossy")
    if not whole:
        raw.flag("prefix_only")
    return raw


def _fault(err: Exception) -> ImageError:
    return ImageError("unreadable", f"a video could not be decoded ({type(err).__name__}); copy it again from its source")


def _decode(av: Any, path: Path, pixels: str) -> tuple[np.ndarray | None, list[float | None], float | None, bool]:
    """Decode all frames, (T, H, W) or (T, H, W, 3), their times, the rate, and whether nothing is missing.

    Frames are None when grey was asked for and a frame has colour.
    """
    times: list[float | None] = []
    whole, turns = True, 0
    with av.open(str(path), mode="r") as container:
        if not container.streams.video:
            raise ImageError("not_image", "a media file without video; leave it out")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # workers read one file each
        rate = float(stream.average_rate) if stream.average_rate else None
        height, width = int(stream.codec_context.height), int(stream.codec_context.width)
        shape = (height, width, 3) if pixels == "rgb24" else (height, width)
        # Containers that do not count their frames get room for some, and more as they come.
        capacity = stream.frames if 0 < stream.frames < 1 << 20 else 64
        check_size(height, width, capacity * math.prod(shape))
        frames = np.empty((capacity, *shape), dtype=np.uint8)
        for frame in _undamaged(av, container.decode(stream)):
            if frame is None:
                whole = False
                break
            if pixels == "gray" and _has_colour(frame):
                return None, [], None, True
            turns = round(int(frame.rotation) / 90)
            image = _grey(frame) if pixels == "gray" else frame.to_ndarray(format=pixels)
            if image.shape != shape:
                raise ImageError("geometry", "the frames of a video differ in size; one size is needed; split it")
            if len(times) == len(frames):
                check_size(height, width, 2 * frames.nbytes)
                frames = np.concatenate([frames, np.empty_like(frames)])
            frames[len(times)] = image
            times.append(None if frame.pts is None or frame.time is None else float(frame.time) * 1000)
        whole = whole and len(times) >= (1 - MISSING) * stream.frames
    frames = frames[: len(times)]
    return np.rot90(frames, turns, axes=(1, 2)) if turns % 4 else frames, times, rate, whole


def _undamaged(av: Any, decoded: Iterator[Any]) -> Iterator[Any]:
    """Yield frames, and None in the place of the first one that is damaged or cannot be decoded.

    A fault before the second frame is raised: one frame is no clip.
    """
    for count in itertools.count():
        try:
            frame = next(decoded, None)
        except av.error.FFmpegError:
            if count < LEAST:
                raise
            yield None
            return
        if frame is None:
            return
        if frame.is_corrupt and count >= LEAST:
            yield None
            return
        yield frame


def _has_colour(frame: Any) -> bool:
    """Return whether a frame has chroma beyond the noise of its compression, without converting it where it is planar YUV."""
    if frame.format.name.startswith("gray"):
        return False
    if frame.format.name in PLANAR_YUV:
        chroma = (_plane(frame.planes[1]), _plane(frame.planes[2]))
        return any(int(part.max()) > 128 + CHROMA_NOISE or int(part.min()) < 128 - CHROMA_NOISE for part in chroma)
    rgb = frame.to_ndarray(format="rgb24")
    return int((rgb.max(axis=2) - rgb.min(axis=2)).max()) > 2 * CHROMA_NOISE


def _plane(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, dtype=np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _grey(frame: Any) -> np.ndarray:
    """Return what `to_ndarray(format="gray")` returns, from the Y plane where there is one: ten times as fast.

    Video range, 16 to 235, is spread over 0 to 255, as FFmpeg does.
    """
    if frame.format.name not in PLANAR_YUV:
        grey: np.ndarray = frame.to_ndarray(format="gray")
        return grey
    luminance = _plane(frame.planes[0])
    full_range = frame.format.name.startswith("yuvj") or int(frame.color_range) == FULL_RANGE
    if full_range:
        return luminance
    # bytes.translate is several times as fast as indexing a table with an array.
    return np.frombuffer(luminance.tobytes().translate(VIDEO_RANGE), dtype=np.uint8).reshape(luminance.shape)


def _set_times(raw: RawPlanar, times: list[float | None], rate: float | None, indices: list[int]) -> None:
    stamps = np.array([np.nan if time is None else time for time in times])
    rising = bool(np.isfinite(stamps).all() and (np.diff(stamps) > 0).all())
    if rising and len(stamps) > 1:
        step = float(np.diff(stamps).mean())
        if rate is not None and not 1 - CONFLICT <= step * rate / 1000 <= 1 + CONFLICT:
            raw.flag("frame_time_conflict")
        raw.facts["fps_source"] = "timestamps"
    elif rate is not None:
        stamps = np.arange(len(times)) * (1000 / rate)
        raw.facts["fps_source"] = "container"
    else:
        raw.facts["fps_source"] = "unknown"
        raw.flag("frame_time_unknown")
        return
    chosen = stamps[indices] - stamps[indices[0]]
    raw.frame_times_ms = tuple(float(f"{time:.9g}") for time in chosen)


def read_gif_file(path: Path, part: Mapping[str, Any] | None = None) -> RawPlanar:
    """Read a GIF: a clip when it moves, an image when it has one frame.

    Raises:
        ImageError: `unreadable`, `unsupported_pixels`.
    """
    from PIL import Image

    from medssl.domains.image_files import pillow_planar

    try:
        with Image.open(path) as picture:
            n_frames = int(getattr(picture, "n_frames", 1))
            check_size(picture.height, picture.width, n_frames * picture.height * picture.width * 3)
            frames, starts, now = [], [], 0.0
            for index in range(n_frames):
                picture.seek(index)
                frames.append(pillow_planar(picture.convert("RGB")).array)
                starts.append(now)
                now += float(picture.info.get("duration", 0) or 0)
    except ImageError:
        raise
    except Exception as err:
        raise ImageError("unreadable", f"a GIF could not be decoded ({type(err).__name__}); copy it again from its source") from err
    if n_frames == 1:
        return RawPlanar(frames[0])
    indices = frame_indices(part, n_frames)
    raw = RawPlanar(np.stack([frames[index] for index in indices]), kind="clip")
    # A duration of 0 means "as fast as possible": viewers choose, so nobody knows.
    known = now > 0 and len(set(starts)) == n_frames
    _set_times(raw, list(starts) if known else [None] * n_frames, None, indices)
    return raw
