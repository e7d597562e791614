"""State of a run over slides: one JSON per slide, a lock while it is worked on, a manifest and a summary. Running again does what is left."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medssl.errors import ImageError, MedsslError
from medssl.weights import private_folder, process_lives, write_atomic

STATUSES = ("not_started", "running", "completed", "skipped", "error")
LOCK_HOURS = 24.0
"""A lock of another machine is believed for so long."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Work = Callable[[], Mapping[str, Any]]


class SlideJob:
    """A folder of results, one set of files per slide, with their state.

    Args:
        folder: Results; `state/` and `locks/` are made in it.
        lock_hours: Age at which a lock of another machine is stale.
    """

    def __init__(self, folder: Path, *, lock_hours: float = LOCK_HOURS) -> None:
        self.folder, self.lock_hours = Path(folder), lock_hours
        for name in (self.folder, self.folder / "state", self.folder / "locks"):
            private_folder(name)

    def state(self, slide_id: str) -> dict[str, Any]:
        """Return the state of a slide: status, reason, attempts [{start, seconds, status, reason}], outputs {name: bytes}, facts."""
        try:
            found = json.loads(self._state_path(slide_id).read_text())
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict) and found.get("status") in STATUSES:
            return found
        return {"slide": slide_id, "status": "not_started", "reason": None, "attempts": [], "outputs": {}, "facts": {}}

    def finished(self, slide_id: str) -> bool:
        """Return whether a slide is completed or skipped, and its outputs are there with the sizes they had."""
        state = self.state(slide_id)
        if state["status"] not in ("completed", "skipped"):
            return False
        return all(_size(self.folder / name) == size for name, size in state["outputs"].items())

    def run(self, slide_id: str, outputs: list[str], work: Work) -> dict[str, Any]:
        """Do the work of one slide unless it is done or another process does it.

        Args:
            slide_id: Series id.
            outputs: Files that the work makes, relative to the folder; each must appear at once and complete.
            work: Makes them and returns facts for the state (JSON-able). An `ImageError` with the reason `empty_tissue` means
                `skipped`; every other error of medssl is recorded, and does not stop the run.

        Returns:
            The state afterwards; `running` when another process holds the slide.
        """
        if self.finished(slide_id):
            return self.state(slide_id)
        with self._lock(slide_id, outputs) as mine:
            if not mine:
                return {**self.state(slide_id), "status": "running"}
            if self.finished(slide_id):  # the holder of a lock that has just gone finished it
                return self.state(slide_id)
            return self._attempt(slide_id, outputs, work)

    def _attempt(self, slide_id: str, outputs: list[str], work: Work) -> dict[str, Any]:
        state = self.state(slide_id)
        begin, clock = time.time(), time.monotonic()
        attempt: dict[str, Any] = {"start": round(begin, 3), "seconds": None, "status": "running", "reason": None}
        state["attempts"] = [*state["attempts"], attempt]
        state.update(status="running", reason=None, outputs={}, facts={})
        self._write(slide_id, state)
        try:
            state["facts"] = dict(work())
            attempt["status"] = "completed"
        except MedsslError as err:
            attempt["reason"] = err.reason if isinstance(err, ImageError) else type(err).__name__
            attempt["status"] = "skipped" if attempt["reason"] == "empty_tissue" else "error"
        attempt["seconds"] = round(time.monotonic() - clock, 3)
        sizes = {name: _size(self.folder / name) for name in outputs}
        state.update(
            status=attempt["status"],
            reason=attempt["reason"],
            outputs={name: size for name, size in sizes.items() if size is not None},
        )
        self._write(slide_id, state)
        return state

    def states(self) -> list[dict[str, Any]]:
        """Return the states of all slides seen so far, by slide."""
        return [self.state(path.stem) for path in sorted((self.folder / "state").glob("*.json"))]

    def write_manifest(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Write `manifest.json`: settings, counts by status and reason, bytes, seconds, slides without a pyramid."""
        states = self.states()
        manifest = {
            "settings": dict(settings),
            "slides": len(states),
            "by_status": dict(sorted(Counter(state["status"] for state in states).items())),
            "by_reason": dict(sorted(Counter(state["reason"] for state in states if state["reason"]).items())),
            "bytes": sum(sum(state["outputs"].values()) for state in states),
            "seconds": round(sum(attempt["seconds"] or 0 for state in states for attempt in state["attempts"]), 3),
            "single_level": sum(bool(state["facts"].get("single_level")) for state in states),
            "bad_tiles": sum(int(state["facts"].get("bad_tiles", 0)) for state in states),
        }
        write_atomic(self.folder / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        return manifest

    def summary(self) -> str:
        """Return the run in a few lines."""
        manifest = self.write_manifest(self._settings())
        lines = [f"{manifest['slides']} slides: " + ", ".join(f"{n} {name}" for name, n in manifest["by_status"].items())]
        lines += [f"  {reason}: {n}" for reason, n in manifest["by_reason"].items()]
        lines.append(f"{manifest['bytes'] / 1e6:.1f} MB in {manifest['seconds']:.0f} s; tiles not decoded: {manifest['bad_tiles']}")
        if manifest["single_level"]:
            lines.append(
                f"{manifest['single_level']} slides have no pyramid: coarse tiles are read from the finest level, about 5x slower"
            )
        return "\n".join(lines)

    def _settings(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "manifest.json").read_text())["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _state_path(self, slide_id: str) -> Path:
        return self.folder / "state" / f"{slide_id}.json"

    def _write(self, slide_id: str, state: Mapping[str, Any]) -> None:
        write_atomic(self._state_path(slide_id), (json.dumps(state, indent=1) + "\n").encode())

    @contextmanager
    def _lock(self, slide_id: str, outputs: list[str]) -> Iterator[bool]:
        path = self.folder / "locks" / f"{slide_id}.lock"
        if not _take(path) and not (self._stale(path, outputs) and _retake(path)):
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)

    def _stale(self, path: Path, outputs: list[str]) -> bool:
        """Return whether nobody holds a lock any more: all outputs exist, its process is dead on this host, or it is too old."""
        try:
            lock = json.loads(path.read_text())
            pid, host, begun = int(lock["pid"]), lock["host"], float(lock["time"])
        except (OSError, ValueError, KeyError, TypeError):
            # Being written, or cut short by a crash: its age decides.
            pid, host, begun = 0, "", _changed(path)
        if time.time() - begun > self.lock_hours * 3600:
            return True
        if outputs and all(_size(self.folder / name) is not None for name in outputs):
            return True
        return host == _host() and pid > 0 and not process_lives(pid)


def _take(path: Path) -> bool:
    """Make a lock; False when there is one."""
    content = json.dumps({"pid": os.getpid(), "host": _host(), "time": time.time()}).encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as err:
        if err.errno == errno.EEXIST:
            return False
        raise
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(content)
    return True


def _retake(path: Path) -> bool:
    """Replace a stale lock; of several processes that try, one succeeds."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.stale")
    try:
        os.rename(path, aside)
    except OSError:
        return False
    aside.unlink(missing_ok=True)
    return _take(path)


@functools.cache
def _host() -> str:
    """Return what the processes share that can see each other's ids: a hash of the boot and of the namespace of ids (a container's).

    Nothing comes from the name of the host, which may name a hospital and could be guessed. Where the system does not number its boots
    every process is a machine of its own, and age alone tells that a lock is stale.
    """
    try:
        known = BOOT_ID.read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)
    return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
