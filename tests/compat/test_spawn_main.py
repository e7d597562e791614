"""Worker processes do not run the user's script again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medssl._compat.spawn_main import spawn_pool

SCRIPT = """
import time
from medssl._compat.spawn_main import spawn_pool
with open({log!r}, "a") as log:
    log.write("run\\n")
pool = spawn_pool(3)
print(sorted(pool.map(abs, range(-40, 0)))[-1], len(pool._processes))
naps = [pool.submit(time.sleep, 0.2) for _ in range(3)]  # nobody idle: all workers start
[nap.result() for nap in naps]
print(len(pool._processes))
pool.shutdown()
"""


def test_script_without_a_guard__runs_once_whichever_worker_starts_late(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(log=str(tmp_path / "log")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines()[-1] == "3"
    assert (tmp_path / "log").read_text() == "run\n"


@pytest.mark.parametrize(("given", "found"), [(None, "2"), ("7", "7")])
def test_workers__keep_few_heaps_unless_the_user_says_otherwise(
    given: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if given:
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
    with spawn_pool(1) as pool:
        assert pool.submit(os.getenv, "MALLOC_ARENA_MAX").result() == found
    assert os.environ.get("MALLOC_ARENA_MAX") == given
