"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test images; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real images at {SHARED_DATA}: this test reads them from there and they are never committed")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """`make test` runs two workers of one thread each; a bare pytest gets two threads."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws without a seed of its own is the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: pytest closes its own whenever another run of it starts."""
    with tempfile.TemporaryDirectory(prefix="medssl-open-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
