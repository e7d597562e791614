from __future__ import annotations

from pathlib import Path

import pytest

from tests.matching import toy


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a matcher that has learnt nothing: its vectors still tell places of one volume apart."""
    return toy.save(toy.make_objective(dim=16), tmp_path_factory.mktemp("untrained"), size=64)  # one tile


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four phantoms."""
    folder = tmp_path_factory.mktemp("matching") / "store"
    toy.filled(folder, range(4), spacing=4.0)
    return folder
