"""One process at a time: a lock file that the system releases when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from medssl.errors import RequestError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, which is made when it is missing and stays.

    Some mounts of Lustre and NFS know no locks; there a warning is logged and nothing is held.

    Args:
        path: Lock file, in a folder that is there.
        busy: What to say where another process holds it.

    Raises:
        RequestError: Another process holds it.
        OSError: It cannot be opened.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as err:  # NFS may call a lock of another process a permission
            raise RequestError(busy) from err
        except OSError as err:
            logger.warning(
                "the file system of %s knows no locks (%s): see to it that one process alone writes there",
                path.parent,
                err.strerror,
            )
        yield
