"""Open slides, per process: neither OpenSlide nor tifffile survives pickling, and a forked handle is shared with its parent.

At most `MAX_HANDLES` are open in a process, the longest unused is let go first, and all OpenSlide handles share one tile cache:
OpenSlide's own is one per handle, so that memory grows with the number of slides.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from medssl.domains.slides.backends import Backend, open_backend

MAX_HANDLES = 64
CACHE_BYTES = 128 << 20

_Key = tuple[str, str]


class Handles:
    """Open slides of this process.

    Args:
        limit: Handles kept open.
        cache_bytes: Size of the tile cache that OpenSlide handles share.
    """

    def __init__(self, limit: int = MAX_HANDLES, cache_bytes: int = CACHE_BYTES) -> None:
        self.limit, self.cache_bytes = limit, cache_bytes
        self._lock = threading.Lock()
        self._open: OrderedDict[_Key, Backend] = OrderedDict()
        self._cache: Any = None
        self._pid = os.getpid()
        self._parked: list[Any] = []

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: Path, backend: str) -> Backend:
        """Return the open slide, opening it when it is not."""
        key = (str(path), backend)
        with self._lock:
            self._after_fork()
            found = self._open.get(key)
            if found is None:
                found = open_backend(path, backend, self._shared_cache())
                self._open[key] = found
                while len(self._open) > self.limit:
                    # Only the reference goes: another thread may be reading, and the last reference closes the file.
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(key)
            return found

    def drop(self, path: Path, backend: str) -> None:
        """Let a handle go; the next `get` opens the file again."""
        with self._lock:
            self._after_fork()
            self._open.pop((str(path), backend), None)

    def _after_fork(self) -> None:
        if self._pid == os.getpid():
            return
        # Closing the parent's handles here could wait for a lock that a thread of the parent held when it forked: they are kept.
        self._parked.append((self._open, self._cache))
        self._open, self._cache, self._pid = OrderedDict(), None, os.getpid()

    def _shared_cache(self) -> Any:
        if self._cache is None:
            try:
                import openslide
            except ImportError:
                return None
            self._cache = openslide.OpenSlideCache(self.cache_bytes)
        return self._cache


HANDLES = Handles()


def _new_lock() -> None:
    HANDLES._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread may have held it
