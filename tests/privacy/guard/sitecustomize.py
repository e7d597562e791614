"""Imported by every Python process below this folder's PYTHONPATH: no way out of the machine, and an end at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

LOG = os.environ.get("MEDSSL_TEST_ATTEMPTS", "")
LOOPBACK = ("127.", "::1", "localhost")
END_AT: dict[str, Any] = {}
"""`arm`: which event ends this process."""


def hook(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith("socket."):
        check_socket(event, args)
    elif END_AT and event == END_AT["event"] and END_AT["text"] in str(args[0]):
        END_AT["count"] -= 1
        if END_AT["count"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def check_socket(event: str, args: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        address = args[1]
        where = address[0] if isinstance(address, tuple) else None  # text or None: AF_UNIX, or already connected
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        where = args[0]
    else:
        return
    if where in (None, "") or str(where).startswith(LOOPBACK):
        return
    if LOG:
        descriptor = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{event} {where}\n".encode())
        os.close(descriptor)
    raise OSError(101, "Network is unreachable")


def arm(event: str, text: str, count: int) -> None:
    """SIGKILL this process at the count-th audit event of this name whose first argument contains the text."""
    END_AT.update(event=event, text=text, count=count)


def rename_machine(name: str) -> None:
    """Give this machine a name that can be searched for."""
    import socket

    real = os.uname()
    socket.gethostname = lambda: name
    os.uname = lambda: type(real)((real.sysname, name, real.release, real.version, real.machine))


sys.addaudithook(hook)
if "MEDSSL_TEST_HOST" in os.environ:
    rename_machine(os.environ["MEDSSL_TEST_HOST"])
