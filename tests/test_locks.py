"""Lock files: one holder, and file systems that know none."""

from __future__ import annotations

import errno
import fcntl
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medssl.errors import RequestError
from medssl.locks import hold_lock

HOLD = """
import sys, time
from pathlib import Path
from medssl.locks import hold_lock
with hold_lock(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock__has_one_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path, "taken"), pytest.raises(RequestError, match="taken"), hold_lock(path, "taken"):
        pass
    with hold_lock(path, "taken"):
        pass
    assert oct(path.stat().st_mode)[-3:] == "600"


def test_lock__of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RequestError, match="taken"), hold_lock(path, "taken"):
            pass
        other.kill()
    with hold_lock(path, "taken"):
        pass


def test_file_system_without_locks__is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), hold_lock(tmp_path / "lock", "taken"):
        pass
    assert "knows no locks (Function not implemented): see to it that one process alone writes there" in caplog.text
