"""Start worker processes that do not run the user's script again.

`multiprocessing` with the spawn method imports the main module in every child, so that a script without an
`if __name__ == "__main__"` guard starts itself over and over. Our workers need nothing of it. Forking instead is not safe beside the
threads of DuckDB and torch. Can go when Python offers a spawn without the main module.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from medssl._compat.quiet import silence_libraries


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    kept = {name: main.__dict__.pop(name) for name in ("__file__",) if name in main.__dict__}
    spec, main.__spec__ = main.__spec__, None
    try:
        yield
    finally:
        main.__dict__.update(kept)
        main.__spec__ = spec


@contextlib.contextmanager
def _few_arenas() -> Iterator[None]:
    """Let processes that start now keep few heaps: glibc gives each thread one, and those of short threads fill and stay."""
    if "MALLOC_ARENA_MAX" in os.environ:
        yield
        return
    os.environ["MALLOC_ARENA_MAX"] = "2"
    try:
        yield
    finally:
        del os.environ["MALLOC_ARENA_MAX"]


class _Pool(ProcessPoolExecutor):
    """Starts no worker with the user's script, whenever it starts one: Python 3.9 and newer start them one by one, as work comes in."""

    def _spawn_process(self) -> None:
        with _hidden_main(), _few_arenas():
            super()._spawn_process()  # type: ignore[misc]


def spawn_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of spawned processes, the first of which is already started."""
    pool = _Pool(workers, mp_context=multiprocessing.get_context("spawn"), initializer=silence_libraries)
    pool.submit(int)
    return pool
